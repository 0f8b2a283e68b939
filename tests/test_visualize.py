"""visualize/: where the points are, what the picture shows of them, and what is refused. Most engines are fakes."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dat_deploy import visualize as module
from dat_deploy.errors import DatDeployError, ImageError, OutputError, ShapeError, VerificationError
from dat_deploy.export import export
from dat_deploy.images.preprocess import IMAGENET_MEAN, IMAGENET_STD
from dat_deploy.networks.dat.model import reference_points
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.networks.sampling import SampledBlock
from dat_deploy.runners import EngineDescription, Runner
from dat_deploy.visualize import Visualization, plotting, visualize

Outputs = dict[str, NDArray[np.float32]]
FAMILIES = {"DAT": "tiny", "DAT++": "pp-tiny"}
WIDE = VARIANTS["pp-tiny"].with_image_size(64, 128)  # 14 deformable blocks, 2×4 points a group


def points(variant: Variant) -> Outputs:
    """What a network without offsets would give, its attention spread evenly."""
    outputs = {"logits": np.zeros((1, 1000), dtype=np.float32)}
    for i, stage in enumerate(variant.stages):
        height, width = stage.sampled_map(*variant.feature_map(i)) if "D" in stage.blocks else (0, 0)
        for j, letter in enumerate(stage.blocks):
            if letter == "D":
                grid = reference_points(height, width, half_pixel=variant.half_pixel_queries).numpy()
                grid = grid if stage.offset_range_factor > 0 else grid.clip(-1, 1)
                shape = (1, stage.offset_groups, height, width)
                outputs[f"sampling_locations_{i}_{j}"] = np.broadcast_to(grid, (*shape, 2)).copy()
                outputs[f"attention_{i}_{j}"] = np.full(shape, 1 / (height * width), dtype=np.float32)
    return outputs


class FakeRunner(Runner):
    """Gives `outputs`, whatever the image, and keeps the image."""

    def __init__(self, outputs: Outputs, variant: Variant = WIDE, *, name: str = "fake.onnx", batch: int | None = None):
        self.given = outputs
        self.seen: NDArray[np.float32] | None = None
        self.closed = False
        self.description = EngineDescription(
            name=name,
            runtime="fake",
            runtime_version="1.0",
            device="cpu",
            precision="fp32",
            network=variant,
            outputs=tuple(outputs),
            batch=batch,
            dynamic_image_size=False,
            lowering=None,
            threads=1,
            weights_sha256="0" * 64,
            weights_source="none",
            preprocessing=variant.preprocessing,
        )

    def _run(self, images_nchw: NDArray[np.float32]) -> Outputs:
        self.seen = images_nchw
        return {name: np.repeat(values, len(images_nchw), axis=0) for name, values in self.given.items()}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "photograph.png"
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def draw(photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Visualization]:
    """`visualize` with these runners for engines."""

    def call(*runners: FakeRunner, output: Path = tmp_path / "points.png", force: bool = False) -> Visualization:
        by_name = {runner.description.name: runner for runner in runners}
        monkeypatch.setattr(module, "open_runner", lambda engine, **_: by_name[engine])
        monkeypatch.setattr(module, "check_engine", lambda engine, **_: by_name[engine].description)
        return visualize(photograph, list(by_name), output, force=force)

    return call


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Each figure that is drawn from here on."""
    drawn: list[Figure] = []
    original = plotting.figure_from_points

    def keep(*args: object) -> Figure:
        drawn.append(original(*args))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(plotting, "figure_from_points", keep)
    return drawn


@contextlib.contextmanager
def nothing_new(folder: Path) -> Iterator[None]:
    before = sorted(folder.iterdir())
    yield
    assert sorted(folder.iterdir()) == before


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def marks(axes: Axes) -> list[PathCollection]:
    return [artist for artist in axes.collections if isinstance(artist, PathCollection)]


def lines(axes: Axes) -> list[NDArray[np.float64]]:
    return [s for artist in axes.collections if isinstance(artist, LineCollection) for s in artist.get_segments()]


# geometry


