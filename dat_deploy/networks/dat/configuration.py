"""The network of an official configuration file.

The options of such a file, their defaults and what they do are upstream's (LeapLabTHU/DAT, `config.py` and
`models/dat.py`): commit 7edbb9b for the first paper, 32173fc for DAT+ and DAT++. A stranger may have made the file, so
it is read as plain YAML: no tags, anchors or aliases, and nothing so large or deep that reading it takes long. Whatever
this package would compute otherwise than upstream is refused; what matters in training only is ignored.
"""

import difflib
import reprlib
import typing
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dat_deploy.errors import VariantError
from dat_deploy.files import open_input
from dat_deploy.networks.dat.variants import LARGEST, PATCH_SIZE, StageConfig, Variant
from dat_deploy.typed_json import typed

__all__ = ["variant_from_config"]

SIZE_LIMIT_BYTES = 2**16  # the official files have 1.3 kB; so many brackets and commas take a second
DEPTH_LIMIT = 16  # lists and mappings in each other; stage_spec has five
SCALAR_LIMIT = 1000  # characters; a number of more could not be shown

BLOCKS = {"L", "S", "D", "N"}
OTHER_BLOCKS = {"X": " (convolution)", "E": " (slide)", "P": " (pyramid)", "Q": " (query-and-attend)"}  # upstream's

# fmt: off
TOP_LEVEL = {
    "BASE", "DATA", "MODEL", "TRAIN", "AUG", "TEST", "AMP", "OUTPUT", "TAG", "SAVE_FREQ", "PRINT_FREQ", "SEED",
    "EVAL_MODE", "THROUGHPUT_MODE", "LOCAL_RANK",
}
MODEL = {
    "TYPE", "NAME", "RESUME", "NUM_CLASSES", "DROP_RATE", "DROP_PATH_RATE", "LABEL_SMOOTHING", "PRETRAINED", "DAT",
}
DATA = {"BATCH_SIZE", "DATA_PATH", "DATASET", "IMG_SIZE", "INTERPOLATION", "PIN_MEMORY", "NUM_WORKERS"}
TEST = {"CROP"}
# Of MODEL.DAT: only for training, or for blocks of other letters.
IGNORED = {
    "drop_rate", "attn_drop_rate", "drop_path_rate", "lower_lr_kvs", "sr_ratios", "ns_per_pts", "heads_q",
    "ksize_qnas", "nqs", "qna_activation",
}
# Of MODEL.DAT: what the first paper's code does not know, beside `ksizes`, which decides whose code a file is for.
LATER = (
    "nat_ksizes", "use_lpus", "log_cpb", "layer_scale_values", "lower_lr_kvs", "heads_q", "ksize_qnas", "nqs",
    "qna_activation",
)
# fmt: on

Integers = tuple[int, int, int, int]
Numbers = tuple[float, float, float, float]
Flags = tuple[bool, bool, bool, bool]
Letters = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
KINDS = {
    int: "a whole number",
    bool: "True or False",
    Integers: "a list of four whole numbers, one a stage",
    Numbers: "a list of four numbers, one a stage",
    Flags: "a list of four, each True or False, one a stage",
    Letters: "a list of four lists of letters, one a stage",
}


