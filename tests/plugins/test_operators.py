"""Each ONNX body of each operator, on ONNX Runtime, against the float64 reference; and what the operators promise.

The tolerance is derived: a body's error against float64 may be twice that of the float32 reference, plus one part in
a million for the order of summation. A body that several lowerings share is tried once, under the first of them.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dat_deploy import plugins
from dat_deploy.errors import ShapeError
from dat_deploy.export.lowering import function_bodies
from dat_deploy.export.options import LOWERINGS
from dat_deploy.networks.dat.model import REFERENCE
from dat_deploy.plugins.onnx_domain import DOMAIN_NAME
from dat_deploy.plugins.operator import OPERATORS, Operator, specification
from dat_deploy.plugins.specification import PLUGIN_ATTRIBUTES

BODIED = [lowering for lowering in LOWERINGS if lowering != "plugin"]
Inputs = dict[str, Tensor]


def bodies(operator: str) -> list[str]:
    """The lowerings with bodies that differ; `test_lowerings_share_bodies` says which share one."""
    table = Operator(operator).onnx_function.BODIES
    return [name for i, name in enumerate(BODIED) if table[name] not in [table[other] for other in BODIED[:i]]]


@cache
def body_of(operator: str, lowering: str, opset: int) -> onnx.FunctionProto:
    return next(body for body in function_bodies(lowering, opset) if body.name == operator)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Of thousands of random cases one would be beyond any tolerance that is worth something."""
    torch.manual_seed(0)


