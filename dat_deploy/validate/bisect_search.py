"""The search of `bisect`: few runs, over the tensors between the blocks, then between the operators of one."""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dat_deploy.errors import DatDeployError, VerificationError
from dat_deploy.export.boundaries import block_boundaries
from dat_deploy.export.records import OperatorRecord, operator_records
from dat_deploy.export.subgraph import model_up_to, operator_model
from dat_deploy.images.photographs import photographs
from dat_deploy.networks.family import Block, Step, family_of
from dat_deploy.networks.operators import operator_weights
from dat_deploy.plugins.eager import eager_output
from dat_deploy.plugins.operator import Operator
from dat_deploy.precision import PRECISIONS
from dat_deploy.progress import Progress
from dat_deploy.runners import Runner, open_runner
from dat_deploy.runners.base import Graph, graph_in_batches
from dat_deploy.validate.bisect_report import PHOTOGRAPHS, BisectReport, Run
from dat_deploy.validate.comparison import Comparison, joined
from dat_deploy.validate.defaults import FP32_TOLERANCE
from dat_deploy.validate.gates import default_gates
from dat_deploy.validate.hooks import captured
from dat_deploy.validate.overflow import first_overflow, kept_in_fp32
from dat_deploy.validate.reference import Reference, open_reference

__all__ = ["find_difference"]

Array = NDArray[Any]


def find_difference(
    engine: str,
    *,
    checkpoint: Path | None,
    images: Sequence[Path] | None,
    tolerance: float | None,
    reference: Reference | None,
    progress: Progress,
) -> BisectReport:
    """As `bisect`, whose arguments were checked."""
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_runner(engine, checkpoint=checkpoint))
        if reference is None:
            reference = stack.enter_context(open_reference(runner.description, checkpoint))
        else:
            reference.check_fits(runner.description)
        search = _Search(runner, reference, images, tolerance, progress)
        block, operator = search.find()
        is_inside = block is not None and operator is not None and operator.name != block.name
        return BisectReport(
            engine=runner.description,
            reference=reference.description,
            steps=tuple(search.runs),
            block=None if block is None else block.name,
            operator=operator.name if is_inside and operator is not None else None,
            part=search.part,
            hint=search.hint,
            blocks=search.blocks,
        )


class _LimitReachedError(Exception):
    """Only in networks of 4 or 5 blocks, of which none is released; `bisect` then names the block alone."""


