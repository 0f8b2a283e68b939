"""Files that `export` writes: batches, sizes, opsets, weights, metadata; and that nothing partial is left behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import yaml

from dat_deploy.errors import DatDeployError, ExportError, OutputError, ShapeError
from dat_deploy.export import LOWERINGS, OPSET_VERSIONS, export, onnx_model, relower
from dat_deploy.export.lowering import lower
from dat_deploy.images.labels import imagenet_class_names
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import golden_sha256
from dat_deploy.metadata import FileMetadata, read_metadata
from dat_deploy.networks.dat.checkpoint import load_model, save_checkpoint
from dat_deploy.networks.dat.model import DAT
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.runners import open_runner
from dat_deploy.runners.pytorch_runner import PytorchRunner
from dat_deploy.validate import validate

GOLDEN = Path(__file__).parents[1] / "golden"
INLINED = ("gather", "gridsample", "hat")
BODIED = ("function", *INLINED)
OTHER_OPSETS = [version for version in OPSET_VERSIONS if version != 18]  # all that follows is of 18, but for these
Files = dict[str, Path]


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    with open_runner(str(path)) as runner:
        return runner(images)


def pytorch_logits(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


@pytest.fixture(scope="session")
def mini_model(mini: Variant) -> DAT:
    """The network whose weights the files of `mini` hold."""
    return load_model(mini)


@pytest.fixture(scope="session")
def mini_onnx(mini: Variant, exported: Callable[[str, str, str], Path]) -> Callable[[str], Path]:
    """Lowering -> `mini` in float32, with a dynamic batch."""
    return lambda lowering: exported("mini", "fp32", lowering)


def test_metadata_says_what_the_file_is(mini, mini_onnx):
    metadata = read_metadata(mini_onnx("hat"))
    assert metadata == FileMetadata(
        network=mini,
        batch=None,
        dynamic_image_size=False,
        lowering="hat",
        precision="fp32",
        opset_version=18,
        preprocessing=mini.preprocessing,
        class_names=imagenet_class_names(),
        weights_sha256=metadata.weights_sha256,
        weights_source="seeded random weights (seed 0)",
        version=metadata.version,
        golden_sha256=golden_sha256(metadata.preprocessing),
    )
    assert len(metadata.weights_sha256) == 64


def test_a_file_of_dynamic_size_has_the_golden_hash_of_its_default_size(mini_pp, mini_pp_dynamic):
    metadata = read_metadata(mini_pp_dynamic["function"])
    assert metadata.preprocessing == mini_pp.preprocessing
    assert metadata.golden_sha256 == golden_sha256(metadata.preprocessing)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_file_holds_no_path_or_stack_trace_of_the_machine(lowering, mini_onnx):
    proto = onnx.load(mini_onnx(lowering))
    proto.graph.ClearField("initializer")
    text = proto.SerializeToString()
    assert b".py" not in text
    assert str(Path.home()).encode() + b"/" not in text


@pytest.mark.parametrize("opset", OTHER_OPSETS)
def test_every_opset_gives_the_same_logits(opset, mini, mini_model, noise, lowered):
    expected = pytorch_logits(mini_model, noise[:2])
    files = lowered(mini, opset_version=opset)
    for lowering in BODIED:
        model = onnx.load(files[lowering])
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
        np.testing.assert_allclose(logits(files[lowering], noise[:2]), expected, rtol=0, atol=1e-4)
    assert read_metadata(files["hat"]).opset_version == opset


def test_opset_20_is_refused_with_its_reason(tmp_path):
    with pytest.raises(ExportError) as error:
        export("tiny", tmp_path / "tiny.onnx", opset_version=20)
    assert str(error.value) == (
        "opset 20 is not supported; it takes 17, 18 or 19. From opset 20 on, TensorRT up to 11.1 reads GridSample's "
        "'linear' as nearest (NVIDIA/TensorRT#4646). Use `opset_version=18`."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch", [1, 3])
def test_fixed_batch_is_in_the_file_and_gives_the_same_logits(batch, mini, mini_model, noise, lowered):
    files = lowered(mini, batch=batch)
    expected = pytorch_logits(mini_model, noise[:batch])
    for lowering in BODIED:
        graph = onnx.load(files[lowering]).graph
        assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [batch, 3, 224, 224]
        np.testing.assert_allclose(logits(files[lowering], noise[:batch]), expected, rtol=0, atol=1e-4)
    with pytest.raises(ShapeError) as error:
        logits(files["hat"], noise[:2])
    assert str(error.value) == (
        f"{files['hat']}: input 'image' has shape [2, 3, 224, 224]; it takes [{batch}, 3, 224, 224]. "
        f"Export again with `batch` or `image_size` for another."
    )


def test_checkpoint_at_another_size_is_resized_and_says_so_and_gives_the_logits_of_pytorch(mini, mini_model, tmp_path):
    """The image is no square, so sides that change places show."""
    path, checkpoint = tmp_path / "mini.onnx", tmp_path / "mini.safetensors"
    save_checkpoint(mini_model, checkpoint)
    report = export(mini, path, image_size=(448, 224), checkpoint=checkpoint, lowering="hat")
    assert report.notes == (
        "stage 2: bias tables resized from 27x27 to 55x27 (bicubic)",
        "stage 3: bias tables resized from 13x13 to 27x13 (bicubic)",
    )
    images = np.random.default_rng(0).standard_normal((2, 3, 448, 224)).astype(np.float32)
    expected = pytorch_logits(load_model(mini, checkpoint, image_size=(448, 224)), images)
    np.testing.assert_allclose(logits(path, images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lowering", BODIED)
def test_every_lowering_agrees_with_pytorch_at_every_batch_in_every_slot(lowering, mini_onnx, mini_model, noise):
    expected = pytorch_logits(mini_model, noise)
    with open_runner(str(mini_onnx(lowering))) as runner:
        for batch in (1, 2, 3, 8):
            order = np.random.default_rng(batch).permutation(8)[:batch]
            np.testing.assert_allclose(runner(noise[order]), expected[order], rtol=0, atol=1e-4)
            same = runner(np.repeat(noise[:1], batch, axis=0))
            np.testing.assert_allclose(same, np.repeat(expected[:1], batch, axis=0), rtol=0, atol=1e-4)


def assert_agrees_at_every_batch_in_every_slot(
    engine: str, images: np.ndarray, expected: np.ndarray, batches: tuple[int, ...]
) -> None:
    with open_runner(engine) as runner:
        for batch in batches:
            order = np.arange(batch)[::-1] % len(images)
            np.testing.assert_allclose(runner(images[order]), expected[order], rtol=0, atol=1e-4)
            same = runner(np.repeat(images[:1], batch, axis=0))
            np.testing.assert_allclose(same, np.repeat(expected[:1], batch, axis=0), rtol=0, atol=1e-4)


SIZES = ((1, 224, 224), (3, 224, 224), (2, 256, 320), (2, 64, 96))  # batch, height, width


def assert_agrees_at_every_size(path: Path, model: DAT, sizes: tuple[tuple[int, int, int], ...]) -> None:
    generator = np.random.default_rng(2)
    with open_runner(str(path)) as runner:
        for batch, height, width in sizes:
            images = generator.standard_normal((batch, 3, height, width)).astype(np.float32)
            np.testing.assert_allclose(runner(images), pytorch_logits(model, images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("lowering", BODIED)
def test_dynamic_dat_pp_agrees_with_pytorch_at_every_size_and_batch(lowering, mini_pp, mini_pp_dynamic):
    assert_agrees_at_every_size(mini_pp_dynamic[lowering], load_model(mini_pp), SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", BODIED)
def test_dynamic_pp_tiny_agrees_with_pytorch_at_every_size_and_batch(lowering, pp_tiny_onnx, pp_tiny_model):
    assert_agrees_at_every_size(pp_tiny_onnx[lowering], pp_tiny_model, (*SIZES, (1, 480, 640)))


def test_dynamic_file_names_its_free_dimensions(mini_pp_dynamic, backbone):
    def dimensions(path: Path) -> dict[str, list[object]]:
        graph = onnx.load(path).graph
        return {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }

    assert dimensions(mini_pp_dynamic["hat"]) == {"image": ["batch", 3, "height", "width"], "logits": ["batch", 1000]}
    assert dimensions(backbone["hat"]) == {
        "image": [2, 3, "height", "width"],
        "feature_map_0": [2, 16, "height/4", "width/4"],
        "feature_map_1": [2, 32, "height/8", "width/8"],
        "feature_map_2": [2, 64, "height/16", "width/16"],
        "feature_map_3": [2, 128, "height/32", "width/32"],
    }
    assert read_metadata(backbone["hat"]).dynamic_image_size


@pytest.mark.parametrize("opset", OTHER_OPSETS)
def test_every_opset_gives_the_same_logits_of_dynamic_dat_pp(opset, mini_pp, mini_pp_dynamic, tmp_path):
    """The opset of what was traced is changed as `export` changes it; of a fixed size: test_precision.py."""
    images = np.random.default_rng(3).standard_normal((2, 3, 96, 160)).astype(np.float32)
    expected = pytorch_logits(load_model(mini_pp), images)
    for lowering in BODIED:
        model = ir.load(mini_pp_dynamic["plugin"])
        onnx_model._set_opset(model, opset)
        ir.save(lower(model, lowering), tmp_path / f"{lowering}.onnx")
        lowered = onnx.load(tmp_path / f"{lowering}.onnx")
        onnx.checker.check_model(lowered, full_check=True)
        assert {entry.domain: entry.version for entry in lowered.opset_import}[""] == opset
        (got,) = onnxruntime.InferenceSession(tmp_path / f"{lowering}.onnx").run(None, {"image": images})
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="session")
def backbone(mini_pp: Variant, lowered: Callable[..., Files]) -> Files:
    """The feature maps of all stages of `mini_pp` for two images of any size, by lowering."""
    return lowered(mini_pp, dynamic_image_size=True, features=(0, 1, 2, 3), batch=2)


@pytest.mark.parametrize("lowering", ["function", "hat"])
def test_backbone_gives_the_maps_of_pytorch(lowering, mini_pp, backbone):
    images = np.random.default_rng(4).standard_normal((2, 3, 96, 128)).astype(np.float32)
    assert read_metadata(backbone[lowering]).class_names == ()
    with torch.inference_mode():
        expected = load_model(mini_pp, features=(0, 1, 2, 3))(torch.from_numpy(images))
    for runtime in ("onnxruntime", "openvino"):
        with open_runner(f"{runtime}:{backbone[lowering]}") as runner:
            maps = runner.outputs(images)
        assert list(maps) == [f"feature_map_{i}" for i in range(4)]
        for feature_map, reference in zip(maps.values(), expected, strict=True):
            np.testing.assert_allclose(feature_map, reference.numpy(), rtol=0, atol=1e-4)


def test_backbone_of_dat_gives_the_maps_of_pytorch(mini, tmp_path, noise):
    report = export(mini, tmp_path / "backbone.onnx", features=(1, 2))
    assert (report.outputs, report.metadata.class_names) == (("feature_map_1", "feature_map_2"), ())
    with torch.inference_mode():
        expected = load_model(mini, features=(1, 2))(torch.from_numpy(noise[:1]))
    with open_runner(str(tmp_path / "backbone.onnx")) as runner:
        maps = runner.outputs(noise[:1])
    assert list(maps) == ["feature_map_1", "feature_map_2"]
    for feature_map, reference in zip(maps.values(), expected, strict=True):
        np.testing.assert_allclose(feature_map, reference.numpy(), rtol=0, atol=1e-4)


@pytest.fixture(scope="session")
def with_points(mini_pp: Variant, lowered: Callable[..., Files]) -> Files:
    """`mini_pp` with its sampling locations among the outputs, by lowering."""
    return lowered(mini_pp.with_image_size(128, 96), sampling_locations=True)


@pytest.mark.parametrize("lowering", BODIED)
def test_sampled_points_of_a_file_are_those_of_pytorch(lowering, mini_pp, with_points):
    images = np.random.default_rng(5).standard_normal((2, 3, 128, 96)).astype(np.float32)
    network = mini_pp.with_image_size(128, 96)
    with PytorchRunner(network, "pytorch:mini-pp", sampled_points=True) as reference:
        expected = reference.outputs(images)
    with open_runner(str(with_points[lowering])) as runner:
        got = runner.outputs(images)
    assert list(got) == list(expected)
    assert len(got) == 1 + 2 * 3
    for name, values in got.items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-4, err_msg=name)
        if name.startswith("attention"):
            np.testing.assert_allclose(values.sum(axis=(2, 3)), 1, rtol=0, atol=1e-5)


def test_configuration_file_exports_and_the_file_remembers_it(tmp_path):
    manifest = json.loads((GOLDEN / "manifests" / "plus.json").read_text())["config"]
    section = manifest | {
        "depths": [1, 1, 1, 1],
        "stage_spec": [["N"], ["D"], ["N"], ["D"]],
        "num_classes": 10,
        "dims": [32, 64, 128, 256],
        "dim_stem": 32,
        "heads": [1, 2, 4, 8],
        "groups": [1, 1, 2, 4],
    }
    config = tmp_path / "dat.yaml"
    config.write_text(yaml.safe_dump({"MODEL": {"TYPE": "dat", "DAT": section}}))
    path = tmp_path / "dat.onnx"
    export(str(config), path)
    config.unlink()
    report = validate(str(path), images=photographs(2), batches=[1])  # its reference is made from the file alone
    assert report.passed
    assert (report.engine.variant, report.engine.network.classes) == ("dat", 10)
    assert read_metadata(path).class_names[9] == "class 9"


def test_fixed_hat_file_of_dat_pp_gathers_nothing(exported):
    """At 224 px the bias of stage 0 is a constant of a million elements."""
    assert not {"Gather", "GatherND", "GatherElements", "GridSample"} & {
        node.op_type for node in onnx.load(exported("mini-pp", "fp32", "hat")).graph.node
    }


LARGE = """
import re, sys
import numpy as np
from dat_deploy.runners import open_runner
with open_runner(sys.argv[1]) as run:
    logits = run(np.random.default_rng(6).standard_normal((1, 3, 800, 1344)).astype(np.float32))
