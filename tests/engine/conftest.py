"""An engine of a small network with every operator."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from dat_deploy.engine.build import BuildReport, build


@pytest.fixture(scope="session")
def rtx() -> None:
    """What follows builds with TensorRT-RTX."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed")


@pytest.fixture(scope="session")
def built(
    rtx: None, exported: Callable[[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> BuildReport:
    """`mini` in fp16 with its plugins, by TensorRT-RTX, for batch 1 and 4; its ONNX file lies beside it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "mini.onnx"
    source.write_bytes(exported("mini", "fp16", "function").read_bytes())
    return build(source, backend="tensorrt-rtx", batches=[1, 4], lowering="plugin")
