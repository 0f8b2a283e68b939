"""The torch operators: what torch's compilers make of them, what they refuse, and which code computes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

from dat_deploy import plugins
from dat_deploy.errors import ShapeError, UnsupportedError
from dat_deploy.networks.dat.model import REFERENCE
from dat_deploy.plugins import cache_key
from dat_deploy.plugins.launch import Configuration
from dat_deploy.plugins.tuning import configurations_path, store, tuned_configuration

OPERATORS = ["deformable_sample", "deformable_attention", "window_attention", "neighborhood_attention"]
SECOND_FORMS = {
    "window_attention": "whole_window_kernel",
    "deformable_attention": "deformable_attention_shared_table_kernel",
    "neighborhood_attention": "register_neighbors_kernel",
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def arguments(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 2) -> dict:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    points = (torch.rand(batch, 2, 3, 3, 2) * 2.4 - 1.2).to(device)
    match name:
        case "deformable_sample":
            return {"value": randn(batch, 5, 6, 16), "sampling_locations": points}
        case "deformable_attention":
            return {
                "query": randn(batch, 5, 6, 96),
                "key": randn(batch, 9, 96),
                "value": randn(batch, 9, 96),
                "sampling_locations": points,
                "relative_position_bias_table": randn(4, 9, 11),
                "num_heads": 4,
                "half_pixel_queries": True,
            }
        case "window_attention":
            return {
                "qkv": randn(batch, 4, 6, 144),
                "relative_position_bias_table": randn(9, 2),
                "num_heads": 2,
                "window_size": 2,
                "shift_size": 1,
            }
        case _:
            return {
                "qkv": randn(batch, 4, 6, 144),
                "padding_qkv": randn(144),
                "relative_position_bias_table": randn(2, 9, 9),
                "num_heads": 2,
                "kernel_size": 5,
                "dilation": 1,
            }


def operator(name: str) -> Callable[..., Tensor]:
    return getattr(plugins, name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_formed(name, device):
    results = torch.library.opcheck(
        getattr(torch.ops.dat_deploy, name).default, tuple(arguments(name, device).values())
    )
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_on_a_cpu_is_the_reference(name):
    inputs = arguments(name)
    assert torch.equal(operator(name)(**inputs), getattr(REFERENCE, name)(**inputs))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_export_keeps_the_operator_as_one_node(name, device):
    inputs = arguments(name, device)

    class Module(torch.nn.Module):
        def forward(self, **inputs):
            return operator(name)(**inputs) + 1

    program = torch.export.export(Module(), (), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [f"dat_deploy.{name}.default", "aten.add.Tensor"]


@pytest.mark.compiler
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_compile_takes_the_operator_into_one_graph(name, device):
    inputs = arguments(name, device)
    compiled = torch.compile(lambda **inputs: operator(name)(**inputs) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), operator(name)(**inputs) * 2)


class NoGpu:
    """Triton's driver as torch's tracing asks it, on a machine without a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@pytest.fixture
def triton_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())


@pytest.mark.parametrize("name", OPERATORS)
def test_on_cuda_export_takes_any_batch(name, triton_driver_without_a_gpu):
    inputs = arguments(name)
    weights = ("relative_position_bias_table", "padding_qkv")
    with FakeTensorMode():
        fake = {
            key: torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }

    tensors = {key: value for key, value in fake.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in fake.items() if key not in tensors}

    class Module(torch.nn.Module):
        def forward(self, *values):
            return operator(name)(**dict(zip(tensors, values, strict=True)), **others)

    batch = torch.export.Dim("batch", min=1, max=512)
    shapes = tuple({} if key in weights else {0: batch} for key in tensors)
    program = torch.export.export(Module(), tuple(tensors.values()), dynamic_shapes={"values": shapes})
    (allowed,) = program.range_constraints.values()
    assert allowed.upper == 512


class Traced(Exception):  # noqa: N818  # no error
    pass


