"""Official configuration files: the nine released networks come out, and whatever is not supported is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dat_deploy.errors import ShapeError, VariantError
from dat_deploy.networks.dat.configuration import SIZE_LIMIT_BYTES, variant_from_config
from dat_deploy.networks.dat.model import DAT
from dat_deploy.networks.dat.variants import RELEASED, VARIANTS, Variant
from dat_deploy.networks.family import find_network

MANIFESTS = Path(__file__).parent / "golden" / "manifests"
# Small networks of both papers' code, each option in the form of the official files.
DAT_SECTION = {
    "img_size": 64,
    "dim_stem": 16,
    "dims": [16, 32, 64, 128],
    "depths": [2, 1, 1, 1],
    "stage_spec": [["L", "S"], ["L"], ["D"], ["D"]],
    "heads": [1, 2, 4, 8],
    "window_sizes": [4, 4, 7, 7],
    "groups": [-1, -1, 2, 4],
    "use_pes": [False, False, True, True],
    "strides": [-1, -1, 1, 1],
    "offset_range_factor": [-1, -1, 2, 2],
}
PP_SECTION = {
    "dim_stem": 16,
    "dims": [16, 32, 64, 128],
    "depths": [2, 1, 1, 1],
    "stage_spec": [["N", "D"], ["N"], ["D"], ["D"]],
    "heads": [1, 2, 4, 8],
    "groups": [1, -1, 2, 4],
    "use_pes": [True, True, True, True],
    "strides": [8, 4, 2, 1],
    "offset_range_factor": [-1, -1, -1, -1],
    "ksizes": [9, 7, 5, 3],
}


def released(name: str) -> dict[str, Any]:
    """The official file of a released variant: only one of them is evaluated without a crop."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {
        "MODEL": {"TYPE": "dat", "DAT": manifest["config"]},
        "DATA": {"IMG_SIZE": manifest["image_size"]},
        "TEST": {"CROP": name != "pp-base-384"},
    }


def without_figures(variant: Variant, name: str) -> Variant:
    return replace(variant, name=name, parameters=None, gmacs=None, published_top1=None, runtimes_checked=())


def write(folder: Path, content: Any, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refusal(path: Path) -> str:
    """The sentence, less the file's name that it begins with."""
    with pytest.raises(VariantError) as caught:
        variant_from_config(path)
    message = str(caught.value)
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_gives_its_row(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, released(name))
    assert variant_from_config(path) == without_figures(VARIANTS[name], "mine")


@pytest.mark.parametrize("name", [name for name in RELEASED if not name.endswith("-384")])
def test_data_and_test_sections_default_to_224_pixels_and_a_crop(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"MODEL": {"DAT": released(name)["MODEL"]["DAT"]}})
    assert variant_from_config(path) == without_figures(VARIANTS[name], "mine")


def test_the_form_of_the_official_files_is_read(tmp_path: Path) -> None:
    text = """\
MODEL:
  TYPE: dat
  NAME: dat_plus_plus
  PRETRAINED: "<path-to-dat_b_in1k.pth>"
  DAT:
    img_size: 224
    patch_size: 4
    num_classes: 10
    expansion: 2
    dim_stem: 64
    dims: [64, 128, 256, 512]
    depths: [2, 2, 2, 2]
    stage_spec: [[N, D], [N, D], [N, D], [D, D]]
    heads: [2, 4, 8, 16]
    window_sizes: [7, 7, 7, 7]
    groups: [1, 2, 4, 8]
    use_pes: [True, True, True, True]
    dwc_pes: [False, False, False, False]
    sr_ratios: [-1, -1, -1, -1]
    strides: [8, 4, 2, 1]
    offset_range_factor: [-1, -1, -1, 1.5]
    no_offs: [False, False, False, False]
    use_dwc_mlps: [True, False, True, True]
    use_lpus: [False, True, True, True]
    use_conv_patches: True
    ksizes: [9, 7, 5, 3]
    nat_ksizes: [7, 7, 7, 5]
    drop_path_rate: 0.6

TRAIN:
  BASE_LR: 2e-05   # a string in YAML
TEST:
  CROP: False
DATA:
  BATCH_SIZE: 24
  IMG_SIZE: 384
SAVE_FREQ: 1
"""
    variant = variant_from_config(write(tmp_path, text, "my.net.yml"))
    assert (variant.name, variant.family, variant.classes, variant.mlp_ratio) == ("my.net", "DAT++", 10, 2)
    assert (variant.image_size, variant.trained_size, variant.resize_size) == ((384, 384), 224, 384)
    assert [stage.blocks for stage in variant.stages] == ["ND", "ND", "ND", "DD"]
    assert [stage.depthwise_mlp for stage in variant.stages] == [True, False, True, True]
    assert [stage.local_perception for stage in variant.stages] == [False, True, True, True]
    assert [stage.neighborhood_size for stage in variant.stages] == [7, 7, 7, 5]
    assert [stage.offset_range_factor for stage in variant.stages] == [-1, -1, -1, 1.5]


