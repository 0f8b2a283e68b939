"""Every runtime behind the same interface gives PyTorch's logits, or says in one sentence why it cannot run."""

import numpy as np
import pytest
import torch

from dat_deploy.errors import DatDeployError, EngineBuildError, ShapeError, UnsupportedError
from dat_deploy.runners import RUNTIMES, open_runner, parse_engine, reasons_against

ONNX_RUNTIMES = [name for name, runtime in RUNTIMES.items() if runtime.target == "FILE.onnx"]


@pytest.fixture(scope="module")
def expected(tiny_model, noise) -> np.ndarray:
    with torch.inference_mode():
        return tiny_model(torch.from_numpy(noise[:3])).numpy()


@pytest.mark.parametrize("lowering", ["function", "gather", "gridsample", "hat"])
def test_openvino_agrees_with_pytorch(lowering, tiny_onnx, noise, expected):
    with open_runner(f"openvino:{tiny_onnx[lowering]}") as runner:
        for batch in (1, 3):
            np.testing.assert_allclose(runner(noise[:batch]), expected[:batch], rtol=0, atol=1e-4)


def test_openvino_in_bfloat16_computes_in_bfloat16(tiny_onnx, noise, expected):
    reasons = reasons_against(RUNTIMES["openvino-bf16"])
    if reasons:
        pytest.skip("; ".join(reasons))
    with open_runner(f"openvino-bf16:{tiny_onnx['function']}") as runner:
        error = np.abs(runner(noise[:1]) - expected[:1]).max()
    assert 1e-3 < error < 2**-5 * np.abs(expected).max()


@pytest.mark.parametrize("lowering", ["function", "gather", "gridsample", "hat"])
def test_nan_stays_in_its_own_slot_of_the_batch(lowering, tiny_onnx, noise, expected):
    spoiled = noise[:3].copy()
    spoiled[1, :, 100, 100] = np.nan
    with open_runner(str(tiny_onnx[lowering])) as runner:
        logits = runner(spoiled)
    assert np.isnan(logits[1]).all()
    np.testing.assert_allclose(logits[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-4)


def test_raw_pixels_are_refused(tiny_onnx):
    with open_runner(str(tiny_onnx["function"])) as runner, pytest.raises(ShapeError) as error:
        runner(np.zeros((1, 3, 224, 224), dtype=np.uint8))
    assert str(error.value) == (
        f"{tiny_onnx['function']}: input 'image' has type uint8; it takes normalised float32. "
        f"Use dat_deploy.preprocess."
    )


def test_pytorch_runner_is_the_network(noise, expected):
    with open_runner("pytorch:tiny") as runner:
        np.testing.assert_array_equal(runner(noise[:1]), open_runner("pytorch:tiny")(noise[:1]))
        np.testing.assert_allclose(runner(noise[:3]), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_pytorch_agrees_with_eager(noise, expected):
    with open_runner("pytorch-compile:tiny") as runner:
        np.testing.assert_allclose(runner(noise[:1]), expected[:1], rtol=0, atol=1e-4)


def test_description_says_what_runs(tiny_onnx):
    with open_runner(f"openvino:{tiny_onnx['hat']}", threads=1) as runner:
        about = runner.description
    assert (about.runtime, about.device, about.precision, about.threads) == ("openvino", "cpu", "fp32", 1)
    assert (about.variant, about.image_size, about.batch, about.lowering) == ("tiny", (224, 224), None, "hat")


@pytest.mark.parametrize("shape", [(3, 224, 224), (0, 3, 224, 224), (1, 1, 224, 224), (1, 3, 224, 256)])
def test_image_of_another_shape_is_refused(shape, tiny_onnx):
    with open_runner(str(tiny_onnx["function"])) as runner, pytest.raises(ShapeError) as error:
        runner(np.zeros(shape, dtype=np.float32))
    assert str(error.value) == (
        f"{tiny_onnx['function']}: input 'image' has shape {list(shape)}; it takes [any batch, 3, 224, 224]. "
        f"Export again with --batch or --image-size for another."
    )


def test_dynamic_file_takes_the_sizes_of_its_network_and_says_so(pp_tiny_onnx):
    with open_runner(str(pp_tiny_onnx["function"]), image_size=(96, 128)) as runner:
        assert (runner.description.image_size, runner.description.dynamic_image_size) == ((96, 128), True)
        assert runner.description.preprocessing.image_size == (96, 128)
        assert runner(np.zeros((1, 3, 64, 96), dtype=np.float32)).shape == (1, 1000)
        with pytest.raises(ShapeError) as error:
            runner(np.zeros((1, 3, 100, 96), dtype=np.float32))
        assert str(error.value) == (
            "image size 100x96 does not fit variant 'pp-tiny': its sides are multiples of 32 px, from 64 px on. "
            "Nearest that work: 96x96 or 128x96."
        )
        with pytest.raises(ShapeError, match=r"it takes \[any batch, 3, height, width\]"):
            runner(np.zeros((1, 1, 96, 96), dtype=np.float32))


def test_pytorch_of_dat_pp_takes_any_size_and_that_of_dat_one():
    with open_runner("pytorch:pp-tiny", image_size=(64, 64)) as runner:
        assert runner(np.zeros((1, 3, 64, 96), dtype=np.float32)).shape == (1, 1000)
    with open_runner("pytorch:tiny") as runner, pytest.raises(ShapeError, match=r"it takes .any batch, 3, 224, 224."):
        runner(np.zeros((1, 3, 448, 448), dtype=np.float32))


def test_fixed_file_is_not_opened_for_another_size(tiny_onnx):
    with pytest.raises(ShapeError) as error:
        open_runner(str(tiny_onnx["function"]), image_size=(448, 448))
    assert str(error.value) == (
        f"{tiny_onnx['function']} is made for images of 224x224, not 448x448. "
        f"Export it again with --image-size 448x448."
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
        "Use outputs(images) for its maps, or export it again without --features to classify."
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_plugin_file_is_refused_where_no_plugin_runs(runtime, tiny_onnx):
    engine = f"{runtime}:{tiny_onnx['plugin']}"
    with pytest.raises(EngineBuildError) as error:
        open_runner(engine)
    assert str(error.value) == (
        f"{engine} has lowering 'plugin': its operators have no body, so only TensorRT with the plugins runs it. "
        f"Export it with --lowering function."
    )


def test_cuda_is_refused_where_there_is_none(tiny_onnx):
    if not reasons_against(RUNTIMES["onnxruntime-cuda"]):
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(UnsupportedError) as error:
        open_runner(f"onnxruntime-cuda:{tiny_onnx['function']}")
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
