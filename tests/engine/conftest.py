"""Small networks with every operator, and an engine of one."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dat_deploy.engine.build import BuildReport, build
from dat_deploy.export import export, relower
from dat_deploy.variants import VARIANTS, StageConfig, Variant


@pytest.fixture(scope="session")
def rtx() -> None:
    """What follows builds with TensorRT-RTX."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed")


@pytest.fixture(scope="session")
def mini() -> Variant:
    """DAT with every kind of block, small enough to be built in a second."""
    return replace(
        VARIANTS["tiny"],
        name="mini",
        stages=(
            StageConfig(16, "LS", 2, window_size=7),
            StageConfig(32, "L", 2, window_size=7),
            StageConfig(
                64,
                "LD",
                4,
                window_size=7,
                offset_groups=2,
                offset_kernel_size=5,
                offset_stride=1,
                offset_range_factor=2.0,
            ),
            StageConfig(
                128,
                "D",
                4,
                window_size=7,
                offset_groups=4,
                offset_kernel_size=3,
                offset_stride=1,
                offset_range_factor=2.0,
            ),
        ),
    )


@pytest.fixture(scope="session")
def exported(
    mini: Variant, mini_pp: Variant, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Path]:
    """(network, precision, lowering) -> an exported file, made once; a network is `mini`, `mini-pp` or a variant."""
    folder = tmp_path_factory.mktemp("exported")

    def file(network: str, precision: str, lowering: str) -> Path:
        source, path = (folder / f"{network}.{precision}.{form}.onnx" for form in ("function", lowering))
        if not source.exists():
            export({"mini": mini, "mini-pp": mini_pp}.get(network, network), source, precision=precision)
        if not path.exists():
            relower(source, path, lowering)
        return path

    return file


@pytest.fixture(scope="session")
def built(
    rtx: None, exported: Callable[[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> BuildReport:
    """`mini` in fp16 with its plugins, by TensorRT-RTX, for batch 1 and 4; its ONNX file lies beside it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "mini.onnx"
    source.write_bytes(exported("mini", "fp16", "function").read_bytes())
    return build(source, backend="tensorrt-rtx", batches=[1, 4], lowering="plugin")