@pytest.mark.parametrize("section", [DAT_SECTION, PP_SECTION], ids=["DAT", "DAT+"])
def test_a_network_of_ones_own_runs(section: dict[str, Any], tmp_path: Path) -> None:
    size = section.get("img_size", 224)
    path = write(tmp_path, {"MODEL": {"DAT": section | {"num_classes": 3}}, "DATA": {"IMG_SIZE": size}})
    model = DAT(variant_from_config(path)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "family"),
    [
        ({}, "DAT+"),
        ({"use_lpus": [False] * 4, "use_dwc_mlps": [False] * 4, "use_conv_patches": False}, "DAT+"),
        ({"use_lpus": [False, True, False, False]}, "DAT++"),
        ({"use_dwc_mlps": [True] * 4}, "DAT++"),
        ({"use_conv_patches": True}, "DAT++"),
    ],
)
def test_added_convolutions_make_dat_plus_plus(options: dict[str, Any], family: str, tmp_path: Path) -> None:
    assert variant_from_config(write(tmp_path, {"MODEL": {"DAT": PP_SECTION | options}})).family == family


def test_options_left_out_are_upstreams(tmp_path: Path) -> None:
    section = {option: PP_SECTION[option] for option in ("dims", "dim_stem", "stage_spec", "heads", "depths", "ksizes")}
    section |= {"use_pes": [True] * 4, "groups": [1] * 4, "strides": [1] * 4}
    variant = variant_from_config(write(tmp_path, {"MODEL": {"DAT": section}}))
    assert (variant.trained_size, variant.classes, variant.mlp_ratio) == (224, 1000, 4)
    assert [stage.neighborhood_size for stage in variant.stages] == [3, 3, 3, 3]
    assert [stage.offset_range_factor for stage in variant.stages] == [1, 0, 3, 4]  # stage 1 has no block D


def test_what_a_stage_does_not_use_is_neither_checked_nor_kept(tmp_path: Path) -> None:
    section = DAT_SECTION | {"window_sizes": [4, 4, -7, 0], "offset_range_factor": [-1, 0, 2, 2]}
    stages = variant_from_config(write(tmp_path, {"MODEL": {"DAT": section}, "DATA": {"IMG_SIZE": 64}})).stages
    assert [stage.window_size for stage in stages] == [4, 4, 0, 0]
    assert [stage.offset_groups for stage in stages] == [0, 0, 2, 4]
    assert [stage.offset_kernel_size for stage in stages] == [0, 0, 5, 3]
    assert {stage.neighborhood_size for stage in stages} == {0}


def test_the_first_papers_strides_are_used(tmp_path: Path) -> None:
    section = DAT_SECTION | {"strides": [-1, -1, 2, 1]}
    variant = variant_from_config(write(tmp_path, {"MODEL": {"DAT": section}, "DATA": {"IMG_SIZE": 64}}))
    assert [stage.offset_stride for stage in variant.stages] == [1, 1, 2, 1]
    assert variant.stages[2].sampled_map(*variant.feature_map(2)) == (2, 2)


