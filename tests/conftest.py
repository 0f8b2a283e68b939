"""Shared fixtures: networks are traced once for all workers, exported files made once a worker."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import pytest
import torch
from filelock import FileLock

import dat_deploy
from dat_deploy import cli
from dat_deploy.export import export, onnx_model, relower
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.model import DAT
from dat_deploy.networks.dat.variants import VARIANTS, StageConfig, Variant
from dat_deploy.networks.family import Network, family_called
from dat_deploy.runners import open_runner
from dat_deploy.validate.reference import Reference, open_reference

GOLDEN = Path(__file__).parent / "golden"
LARGEST_KEPT_BYTES = 150_000_000  # of a network whose trace is kept: `tiny` and `pp-tiny` are smaller


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores: each has one, another in each run, and so have the processes that it starts."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(os.getppid() + int(worker.removeprefix("gw"))) % len(cores)]})
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _traced_once(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What torch makes of a network is kept on disk, for all workers and until a source of it changes.

    Everything behind it (precision, lowering, metadata, writing) runs in each export.
    """
    original = onnx_model.onnx_from_model
    package = Path(dat_deploy.__file__).parent
    versions = [module.__version__ for module in (torch, onnxscript, onnx, ir, np)]
    sources = hashlib.sha256(f"{sys.version} {versions}".encode())
    for path in sorted(package.rglob("*.py")):
        sources.update(path.read_bytes())
    cache = getattr(pytestconfig, "cache", None)  # None with -p no:cacheprovider, as benchmarks/gpu_networks.py asks
    traces = tmp_path_factory.mktemp("traces") if cache is None else cache.mkdir("traces")
    folder = traces / sources.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    with FileLock(folder.parent / "lock"):
        for other in folder.parent.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other)

    def onnx_from_model(
        model: torch.nn.Module, network: Network, *, progress: Callable[[str], None] = lambda _: None, **options: Any
    ) -> ir.Model:
        progress("tracing")
        settings = (type(model), network, getattr(model, "fused", None), sorted(options.items()))
        key = hashlib.sha256(repr(settings).encode())
        if sum(weight.nbytes for weight in model.state_dict().values()) > LARGEST_KEPT_BYTES:
            return original(model, network, **options)
        for name, weight in model.state_dict().items():
            key.update(f"{name} {tuple(weight.shape)}".encode())
            key.update(weight.contiguous().numpy().data)
        path = folder / f"{key.hexdigest()[:32]}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                ir.save(original(model, network, **options), path.with_suffix(".new"))
                path.with_suffix(".new").rename(path)
        return ir.load(path)

    onnx_model.onnx_from_model = onnx_from_model
    yield
    onnx_model.onnx_from_model = original


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
def mini_dat() -> Variant:
    """Every kind of block of DAT, in a network for 64×64 pixels that exports in a second."""
    return replace(
        VARIANTS["tiny"],
        name="mini-dat",
        image_size=(64, 64),
        trained_size=64,
        resize_size=73,
        stages=(
            StageConfig(16, "LS", 1, 4),
            StageConfig(32, "L", 1, 4),
            StageConfig(64, "D", 2, offset_groups=2, offset_kernel_size=5, offset_range_factor=2.0),
            StageConfig(128, "D", 4, offset_groups=2, offset_kernel_size=3, offset_range_factor=2.0),
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


@pytest.fixture(scope="session")
def any_size(mini_pp: Variant) -> Variant:
    """Both kinds of block of DAT++ in a network that is quick at any image size."""
    stages = (replace(stage, blocks=blocks) for stage, blocks in zip(mini_pp.stages, "NNDN", strict=True))
    return replace(mini_pp, name="any-size", stages=tuple(stages)).with_image_size(64, 64)


@pytest.fixture(scope="session")
def any_size_onnx(any_size: Variant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`any_size` with a dynamic batch and image size."""
    path = tmp_path_factory.mktemp("any_size") / "any-size.onnx"
    export(any_size, path, dynamic_image_size=True)
    return path


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
def process_state() -> Callable[[], dict[str, str]]:
    """What belongs to everybody in this process, by name."""
    state: Callable[[], dict[str, str]] = _loaded(Path(__file__).with_name("process_state.py")).process_state
    return state


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
def demo_lowerings(lowered: Callable[..., dict[str, Path]]) -> dict[str, Path]:
    """demo with the weights that ship, and a dynamic batch, by lowering."""
    return lowered("demo")


@pytest.fixture(scope="session")
def demo_onnx(demo_lowerings: dict[str, Path]) -> Path:
    return demo_lowerings["function"]


@pytest.fixture(scope="session")
def demo_reference(demo_onnx: Path) -> Iterator[Reference]:
    """PyTorch's side of the files of `demo_lowerings`, whose answers all tests share."""
    with open_runner(str(demo_onnx)) as runner, open_reference(runner.description) as reference:
        yield reference


@pytest.fixture(scope="session")
def demo_batch_3_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo with the weights that ship, for batches of 3 alone."""
    path = tmp_path_factory.mktemp("demo_batch_3_onnx") / "demo.onnx"
    export("demo", path, batch=3)
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


@pytest.fixture
def call_main(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`call_main("export", "--variant", "tiny")` as a shell runs it, in this process, and what is written on stderr.

    Lines of stages that have ended are left out of that; tests/test_stages.py is about them.
    """
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        arguments = ["dat-deploy", *map(str, words)]
        monkeypatch.setattr(sys, "argv", arguments)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                cli.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert isinstance(stop.value.code, int)
        text, errors = capfd.readouterr()
        command = "self-test" if "--self-test" in arguments else arguments[1]
        errors = re.sub(rf"^{command}: .+, \d+\.\d s\n", "", errors, flags=re.MULTILINE)
        return subprocess.CompletedProcess(arguments, stop.value.code, text, errors)

    return run


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`toy_family.py` as another package would bring it, by an entry point."""
    shutil.copy(Path(__file__).parent / "toy_family.py", tmp_path)
    about = tmp_path / "toy_family-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dat_deploy.families]\ntoy = toy_family:FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    return family_called("toy")
