"""Machine code for a GPU that is not here: `make gpu-kit` writes it, and `make bench-gpu` launches it.

    python benchmarks/gpu_kit.py [--triton 3.6.0] [--architecture 90] [--python 3.12]

A kit holds every launch that the benchmark makes, compiled by the Triton of that machine, and packages that it lacks.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu_cases import Case  # noqa: E402
from gpu_operators import dtypes_of  # noqa: E402
from gpu_plan import launches_of  # noqa: E402

from dat_deploy.benchmark.worker import end_with_parent  # noqa: E402
from dat_deploy.errors import DatDeployError, OutputError, UnsupportedError  # noqa: E402
from dat_deploy.plugins.precompiled import Entry, Needed, key, precompile, write_index  # noqa: E402
from dat_deploy.plugins.tensorrt.node import Node  # noqa: E402
from dat_deploy.precision import PRECISIONS  # noqa: E402

__all__ = ["launches", "needed"]

LARGEST_MIB = 40
PACKAGES = ("onnx-ir", "nvidia-ml-py")  # newer than that machine's; what torch reads clocks with


def launches(case: Case, precision: str, what: str) -> Iterator[Needed]:
    """Those of a case; `what` as in `gpu_operators.check`."""
    dtypes = dtypes_of(case, PRECISIONS[precision].dtype)
    node = Node.from_fields(case.operator, case.attributes)
    problem = node.problem(tuple(case.inputs.values()), tuple(dtypes.values())[:-1])
    for configuration in node.kernel.configurations(problem)[: None if what == "configurations" else 1]:
        launch = node.kernel.launch(problem, configuration)
        yield launch, dtypes, launch.inputs if what == "unaligned" else ()


def needed() -> Iterator[Needed]:
    """All that the benchmark launches, each once."""
    seen = set()
    for case, precision, what in launches_of():
        for each in launches(case, precision, what):
            if key(*each) not in seen:
                seen.add(key(*each))
                yield each


def _part(folder: Path, architecture: int, part: int, parts: int) -> dict[str, Entry]:
    end_with_parent()
    return precompile((each for i, each in enumerate(needed()) if i % parts == part), folder, architecture)


def compile_all(folder: Path, architecture: int) -> None:
    """With the Triton that this process imports; what the assembler says of each goes into resources.txt."""
    import triton

    end_with_parent()
    parts = os.cpu_count() or 1
    chunks, entries = 12 * parts, {}  # of which each, when it is done, is told of
    with ProcessPoolExecutor(parts, get_context("spawn")) as pool:
        jobs = [pool.submit(_part, folder, architecture, part, chunks) for part in range(chunks)]
        for count, job in enumerate(as_completed(jobs), start=1):
            entries |= job.result()
            print(f"compiled {len(entries)} launches, part {count} of {chunks}", flush=True)
    write_index(folder, architecture, entries, triton=triton.__version__)
    lines = [f"{'kernel':<30} registers spilled  shared   bytes  launch"]
    for each in sorted(entries.values(), key=lambda entry: (entry.name, entry.launch)):
        sizes = f"{each.registers:9d} {each.spilled_bytes:7d} {each.shared_memory_bytes:7d} {each.code_bytes:7d}"
        lines.append(f"{each.name:<30} {sizes}  {each.launch}")
    (folder / "resources.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    for name in sorted({each.name for each in entries.values()}):
        mine = [each for each in entries.values() if each.name == name]
        most = [max(getattr(each, field) for each in mine) for field in ("registers", "shared_memory_bytes")]
        spill = sum(each.spilled_bytes > 0 for each in mine)
        print(f"{name:<30} {len(mine):4d} launches, at most {most[0]} registers and {most[1]} bytes of shared memory, "
              f"{spill} spill registers")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu-kit")
    parser.add_argument("--triton", default="3.6.0", help="the version that the machine has")
    parser.add_argument("--python", default="3.12", help="the version that the machine has")
    parser.add_argument("--architecture", type=int, default=90, help="the GPU's compute capability times ten")
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_all(options.compile, options.architecture)
        return 0
    from dat_deploy.plugins.ptx import ARCHITECTURES

    if options.architecture not in ARCHITECTURES:
        known = ", ".join(map(str, ARCHITECTURES))
        raise UnsupportedError(f"--architecture is {options.architecture}; it takes {known}.")
    output = options.output
    if output.exists() and not (output.is_dir() and ((output / "index.json").is_file() or not any(output.iterdir()))):
        raise OutputError(f"--output {output} is no kit of an earlier call; choose a folder that is not there yet.")
    if not output.parent.is_dir():
        raise OutputError(f"--output {output}: its folder {output.parent} does not exist; make it first.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".gpu-kit.") as temporary:
        folder, compiler = Path(temporary, "kit"), Path(temporary, "triton")
        folder.mkdir()
        print(f"getting Triton {options.triton}; then it compiles for some minutes", flush=True)
        _run([*pip, "--target", str(compiler), f"triton=={options.triton}"])
        for_machine = ["--python-version", options.python, "--only-binary=:all:", "--target", str(folder / "site")]
        _run([*pip, *for_machine, "--constraint", str(ROOT / "constraints.txt"), *PACKAGES])
        command = [sys.executable, __file__, "--compile", str(folder), "--architecture", str(options.architecture)]
        _run(command, PYTHONPATH=str(compiler), TRITON_CACHE_DIR=str(Path(temporary, "cache")))
        mib = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        if mib > LARGEST_MIB:
            raise OutputError(f"the kit has {mib:.0f} MiB; at most {LARGEST_MIB} may travel.")
        if output.exists():
            output.replace(Path(temporary, "earlier"))
        folder.replace(output)
    print(f"{output}: {mib:.1f} MiB for sm_{options.architecture} and Triton {options.triton}; registers, spills and "
          f"memory of each launch are in resources.txt")  # fmt: skip
    return 0


def _run(command: list[str], **environment: Any) -> None:
    """Raises DatDeployError if it fails; it has then said why."""
    if subprocess.run(command, env=os.environ | environment).returncode:  # noqa: S603  # pip, and this file
        raise DatDeployError(f"failed: {' '.join(command[1:])}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DatDeployError as error:
        print(f"benchmarks/gpu_kit.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it; nothing was left