@dataclass(frozen=True)
class Options:
    """What of the section MODEL.DAT makes a network, with upstream's defaults; `given`: those the file sets."""

    given: frozenset[str]
    dims: Integers
    stage_spec: Letters
    heads: Integers
    depths: Integers = (2, 2, 6, 2)
    img_size: int = 224
    patch_size: int = PATCH_SIZE
    num_classes: int = 1000
    expansion: int = 4
    dim_stem: int = 96
    window_sizes: Integers = (7, 7, 7, 7)
    nat_ksizes: Integers = (3, 3, 3, 3)
    groups: Integers = (-1, -1, 3, 6)
    ksizes: Integers = (9, 7, 5, 3)
    strides: Integers = (-1, -1, -1, -1)
    offset_range_factor: Numbers = (1.0, 2.0, 3.0, 4.0)
    use_pes: Flags = (False, False, False, False)
    dwc_pes: Flags = (False, False, False, False)
    fixed_pes: Flags = (False, False, False, False)
    log_cpb: Flags = (False, False, False, False)
    no_offs: Flags = (False, False, False, False)
    layer_scale_values: Numbers = (-1.0, -1.0, -1.0, -1.0)
    use_dwc_mlps: Flags = (False, False, False, False)
    use_lpus: Flags = (False, False, False, False)
    use_conv_patches: bool = False

    @property
    def first_paper(self) -> bool:
        return "ksizes" not in self.given

    def require(self, holds: bool, option: str, accepted: str, stage: int | None = None) -> None:
        """Refuses the option's value, or that for one stage, unless the condition holds."""
        if not holds:
            raise self.refusal(option, accepted, stage)

    def refusal(self, option: str, accepted: str, stage: int | None = None) -> VariantError:
        value = getattr(self, option)
        place = f"MODEL.DAT.{option}" if stage is None else f"MODEL.DAT.{option}[{stage}]"
        default = "" if option in self.given else " (upstream's default)"
        return VariantError(f"{place} is {_shown(value if stage is None else value[stage])}{default}; {accepted}.")


def variant_from_config(path: Path) -> Variant:
    """The network of an official YAML file (section MODEL.DAT), named after the file.

    Raises:
        VariantError: if the file cannot be read, or describes a network that this package does not have.
    """
    data = _read(path)
    try:
        return _variant(path.stem, _plain_yaml(data))
    except VariantError as error:
        raise VariantError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    with open_input(path, VariantError, "configuration file") as file:
        data = file.read(SIZE_LIMIT_BYTES + 1)
    if len(data) > SIZE_LIMIT_BYTES:
        raise VariantError(f"{path} has more than {SIZE_LIMIT_BYTES} bytes; an official configuration has about 1300.")
    return data