class _Search:
    """The runs so far and what they are compared with.

    Attributes:
        part, hint: see `BisectReport`.
        blocks: attentions with their MLPs, which the limit of runs counts.
    """

    def __init__(
        self,
        runner: Runner,
        reference: Reference,
        images: Sequence[Path] | None,
        tolerance: float | None,
        progress: Progress,
    ) -> None:
        self.runner, self.reference, self.progress = runner, reference, progress
        self.about = runner.description
        self.network_blocks = list(family_of(self.about.network).blocks(self.about.network))
        if not self.network_blocks:
            raise DatDeployError(
                f"a network of family '{self.about.family}' cannot be cut into blocks, so none is found."
            )
        self.blocks = sum(any(step.operator != "" for step in block.steps) for block in self.network_blocks)
        self.limit = int(2 * math.log2(self.blocks or len(self.network_blocks)) + 4)
        self.runs: list[Run] = []
        self.part: str | None = None
        self.hint = ""
        assert self.about.path is not None  # `bisect` has refused what is no exported file
        self.model = ir.load(self.about.path)
        self.boundaries = block_boundaries(self.model.metadata_props)
        # the first of its module: `sampling_locations` calls the attention again, with values that are constant
        records = reversed(operator_records(self.model.metadata_props))
        self.records = {(r.name.partition("/")[0], r.operator): r for r in records}
        if not self.boundaries:
            raise DatDeployError(
                f"{self.about.name} does not list the tensors between its blocks: it was made by another version, or "
                f"edited. Export it again with: `export(variant={self.about.variant!r})`"
            )
        paths = list(images) if images else photographs(PHOTOGRAPHS)
        gates = default_gates(self.about.answer_precision)
        self.comparison = Comparison(
            runner, reference, self.about, paths, (1,), tolerance, gates, None, False, progress, lambda *_: None
        )
        self.images = self.comparison.photos
        if not images:
            self.images = np.concatenate([self.images, *self.comparison.stress.values()])
        precision = PRECISIONS[self.about.answer_precision]
        if tolerance is None and not precision.is_exported:
            raise DatDeployError(
                f"{self.about.name} is in {precision.name}, in which PyTorch's own error is not known. "
                f"Say what is allowed: `tolerance=0.01`"
            )
        self.scale = FP32_TOLERANCE if tolerance is None else tolerance
        self.dtype = precision.dtype if tolerance is None and precision.is_half else None
        self.exact: dict[tuple[str, str], Array] = {}
        self.tolerances: dict[tuple[str, str], float] = {}

    def find(self) -> tuple[Block | None, Step | None]:
        """The block and its operator; (None, None) if the outputs agree."""
        wrong = self.wrong_output()
        if wrong is None:
            return None, None
        blocks = self.blocks_before(wrong)
        self.compare([(block.steps[-1].module, block.steps[-1].side) for block in blocks[:-1]])
        while len(blocks) > 1:
            middle = _best_split(tuple(_worst_case(block) for block in blocks))
            blocks = blocks[middle:] if self.is_right(blocks[middle - 1]) else blocks[:middle]
        (block,) = blocks
        try:
            return block, self.inside(block)
        except _LimitReachedError:
            self.hint = f"which of its operators it is would take more than {self.limit} runs"
            return block, None

    def wrong_output(self) -> str | None:
        """The first output of the engine itself that is outside its tolerance."""
        self.progress("the whole engine")
        comparison = self.comparison
        outputs = self.runner.in_batches(self.images)
        count = len(comparison.photos)
        parts = [(comparison.tolerances, comparison.expected, slice(count), False)]
        if len(self.images) > count:
            stress = joined(list(comparison.stress_expected.values()))
            parts.append((comparison.stress_tolerances, stress, slice(count, None), True))
        if self.dtype is not None and comparison.lowered is not None:
            for name, error in (each for errors in comparison.lowered_errors for each in errors.items()):
                self.check_finite(name, comparison.expected[name], error)
        runs = []
        for tolerances, expected, part, is_stress in parts:
            for name, exact in expected.items():
                tolerance = tolerances[name]
                error = tolerance.error(outputs[name][part], exact)
                if not error <= tolerance.allowed:
                    tolerance = comparison.widened(tolerance, name, stress=is_stress)
                runs.append(Run(name, name, error, tolerance.allowed))
        wrong = [run for run in runs if not run.passed]
        worst = wrong[0] if wrong else max(runs, key=lambda run: run.error / run.tolerance if run.error else 0.0)
        self.runs.append(worst)
        return worst.place if wrong else None

    def blocks_before(self, output: str) -> list[Block]:
        """What an output follows from, in order; the last is cut short behind the step that it shows."""
        for end, block in enumerate(self.network_blocks):
            for i, step in enumerate(block.steps):
                if output in step.outputs:
                    # what shows an operator is another call of it, so nothing but that is looked at
                    steps = block.steps[i : i + 1] if step.operator else block.steps[: i + 1]
                    before = [each for each in self.network_blocks[:end] if not each.is_branch]
                    return [*before, replace(block, steps=steps)]
        raise AssertionError(f"no step shows output {output}")

    def inside(self, block: Block) -> Step:
        """The step of a wrong block whose result is wrong and whose input is right."""
        steps = list(block.steps)
        if len(steps) == 1:
            return steps[0]
        self.compare([(step.module, step.side) for step in steps[:-1]])
        parts = _Parts.of(block)
        if parts is None:
            return self.narrowed(block, steps)
        if not self.is_right(block, parts.chain[-1]):
            return self.narrowed(block, parts.chain)
        if not self.is_right_alone(block, parts.join):
            return parts.join
        if self.is_right(block, parts.join):
            return self.narrowed(block, parts.after)
        *suspects, likely, last = parts.sources  # one of its inputs is wrong, and what ends the chain is not
        for step in suspects:
            if not self.is_right(block, step):
                return step
        return last if len(self.runs) < self.limit and self.is_right(block, likely) else likely

    def narrowed(self, block: Block, steps: Sequence[Step]) -> Step:
        """Of steps in a chain, of which the last ends wrong and what is before the first is right."""
        tried_alone = False
        while len(steps) > 1:
            if len(steps) == 2 and steps[0].operator:
                tried_alone = True
                steps = steps[1:] if self.is_right_alone(block, steps[0]) else steps[:1]
                continue
            middle = len(steps) // 2
            steps = steps[middle:] if self.is_right(block, steps[middle - 1]) else steps[:middle]
        (step,) = steps
        may_try = bool(step.operator) and not tried_alone and len(self.runs) < self.limit
        if may_try and self.is_right_alone(block, step):
            self.hint = "fed with PyTorch's inputs it is right, so what is allowed of them may be too much"
        return step

    def is_right(self, block: Block, step: Step | None = None) -> bool:
        """Run the file up to the end of a block, or of one of its steps."""
        self.check_limit()
        name = block.name if step is None else f"{block.name}: {step.name}"
        step = step or block.steps[-1]
        tensor = self.tensor(block, step)
        self.progress(name)
        try:
            part = model_up_to(self.model, tensor)
        except ValueError as error:  # of onnx-ir, for a name that is not in the graph
            raise DatDeployError(
                f"{self.about.name} lists the tensor '{tensor}' after {name}, but has none of that name: it was "
                f"edited. Export it again with: `export(variant={self.about.variant!r})`"
            ) from error
        run = self.runner.open_graph(part)
        source = (step.module, step.side)
        values = graph_in_batches(self.about, run, {"image": self.images})
        outcome = Run(name, tensor, _error(values, self.exact[source]), self.tolerances[source])
        self.runs.append(outcome)
        if step.side == "locations" and not outcome.passed:
            swapped = _error(values, self.exact[source][..., ::-1])
            if swapped <= self.tolerances[source]:
                self.hint = "it behaves as if x and y of the locations were swapped"
        return outcome.passed

    def is_right_alone(self, block: Block, step: Step) -> bool:
        """Run one of our operators cut out of the file, on the inputs that PyTorch gives it."""
        self.check_limit()
        record = self.record(block, step)
        self.progress(f"{block.name}: {step.name} alone")
        graph = self.runner.open_graph(operator_model(self.model, record))
        inputs = {name: torch.from_numpy(value) for name, value in self.operator_inputs(block, step).items()}
        weights = operator_weights(self.reference.model, block, step)
        operator, attributes = Operator(record.operator), record.attributes
        exact = eager_output(operator.name, weights | inputs, attributes)
        tolerance = self.scale * max(1.0, float(np.abs(exact).max()))
        if self.dtype is not None:
            of_locations = self.dtype if self.about.rounds_locations else torch.float32
            rounded = eager_output(operator.name, weights | inputs, attributes, self.dtype, of_locations)
            tolerance = max(tolerance, 2 * float(np.abs(rounded - exact).max()))
        values = self.fed(graph, inputs)
        outcome = Run(f"{block.name}: {step.name} alone", record.output, _error(values, exact), tolerance)
        self.runs.append(outcome)
        if not outcome.passed:
            for part, without in operator.parts.items():  # without it, is the rest right?
                rest = without(inputs)
                if _error(self.fed(graph, rest), eager_output(operator.name, weights | rest, attributes)) <= tolerance:
                    self.part = part
            in_float64 = {name: value.double() for name, value in (weights | inputs).items()}
            with torch.inference_mode():
                for label, output in operator.mistakes(in_float64, attributes):
                    if _error(values, output.numpy()) <= tolerance:
                        self.hint = f"it behaves as if {label}"
                        break
        return outcome.passed

    def check_limit(self) -> None:
        if len(self.runs) >= self.limit:
            raise _LimitReachedError

    def fed(self, graph: Graph, inputs: Mapping[str, torch.Tensor]) -> Array:
        return graph_in_batches(self.about, graph, {name: value.numpy() for name, value in inputs.items()})

    def operator_inputs(self, block: Block, step: Step) -> dict[str, Array]:
        steps = {each.name: each for each in block.steps}
        sources = {name: steps[source] for name, source in step.inputs}
        return {name: self.exact[source.module, source.side] for name, source in sources.items()}

    def record(self, block: Block, step: Step) -> OperatorRecord:
        try:
            return self.records[block.name, step.name]
        except KeyError:
            raise DatDeployError(
                f"the metadata of {self.about.name} lists no {step.name} in {block.name}, so it cannot be cut out. "
                f"Export it again with: `export(variant={self.about.variant!r})`"
            ) from None

    def tensor(self, block: Block, step: Step) -> str:
        if step.operator:
            return self.record(block, step).output
        if step.side == "locations":
            reader = next(each for each in block.steps if step.name in dict(each.inputs).values())
            return self.record(block, reader).locations[0]
        return self.boundaries[step.ends]

    def networks(self) -> list[tuple[torch.nn.Module, torch.dtype]]:
        """The reference, with the type of its images, and in a lower precision the same network in that."""
        exact = (self.reference.model, torch.float32)
        return [exact] if self.dtype is None or self.comparison.lowered is None else [exact, self.comparison.lowered]

    def compare(self, sources: Sequence[tuple[str, str]]) -> None:
        """Let PyTorch make the tensors `sources`, and with them what each is allowed.

        In float32 that is FP32_TOLERANCE times the largest element: rounding errors grow with the numbers that are
        summed.
        """
        if not sources:
            return
        rounded = dict.fromkeys(sources, 0.0)
        arrays: dict[tuple[str, str], list[Array]] = {source: [] for source in sources}
        networks, lowered = self.networks(), (self.dtype, self.about.rounds_locations, self.comparison.kept)

        def inside(image: Array) -> list[dict[tuple[str, str], Array]]:
            return [captured(network, sources, image[None], dtype) for network, dtype in networks]

        for image in self.images:
            what = ("bisect", *lowered, *sources)
            exact, *lower = self.reference.remembered(what, image, functools.partial(inside, image))
            for source, value in exact.items():
                arrays[source].append(value)
                if lower:
                    rounded[source] = max(rounded[source], float(np.abs(lower[0][source] - value).max()))
        for source, values in arrays.items():
            value = np.concatenate(values)
            self.check_finite(f"the {source[1]} of {source[0]}", value, rounded[source])
            self.exact[source] = value
            self.tolerances[source] = max(self.scale * float(np.abs(value).max()), 2 * rounded[source])

    def check_finite(self, name: str, exact: Array, rounded: float) -> None:
        if not np.isfinite(exact).all():
            raise DatDeployError(
                f"PyTorch itself gives NaN or infinity as {name}, so there is nothing to compare "
                f"{self.about.name} with. Check the checkpoint and the images."
            )
        if not math.isfinite(rounded):
            assert self.comparison.lowered is not None
            network, takes = self.comparison.lowered
            module = (first_overflow(network, self.images, takes) or (name, 0))[0]
            raise VerificationError(
                f"eager PyTorch in {self.about.answer_precision} overflows first in {module}, so it cannot judge "
                f"{self.about.name}; {kept_in_fp32([module], self.about.answer_precision)}."
            )


