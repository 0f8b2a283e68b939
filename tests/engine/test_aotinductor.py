"""AOTInductor packages: the same answer as PyTorch's, from a process that has never heard of this package."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

from dat_deploy.engine.aotinductor import package as aotinductor
from dat_deploy.engine.aotinductor.package import compile_package
from dat_deploy.engine.passport import Passport, Profile, sha256, versions, write_engine
from dat_deploy.errors import EngineBuildError, EngineRunError, ShapeError, UnsupportedError
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.dat.checkpoint import load_model
from dat_deploy.networks.dat.model import DAT, half_network
from dat_deploy.networks.dat.variants import VARIANTS, StageConfig, Variant
from dat_deploy.plugins.neighborhood_attention.reference import neighborhood_attention
from dat_deploy.runners.aotinductor_runner import AotinductorRunner

TOLERANCE = 1e-4
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# What a user needs who has the package alone: torch and NumPy.
STRANGER = """
import json, sys
import numpy as np
import torch
from torch._inductor.package import load_package

package, folder = sys.argv[1:]
for batch in (1, 3):
    model = load_package(package, f"batch_{batch}")
    image = np.load(f"{folder}/images.npy")[:batch]
    with torch.inference_mode():
        logits = model(torch.from_numpy(image))
    np.save(f"{folder}/logits_{batch}.npy", logits.numpy())
print(json.dumps([sorted(name for name in sys.modules if "dat_deploy" in name), sys.path]))
"""


@pytest.fixture(scope="session")
def every_block() -> Variant:
    """Every kind of attention, and the options of DAT++, in a network that compiles in seconds."""
    shared = {"window_size": 7, "neighborhood_size": 7, "local_perception": True, "depthwise_mlp": True}
    points = {"offset_groups": 2, "offset_kernel_size": 3, "offset_stride": 1, "offset_range_factor": 2.0}
    return replace(
        VARIANTS["tiny"],
        name="every-block",
        classes=10,
        stages=(
            StageConfig(8, "L", 2, **shared),
            StageConfig(16, "S", 2, **shared),
            StageConfig(32, "N", 4, **shared),
            StageConfig(32, "D", 4, **shared, **points),
        ),
    )


@pytest.fixture(scope="session")
def model(every_block: Variant) -> DAT:
    return lively(every_block)


@pytest.fixture(scope="session")
def plain_blocks(every_block: Variant) -> DAT:
    """The same without what DAT++ adds around the attention, which compiles in less time."""
    stages = tuple(replace(stage, local_perception=False, depthwise_mlp=False) for stage in every_block.stages)
    return lively(replace(every_block, name="plain-blocks", stages=stages))


def lively(variant: Variant) -> DAT:
    """Weights of which each matters: seeded ones leave the bias tables and the offsets at nearly nothing."""
    model = load_model(variant)
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if name.endswith(("relative_position_bias_table", "pointwise.weight")):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def package(model: DAT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network for batch 1 and 3."""
    path = tmp_path_factory.mktemp("aotinductor") / "every-block.pt2"
    compile_package(model, model.variant, path, batches=[1, 3])
    return path


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((3, 3, 224, 224)).astype(np.float32)


def beside(package: Path, model: DAT, **changes: object) -> Path:
    """Give the package a passport."""
    metadata = FileMetadata(
        network=model.variant,
        batch=None,
        dynamic_image_size=False,
        lowering="reference",
        precision="fp32",
        opset_version=0,
        preprocessing=model.variant.preprocessing,
        class_names=(),
        weights_sha256="",
        weights_source="a test",
        version="0",
    )
    content = package.read_bytes()
    passport = Passport(
        engine_sha256=sha256(content),
        engine_bytes=len(content),
        backend="aotinductor",
        backend_version=str(torch.__version__),
        versions=versions(),
        architectures=("cpu",),
        profiles=(Profile.parse("1"), Profile.parse("3")),
        outputs=model.variant.output_names(),
        layers={},
        kinds={},
        engine_layers=None,
        plugins={},
        plugin_form=None,
        metadata=metadata,
        source=None,
        source_sha256=None,
        rebuild=("dat-deploy", "build", "--batch", "1,3"),
    )
    write_engine(package, content, dataclasses.replace(passport, **changes), force=True)  # type: ignore[arg-type]
    return package


@pytest.fixture
def runner(package: Path, model: DAT) -> AotinductorRunner:
    return AotinductorRunner(beside(package, model), "every-block.pt2", threads=1)


