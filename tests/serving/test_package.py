"""`package` writes model repositories that Triton can read: parsed with its own protobuf, and held to the engines.

No server runs here. Engines are made up: bytes with a real passport, since nothing is deserialised. What is committed
in tests/golden/model_repository is what a reader of this repository sees; `DAT_DEPLOY_GOLDEN=write` writes it anew.
"""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

from dat_deploy import api, cli
from dat_deploy.engine.passport import Profile, Verdict, open_engine, passport_path
from dat_deploy.errors import (
    DatDeployError,
    EngineBuildError,
    ExportError,
    OutputError,
    PassportError,
    ShapeError,
    UnsupportedError,
    VerificationError,
)
from dat_deploy.export import relower
from dat_deploy.images.preprocess import preprocess
from dat_deploy.metadata import FileMetadata, read_metadata
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.serving.tensors import input_spec, output_specs
from dat_deploy.serving.triton import model_config
from dat_deploy.serving.triton.repository import PackageReport, package
from dat_deploy.serving.triton.tritonserver import TRITON_TAG, tritonserver_command

GOLDEN = Path(__file__).parents[1] / "golden" / "model_repository"
Engine = Callable[..., Path]


def configs(report: PackageReport) -> dict[str, Any]:
    """Each model's configuration, read by Triton's protobuf."""
    return {
        model.name: text_format.Parse(
            (report.path / model.name / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig()
        )
        for model in report.models
    }


def tensors(listed: Sequence[Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(t.name, model_config_pb2.DataType.Name(t.data_type), tuple(t.dims)) for t in listed]


def check_against(config: Any, metadata: FileMetadata, outputs: Sequence[str]) -> None:
    """The configuration's tensors are the engine's; the batch is in them only where Triton forms none."""
    first = 1 if config.max_batch_size else 0
    expected = [
        [(spec.name, f"TYPE_{spec.datatype}", spec.shape[first:]) for spec in specs]
        for specs in ((input_spec(metadata),), output_specs(metadata, outputs))
    ]
    assert [tensors(config.input), tensors(config.output)] == expected


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["dat-deploy", *map(str, words)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return stop.value.code


# What is written.


def golden_repositories(demo_onnx: Path, engine: Engine, tmp_path: Path) -> list[PackageReport]:
    engines = [
        engine("ampere.engine", "1-8-32", architectures=("sm_80", "sm_86")),
        engine("hopper.engine", "1-8-32", architectures=("sm_90",)),
    ]
    output = tmp_path / "model_repository"
    kserve = {"kserve": tmp_path / "inferenceservice.yaml", "storage_uri": "s3://bucket/model_repository"}
    return [
        package([demo_onnx], output, images=True, device="cpu"),
        package(engines, output, name="demo_tensorrt", **kserve),
    ]


def test_the_repositories_are_those_that_are_committed(demo_onnx: Path, engine: Engine, tmp_path: Path) -> None:
    reports = golden_repositories(demo_onnx, engine, tmp_path)
    found = {
        name: (tmp_path / "model_repository" / name).read_bytes()
        for report in reports
        for name in report.files
        if not name.endswith((".onnx", ".plan", ".plan.json"))
    }
    found["inferenceservice.yaml"] = (tmp_path / "inferenceservice.yaml").read_bytes()
    if os.environ.get("DAT_DEPLOY_GOLDEN") == "write":
        for name, content in found.items():
            (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / name).write_bytes(content)
    golden = {path.relative_to(GOLDEN).as_posix(): path for path in GOLDEN.rglob("*") if path.is_file()}
    assert sorted(found) == sorted(golden)
    for name, path in golden.items():
        assert found[name] == path.read_bytes(), name


def test_an_exported_file_with_the_step_before_it(demo_onnx: Path, metadata: FileMetadata, tmp_path: Path) -> None:
    output = tmp_path / "models"
    report = package([demo_onnx], output, images=True)
    assert report.files == (
        "demo/1/model.onnx",
        "demo/config.pbtxt",
        "demo/labels.txt",
        "demo_images/1/.gitkeep",
        "demo_images/config.pbtxt",
        "demo_images/labels.txt",
        "demo_preprocess/1/model.onnx",
        "demo_preprocess/config.pbtxt",
    )
    assert sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()) == list(report.files)
    assert (output / "demo/1/model.onnx").read_bytes() == demo_onnx.read_bytes()
    assert (output / "demo/labels.txt").read_text().splitlines() == list(VARIANTS["demo"].class_names)
    assert report.notes == ()
    written = configs(report)
    network, preprocess_step, ensemble = (written[name] for name in ("demo", "demo_preprocess", "demo_images"))
    check_against(network, metadata, ["logits"])
    assert (network.name, network.backend, network.max_batch_size) == ("demo", "onnxruntime", 32)
    assert network.output[0].label_filename == "labels.txt"
    assert list(network.dynamic_batching.preferred_batch_size) == [8, 32]
    assert not network.HasField("optimization")
    assert tensors(preprocess_step.output) == tensors(network.input)  # what one gives, the other takes
    assert tensors(ensemble.input) == tensors(preprocess_step.input) == [("pixels", "TYPE_UINT8", (-1, -1, 3))]
    assert tensors(ensemble.output) == tensors(network.output)
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == ["demo_preprocess", "demo"]
    assert {config.max_batch_size for config in written.values()} == {32}
    for config in (network, preprocess_step):  # under overload, requests are refused
        policy = config.dynamic_batching.default_queue_policy
        assert policy.timeout_action == policy.REJECT
        assert (policy.max_queue_size, policy.default_timeout_microseconds) == (256, 1_000_000)
    assert not ensemble.instance_group
    assert not ensemble.model_warmup


def test_a_client_reads_from_the_configuration_what_the_network_expects(
    demo_onnx: Path, metadata: FileMetadata, tmp_path: Path
) -> None:
    report = package([demo_onnx], tmp_path / "models", images=True)
    for config in configs(report).values():
        said = {k: v.string_value for k, v in config.parameters.items() if k.startswith("dat_deploy.")}
        assert said["dat_deploy.variant"] == "demo"
        assert said["dat_deploy.weights_sha256"] == metadata.weights_sha256
        assert said["dat_deploy.golden_sha256"] == metadata.golden_sha256
        assert json.loads(said["dat_deploy.preprocessing"])["resize_size"] == [64, 64]
        assert said["dat_deploy.precision"] == "fp32"


def test_the_files_of_the_ensemble_classify_as_the_package_does(demo_onnx: Path, tmp_path: Path) -> None:
    """The data flow that the ensemble's configuration describes, carried out with ONNX Runtime."""
    report = package([demo_onnx], tmp_path / "models", images=True)
    ensemble = configs(report)["demo_images"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 90, 50, 3), dtype=np.uint8)
    known = {"pixels": pixels}
    for step in ensemble.ensemble_scheduling.step:
        session = ort.InferenceSession(
            report.path / step.model_name / "1" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        assert {i.name for i in session.get_inputs()} == set(step.input_map)
        results = session.run(list(step.output_map), {k: known[v] for k, v in step.input_map.items()})
        known |= dict(zip(step.output_map.values(), results, strict=True))
    expected = np.stack([preprocess(Image.fromarray(p), read_metadata(demo_onnx).preprocessing) for p in pixels])
    np.testing.assert_array_equal(known["image"], expected)
    direct = ort.InferenceSession(demo_onnx, providers=["CPUExecutionProvider"]).run(None, {"image": expected})[0]
    np.testing.assert_array_equal(known["logits"], direct)


def test_an_engine_keeps_its_passport_and_opens(engine: Engine, metadata: FileMetadata, tmp_path: Path) -> None:
    path = engine("demo.engine", "1", "2-8-32")
    report = package([path], tmp_path / "models")
    assert report.files == (
        "demo/1/model.plan",
        "demo/1/model.plan.json",
        "demo/config.pbtxt",
        "demo/labels.txt",
    )
    plan = tmp_path / "models/demo/1/model.plan"
    assert passport_path(plan).read_bytes() == passport_path(path).read_bytes()
    assert open_engine(plan) == open_engine(path)
    config = configs(report)["demo"]
    check_against(config, metadata, ["logits"])
    assert config.backend == "tensorrt"
    assert not config.cc_model_filenames
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert list(config.dynamic_batching.preferred_batch_size) == [8]  # 1 would be sent alone, whoever waits
    assert config.optimization.cuda.graphs
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [1, 8]
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 8]
    assert report.notes == ("the engine needs TensorRT 11.4.0.1 in the server; see the release notes of its image",)


def test_engines_of_several_gpus_are_one_model(engine: Engine, tmp_path: Path) -> None:
    paths = [
        engine("a.engine", architectures=("sm_80", "sm_86")),
        engine("b.engine", architectures=("sm_90",)),
        engine("c.engine", architectures=("sm_120",)),
    ]
    report = package(paths, tmp_path / "models", name="net")
    files = dict(configs(report)["net"].cc_model_filenames)
    assert files == {
        "8.0": "model.sm_80.sm_86.plan",
        "8.6": "model.sm_80.sm_86.plan",
        "9.0": "model.sm_90.plan",
        "12.0": "model.sm_120.plan",
    }
    for capability, path in (("8.0", paths[0]), ("9.0", paths[1]), ("12.0", paths[2])):
        assert open_engine(report.path / "net/1" / files[capability]) == open_engine(path)


@pytest.mark.parametrize(
    ("profiles", "most", "preferred", "graphs"),
    [
        (["1"], 1, [1], [1]),
        (["1-32"], 32, [32], [1, 32]),
        (["1-8-32"], 32, [8], [1, 8]),
        (["1", "2"], 2, [2], [1, 2]),
        (["9-32", "1-4-8"], 32, [4, 32], [1, 4, 32]),
        (["1-16", "4-8-32"], 32, [8, 16], [1, 8, 16]),
    ],
    ids=str,
)
def test_profiles_without_a_gap_decide_the_batches(
    profiles: list[str], most: int, preferred: list[int], graphs: list[int], engine: Engine, tmp_path: Path
) -> None:
    config = configs(package([engine("demo.engine", *profiles)], tmp_path / "models"))["demo"]
    assert config.max_batch_size == most
    assert list(config.dynamic_batching.preferred_batch_size) == preferred
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == graphs


@pytest.mark.parametrize(("profile", "batch", "fixed"), [("8", None, 8), ("1", 1, 1), ("4", 4, 4)])
def test_a_fixed_batch_is_part_of_the_shapes(
    profile: str, batch: int | None, fixed: int, engine: Engine, metadata: FileMetadata, tmp_path: Path
) -> None:
    path = engine("demo.engine", profile, metadata=replace(metadata, batch=batch))
    report = package([path], tmp_path / "models", images=True)
    written = configs(report)
    check_against(written["demo"], replace(metadata, batch=fixed), ["logits"])
    assert tensors(written["demo_images"].input) == [("pixels", "TYPE_UINT8", (fixed, -1, -1, 3))]
    assert {config.max_batch_size for config in written.values()} == {0}
    assert not any(config.HasField("dynamic_batching") for config in written.values())
    assert [spec.batch_size for spec in written["demo"].optimization.cuda.graph_spec] == [0]
    (warmup,) = written["demo"].model_warmup
    assert (warmup.batch_size, tuple(warmup.inputs["image"].dims)) == (1, (fixed, 3, 64, 64))
    assert report.models[0].inputs[0].shape == (fixed, 3, 64, 64)
    assert report.notes[-1] == (
        f"the batch is fixed at {fixed}, so Triton gathers no requests and limits no queue; with a dynamic batch it "
        f"does both"
    )


def test_a_backbone_has_maps_and_no_labels(engine: Engine, metadata: FileMetadata, tmp_path: Path) -> None:
    backbone = replace(metadata, network=metadata.network.as_backbone([1, 3]), class_names=())
    outputs = ("feature_map_1", "feature_map_3", "sampling_locations_3_0", "attention_3_0")
    report = package([engine(metadata=backbone, outputs=outputs)], tmp_path / "models", images=True)
    assert not any("labels" in name for name in report.files)
    written = configs(report)
    check_against(written["demo"], backbone, outputs)
    assert tensors(written["demo_images"].output) == tensors(written["demo"].output)
    assert dict(written["demo_images"].ensemble_scheduling.step[1].output_map) == {name: name for name in outputs}
    assert not any(output.label_filename for config in written.values() for output in config.output)


def test_a_file_of_any_image_size_is_warmed_up_at_its_own(metadata: FileMetadata) -> None:
    free = replace(metadata, network=VARIANTS["pp-tiny"], dynamic_image_size=True, class_names=())
    batches = model_config.batches_of_file(free, [4])
    config = model_config.network_config("free", free, ["logits"], batches, model_config.ModelSettings())
    assert tuple(config.input[0].dims) == (3, -1, -1)
    assert tuple(config.model_warmup[0].inputs["image"].dims) == (3, 224, 224)


def test_class_names_stay_a_line_each(engine: Engine, metadata: FileMetadata, tmp_path: Path) -> None:
    names = ("crane (bird)", "two\nlines", "été", *(f"class {i}" for i in range(7)))
    report = package([engine(metadata=replace(metadata, class_names=names))], tmp_path / "models")
    labels = (report.path / "demo/labels.txt").read_text(encoding="utf-8").splitlines()
    assert labels[:3] == ["crane (bird)", "two lines", "été"]
    assert len(labels) == 10


def test_settings_are_written(demo_onnx: Path, tmp_path: Path) -> None:
    report = package(
        [demo_onnx],
        tmp_path / "models",
        batches=[16, 4],
        device="cpu",
        instances=3,
        queue_delay_us=0,
        queue_size=7,
        queue_timeout_us=9,
    )
    config = configs(report)["demo"]
    assert config.max_batch_size == 16
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert config.dynamic_batching.default_queue_policy.default_timeout_microseconds == 9
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, group.KIND_CPU)
    assert "--gpus" not in report.server


