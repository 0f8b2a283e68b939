"""The Dockerfile, as far as it can be tried without a registry: its rules, its versions, and what enters the images."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from dat_deploy.engine.tensorrt.library import BELOW, LEAST
from dat_deploy.serving.triton.tritonserver import TRITON_TAG

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = ("packages", "packages-cli", "cli", "server")


def arguments(text: str) -> dict[str, str]:
    """ARG name -> default, of those that have one."""
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))


def stage(name: str) -> str:
    """The instructions of a stage, without comments and continued lines joined."""
    parts = re.split(r"^(?=FROM )", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE), flags=re.MULTILINE)
    found = [part for part in parts if re.match(rf"FROM \S+ AS {name}$", part, re.MULTILINE)]
    assert len(found) == 1
    return re.sub(r" *\\\n *", " ", found[0])


def instruction(name: str, keyword: str) -> str:
    """What stands behind the keyword's last use in a stage."""
    return re.findall(rf"^{keyword} (.+)$", stage(name), re.MULTILINE)[-1]


def is_supported(version: str) -> bool:
    parts = tuple(int(part) for part in version.split("."))
    return LEAST["tensorrt"] <= parts < BELOW["tensorrt"]


@pytest.fixture
def hadolint() -> str:
    found = shutil.which("hadolint") or shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip("hadolint is not installed; its wheel is for x86-64 Linux alone")
    return found


def lint(hadolint: str, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([hadolint, "--no-color", "-"], input=text, capture_output=True, text=True)  # noqa: S603


def test_hadolint_has_nothing_to_say(hadolint: str) -> None:
    done = lint(hadolint, DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("tritonserver:${TRITON_TAG} AS", "tritonserver:latest AS", "DL3007"),
        (" --no-install-recommends python3 ", " python3 ", "DL3015"),
        ('HEALTHCHECK NONE\nENTRYPOINT ["dat-deploy"]', "HEALTHCHECK NONE\nENTRYPOINT dat-deploy", "DL3025"),
    ],
)
def test_hadolint_would_say_something(hadolint: str, right: str, wrong: str, rule: str) -> None:
    assert DOCKERFILE.count(right) == 1
    done = lint(hadolint, DOCKERFILE.replace(right, wrong))
    assert rule in done.stdout
    assert done.returncode == 1


def test_each_ignored_rule_has_its_reason() -> None:
    ignored = re.findall(r"^# hadolint ignore=\S+(.*)$", DOCKERFILE, re.MULTILINE)
    assert ignored
    assert all(re.match(r"  # \w+", reason) for reason in ignored)


def test_the_servers_tensorrt_is_one_that_dat_deploy_takes() -> None:
    version = arguments(DOCKERFILE)["TENSORRT_VERSION"]
    assert re.fullmatch(r"\d+(\.\d+){3}", version)
    assert is_supported(version)


@pytest.mark.parametrize(
    ("version", "supported"),
    [("10.14.1.48", False), ("10.16.0.72", True), ("11.4.0.106", True), ("12.0.0.1", False)],
)
def test_a_tensorrt_out_of_range_would_be_seen(version: str, supported: bool) -> None:
    assert is_supported(version) is supported


@pytest.mark.parametrize("version", ["11.1.0.106", "11.2.1.2"])
def test_the_servers_tensorrt_is_none_of_those_whose_plugins_lose_memory(version: str) -> None:
    assert arguments(DOCKERFILE)["TENSORRT_VERSION"] != version


def test_every_base_image_is_pinned_by_a_tag() -> None:
    defaults = arguments(DOCKERFILE)
    for name in ("TRITON_TAG", "CUDA_TAG", "UBUNTU_TAG"):
        assert re.match(r"\d+\.\d+", defaults[name])
        assert "latest" not in defaults[name]
    assert defaults["TRITON_TAG"] == TRITON_TAG
    bases = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert [name for _, name in bases] == list(STAGES)
    for base, _ in bases:
        assert base in STAGES or re.fullmatch(r"[\w./-]+:\$\{[A-Z]+_TAG\}", base)