def test_training_options_and_those_of_other_blocks_are_ignored(tmp_path: Path) -> None:
    plain = variant_from_config(write(tmp_path, {"MODEL": {"DAT": PP_SECTION}}))
    ignored = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 1, "lower_lr_kvs": {"conv_offset": 0.1}}
    ignored |= {"sr_ratios": [8, 4, 2, 1], "heads_q": None, "ns_per_pts": 4, "ksize_qnas": [], "nqs": "x"}
    content = {
        "BASE": [""],
        "MODEL": {"PRETRAINED": "x.pth", "DAT": PP_SECTION | ignored | {"qna_activation": "exp"}},
        "TRAIN": {"EPOCHS": 1, "ANY": 2},
        "AMP": True,
    }
    assert variant_from_config(write(tmp_path, content)) == plain


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"stage_spec": [["L", "S"], ["L"], ["D"], ["X"]]},
            "MODEL.DAT.stage_spec[3] has block 'X' (convolution); this package has L, S, D and N.",
        ),
        (
            {"stage_spec": [["L", "E"], ["L"], ["D"], ["D"]]},
            "MODEL.DAT.stage_spec[0] has block 'E' (slide); this package has L, S, D and N.",
        ),
        (
            {"stage_spec": [["L", "S"], ["P"], ["D"], ["D"]]},
            "MODEL.DAT.stage_spec[1] has block 'P' (pyramid); this package has L, S, D and N.",
        ),
        (
            {"stage_spec": [["L", "S"], ["L"], ["Q"], ["D"]]},
            "MODEL.DAT.stage_spec[2] has block 'Q' (query-and-attend); this package has L, S, D and N.",
        ),
        (
            {"stage_spec": [["LS"], ["L"], ["D"], ["D"]]},
            "MODEL.DAT.stage_spec[0] has block 'LS'; this package has L, S, D and N.",
        ),
        (
            {"stage_spec": ["LS", "L", "D", "D"]},
            "MODEL.DAT.stage_spec is ['LS', 'L', 'D', 'D']; it takes a list of four lists of letters, one a stage.",
        ),
        (
            {"stage_spec": [["L", "S"], ["L"], ["D"]]},
            "MODEL.DAT.stage_spec is [['L', 'S'], ['L'], ['D']]; "
            "it takes a list of four lists of letters, one a stage.",
        ),
        ({"depths": [2, 2, 6, 2]}, "MODEL.DAT.depths is [2, 2, 6, 2]; stage_spec has [2, 1, 1, 1] blocks."),
        ({"depths": None}, "MODEL.DAT.depths is None; it takes a list of four whole numbers, one a stage."),
        (
            {"stage_spec": [["L", "S"], [], ["D"], ["D"]], "depths": [2, 0, 1, 1]},
            "MODEL.DAT.depths is [2, 0, 1, 1]; each stage takes one block or more.",
        ),
        (
            {"stage_spec": [["L", "S"], ["N"], ["D"], ["D"]]},
            "MODEL.DAT has block N but not ksizes, by which configurations of DAT+ and DAT++ are known. "
            "Add ksizes, [9, 7, 5, 3] by upstream's default; for DAT, remove block N.",
        ),
        (
            {"use_lpus": [False] * 4, "nat_ksizes": [7] * 4},
            "MODEL.DAT has nat_ksizes, use_lpus but not ksizes, by which configurations of DAT+ and DAT++ are known. "
            "Add ksizes, [9, 7, 5, 3] by upstream's default; for DAT, remove nat_ksizes, use_lpus.",
        ),
        (
            {"use_conv_patches": True},
            "MODEL.DAT.use_conv_patches is True; without ksizes (the first paper's code) it takes False.",
        ),
        (
            {"use_dwc_mlps": [False, True, False, False]},
            "MODEL.DAT.use_dwc_mlps is [False, True, False, False]; "
            "without ksizes (the first paper's code) it takes False.",
        ),
        (
            {"offset_range_factor": [-1, -1, 2, -1]},
            "MODEL.DAT.offset_range_factor[3] is -1.0; "
            "without ksizes (the first paper's code) a block D takes a number above 0.",
        ),
        (
            {"offset_range_factor": [-1, -1, 0, 2]},
            "MODEL.DAT.offset_range_factor[2] is 0.0; "
            "without ksizes (the first paper's code) a block D takes a number above 0.",
        ),
        (
            {"strides": [-1, -1, 1, 3]},
            "MODEL.DAT.strides[3] is 3; without ksizes (the first paper's code) it takes any but 3, the kernel size.",
        ),
        ({"patch_size": 2}, "MODEL.DAT.patch_size is 2; it takes 4."),
        ({"num_classes": 0}, "MODEL.DAT.num_classes is 0; it takes 1 or more."),
        ({"num_classes": True}, "MODEL.DAT.num_classes is True; it takes a whole number."),
        ({"expansion": 3.5}, "MODEL.DAT.expansion is 3.5; it takes a whole number."),
        ({"expansion": "4"}, "MODEL.DAT.expansion is '4'; it takes a whole number."),
        ({"expansion": 10**6}, "MODEL.DAT.expansion is 1000000; it takes numbers up to 65536."),
        ({"dims": [0, 0, 0, 0]}, "MODEL.DAT.dims[0] is 0; it takes 1 or more."),
        ({"dims": [16, 32, 64]}, "MODEL.DAT.dims is [16, 32, 64]; it takes a list of four whole numbers, one a stage."),
        ({"dims": [16, 32, 48, 96]}, "MODEL.DAT.dims[2] is 48; it takes twice that of the stage before."),
        ({"dim_stem": 32}, "MODEL.DAT.dim_stem is 32; it takes that of stage 0, 16."),
        ({"heads": [1, 2, 5, 8]}, "MODEL.DAT.heads[2] is 5; it takes a divisor of 64 channels."),
        ({"heads": [1, 2, 4, 0]}, "MODEL.DAT.heads[3] is 0; it takes a divisor of 128 channels."),
        (
            {"heads": [1, 2, 4, 8.0]},
            "MODEL.DAT.heads is [1, 2, 4, 8.0]; it takes a list of four whole numbers, one a stage.",
        ),
        ({"groups": [-1, -1, 3, 4]}, "MODEL.DAT.groups[2] is 3; with a block D it takes a divisor of 4 heads."),
        ({"groups": [-1, -1, -1, 4]}, "MODEL.DAT.groups[2] is -1; with a block D it takes a divisor of 4 heads."),
        ({"strides": [-1, -1, 1, -1]}, "MODEL.DAT.strides[3] is -1; with a block D it takes 1 or more."),
        ({"use_pes": [True, True, False, True]}, "MODEL.DAT.use_pes[2] is False; with a block D it takes True."),
        ({"use_pes": True}, "MODEL.DAT.use_pes is True; it takes a list of four, each True or False, one a stage."),
        (
            {"use_pes": [0, 0, 1, 1]},
            "MODEL.DAT.use_pes is [0, 0, 1, 1]; it takes a list of four, each True or False, one a stage.",
        ),
        ({"window_sizes": [1, 4, 7, 7]}, "MODEL.DAT.window_sizes[0] is 1; it takes 2 or more."),
        ({"window_sizes": [4, 0, 7, 7]}, "MODEL.DAT.window_sizes[1] is 0; it takes 1 or more."),
        (
            {"window_sizes": [4, 7, 7, 7]},
            "DATA.IMG_SIZE is 64; this network takes multiples of 224 from 224 on for its windows to tile the maps.",
        ),
        (
            {"img_size": 80},
            "MODEL.DAT.img_size is 80; this network takes multiples of 32 from 32 on for its windows to tile the maps.",
        ),
        (
            {"img_size": 96},
            "DATA.IMG_SIZE is 64 (224 if not set) and MODEL.DAT.img_size 96; without ksizes (the first paper's code) "
            "they are equal. Make them so, and choose another size with `image_size`.",
        ),
        (
            {"dwc_pes": [False, False, True, False]},
            "MODEL.DAT.dwc_pes is [False, False, True, False]; it takes False in all stages.",
        ),
        ({"fixed_pes": [True] * 4}, "MODEL.DAT.fixed_pes is [True, True, True, True]; it takes False in all stages."),
        ({"no_offs": [True] * 4}, "MODEL.DAT.no_offs is [True, True, True, True]; it takes False in all stages."),
        (
            {"use_dwc_mlp": [False] * 4},
            "MODEL.DAT has 'use_dwc_mlp', which is no option of upstream's. "
            "Did you mean use_dwc_mlps or use_lpus? Mend or remove it.",
        ),
        ({"zzz": 1}, "MODEL.DAT has 'zzz', which is no option of upstream's. Mend or remove it."),
        ({7: 1}, "MODEL.DAT has 7, which is no option of upstream's. Mend or remove it."),
        ({"\x1b[31m": 1}, "MODEL.DAT has '\\x1b[31m', which is no option of upstream's. Mend or remove it."),
    ],
)
def test_what_the_first_papers_networks_cannot_have_is_refused(
    options: dict[Any, Any], sentence: str, tmp_path: Path
) -> None:
    content = {"MODEL": {"DAT": DAT_SECTION | options}, "DATA": {"IMG_SIZE": 64}}
    assert refusal(write(tmp_path, content)) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"nat_ksizes": [7, 6, 7, 7]}, "MODEL.DAT.nat_ksizes[1] is 6; it takes an odd number from 3 to 13."),
        ({"nat_ksizes": [7, 1, 7, 7]}, "MODEL.DAT.nat_ksizes[1] is 1; it takes an odd number from 3 to 13."),
        ({"nat_ksizes": [15, 7, 7, 7]}, "MODEL.DAT.nat_ksizes[0] is 15; it takes an odd number from 3 to 13."),
        ({"ksizes": [9, 7, 1, 3]}, "MODEL.DAT.ksizes[2] is 1; with a block D it takes 2 or more."),
        ({"ksizes": 9}, "MODEL.DAT.ksizes is 9; it takes a list of four whole numbers, one a stage."),
        ({"log_cpb": [True] * 4}, "MODEL.DAT.log_cpb is [True, True, True, True]; it takes False in all stages."),
        (
            {"layer_scale_values": [-1, 0, 1e-5, -1]},
            "MODEL.DAT.layer_scale_values is [-1.0, 0.0, 1e-05, -1.0]; layer scale is off at 0 or less only.",
        ),
        (
            {"offset_range_factor": [1, 2, float("nan"), 4]},
            "MODEL.DAT.offset_range_factor is [1, 2, nan, 4]; it takes numbers up to 65536.",
        ),
        (
            {"offset_range_factor": [1, 2, 10**400, 4]},
            "MODEL.DAT.offset_range_factor is [1, 2, 100000000000000000...0000000000000000000, 4]; "
            "it takes a list of four numbers, one a stage.",
        ),
        (
            {"offset_range_factor": [1, 2, "x", 4]},
            "MODEL.DAT.offset_range_factor is [1, 2, 'x', 4]; it takes a list of four numbers, one a stage.",
        ),
        ({"use_conv_patches": "yes"}, "MODEL.DAT.use_conv_patches is 'yes'; it takes True or False."),
        ({"strides": [60, 4, 2, 1]}, "DATA.IMG_SIZE is 224; this network takes multiples of 32 from 256 on."),
        ({"img_size": 230}, "MODEL.DAT.img_size is 230; this network takes multiples of 32 from 64 on."),
        ({"img_size": 32}, "MODEL.DAT.img_size is 32; this network takes multiples of 32 from 64 on."),
    ],
)
def test_what_dat_plus_networks_cannot_have_is_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, {"MODEL": {"DAT": PP_SECTION | options}})) == sentence