np.save(sys.argv[2], logits)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("lowering", BODIED)
def test_dynamic_pp_tiny_at_800x1344_is_right_and_takes_less_than_8_gib(
    lowering, pp_tiny_onnx, pp_tiny_model, tmp_path
):
    command = [sys.executable, "-c", LARGE, str(pp_tiny_onnx[lowering]), str(tmp_path / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  # ours
    images = np.random.default_rng(6).standard_normal((1, 3, 800, 1344)).astype(np.float32)
    expected = pytorch_logits(pp_tiny_model, images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-4)
    assert int(done.stdout) < 8 * 2**20  # kB


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.released if v in ("tiny", "pp-tiny") else pytest.mark.slow) for v in VARIANTS],
)
def test_every_lowering_of_every_variant_agrees_with_pytorch(variant, tmp_path):
    height, width = VARIANTS[variant].image_size
    images = np.random.default_rng(1).standard_normal((4, 3, height, width)).astype(np.float32)
    expected = pytorch_logits(load_model(variant), images)
    plugin = tmp_path / "plugin.onnx"
    export(variant, plugin, lowering="plugin")
    for lowering in BODIED:
        path = tmp_path / "lowered.onnx"
        relower(plugin, path, lowering, force=True)
        assert_agrees_at_every_batch_in_every_slot(str(path), images, expected, (1, 2, 3, 8))
        # OpenVINO compiles each batch anew, half a minute of it in all
        assert_agrees_at_every_batch_in_every_slot(f"openvino:{path}", images, expected, (1, 3))