def test_cuda_of_the_cli_is_that_of_torch() -> None:
    """torch 2.13 asks for the wheels of CUDA 13.0; whoever moves one looks at the other."""
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert (pinned[1], arguments(DOCKERFILE)["CUDA_TAG"][:4]) == ("2.13", "13.0")


@pytest.mark.parametrize(
    ("tensorrt", "wanted", "code"),
    [
        ("11.3.0.99", "11.3.0.99", 0),
        ("11.3.0.99+cuda13.4", "11.3.0.99", 0),
        ("11.1.0.106", "11.3.0.99", 1),
        ("", "11.3.0.99", 1),
    ],
)
def test_the_build_stops_where_the_base_image_has_another_tensorrt(tensorrt: str, wanted: str, code: int) -> None:
    script = re.search(r"^RUN (if .*? fi)\b", stage("server"), re.MULTILINE)
    assert script is not None
    variables = {"TRT_VERSION": tensorrt, "TENSORRT_VERSION": wanted, "TRITON_TAG": "26.09-py3"}
    done = subprocess.run(["/bin/sh", "-c", script[1]], env=variables, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == code
    said = f"tritonserver:26.09-py3 has TensorRT {tensorrt}, not {wanted}; build with --build-arg TENSORRT_VERSION="
    assert done.stderr.startswith(said) is (code == 1)


@pytest.mark.parametrize("name", ["cli", "server"])
def test_an_image_runs_unprivileged_and_keeps_its_cache_in_a_volume(name: str) -> None:
    assert instruction(name, "USER") == "1000:1000"
    assert stage(name).index("USER ") > stage(name).rindex("RUN ")
    assert json.loads(instruction(name, "VOLUME")) == ["/var/cache/dat-deploy"]
    assert "HOME=/var/cache/dat-deploy" in stage(name)
    assert "org.opencontainers.image.licenses=" in stage(name)
    assert not re.search(r"gcc|build-essential|pip install", stage(name))  # compilers stay in the stages before


def test_the_server_starts_our_entry_point_and_is_asked_whether_it_is_ready() -> None:
    words = json.loads(instruction("server", "ENTRYPOINT"))
    assert words[:3] == ["/opt/nvidia/nvidia_entrypoint.sh", "/opt/dat-deploy/bin/python", "-I"]
    assert words[3] == "-m"
    assert importlib.util.find_spec(words[4]) is not None
    options, _, command = instruction("server", "HEALTHCHECK").partition(" CMD ")
    assert json.loads(command)[-1] == "http://127.0.0.1:8000/v2/health/ready"
    assert "--start-period=30m" in options
    assert instruction("server", "EXPOSE") == "8000 8001 8002"
    assert instruction("server", "STOPSIGNAL") == "SIGTERM"


def test_the_server_has_no_second_copy_of_tensorrts_libraries() -> None:
    assert "--from=packages /opt/dat-deploy" in stage("server")
    assert "tensorrt-cu13-libs" not in stage("packages")
    assert "--from=packages-cli /opt/dat-deploy" in stage("cli")
    assert "tensorrt-cu13-libs==${TENSORRT_VERSION}" in stage("packages-cli")


def test_the_extras_that_are_installed_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"'\.\[([\w,-]+)\]'", stage("packages"))
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


def context(folder: Path) -> Path:
    """What the stage `packages` has when it installs the package: what COPY names and .dockerignore lets through."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", stage("packages"), re.M) for word in line.split()
    }
    assert copied == allowed  # neither is asked for in vain
    folder.mkdir()
    for name in copied:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_package_is_whole_when_built_from_what_the_image_copies(tmp_path: Path) -> None:
    words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(context(tmp_path / "src"))]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)  # noqa: S603  # fixed
    if done.returncode and re.search(r"No matching distribution found for hatchling", done.stderr):
        pytest.skip("hatchling, which builds the package, is neither here nor on an index")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("dat_deploy-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dat_deploy").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in ours if not name.endswith(".py")}  # data: weights, labels, a page, licences
    assert ours - packed == set()
    assert not [name for name in packed if "tests" in name]