@pytest.mark.parametrize(
    ("left_out", "sentence"),
    [
        ("dims", "MODEL.DAT lacks dims; dims, stage_spec and heads must be set."),
        ("heads", "MODEL.DAT lacks heads; dims, stage_spec and heads must be set."),
        ("stage_spec", "MODEL.DAT lacks stage_spec; dims, stage_spec and heads must be set."),
        ("depths", "MODEL.DAT.depths is [2, 2, 6, 2] (upstream's default); stage_spec has [2, 1, 1, 1] blocks."),
        ("dim_stem", "MODEL.DAT.dim_stem is 96 (upstream's default); it takes that of stage 0, 16."),
        ("use_pes", "MODEL.DAT.use_pes[0] is False (upstream's default); with a block D it takes True."),
        ("strides", "MODEL.DAT.strides[0] is -1 (upstream's default); with a block D it takes 1 or more."),
        ("groups", "MODEL.DAT.groups[0] is -1 (upstream's default); with a block D it takes a divisor of 1 heads."),
        (
            "ksizes",
            "MODEL.DAT has block N but not ksizes, by which configurations of DAT+ and DAT++ are known. "
            "Add ksizes, [9, 7, 5, 3] by upstream's default; for DAT, remove block N.",
        ),
    ],
)
def test_what_must_be_set_is_named(left_out: str, sentence: str, tmp_path: Path) -> None:
    section = {option: value for option, value in PP_SECTION.items() if option != left_out}
    assert refusal(write(tmp_path, {"MODEL": {"DAT": section}})) == sentence


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"BASE": ["dat_tiny.yaml"]},
            "BASE is ['dat_tiny.yaml']; only files without one are read. Merge the two into one file.",
        ),
        ({"BASE": 3}, "BASE is 3; only files without one are read. Merge the two into one file."),
        ({"MODEL": None}, "MODEL is None; it takes a mapping."),
        ({"MODEL": {"DAT": [1, 2]}}, "MODEL.DAT is [1, 2]; it takes a mapping."),
        (
            {"MODEL": {"TYPE": "dat"}},
            "it has no section MODEL.DAT; take an official configuration of LeapLabTHU/DAT as a model.",
        ),
        ({"MODEL": {"TYPE": "swin", "DAT": PP_SECTION}}, "MODEL.TYPE is 'swin'; it takes dat."),
        ({"DATA": {"IMG_SIZE": "224"}}, "DATA.IMG_SIZE is '224'; it takes a whole number from 1 to 65536."),
        ({"DATA": {"IMG_SIZE": 10**9}}, "DATA.IMG_SIZE is 1000000000; it takes a whole number from 1 to 65536."),
        ({"DATA": {"IMG_SIZE": 225}}, "DATA.IMG_SIZE is 225; this network takes multiples of 32 from 64 on."),
        (
            {"DATA": {"IMAGE_SIZE": 384}},
            "DATA has 'IMAGE_SIZE', which is no option of upstream's. "
            "Did you mean IMG_SIZE or BATCH_SIZE? Mend or remove it.",
        ),
        ({"TEST": {"CROP": "no"}}, "TEST.CROP is 'no'; it takes True or False."),
        ({"TEST": 1}, "TEST is 1; it takes a mapping."),
        (
            {"TETS": {"CROP": False}},
            "the top level has 'TETS', which is no option of upstream's. Did you mean TEST? Mend or remove it.",
        ),
    ],
)
def test_the_other_sections_are_checked(sections: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, {"MODEL": {"DAT": PP_SECTION}} | sections)) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the top level is None; it takes a mapping."),
        ("- 1\n- 2\n", "the top level is [1, 2]; it takes a mapping."),
        ("{}", "it has no section MODEL.DAT; take an official configuration of LeapLabTHU/DAT as a model."),
        (
            "a: [1, 2",
            "it is not YAML, line 1: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'.",
        ),
        (
            "AMP: 1\n\tTAG: 2\n",
            "it is not YAML, line 2: "
            "while scanning for the next token, found character '\\t' that cannot start any token.",
        ),
        ("AMP: \0", "it is not YAML: special characters are not allowed."),
        (
            "AMP: 1\n---\nAMP: 2\n",
            "it is not YAML, line 2: expected a single document in the stream, but found another document.",
        ),
        ("[1]: 2", "it is not YAML, line 1: while constructing a mapping, found unhashable key."),
        ("AMP: 2024-13-45", "it is not YAML: month must be in 1..12."),
        ("AMP: 0x_", "it is not YAML: invalid literal for int() with base 16: ''."),
        ("AMP: " + "9:" * 450 + "9.0", "it is not YAML: int too large to convert to float."),
        ("AMP: " + "9" * 5000, "line 1 has a value of more than 1000 characters."),
        (
            "AMP: 1\nTAG: !!python/object/apply:os.system [id]\n",
            "line 2 has an anchor, alias or tag; official configurations have none. Write the value itself.",
        ),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\n",
            "line 1 has an anchor, alias or tag; official configurations have none. Write the value itself.",
        ),
        ("a: *a", "line 1 has an anchor, alias or tag; official configurations have none. Write the value itself."),
        ("[" * 60000, "it has lists or mappings more than 16 deep; official ones are 5 deep."),
        ("- " * 30000, "it has lists or mappings more than 16 deep; official ones are 5 deep."),
    ],
    ids=range(17),
)
def test_a_broken_or_hostile_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, text)) == sentence


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"AMP: \xff\n")
    assert refusal(path) == "it is not YAML: invalid start byte."


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = write(tmp_path, "#" * (SIZE_LIMIT_BYTES + 1))
    assert refusal(path) == f"{path} has more than 65536 bytes; an official configuration has about 1300."


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    missing, pipe = tmp_path / "missing.yaml", tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    assert refusal(missing) == f"cannot read {missing}: No such file or directory."
    assert refusal(tmp_path) == f"{tmp_path} is a folder; name the configuration file in it."
    assert refusal(pipe) == f"{pipe} is not a regular file."


