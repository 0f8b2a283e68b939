"""The tester tested: known faults are put into a sound file one at a time, and validate has to catch each."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from dat_deploy.export.records import OperatorRecord, operator_records
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.family import Family, Network, family_of
from dat_deploy.networks.sampling import SampledBlock
from dat_deploy.runners import Outputs, Runner, engine_path, engine_with_path, open_runner
from dat_deploy.runners.base import Graph, Images
from dat_deploy.validate import ValidationReport, validate
from dat_deploy.validate.defaults import SELF_TEST_BATCHES
from dat_deploy.validate.reference import Reference

__all__ = ["FAULTS", "Fault", "Misbehaving", "faulty_report", "lacks"]


_SAMPLING = "deformable blocks"


@dataclass(frozen=True)
class Fault:
    """One known fault.

    Attributes:
        story: how it comes about.
        change: puts it into a file; or
        misbehave: the answer of a runtime that has it, from the images and the right answer.
        needs: what the file must have for it, one of those that `lacks` knows.
    """

    name: str
    story: str
    change: Callable[[ir.Model], None] | None = None
    misbehave: Callable[[Images, Outputs], Outputs] | None = None
    needs: str | None = None


def lacks(engine: str) -> list[str]:
    """What faults need and an exported file does not have."""
    model = ir.load(str(engine_path(engine)))
    has = {
        _SAMPLING: any(r.operator == "deformable_attention" for r in operator_records(model.metadata_props)),
        "bias tables": bool(_bias_tables(model)),
        "LayerNormalization": bool(_layer_norms(model)),
        "half precision in PyTorch": type(family_of(_network(model))).rounded is not Family.rounded,
    }
    return [name for name, is_there in has.items() if not is_there]


def faulty_report(
    fault: Fault, engine: str, folder: Path, reference: Reference, *, skip: Sequence[str] = ()
) -> ValidationReport:
    """What validate says of an exported file with the fault, less the kinds of checks in `skip`."""
    if fault.change is not None:
        model = ir.load(str(engine_path(engine)))
        fault.change(model)
        path = folder / "faulty.onnx"
        ir.save(model, path)
        engine = engine_with_path(engine, path)
    with open_runner(engine) as runner:
        tested = runner if fault.misbehave is None else Misbehaving(runner, fault.misbehave)
        return validate(tested, batches=SELF_TEST_BATCHES, skip=skip, reference=reference)


class Misbehaving(Runner):
    """A runtime with a fault of its own."""

    def __init__(self, inner: Runner, misbehave: Callable[[Images, Outputs], Outputs]) -> None:
        self._inner, self._misbehave = inner, misbehave
        self.description = inner.description

    def _run(self, images_nchw: Images) -> Outputs:
        right = {name: values.copy() for name, values in self._inner.outputs(images_nchw).items()}
        return self._misbehave(images_nchw, right)

    @property
    def takes_graphs(self) -> bool:
        return self._inner.takes_graphs

    def open_graph(self, onnx_model: bytes) -> Graph:
        return self._inner.open_graph(onnx_model)

    def close(self) -> None:
        self._inner.close()


# --- in the file ---


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def _record(model: ir.Model, operator: str) -> OperatorRecord:
    """The operator's first place."""
    return next(record for record in operator_records(model.metadata_props) if record.operator == operator)


def _apply(
    model: ir.Model, value: ir.Value, op_type: str, *others: ArrayLike, takes_name: bool, **attributes: int
) -> None:
    """Let everything that reads `value` read `op_type(value, *others)` instead.

    Args:
        takes_name: whether the result gets the name of `value`, as if it had been computed so.
    """
    name = f"fault_{len(model.graph)}/{value.name}/{op_type}"
    constants = []
    for index, other in enumerate(others):
        array = np.asarray(other)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
        constant = ir.Value(name=f"{name}/{index}", const_value=ir.tensor(array))
        model.graph.register_initializer(constant)
        constants.append(constant)
    node = ir.node(op_type, [value, *constants], attributes, name=name)
    (result,) = node.outputs
    result.type = ir.TensorType(ir.DataType(attributes["to"])) if op_type == "Cast" else value.type
    result.shape = value.shape
    for user, index in list(value.uses()):
        if user is not node:
            user.replace_input_with(index, result)
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    result.name = name
    if takes_name:
        value.name, result.name = result.name, value.name
    for index, output in enumerate(model.graph.outputs):
        if output is value:
            model.graph.outputs[index] = result


