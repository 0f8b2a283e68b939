"""Shared fixtures: exported files and networks are made once for the whole run."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dat_deploy.checkpoint import load_model
from dat_deploy.export import export, relower
from dat_deploy.model import DAT
from dat_deploy.variants import VARIANTS, StageConfig, Variant

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def mini_pp() -> Variant:
    """Every kind of block and option of DAT++ in a network that exports in seconds."""
    shared: dict[str, Any] = {"neighborhood_size": 7, "offset_range_factor": -1.0}
    shared |= {"local_perception": True, "depthwise_mlp": True}
    return replace(
        VARIANTS["pp-tiny"],
        name="mini-pp",
        stages=(
            StageConfig(16, "ND", 2, offset_groups=1, offset_kernel_size=9, offset_stride=8, **shared),
            StageConfig(32, "N", 2, **shared),
            StageConfig(64, "D", 4, offset_groups=2, offset_kernel_size=5, offset_stride=2, **shared),
            StageConfig(128, "DN", 4, offset_groups=4, offset_kernel_size=3, offset_stride=1, **shared),
        ),
    )


@pytest.fixture(scope="session")
def mini() -> Variant:
    """DAT with every kind of block, small enough to be exported, run and built in seconds."""
    points: dict[str, Any] = {"offset_stride": 1, "offset_range_factor": 2.0}
    return replace(
        VARIANTS["tiny"],
        name="mini",
        stages=(
            StageConfig(16, "LS", 2, window_size=7),
            StageConfig(32, "L", 2, window_size=7),
            StageConfig(64, "LD", 4, window_size=7, offset_groups=2, offset_kernel_size=5, **points),
            StageConfig(128, "D", 4, window_size=7, offset_groups=4, offset_kernel_size=3, **points),
        ),
    )


class Lowered(dict[str, Path]):
    """The file of a network by its lowering, made when it is first asked for."""

    def __init__(self, network: str | Variant, folder: Path, **options: Any) -> None:
        super().__init__()
        self.network, self.folder, self.options = network, folder, options

    def __missing__(self, lowering: str) -> Path:
        name = self.network if isinstance(self.network, str) else self.network.name
        path = self.folder / f"{name}.{lowering}.onnx"
        if lowering == "function":
            export(self.network, path, **self.options)
        else:
            relower(self["function"], path, lowering)
        self[lowering] = path
        return path


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """`lowered(network, **options)["hat"]` is a file of that lowering; the options are those of `export`."""
    return lambda network, **options: Lowered(network, tmp_path_factory.mktemp("lowered"), **options)


@pytest.fixture(scope="session")
def exported(
    mini: Variant, mini_pp: Variant, lowered: Callable[..., dict[str, Path]]
) -> Callable[[str, str, str], Path]:
    """(network, precision, lowering) -> an exported file, made once; a network is `mini` or `mini-pp`."""
    networks = {"mini": mini, "mini-pp": mini_pp}
    files: dict[tuple[str, str], dict[str, Path]] = {}

    def file(network: str, precision: str, lowering: str) -> Path:
        key = (network, precision)
        if key not in files:
            files[key] = lowered(networks[network], precision=precision)
        return files[key][lowering]

    return file


@pytest.fixture(scope="session")
def mini_pp_dynamic(mini_pp: Variant, lowered: Callable[..., dict[str, Path]]) -> dict[str, Path]:
    """`mini_pp` with a dynamic batch and image size, by lowering."""
    return lowered(mini_pp, dynamic_image_size=True)


def _loaded(path: Path) -> ModuleType:
    """A file of Python that is no module of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def deterministic_weights() -> ModuleType:
    """tests/golden/deterministic_weights.py: fills a state dict by name and shape."""
    return _loaded(GOLDEN / "deterministic_weights.py")


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    """tests/tensorrt_harness.py: TensorRT's Python layer over TensorRT-RTX's libraries."""
    return _loaded(Path(__file__).with_name("tensorrt_harness.py"))


@pytest.fixture(scope="session")
def libraries(harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the harness runs in."""
    reason = harness.reason_against()
    if reason is not None:
        pytest.skip(reason)
    folder: Path = harness.prepare(tmp_path_factory.mktemp("libraries"))
    return folder


@pytest.fixture(scope="session")
def golden_checkpoints(deterministic_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Official-looking checkpoints with the weights that tests/golden/VARIANT.npz was made with."""
    folder = tmp_path_factory.mktemp("golden")
    paths = {"tiny": folder / "dat_tiny_in1k_224.pth", "pp-tiny": folder / "dat_pp_tiny_in1k_224.pth"}
    for variant, path in paths.items():
        manifest = json.loads((GOLDEN / "manifests" / f"{variant}.json").read_text())["state_dict"]
        state = {name: torch.zeros(shape, dtype=getattr(torch, kind)) for name, (shape, kind) in manifest.items()}
        deterministic_weights.fill_(state)
        parameters = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask"))}
        torch.save({"model": parameters, "epoch": 299}, path)
    return paths


@pytest.fixture(scope="session")
def golden_checkpoint(golden_checkpoints: dict[str, Path]) -> Path:
    return golden_checkpoints["tiny"]


@pytest.fixture(scope="session")
def demo_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo with the weights that ship, and a dynamic batch."""
    path = tmp_path_factory.mktemp("demo_onnx") / "demo.onnx"
    export("demo", path)
    return path


@pytest.fixture(scope="session")
def tiny_onnx(lowered: Callable[..., dict[str, Path]]) -> dict[str, Path]:
    """tiny with seeded random weights and a dynamic batch, by lowering."""
    return lowered("tiny")


@pytest.fixture(scope="session")
def pp_tiny_onnx(lowered: Callable[..., dict[str, Path]]) -> dict[str, Path]:
    """pp-tiny with seeded random weights, dynamic batch and image size, by lowering."""
    return lowered("pp-tiny", dynamic_image_size=True)


@pytest.fixture(scope="session")
def pp_tiny_model() -> DAT:
    """The network whose weights the files of `pp_tiny_onnx` hold."""
    return load_model("pp-tiny")


@pytest.fixture(scope="session")
def tiny_model() -> DAT:
    """The network whose weights the files of `tiny_onnx` hold."""
    return load_model("tiny")


@pytest.fixture(scope="session")
def noise() -> np.ndarray:
    """Eight different normalised images [8, 3, 224, 224]."""
    return np.random.default_rng(7).standard_normal((8, 3, 224, 224)).astype(np.float32)