def block_of(feature_map: tuple[int, int], image_size: tuple[int, int]) -> SampledBlock:
    return SampledBlock(
        "stages.3.attns.1", 3, 1, 96, 3, feature_map, feature_map, image_size, half_pixel=True, is_clamped=False
    )


@pytest.mark.parametrize("sides", [(7, 7), (14, 28), (2, 3), (56, 1)])
@pytest.mark.parametrize("stride", [4, 32])
def test_minus_one_and_one_are_the_centres_of_the_pixels_under_the_first_and_the_last_of_the_map(
    sides: tuple[int, int], stride: int
) -> None:
    image_size = (sides[0] * stride, sides[1] * stride)
    under = [np.arange(side).reshape(-1, stride).mean(axis=1) for side in image_size]
    ends = block_of(sides, image_size).borders
    np.testing.assert_allclose(ends[0], [u[0] for u in under])
    np.testing.assert_allclose(ends[1], [u[-1] if len(u) > 1 else u[0] for u in under])


def test_evenly_spaced_locations_are_the_centres_of_the_maps_pixels() -> None:
    along = np.linspace(-1, 1, 14)
    pixels = block_of((14, 14), (224, 448)).pixels(np.stack([along, along], axis=-1))
    np.testing.assert_allclose(pixels[:, 0], np.arange(224).reshape(14, 16).mean(axis=1))
    np.testing.assert_allclose(pixels[:, 1], np.arange(448).reshape(14, 32).mean(axis=1))


@pytest.mark.parametrize("variant", FAMILIES.values(), ids=FAMILIES)
def test_points_without_offsets_have_not_moved(variant: str, draw: Callable[..., Visualization]) -> None:
    """Those of DAT++ whose reference lies beyond the map have not, either: clamping is no offset."""
    blocks = draw(FakeRunner(points(VARIANTS[variant]), VARIANTS[variant])).blocks
    assert max(block.largest_offset_px for block in blocks) < 1e-4
    assert {block.outside for block in blocks} == {0}


@pytest.mark.parametrize("variant", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("stage", "stride"), [(2, 16), (3, 32)])
def test_a_shift_by_pixels_is_an_offset_and_a_drift_of_those_pixels(
    variant: str, stage: int, stride: int, draw: Callable[..., Visualization]
) -> None:
    network = VARIANTS[variant]
    first, second = points(network), points(network)
    name = next(name for name in first if name.startswith(f"sampling_locations_{stage}"))
    one_pixel = 2 / (224 - stride)  # of the picture, as the map's first and last centre are 2 apart
    second[name] += np.array([3, -4], dtype=np.float32) * one_pixel
    by_name = {}
    for order in ("ab", "ba"):
        runners = {
            "a": FakeRunner(first, network, name="a.onnx"),
            "b": FakeRunner(second, network, name="b.onnx"),
        }
        result = draw(*(runners[letter] for letter in order), force=True)
        by_name[order] = {f"sampling_locations_{block.stage}_{block.block}": block for block in result.blocks}
    for blocks in by_name.values():
        assert blocks[name].median_drift_px == pytest.approx(5, abs=1e-3)
        assert blocks[name].largest_drift_px == pytest.approx(5, abs=1e-3)
        assert {block.largest_drift_px for other, block in blocks.items() if other != name} == {0}
    assert by_name["ab"][name].largest_offset_px < 1e-4
    assert by_name["ba"][name].mean_offset_px == pytest.approx(5, abs=1e-3)


def test_a_summary_counts_points_outside_the_map_and_the_most_attended_one(draw: Callable[..., Visualization]) -> None:
    outputs = points(VARIANTS["tiny"])
    outputs["sampling_locations_3_1"][0, 0, 0, :3] = [[-1.1, 0], [1, -1], [0, 1.01]]
    outputs["attention_3_1"][0, 2, 4, 5] = 0.5
    *others, last = draw(FakeRunner(outputs, VARIANTS["tiny"])).blocks
    assert (last.stage, last.block, last.points) == (3, 1, 6 * 49)
    assert last.outside == pytest.approx(2 / (6 * 49))
    assert last.largest_attention == 0.5
    assert last.median_drift_px is last.largest_drift_px is None
    assert [(block.stage, block.block, block.points) for block in others] == [(2, j, 3 * 196) for j in (1, 3, 5)]