def test_weights_of_the_checkpoint_are_in_the_file(tmp_path, golden_checkpoint, deterministic_weights):
    path = tmp_path / "tiny.onnx"
    export("tiny", path, checkpoint=golden_checkpoint)
    assert read_metadata(path).weights_source == golden_checkpoint.name
    golden = np.load(GOLDEN / "tiny.npz")
    images = deterministic_weights.images((224, 224)).numpy()
    np.testing.assert_allclose(logits(path, images), golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "option", [{"batch": 0}, {"lowering": "best"}, {"opset_version": 16}, {"image_size": (0, 224)}]
)
def test_impossible_option_leaves_nothing(option, tmp_path):
    with pytest.raises(DatDeployError):
        export("tiny", tmp_path / "tiny.onnx", **option)
    assert not list(tmp_path.iterdir())


def test_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "tiny.onnx"
    path.write_text("mine")
    with pytest.raises(OutputError) as error:
        export("tiny", path)
    assert str(error.value) == f"{path} exists; pass `force=True` to replace it, or choose another name."
    assert path.read_text() == "mine"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["^C", "full"])
def test_export_that_stops_while_writing_leaves_nothing(failure, mini_onnx, tmp_path, monkeypatch):
    plugin = mini_onnx("plugin")

    def half_a_file(_: onnx.ModelProto, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(onnx, "save", half_a_file)
    with pytest.raises((KeyboardInterrupt, OutputError)) as error:
        relower(plugin, tmp_path / "tiny.onnx", "hat")
    if isinstance(error.value, OutputError):
        assert str(error.value) == (
            f"cannot write {tmp_path / 'tiny.onnx'}: No space left on device; free some space or choose another folder."
        )
    assert not list(tmp_path.iterdir())


def test_file_of_another_tool_is_refused(tmp_path):
    path = tmp_path / "other.onnx"
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 18]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
        ),
        path,
    )
    with pytest.raises(ExportError) as error:
        read_metadata(path)
    assert str(error.value) == (
        f"{path} was not exported by dat-deploy: it has no dat_deploy.* metadata. "
        f'Export it with: `export(variant=variant, output="other.onnx")`'
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("network", None),
        ("dynamic_image_size", "ab"),
        ("batch", "two"),
        ("class_names", [1]),
        ("preprocessing", {"a": 1}),
    ],
)
def test_edited_metadata_is_refused(field, value, mini_onnx, tmp_path):
    model = onnx.load(mini_onnx("plugin"))
    del model.graph.initializer[:]
    for entry in model.metadata_props:
        if entry.key == f"dat_deploy.{field}":
            entry.value = json.dumps(value)
    onnx.save(model, tmp_path / "edited.onnx")
    with pytest.raises(ExportError, match=f"edited.onnx cannot be read.*metadata.{field}"):
        read_metadata(tmp_path / "edited.onnx")
