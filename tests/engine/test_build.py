"""TensorRT-RTX parses and builds every network in every lowering and precision; what cannot be built says why."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch

from dat_deploy.engine.build import BuildReport, build
from dat_deploy.engine.passport import Profile, passport_path
from dat_deploy.engine.tensorrt import library as tensorrt_library
from dat_deploy.engine.tensorrt.library import Log, import_tensorrt
from dat_deploy.engine.tensorrt.network import ParsedNetwork, parsed_network
from dat_deploy.errors import DatDeployError, EngineBuildError, OutputError, ShapeError, UnsupportedError
from dat_deploy.export import export
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.plugins.tensorrt import registry

pytestmark = pytest.mark.usefixtures("rtx")
Exported = Callable[[str, str, str], Path]

LOWERINGS = ("plugin", "function", "gather", "hat")
PRECISIONS = ("fp32", "fp16")
TYPES = {"FLOAT": "fp32", "HALF": "fp16"}


def operators(network: Variant) -> dict[str, int]:
    """How many layers each plugin should have."""
    letters = Counter("".join(stage.blocks for stage in network.stages))
    expected = {
        "window_attention": letters["L"] + letters["S"],
        "neighborhood_attention": letters["N"],
        "deformable_sample": letters["D"],
        "deformable_attention": letters["D"],
    }
    return {name: count for name, count in expected.items() if count}


def norms_between(network: Variant) -> int:
    """The LayerNorms outside of blocks: of the stem, the steps between stages and the head, and of the offsets."""
    stem = 2 if network.overlapping_patches else 1
    return stem + len(network.stages) - 1 + 1 + len(network.sampled_blocks)


def check_built(report: BuildReport, network: Variant, precision: str, lowering: str) -> None:
    passport = report.passport
    assert passport.engine_bytes == report.path.stat().st_size > 10_000
    assert passport.plugins == (operators(network) if lowering == "plugin" else {})
    assert passport.metadata.lowering == lowering
    assert "GRID_SAMPLE" not in passport.kinds
    assert passport.kinds["NORMALIZATION"] == sum(2 * len(stage.blocks) for stage in network.stages) + norms_between(
        network
    )
    others = set(PRECISIONS) - {precision}
    if precision == "fp32":
        assert not others & set(passport.layers)
    else:
        assert passport.layers["fp16"] > 0


@pytest.mark.parametrize(
    ("network", "lowering", "precision"),
    [
        (network, lowering, PRECISIONS[(i + j) % 2])  # each pair of them; `make test-all` has each triple
        for i, network in enumerate(("mini", "mini-pp"))
        for j, lowering in enumerate(LOWERINGS)
    ],
)
def test_small_networks_are_built_and_have_no_grid_sample(
    network: str, lowering: str, precision: str, exported: Exported, mini: Variant, mini_pp: Variant, tmp_path: Path
) -> None:
    source = exported(network, precision, lowering)
    report = build(source, tmp_path / "x.engine", backend="tensorrt-rtx", lowering=lowering)
    check_built(report, {"mini": mini, "mini-pp": mini_pp}[network], precision, lowering)


@pytest.mark.released
def test_tiny_is_built_with_plugins(tiny_onnx: dict[str, Path], tmp_path: Path) -> None:
    report = build(tiny_onnx["plugin"], tmp_path / "tiny.engine", backend="tensorrt-rtx")
    check_built(report, VARIANTS["tiny"], "fp32", "plugin")
    assert report.passport.metadata.weights_sha256


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_built_in_every_lowering(variant: str, precision: str, tmp_path: Path) -> None:
    source = tmp_path / "x.onnx"
    export(variant, source, precision=precision)
    for lowering in LOWERINGS:
        report = build(source, tmp_path / "x.engine", backend="tensorrt-rtx", lowering=lowering, force=True)
        check_built(report, VARIANTS[variant], precision, lowering)


def _network(path: Path, *, plugins: bool) -> ParsedNetwork:
    trt = import_tensorrt("tensorrt-rtx")
    if plugins:
        registry.register_plugins(trt)
    return parsed_network(trt, onnx.load(path), Log(trt), plugins=plugins)


def test_the_lowering_gridsample_has_them(exported: Exported) -> None:
    assert _network(exported("mini", "fp32", "gridsample"), plugins=False).kinds["GRID_SAMPLE"] == 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plugin_layers_have_the_shapes_and_types_of_their_operators(
    precision: str, exported: Exported, mini: Variant
) -> None:
    parsed = _network(exported("mini", precision, "plugin"), plugins=True)
    seen = {}
    for i in range(parsed.network.num_layers):
        layer = parsed.network.get_layer(i)
        if layer.type.name == "PLUGIN_V3":
            tensors = [*(layer.get_input(j) for j in range(layer.num_inputs)), layer.get_output(0)]
            seen[layer.name] = [(TYPES[tensor.dtype.name], tuple(tensor.shape)[1:]) for tensor in tensors]
    height, width = mini.feature_map(2)
    groups, (sampled_height, sampled_width) = mini.stages[2].offset_groups, mini.stages[2].sampled_map(height, width)
    keys = sampled_height * sampled_width
    table = mini.bias_table(2)
    locations = ("fp32", (groups, sampled_height, sampled_width, 2))
    assert seen["stages.2.attns.1/deformable_sample"] == [
        (precision, (height, width, 64)),
        locations,
        (precision, (keys, 64)),
    ]
    assert seen["stages.2.attns.1/deformable_attention"] == [
        (precision, (height, width, 64)),
        (precision, (keys, 64)),
        (precision, (keys, 64)),
        locations,
        ("fp32", table),
        (precision, (height, width, 64)),
    ]
    assert seen["stages.0.attns.1/window_attention"] == [
        (precision, (56, 56, 48)),
        ("fp32", (2,)),
        (precision, (56, 56, 16)),
    ]
    assert len(seen) == sum(operators(mini).values())


def test_a_neighborhood_plugin_has_the_shapes_and_types_of_its_operator(exported: Exported) -> None:
    parsed = _network(exported("mini-pp", "fp16", "plugin"), plugins=True)
    (layer,) = (
        layer
        for layer in map(parsed.network.get_layer, range(parsed.network.num_layers))
        if layer.name == "stages.0.attns.0/neighborhood_attention"
    )
    tensors = [*(layer.get_input(j) for j in range(layer.num_inputs)), layer.get_output(0)]
    assert [(tensor.dtype.name, tuple(tensor.shape)) for tensor in tensors] == [
        ("HALF", (-1, 56, 56, 48)),
        ("HALF", (48,)),
        ("FLOAT", (2, 13, 13)),
        ("HALF", (-1, 56, 56, 16)),
    ]


def test_normalization_is_one_layer_in_fp32(exported: Exported) -> None:
    parsed = _network(exported("mini", "fp16", "plugin"), plugins=True)
    fp32 = _network(exported("mini", "fp32", "plugin"), plugins=True)
    assert parsed.kinds["NORMALIZATION"] == fp32.kinds["NORMALIZATION"]
    for i in range(parsed.network.num_layers):
        layer = parsed.network.get_layer(i)
        if layer.type.name == "NORMALIZATION":
            assert {layer.get_input(0).dtype.name, layer.get_output(0).dtype.name} == {"FLOAT"}, layer.name


def test_bodies_are_taken_although_plugins_are_registered(exported: Exported) -> None:
    registry.register_plugins(import_tensorrt("tensorrt-rtx"))
    parsed = _network(exported("mini", "fp16", "function"), plugins=False)
    assert parsed.plugins == {}
    assert parsed.kinds["SOFTMAX"] == 6


def test_without_a_gpu_auto_takes_the_plugins_and_says_so(exported: Exported, tmp_path: Path) -> None:
    report = build(exported("mini", "fp32", "function"), tmp_path / "x.engine", backend="tensorrt-rtx")
    assert report.passport.metadata.lowering == "plugin"
    assert report.notes == (
        "no GPU is at hand to try the lowerings on; took plugin, whose kernels are tested by themselves.",
    )


def test_without_plugins_auto_takes_gather_and_says_why(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "reasons_against_plugins", lambda trt: ["Triton is not installed"])
    report = build(exported("mini", "fp32", "function"), tmp_path / "x.engine", backend="tensorrt-rtx")
    assert report.passport.metadata.lowering == "gather"
    assert report.notes == (
        "no GPU is at hand to try the lowerings on, and the plugins cannot be used (Triton is not installed); "
        "took gather.",
    )


def test_the_lowering_plugin_without_plugins_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "reasons_against_plugins", lambda trt: ["Triton is not installed"])
    with pytest.raises(
        UnsupportedError, match=r"plugins cannot be used .*: .*Triton is not installed.*gather.*instead"
    ):
        build(exported("mini", "fp32", "function"), tmp_path / "x.engine", backend="tensorrt-rtx", lowering="plugin")
    assert not list(tmp_path.iterdir())


def test_profiles_and_architectures_are_kept(exported: Exported, tmp_path: Path) -> None:
    report = build(
        exported("mini", "fp32", "hat"),
        tmp_path / "x.engine",
        backend="tensorrt-rtx",
        batches=["1", "2-4-8"],
        architectures=[80, 89],
    )
    assert report.passport.profiles == (Profile(1, 1, 1), Profile(2, 4, 8))
    assert report.passport.architectures == ("sm_80", "sm_89")


def test_a_file_of_dynamic_size_is_built_for_one(mini_pp_dynamic: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "x.engine"
    report = build(mini_pp_dynamic["plugin"], target, backend="tensorrt-rtx", image_size=(256, 320))
    assert report.passport.metadata.image_size == (256, 320)
    assert not report.passport.metadata.dynamic_image_size
    assert report.passport.metadata.preprocessing.image_size == (256, 320)


def test_progress_is_told_and_an_interruption_ends_the_build(exported: Exported, tmp_path: Path) -> None:
    said: list[str] = []
    source = exported("mini", "fp32", "hat")
    build(source, tmp_path / "x.engine", backend="tensorrt-rtx", progress=said.append)
    assert said[0] == "reading the file"
    assert any(re.fullmatch(r"building the engine, Optimizing graph \(\d+/\d+\)", text) for text in said)

    class Interruption(BaseException):
        pass

    def interrupt(text: str) -> None:
        if "Optimizing" in text:
            raise Interruption

    with pytest.raises(Interruption):
        build(source, tmp_path / "y.engine", backend="tensorrt-rtx", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.engine.json"]


REFUSED = {
    "no such backend": ({"backend": "openvino"}, EngineBuildError, "no backend 'openvino'. Backends: tensorrt,"),
    "no such lowering": ({"lowering": "fast"}, EngineBuildError, "no lowering 'fast'. Lowerings: auto, function,"),
    "no such plugin form": ({"plugin_form": "c++"}, EngineBuildError, "no plugin form 'c++'. Forms: auto, IPluginV3,"),
    "no batch": ({"batches": []}, ShapeError, "no batch to build for"),
    "batch 0": ({"batches": ["0"]}, ShapeError, "`batches` got '0'"),
    "another image size": ({"image_size": (448, 448)}, ShapeError, "is made for images of 224x224, not 448x448"),
    "inlined already": ({"lowering": "plugin"}, EngineBuildError, "has its operators inlined (lowering 'hat')"),
    "an unknown architecture": ({"architectures": [90]}, UnsupportedError, "does not build for sm_90; it knows sm_75,"),
    "ahead of time": (
        {"lowering": "plugin", "plugin_form": "ahead-of-time", "source": "plugin"},
        UnsupportedError,
        "the ahead-of-time plugins cannot be used with tensorrt-rtx 1.7.1.116 here: TensorRT-RTX takes no",
    ),
    "a timing cache": ({"timing_cache": Path("cache")}, UnsupportedError, "TensorRT-RTX times nothing while it builds"),
    "plugins for another lowering": (
        {"plugin_form": "IPluginV3"},
        EngineBuildError,
        '`plugin_form="IPluginV3"` is for `lowering="plugin"`, and this is hat',
    ),
    "what is for aotinductor": (
        {"precision": "fp16"},
        EngineBuildError,
        "`precision` is for backend aotinductor; tensorrt-rtx builds what a file holds.",
    ),
    "no tensorrt": ({"backend": "tensorrt"}, UnsupportedError, "package tensorrt is not installed"),
}


def test_an_engine_has_its_suffix(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(
        EngineBuildError, match=r"what tensorrt-rtx makes ends in \.engine, by which the other commands"
    ):
        build(exported("mini", "fp32", "hat"), tmp_path / "x.onnx", backend="tensorrt-rtx")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_says_why_and_writes_nothing(case: str, exported: Exported, tmp_path: Path) -> None:
    changes, kind, sentence = REFUSED[case]
    options = {"backend": "tensorrt-rtx", **changes}
    source = exported("mini", "fp32", options.pop("source", "hat"))
    with pytest.raises(kind) as caught:
        build(source, tmp_path / "x.engine", **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_fixed_batch_has_no_other_profile(mini: Variant, tmp_path: Path) -> None:
    source = tmp_path / "x.onnx"
    export(mini, source, batch=2)
    with pytest.raises(ShapeError, match="has the fixed batch 2 and cannot be built for batch 1,8"):
        build(source, backend="tensorrt-rtx", batches=[1, 8])
    assert build(source, backend="tensorrt-rtx", batches=[2]).passport.profiles == (Profile(2, 2, 2),)


def test_files_that_cannot_be_built_are_told_apart(tmp_path: Path) -> None:
    missing, broken, foreign = tmp_path / "missing.onnx", tmp_path / "broken.onnx", tmp_path / "foreign.onnx"
    broken.write_bytes(b"\xff" * 100)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), foreign)
    for source, sentence in (
        (missing, "there is no file"),
        (broken, "is not an ONNX file"),
        (foreign, "was not exported by dat-deploy"),
    ):
        with pytest.raises(DatDeployError, match=sentence):
            build(source, backend="tensorrt-rtx")


def test_an_engine_or_a_passport_is_not_replaced_unasked(exported: Exported, tmp_path: Path) -> None:
    target = tmp_path / "x.engine"
    passport_path(target).write_text("{}")
    with pytest.raises(OutputError, match=r"x.engine.json exists; pass `force=True`"):
        build(exported("mini", "fp32", "hat"), target, backend="tensorrt-rtx")
    assert not target.exists()


def test_heads_too_large_for_the_kernels_are_refused_with_the_nodes_name(mini: Variant, tmp_path: Path) -> None:
    stages = (*mini.stages[:3], replace(mini.stages[3], heads=1, offset_groups=1))
    source = tmp_path / "x.onnx"
    export(replace(mini, stages=stages), source, lowering="plugin")
    with pytest.raises(EngineBuildError) as caught:
        build(source, backend="tensorrt-rtx")
    assert "stages.3.attns.0/deformable_attention" in str(caught.value)
    assert "got heads of 128 channels; its kernel takes up to 64" in str(caught.value)


def test_tensorrt_needs_a_gpu_to_build(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "missing", lambda backend: [])
    monkeypatch.setattr("dat_deploy.engine.tensorrt.engine.import_tensorrt", lambda backend: None)
    with pytest.raises(UnsupportedError) as caught:
        build(exported("mini", "fp32", "hat"), tmp_path / "x.engine")
    assert str(caught.value) == (
        f"TensorRT builds on a GPU, and torch {torch.__version__} sees none here. Build where one is, or with "
        f'`backend="tensorrt-rtx"`, which needs none for that.'
    )


@pytest.mark.parametrize("version", ["10.15.1", "12.0.0"])
def test_other_versions_of_tensorrt_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        __version__ = version

    monkeypatch.setattr(tensorrt_library, "missing", lambda backend: [])
    monkeypatch.setitem(sys.modules, "tensorrt", Other)
    import_tensorrt.cache_clear()
    with pytest.raises(
        UnsupportedError, match=f"tensorrt {version} is installed; dat-deploy works with 10.16 and later"
    ):
        import_tensorrt("tensorrt")
    import_tensorrt.cache_clear()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)  # noqa: S603  # fixed


def test_tensorrt_rtx_is_loaded_without_writing_to_site_packages(exported: Exported) -> None:
    done = _python(
        "import sys, onnx\n"
        "from pathlib import Path\n"
        "import tensorrt_rtx_libs\n"
        "folder = Path(tensorrt_rtx_libs.__file__).parent\n"
        "before = sorted(folder.rglob('*'))\n"
        "from dat_deploy.engine.tensorrt.library import Log, import_tensorrt\n"
        "from dat_deploy.engine.tensorrt.network import parsed_network\n"
        "trt = import_tensorrt('tensorrt-rtx')\n"
        f"parsed = parsed_network(trt, onnx.load({str(exported('mini', 'fp32', 'hat'))!r}), Log(trt), plugins=False)\n"
        "print(len(parsed.kinds) > 5, sorted(folder.rglob('*')) == before)\n"
    )
    assert done.stdout == "True True\n", done.stderr


def test_where_no_link_can_be_made_the_error_says_how() -> None:
    """The links go to a temporary folder; without one, the user makes the link."""
    done = _python(
        "import pathlib, tempfile\n"
        "from dat_deploy.engine.tensorrt.library import import_tensorrt\n"
        "pathlib.Path.exists = lambda path: False  # a link that was made before\n"
        "def refuse(*_, **__): raise PermissionError(13, 'Permission denied')\n"
        "tempfile.TemporaryDirectory = refuse\n"
        "from dat_deploy.errors import UnsupportedError\n"
        "try: import_tensorrt('tensorrt-rtx')\n"
        "except UnsupportedError as error: print(error)\n"
    )
    assert "make the link yourself: ln -s libtensorrt_rtx.so.1 " in done.stdout, done.stderr


def test_running_out_of_memory_while_building_is_told(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process with too little memory was seen to fail: with std::bad_alloc in TensorRT's log, or in Python."""
    trt = import_tensorrt("tensorrt-rtx")
    answers: list[BaseException | None] = [None, MemoryError()]

    def fail(*_: object) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(trt.Builder, "build_serialized_network", fail)
    monkeypatch.setattr(Log, "tail", lambda log: "Unexpected exception std::bad_alloc")
    for _ in range(2):
        with pytest.raises(EngineBuildError) as caught:
            build(exported("mini", "fp32", "hat"), tmp_path / "x.engine", backend="tensorrt-rtx")
        assert str(caught.value) == (
            "TensorRT could not build the engine; it said: Unexpected exception std::bad_alloc. "
            "Try smaller `batches`, `workspace_bytes`, or a machine with more memory."
        )
    assert not answers
    assert not list(tmp_path.iterdir())