# the picture


def test_the_picture_has_a_panel_for_each_stage_with_deformable_blocks(
    draw: Callable[..., Visualization], figures: list[Figure], tmp_path: Path
) -> None:
    result = draw(FakeRunner(points(WIDE), WIDE))
    assert result.path == tmp_path / "points.png"
    assert [axes.get_title(loc="left").split("\n")[:2] for axes in panels(figures[0])] == [
        ["stage 0, feature map 16×32", "1 deformable block × 1 offset group × 8 points"],
        ["stage 1, feature map 8×16", "2 deformable blocks × 2 offset groups × 8 points"],
        ["stage 2, feature map 4×8", "9 deformable blocks × 4 offset groups × 8 points"],
        ["stage 3, feature map 2×4", "2 deformable blocks × 8 offset groups × 8 points"],
    ]
    with Image.open(result.path) as picture:
        assert picture.format == "PNG"
        assert 900 < picture.width < 1500
        assert 700 < picture.height < 1500
    draw(FakeRunner(points(VARIANTS["tiny"]), VARIANTS["tiny"]), force=True)
    assert [axes.get_title(loc="left")[:7] for axes in panels(figures[1])] == ["stage 2", "stage 3"]


@pytest.mark.parametrize("stages", [(1,), (0, 1, 3)], ids=["one", "three"])
def test_any_number_of_stages_may_have_deformable_blocks(
    stages: tuple[int, ...], draw: Callable[..., Visualization], figures: list[Figure]
) -> None:
    kept = tuple(s if i in stages else replace(s, blocks="N") for i, s in enumerate(WIDE.stages))
    variant = replace(WIDE, stages=kept)
    draw(FakeRunner(points(variant), variant))
    assert [int(axes.get_title(loc="left")[6]) for axes in panels(figures[0])] == list(stages)


def test_the_photograph_is_what_the_network_saw_and_marks_are_at_its_pixels(
    draw: Callable[..., Visualization], figures: list[Figure]
) -> None:
    runner = FakeRunner(points(WIDE))
    draw(runner)
    axes = panels(figures[0])[3]
    assert runner.seen is not None
    shown = np.asarray(axes.images[0].get_array())
    grey = (runner.seen[0].transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN).mean(axis=-1)
    assert np.corrcoef(shown.ravel(), grey.ravel())[0, 1] == pytest.approx(1)
    assert axes.images[0].get_extent() == [-0.5, 127.5, 63.5, -0.5]  # 0 is the centre of the first pixel
    first_of_map, last_of_map = (15.5, 15.5), (111.5, 47.5)  # x, y
    drawn = {tuple(np.round(position, 3)) for mark in marks(axes) for position in mark.get_offsets()}
    assert last_of_map in drawn
    assert all(first_of_map[0] <= x <= last_of_map[0] and first_of_map[1] <= y <= last_of_map[1] for x, y in drawn)


def test_the_area_of_a_mark_is_the_attention_up_to_a_limit(
    draw: Callable[..., Visualization], figures: list[Figure]
) -> None:
    outputs = points(VARIANTS["tiny"])
    shares = np.full(49, 1 / 49)
    shares[:5] = np.array([2, 0.5, 1, 100, 0]) / 49
    outputs["attention_3_1"][0, 0] = shares.reshape(7, 7)
    draw(FakeRunner(outputs, VARIANTS["tiny"]))
    changed, *others = marks(panels(figures[0])[1])
    unit = others[0].get_sizes()[0]
    assert all(np.allclose(mark.get_sizes(), unit) for mark in others)
    assert changed.get_sizes() == pytest.approx(unit * np.array([8, 2, *[1] * 45, 0.5, 1 / 8]))  # small ones on top
    left, top = block_of((7, 7), (224, 224)).pixels(reference_points(7, 7, half_pixel=True).numpy()[0, 3])[::-1]
    np.testing.assert_allclose(changed.get_offsets()[0], (left, top), atol=1e-4)