def _network(model: ir.Model) -> Network:
    return FileMetadata.from_properties(dict(model.metadata_props), Path("file")).network


def _block(model: ir.Model, record: OperatorRecord) -> SampledBlock:
    return next(block for block in _network(model).sampled_blocks if record.name.startswith(f"{block.name}/"))


def _locations(model: ir.Model) -> tuple[ir.Value, SampledBlock]:
    """Sampling locations of the first block, and that block."""
    record = _record(model, "deformable_sample")
    return _values(model)[record.inputs["sampling_locations"]], _block(model, record)


def _swap_x_and_y(model: ir.Model) -> None:
    _apply(model, _locations(model)[0], "Gather", [1, 0], takes_name=True, axis=-1)


def _flip_align_corners(model: ir.Model) -> None:
    # with corners aligned -1 is the first pixel's centre, without them its edge: the same as a scale of size / size - 1
    locations, block = _locations(model)
    _apply(model, locations, "Mul", [side / (side - 1) for side in block.feature_map], takes_name=False)


def _scale_offsets(model: ir.Model) -> None:
    locations, block = _locations(model)
    centres = block.reference_points()
    _apply(model, locations, "Sub", centres, takes_name=True)
    scaled_locations = _locations(model)[0]
    _apply(model, scaled_locations, "Mul", [1.1, 1.1], takes_name=True)
    _apply(model, _locations(model)[0], "Add", centres, takes_name=True)


def _shift_by_half_a_pixel(model: ir.Model) -> None:
    locations, block = _locations(model)
    _apply(model, locations, "Add", [1 / (side - 1) for side in block.feature_map], takes_name=True)


def _round_locations(model: ir.Model) -> None:
    locations, _ = _locations(model)
    _apply(model, locations, "Cast", takes_name=True, to=ir.DataType.FLOAT16)
    _apply(model, _locations(model)[0], "Cast", takes_name=True, to=ir.DataType.FLOAT)