def _plain_yaml(data: bytes) -> Any:
    """The content, built only after its events proved small: an alias repeats what it names, tags make objects."""
    try:
        depth = 0
        for event in yaml.parse(data, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH_LIMIT:
                raise VariantError(f"it has lists or mappings more than {DEPTH_LIMIT} deep; official ones are 5 deep.")
            if isinstance(event, yaml.NodeEvent) and (event.anchor or getattr(event, "tag", None)):
                raise VariantError(
                    f"{_line(event.start_mark)} has an anchor, alias or tag; "
                    f"official configurations have none. Write the value itself."
                )
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > SCALAR_LIMIT:
                raise VariantError(f"{_line(event.start_mark)} has a value of more than {SCALAR_LIMIT} characters.")
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two from numbers and dates
        line, problem = "", str(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            line = f", {_line(error.problem_mark)}"
            problem = ", ".join(part for part in (error.context, error.problem) if part)
        elif isinstance(error, yaml.reader.ReaderError):
            problem = error.reason
        raise VariantError(f"it is not YAML{line}: {problem[:120]}.") from error


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"


def _variant(name: str, content: Any) -> Variant:
    top = _section(content, "the top level", TOP_LEVEL)
    base = top.get("BASE")
    if base not in (None, "", [], [""]):
        raise VariantError(f"BASE is {_shown(base)}; only files without one are read. Merge the two into one file.")
    model = _section(top.get("MODEL", {}), "MODEL", MODEL)
    if "DAT" not in model:
        raise VariantError("it has no section MODEL.DAT; take an official configuration of LeapLabTHU/DAT as a model.")
    if model.get("TYPE", "dat") != "dat":
        raise VariantError(f"MODEL.TYPE is {_shown(model['TYPE'])}; it takes dat.")
    options = _options(model["DAT"])
    size = _section(top.get("DATA", {}), "DATA", DATA).get("IMG_SIZE", 224)
    crop = _section(top.get("TEST", {}), "TEST", TEST).get("CROP", True)
    if type(crop) is not bool:
        raise VariantError(f"TEST.CROP is {_shown(crop)}; it takes {KINDS[bool]}.")
    if type(size) is not int or not 0 < size <= LARGEST:
        raise VariantError(f"DATA.IMG_SIZE is {_shown(size)}; it takes a whole number from 1 to {LARGEST}.")

    _check_network(options)
    convolutions = options.use_conv_patches or any(options.use_lpus) or any(options.use_dwc_mlps)
    variant = Variant(
        name=name,
        family="DAT" if options.first_paper else "DAT++" if convolutions else "DAT+",
        image_size=(size, size),
        trained_size=options.img_size,
        resize_size=int(256 / 224 * size) if crop else size,
        stages=tuple(_stage(options, i) for i in range(4)),
        classes=options.num_classes,
        mlp_ratio=options.expansion,
        overlapping_patches=options.use_conv_patches,
    )
    _check_sizes(variant, options)
    return variant


def _section(section: Any, place: str, names: Collection[str]) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise VariantError(f"{place} is {_shown(section)}; it takes a mapping.")
    for key in section:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=3)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise VariantError(f"{place} has {_shown(key)}, which is no option of upstream's. {hint}Mend or remove it.")
    return section


def _options(section: Any) -> Options:
    kinds = {field.name: typing.get_type_hints(Options)[field.name] for field in fields(Options)[1:]}
    entries = _section(section, "MODEL.DAT", kinds.keys() | IGNORED)
    missing = [option for option in ("dims", "stage_spec", "heads") if option not in entries]
    if missing:
        raise VariantError(f"MODEL.DAT lacks {', '.join(missing)}; dims, stage_spec and heads must be set.")
    values = {}
    for option, kind in kinds.items():
        if option not in entries:
            continue
        try:
            values[option] = typed(kind, entries[option], option)
        except (ValueError, OverflowError):
            raise VariantError(f"MODEL.DAT.{option} is {_shown(entries[option])}; it takes {KINDS[kind]}.") from None
        numbers = [values[option]] if kind is int else values[option] if kind in (Integers, Numbers) else []
        if not all(abs(number) <= LARGEST for number in numbers):  # nor NaN
            raise VariantError(f"MODEL.DAT.{option} is {_shown(entries[option])}; it takes numbers up to {LARGEST}.")
    return Options(given=frozenset(entries), **values)


def _check_network(options: Options) -> None:
    """What concerns all stages."""
    for i, letters in enumerate(options.stage_spec):
        for letter in letters:
            if letter not in BLOCKS:
                raise VariantError(
                    f"MODEL.DAT.stage_spec[{i}] has block {_shown(letter)}{OTHER_BLOCKS.get(letter, '')}; "
                    f"this package has L, S, D and N."
                )
    depths = tuple(map(len, options.stage_spec))
    options.require(options.depths == depths, "depths", f"stage_spec has {list(depths)} blocks")
    options.require(all(depths), "depths", "each stage takes one block or more")
    if options.first_paper:
        later = [option for option in LATER if option in options.given]
        later += ["block N"] if any("N" in letters for letters in options.stage_spec) else []
        if later:
            names = ", ".join(later)
            raise VariantError(
                f"MODEL.DAT has {names} but not ksizes, by which configurations of DAT+ and DAT++ are known. "
                f"Add ksizes, {list(options.ksizes)} by upstream's default; for DAT, remove {names}."
            )
        for option in ("use_conv_patches", "use_dwc_mlps"):
            holds = getattr(options, option) in (False, (False,) * 4)
            options.require(holds, option, "without ksizes (the first paper's code) it takes False")
    options.require(options.patch_size == PATCH_SIZE, "patch_size", f"it takes {PATCH_SIZE}")
    for option in ("num_classes", "expansion"):
        options.require(getattr(options, option) >= 1, option, "it takes 1 or more")
    options.require(options.dims[0] >= 1, "dims", "it takes 1 or more", 0)
    options.require(options.dim_stem == options.dims[0], "dim_stem", f"it takes that of stage 0, {options.dims[0]}")
    for i in range(1, 4):
        options.require(
            options.dims[i] == 2 * options.dims[i - 1], "dims", "it takes twice that of the stage before", i
        )
    for option in ("dwc_pes", "fixed_pes", "log_cpb", "no_offs"):
        options.require(not any(getattr(options, option)), option, "it takes False in all stages")
    options.require(max(options.layer_scale_values) <= 0, "layer_scale_values", "layer scale is off at 0 or less only")


def _stage(options: Options, i: int) -> StageConfig:
    blocks = "".join(options.stage_spec[i])
    channels, heads = options.dims[i], options.heads[i]
    options.require(heads >= 1 and channels % heads == 0, "heads", f"it takes a divisor of {channels} channels", i)
    sizes: dict[str, Any] = {}
    if "L" in blocks or "S" in blocks:
        least = 2 if "S" in blocks else 1
        options.require(options.window_sizes[i] >= least, "window_sizes", f"it takes {least} or more", i)
        sizes["window_size"] = options.window_sizes[i]
    if any("N" in letters for letters in options.stage_spec):  # the released rows name it in every stage, too
        kernel = options.nat_ksizes[i]
        options.require(kernel in range(3, 14, 2), "nat_ksizes", "it takes an odd number from 3 to 13", i)
        sizes["neighborhood_size"] = kernel
    if "D" in blocks:
        sizes |= _offsets(options, i)
    return StageConfig(
        channels=channels,
        blocks=blocks,
        heads=heads,
        local_perception=options.use_lpus[i],
        depthwise_mlp=options.use_dwc_mlps[i],
        **sizes,
    )


def _offsets(options: Options, i: int) -> dict[str, Any]:
    """The fields of a stage with deformable blocks."""
    groups, kernel, stride = options.groups[i], options.ksizes[i], options.strides[i]
    heads, factor = options.heads[i], options.offset_range_factor[i]
    options.require(options.use_pes[i], "use_pes", "with a block D it takes True", i)
    options.require(
        groups >= 1 and heads % groups == 0, "groups", f"with a block D it takes a divisor of {heads} heads", i
    )
    # `checkpoint.py` takes every 1×1 convolution for a Linear.
    options.require(kernel >= 2, "ksizes", "with a block D it takes 2 or more", i)
    options.require(stride >= 1, "strides", "with a block D it takes 1 or more", i)
    if options.first_paper:
        # There, a kernel as wide as its stride was still padded, 0 left offsets unbounded, and tanh squashed the sum.
        first = "without ksizes (the first paper's code)"
        options.require(stride != kernel, "strides", f"{first} it takes any but {kernel}, the kernel size", i)
        options.require(factor > 0, "offset_range_factor", f"{first} a block D takes a number above 0", i)
    return {
        "offset_groups": groups,
        "offset_kernel_size": kernel,
        "offset_stride": stride,
        "offset_range_factor": factor,
    }


def _check_sizes(variant: Variant, options: Options) -> None:
    size, step = variant.image_size[0], variant.side_multiple
    windows = " for its windows to tile the maps" if variant.has_windows else ""
    for place, side in (("DATA.IMG_SIZE", size), ("MODEL.DAT.img_size", variant.trained_size)):
        if side % step or side < variant.min_side:
            raise VariantError(
                f"{place} is {side}; this network takes multiples of {step} from {variant.min_side} on{windows}."
            )
    has_shifts = any("S" in stage.blocks for stage in variant.stages)
    if has_shifts and not options.first_paper and size != variant.trained_size:
        raise VariantError(
            f"DATA.IMG_SIZE is {size} (224 if not set) and MODEL.DAT.img_size {variant.trained_size}; with a block S "
            f"they are equal, since upstream masks shifted windows for the latter alone."
        )
    if options.first_paper and size != variant.trained_size:
        raise VariantError(
            f"DATA.IMG_SIZE is {size} (224 if not set) and MODEL.DAT.img_size {variant.trained_size}; without ksizes "
            f"(the first paper's code) they are equal. Make them so, and choose another size with `image_size`."
        )


def _shown(value: Any) -> str:
    """On one line and not endless."""
    return reprlib.repr(list(value) if isinstance(value, tuple) else value)