def test_sixteen_offset_groups_have_sixteen_looks(draw: Callable[..., Visualization], figures: list[Figure]) -> None:
    variant = VARIANTS["pp-base"].with_image_size(64, 64)
    draw(FakeRunner(points(variant), variant))
    last_block = marks(panels(figures[0])[3])[-16:]
    looks = {(tuple(m.get_facecolor()[0]), m.get_paths()[0].vertices.tobytes()) for m in last_block}
    assert len(looks) == 16


def test_later_blocks_are_more_opaque(draw: Callable[..., Visualization], figures: list[Figure]) -> None:
    draw(FakeRunner(points(WIDE)))
    opacities = [mark.get_alpha() for mark in marks(panels(figures[0])[2])[::4]]  # of group 0
    assert len(opacities) == 9
    assert opacities == sorted(set(opacities))
    assert opacities[-1] == 1


def test_points_far_outside_are_drawn_at_the_margin(draw: Callable[..., Visualization], figures: list[Figure]) -> None:
    outputs = points(WIDE)
    outputs["sampling_locations_3_1"][0, 0, 0, 0] = [-1e30, 50]
    draw(FakeRunner(outputs))
    for axes in panels(figures[0]):
        assert axes.get_xlim() == pytest.approx((-0.5 - 0.15 * 128, 127.5 + 0.15 * 128))
        assert axes.get_ylim() == pytest.approx((63.5 + 0.15 * 128, -0.5 - 0.15 * 128))
    corner = (127.5 + 0.15 * 128, -0.5 - 0.15 * 128)
    assert any(np.allclose(p, corner) for m in marks(panels(figures[0])[3]) for p in m.get_offsets())


def test_two_engines_are_discs_and_rings_with_a_line_where_they_are_half_a_pixel_apart(
    draw: Callable[..., Visualization], figures: list[Figure]
) -> None:
    first, second = points(VARIANTS["tiny"]), points(VARIANTS["tiny"])
    one_pixel = np.float32(2 / (224 - 32))
    second["sampling_locations_3_1"][0, 1, 2, 3:5, 0] += np.array([0.6, 0.4], dtype=np.float32) * one_pixel
    draw(*(FakeRunner(o, VARIANTS["tiny"], name=n) for o, n in ((first, "a.onnx"), (second, "b.onnx"))))
    axes = panels(figures[0])[1]
    assert len(lines(panels(figures[0])[0])) == 0
    ((start, end),) = lines(axes)
    assert end - start == pytest.approx((0, 0.6), abs=1e-3)
    discs, rings = marks(axes)[:6], marks(axes)[6:]
    assert all(len(mark.get_facecolor()) for mark in discs)
    assert not any(len(mark.get_facecolor()) for mark in rings)
    assert len(discs) == len(rings)
    assert axes.get_title(loc="left").split("\n")[2] == "drift: <0.001 px in the median, 0.600 px at most"
    key = figures[0].axes[-1].texts[0].get_text()
    assert "Discs: a.onnx. Rings: b.onnx.\nA line joins the two where they are 0.5 px apart or more." in key


def test_one_engine_has_lines_from_the_crosses_to_the_last_blocks_points(
    draw: Callable[..., Visualization], figures: list[Figure]
) -> None:
    outputs = points(WIDE)
    outputs["sampling_locations_2_17"][0, 1, 0, 0] = [0, 0]
    draw(FakeRunner(outputs))
    axes = panels(figures[0])[2]
    crosses = {tuple(np.round(cross, 3)) for cross in np.transpose(axes.lines[0].get_data())}
    drawn = lines(axes)
    assert len(drawn) == 4 * 8
    assert {tuple(np.round(start, 3)) for start, _ in drawn} == crosses
    moved = [end for start, end in drawn if not np.allclose(start, end, atol=1e-3)]
    assert moved == [pytest.approx((63.5, 31.5))]  # the middle


