"""The operators, usable alone: `from dat_deploy.plugins import deformable_attention`.

A folder an operator, with the same files in each; `reference.py` says what the operator means. Who calls torch.compile
on them sets `torch.compiler.config.cache_key_tag = dat_deploy.plugins.cache_key()` before. Each is imported when it is
first asked for (PEP 562), so that what else is here can be imported without torch.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dat_deploy.plugins.operator import OPERATORS, Operator

if TYPE_CHECKING:
    from dat_deploy.plugins.deformable_attention.torch_op import deformable_attention as deformable_attention
    from dat_deploy.plugins.deformable_sample.torch_op import deformable_sample as deformable_sample
    from dat_deploy.plugins.dispatch import cache_key as cache_key
    from dat_deploy.plugins.neighborhood_attention.torch_op import neighborhood_attention as neighborhood_attention
    from dat_deploy.plugins.window_attention.torch_op import window_attention as window_attention

__all__ = ["cache_key", "deformable_attention", "deformable_sample", "neighborhood_attention", "window_attention"]


def __getattr__(name: str) -> Any:
    if name == "cache_key":
        from dat_deploy.plugins.dispatch import cache_key

        return cache_key
    if name not in OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = Operator(name).torch_operator
    return found


def __dir__() -> list[str]:
    return sorted({"cache_key", *OPERATORS})


class _Plugins(ModuleType):
    """An operator's folder has its name, which here is the function's, whichever is imported first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in OPERATORS and isinstance(value, ModuleType)):  # else Python binds a folder that it imported
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Plugins