def test_find_network_takes_a_name_a_file_or_a_variant(tmp_path: Path) -> None:
    path = write(tmp_path, released("pp-tiny"), "own.yml")
    assert find_network("tiny") is VARIANTS["tiny"]
    assert find_network(VARIANTS["tiny"]) is VARIANTS["tiny"]
    assert find_network(str(path)) == without_figures(VARIANTS["pp-tiny"], "own")
    with pytest.raises(VariantError, match=r"no variant 'tinny'\. Did you mean tiny"):
        find_network("tinny")


def test_find_network_resizes_and_makes_backbones_of_files_too(tmp_path: Path) -> None:
    path = write(tmp_path, released("pp-tiny"))
    variant = find_network(str(path), image_size=(448, 224), features=[2, 3])
    assert (variant.image_size, variant.resize_size, variant.features) == ((448, 224), 512, (2, 3))
    with pytest.raises(ShapeError, match=r"image size 225x224 does not fit variant 'mine'"):
        find_network(str(path), image_size=(225, 224))
    with pytest.raises(VariantError, match=r"features 4 are not stages of 'mine'"):
        find_network(str(path), features=[4])


def test_find_network_refuses_an_image_that_leaves_too_few_points(tmp_path: Path) -> None:
    path = write(tmp_path, {"MODEL": {"DAT": PP_SECTION | {"strides": [16, 4, 2, 1]}}})
    assert find_network(str(path), image_size=(96, 96)).image_size == (96, 96)
    with pytest.raises(ShapeError) as caught:
        find_network(str(path), image_size=(64, 96))
    assert str(caught.value) == (
        "image size 64x96 does not fit variant 'mine': its sides are multiples of 32 px, from 96 px on. "
        "Nearest that work: 96x96."
    )
