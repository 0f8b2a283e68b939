"""How fast it is, and on what."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dat_deploy.commands.options import (
    BatchOption,
    CheckpointOption,
    FeaturesOption,
    ForceOption,
    JsonOption,
    VariantOption,
    check_pytorch_options,
    find_named,
    parse_features,
    parse_image_size,
    parse_numbers,
)
from dat_deploy.commands.output import check_json, err, out, print_next, table_of, write_json
from dat_deploy.commands.stages import Stages
from dat_deploy.commands.wording import in_shell

if TYPE_CHECKING:
    from dat_deploy.benchmark import Record

__all__ = ["bench", "compare", "doctor", "tune"]


def bench(
    engine: Annotated[list[str], typer.Option("--engine", help="As in validate; repeat it, all run side by side.")],
    checkpoint: CheckpointOption = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The engine that ratios refer to. Default: the first.")
    ] = None,
    batch: BatchOption = "1",
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="Where an engine has the choice: pytorch:VARIANT, dynamic files.")
    ] = None,
    features: FeaturesOption = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of each engine.")] = 5,
    seconds: Annotated[float, typer.Option("--seconds", help="Timed in each turn.")] = 1.0,
    threads: Annotated[int | None, typer.Option("--threads", help="Of each engine. Default: all cores.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the result to this PNG file.")] = None,
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Time engines side by side, each in its own process, in turns."""
    batches = parse_numbers(batch, "--batch")
    pixels = None if image_size is None else parse_image_size(image_size)
    feature_stages = parse_features(features)
    check_pytorch_options(engine, checkpoint, features)
    from dat_deploy import benchmark as library
    from dat_deploy.files import check_output

    if plot is not None:
        library.check_plot(plot)
    for path in (plot, json_file):
        if path is not None:
            check_output(path, force=force)
    with Stages("bench", err) as stages:
        record = library.benchmark(
            engine,
            batches=batches,
            rounds=rounds,
            seconds=seconds,
            threads=threads,
            checkpoint=checkpoint,
            image_size=pixels,
            features=feature_stages,
            baseline=baseline,
            progress=stages.count,
        )
    _print_record(record)
    busy = max(row.others_busy_cores for row in record.rows)
    if busy > 0.1 * record.hardware.cores:
        out.print(f"note: other processes kept up to {busy:.1f} cores busy meanwhile; repeat it on a quiet machine.")
    outputs = {", ".join(settings.outputs) for settings in record.settings.engines.values()}
    if len(outputs) > 1:
        out.print(f"note: these engines do not compute the same: some give {' and some '.join(sorted(outputs))}.")
    if json_file is not None:
        record.write(json_file, force=force)
    if plot is not None:
        with Stages("bench", err) as stages:
            stages.begin("drawing the plot")
            library.plot(record, plot, force=force)
        out.print(f"plot: {plot}")
    if json_file is not None:
        print_next("compare", json_file, "LATER.json")
    else:
        again = [word for name in engine for word in ("--engine", name)]
        for option, value in (("--checkpoint", checkpoint), ("--features", features), ("--image-size", image_size)):
            again += [] if value is None else [option, str(value)]
        print_next("bench", *again, "--json", "record.json", "--plot", "record.png")


def _print_record(record: "Record") -> None:
    table = table_of("engine", "precision", ">batch", ">p50 ms", ">p90 ms", ">p99 ms", ">images/s", ">ratio", ">range")
    for row in record.rows:
        ratio = row.latency_ratio
        table.add_row(
            row.engine,
            record.settings.engines[row.engine].precision,
            str(row.batch),
            f"{row.p50_ms:.2f}",
            f"{row.p90_ms:.2f}",
            f"{row.p99_ms:.2f}",
            f"{row.images_per_s:.1f}",
            f"{ratio.median:.3f}",
            f"{ratio.lowest:.3f} to {ratio.highest:.3f}",
        )
    out.print(table)
    hardware = record.hardware
    out.print(
        f"ratio: latency / latency of {record.settings.baseline}, round by round; below 1 is faster. "
        f"{hardware.cpu}, {hardware.cores} cores."
    )