def test_file_names_of_any_kind_do_not_break_the_picture(
    photograph: Path, draw: Callable[..., Visualization], figures: list[Figure], tmp_path: Path
) -> None:
    name = "$x^$ 写真 \a\udc80 " + "long " * 40
    draw(FakeRunner(points(WIDE), name=f"{name}.onnx"))
    draw(FakeRunner(points(WIDE), name=f"{name}.onnx"), FakeRunner(points(WIDE), name=f"{name}2.onnx"), force=True)
    assert figures[0].get_supxlabel().startswith("$x^$ ?? ?? long long")


def test_the_small_print_says_what_ran(draw: Callable[..., Visualization], figures: list[Figure]) -> None:
    draw(FakeRunner(points(WIDE)))
    assert figures[0].get_suptitle() == "DAT++ pp-tiny: where its deformable blocks look"
    engine, rest = figures[0].get_supxlabel().split("\n")
    assert engine == "fake.onnx: fake 1.0, cpu, fp32, weights: none (sha256 000000000000)"
    assert rest.startswith("photograph.png, 64×128, dat-deploy ")


# engines


def test_an_engine_of_a_fixed_batch_gets_the_image_in_every_slot(draw: Callable[..., Visualization]) -> None:
    runner = FakeRunner(points(WIDE), batch=3)
    draw(runner)
    assert runner.seen is not None
    assert runner.seen.shape == (3, 3, 64, 128)
    assert (runner.seen == runner.seen[:1]).all()
    assert runner.closed


def test_a_backbone_has_points_too(draw: Callable[..., Visualization]) -> None:
    outputs = points(WIDE)
    del outputs["logits"]
    outputs = {"feature_map_0": np.zeros((1, 64, 16, 32), dtype=np.float32)} | outputs
    assert len(draw(FakeRunner(outputs, WIDE.as_backbone([0]))).blocks) == 14


def test_pytorch_needs_no_exported_file(photograph: Path, tmp_path: Path) -> None:
    result = visualize(photograph, ["pytorch:pp-tiny"], tmp_path / "points.png", image_size=(64, 96))
    assert result.engines[0].name == "pytorch:pp-tiny"
    assert result.engines[0].image_size == (64, 96)
    assert len(result.blocks) == 14
    assert all(0 < block.mean_offset_px < block.largest_offset_px < 96 for block in result.blocks)
    assert result.path.stat().st_size > 10_000


def test_exported_files_agree_between_runtimes(photograph: Path, mini_pp: Variant, tmp_path: Path) -> None:
    wide = mini_pp.with_image_size(64, 128)
    stages = tuple(
        replace(here, blocks="D", channels=stage.channels) for here, stage in zip(WIDE.stages, wide.stages, strict=True)
    )
    path = tmp_path / "small.onnx"
    export(replace(wide, name="small", stages=stages), path, sampling_locations=True)
    result = visualize(photograph, [str(path), f"openvino:{path}"], tmp_path / "points.png")
    assert [engine.runtime for engine in result.engines] == ["onnxruntime", "openvino"]
    assert [block.stage for block in result.blocks] == [0, 1, 2, 3]
    for block in result.blocks:
        assert block.mean_offset_px > 1
        assert block.largest_drift_px is not None
        assert block.largest_drift_px < 1e-2  # float32: a hundredth of a pixel would be a fault


# refusals; none leaves a file


def test_an_engine_without_points_says_how_to_export_it(draw: Callable[..., Visualization], tmp_path: Path) -> None:
    with nothing_new(tmp_path), pytest.raises(DatDeployError) as refused:
        draw(FakeRunner({"logits": np.zeros((1, 1000), dtype=np.float32)}))
    assert str(refused.value) == (
        "fake.onnx gives logits and no sampling locations. Export it again with "
        "`sampling_locations=True` to see its points."
    )


def test_a_network_without_deformable_blocks_has_nothing_to_draw(
    draw: Callable[..., Visualization], tmp_path: Path
) -> None:
    variant = replace(WIDE, name="flat", stages=tuple(replace(stage, blocks="NN") for stage in WIDE.stages))
    with nothing_new(tmp_path), pytest.raises(DatDeployError) as refused:
        draw(FakeRunner(points(variant), variant))
    assert str(refused.value) == (
        "fake.onnx: variant 'flat' has no deformable block, so it samples no points. "
        "Name an engine of a variant that has some, such as pytorch:tiny."
    )


