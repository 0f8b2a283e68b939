"""Every runtime behind the same interface gives PyTorch's logits, or says in one sentence why it cannot run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dat_deploy.engine.passport import Profile
from dat_deploy.errors import DatDeployError, EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.export import LOWERINGS, export, relower
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.runners import RUNTIMES, EngineDescription, Outputs, Runner, open_runner, parse_engine

ONNX_RUNTIMES = [name for name, runtime in RUNTIMES.items() if runtime.target == "FILE.onnx"]


@pytest.fixture(scope="module")
def files(mini_dat: Variant, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`mini_dat` with seeded random weights and a dynamic batch, once for each lowering."""
    folder = tmp_path_factory.mktemp("files")
    paths = {lowering: folder / f"mini.{lowering}.onnx" for lowering in LOWERINGS}
    export(mini_dat, paths["function"])
    for lowering in set(LOWERINGS) - {"function"}:
        relower(paths["function"], paths[lowering], lowering)
    return paths


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Three different normalised images [3, 3, 64, 64]."""
    return np.random.default_rng(7).standard_normal((3, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(mini_dat: Variant, noise: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_model(mini_dat)(torch.from_numpy(noise)).numpy()


@pytest.fixture
def engine(mini_dat: Variant, monkeypatch: pytest.MonkeyPatch) -> str:
    """`expected` by name, in PyTorch."""
    monkeypatch.setitem(VARIANTS, "mini-dat", mini_dat)
    return "pytorch:mini-dat"


@pytest.mark.parametrize("lowering", ["function", "gather", "gridsample", "hat"])
def test_openvino_agrees_with_pytorch(lowering, files, noise, expected):
    with open_runner(f"openvino:{files[lowering]}") as runner:
        for batch in (1, 3):
            np.testing.assert_allclose(runner(noise[:batch]), expected[:batch], rtol=0, atol=1e-4)


def test_openvino_in_bfloat16_computes_in_bfloat16(files, noise, expected):
    reasons = RUNTIMES["openvino-bf16"].reasons()
    if reasons:
        pytest.skip("; ".join(reasons))
    with open_runner(f"openvino-bf16:{files['function']}") as runner:
        error = np.abs(runner(noise[:1]) - expected[:1]).max()
    assert 1e-3 < error < 2**-4 * np.abs(expected).max()  # eight of its steps; logits of fp32 are 1e-5 apart


@pytest.mark.parametrize("lowering", ["function", "gather", "gridsample", "hat"])
def test_nan_stays_in_its_own_slot_of_the_batch(lowering, files, noise, expected):
    spoiled = noise.copy()
    spoiled[1, :, 30, 30] = np.nan
    with open_runner(str(files[lowering])) as runner:
        logits = runner(spoiled)
    assert np.isnan(logits[1]).all()
    np.testing.assert_allclose(logits[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-4)


def test_raw_pixels_are_refused(files):
    with open_runner(str(files["function"])) as runner, pytest.raises(ShapeError) as error:
        runner(np.zeros((1, 3, 64, 64), dtype=np.uint8))
    assert str(error.value) == (
        f"{files['function']}: input 'image' has type uint8; it takes normalised float32. "
        "Use dat_deploy.images.preprocess."
    )


def test_pytorch_runner_is_the_network(engine, noise, expected):
    with open_runner(engine) as runner:
        np.testing.assert_array_equal(runner(noise[:1]), open_runner(engine)(noise[:1]))
        np.testing.assert_allclose(runner(noise), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.compiler
def test_compiled_pytorch_agrees_with_eager(engine, noise, expected):
    with open_runner(engine.replace("pytorch", "pytorch-compile")) as runner:
        np.testing.assert_allclose(runner(noise[:1]), expected[:1], rtol=0, atol=1e-4)


def test_description_says_what_runs(files):
    with open_runner(f"openvino:{files['hat']}", threads=1) as runner:
        about = runner.description
    assert (about.runtime, about.device, about.precision, about.threads) == ("openvino", "cpu", "fp32", 1)
    assert (about.variant, about.image_size, about.batch, about.lowering) == ("mini-dat", (64, 64), None, "hat")


@pytest.mark.parametrize("shape", [(3, 64, 64), (0, 3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 96)])
def test_image_of_another_shape_is_refused(shape, files):
    with open_runner(str(files["function"])) as runner, pytest.raises(ShapeError) as error:
        runner(np.zeros(shape, dtype=np.float32))
    assert str(error.value) == (
        f"{files['function']}: input 'image' has shape {list(shape)}; it takes [any batch, 3, 64, 64]. "
        f"Export again with `batch` or `image_size` for another."
    )


def test_dynamic_file_takes_the_sizes_of_its_network_and_says_so(any_size_onnx):
    with open_runner(str(any_size_onnx), image_size=(96, 128)) as runner:
        assert (runner.description.image_size, runner.description.dynamic_image_size) == ((96, 128), True)
        assert runner.description.preprocessing.image_size == (96, 128)
        assert runner(np.zeros((1, 3, 64, 96), dtype=np.float32)).shape == (1, 1000)
        with pytest.raises(ShapeError) as error:
            runner(np.zeros((1, 3, 100, 96), dtype=np.float32))
        assert str(error.value) == (
            "image size 100x96 does not fit variant 'any-size': its sides are multiples of 32 px, from 64 px on. "
            "Nearest that work: 96x96 or 128x96."
        )
        with pytest.raises(ShapeError, match=r"it takes \[any batch, 3, height, width\]"):
            runner(np.zeros((1, 1, 96, 96), dtype=np.float32))


def test_pytorch_of_dat_pp_takes_any_size_and_that_of_dat_one():
    with open_runner("pytorch:pp-tiny", image_size=(64, 64)) as runner:
        assert runner(np.zeros((1, 3, 64, 96), dtype=np.float32)).shape == (1, 1000)
    with open_runner("pytorch:tiny") as runner, pytest.raises(ShapeError, match=r"it takes .any batch, 3, 224, 224."):
        runner(np.zeros((1, 3, 448, 448), dtype=np.float32))


def test_fixed_file_is_not_opened_for_another_size(files):
    with pytest.raises(ShapeError) as error:
        open_runner(str(files["function"]), image_size=(448, 448))
    assert str(error.value) == (
        f"{files['function']} is made for images of 64x64, not 448x448. Export it again with `image_size=(448, 448)`."
    )


def test_backbone_gives_no_logits():
    with open_runner("pytorch:pp-tiny", features=(3,), image_size=(64, 64)) as runner:
        images = np.zeros((1, 3, 64, 64), dtype=np.float32)
        assert {name: value.shape for name, value in runner.outputs(images).items()} == {
            "feature_map_3": (1, 512, 2, 2)
        }
        with pytest.raises(DatDeployError) as error:
            runner(images)
    assert str(error.value) == (
        "pytorch:pp-tiny is a backbone: it gives feature_map_3 and no logits. "
        "Use outputs(images) for its maps, or export it again without `features` to classify."
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_plugin_file_is_refused_where_no_plugin_runs(runtime, files):
    engine = f"{runtime}:{files['plugin']}"
    with pytest.raises(EngineBuildError) as error:
        open_runner(engine)
    assert str(error.value) == (
        f"{engine} has lowering 'plugin': its operators have no body, so only TensorRT with the plugins runs it. "
        'Export it with `lowering="function"`.'
    )


def test_cuda_is_refused_where_there_is_none(files):
    if not RUNTIMES["onnxruntime-cuda"].reasons():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(UnsupportedError) as error:
        open_runner(f"onnxruntime-cuda:{files['function']}")
    assert str(error.value) == (
        "onnxruntime-cuda cannot run here: the installed onnxruntime has no CUDA: "
        "pip install 'dat-deploy[onnxruntime-gpu]'"
    )


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (
            "tiny",
            "cannot tell what runs 'tiny'; an engine is FILE.onnx, FILE.engine, FILE.pt2 or RUNTIME:TARGET, such as "
            "pytorch:tiny or openvino:tiny.onnx. Runtimes: pytorch, pytorch-compile, onnxruntime, onnxruntime-cuda, "
            "openvino, openvino-bf16, tensorrt, tensorrt-rtx, aotinductor.",
        ),
        (
            "openvinno:a.onnx",
            "no runtime 'openvinno' in 'openvinno:a.onnx'. Did you mean openvino or openvino-bf16? Runtimes: pytorch, "
            "pytorch-compile, onnxruntime, onnxruntime-cuda, openvino, openvino-bf16, tensorrt, tensorrt-rtx, "
            "aotinductor.",
        ),
        ("pytorch:", "'pytorch:' names no target; write pytorch:VARIANT"),
    ],
)
def test_engine_that_names_nothing_is_refused(engine, sentence):
    with pytest.raises(DatDeployError) as error:
        parse_engine(engine)
    assert str(error.value) == sentence


class Counts(Runner):
    """Gives each image the sum of its samples, and keeps the sizes of its batches."""

    def __init__(self, network: Variant, batch: int | None, profiles: tuple[str, ...]) -> None:
        self.sizes: list[int] = []
        self.description = EngineDescription(
            name="counts",
            runtime="counts",
            runtime_version="1",
            network=network,
            outputs=("logits",),
            preprocessing=network.preprocessing,
            batch=batch,
            profiles=tuple(map(Profile.parse, profiles)),
            weights_sha256="",
            weights_source="none",
        )

    def _run(self, images_nchw: np.ndarray) -> Outputs:
        self.sizes.append(len(images_nchw))
        return {"logits": images_nchw.sum(axis=(2, 3))}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("batch", "profiles", "images", "sizes"),
    [
        (None, (), 1, [1]),
        (None, (), 5, [5]),
        (None, (), 8, [8]),
        (None, (), 19, [8, 8, 8]),  # one shape for all calls
        (4, (), 1, [4]),
        (4, (), 9, [4, 4, 4]),
        (None, ("1-8-32",), 3, [3]),
        (None, ("1-8-32",), 32, [32]),
        (None, ("1-8-32",), 70, [32, 32, 6]),
        (None, ("1", "8"), 1, [1]),
        (None, ("1", "8"), 3, [8]),
        (None, ("1", "8"), 17, [8, 8, 1]),
        (None, ("4-8",), 2, [4]),
    ],
)
def test_images_go_in_the_largest_batches_that_the_engine_takes(batch, profiles, images, sizes, mini_dat):
    runner = Counts(mini_dat, batch, profiles)
    numbers = np.random.default_rng(0).standard_normal((images, 3, 64, 64)).astype(np.float32)
    outputs = runner.in_batches(numbers)
    np.testing.assert_array_equal(outputs["logits"], numbers.sum(axis=(2, 3)))
    assert runner.sizes == sizes
    np.testing.assert_array_equal(runner.logits(numbers), outputs["logits"])


def test_images_go_in_batches_of_a_size_that_is_named(mini_dat):
    runner = Counts(mini_dat, None, ("1-8-32",))
    numbers = np.arange(5 * 3 * 64 * 64, dtype=np.float32).reshape(5, 3, 64, 64)
    np.testing.assert_array_equal(runner.in_batches(numbers, 2)["logits"], numbers.sum(axis=(2, 3)))
    assert runner.sizes == [2, 2, 2]


def test_no_images_at_all_are_refused(mini_dat):
    with pytest.raises(ShapeError, match=r"has shape \[0, 3, 64, 64\]"):
        Counts(mini_dat, 4, ()).in_batches(np.empty((0, 3, 64, 64), np.float32))


def test_a_description_says_which_file_and_what_rounds(files):
    with open_runner(f"openvino:{files['hat']}") as runner:
        about = runner.description
    assert (about.path, about.file_kind, about.file_precision) == (files["hat"], "exported", "fp32")
    assert (about.answer_precision, about.rounds_locations, about.family) == ("fp32", False, "dat")
    of_int8 = replace(about, precision="int8", file_precision="int8")
    of_fp16 = replace(about, file_precision="fp16")
    on_bf16 = replace(of_fp16, precision="bf16")
    assert [each.answer_precision for each in (of_int8, of_fp16, on_bf16)] == ["int8", "fp16", "bf16"]


def test_the_table_of_runtimes_loads_none_of_them():
    code = (
        "import sys, dat_deploy.runners\n"
        "print(sorted({'torch', 'onnx_ir', 'onnxruntime', 'openvino', 'tensorrt'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout.strip() == "[]"
