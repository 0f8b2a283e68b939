"""The server image's entry point: nothing is served that was not built for this GPU and found right."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dat_deploy.engine.passport import (
    Passport,
    Profile,
    Verdict,
    read_passport,
    record_verdict,
    sha256,
    versions,
    write_engine,
    write_passport,
)
from dat_deploy.environment import tool_version
from dat_deploy.errors import (
    CheckpointError,
    DatDeployError,
    ExportError,
    OutputError,
    UnsupportedError,
    VerificationError,
)
from dat_deploy.metadata import read_metadata
from dat_deploy.serving.triton import entrypoint
from dat_deploy.serving.triton.entrypoint import (
    ContainerSettings,
    Requirements,
    Steps,
    architecture_of,
    check_arguments,
    prepare,
)

TENSORRT = "11.3.0.99"
HARDENED = [
    "--model-control-mode=none",
    "--strict-readiness=true",
    "--exit-on-error=true",
    "--disable-auto-complete-config",
]
PASSED = Verdict(True, "demo agrees", "2026-11-20T12:00:00+00:00", 23, (1, 2, 3, 8), None)
FAILED = replace(PASSED, passed=False, sentence="demo differs in 'slots'")


@dataclass
class Machine:
    """Steps that write down what was asked of them, on a machine with one H100 and a tritonserver."""

    capabilities: list[str] = field(default_factory=lambda: ["9.0"])
    bindings: str = TENSORRT
    library: tuple[int, ...] = (11, 3, 0)
    tritonserver: bool = True
    verdict: Verdict = PASSED
    plugin_form: str | None = "ahead-of-time"
    done: list[str] = field(default_factory=list)
    built: dict[str, object] = field(default_factory=dict)
    packaged: dict[str, object] = field(default_factory=dict)

    def steps(self) -> Steps:
        return Steps(
            find_program=lambda name: f"/opt/tritonserver/bin/{name}" if self.tritonserver else None,
            capabilities=lambda: self.capabilities,
            tensorrt=lambda: SimpleNamespace(__version__=self.bindings),  # type: ignore[arg-type, return-value]
            library=lambda trt: self.library,
            build=self._build,
            validate=self._validate,
            package=self._package,
        )

    def _build(self, source: Path, output: Path, *, batches: list[str], force: bool, progress: object) -> None:
        self.done.append("build")
        self.built = {"source": source, "output": output, "batches": batches, "force": force}
        write_engine(output, content := os.urandom(64), self.passport(source, content, batches), force=force)

    def passport(self, source: Path, content: bytes, batches: list[str]) -> Passport:
        return Passport(
            engine_sha256=sha256(content),
            engine_bytes=len(content),
            backend="tensorrt",
            backend_version=self.bindings,
            versions=versions(),
            architectures=tuple(f"sm_{c.replace('.', '')}" for c in self.capabilities),
            profiles=tuple(Profile.parse(batch) for batch in batches),
            outputs=("logits",),
            layers={},
            kinds={},
            engine_layers=None,
            plugins={},
            plugin_form=self.plugin_form,
            metadata=read_metadata(source),
            source=source.name,
            source_sha256=sha256(source.read_bytes()),
            rebuild=("dat-deploy", "build"),
        )

    def _validate(self, engine: str, *, checkpoint: Path | None, progress: object) -> SimpleNamespace:
        self.done.append("validate")
        runtime, _, path = engine.partition(":")
        if runtime == "tensorrt":
            record_verdict(Path(path), self.verdict, read_passport(Path(path)).engine_sha256)

        def raise_if_failed() -> None:
            if not self.verdict.passed:
                raise VerificationError(self.verdict.sentence)

        return SimpleNamespace(
            notes=(), raise_if_failed=raise_if_failed, date=self.verdict.date, verdict=self.verdict.sentence
        )

    def _package(self, engine: Path, output: Path, **options: object) -> None:
        self.done.append("package")
        self.packaged = {"engine": engine, "output": output, **options}


@pytest.fixture
def settings(demo_onnx: Path, tmp_path: Path) -> ContainerSettings:
    return ContainerSettings(model=demo_onnx, cache=tmp_path / "cache", repository=tmp_path / "models")


def engine_path(settings: ContainerSettings, architecture: int = 90) -> Path:
    source = hashlib.sha256(settings.model.read_bytes()).hexdigest()
    return settings.cache / f"demo-{source[:12]}-sm_{architecture}.engine"


@pytest.fixture
def engine(settings: ContainerSettings) -> Path:
    """Built and validated by an earlier start."""
    prepare(settings, Machine().steps())
    return engine_path(settings)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """`main` catches signals of its process, which is that of the tests."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_first_start_builds_validates_and_packages_in_that_order(settings: ContainerSettings) -> None:
    machine = Machine()
    command = prepare(settings, machine.steps())
    assert machine.done == ["build", "validate", "package"]
    engine = engine_path(settings)
    assert machine.built == {"source": settings.model, "output": engine, "batches": ["1-8-32"], "force": True}
    assert machine.packaged == {
        "engine": engine,
        "output": settings.repository,
        "name": "demo",
        "batches": [8, 32],
        "device": "gpu",
    }
    assert command == ["tritonserver", f"--model-repository={settings.repository}", *HARDENED]