def test_the_preprocessing_model_is_checked_onnx_with_a_core_each(demo_onnx: Path, tmp_path: Path) -> None:
    report = package([demo_onnx], tmp_path / "models", images=True)
    onnx.checker.check_model(onnx.load(report.path / "demo_preprocess/1/model.onnx"), full_check=True)
    config = configs(report)["demo_preprocess"]
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert list(config.dynamic_batching.preferred_batch_size) == [1]


def test_the_inference_service_is_kserves(demo_onnx: Path, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    package(
        [demo_onnx], tmp_path / "models", name="My_Net.v2", kserve=file, storage_uri="pvc://volume/m", triton_tag="tag"
    )
    service = yaml.safe_load(file.read_text())
    model = service["spec"]["predictor"]["model"]
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "my-net-v2"
    assert model["modelFormat"] == {"name": "triton"}
    assert (model["protocolVersion"], model["runtimeVersion"], model["storageUri"]) == ("v2", "tag", "pvc://volume/m")
    assert model["args"] == list(tritonserver_command("/models")[2:])
    assert model["resources"]["limits"]["nvidia.com/gpu"] == 1
    package([demo_onnx], tmp_path / "models", name="0", device="cpu", kserve=file, storage_uri="s3://b/m", force=True)
    service = yaml.safe_load(file.read_text())
    assert service["metadata"]["name"] == "model-0"
    assert "nvidia.com/gpu" not in service["spec"]["predictor"]["model"]["resources"]["limits"]


# Adding to a repository, replacing in it, and what must not be lost.


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_other_models_of_a_repository_stay(demo_onnx: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    (output / "theirs/1").mkdir(parents=True)
    (output / "theirs/1/model.py").write_text("theirs")
    package([demo_onnx], output)
    before = snapshot(output)
    package([demo_onnx], output, name="second", images=True)
    assert before.items() <= snapshot(output).items()
    assert [path.name for path in tmp_path.iterdir()] == ["models"]  # nothing is left beside it


def test_force_replaces_a_model_of_this_command_and_nothing_else(demo_onnx: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    package([demo_onnx], output, batches=[8])
    (output / "demo/2").mkdir()
    with pytest.raises(OutputError) as caught:
        package([demo_onnx], output)
    assert str(caught.value) == f"{output}/demo exists; pass `force=True` to replace it, or choose another `name`."
    report = package([demo_onnx], output, force=True)
    assert configs(report)["demo"].max_batch_size == 32
    assert sorted(snapshot(output)) == list(report.files)
    for content in (None, 'name: "demo"'):
        folder = tmp_path / f"foreign {content is None}" / "demo"
        folder.mkdir(parents=True)
        (folder / ("precious" if content is None else "config.pbtxt")).write_text(content or "precious")
        with pytest.raises(OutputError) as caught:
            package([demo_onnx], folder.parent, force=True)
        assert str(caught.value) == (
            f"{folder} exists and was not written by `package()`, so `force=True` does not replace it. "
            f"Remove it yourself, or choose another `name`."
        )
        assert len(snapshot(folder)) == 1


def test_an_earlier_step_before_the_network_is_noted(demo_onnx: Path, tmp_path: Path) -> None:
    package([demo_onnx], tmp_path / "models", images=True)
    report = package([demo_onnx], tmp_path / "models", force=True)
    (note,) = report.notes
    assert (
        note == "demo_images is of an earlier run and was left as it was; write it anew with `images=True, force=True`"
    )


def test_the_folder_that_one_is_in_can_be_the_repository(
    demo_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.chdir(folder)
    report = package([demo_onnx], Path())
    assert sorted(snapshot(folder)) == list(report.files)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_failure_half_way_leaves_the_repository_as_it_was(
    demo_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "models"
    package([demo_onnx], output, images=True, batches=[8])
    before, rename = snapshot(output), Path.rename

    def fail_at_the_ensemble(self: Path, target: Path) -> Path:
        if self.name == "demo_images" and ".part" in str(self):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_ensemble)
    with pytest.raises(OutputError) as caught:
        package([demo_onnx], output, images=True, force=True)
    assert str(caught.value) == f"cannot write {output}: No space left on device; choose another folder."
    assert snapshot(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_disk_that_is_full_leaves_nothing(demo_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        package([demo_onnx], tmp_path / "models")
    assert not list(tmp_path.iterdir())


# What is refused, each in one sentence.


def refusal(kind: type[DatDeployError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        package(*arguments, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_told(tmp_path: Path) -> None:
    assert refusal(EngineBuildError, [tmp_path / "a.engine"], tmp_path / "m") == (
        f'there is no file {tmp_path}/a.engine. Build one with: `build("tiny.onnx")`'
    )
    assert refusal(ExportError, [tmp_path / "a.onnx"], tmp_path / "m") == (
        f'there is no file {tmp_path}/a.onnx. Export one with: `export(variant="tiny", output="a.onnx")`'
    )
    assert refusal(EngineBuildError, [], tmp_path / "m") == (
        "no engine to package; give one, such as `engines=['tiny.onnx']`."
    )
    assert not (tmp_path / "m").exists()


def test_a_damaged_engine_is_told(engine: Engine, tmp_path: Path) -> None:
    path = engine()
    path.write_bytes(b"another")
    assert refusal(PassportError, [path], tmp_path / "m") == (
        f"{path} is not the engine that demo.engine.json describes (its SHA-256 differs): it was replaced or is "
        f"damaged. Build it again with: dat-deploy build demo.onnx"
    )


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "é", "x" * 64, "a\n"])
def test_a_name_that_no_url_takes_is_told(name: str, demo_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(DatDeployError) as caught:
        package([demo_onnx], tmp_path / "m", name=name)
    assert str(caught.value) == (
        f"'{name}' cannot be a model's name; it takes up to 63 letters, digits, '_', '.' and '-', and begins with a "
        f"letter or digit, for URLs have it. Give another with `name`."
    )


@pytest.mark.parametrize(
    ("profiles", "missing", "rebuild"),
    [
        (["1", "8", "32"], 2, "1-8-32"),
        (["1", "32"], 2, "1-32"),
        (["4-8"], 1, "1-8"),
        (["1-4", "6-16-32"], 5, "1-4-32"),
    ],
    ids=str,
)
def test_a_gap_in_the_profiles_is_told(
    profiles: list[str], missing: int, rebuild: str, engine: Engine, tmp_path: Path
) -> None:
    path = engine("demo.engine", *profiles)
    most = profiles[-1].split("-")[-1]
    assert refusal(EngineBuildError, [path], tmp_path / "m") == (
        f"{path} takes batch {' or '.join(profiles)}, and Triton forms any batch up to {most}, such as {missing}. "
        f"Build it for a range: `build('demo.onnx', batches=['{rebuild}'])`"
    )


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "profiles": ({"profiles": (Profile(1, 4, 32),)}, "batch"),
    "outputs": ({"outputs": ("logits", "attention_3_0")}, "outputs"),
    "version": ({"backend_version": "10.16.0"}, "TensorRT version"),
}


@pytest.mark.parametrize(("changes", "what"), DIFFERENT.values(), ids=DIFFERENT)
def test_engines_that_differ_in_more_than_the_gpu_are_told(
    changes: dict[str, Any], what: str, engine: Engine, tmp_path: Path
) -> None:
    paths = [engine("a.engine"), engine("b.engine", architectures=("sm_80",), **changes)]
    assert refusal(EngineBuildError, paths, tmp_path / "m") == (
        f"{paths[1]} and {paths[0]} differ in {what}; the engines of one model differ in their architecture alone. "
        f"Build them from one file alike, or package each under its own `name`."
    )


def test_engines_of_other_weights_networks_or_precisions_are_told(
    engine: Engine, metadata: FileMetadata, tmp_path: Path
) -> None:
    other = replace(metadata, weights_sha256="0" * 64, precision="fp16", golden_sha256="")
    paths = [engine("a.engine"), engine("b.engine", architectures=("sm_80",), metadata=other)]
    assert "differ in weights, precision; the engines of one" in refusal(EngineBuildError, paths, tmp_path / "m")
    network = replace(metadata.network, name="other", mlp_ratio=4)
    preprocessing = replace(metadata.preprocessing, mean=(0.0, 0.0, 0.0))
    other = replace(
        metadata, network=network, preprocessing=preprocessing, class_names=("x",) * 10, golden_sha256="", batch=1
    )
    paths = [engine("c.engine"), engine("d.engine", architectures=("sm_80",), metadata=other)]
    assert "differ in network, preprocessing, class names, batch;" in refusal(EngineBuildError, paths, tmp_path / "m")


def test_engines_of_the_same_gpu_or_none_are_told(engine: Engine, demo_onnx: Path, tmp_path: Path) -> None:
    first, second = engine("a.engine"), engine("b.engine", architectures=("sm_80", "sm_90"))
    assert refusal(EngineBuildError, [first, second], tmp_path / "m") == (
        f"{second} and {first} are both for sm_90; give one engine for each architecture."
    )
    unnamed = engine("c.engine", architectures=())
    assert refusal(EngineBuildError, [first, unnamed], tmp_path / "m") == (
        f"{unnamed} names no architecture; package it alone, without other engines."
    )
    assert refusal(EngineBuildError, [first, demo_onnx], tmp_path / "m") == (
        "2 files were given, and an ONNX file runs on every GPU by itself; several make one model only if they are "
        "TensorRT engines for different GPUs. Package each under its own `name`."
    )


def test_what_triton_has_no_backend_for_is_told(engine: Engine, tmp_path: Path) -> None:
    rtx = engine("rtx.engine", backend="tensorrt-rtx")
    assert refusal(EngineBuildError, [rtx], tmp_path / "m") == (
        f"{rtx} is an engine of tensorrt-rtx, which Triton has no backend for. Build one of TensorRT: "
        f"`build('demo.onnx', backend='tensorrt')`"
    )
    python = engine("python.engine", plugin_form="IPluginV3")
    assert refusal(EngineBuildError, [python], tmp_path / "m") == (
        f"{python} has its plugins in Python, which tritonserver does not load. Build it with: "
        f"`build('demo.onnx', plugin_form='ahead-of-time')`, or with `lowering='gather'`"
    )
    package([engine("aot.engine", plugin_form="ahead-of-time")], tmp_path / "aot")
    assert refusal(EngineBuildError, [tmp_path / "a.pt2"], tmp_path / "m") == (
        f"{tmp_path}/a.pt2 is an AOTInductor package, which Triton has no backend for. Serve it with: "
        f"`serve(engine='{tmp_path}/a.pt2')`"
    )
    assert refusal(EngineBuildError, [Path("pytorch:tiny")], tmp_path / "m") == (
        "`engines` got 'pytorch:tiny'; Triton serves FILE.onnx and TensorRT's FILE.engine."
    )
    assert refusal(EngineBuildError, [engine("gpu.engine")], tmp_path / "m", device="cpu") == (
        f"{tmp_path}/gpu.engine is a TensorRT engine and runs on GPUs alone. Package an ONNX file for a CPU."
    )


def test_a_file_of_operators_without_bodies_is_told(demo_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.plugin.onnx"
    relower(demo_onnx, path, "plugin")
    assert refusal(ExportError, [path], tmp_path / "m") == (
        f"{path} has lowering 'plugin': its operators have no body, which Triton's ONNX Runtime cannot run. Change it "
        f"with: `relower(source='{path}', lowering='function')`"
    )


def with_metadata(source: Path, path: Path, **changes: Any) -> Path:
    """The same file with other metadata."""
    model = onnx.load(source)
    metadata = replace(read_metadata(source), **changes)
    onnx.helper.set_model_props(model, metadata.to_properties())
    onnx.save(model, path)
    return path


def test_bfloat16_on_a_cpu_is_told(demo_onnx: Path, tmp_path: Path) -> None:
    path = with_metadata(demo_onnx, tmp_path / "demo.onnx", precision="bf16")
    assert refusal(UnsupportedError, [path], tmp_path / "m", device="cpu") == (
        f"{path} computes in bf16, for which ONNX Runtime has no kernels on a CPU. Export it with "
        f"`precision='fp32'`, or serve it with `device='gpu'`."
    )


def test_other_preprocessing_here_is_a_wrong_answer(demo_onnx: Path, tmp_path: Path) -> None:
    path = with_metadata(demo_onnx, tmp_path / "demo.onnx", golden_sha256="0" * 64)
    assert refusal(VerificationError, [path], tmp_path / "m") == (
        f"{path}: the golden picture comes out otherwise here than at export, so images would be preprocessed "
        f"otherwise. See what differs with: `check_preprocessing(engine='{path}')`"
    )


def test_an_engine_that_failed_its_validation_is_a_wrong_answer(
    engine: Engine, bad_verdict: Verdict, tmp_path: Path
) -> None:
    path = engine(verdict=bad_verdict)
    assert refusal(VerificationError, [path], tmp_path / "m") == (
        f"{path} failed its last validation, of 2026-11-21T00:00:00+00:00: it differs from PyTorch. Look into it "
        f"with: `validate(engine='{path}')`"
    )


def test_an_engine_that_was_never_validated_is_noted(engine: Engine, tmp_path: Path) -> None:
    path = engine(verdict=None)
    report = package([path], tmp_path / "m")
    assert report.notes[0] == f"{path} was never validated: `validate(engine='{path}')`"


SETTINGS: dict[str, tuple[type[DatDeployError], dict[str, Any], str]] = {
    "batch": (
        ShapeError,
        {"batches": [0]},
        "`batches` got '0'; it takes the batches to prefer, such as 8,32, each from 1 on.",
    ),
    "device": (UnsupportedError, {"device": "tpu"}, "no device 'tpu'; a model is served on gpu or cpu."),
    "instances": (ShapeError, {"instances": 0}, "`instances` got 0; it takes a number from 1 to 2147483647."),
    "delay": (ShapeError, {"queue_delay_us": -1}, "`queue_delay_us` got -1; it takes a number from 0 to 2147483647."),
    "kserve alone": (
        DatDeployError,
        {"kserve": Path("x.yaml")},
        "`kserve` and `storage_uri` go together: the file to write, and where the repository will be, such as "
        "s3://bucket/model_repository.",
    ),
    "no URI": (
        DatDeployError,
        {"kserve": Path("x.yaml"), "storage_uri": "models"},
        "`storage_uri` got 'models'; it takes where KServe finds the repository, such as s3://bucket/model_repository "
        "or pvc://volume/model_repository.",
    ),
}


@pytest.mark.parametrize(("kind", "options", "sentence"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_are_not_accepted_are_told(
    kind: type[DatDeployError], options: dict[str, Any], sentence: str, demo_onnx: Path, tmp_path: Path
) -> None:
    assert refusal(kind, [demo_onnx], tmp_path / "m", **options) == sentence
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_no_folder_is_told(demo_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal(OutputError, [demo_onnx], tmp_path / "file") == (
        f"{tmp_path}/file is a file; `output` takes a folder, such as model_repository."
    )
    assert refusal(OutputError, [demo_onnx], tmp_path / "a/b") == (
        f"folder {tmp_path}/a does not exist; make it first: mkdir -p {tmp_path}/a"
    )


def test_without_tritonclient_the_package_to_install_is_told(
    demo_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    assert refusal(UnsupportedError, [demo_onnx], tmp_path / "m") == (
        "tritonclient is not installed, with whose protobuf Triton's config.pbtxt is written. Install it with: pip "
        "install 'dat-deploy[package]'"
    )
    assert not list(tmp_path.iterdir())


# The command.


def test_the_command_prints_what_it_wrote_and_how_to_serve_it(
    demo_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output, record = tmp_path / "models", tmp_path / "report.json"
    words = ("package", "--engine", demo_onnx, "--output", output, "--images", "--device", "cpu", "--json", record)
    assert run_command(monkeypatch, *words) == 0
    printed = capfd.readouterr()
    assert re.fullmatch(r"(package: .+, \d+\.\d s\n)*", printed.err)
    assert printed.out.splitlines() == [
        f"{output}:",
        "  demo/1/model.onnx",
        "  demo/config.pbtxt",
        "  demo/labels.txt",
        "  demo_images/1/.gitkeep",
        "  demo_images/config.pbtxt",
        "  demo_images/labels.txt",
        "  demo_preprocess/1/model.onnx",
        "  demo_preprocess/config.pbtxt",
        "demo: image FP32 [-1, 3, 64, 64] -> logits FP32 [-1, 10], batch up to 32",
        "demo_preprocess: pixels UINT8 [-1, -1, -1, 3] -> image FP32 [-1, 3, 64, 64], batch up to 32",
        "demo_images: pixels UINT8 [-1, -1, -1, 3] -> logits FP32 [-1, 10], batch up to 32",
        f"next: docker run --rm -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 -p 127.0.0.1:8002:8002 -v "
        f"{shlex.quote(str(output))}:/models:ro nvcr.io/nvidia/tritonserver:{TRITON_TAG} tritonserver "
        f"--model-repository=/models --model-control-mode=none --strict-readiness=true --exit-on-error=true "
        f"--disable-auto-complete-config",
    ]
    content = json.loads(record.read_text())
    assert [model["name"] for model in content["models"]] == ["demo", "demo_preprocess", "demo_images"]
    assert run_command(monkeypatch, *words[:5]) == 1
    error = capfd.readouterr().err
    assert error == f"error: {output}/demo exists; pass --force to replace it, or choose another --name.\n"


def test_a_failed_verdict_is_exit_code_2(
    engine: Engine,
    bad_verdict: Verdict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_command(monkeypatch, "package", "--engine", engine(verdict=bad_verdict), "-o", tmp_path / "m") == 2
    assert "failed its last validation" in capfd.readouterr().err


def test_it_is_in_the_api() -> None:
    assert api.package is package


def test_a_file_of_fixed_batch_is_packaged(demo_batch_3_onnx: Path, tmp_path: Path) -> None:
    config = configs(package([demo_batch_3_onnx], tmp_path / "models"))["demo"]
    check_against(config, read_metadata(demo_batch_3_onnx), ["logits"])
    assert (config.max_batch_size, tuple(config.input[0].dims)) == (0, (3, 3, 64, 64))