def session(
    operator: str,
    lowering: str,
    inputs: Inputs,
    attributes: dict[str, int],
    opset: int = 18,
    free: tuple[str, ...] = (),
):
    """The operator as one node with its body; the first axis is dynamic, as the batch of an exported file is.

    Of the inputs in `free` no size is known.
    """
    node = onnx.helper.make_node(operator, list(inputs), ["out"], domain=DOMAIN_NAME, **attributes, **PLUGIN_ATTRIBUTES)
    roles = specification(operator).roles
    shapes = {
        name: ["batch", *value.shape[1:]] if roles[name].leads_with_batch else list(value.shape)
        for name, value in inputs.items()
    }
    graph = onnx.helper.make_graph(
        [node],
        "operator",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.TensorProto.FLOAT, [f"{name}_{i}" for i in range(len(shape))] if name in free else shape
            )
            for name, shape in shapes.items()
        ],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(
        graph,
        functions=[body_of(operator, lowering, opset)],
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN_NAME, 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_bodies_are_exact(operator: str, lowering: str, every: list[Inputs], attributes: dict[str, int], opset=18):
    """Of inputs of the same shapes, in one session."""
    reference: Callable[..., Tensor] = getattr(REFERENCE, operator)
    run = session(operator, lowering, every[0], attributes, opset).run
    for inputs in every:
        exact = reference(**{name: value.double() for name, value in inputs.items()}, **attributes)
        eager = reference(**inputs, **attributes)
        (got,) = run(None, {name: value.numpy() for name, value in inputs.items()})
        allowed = 2 * (eager - exact).abs().max().item() + 1e-6 * (1 + exact.abs().max().item())
        assert np.abs(got - exact.numpy()).max() <= allowed


def assert_body_is_exact(operator: str, lowering: str, inputs: Inputs, attributes: dict[str, int], opset: int = 18):
    assert_bodies_are_exact(operator, lowering, [inputs], attributes, opset)


@pytest.mark.parametrize(
    ("operator", "shared"),
    [
        ("deformable_sample", [{"function", "gather"}, {"gridsample"}, {"hat"}]),
        ("deformable_attention", [{"function", "hat"}, {"gather"}, {"gridsample"}]),
        ("window_attention", [{"function"}, {"gather", "gridsample", "hat"}]),
        ("neighborhood_attention", [{"function", "gather", "gridsample"}, {"hat"}]),
    ],
)
def test_lowerings_share_bodies(operator, shared):
    table = Operator(operator).onnx_function.BODIES
    assert [{name for name in BODIED if table[name] is table[first]} for first in bodies(operator)] == shared
    for same in shared:  # what is written into a file, and not the functions alone
        assert len({body_of(operator, lowering, 18).SerializeToString() for lowering in same}) == 1


KINDS = ["network", "pixels", "half pixels", "border", "outside"]
MAPS = [(1, 1), (1, 5), (3, 9), (7, 7), (8, 13)]


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("lowering", bodies("deformable_sample"))
def test_deformable_sample_body_is_exact(lowering, size, locations):
    """Wherever the points are."""
    value = torch.randn(3, *size, 24)
    points = [locations(kind, (3, 2, 4, 5), size) for kind in KINDS]
    every = [{"value": value, "sampling_locations": each} for each in points]
    assert_bodies_are_exact("deformable_sample", lowering, every, {})


@pytest.mark.parametrize("half_pixel_queries", [1, 0], ids=["DAT", "DAT++"])
@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("lowering", bodies("deformable_attention"))
def test_deformable_attention_body_is_exact(lowering, size, half_pixel_queries, locations):
    """Wherever the points are."""
    height, width = size
    heads, groups, head_dim, sampled = 4, 2, 8, (3, 2)
    keys = sampled[0] * sampled[1]
    every = [
        {
            "query": torch.randn(2, height, width, heads * head_dim),
            "key": torch.randn(2, keys, heads * head_dim),
            "value": torch.randn(2, keys, heads * head_dim),
            "sampling_locations": locations(kind, (2, groups, *sampled), size),
            "relative_position_bias_table": torch.randn(heads, 2 * height - 1, 2 * width - 1),
        }
        for kind in KINDS
    ]
    attributes = {"num_heads": heads, "half_pixel_queries": half_pixel_queries}
    assert_bodies_are_exact("deformable_attention", lowering, every, attributes)


WINDOWS = [(7, 7, 7, 0), (7, 7, 7, 4), (14, 21, 7, 0), (14, 21, 7, 4), (12, 24, 12, 6), (4, 2, 2, 1), (3, 6, 1, 0)]


@pytest.mark.parametrize(("height", "width", "window_size", "shift_size"), WINDOWS)
@pytest.mark.parametrize("lowering", bodies("window_attention"))
def test_window_attention_body_is_exact(lowering, height, width, window_size, shift_size):
    heads = 2
    inputs = {
        "qkv": torch.randn(3, height, width, 3 * heads * 8),
        "relative_position_bias_table": torch.randn((2 * window_size - 1) ** 2, heads),
    }
    attributes = {"num_heads": heads, "window_size": window_size, "shift_size": shift_size}
    assert_body_is_exact("window_attention", lowering, inputs, attributes)


NEIGHBORHOODS = [  # each pair of size, kernel size and dilation
    (height, width, kernel_size, 1 + (i + j) % 3)
    for i, (height, width) in enumerate([(1, 1), (3, 9), (7, 7), (8, 13), (30, 17)])
    for j, kernel_size in enumerate((3, 5, 7, 13))
]


def neighborhood_inputs(height: int, width: int, kernel_size: int, heads: int = 2, head_dim: int = 4) -> Inputs:
    side = 2 * kernel_size - 1
    return {
        "qkv": torch.randn(2, height, width, 3 * heads * head_dim),
        "padding_qkv": torch.randn(3 * heads * head_dim),
        "relative_position_bias_table": torch.randn(heads, side, side),
    }


@pytest.mark.parametrize(("height", "width", "kernel_size", "dilation"), NEIGHBORHOODS)
@pytest.mark.parametrize("lowering", bodies("neighborhood_attention"))
def test_neighborhood_attention_body_is_exact(lowering, height, width, kernel_size, dilation):
    inputs = neighborhood_inputs(height, width, kernel_size)
    attributes = {"num_heads": 2, "kernel_size": kernel_size, "dilation": dilation}
    assert_body_is_exact("neighborhood_attention", lowering, inputs, attributes)


def brute_force_neighborhood_attention(inputs: Inputs, num_heads: int, kernel_size: int, dilation: int) -> Tensor:
    """Pixel by pixel, from the definition: K neighbors an axis of the same remainder, the nearest K that exist."""
    qkv, padding, table = inputs.values()
    batch, height, width, channels3 = qkv.shape
    canvas = padding.repeat(batch, max(height, kernel_size * dilation), max(width, kernel_size * dilation), 1)
    canvas[:, :height, :width] = qkv
    q, k, v = canvas.reshape(*canvas.shape[:3], 3, num_heads, -1).unbind(3)  # B, H, W, M, D

    def neighbors(pixel: int, length: int) -> list[int]:
        same = list(range(pixel % dilation, length, dilation))
        first = min(max(same.index(pixel) - kernel_size // 2, 0), len(same) - kernel_size)
        return same[first : first + kernel_size]

    out = torch.empty(batch, height, width, num_heads, channels3 // 3 // num_heads, dtype=qkv.dtype)
    for y in range(height):
        for x in range(width):
            pairs = [(i, j) for i in neighbors(y, canvas.shape[1]) for j in neighbors(x, canvas.shape[2])]
            scores = torch.stack([(q[:, y, x] * k[:, i, j]).sum(-1) for i, j in pairs], dim=-1)  # B, M, K²
            steps = [((i - y) // dilation + kernel_size - 1, (j - x) // dilation + kernel_size - 1) for i, j in pairs]
            bias = torch.stack([table[:, dy, dx] for dy, dx in steps], dim=-1)
            weights = (scores / q.shape[-1] ** 0.5 + bias).softmax(dim=-1)
            out[:, y, x] = sum(weights[..., n, None] * v[:, i, j] for n, (i, j) in enumerate(pairs))
    return out.flatten(-2)


@pytest.mark.parametrize(("height", "width", "kernel_size", "dilation"), NEIGHBORHOODS)
def test_neighborhood_attention_is_the_sum_over_the_neighbors(height, width, kernel_size, dilation):
    inputs = {name: value.double() for name, value in neighborhood_inputs(height, width, kernel_size).items()}
    expected = brute_force_neighborhood_attention(inputs, 2, kernel_size, dilation)
    got = REFERENCE.neighborhood_attention(*inputs.values(), 2, kernel_size, dilation)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_neighborhood_attention_never_holds_all_pairs_of_pixels():
    """[H·W, H·W] of the first map would be 1.3e8 scores a head; a row of the window makes W² · H of them."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    for height, width, kernel_size in ((96, 120, 7), (20, 20, 13)):
        largest = 0
        inputs = neighborhood_inputs(height, width, kernel_size, heads=1)
        with Sizes():
            REFERENCE.neighborhood_attention(*inputs.values(), 1, kernel_size, 1)
        assert 0 < largest <= 2 * height * width * max(width, kernel_size**2)  # a batch of two


@pytest.mark.parametrize("operator", [REFERENCE.neighborhood_attention, plugins.neighborhood_attention])
@pytest.mark.parametrize(("kernel_size", "side"), [(6, 11), (7, 15), (7, 11)])
def test_neighborhood_attention_refuses_an_even_window_and_a_table_of_another_size(operator, kernel_size, side):
    with pytest.raises(ShapeError) as error:
        operator(torch.randn(1, 14, 14, 24), torch.randn(24), torch.randn(2, side, side), 2, kernel_size, 1)
    assert str(error.value) == (
        f"neighborhood_attention got kernel_size {kernel_size} and a bias table of shape [2, {side}, {side}]; it takes "
        f"an odd K and a table [2, 2K - 1, 2K - 1]. Take both from one block of a checkpoint."
    )


@pytest.mark.parametrize("lowering", bodies("neighborhood_attention"))
def test_neighborhood_body_reads_its_sizes_at_run_time(lowering):
    inputs = neighborhood_inputs(9, 10, 7)
    attributes = {"num_heads": 2, "kernel_size": 7, "dilation": 1}
    run = session("neighborhood_attention", lowering, inputs, attributes, free=("qkv",))
    for height, width in ((3, 4), (7, 30), (23, 14)):
        inputs["qkv"] = torch.randn(1, height, width, 24)
        (got,) = run.run(None, {name: value.numpy() for name, value in inputs.items()})
        expected = REFERENCE.neighborhood_attention(**inputs, **attributes)
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("opset", [17, 19])
@pytest.mark.parametrize(("operator", "lowering"), [(name, each) for name in OPERATORS for each in bodies(name)])
def test_bodies_mean_the_same_in_opset(operator, lowering, opset, locations):
    points = locations("network", (2, 2, 4, 4), (5, 6))
    inputs, attributes = {
        "deformable_sample": ({"value": torch.randn(2, 5, 6, 16), "sampling_locations": points}, {}),
        "deformable_attention": (
            {
                "query": torch.randn(2, 5, 6, 16),
                "key": torch.randn(2, 16, 16),
                "value": torch.randn(2, 16, 16),
                "sampling_locations": points,
                "relative_position_bias_table": torch.randn(4, 9, 11),
            },
            {"num_heads": 4, "half_pixel_queries": 1},
        ),
        "window_attention": (
            {"qkv": torch.randn(2, 4, 4, 48), "relative_position_bias_table": torch.randn(9, 2)},
            {"num_heads": 2, "window_size": 2, "shift_size": 1},
        ),
        "neighborhood_attention": (
            neighborhood_inputs(9, 12, 5),
            {"num_heads": 2, "kernel_size": 5, "dilation": 2},
        ),
    }[operator]
    assert_body_is_exact(operator, lowering, inputs, attributes, opset)


def test_sampling_at_the_pixels_gives_the_map_back():
    value = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    y, x = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(-1, 1, 7, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).expand(2, 3, 5, 7, 2)
    torch.testing.assert_close(REFERENCE.deformable_sample(value, grid), value.reshape(2, 35, 12))


def test_sampling_one_pixel_further_shifts_the_map_and_reads_zeros_outside():
    value = torch.randn(1, 4, 6, 2, dtype=torch.float64)
    y, x = torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 6) + 2 / 5
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).double()[None, None]
    sampled = REFERENCE.deformable_sample(value, grid).reshape(1, 4, 6, 2)
    torch.testing.assert_close(sampled[:, :, :-1], value[:, :, 1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(sampled[:, :, -1], torch.zeros_like(value[:, :, -1]), atol=1e-6, rtol=0)


def test_bilinear_read_is_the_sum_of_hat_functions_of_the_paper():
    value = torch.randn(1, 3, 4, 1, dtype=torch.float64)
    points = torch.rand(1, 1, 2, 5, 2, dtype=torch.float64) * 2.6 - 1.3
    got = REFERENCE.deformable_sample(value, points).reshape(-1)
    for k, (y, x) in enumerate(points.reshape(-1, 2).tolist()):
        row, column = (y + 1) / 2 * 2, (x + 1) / 2 * 3
        expected = sum(
            max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j)) * value[0, i, j, 0].item()
            for i in range(3)
            for j in range(4)
        )
        assert got[k].item() == pytest.approx(expected, abs=1e-12)


def test_channel_groups_read_at_their_own_locations():
    value = torch.randn(1, 4, 4, 6)
    points = torch.rand(1, 3, 2, 2, 2) * 2 - 1
    together = REFERENCE.deformable_sample(value, points)
    for group in range(3):
        alone = REFERENCE.deformable_sample(value[..., 2 * group : 2 * group + 2], points[:, group : group + 1])
        torch.testing.assert_close(together[..., 2 * group : 2 * group + 2], alone)


def test_shifted_windows_do_not_see_across_the_border_that_the_roll_made():
    """A change in the first row must not reach the last row, its neighbour only after the roll."""
    qkv = torch.randn(1, 14, 14, 48, dtype=torch.float64)
    table = torch.zeros(169, 2, dtype=torch.float64)
    changed = qkv.clone()
    changed[:, 0] += 1
    before, after = (REFERENCE.window_attention(x, table, 2, 7, 4) for x in (qkv, changed))
    torch.testing.assert_close(after[:, -4:], before[:, -4:], atol=1e-12, rtol=0)
    assert (after[:, 0] - before[:, 0]).abs().min() > 0