def test_the_second_start_serves_the_same_engine_at_once(settings: ContainerSettings, engine: Path) -> None:
    machine, before = Machine(), engine.read_bytes()
    prepare(settings, machine.steps())
    assert machine.done == ["package"]
    assert engine.read_bytes() == before


def test_an_engine_whose_validation_was_interrupted_is_validated_not_built(
    settings: ContainerSettings, engine: Path
) -> None:
    write_passport(engine, replace(read_passport(engine), verdict=None), force=True)
    machine = Machine()
    prepare(settings, machine.steps())
    assert machine.done == ["validate", "package"]


@pytest.mark.parametrize("passed", [True, False])
def test_a_verdict_under_limits_of_somebody_else_does_not_count(
    settings: ContainerSettings, engine: Path, passed: bool
) -> None:
    lenient = replace(PASSED, passed=passed, tolerance=10.0)
    record_verdict(engine, lenient, read_passport(engine).engine_sha256)
    machine = Machine()
    prepare(settings, machine.steps())
    assert machine.done == ["validate", "package"]


WANTED = Requirements(TENSORRT, 90, "0" * 64, (Profile(1, 8, 32),), tool_version())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backend": "tensorrt-rtx"}, "backend is tensorrt-rtx, wanted tensorrt"),
        ({"backend_version": "11.2.1.2"}, "TensorRT is 11.2.1.2, wanted 11.3.0.99"),
        ({"architectures": ("sm_80",)}, "GPU is sm_80, wanted sm_90"),
        ({"source_sha256": "f" * 64}, "SHA-256 of the ONNX file is ffffffffffff, wanted 000000000000"),
        ({"source_sha256": None}, "SHA-256 of the ONNX file is none, wanted 000000000000"),
        ({"profiles": (Profile(1, 1, 1), Profile(8, 8, 8))}, "batch is 1,8, wanted 1-8-32"),
        ({"versions": {"dat-deploy": "0.0.1"}}, f"dat-deploy is 0.0.1, wanted {tool_version()}"),
        ({"plugin_form": "IPluginV3"}, "its plugins need Python, which tritonserver has not"),
        ({"verdict": FAILED}, "its validation failed: demo differs in 'slots'"),
        ({"verdict": PASSED}, None),
        ({}, None),
    ],
)
def test_what_differs_is_named(demo_onnx: Path, change: dict[str, object], reason: str | None) -> None:
    passport = replace(Machine().passport(demo_onnx, b"", ["1-8-32"]), source_sha256="0" * 64)
    changed = replace(passport, **change)  # type: ignore[arg-type]
    assert WANTED.differences(changed) == ([] if reason is None else [reason])


def test_another_gpu_has_an_engine_of_its_own_beside_the_first(settings: ContainerSettings, engine: Path) -> None:
    machine = Machine(capabilities=["8.9"])
    prepare(settings, machine.steps())
    assert machine.done == ["build", "validate", "package"]
    assert engine.is_file()
    assert engine_path(settings, 89).is_file()


