"""Which rows are measured, in which order, with a guess of their seconds. Needs no torch.

What a row needs is imported when its turn comes: a row is a function of another module and its arguments.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from gpu_cases import BAR, Case, of_network, of_stage

from dat_deploy.networks.dat.variants import VARIANTS, Variant

__all__ = ["NETWORKS", "Job", "bar", "first", "launches_of", "second"]

NETWORKS = ("tiny", "base-384", "pp-tiny")
DETECTOR = ("pp-tiny", (800, 1344))
START_SECONDS, REPORT_SECONDS = 20.0, 15.0  # of a process with its imports; of the tables and the picture
PEERS = {
    "deformable_attention": ("fused", "eager", "sdpa", "compile", "flex", "flex+bias"),
    "window_attention": ("fused", "eager", "sdpa", "compile", "flex"),
    "neighborhood_attention": ("fused", "eager", "compile", "flex"),
    "deformable_sample": ("fused", "eager", "compile"),
}
# Guesses, until one of the kind was measured; what is compiled is measured as time is left.
SECONDS = {"fused": 0.7, "eager": 0.9, "sdpa": 0.8, "compile": 7.0, "flex": 9.0, "flex+bias": 7.0}
COMPILING_SECONDS = 90.0  # that a first compilation may take
COMPILED, ON_VIEWS = ("compile", "flex", "flex+bias"), ("unaligned", "graph")


@dataclass(frozen=True)
class Job:
    """A row to be measured.

    Attributes:
        call: MODULE:FUNCTION; it takes `arguments`, and of gpu, path and kit what it names.
        kind: jobs of one kind take about as long as each other.
        seconds: a guess of that, until one of the kind was measured; least_limit_seconds: it is not ended before.
        optional: as time is left.
    """

    part: str
    name: str
    call: str
    arguments: dict[str, Any]
    seconds: float
    kind: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    optional: bool = False
    least_limit_seconds: float = 30.0  # it may be the first to load some library

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}"


def stages() -> Iterator[tuple[Variant, int, int]]:
    """(network, stage, batch) of the shapes that matter, the targets' first."""
    yield VARIANTS[BAR[0]], *BAR[1:]
    yield VARIANTS[BAR[0]], BAR[1] + 1, BAR[2]
    yield VARIANTS["tiny"], 2, 64
    for batch, variant in ((64, VARIANTS["pp-tiny"]), (1, VARIANTS[DETECTOR[0]].with_image_size(*DETECTOR[1]))):
        for index in range(len(variant.stages)):
            yield variant, index, batch


def bar() -> Case:
    """`deformable_attention` at the shape of the project's targets."""
    return next(of_stage(VARIANTS[BAR[0]], *BAR[1:]))


def _checks() -> Iterator[Job]:
    """Every operator in the ways that it is launched, at shapes of each form that its kernel has; batch 3."""
    tiny, base, pp = (VARIANTS[name] for name in NETWORKS)
    large = VARIANTS[DETECTOR[0]].with_image_size(*DETECTOR[1])
    at = {
        "deformable_attention": ((base, 2), (tiny, 3), (pp, 0), (pp, 2), (large, 2)),
        "deformable_sample": ((base, 2), (tiny, 3), (pp, 0), (large, 1)),
        "window_attention": ((base, 0), (tiny, 0), (tiny, 3)),
        "neighborhood_attention": ((pp, 0), (pp, 2), (large, 2)),
    }
    others = [("default", "bf16"), ("default", "fp32"), *((what, "fp16") for what in ("configurations", *ON_VIEWS))]
    for operator, shapes in at.items():
        found = [case for variant, i in shapes for case in of_stage(variant, i, 3) if case.operator == operator]
        if operator == "neighborhood_attention":
            found.append(replace(found[0], height=5, width=9))  # smaller than a neighborhood: padded
        for case, what, dtype in [
            *((case, "default", "fp16") for case in found),
            *((found[0], *how) for how in others),
        ]:
            labels = {"operator": operator, "shape": case.shape, "what": what, "precision": dtype}
            arguments, seconds = {"case": case, "what": what, "dtype": dtype}, 1.5 if what == "configurations" else 0.6
            name = " ".join(labels.values())
            yield Job("correctness", name, "gpu_operators:check", arguments, seconds, f"check {what}", labels)
    for name in (NETWORKS[0], NETWORKS[2]):
        for precision in ("fp32", "fp16"):
            labels = {"variant": name, "precision": precision}
            key = f"network {name} {precision}"
            yield Job("correctness", key, "gpu_networks:check", labels, 4.0, "check network", labels)