@pytest.mark.parametrize(
    ("output", "value"), [("sampling_locations_2_3", np.nan), ("attention_2_3", np.nan), ("attention_2_3", np.inf)]
)
def test_numbers_that_are_not_finite_are_an_error_and_no_picture(
    output: str, value: float, draw: Callable[..., Visualization], tmp_path: Path
) -> None:
    outputs = points(WIDE)
    outputs[output][0, 1, 0, 0] = value
    wrong = 2 if output.startswith("sampling") else 1  # y and x, or one
    with nothing_new(tmp_path), pytest.raises(VerificationError) as refused:
        draw(FakeRunner(outputs))
    assert str(refused.value) == (
        f"fake.onnx: {wrong} of {outputs[output].size} values of output '{output}' are NaN or infinite; a picture "
        f"needs finite ones. Find the cause with: `validate(engine='fake.onnx')`"
    )


@pytest.mark.parametrize(
    ("other", "described"),
    [
        (VARIANTS["pp-tiny"], "pp-tiny for 224x224"),
        (VARIANTS["pp-small"].with_image_size(64, 128), "pp-small for 64x128"),
    ],
    ids=["image size", "network"],
)
def test_two_engines_must_be_one_network_at_one_image_size(
    other: Variant, described: str, draw: Callable[..., Visualization], tmp_path: Path
) -> None:
    with nothing_new(tmp_path), pytest.raises(ShapeError) as refused:
        draw(FakeRunner(points(WIDE)), FakeRunner(points(other), other, name="other.onnx"))
    assert str(refused.value) == (
        f"fake.onnx is pp-tiny for 64x128, other.onnx is {described}; a drift is between points of one network at one "
        f"image size. Name two engines of one variant, or give `image_size`."
    )


@pytest.mark.parametrize("count", [0, 3])
def test_one_engine_or_two_can_be_drawn(count: int, photograph: Path, tmp_path: Path) -> None:
    with nothing_new(tmp_path), pytest.raises(DatDeployError) as refused:
        visualize(photograph, ["pytorch:tiny"] * count, tmp_path / "points.png")
    assert str(refused.value) == (
        f"{count} engines were named; visualize draws one, or two and their drift. Name one or two."
    )


def test_the_output_is_refused_before_anything_is_opened(
    photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg, taken = tmp_path / "points.jpg", tmp_path / "taken.png"
    taken.write_text("keep")
    with nothing_new(tmp_path):
        with pytest.raises(OutputError) as refused:
            visualize(photograph, ["no-such:engine"], jpeg)
        assert str(refused.value) == (
            f"{jpeg} does not end in .png, and plots are PNG; write {tmp_path / 'points.png'}"
        )
        with pytest.raises(OutputError) as refused:
            visualize(photograph, ["no-such:engine"], taken)
        assert str(refused.value) == f"{taken} exists; pass `force=True` to replace it, or choose another name."
        with pytest.raises(OutputError, match="is a folder"):
            visualize(photograph, ["no-such:engine"], Path())
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
        with pytest.raises(DatDeployError) as missing:
            visualize(photograph, ["no-such:engine"], tmp_path / "points.png")
        assert str(missing.value) == "plots need matplotlib: pip install 'dat-deploy[plot]'"
    assert taken.read_text() == "keep"


def test_a_picture_that_cannot_be_read_is_refused_before_the_engine_is_opened(tmp_path: Path) -> None:
    with nothing_new(tmp_path), pytest.raises(ImageError):
        visualize(tmp_path / "none.png", ["no-such:engine"], tmp_path / "points.png")


def test_a_failure_while_writing_leaves_nothing(
    draw: Callable[..., Visualization], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Figure, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with nothing_new(tmp_path), pytest.raises(OutputError, match="No space left on device"):
        draw(FakeRunner(points(WIDE)))


def test_force_replaces_a_picture(draw: Callable[..., Visualization], tmp_path: Path) -> None:
    path = tmp_path / "points.png"
    path.write_text("old")
    draw(FakeRunner(points(WIDE)), force=True)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
