"""How work that takes long tells its caller what is being done."""

from collections.abc import Callable

__all__ = ["Progress"]

Progress = Callable[[str], None]