def test_another_tensorrt_builds_anew_and_says_why(
    settings: ContainerSettings, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(bindings="11.4.0.106", library=(11, 4, 0))
    prepare(settings, machine.steps())
    assert machine.done == ["build", "validate", "package"]
    expected = f'event=build engine={engine} because="TensorRT is 11.3.0.99, wanted 11.4.0.106"'
    assert expected in capsys.readouterr().err


def test_a_damaged_engine_is_built_anew(settings: ContainerSettings, engine: Path) -> None:
    engine.write_bytes(b"damaged")
    machine = Machine()
    prepare(settings, machine.steps())
    assert machine.done == ["build", "validate", "package"]


def test_an_engine_that_is_wrong_is_never_served(
    settings: ContainerSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(verdict=FAILED)
    monkeypatch.setenv("DAT_DEPLOY_MODEL", str(settings.model))
    monkeypatch.setenv("DAT_DEPLOY_CACHE", str(settings.cache))
    assert entrypoint.main([], machine.steps(), _never) == 2
    assert machine.done == ["build", "validate"]
    expected = "dat-deploy level=error event=refused message=\"demo differs in 'slots'\" exit_code=2"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert entrypoint.main([], machine.steps(), _never) == 2
    assert machine.done == ["build", "validate"] * 2  # nor by a restart


def _never(command: list[str]) -> int:
    raise AssertionError("tritonserver was started")


def test_skipping_validation_is_the_users_word_and_is_logged(
    settings: ContainerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine()
    prepare(replace(settings, validate=False), machine.steps())
    assert machine.done == ["build", "package"]
    assert "level=warning event=not-validated" in capsys.readouterr().err
    machine = Machine()
    prepare(settings, machine.steps())  # taken back: what was built is caught up with
    assert machine.done == ["validate", "package"]


def test_weights_of_the_user_need_their_checkpoint_before_anything_is_built(
    settings: ContainerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = replace(read_metadata(settings.model), weights_source="dat_tiny_in1k_224.pth")
    monkeypatch.setattr(entrypoint, "read_metadata", lambda path: theirs)
    machine = Machine()
    with pytest.raises(CheckpointError) as caught:
        prepare(settings, machine.steps())
    assert str(caught.value) == (
        f"{settings.model} has the weights of 'dat_tiny_in1k_224.pth', and validation compares with PyTorch; mount "
        f"that file and name it in DAT_DEPLOY_CHECKPOINT, or serve unvalidated with DAT_DEPLOY_VALIDATE=skip."
    )
    assert machine.done == []
    checkpoint = tmp_path / "dat_tiny_in1k_224.pth"
    prepare(replace(settings, checkpoint=checkpoint), machine.steps())
    assert machine.done == ["build", "validate", "package"]
    prepare(settings, machine.steps())  # its verdict is in the passport: nothing to compare any more
    assert machine.done[3:] == ["package"]


def test_without_a_gpu_it_says_how_to_give_one(settings: ContainerSettings) -> None:
    machine = Machine(capabilities=[])
    with pytest.raises(UnsupportedError) as caught:
        prepare(settings, machine.steps())
    assert str(caught.value) == (
        "no NVIDIA GPU is visible in this container (nvidia-smi lists none); start it with --gpus all, or with "
        "--env DAT_DEPLOY_DEVICE=cpu to serve the ONNX file on ONNX Runtime."
    )
    assert machine.done == []


def test_gpus_of_several_kinds_are_refused() -> None:
    assert architecture_of(["9.0", "9.0 "]) == 90
    assert architecture_of(["12.0"]) == 120
    with pytest.raises(UnsupportedError) as caught:
        architecture_of(["9.0", "8.9"])
    assert str(caught.value) == (
        "the GPUs in this container have compute capabilities 8.9, 9.0, and an engine is for one; give it GPUs of one "
        "kind, such as --gpus device=0."
    )
    with pytest.raises(UnsupportedError, match=r"^nvidia-smi gives '\[N/A\]' for the compute capability"):
        architecture_of(["[N/A]"])


def test_bindings_of_another_tensorrt_than_the_servers_are_refused(settings: ContainerSettings) -> None:
    machine = Machine(library=(11, 1, 0))
    with pytest.raises(UnsupportedError) as caught:
        prepare(settings, machine.steps())
    assert str(caught.value) == (
        "TensorRT's Python bindings are of 11.3.0.99, and the library that tritonserver loads is 11.1.0; build the "
        "image with --build-arg TENSORRT_VERSION of its base image."
    )
    assert machine.done == []


def test_the_librarys_version_is_read_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX's has the same function, and is here."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt-rtx-cu13 is not installed")
    path = next(Path(spec.origin).parent.glob("libtensorrt_rtx.so.*"))
    opened = entrypoint.ctypes.CDLL(str(path))
    asked = []
    monkeypatch.setattr(entrypoint.ctypes, "CDLL", lambda name: asked.append(name) or opened)
    found = entrypoint.library_version(SimpleNamespace(__version__="11.3.0.99"))  # type: ignore[arg-type]
    installed = importlib.metadata.version("tensorrt-rtx-cu13")
    assert ".".join(map(str, found)) == ".".join(installed.split(".")[:3])
    assert asked == ["libnvinfer.so.11"]


def test_a_missing_library_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"^libnvinfer\.so\.99 cannot be loaded .* run this in the server image"):
        entrypoint.library_version(SimpleNamespace(__version__="99.0.0"))  # type: ignore[arg-type]


def test_without_tritonserver_nothing_is_built(settings: ContainerSettings) -> None:
    machine = Machine(tritonserver=False)
    with pytest.raises(UnsupportedError, match=r"^tritonserver is not on the PATH; run this in the server image"):
        prepare(settings, machine.steps())
    assert machine.done == []


def test_on_the_cpu_the_file_itself_is_validated_and_served(settings: ContainerSettings) -> None:
    machine = Machine(capabilities=[], tritonserver=True)
    prepare(replace(settings, device="cpu", name="shop"), machine.steps())
    assert machine.done == ["validate", "package"]
    assert machine.packaged["engine"] == settings.model
    assert (machine.packaged["device"], machine.packaged["name"]) == ("cpu", "shop")


def test_a_file_of_one_batch_is_packaged_for_that_batch(
    settings: ContainerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = replace(read_metadata(settings.model), batch=4)
    monkeypatch.setattr(entrypoint, "read_metadata", lambda path: fixed)
    machine = Machine()
    prepare(replace(settings, device="cpu"), machine.steps())
    assert machine.packaged["batches"] == [4]


@pytest.mark.parametrize(
    "word",
    [
        "--model-control-mode=explicit",
        "--model-control=poll",  # tritonserver takes beginnings, too
        "--strict-readiness",
        "--exit-on-error=false",
        "--strict-model-config=false",
        "--model-repository=/elsewhere",
        "--load-model=*",
        "--backend-directory=/elsewhere",
        "--backend-config=tensorrt,plugins=/elsewhere.so",
        "--allow-client-shm=true",
        "--model-config-name=other",
        "--",
    ],
)
def test_options_that_undo_the_hardening_are_refused(word: str) -> None:
    with pytest.raises(DatDeployError, match=rf"^option '{word.replace('*', '.')}' is not passed on to tritonserver: "):
        check_arguments(("--log-verbose=1", word))


def test_other_options_are_passed_on(settings: ContainerSettings) -> None:
    check_arguments(("--log-verbose=1", "--http-port", "9000"))
    command = prepare(replace(settings, arguments=("--log-verbose=1", "--http-port", "9000")), Machine().steps())
    assert command[-3:] == ["--log-verbose=1", "--http-port", "9000"]


def test_settings_are_read_from_the_environment(demo_onnx: Path) -> None:
    assert ContainerSettings.read({"DAT_DEPLOY_MODEL": str(demo_onnx), "DAT_DEPLOY_NAME": ""}, []) == ContainerSettings(
        model=demo_onnx
    )
    environment = {
        "DAT_DEPLOY_MODEL": str(demo_onnx),
        "DAT_DEPLOY_CHECKPOINT": str(demo_onnx),
        "DAT_DEPLOY_NAME": "shop",
        "DAT_DEPLOY_BATCH": "1,8,1",
        "DAT_DEPLOY_DEVICE": "cpu",
        "DAT_DEPLOY_VALIDATE": "skip",
        "DAT_DEPLOY_CACHE": "/cache",
        "DAT_DEPLOY_REPOSITORY": "/models",
    }
    profiles = (Profile(1, 1, 1), Profile(8, 8, 8))
    cache, repository = Path("/cache"), Path("/models")
    expected = ContainerSettings(demo_onnx, demo_onnx, "shop", profiles, "cpu", False, cache, repository)
    assert ContainerSettings.read(environment, []) == expected


@pytest.mark.parametrize(
    ("environment", "kind", "sentence"),
    [
        ({"DAT_DEPLOY_DEVICE": "tpu"}, DatDeployError, "DAT_DEPLOY_DEVICE got 'tpu'; it takes gpu or cpu."),
        ({"DAT_DEPLOY_VALIDATE": "no"}, DatDeployError, "DAT_DEPLOY_VALIDATE got 'no'; it takes auto or skip."),
        (
            {"DAT_DEPLOY_NAME": "../shop"},
            DatDeployError,
            "'../shop' cannot be a model's name; it takes up to 63 letters, ",
        ),
        ({"DAT_DEPLOY_BATCH": "many"}, DatDeployError, "`batches` got 'many'; "),
        ({"DAT_DEPLOY_MODEL": "/no.onnx"}, ExportError, "DAT_DEPLOY_MODEL: there is no file /no.onnx; mount "),
        ({"DAT_DEPLOY_CHECKPOINT": "/no.pth"}, CheckpointError, "DAT_DEPLOY_CHECKPOINT: there is no file /no.pth; "),
    ],
)
def test_wrong_settings_are_refused(
    demo_onnx: Path, environment: dict[str, str], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        ContainerSettings.read({"DAT_DEPLOY_MODEL": str(demo_onnx)} | environment, [])
    assert str(caught.value).startswith(sentence)


def test_a_repository_with_other_models_is_refused(settings: ContainerSettings) -> None:
    (settings.repository / "stranger").mkdir(parents=True)
    machine = Machine()
    with pytest.raises(OutputError) as caught:
        prepare(settings, machine.steps())
    assert str(caught.value) == (
        f"{settings.repository} holds stranger, which were not validated here; give DAT_DEPLOY_REPOSITORY a folder of "
        f"its own."
    )


def test_two_containers_on_one_volume_build_one_engine(
    settings: ContainerSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Machine(), Machine()
    lock = Path(f"{engine_path(settings)}.lock")
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=prepare, args=(settings, second.steps()))
        thread.start()
        deadline = time.monotonic() + 10
        while "event=wait" not in (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert f"event=wait lock={lock}" in said
        assert second.done == []
        content = b"an engine of the first"
        engine = engine_path(settings)
        passport = first.passport(settings.model, content, ["1-8-32"])
        write_engine(engine, content, replace(passport, verdict=PASSED))
    thread.join(10)
    assert second.done == ["package"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_volume_that_is_not_writable_is_named(settings: ContainerSettings) -> None:
    settings.cache.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match=r"mount a volume there that user \d+ may write"):
        prepare(settings, Machine().steps())


def test_a_cache_that_is_a_file_is_named(settings: ContainerSettings) -> None:
    settings.cache.write_text("")
    with pytest.raises(OutputError) as caught:
        prepare(settings, Machine().steps())
    assert str(caught.value) == (
        f"cannot write {engine_path(settings)}.lock: File exists; mount a volume there that user "
        f"{os.getuid()} may write."
    )


def test_a_line_of_the_log_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    entrypoint.log("build", because='a "quoted"\nline', path=Path("/a/b"), nothing="")
    expected = 'dat-deploy level=info event=build because="a \\"quoted\\"\\nline" path=/a/b nothing=""\n'
    assert capsys.readouterr().err == expected


# The module as the image runs it: programs of its own on the PATH, validation for real.


@pytest.fixture
def environment(demo_onnx: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Variables with a tritonserver on the PATH that writes down its words, and with what `nvidia-smi` prints."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def program(name: str, script: str) -> None:
        path = programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    program("tritonserver", f'echo "$$ $*" > {shlex.quote(str(tmp_path / "tritonserver.words"))}')
    program("nvidia-smi", "exit 9")

    def variables(*, nvidia_smi: str | None = None, **settings: str) -> dict[str, str]:
        if nvidia_smi is not None:
            program("nvidia-smi", f"echo {shlex.quote(nvidia_smi)}")
        return {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "DAT_DEPLOY_MODEL": str(demo_onnx),
            "DAT_DEPLOY_CACHE": str(tmp_path / "cache"),
            "DAT_DEPLOY_REPOSITORY": str(tmp_path / "models"),
        } | settings

    return variables


@pytest.fixture
def container(environment: Callable[..., dict[str, str]], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the entry point in a process of its own."""

    def start(*arguments: str, **settings: str) -> subprocess.Popen[str]:
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
        return subprocess.Popen(  # noqa: S603  # fixed words
            [sys.executable, "-m", "dat_deploy.serving.triton.entrypoint", *arguments],
            env=os.environ | paths | environment(**settings),
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )

    return start


def test_the_cpu_serves_what_was_validated(
    container: Callable[..., subprocess.Popen[str]], demo_onnx: Path, tmp_path: Path
) -> None:
    process = container("--log-verbose=1", DAT_DEPLOY_DEVICE="cpu")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    lines = [line for line in said.splitlines() if line.startswith("dat-deploy ")]
    assert [line.split()[2] for line in lines if "step=" not in line] == [
        "event=validate",
        "event=validated",
        "event=package",
        "event=serve",
    ]
    assert "agrees with pytorch:demo: 28 checks passed" in said
    pid, *words = (tmp_path / "tritonserver.words").read_text().split()
    assert int(pid) == process.pid  # tritonserver took this process over, and with it the signals of a container
    assert words == [f"--model-repository={tmp_path / 'models'}", *HARDENED, "--log-verbose=1"]
    assert (tmp_path / "models" / "demo" / "config.pbtxt").is_file()
    assert (tmp_path / "models" / "demo" / "1" / "model.onnx").read_bytes() == demo_onnx.read_bytes()


def test_a_container_ends_with_the_exit_code_of_what_was_refused(
    container: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = container()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 3, error
    refused = 'dat-deploy level=error event=refused message="no NVIDIA GPU is visible in this container '
    assert error.splitlines()[-1].startswith(refused)
    assert not (tmp_path / "tritonserver.words").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "said"),
    [
        ((), {"nvidia_smi": "9.0\n8.9"}, 3, "compute capabilities 8.9, 9.0"),
        ((), {"nvidia_smi": "9.0"}, 3, "backend tensorrt cannot be used here: package tensorrt is not installed"),
        (("--exit-on-error=false",), {"DAT_DEPLOY_DEVICE": "cpu"}, 1, "is not passed on to tritonserver"),
    ],
    ids=["two kinds of GPU", "no TensorRT", "an option that is refused"],
)
def test_what_cannot_be_served_ends_with_its_exit_code(
    environment: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    settings: dict[str, str],
    code: int,
    said: str,
) -> None:
    if "TensorRT" in said and importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    for name, value in environment(**settings).items():
        monkeypatch.setenv(name, value)
    assert entrypoint.main(arguments, become=_never) == code
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("dat-deploy level=error event=refused message=")


def test_a_container_that_is_stopped_while_it_validates_ends_at_once(
    container: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = container(DAT_DEPLOY_DEVICE="cpu")
    assert process.stderr is not None
    for line in process.stderr:
        if "event=validate step=" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert said.splitlines()[-1] == "dat-deploy level=info event=stop signal=SIGTERM"
    assert not (tmp_path / "tritonserver.words").exists()