def compare(
    first: Annotated[Path, typer.Argument(help="A record that bench --json wrote.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same settings on the same hardware.")],
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Compare two benchmark records; refused if their settings differ."""
    check_json(json_file, force=force)
    from dat_deploy.benchmark import Record
    from dat_deploy.benchmark import compare as compare_records

    comparison = compare_records(Record.read(first), Record.read(second))
    table = table_of("engine", ">batch", ">first ms", ">second ms", ">second / first", ">range")
    for row in comparison.rows:
        ratio = row.latency_ratio
        table.add_row(
            row.engine,
            str(row.batch),
            f"{row.first_ms:.2f}",
            f"{row.second_ms:.2f}",
            f"{ratio.median:.3f}",
            f"{ratio.lowest:.3f} to {ratio.highest:.3f}",
        )
    out.print(table)
    for name, (old, new) in comparison.versions.items():
        out.print(f"{name}: {old} and {new}")
    write_json(comparison, json_file, force=force)
    print_next("bench", "--help")


def tune(
    variant: VariantOption,
    batch: BatchOption = "1",
    image_size: Annotated[str | None, typer.Option("--image-size", help="Pixels: 224, or HEIGHTxWIDTH.")] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp16, bf16 or fp32.")] = "fp16",
    force: ForceOption = False,
    json_file: JsonOption = None,
) -> None:
    """Measure which configuration of each kernel is the fastest on this GPU; later runs take it.

    It is kept in ~/.cache/dat-deploy/configurations.json, or in the file that DAT_DEPLOY_CONFIGURATIONS names.
    """
    pixels = None if image_size is None else parse_image_size(image_size)
    batches = parse_numbers(batch, "--batch")
    check_json(json_file, force=force)
    with Stages("tune", err) as stages:
        from dat_deploy.benchmark.tune import tune as measure

        tuning = measure(
            find_named(variant),
            batches=batches,
            image_size=pixels,
            precision=precision,
            progress=stages.count,
        )
    table = table_of("operator", "problem", "fastest", ">us", ">default us")
    for row in tuning.launches:
        problem = row.problem
        size = "x".join(str(problem[name]) for name in ("batch", "height", "width"))
        tiles = " ".join(f"{name}={value}" for name, value in row.configuration.tiles)
        cells = (f"{tiles} warps={row.configuration.num_warps}", f"{row.microseconds:.1f}")
        default = "" if row.default_microseconds is None else f"{row.default_microseconds:.1f}"
        table.add_row(row.operator, size, *cells, default)
    out.print(table)
    wrong = [(row.operator, configuration) for row in tuning.launches for configuration in row.wrong]
    for operator, configuration in wrong:
        tiles = " ".join(f"{name}={value}" for name, value in configuration.tiles)
        err.print(
            f"{operator} with {tiles} computes something else on this GPU; it was left out. Report this as a bug."
        )
    out.print(f"kept for {tuning.gpu} in {tuning.path}")
    write_json(tuning, json_file, force=force)
    print_next("bench", "--engine", f"pytorch:{variant}")


def doctor(force: ForceOption = False, json_file: JsonOption = None) -> None:
    """Print what a bug report needs, and what can run here."""
    check_json(json_file, force=force)
    from dat_deploy import doctor as library

    with err.status("looking"):
        report = library.doctor()
    hardware = report.hardware
    table = Table(box=None, show_header=False)
    for name, version in report.versions.items():
        table.add_row(name, version)
    for name, installed in report.packages.items():
        table.add_row(name, installed or "not installed")
    table.add_row("commit", report.commit or "not a checkout")
    table.add_row("cpu", f"{hardware.cpu}, {hardware.cores} cores, {' '.join(hardware.cpu_flags)}")
    table.add_row("memory", f"{hardware.memory_gib} GiB")
    table.add_row("gpu", ", ".join(hardware.gpus) or "none")
    for runtime, reasons in report.runtimes.items():
        table.add_row(f"runs {runtime}", "; ".join(reasons) or "yes")
    for where, networks in report.lowerings.items():
        for network, verdicts in networks.items():
            table.add_row(f"lowerings, {where}", in_shell(f"{network}: {'; '.join(map(str, verdicts))}"))
    out.print(table)
    write_json(report, json_file, force=force)
    print_next("demo")