def _error(values: Array, exact: Array) -> float:
    if values.shape != exact.shape:
        return math.inf
    return float(np.abs(values.astype(np.float64) - exact).max())  # NaN if the engine has one


@dataclass(frozen=True)
class _Parts:
    """Of a block in which two operators follow on each other.

    Attributes:
        chain: up to the first operator, each step from the one before.
        join: the last operator; after: what follows from it, each step from the one before.
        sources: of the last operator, but for those from which the first follows: steps between the two, in any order,
            then those of the chain.
    """

    chain: list[Step]
    join: Step
    after: list[Step]
    sources: list[Step]

    @classmethod
    def of(cls, block: Block) -> "_Parts | None":
        """None of a block that is a chain."""
        steps = list(block.steps)
        operators = [i for i, step in enumerate(steps) if step.operator]
        if len(operators) < 2 or operators[-1] == len(steps) - 1:
            return None
        first, last = operators[0], operators[-1]
        names = set(dict(steps[last].inputs).values()) - set(dict(steps[first].inputs).values())
        sources = [step for step in (*steps[first + 1 : last], *steps[:first]) if step.name in names]
        return cls(steps[: first + 1], steps[last], steps[last + 1 :], sources) if len(sources) > 1 else None


def _worst_case(block: Block) -> int:
    """Runs that `inside` may need."""
    parts = _Parts.of(block)
    if parts is None:
        return math.ceil(math.log2(len(block.steps)))
    behind = max(len(parts.sources) - 2, math.ceil(math.log2(len(parts.after))))
    return max(1 + math.ceil(math.log2(len(parts.chain))), 3 + behind)


@functools.cache
def _runs_needed(costs: tuple[int, ...]) -> int:
    """In the worst case, to find one among blocks that then cost `costs` runs each."""
    if len(costs) == 1:
        return costs[0]
    middle = _best_split(costs)
    return 1 + max(_runs_needed(costs[:middle]), _runs_needed(costs[middle:]))


@functools.cache
def _best_split(costs: tuple[int, ...]) -> int:
    """Where to cut blocks in two so that the worst case is the least; what one half gains, the other loses."""

    def worse_half(i: int) -> int:
        return max(_runs_needed(costs[:i]), _runs_needed(costs[i:]))

    low, high = 1, len(costs) - 1
    while low < high:
        middle = (low + high) // 2
        if _runs_needed(costs[:middle]) < _runs_needed(costs[middle:]):
            low = middle + 1
        else:
            high = middle
    return min(range(max(1, low - 1), low + 1), key=worse_half)


def _image(image: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(image[None]).to(dtype)


@torch.inference_mode()
def _outputs(network: torch.nn.Module, image: Array, dtype: torch.dtype) -> list[Array]:
    results = network(_image(image, dtype))
    return [result.float().numpy() for result in (results if isinstance(results, tuple) else (results,))]