def _operators(variant: Variant, index: int, batch: int) -> Iterator[Job]:
    user = f"{variant.name} {variant.image_size[0]}x{variant.image_size[1]} stage {index + 1}"
    for case in of_stage(variant, index, batch):
        for peer in PEERS[case.operator]:
            labels = {"operator": case.operator, "for": user, "batch": str(batch), "shape": case.shape}
            labels |= {"implementation": peer} | ({"bar": "yes"} if case == bar() else {})
            key = f"{case.operator} {user}, {case.shape}, batch {batch}, {peer}"
            arguments = {"case": case, "name": peer}
            is_target = case == bar() and peer in ("compile", "flex")
            optional, seconds = peer in COMPILED and not is_target, SECONDS[peer]
            limit = COMPILING_SECONDS if peer in COMPILED else Job.least_limit_seconds
            yield Job("operators", key, "gpu_operators:measure", arguments, seconds, peer, labels, optional, limit)


def _networks(modes: Iterable[str], batches: Iterable[int], names: Iterable[str] = NETWORKS) -> Iterator[Job]:
    for batch, name, mode in itertools.product(batches, names, modes):
        labels = {"variant": name, "batch": str(batch), "mode": mode, "precision": "fp16"}
        arguments, optional = {"variant": name, "mode": mode, "batch": batch}, mode.endswith("compile")
        seconds, kind, key = 75.0 if optional else 3.5, f"network {mode} {name}", f"{name} batch {batch} {mode}"
        yield Job("networks", key, "gpu_networks:measure", arguments, seconds, kind, labels, optional)


def first() -> list[Job]:
    """What one call of seven minutes has, in order; of the optional rows, those of most value first."""
    jobs = [Job("ceilings", "ceilings", "gpu_operators:ceilings", {}, 8.0, "ceilings"), *_checks()]
    for name in NETWORKS:  # users tune, too
        arguments = {"variant": name, "batches": [1, 64, 128]}
        jobs.append(Job("operators", f"tune {name}", "gpu_networks:tune", arguments, 8.0, "tune", {"variant": name}))
    rows = [row for stage in stages() for row in _operators(*stage)]
    # What needs no compiler first, then the compiled peers of the operator that this project is about.
    rows.sort(key=lambda row: row.optional * (1 + (row.labels["operator"] != "deformable_attention")))
    compiled = list(_networks(("compile", "fused+compile"), (128,)))
    bar_of_networks = replace(compiled[0], optional=False)  # one is worth more than the last of the compiled operators
    jobs += [*rows, *_networks(("fused", "eager"), (1, 128)), bar_of_networks, *compiled[1:]]
    for name in NETWORKS:
        arguments = {"variant": name, "batch": 128}
        jobs.append(Job("profile", name, "gpu_networks:profile", arguments, 4.0, "profile", {"variant": name}))
    return [*jobs, Job("ncu", "bar", "gpu_networks:ncu", {}, 30.0, "ncu")]


def second() -> list[Job]:
    """What a second call has: what others depend on, if it is not on record; what the first has not; its leftovers."""
    earlier = first()
    jobs = [job for job in earlier if job.part in ("ceilings", "correctness") or job.kind == "tune"]
    for mode in ("fused", "eager"):
        arguments = {"variant": DETECTOR[0], "size": DETECTOR[1], "mode": mode, "batch": 1}
        jobs.append(
            Job("memory", mode, "gpu_networks:measure", arguments, 6.0, "memory", {"what": "memory", "mode": mode})
        )
    jobs += [*_networks(("fused", "eager"), (8, 64)), *_networks(("fused",), (128,), ("small", "base"))]
    jobs += [replace(job, optional=False) for job in _networks(("compile",), (128,))]
    arguments = {"variant": "tiny", "batches": [1, 128]}
    key, labels = "tiny aotinductor", {"variant": "tiny"}
    jobs.append(Job("engines", key, "gpu_networks:engine", arguments, 110.0, "aotinductor", labels, True))
    arguments = {"mark": "gpu", "seconds": 110.0}
    jobs.append(Job("tests", "gpu", "gpu_networks:tests", arguments, 110.0, "tests", {}, True))
    jobs += _networks(("fused+compile",), (128,))
    jobs += _networks(("compile", "fused+compile"), (1,))
    keys = {job.key for job in jobs}
    return [*jobs, *(replace(job, optional=True) for job in earlier if job.key not in keys)]


def launches_of() -> Iterator[tuple[Case, str, str]]:
    """(case, precision, what) of every kernel that the rows launch: `what` as in `gpu_operators.check`."""
    for job in first():
        if "case" in job.arguments and job.arguments.get("name", "fused") == "fused":
            yield job.arguments["case"], job.arguments.get("dtype", "fp16"), job.arguments.get("what", "default")
    networks = [VARIANTS[name] for name in (*NETWORKS, "small", "base")]
    for variant in [*networks, VARIANTS[DETECTOR[0]].with_image_size(*DETECTOR[1])]:
        for case in of_network(variant, 1):
            yield from ((case, "fp16", "configurations"), (case, "fp32", "default"))
