"""What the assembler makes of the kernels: registers, and instructions a score in the loop over keys. Needs no GPU.

    python benchmarks/sass.py [--architecture 90] [--all] [--write | --output FOLDER]

Compiles with the Triton that this Python imports, and reads the machine code with its nvdisasm. A loop is counted
whole, with the sides of branches in it that are seldom taken; what surrounds it is not counted.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402  # the path comes first
from gpu_cases import Case, of_stage  # noqa: E402
from gpu_kit import launches  # noqa: E402
from gpu_plan import launches_of, stages  # noqa: E402
from table_reads import wavefronts  # noqa: E402

from dat_deploy.benchmark.worker import end_with_parent  # noqa: E402
from dat_deploy.errors import DatDeployError, OutputError, UnsupportedError  # noqa: E402
from dat_deploy.plugins.launch import Launch, ceil_div  # noqa: E402
from dat_deploy.plugins.ptx import compile_launch  # noqa: E402
from dat_deploy.plugins.tuning import kernels_hash  # noqa: E402

__all__ = ["RECORDS", "Instruction", "Row", "hottest", "kind", "parse", "record_name", "rows_of", "scores"]

RECORDS = ROOT / "benchmarks" / "results" / "sass"
KINDS = {
    "MUFU": "MUFU",
    "tensor": "HMMA HGMMA",
    "float": "FADD FCHK FFMA FMNMX FMNMX3 FMUL FSEL FSET FSETP",
    "half": "HADD2 HFMA2 HMNMX2 HMUL2 HSET2 HSETP2",
    "integer": "BMSK IABS IADD IADD3 IMAD IMNMX ISETP LEA LOP3 PRMT SEL SGXT SHF VIADD VIADDMNMX VIMNMX VIMNMX3",
    "conversion": "F2F F2FP F2I F2IP FRND I2F I2FP I2I I2IP",
    "shared": "ATOMS LDS LDSM STS STSM",
    "global": "LD LDG LDGSTS ST STG UBLKCP UTMALDG",
    "local": "LDL STL",  # spilled registers
    "shuffle": "MOVM SHFL",
    "other": "",  # control, uniform registers, moves, predicates
}
_KIND_OF = {name: each for each, names in KINDS.items() for name in names.split()}
_FROM_SHAPE = {
    "BLOCK_DIM", "CHANNELS", "DILATION", "HALF_PIXEL", "HEAD_DIM", "HEIGHT", "KERNEL_SIZE", "MASKED", "NUM_HEADS",
    "OFFSET_GROUPS", "SHIFT_SIZE", "TABLE_HEIGHT", "TABLE_WIDTH", "WIDTH", "WINDOW_SIZE",
}  # fmt: skip
_STATIC = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.\w(\d+)\s+\w+\[(\d+)\]")  # what inline assembly declares
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    """`operation` with its suffixes, such as FADD.FTZ; `predicate` is empty where it always runs."""

    predicate: str
    operation: str
    operands: str


@dataclass(frozen=True)
class Row:
    """What is known of a launch.

    Attributes:
        precision: of the tensors, but for tables and points; that and what else sets it apart from others of its shape.
        configuration: what is compiled in and does not follow from the shape.
        registers: of a thread; spilled_bytes: of a thread.
        shared_memory_bytes: of a program, with what inline assembly declares.
        counted: "loop", the hottest, or "program", the whole of it where no loop has scores.
        instructions: of a thread in one trip of that.
        scores_a_trip: that a program works out in it, padding included; of `deformable_sample` sampled values.
        padding: scores worked out for each that is asked for: queries and keys are filled up to tiles.
        a_score: instructions of a thread by kind, each padded score; times `padding`, each that is asked for.
        wavefronts_a_read: passes through the L1 cache or shared memory that a warp's read of the table of
            `deformable_attention` takes; None for others, and in records from before it was counted.
    """

    operator: str
    shape: str
    precision: str
    configuration: str
    registers: int
    spilled_bytes: int
    shared_memory_bytes: int
    counted: str
    instructions: int
    scores_a_trip: int
    padding: float
    a_score: dict[str, float]
    wavefronts_a_read: float | None = None

    @property
    def padded(self) -> float:
        """Instructions of a thread each padded score."""
        return sum(self.a_score.values())


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of what nvdisasm prints, and for each label the place of the next one."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(Instruction((found[1] or "").strip(), found[2], found[3]))
    return code, labels


def kind(instruction: Instruction) -> str:
    """One of KINDS; arithmetic with zeros that only moves or converts counts as what it does."""
    if instruction.operation.startswith(("IMAD.MOV", "IMAD.U32")) or ", -RZ, RZ," in instruction.operands:
        return "other"
    if instruction.operation == "HADD2.F32":
        return "conversion"
    return _KIND_OF.get(instruction.operation.split(".")[0], "other")


def _exponentials(code: Iterable[Instruction]) -> int:
    return sum(each.operation.startswith("MUFU.EX2") for each in code)


def hottest(code: list[Instruction], labels: dict[str, int], exponentials: float) -> tuple[str, list[Instruction]]:
    """("loop", the innermost one that has exponentials); if there is none ("program", the code to its last EXIT).

    Of several the one with about as many exponentials as a thread should have, and of those the one of fewest
    instructions: `deformable_attention` has others for points far outside.
    """
    ends: dict[int, int] = {}  # by the start of a loop, of the last branch back to it
    for i, each in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", each.operands) if each.operation.startswith("BRA") else None
        start = labels.get(target[1], i) if target else i
        leaves = any(other.operation == "EXIT" and not other.predicate for other in code[start:i])
        if start < i and not leaves:  # else it comes back from code that was moved behind the end
            ends[start] = i + 1
    spans = [span for span in ends.items() if _exponentials(code[slice(*span)])]
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    if inner:

        def rank(span: tuple[int, int]) -> tuple[int, int]:
            return round(abs(math.log2(_exponentials(code[slice(*span)]) / exponentials))), span[1] - span[0]

        return "loop", code[slice(*min(inner, key=rank))]
    exits = [i for i, each in enumerate(code) if each.operation == "EXIT"]
    return "program", code[: exits[-1] + 1]


def scores(case: Case, launch: Launch) -> tuple[int, int]:
    """Those of one trip of the loop over keys, and of all programs, with padding; of a sample the sampled values.

    Raises:
        UnsupportedError: if the launch has constants of no form that is known here.
    """
    sizes = {name: int(value) for name, value in launch.constants.items()}
    across, pixels = sizes.get("KEY_COLUMNS"), case.window_size**2
    windows = case.batch * (case.height * case.width // max(pixels, 1))
    match case.operator, sizes:
        case "deformable_attention", {"ROWS_A_LANE": rows, "WARPS": warps, "COLUMN_TILES": tiles, "BLOCK_KEYS": keys}:
            trip, trips = rows * 16 * warps * keys, ceil_div(math.prod(case.sampled), keys)
            return trip, launch.programs * tiles * trips * trip
        case "deformable_attention", {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "BLOCK_KEYS": keys}:
            trip, trips = rows * columns * keys, ceil_div(math.prod(case.sampled), keys)
            return trip, launch.programs * trips * trip
        case "neighborhood_attention", {"WARP_TILES": warps, "IMAGES": images} if across:
            trip = warps * 16 * 8 * across
            return trip, launch.programs * trip * case.batch // ceil_div(case.batch, images)
        case "neighborhood_attention", {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "KEY_ROWS": key_rows} if across:
            trip = rows * columns * key_rows * across
            return trip, launch.programs * ceil_div(rows + case.kernel_size - 1, key_rows) * trip
        case "window_attention", {"BLOCK_QUERIES": queries, "KEYS": keys, "MORE_KEYS": more}:
            trip = queries * (keys + more)
            return trip, case.heads * windows * ceil_div(pixels, queries) * trip
        case "window_attention", {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "KEEP_BIAS": is_unrolled}:
            trips, trip = ceil_div(pixels, keys), queries * keys
            every = case.heads * windows * ceil_div(pixels, queries) * trips * trip
            return trip * (trips if is_unrolled else 1), every
        case "deformable_sample", {"BLOCK_POINTS": points, "BLOCK_CHANNELS": channels}:
            return points * channels, launch.programs * points * channels
    raise UnsupportedError(
        f"{case.operator} was launched with the constants {', '.join(sizes)}, of which it is not known how many scores "
        f"one trip of the loop has; add that form to scores() in benchmarks/sass.py."
    )


def disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.is_file():
        raise UnsupportedError(f"Triton {triton.__version__} comes without nvdisasm; install a wheel from PyPI.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True)  # noqa: S603  # Triton's
    return done.stdout


def rows_of(case: Case, precision: str, what: str, architecture: int) -> Iterator[Row]:
    """Of each launch of the case; `what` as in `gpu_operators.check`, but default is the first of each kernel."""
    each_kernel, seen = what == "default", set()
    for launch, dtypes, unaligned in launches(case, precision, "configurations" if each_kernel else what):
        if each_kernel and launch.kernel in seen:
            continue
        seen.add(launch.kernel)
        made = compile_launch(launch, dtypes, architecture, unaligned=unaligned)
        (trip, every), threads = scores(case, launch), 32 * launch.num_warps
        counted, code = hottest(*parse(disassemble(made.cubin)), trip / threads)
        exponentials = _exponentials(code) * threads / trip
        if case.exponentials and not 0.5 <= exponentials < 1.75:  # some are of the running maximum
            raise UnsupportedError(
                f"the {counted} of {case.operator}, {case.shape}, has {exponentials:.2f} exponentials for each of the "
                f"{trip} scores that a trip should have; mend scores() or hottest() in benchmarks/sass.py."
            )
        counts, a_read = Counter(map(kind, code)), wavefronts(case, launch.constants)
        own = [f"{name}={value}" for name, value in launch.constants.items() if name not in _FROM_SHAPE]
        yield Row(
            case.operator,
            case.shape,
            f"{precision}, unaligned" if unaligned else precision,
            " ".join([*own, *(f"{option}={value}" for option, value in launch.options.items())]),
            made.registers,
            made.spilled_bytes,
            made.shared_memory_bytes + sum(int(bits) // 8 * int(count) for bits, count in _STATIC.findall(made.ptx)),
            counted,
            len(code),
            trip,
            round(every / (case.exponentials or math.prod(case.output_shape)), 4),
            {name: round(counts[name] * threads / trip, 4) for name in KINDS},
            None if a_read is None else round(a_read, 2),
        )


def _job(arguments: tuple[Case, str, str, int]) -> list[Row]:
    end_with_parent()
    return list(rows_of(*arguments))


def markdown(rows: Iterable[Row], architecture: int) -> str:
    """A table of the rows."""
    head = ["operator", "shape", "precision", "configuration", "registers", "spilled B", "shared B", "counted"]
    head += ["padding", "a real score", "a score", *KINDS, "L1 wavefronts a read"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        sizes = [row.registers, row.spilled_bytes, f"{row.shared_memory_bytes:,}", row.counted, f"{row.padding:.2f}"]
        each = [row.padded * row.padding, row.padded, *row.a_score.values(), row.wavefronts_a_read]
        lines.append([row.operator, row.shape, row.precision, row.configuration, *map(str, sizes)])
        lines[-1] += [f"{value:.2f}" if value else "–" for value in each]
    return "\n".join([
        f"Instructions of a thread a score, in the hottest loop. Triton {triton.__version__}, sm_{architecture}.",
        "",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
        "`a score` and the kinds after it count padded scores, too; times `padding` they are what a real one costs.",
        "Of a program that is no loop all is counted; of `deformable_sample` for each value that is sampled.",
        "`L1 wavefronts a read` is how many passes through the L1 cache or shared memory a warp's read of the table of",
        "`deformable_attention` takes, worked out from its addresses for points as the GPU benchmark has them.",
        "Made by benchmarks/sass.py.",
    ])  # fmt: skip


def record_name(architecture: int) -> str:
    return f"triton-{triton.__version__}-sm_{architecture}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90, choices=(80, 90))
    parser.add_argument("--all", action="store_true", help="all that the GPU benchmark launches, not defaults alone")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--write", action="store_const", dest="output", const=RECORDS, help="into benchmarks/results")
    place.add_argument("--output", type=Path, help="write the table and a .json into this folder, too")
    options = parser.parse_args()
    if options.output and options.output.exists() and not options.output.is_dir():
        raise OutputError(f"--output {options.output} is a file; name a folder.")
    cases = launches_of() if options.all else ((c, "fp16", "default") for at in stages() for c in of_stage(*at))
    jobs = [(*each, options.architecture) for each in dict.fromkeys(cases)]
    found: dict[tuple[str, ...], Row] = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for rows in pool.map(_job, jobs):
            found |= {(row.operator, row.shape, row.precision, row.configuration): row for row in rows}
    rows = sorted(found.values(), key=lambda row: row.operator)  # else in the order of the benchmark
    table = markdown(rows, options.architecture)
    print(table)
    if options.output:
        path = options.output / f"{record_name(options.architecture)}{'-all' if options.all else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"triton": triton.__version__, "architecture": options.architecture, "kernels": kernels_hash()}
        record = json.dumps(about | {"launches": [asdict(row) for row in rows]}, indent=1)
        path.with_name(f"{path.name}.json").write_text(record + "\n", encoding="utf-8")
        path.with_name(f"{path.name}.md").write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DatDeployError as error:
        print(f"benchmarks/sass.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
