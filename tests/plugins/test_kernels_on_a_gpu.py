"""Each kernel where it is to run: `make bench-gpu` runs these, and so does `pytest -m gpu`.

The tolerance is derived: a kernel's error against float64 may be twice that of the reference in the same type on the
same GPU, plus a part in a thousand (a million in float32) for the order of summation.
"""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from dat_deploy import plugins
from dat_deploy.benchmark.tune import tune
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.model import REFERENCE, half_network, reference_points
from dat_deploy.networks.dat.variants import VARIANTS
from dat_deploy.plugins.dispatch import recorded_jobs

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SLACK = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of convolutions whose results are compared


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def points(batch: int, groups: int, side: int) -> Tensor:
    offsets = torch.randn(batch, groups, side, side, 2, device="cuda").tanh() * (2 / side)
    return reference_points(side, side, half_pixel=True, device=torch.device("cuda")) + offsets


def assert_kernel_is_exact(operator: str, inputs: dict[str, Tensor], attributes: dict[str, int]) -> None:
    """In every configuration, and it is the kernel that has run."""
    reference: Callable[..., Tensor] = getattr(REFERENCE, operator)
    exact = reference(**{name: value.double() for name, value in inputs.items()}, **attributes)
    eager = reference(**inputs, **attributes)
    dtype = eager.dtype
    allowed = 2 * (eager - exact).abs().max().item() + SLACK[dtype] * (1 + exact.abs().max().item())
    with recorded_jobs() as jobs:
        got = getattr(plugins, operator)(**inputs, **attributes)
    (job,) = jobs
    assert (got - exact).abs().max().item() <= allowed
    for configuration in import_module(f"dat_deploy.plugins.{operator}.kernel").configurations(job.problem):
        job.output.fill_(float("nan"))
        job.run(configuration)
        assert (job.output - exact).abs().max().item() <= allowed, configuration


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "heads", "groups"), [(7, 24, 6), (14, 12, 3), (24, 16, 4), (28, 4, 2)])
@pytest.mark.parametrize("half_pixel_queries", [1, 0], ids=["DAT", "DAT++"])
def test_deformable_attention(side, heads, groups, half_pixel_queries, dtype):
    inputs = {
        "query": randn(3, side, side, heads * 32, dtype=dtype),
        "key": randn(3, side * side, heads * 32, dtype=dtype),
        "value": randn(3, side * side, heads * 32, dtype=dtype),
        "sampling_locations": points(3, groups, side),
        "relative_position_bias_table": randn(heads, 2 * side - 1, 2 * side - 1, dtype=dtype),
    }
    attributes = {"num_heads": heads, "half_pixel_queries": half_pixel_queries}
    assert_kernel_is_exact("deformable_attention", inputs, attributes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width", "table"), [(50, 84, 27), (5, 3, 111), (1, 1, 1)])
def test_deformable_attention_with_a_table_of_another_size(height, width, table, dtype):
    inputs = {
        "query": randn(2, height, width, 128, dtype=dtype),
        "key": randn(2, 49, 128, dtype=dtype),
        "value": randn(2, 49, 128, dtype=dtype),
        "sampling_locations": points(2, 2, 7) * 1.5,
        "relative_position_bias_table": randn(4, table, table, dtype=dtype),
    }
    assert_kernel_is_exact("deformable_attention", inputs, {"num_heads": 4, "half_pixel_queries": 0})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "channels", "groups"), [(14, 384, 3), (7, 768, 6), (9, 72, 3)])
def test_deformable_sample(side, channels, groups, dtype):
    inputs = {"value": randn(3, side, side, channels, dtype=dtype), "sampling_locations": points(3, groups, side) * 1.2}
    assert_kernel_is_exact("deformable_sample", inputs, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("side", "heads", "window_size", "shift_size"), [(56, 3, 7, 0), (28, 6, 7, 4), (48, 8, 12, 6), (7, 24, 7, 0)]
)
def test_window_attention(side, heads, window_size, shift_size, dtype):
    inputs = {
        "qkv": randn(3, side, side, 3 * heads * 32, dtype=dtype),
        "relative_position_bias_table": randn((2 * window_size - 1) ** 2, heads, dtype=dtype),
    }
    attributes = {"num_heads": heads, "window_size": window_size, "shift_size": shift_size}
    assert_kernel_is_exact("window_attention", inputs, attributes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width", "dilation"), [(56, 56, 1), (13, 30, 2), (5, 9, 1)])
def test_neighborhood_attention(height, width, dilation, dtype):
    inputs = {
        "qkv": randn(2, height, width, 3 * 2 * 32, dtype=dtype),
        "padding_qkv": randn(192, dtype=dtype),
        "relative_position_bias_table": randn(2, 13, 13, dtype=dtype),
    }
    assert_kernel_is_exact("neighborhood_attention", inputs, {"num_heads": 2, "kernel_size": 7, "dilation": dilation})


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80])
def test_head_dims(head_dim):
    """80 is more than the kernels hold: the reference computes it."""
    inputs = {"qkv": randn(2, 14, 14, 6 * head_dim, dtype=torch.float16)}
    inputs["relative_position_bias_table"] = randn(169, 2, dtype=torch.float16)
    if head_dim > 64:
        with recorded_jobs() as jobs:
            plugins.window_attention(*inputs.values(), 2, 7, 4)
        assert not jobs
    else:
        assert_kernel_is_exact("window_attention", inputs, {"num_heads": 2, "window_size": 7, "shift_size": 4})
        inputs["padding_qkv"] = randn(6 * head_dim, dtype=torch.float16)
        inputs["relative_position_bias_table"] = randn(2, 13, 13, dtype=torch.float16)
        assert_kernel_is_exact("neighborhood_attention", inputs, {"num_heads": 2, "kernel_size": 7, "dilation": 1})


@pytest.mark.parametrize("name", ["tiny", "pp-tiny"])
def test_a_network_of_kernels_agrees_with_the_reference_network(name):
    image = torch.randn(3, 3, 224, 224, device="cuda")
    expected = load_model(name).cuda()(image)
    assert isinstance(expected, Tensor)
    with recorded_jobs() as jobs:
        got = load_model(name, fused=True).cuda()(image)
    blocks = "".join(stage.blocks for stage in VARIANTS[name].stages)
    assert len(jobs) == len(blocks) + blocks.count("D")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    half = half_network(load_model(name, fused=True), torch.float16).cuda()(image)
    assert isinstance(half, Tensor)
    assert (half - expected).abs().max() < 0.05 * expected.std()


def test_a_network_of_kernels_is_captured_by_a_cuda_graph():
    model = half_network(load_model("tiny", fused=True), torch.float16).cuda()
    image = torch.randn(2, 3, 224, 224, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        model(image)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = model(image)
    image.copy_(torch.randn_like(image))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, model(image))


def test_tune_keeps_a_choice_that_the_operators_take(monkeypatch, tmp_path):
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(tmp_path / "kept.json"))
    tuning = tune("tiny", batches=[2])
    assert all(row.microseconds > 0 for row in tuning.launches)
    with recorded_jobs() as jobs:
        half_network(load_model("tiny", fused=True), torch.float16).cuda()(torch.randn(2, 3, 224, 224, device="cuda"))
    from dat_deploy.plugins.tuning import tuned_configuration

    taken = {tuned_configuration(job.operator, job.problem, job.output) for job in jobs}
    assert taken == {row.configuration for row in tuning.launches}