def answers_of_a_stranger(package: Path, images: np.ndarray, folder: Path) -> dict[int, np.ndarray]:
    """Logits for batch 1 and 3, from a process that cannot import dat_deploy."""
    np.save(folder / "images.npy", images)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -S: an editable installation would put the repository on the path
    site = str(Path(torch.__file__).parents[1])
    code = f"import sys; sys.path.append({site!r})\n{STRANGER}"
    done = subprocess.run(  # noqa: S603  # fixed
        [sys.executable, "-S", "-c", code, str(package), str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, paths = json.loads(done.stdout)
    assert ours == []
    assert not [path for path in paths if Path(path or folder, "dat_deploy").exists()]
    return {batch: np.load(folder / f"logits_{batch}.npy") for batch in (1, 3)}


def errors(model: DAT, answers: dict[int, np.ndarray], images: np.ndarray) -> list[float]:
    expected = model(torch.from_numpy(images)).numpy()
    assert all(logits.shape == expected[:batch].shape for batch, logits in answers.items())
    return [float(np.abs(logits - expected[:batch]).max()) for batch, logits in answers.items()]


@pytest.mark.compiler
def test_a_process_without_dat_deploy_gets_the_answers_of_pytorch(package, model, images, tmp_path):
    answers = answers_of_a_stranger(package, images, tmp_path)
    assert max(errors(model, answers, images)) < TOLERANCE


@pytest.mark.compiler
def test_the_comparison_sees_every_kind_of_block(package, model, images, runner):
    """Swapping y and x, or a bias table, in any one block shows."""
    answers = {batch: runner(images[:batch]) for batch in (1, 3)}
    assert max(errors(model, answers, images)) < TOLERANCE
    swapped = {
        name: weight.flip(0)
        for name, weight in model.state_dict().items()
        if name.endswith(("pointwise.weight", "relative_position_bias_table"))
    }
    assert len(swapped) == 5
    for name, weight in swapped.items():
        other = load_model(model.variant)
        other.load_state_dict(model.state_dict() | {name: weight})
        assert min(errors(other, answers, images)) > 10 * TOLERANCE, name


@pytest.mark.parametrize("side", [3, 7, 10])
def test_what_is_compiled_for_a_cpu_is_neighborhood_attention(side):
    torch.manual_seed(0)
    for dilation in (1, 2):
        inputs = [torch.randn(2, side, side + 9, 96), torch.randn(96), torch.randn(2, 13, 13), 2, 7, dilation]
        gathered = aotinductor._gathered_neighborhood_attention(*inputs)
        torch.testing.assert_close(gathered, neighborhood_attention(*inputs))


def test_what_depends_on_nothing_is_folded_and_the_rest_is_not():
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            index = (torch.arange(4) + 1) % 4
            return x[index] + torch.ones(1).expand(4) * x.sum()

    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with aotinductor._quiet():
        module = torch.export.export(Module(), (x,)).run_decompositions({}).module(check_guards=False)
    aotinductor._fold_constants(module)
    folded = {name: value.tolist() for name, value in module.named_buffers()}
    assert sorted(folded.values(), key=len) == [[1.0], [1, 2, 3, 0]]
    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if "arange" in target or "remainder" in target]
    assert module(x).tolist() == [12.0, 13.0, 14.0, 11.0]
    assert module(-x).tolist() == [-12.0, -13.0, -14.0, -11.0]


@pytest.mark.compiler
@pytest.mark.parametrize("precision", DTYPES)
def test_half_precision_errs_like_eager_half_precision(plain_blocks, images, tmp_path, precision):
    """Not more than twice as much, against float32."""
    package, model = tmp_path / "half.pt2", plain_blocks
    compile_package(model, model.variant, package, batches=[1], precision=precision)
    changes = {"profiles": (Profile.parse("1"),)}
    with AotinductorRunner(beside(package, model, **changes), "half.pt2", threads=1) as runner:
        logits = runner(images[:1])
    exact = model(torch.from_numpy(images[:1])).numpy()
    eager = half_network(model, DTYPES[precision])(torch.from_numpy(images[:1])).numpy()
    assert logits.dtype == eager.dtype == np.float32
    assert 0 < np.abs(logits - exact).max() <= 2 * np.abs(eager - exact).max()


@pytest.mark.parametrize("precision", DTYPES)
def test_half_networks_keep_coordinates_norms_and_tables_in_float32(model, precision):
    half = half_network(model, DTYPES[precision])
    single = {name for name, weight in half.named_parameters() if weight.dtype == torch.float32}
    islands = ("norm", "relative_position_bias_table", "pointwise")
    assert single == {name for name, _ in half.named_parameters() if any(island in name for island in islands)}
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    query = torch.randn(1, 7, 7, 32, generator=torch.Generator().manual_seed(0))
    block, exact = half.stages[3].attns[0], model.stages[3].attns[0]
    locations = block.sampling_locations(query.to(DTYPES[precision]))
    assert locations.dtype == torch.float32
    # that of the convolution's result alone; a location rounded to half precision would be a multiple of the step
    assert (locations - exact.sampling_locations(query)).abs().max() < 0.05
    assert not torch.equal(locations, locations.to(DTYPES[precision]).float())


@pytest.mark.compiler
def test_another_batch_is_refused_with_the_way_to_get_it(runner, images):
    with pytest.raises(ShapeError) as error:
        runner(images[:2])
    assert str(error.value) == (
        "every-block.pt2: input 'image' has shape [2, 3, 224, 224]; it takes [batch 1 or 3, 3, 224, 224]. Build again "
        "with `batches` or `image_size` for another."
    )


@pytest.mark.compiler
def test_a_closed_runner_says_so(runner, images):
    with runner:
        runner(images)
    with pytest.raises(EngineRunError) as error:
        runner(images)
    assert str(error.value) == "every-block.pt2 is closed; open it again."


@pytest.mark.compiler
def test_threads_get_the_answers_to_their_own_images(runner, images):
    alone = [runner(images[i : i + 1]) for i in range(3)]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(20) if not np.array_equal(runner(images[i : i + 1]), alone[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"backend_version": "2.1.0"},
            f"p.pt2 was built with torch 2.1.0, and {torch.__version__} is installed; packages run on the version that "
            f"built them. Build it again here: dat-deploy build --batch 1,3",
        ),
        (
            {"architectures": ("sm_10",)},
            "p.pt2 was built for sm_10, and this machine has no sm_10. Build it again here: "
            "dat-deploy build --batch 1,3",
        ),
    ],
    ids=["torch", "gpu"],
)
def test_a_package_for_another_place_is_refused(model, changes, sentence, monkeypatch, tmp_path):
    """Before it is opened: what stands in for it is no package."""
    package = tmp_path / "p.pt2"
    package.write_bytes(b"nothing")
    monkeypatch.setattr(aotinductor, "gpu_architecture", lambda: None)
    with pytest.raises(UnsupportedError) as error:
        AotinductorRunner(beside(package, model, **changes), "p.pt2")
    assert str(error.value) == sentence


