"""Engines on inference servers: repositories for Triton Inference Server, and a server of our own on Ray Serve."""

from collections.abc import Callable
from pathlib import Path

from dat_deploy.environment import installed_version
from dat_deploy.errors import UnsupportedError
from dat_deploy.progress import Progress

__all__ = ["serve"]

_PACKAGES = ("ray", "starlette", "uvicorn", "prometheus-client", "pydantic")  # of the extra `serve`


def serve(
    config: Path | None = None,
    *,
    progress: Progress = lambda _: None,
    note: Callable[[str], None] = print,
    **options: object,
) -> None:
    """Serve an engine over HTTP until SIGTERM or SIGINT, and then until the requests that were taken are answered.

    Args:
        config: a YAML file of the options.
        progress: called with what is being done, and with nothing once requests are taken.
        note: called with what the user must know, such as the address.
        options: see `settings.ServeSettings`; those that are not None come before the file's.

    Raises:
        UnsupportedError: if a package or a GPU is missing.
        ServingError: if an option is wrong, the port is taken, or Ray does not start.
        DatDeployError: if the engine cannot be opened here, or may not be served, see `engine_file.read_engine_file`.
    """
    missing = [package for package in _PACKAGES if installed_version(package) is None]
    if missing:
        raise UnsupportedError(f"serving needs {', '.join(missing)}: pip install 'dat-deploy[serve]'")
    from dat_deploy.serving.own import server
    from dat_deploy.serving.own.settings import read_settings

    server.serve(read_settings(config, options), progress=progress, note=note)