@pytest.mark.parametrize(
    ("name", "dynamic", "dtype"),
    [
        *((name, dynamic, torch.float32) for name in OPERATORS for dynamic in (False, True)),
        ("window_attention", False, torch.float16),
        ("deformable_attention", False, torch.float16),
        ("neighborhood_attention", False, torch.float16),
    ],
    ids=str,
)
def test_on_cuda_compile_sees_the_kernel_and_that_it_writes_the_output_alone(
    name, dynamic, dtype, triton_driver_without_a_gpu, monkeypatch
):
    """One launch, and no copy of an input: torch copies what a kernel might write. In half precision second forms."""
    if (name, dtype) == ("deformable_attention", torch.float16):
        module = import_module("dat_deploy.plugins.deformable_attention.kernel")
        every = module.configurations
        monkeypatch.setattr(module, "configurations", lambda problem: every(problem)[-1:])

    def trace(graph: torch.fx.GraphModule, _: list[Tensor]) -> None:
        nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        assert len(nodes) == 1
        assert nodes[0].kwargs["tensors_to_clone"] == ["output"]
        kernel = kernel_side_table.get_kernel(nodes[0].kwargs["kernel_idx"])
        kernel_name = getattr(kernel, "fn", kernel).__name__  # torch keeps some in an autotuner
        assert kernel_name == (SECOND_FORMS[name] if dtype == torch.float16 else f"{name}_kernel")
        assert not [node for node in graph.graph.nodes if f"dat_deploy.{name}" in str(node.target)]
        raise Traced

    inputs = arguments(name, dtype=dtype)
    if (name, dtype) == ("neighborhood_attention", torch.float16):  # a map that is not padded
        table = torch.randn(2, 13, 13, dtype=dtype)
        inputs |= {"qkv": inputs["qkv"].repeat(1, 6, 2, 1), "relative_position_bias_table": table, "kernel_size": 7}
        inputs["padding_qkv"] = torch.zeros(192, dtype=dtype)
    if dtype == torch.float16:  # heads of 24 are not for these forms, heads of 32 are
        of_channels = inputs.keys() & {"query", "key", "value", "qkv"}
        inputs |= {each: torch.cat([inputs[each], inputs[each][..., ::3]], dim=-1) for each in of_channels}
    with FakeTensorMode():
        fake = {
            key: torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
    backend = aot_autograd(fw_compiler=trace)
    compiled = torch.compile(operator(name), backend=backend, fullgraph=True, dynamic=dynamic)
    with pytest.raises(Exception, match="Traced"):
        compiled(**fake)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_gives_an_empty_result(name, device):
    full, empty = (operator(name)(**arguments(name, device, batch=batch)) for batch in (2, 0))
    assert empty.shape == (0, *full.shape[1:])
    assert (empty.dtype, empty.device) == (full.dtype, full.device)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_need_not_be_contiguous(name, device):
    inputs = arguments(name, device)
    strided = {
        key: value.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }
    assert any(isinstance(value, Tensor) and not value.is_contiguous() for value in strided.values())
    torch.testing.assert_close(operator(name)(**strided), operator(name)(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_float64_is_computed_by_the_reference(name, device):
    inputs = arguments(name, device, torch.float64)
    assert torch.equal(operator(name)(**inputs), getattr(REFERENCE, name)(**inputs))


BAD: list[tuple[str, dict[str, Callable], str]] = [
    (
        "deformable_sample",
        {"value": lambda x: x[0]},
        "deformable_sample got value of shape [5, 6, 16]; it takes [B, H, W, C].",
    ),
    (
        "deformable_sample",
        {"value": lambda x: x[..., :15]},
        "deformable_sample got 15 channels and 2 groups of locations; it takes groups that divide the channels.",
    ),
    (
        "deformable_sample",
        {"value": lambda x: x[:, :0]},
        "deformable_sample got value of shape [2, 0, 6, 16]; it takes maps that are not empty.",
    ),
    (
        "deformable_sample",
        {"sampling_locations": lambda x: x[:1]},
        "deformable_sample got sampling_locations of shape [1, 2, 3, 3, 2] for a batch of 2; it takes "
        "[B, G, Hk, Wk, 2], last axis (y, x).",
    ),
    (
        "deformable_sample",
        {"sampling_locations": lambda x: x.half()},
        "deformable_sample got sampling_locations of torch.float16; it takes float32 or float64 locations: half "
        "precision would move the points.",
    ),
    (
        "deformable_sample",
        {"sampling_locations": lambda x: x.to("meta")},
        "deformable_sample got sampling_locations on meta beside a tensor on DEVICE; it takes tensors on one device.",
    ),
    (
        "deformable_sample",
        {"value": lambda x: x.int()},
        "deformable_sample got value of torch.int32; it takes tensors of one floating-point type; tables may be "
        "float32, too.",
    ),
    (
        "deformable_attention",
        {"num_heads": lambda _: 5},
        "deformable_attention got 96 channels and 5 heads; it takes heads that divide the channels.",
    ),
    (
        "deformable_attention",
        {"num_heads": lambda _: 3},
        "deformable_attention got 3 heads and 2 groups of locations; it takes groups that divide the heads.",
    ),
    (
        "deformable_attention",
        {"key": lambda x: x.half()},
        "deformable_attention got key of torch.float16 beside query of torch.float32; it takes tensors of one "
        "floating-point type; tables may be float32, too.",
    ),
    (
        "deformable_attention",
        {"value": lambda x: x.to("meta")},
        "deformable_attention got value on meta and query on DEVICE; it takes tensors on one device.",
    ),
    (
        "deformable_attention",
        {"key": lambda x: x[:, :8]},
        "deformable_attention got key of shape [2, 8, 96] and value of shape [2, 9, 96] for 9 locations; it takes one "
        "key and one value a location, [2, Ns, 96].",
    ),
    (
        "deformable_attention",
        {"relative_position_bias_table": lambda x: x[:3]},
        "deformable_attention got relative_position_bias_table of shape [3, 9, 11]; it takes one table a head, "
        "[4, Th, Tw].",
    ),
    (
        "window_attention",
        {"window_size": lambda _: 3},
        "window_attention got a map of 4x6, window_size 3 and shift_size 1; it takes windows that tile the map, and a "
        "shift of less than a window.",
    ),
    (
        "window_attention",
        {"shift_size": lambda _: 2},
        "window_attention got a map of 4x6, window_size 2 and shift_size 2; it takes windows that tile the map, and a "
        "shift of less than a window.",
    ),
    (
        "window_attention",
        {"relative_position_bias_table": lambda x: x.T},
        "window_attention got relative_position_bias_table of shape [2, 9]; it takes a row a distance, [9, 2].",
    ),
    (
        "window_attention",
        {"num_heads": lambda _: 5},
        "window_attention got 144 channels of query, key and value and 5 heads; it takes heads that divide each of "
        "the three.",
    ),
    (
        "neighborhood_attention",
        {"padding_qkv": lambda x: x[1:]},
        "neighborhood_attention got padding_qkv of shape [143]; it takes a value a channel of qkv, [144].",
    ),
    (
        "neighborhood_attention",
        {"dilation": lambda _: 0},
        "neighborhood_attention got kernel_size 5, dilation 0; it takes at least 1 each.",
    ),
    (
        "neighborhood_attention",
        {"qkv": lambda x: x.flatten(1, 2)},
        "neighborhood_attention got qkv of shape [2, 24, 144]; it takes [B, H, W, 3C].",
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "changes", "sentence"), BAD, ids=[f"{case[0]}-{i}" for i, case in enumerate(BAD)])
def test_bad_input_is_refused_in_one_sentence(name, changes, sentence, device):
    inputs = arguments(name, device)
    inputs |= {key: change(inputs[key]) for key, change in changes.items()}
    with pytest.raises(ShapeError) as error:
        operator(name)(**inputs)
    on = next(iter(inputs.values())).device
    assert str(error.value) == sentence.replace("DEVICE", str(on))


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_no_argument_is_said_in_one_sentence(name):
    inputs = arguments(name)
    (first, *_), last = inputs, list(inputs)[-1]
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'heads'"):
        operator(name)(**inputs, heads=3)
    with pytest.raises(TypeError, match=f"missing a required argument: '{last}'"):
        operator(name)(**{key: value for key, value in inputs.items() if key != last})
    with pytest.raises(TypeError, match=f"{name} got {first} of type ndarray; it takes a Tensor."):
        operator(name)(**inputs | {first: inputs[first].numpy()})
    if not isinstance(inputs[last], Tensor):
        with pytest.raises(TypeError, match=f"{name} got {last} of type float; it takes a int."):
            operator(name)(**inputs | {last: 3.0})


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_without_a_gradient_it_says_so(name, device):
    inputs = arguments(name, device)
    first = next(iter(inputs))
    result = operator(name)(**inputs | {first: inputs[first].requires_grad_()})
    with pytest.raises(UnsupportedError) as error:
        result.sum().backward()
    assert str(error.value) == (
        f"{name} has no gradient, it is for inference; call it under torch.inference_mode() or torch.no_grad()."
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_nothing(name, device):
    inputs = arguments(name, device)
    with torch.autocast(device, torch.bfloat16):
        got = operator(name)(**inputs)
    assert torch.equal(got, operator(name)(**inputs))


def test_the_cache_key_is_another_one_after_new_configurations_were_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(tmp_path / "kept.json"))
    keys = []
    for kept in ("{}", "{}", '{"Some GPU": {}}'):
        (tmp_path / "kept.json").write_text(kept)
        keys.append(cache_key())
    assert re.fullmatch(r"dat-deploy [0-9a-f]{16}", keys[0])
    assert keys[0] == keys[1] != keys[2]


STALE = """
import sys, torch, dat_deploy.plugins
from torch._dynamo.utils import counters

torch.compiler.config.cache_key_tag = sys.argv[1]
compiled = torch.compile(lambda qkv, table: dat_deploy.plugins.window_attention(qkv, table, 1, 2, 0))
with torch.inference_mode():
    compiled(torch.ones(1, 2, 2, 12), torch.zeros(9, 1))
print(counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.compiler
def test_torch_compile_finds_what_another_version_compiled_unless_the_tag_tells_them_apart(tmp_path):
    """Why users are told to set it; should the first line fail with a new torch, they need not be told any more."""
    hits = []
    for tag in ("", "", "version a", "version b"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", STALE, tag]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603  # fixed
        hits.append(int(done.stdout))
    assert hits == [0, 1, 0, 0]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_docstring_is_the_operators(name):
    assert "Args:" in (operator(name).__doc__ or "")
    assert "Raises:" in (operator(name).__doc__ or "")


def test_measured_configurations_are_kept_by_gpu_and_taken_at_the_nearest_batch(monkeypatch, tmp_path):
    path = tmp_path / "kept" / "configurations.json"
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(path))
    assert configurations_path() == path
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    inputs = arguments("deformable_sample")
    kernel = import_module("dat_deploy.plugins.deformable_sample.kernel")

    def problem(batch: int, height: int = 5) -> dict[str, int]:
        return dict(kernel.problem((batch, height, 6, 16), (batch, 2, 3, 3, 2), 2))

    assert tuned_configuration("deformable_sample", problem(1), inputs["value"]) is None
    small, large = kernel.configurations(problem(1))[1:3]
    store("Some GPU", [("deformable_sample", problem(1), small, 3.0), ("deformable_sample", problem(64), large, 9.0)])
    taken = {
        batch: tuned_configuration("deformable_sample", problem(batch), inputs["value"]) for batch in (1, 4, 64, 999)
    }
    assert taken == {1: small, 4: small, 64: large, 999: large}
    assert tuned_configuration("deformable_sample", problem(1, height=7), inputs["value"]) is None
    assert tuned_configuration("window_attention", problem(1), inputs["value"]) is None

    window = import_module("dat_deploy.plugins.window_attention.kernel")
    half_table, full_table = (window.problem((1, 56, 56, 288), 3, 7, 0, 2, table_bytes) for table_bytes in (2, 4))
    store("Some GPU", [("window_attention", half_table, large, 2.0)])
    assert tuned_configuration("window_attention", half_table, inputs["value"]) == large
    assert tuned_configuration("window_attention", full_table, inputs["value"]) is None

    store("Some GPU", [("deformable_sample", problem(1), large, 2.0)])
    assert tuned_configuration("deformable_sample", problem(1), inputs["value"]) == large
    monkeypatch.setattr("dat_deploy.plugins.tuning.kernels_hash", lambda: "of other kernels")
    assert tuned_configuration("deformable_sample", problem(1), inputs["value"]) is None
    path.write_text('{"Some GPU": {"deformable_sample": []}}')
    store("Another GPU", [])
    assert tuned_configuration("deformable_sample", problem(1), inputs["value"]) is None


def test_a_configuration_can_be_kept(tmp_path, monkeypatch):
    """What is read back equals what was stored, so that it can be compared with a kernel's own."""
    configuration = Configuration((("TILE_ROWS", 8), ("BLOCK_KEYS", 64)), 4, 2)
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(tmp_path / "c.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    store("Some GPU", [("an_operator", {"batch": 1, "height": 3}, configuration, 1.0)])
    assert tuned_configuration("an_operator", {"batch": 1, "height": 3}, torch.zeros(1)) == configuration
