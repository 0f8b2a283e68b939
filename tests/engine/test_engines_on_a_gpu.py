"""Every engine that runs on the GPU at hand, beside eager PyTorch: `make bench-gpu` runs these, and so does `-m gpu`.

The tolerance is that of `validate`: 1e-4 in float32, and in half precision twice the error of eager PyTorch there, all
against float64. TensorRT, TensorRT-RTX and AOTInductor are skipped with their own words where they cannot run.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dat_deploy.engine.build import BuildReport, build
from dat_deploy.engine.inspector import inspect
from dat_deploy.engine.passport import Profile
from dat_deploy.engine.tensorrt import lowering_choice
from dat_deploy.engine.tensorrt.lowering_choice import stored_verdicts
from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.model import half_network
from dat_deploy.networks.dat.variants import Variant
from dat_deploy.plugins.tensorrt.calls import launch_counts
from dat_deploy.precision import PRECISIONS
from dat_deploy.runners import open_runner
from dat_deploy.runners.base import Runner
from dat_deploy.validate.defaults import FP32_TOLERANCE

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ENGINES = {  # backend, lowering and form of the plugins
    "aotinductor": ("aotinductor", None, "auto"),
    "tensorrt ahead-of-time": ("tensorrt", "plugin", "ahead-of-time"),
    "tensorrt IPluginV3": ("tensorrt", "plugin", "IPluginV3"),
    "tensorrt gather": ("tensorrt", "gather", "auto"),
    "tensorrt function": ("tensorrt", "function", "auto"),
    "tensorrt-rtx IPluginV3": ("tensorrt-rtx", "plugin", "IPluginV3"),
    "tensorrt-rtx gather": ("tensorrt-rtx", "gather", "auto"),
}
OF_TENSORRT = [name for name in ENGINES if name != "aotinductor"]
BATCHES = (1, 3, 8)
MOST = max(BATCHES)
ARRANGEMENTS = {  # which image is in which slot
    "distinct": lambda batch: np.arange(batch),
    "the same in all": lambda batch: np.full(batch, MOST - 1),
    "permuted": lambda batch: np.roll(np.arange(MOST)[::-1], 1)[:batch],
}
Images = np.ndarray
Build = Callable[[str, str], BuildReport]
Open = Callable[[str, str], Runner]
Check = Callable[[np.ndarray, np.ndarray, str], None]

every_engine = pytest.mark.parametrize("engine", ENGINES)
every_precision = pytest.mark.parametrize("precision", ["fp32", "fp16"])


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")


@pytest.fixture(scope="session")
def images() -> Images:
    return np.random.default_rng(3).standard_normal((MOST, 3, 224, 224)).astype(np.float32)


@pytest.fixture(scope="session")
def exact(mini: Variant, images: Images) -> np.ndarray:
    """Logits of each image in float64."""
    with torch.inference_mode():
        return load_model(mini).double()(torch.from_numpy(images).double()).numpy()


@pytest.fixture(scope="session")
def check(mini: Variant, images: Images, exact: np.ndarray) -> Check:
    """(logits, which image is in which slot, precision): every slot holds the logits of its image."""
    tolerances = {"fp32": FP32_TOLERANCE}

    def tolerance(precision: str) -> float:
        if precision not in tolerances:
            dtype = PRECISIONS[precision].dtype
            with torch.inference_mode():
                rounded = half_network(load_model(mini), dtype).to(DEVICE)(torch.from_numpy(images).to(DEVICE))
            tolerances[precision] = 2 * float(np.abs(rounded.double().cpu().numpy() - exact).max())
        return tolerances[precision]

    def check(logits: np.ndarray, slots: np.ndarray, precision: str) -> None:
        assert logits.dtype == np.float32
        errors = np.abs(logits - exact[slots]).max(axis=1)
        wrong = {slot: error for slot, error in enumerate(errors) if not error <= tolerance(precision)}
        assert not wrong, f"slots and their errors, of which {tolerance(precision):.3g} is allowed: {wrong}"

    return check


@pytest.fixture(scope="session")
def built_here(
    mini: Variant, exported: Callable[[str, str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Build:
    """(engine, precision) -> `mini` built for batch 1 and up to 8, once; what cannot be built here is skipped."""
    folder = tmp_path_factory.mktemp("engines")
    reports: dict[tuple[str, str], BuildReport | str] = {}

    def make(engine: str, precision: str) -> BuildReport:
        backend, lowering, form = ENGINES[engine]
        if backend == "aotinductor":
            output = folder / f"{precision}.pt2"
            return build(output=output, backend=backend, batches=BATCHES, variant=mini, precision=precision)
        source, output = exported("mini", precision, "function"), folder / f"{engine}.{precision}.engine"
        assert lowering is not None
        return build(source, output, backend=backend, batches=["1", f"2-3-{MOST}"], lowering=lowering, plugin_form=form)

    def report(engine: str, precision: str) -> BuildReport:
        key = (engine, precision)
        if key not in reports:
            try:
                reports[key] = make(engine, precision)
            except UnsupportedError as error:
                reports[key] = str(error)
        found = reports[key]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return report


@pytest.fixture
def opened(built_here: Build) -> Iterator[Open]:
    """(engine, precision) -> its runner, closed in the end; what this GPU cannot run is skipped."""
    with contextlib.ExitStack() as stack:

        def open_(engine: str, precision: str) -> Runner:
            report = built_here(engine, precision)
            try:
                return stack.enter_context(open_runner(str(report.path)))
            except UnsupportedError as error:
                pytest.skip(str(error))

        yield open_


def on_device(runner: Runner, images: torch.Tensor) -> torch.Tensor:
    """Logits of images on the device, which stay there."""
    outputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] = runner.outputs_on_device  # type: ignore[attr-defined]
    return outputs(images)["logits"]


def launches() -> int:
    return sum(launch_counts().values())


# Answers


@pytest.mark.parametrize("batch", BATCHES)
@every_precision
@every_engine
def test_every_slot_is_right(
    engine: str, precision: str, batch: int, opened: Open, images: Images, check: Check
) -> None:
    runner = opened(engine, precision)
    for slots in (arrange(batch) for arrange in ARRANGEMENTS.values()):
        check(runner(images[slots]), slots, precision)


@pytest.mark.parametrize("engine", OF_TENSORRT)
def test_every_batch_of_a_range_is_right_in_any_order(
    engine: str, opened: Open, built_here: Build, images: Images, check: Check
) -> None:
    runner = opened(engine, "fp16")
    assert built_here(engine, "fp16").passport.profiles == (Profile(1, 1, 1), Profile(2, 3, MOST))
    for batch in (8, 1, 7, 2, 3, 5, 4, 6, 1, 8):
        slots = ARRANGEMENTS["permuted"](batch)
        check(runner(images[slots]), slots, "fp16")


@every_precision
@every_engine
def test_arrays_and_tensors_give_the_same(
    engine: str, precision: str, opened: Open, images: Images, check: Check
) -> None:
    runner = opened(engine, precision)
    for batch in (3, 1):
        tensor = torch.from_numpy(images[:batch]).to(DEVICE)
        logits = on_device(runner, tensor)
        assert logits.device == tensor.device
        np.testing.assert_array_equal(logits.cpu().numpy(), runner(images[:batch]))


@every_engine
def test_tensors_of_any_type_and_layout_are_taken(engine: str, opened: Open, images: Images, check: Check) -> None:
    runner = opened(engine, "fp16")
    slots = np.arange(3)
    tensor = torch.from_numpy(images[slots]).to(DEVICE)
    backwards = torch.from_numpy(images[slots[::-1]].copy()).to(DEVICE).flip(0)
    for given in (tensor.double(), tensor.to(memory_format=torch.channels_last), backwards):
        check(on_device(runner, given).cpu().numpy(), slots, "fp16")
    half = on_device(runner, tensor.half()).cpu().numpy()
    np.testing.assert_array_equal(half, on_device(runner, tensor.half().float()).cpu().numpy())


@every_engine
def test_a_tensor_is_waited_for_and_results_belong_to_the_stream_of_the_caller(
    engine: str, opened: Open, images: Images, check: Check
) -> None:
    """The image is made, used and overwritten on a side stream behind work of some milliseconds, without waiting."""
    runner = opened(engine, "fp16")
    slots = np.arange(3)
    tensor, image = torch.from_numpy(images[slots]).to(DEVICE), torch.zeros(3, 3, 224, 224, device=DEVICE)
    on_device(runner, tensor)
    busy = torch.ones(4096, 4096, device=DEVICE)
    kept = []
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            for _ in range(10):
                busy = busy @ busy
            image.copy_(tensor)
            kept.append(on_device(runner, image))
            image.fill_(float("nan"))
        hosts = [logits.cpu().numpy() for logits in kept]
    for logits in hosts:
        check(logits, slots, "fp16")


@every_engine
def test_threads_get_their_own_answers(engine: str, opened: Open, images: Images, check: Check) -> None:
    runner = opened(engine, "fp16")

    def work(number: int) -> None:
        slots = np.roll(np.arange(MOST), number)[: BATCHES[number % len(BATCHES)]]
        for i in range(10):
            if i % 2:
                logits = runner(images[slots])
            else:
                logits = on_device(runner, torch.from_numpy(images[slots]).to(DEVICE)).cpu().numpy()
            check(logits, slots, "fp16")

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, number) for number in range(6)]:
            done.result()


@every_engine
def test_a_batch_without_a_profile_is_refused_and_the_next_is_answered(
    engine: str, opened: Open, images: Images, check: Check
) -> None:
    runner = opened(engine, "fp16")
    slots = np.arange(MOST + 1) % MOST
    with pytest.raises(ShapeError, match="batch 1 or "):
        runner(images[slots])
    with pytest.raises(ShapeError):
        on_device(runner, torch.from_numpy(images[slots]).to(DEVICE))
    check(runner(images[:3]), np.arange(3), "fp16")


# Graphs


@every_precision
@pytest.mark.parametrize("engine", OF_TENSORRT)
def test_a_replay_calls_no_python(
    engine: str, precision: str, opened: Open, built_here: Build, images: Images, check: Check
) -> None:
    runner, passport = opened(engine, precision), built_here(engine, precision).passport
    tensor = torch.from_numpy(images).to(DEVICE)
    before = launch_counts()
    logits = [on_device(runner, tensor)]
    captured = {name: count - before[name] for name, count in launch_counts().items()}
    if passport.plugin_form == "IPluginV3":
        assert {name for name, count in captured.items() if count} == set(passport.plugins)
        assert all(captured[name] >= count for name, count in passport.plugins.items())
    else:
        assert not any(captured.values())
    before_replays = launches()
    logits += [on_device(runner, tensor) for _ in range(20)]
    hosts = [runner(images) for _ in range(3)]
    assert launches() == before_replays
    for each in [*(every.cpu().numpy() for every in logits), *hosts]:
        check(each, np.arange(MOST), precision)


def test_aotinductor_is_captured_by_a_cuda_graph(opened: Open, images: Images, check: Check) -> None:
    """And answers calls without one afterwards."""
    runner = opened("aotinductor", "fp16")
    tensor = torch.from_numpy(images).to(DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_device(runner, tensor)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = on_device(runner, tensor)
        for shift in (0, 3):
            slots = np.roll(np.arange(MOST), shift)
            tensor.copy_(torch.from_numpy(images[slots]))
            logits.fill_(float("nan"))
            graph.replay()
            check(logits.cpu().numpy(), slots, "fp16")
    check(runner(images), np.arange(MOST), "fp16")


# What an engine says of itself


@every_precision
@pytest.mark.parametrize("engine", OF_TENSORRT)
def test_passport_and_inspection_list_the_layers_of_the_engine(
    engine: str, precision: str, opened: Open, built_here: Build
) -> None:
    opened(engine, precision)  # what does not run here cannot be looked into
    report = built_here(engine, precision)
    passport = report.passport
    assert passport.engine_layers
    assert passport.engine_layers.get("bf16", 0) == 0
    assert (passport.engine_layers.get("fp16", 0) > 0) == (precision == "fp16")
    inspection = inspect(report.path)
    assert inspection.unseen is None
    assert len(inspection.engine_layers) == sum(passport.engine_layers.values())
    assert all(layer.name for layer in inspection.engine_layers)
    if passport.plugin_form == "IPluginV3":
        assert sum(layer.is_plugin for layer in inspection.engine_layers) == sum(passport.plugins.values()) > 0
    elif passport.plugin_form is None:
        assert not any(layer.is_plugin for layer in inspection.engine_layers)


def test_of_a_package_no_layers_are_listed(built_here: Build) -> None:
    report = built_here("aotinductor", "fp16")
    assert report.passport.engine_layers is None
    assert inspect(report.path).unseen == "an AOTInductor package is compiled code, whose layers are not listed"


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_lowering_is_chosen_by_trying_and_what_was_found_is_kept(
    backend: str,
    opened: Open,
    exported: Callable[[str, str, str], Path],
    images: Images,
    check: Check,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened(f"{backend} gather", "fp16")  # skips what does not run here
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(tmp_path / "cache" / "configurations.json"))
    source = exported("mini", "fp16", "function")
    report = build(source, tmp_path / "first.engine", backend=backend, batches=[3])
    ((where, found),) = stored_verdicts().items()
    assert where.startswith(f"{backend} {report.passport.backend_version}, sm_")
    ((what, verdicts),) = found.items()
    assert what.startswith("mini 224x224, fp16, batch 3, ")
    assert [verdict.lowering for verdict in verdicts] == list(lowering_choice.CANDIDATES)
    passed = {verdict.lowering: verdict.ms for verdict in verdicts if verdict.passed}
    assert {"plugin", "gather"} <= set(passed), "; ".join(map(str, verdicts))
    assert report.passport.metadata.lowering == min(passed, key=lambda lowering: passed[lowering] or 0.0)
    assert report.notes[0].startswith(f"took {report.passport.metadata.lowering}, the fastest that is right with ")
    with open_runner(str(report.path)) as runner:
        check(runner(images[:3]), np.arange(3), "fp16")

    monkeypatch.setattr(lowering_choice, "try_lowerings", lambda *_, **__: pytest.fail("tried again"))
    again = build(source, tmp_path / "second.engine", backend=backend, batches=[3])
    assert again.notes == report.notes
    assert again.passport.metadata.lowering == report.passport.metadata.lowering