def test_tensorrt_itself_is_driven_alike(
    harness: ModuleType, libraries: Path, exported: Exported, tmp_path: Path
) -> None:
    """The bindings of TensorRT 11.4, over the libraries of TensorRT-RTX, which know no ahead-of-time plugins."""
    found = harness.run(libraries, "builds", str(exported("mini", "fp32", "function")), str(tmp_path))
    plugins = {"window_attention": 4, "deformable_sample": 2, "deformable_attention": 2}
    assert found[:3] == [
        ["11.4.0.106", ["sm_89"], {}, None],
        ["11.4.0.106", ["sm_89"], plugins, "IPluginV3"],
        ["11.4.0.106", ["sm_80", "sm_89"], {}, None],
    ]
    assert found[3].startswith("UnsupportedError: an engine of TensorRT runs on the architecture of the GPU at hand")
    assert found[4] == found[0]
    assert (tmp_path / "timings").stat().st_size > 0
    assert found[5].startswith(
        "EngineBuildError: TensorRT 11.4.0.106 makes no network of the kind STRONGLY_TYPED | PREFER"
    )
    assert found[6] == (
        "UnsupportedError: the kernels for sm_90 run on no other architecture, and `architectures` also has sm_100. "
        "Build an engine for each, or begin with one below 90."
    )