def test_a_file_that_is_no_package_is_refused(model, tmp_path):
    path = tmp_path / "p.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(EngineBuildError, match=r"^torch cannot open p\.pt2 for batch 1: \S"):
        AotinductorRunner(beside(path, model), "p.pt2")


@pytest.mark.compiler
def test_without_a_compiler_it_says_so(model, tmp_path, capfd):
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(UnsupportedError) as error:
        compile_package(model, model.variant, tmp_path / "p.pt2", batches=[1])
    assert str(error.value).startswith("AOTInductor needs a C++ compiler to compile every-block for batch 1: ")
    assert str(error.value).endswith(" Install g++, or name one in CXX.")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (MemoryError("no more"), EngineBuildError, "memory ran out while AOTInductor compiled every-block for batch 1"),
        (OSError(28, "No space left"), EngineBuildError, "disk space ran out while AOTInductor compiled every-block"),
        (RuntimeError("x " * 9999), EngineBuildError, "AOTInductor cannot compile every-block for batch 1: x x"),
        (ShapeError("as it is"), ShapeError, "as it is"),
    ],
    ids=["memory", "disk", "any", "own"],
)
def test_errors_of_the_compiler_are_one_sentence(model, tmp_path, monkeypatch, raised, kind, words):
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(aotinductor, "_compiled", fail)
    with pytest.raises(kind) as error:
        compile_package(model, model.variant, tmp_path / "p.pt2", batches=[1])
    assert str(error.value).startswith(words)
    assert len(str(error.value)) < 1200


def test_cuda_is_refused_without_a_device(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="sees no CUDA device here; build this package on one"):
        compile_package(model, model.variant, tmp_path / "p.pt2", batches=[1], device="cuda")


class NoGpu:
    """Triton's driver as torch's tracing asks it, on a machine without a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_cuda_the_kernels_are_in_the_program_and_no_operator_of_ours(every_block, monkeypatch, precision):
    """What AOTInductor lowers: one launch for each operator, and nothing that would call back into dat_deploy."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    network = DAT(every_block.as_backbone((0, 3)), fused=True).eval().requires_grad_(False)
    if precision != "fp32":
        network = half_network(network, DTYPES[precision])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), aotinductor._quiet():
        for module in network.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
        image = torch.empty(1, 3, 224, 224, device="cuda")
        program = torch.export.export(network, (image,)).module(check_guards=False)
        lowered, _ = aot_export_module(program, (image,), trace_joint=False)
    targets = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert sum("triton_kernel_wrapper" in target for target in targets) == 5  # L, S, N, and two of D
    assert not [target for target in targets if "dat_deploy" in target]


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("name", ["tiny", "pp-tiny"])
def test_the_packages_of_real_networks(
    name: str, request: pytest.FixtureRequest, noise: np.ndarray, tmp_path: Path
) -> None:
    model: DAT = request.getfixturevalue(f"{name.replace('-', '_')}_model")
    said: list[str] = []
    report: Callable[[str], None] = said.append
    compile_package(model, model.variant, tmp_path / f"{name}.pt2", batches=[1, 3], progress=report)
    assert said == ["compiling batch 1", "compiling batch 3", "writing the package"]
    answers = answers_of_a_stranger(tmp_path / f"{name}.pt2", noise[:3], tmp_path)
    assert max(errors(model, answers, noise[:3])) < TOLERANCE