def _transpose_heads(model: ir.Model) -> None:
    record = _record(model, "deformable_attention")
    channels, heads = _block(model, record).channels, record.attributes["num_heads"]
    order = np.arange(channels).reshape(heads, channels // heads).T.ravel()
    _apply(model, _values(model)[record.output], "Gather", order, takes_name=False, axis=-1)


def _reverse_channels(model: ir.Model) -> None:
    _apply(model, model.graph.inputs[0], "Gather", [2, 1, 0], takes_name=False, axis=1)


def _reverse_classes(model: ir.Model) -> None:
    logits = model.graph.outputs[0]
    classes = len(_network(model).answer.class_names)
    _apply(model, logits, "Gather", np.arange(classes)[::-1], takes_name=True, axis=1)


def _change_epsilon(model: ir.Model) -> None:
    for node in _layer_norms(model):
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def _layer_norms(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "LayerNormalization"]


def _forget_bias_table(model: ir.Model) -> None:
    _set_weight(_bias_tables(model)[0], 0.0, 0)


def _bias_tables(model: ir.Model) -> list[ir.Value]:
    return [value for name, value in model.graph.initializers.items() if "attns" in name and "bias_table" in name]


def _truncate_weights(model: ir.Model) -> None:
    largest = _largest_weight(model)
    assert largest.const_value is not None
    _set_weight(largest, 0.0, largest.const_value.size // 2)


def _alter_weights(model: ir.Model) -> None:
    """Of one layer, whatever the precision: every sign."""
    weight = _largest_weight(model)
    assert weight.const_value is not None
    weight.const_value = ir.tensor(-weight.const_value.numpy(), name=weight.name)


def _alter_a_weight(model: ir.Model) -> None:
    """By a tenth of the largest, of which nothing may show in the answers."""
    weight = _largest_weight(model)
    assert weight.const_value is not None
    values = weight.const_value.numpy().copy()
    values.reshape(-1)[0] += np.abs(values).max() / 10
    weight.const_value = ir.tensor(values, name=weight.name)


def _largest_weight(model: ir.Model) -> ir.Value:
    return max(model.graph.initializers.values(), key=lambda v: 0 if v.const_value is None else v.const_value.size)


def _set_weight(weight: ir.Value, number: float, first: int) -> None:
    """Every element from the `first` on."""
    assert weight.const_value is not None
    values = weight.const_value.numpy().copy()
    values.reshape(-1)[first:] = number
    weight.const_value = ir.tensor(values, name=weight.name)


def _set_metadata(model: ir.Model, field: str, value: object) -> None:
    model.metadata_props[f"dat_deploy.{field}"] = json.dumps(value)


def _normalise_to_one(model: ir.Model) -> None:
    own = FileMetadata.from_properties(dict(model.metadata_props), Path("file")).preprocessing
    preprocessing = dataclasses.replace(own, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    _set_metadata(model, "preprocessing", dataclasses.asdict(preprocessing))


def _crop_less(model: ir.Model) -> None:
    own = FileMetadata.from_properties(dict(model.metadata_props), Path("file")).preprocessing
    resize = own.image_size if own.resize_size != own.image_size else tuple(side + 8 for side in own.image_size)
    _set_metadata(model, "preprocessing", {**dataclasses.asdict(own), "resize_size": resize})


# --- in the runtime ---


def _last_slot_wrong(images: Images, right: Outputs) -> Outputs:
    if len(images) > 1:
        for values in right.values():
            values[-1] = values[-2]
    return right


def _answers_moved(_: Images, right: Outputs) -> Outputs:
    return {name: np.roll(values, 1, axis=0) for name, values in right.items()}


def _leaks_between_images(images: Images, right: Outputs) -> Outputs:
    if len(images) > 1:
        for values in right.values():
            values += 1e-3 * (values.mean(axis=0, keepdims=True) - values)
    return right


def _nan_where_bright(images: Images, right: Outputs) -> Outputs:
    for values in right.values():
        values[images.mean(axis=(1, 2, 3)) > 5] = np.nan
    return right


def _differs_by_run() -> Callable[[Images, Outputs], Outputs]:
    runs = [0]

    def misbehave(_: Images, right: Outputs) -> Outputs:
        runs[0] += 1
        return {name: values + np.float32(1e-6) * (runs[0] % 3) for name, values in right.items()}

    return misbehave


FAULTS = (
    Fault("x and y swapped", "locations are (y, x), GridSample takes (x, y)", _swap_x_and_y, needs=_SAMPLING),
    Fault(
        "align_corners flipped",
        "the sampling operator was rebuilt with its default",
        _flip_align_corners,
        needs=_SAMPLING,
    ),
    Fault(
        "offsets scaled",
        "offsets 1.1 times as large: a range factor by another formula",
        _scale_offsets,
        needs=_SAMPLING,
    ),
    Fault(
        "half-pixel shift",
        "reference points at corners instead of centres",
        _shift_by_half_a_pixel,
        needs=_SAMPLING,
    ),
    Fault("locations in float16", "the coordinate path was rounded, too", _round_locations, needs=_SAMPLING),
    Fault("heads transposed", "channels read as [D, M] instead of [M, D]", _transpose_heads, needs=_SAMPLING),
    Fault("BGR", "the picture's channels in the order of OpenCV", _reverse_channels),
    Fault("wrong mean and std", "0.5 for ImageNet's, in the file's preprocessing", _normalise_to_one),
    Fault("wrong resize", "another size before the crop, in the file's preprocessing", _crop_less),
    Fault("LayerNorm epsilon", "1e-3, TensorFlow's default, for 1e-5", _change_epsilon, needs="LayerNormalization"),
    Fault("stale bias table", "a block's table as before training: zeros", _forget_bias_table, needs="bias tables"),
    Fault("truncated weights", "the second half of the largest tensor is zeros", _truncate_weights),
    Fault("weights altered", "one layer's with the other sign", _alter_weights),
    Fault("a weight altered", "one of all, by a tenth of the largest", _alter_a_weight),
    Fault("classes reversed", "labels in another order than logits", _reverse_classes),
    Fault(
        "precision not as asked",
        "said to be fp16, built in fp32",
        lambda model: _set_metadata(model, "precision", "fp16"),
        needs="half precision in PyTorch",
    ),
    Fault("one slot wrong", "the last image of a batch gets its neighbour's answer", None, _last_slot_wrong),
    Fault("answers moved", "each image of a batch gets its neighbour's answer", None, _answers_moved),
    Fault("images leak", "each image's answer depends a little on the others'", None, _leaks_between_images),
    Fault("NaN", "an overflow, on very bright images alone", None, _nan_where_bright),
    Fault("runs differ", "the last bits change from run to run", None, _differs_by_run()),
)
