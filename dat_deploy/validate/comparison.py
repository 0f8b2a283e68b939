"""The two sides of a validation at one image size, and what the engine is held to there."""

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dat_deploy.engine.passport import read_passport
from dat_deploy.errors import DatDeployError, UnsupportedError, VerificationError
from dat_deploy.images.data_set import DataSet
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import preprocess_files
from dat_deploy.metadata import FileMetadata
from dat_deploy.precision import PRECISIONS, Precision
from dat_deploy.progress import Progress
from dat_deploy.runners import EngineDescription, Outputs, Runner
from dat_deploy.runners.base import Images
from dat_deploy.validate.accuracy import Accuracy
from dat_deploy.validate.defaults import FP32_TOLERANCE, OF_FLOAT32, OF_INT8, OF_LOWER, PHOTOGRAPHS
from dat_deploy.validate.drift import BlockDrift, Locations, engine_locations, network_locations
from dat_deploy.validate.gates import Gates
from dat_deploy.validate.reference import Reference
from dat_deploy.validate.stress import stress_images
from dat_deploy.validate.tolerance import Tolerance, spread_between

__all__ = ["Comparison", "joined"]

# At least: more than eight bits cost a sound network, less than a mixed-up slot or a swapped axis does.
INT8_SPREADS = 0.5
# Units in the last place of the answer: a class that is switched off by a bias of -1e4 has nothing else to differ by.
ULPS_OF_FLOAT32, ULPS_OF_LOWER = 4.0, 2.0
# A spread of fewer is an accident: others then count, too.
LEAST_IMAGES = 6
OF_DATA = 4.0
MOST_COMPARED = 32  # images, each with each other
# Times that the last bits of an image are changed, and by how much of each element: of what layer after layer rounds.
SHAKEN, SHAKEN_BY = 4, np.float32(2e-6)


@dataclass
class Comparison:
    """What the checks look at; what is slow to make is made when the first of them asks for it.

    Attributes:
        about: the engine, at the image size of this comparison.
        files: photographs of the user's own.
        batches: that were asked for.
        asked_tolerance: of every output; None for the default.
        data: see `compare_on_data`; strict_data, data_progress: likewise.
        accuracy, drift: for the report, where a check leaves them.
        engine_answers: the engine's to the photographs, by batch, as far as they were asked for.
    """

    runner: Runner
    reference: Reference
    about: EngineDescription
    files: Sequence[Path] | None
    batches: Sequence[int]
    asked_tolerance: float | None
    gates: Gates
    data: DataSet | None
    strict_data: bool
    progress: Progress
    data_progress: Callable[[int, int], None]
    accuracy: Accuracy | None = None
    engine_answers: dict[int, Outputs] = field(default_factory=dict)
    drift: tuple[BlockDrift, ...] = ()

    @cached_property
    def photos(self) -> Images:
        return preprocess_files(list(self.files) if self.files else photographs(PHOTOGRAPHS), self.about.preprocessing)

    @cached_property
    def expected(self) -> Outputs:
        """PyTorch's answers to the photographs; raises VerificationError if one is not finite."""
        self.progress("PyTorch")
        answers = [self.reference.answers(image[None]) for image in self.photos]
        for index, answer in enumerate(answers):
            self._check_finite(answer, f"photograph {index + 1}")
        return joined(answers)

    @cached_property
    def stress(self) -> dict[str, Images]:
        return stress_images(self.about.image_size)

    @cached_property
    def stress_expected(self) -> dict[str, Outputs]:
        """As `expected`."""
        answers = {label: self.reference.answers(image) for label, image in self.stress.items()}
        for label, answer in answers.items():
            self._check_finite(answer, f"stress image '{label}'")
        return answers

    def _check_finite(self, outputs: Outputs, image: str) -> None:
        for name, values in outputs.items():
            if not np.isfinite(values).all():
                raise VerificationError(
                    f"{self.reference.description.name} itself gives NaN or infinity as {name} of {image}, so no "
                    f"engine can be judged by it. Check the checkpoint."
                )

    @cached_property
    def precision(self) -> Precision:
        """That the answers were rounded to."""
        return PRECISIONS[self.about.answer_precision]

    @property
    def is_full(self) -> bool:
        """Whether nothing is rounded to less than float32."""
        return self.precision.is_exported and not self.precision.is_half

    @property
    def factor(self) -> float:
        """How many times PyTorch's own error an engine may have."""
        if self.is_full:
            return OF_FLOAT32
        return OF_LOWER if self.precision.is_half else OF_INT8

    @cached_property
    def different(self) -> tuple[Images, Outputs]:
        """Images that are to be told apart, and PyTorch's answers: the photographs, and where few of them differ, those
        that come with scikit-image, too; without it, stress images.
        """
        images = _unlike(self.photos)
        if len(images) < LEAST_IMAGES:
            try:
                more = preprocess_files(photographs(PHOTOGRAPHS), self.about.preprocessing)
            except DatDeployError:
                more = self._all_stress[0]
            images = _unlike(np.concatenate([images, more]))
        answers = [self.reference.answers(image[None]) for image in images]
        for index, answer in enumerate(answers):
            self._check_finite(answer, f"photograph {index + 1}")
        return images, joined(answers)

    @property
    def distinct(self) -> Outputs:
        """Of those the answers."""
        return self.different[1]

    @cached_property
    def scales(self) -> dict[str, Tolerance]:
        """Of each output: how far its answers to different images spread, and units in the last place."""
        return {name: self._scale(name, answers) for name, answers in self.distinct.items()}

    @cached_property
    def caps(self) -> dict[str, float]:
        """Of each output: the most that may be allowed, in its scale; see `Tolerance.cap`."""
        return {name: scale.cap(self.distinct[name][:MOST_COMPARED]) for name, scale in self.scales.items()}

    def _scale(self, output: str, answers: NDArray[np.float32]) -> Tolerance:
        axes = {each.name: each.channel_axis for each in self.about.network.outputs(sampled_points=True)}
        ulps = ULPS_OF_LOWER if self.precision.is_half else ULPS_OF_FLOAT32
        return spread_between(answers, axes[output], self.precision, ulps=ulps)

    @cached_property
    def tolerances(self) -> dict[str, Tolerance]:
        """Of each output on photographs: what is much for attention is little for a logit."""
        return self._tolerances(*self.different)

    @cached_property
    def stress_tolerances(self) -> dict[str, Tolerance]:
        """On stress images, which may err as much as a photograph."""
        tolerances = self._tolerances(*self._all_stress)
        return {
            name: max(tolerance, self.tolerances[name], key=lambda each: each.allowed)
            for name, tolerance in tolerances.items()
        }

    @cached_property
    def _all_stress(self) -> tuple[Images, Outputs]:
        return np.concatenate(list(self.stress.values())), joined(list(self.stress_expected.values()))

    @cached_property
    def default_tolerances(self) -> dict[str, Tolerance]:
        """As `tolerances` where none is asked for."""
        return self._derived(*self.different)

    def _tolerances(self, images: Images, expected: Outputs) -> dict[str, Tolerance]:
        if self.asked_tolerance is not None:
            return dict.fromkeys(expected, Tolerance.absolute(self.asked_tolerance, "`tolerance`"))
        return self._derived(images, expected)

    def _derived(self, images: Images, expected: Outputs) -> dict[str, Tolerance]:
        if self.is_full:
            basis = f"{FP32_TOLERANCE:g} of the spread between images"
            return {name: self._capped(name, FP32_TOLERANCE, basis) for name in expected}
        name = self.precision.name
        if self.lowered is None:  # of a family that has nothing to derive it from
            basis = f"{INT8_SPREADS:g} of the spread between images"
            return {output: self._capped(output, INT8_SPREADS, basis) for output in expected}
        errors = self._lowered_errors(images, expected)
        basis = f"{self.factor:g} times the error of eager PyTorch in {name}"
        if not self.precision.is_exported:
            basis += f", {INT8_SPREADS:g} of the spread between images at least"
            errors = {output: max(error, INT8_SPREADS / self.factor) for output, error in errors.items()}
        return {output: self._capped(output, self.factor * error, basis) for output, error in errors.items()}

    def _lowered_errors(self, images: Images, expected: Outputs) -> dict[str, float]:
        assert self.lowered is not None
        what = ("errors", self.precision.name, self.about.rounds_locations, self.kept)
        return self._errors(what, *self.lowered, images, expected)

    def clipped_error(self, label: str) -> float:
        """What eight bits alone may take a stress image off, in eager PyTorch, however far; 0 of other files."""
        if self.precision.is_exported or self.lowered is None or self.asked_tolerance is not None:
            return 0.0
        errors = self._lowered_errors(self.stress[label], self.stress_expected[label])
        return OF_INT8 * max(errors.values())

    @property
    def lowered_errors(self) -> list[dict[str, float]]:
        """Of eager PyTorch in the engine's lower precision, by output, in scales: on photographs, on stress images."""
        return [self._lowered_errors(*self.different), self._lowered_errors(*self._all_stress)]

    def widened(self, tolerance: Tolerance, name: str, *, stress: bool = False) -> Tolerance:
        """For an answer that is outside: in float32, as much as float32 itself errs in this network, if that is more.

        Most networks need none of it, and it takes PyTorch longer than all the rest.
        """
        if not self.is_full or not tolerance.unit:
            return tolerance
        allowed = self.factor * self._float32_errors[stress][name]
        if not allowed > tolerance.allowed:
            return tolerance
        return self._capped(name, allowed, f"{self.factor:g} times float32's own error")

    def data_scale(self, answers: NDArray[np.float32]) -> Tolerance:
        """Of logits on a data set, to whose images PyTorch gives `answers` [N, classes]."""
        tolerance = self.tolerances["logits"]
        if not tolerance.unit or len(answers) < LEAST_IMAGES:
            return tolerance
        scale, own = self._scale("logits", answers), self.scales["logits"]
        # images that are alike spread less than what the tolerance was derived from
        return replace(scale, scale=np.maximum(scale.scale, own.scale), floor=np.maximum(scale.floor, own.floor))

    @property
    def data_tolerance(self) -> Tolerance:
        """The same with what is allowed; thousands of images find rarer inputs than the photographs."""
        tolerance = self.tolerances["logits"]
        if not tolerance.unit or self.is_full:
            return tolerance
        wider = tolerance.at(OF_DATA * tolerance.allowed, f"{OF_DATA:g} times what the photographs are held to")
        return wider.capped(self.caps["logits"])

    def told_apart(self, outputs: Outputs, order: NDArray[np.int64]) -> tuple[int, int]:
        """How many of an engine's answers to images of `different`, in that order, can be told from another image's;
        and of how many another's is nearer than that of their own.
        """
        distances = np.zeros((len(order), len(self.different[0])))
        apart = np.zeros(distances.shape, bool)
        for name, expected in self.distinct.items():
            scale, allowed = self.scales[name], self.default_tolerances[name].allowed
            distances += np.square(scale.distances(outputs[name], expected))
            for row, own in enumerate(order):
                apart[row] |= np.array([scale.error(other, expected[own]) > 2 * allowed for other in expected])
        told = wrong = 0
        for row, own in enumerate(order):
            others = np.flatnonzero(apart[row])
            told += bool(others.size)
            wrong += bool(others.size) and not distances[row, own] <= distances[row, others].min()
        return told, wrong

    def _capped(self, name: str, allowed: float, basis: str) -> Tolerance:
        if not math.isfinite(allowed):  # NaN is no tolerance either
            allowed, basis = math.inf, f"eager PyTorch, which overflows in {self.precision.name}"
        return self.scales[name].at(max(allowed, FP32_TOLERANCE), basis).capped(self.caps[name])

    @cached_property
    def _in_float64(self) -> torch.nn.Module:
        return copy.deepcopy(self.reference.model).double()

    @cached_property
    def _float32_errors(self) -> dict[bool, dict[str, float]]:
        """Of eager PyTorch on the stress images and on the photographs: against itself in float64, and on images whose
        last bits differ, which shows what hangs on a bit.
        """
        self.progress("PyTorch in float64")
        return {False: self._own_errors(*self.different), True: self._own_errors(*self._all_stress)}

    def _own_errors(self, images: Images, expected: Outputs) -> dict[str, float]:
        noise = np.random.default_rng(0).uniform(-1, 1, (SHAKEN, *images.shape)).astype(np.float32)
        errors = [self._errors("float64", self._in_float64, torch.float64, images, expected)]
        for shaken in images * (1 + SHAKEN_BY * noise):
            errors.append(self._errors("shaken", self.reference.model, torch.float32, shaken, expected))
        return {name: float(np.max([each[name] for each in errors])) for name in expected}

    def _errors(
        self, what: Hashable, network: torch.nn.Module, takes: torch.dtype, images: Images, expected: Outputs
    ) -> dict[str, float]:
        """By how much another network differs from PyTorch, by output, in scales; NaN where it is one."""

        def compute() -> dict[str, NDArray[np.float64]]:
            with torch.inference_mode():
                results = [network(image[None].to(takes)) for image in torch.from_numpy(images)]
            parts = [result if isinstance(result, tuple) else (result,) for result in results]
            arrays = (torch.cat(each).double().numpy() for each in zip(*parts, strict=True))
            return dict(zip(expected, arrays, strict=True))

        answers = self.reference.remembered(what, images, compute)
        # what is left will be multiplied, as is what was left out
        scales = {name: replace(scale, floor=scale.floor / self.factor) for name, scale in self.scales.items()}
        return {name: scales[name].error(answers[name], values) for name, values in expected.items()}

    @cached_property
    def lowered(self) -> tuple[torch.nn.Module, torch.dtype] | None:
        """The network in the engine's lower precision, and the type of its images; None in float32, and where its
        family has none.
        """
        if self.precision.is_half:
            try:
                return self.reference.rounded(self.precision.dtype, self.about.rounds_locations, self.kept)
            except UnsupportedError:
                return None
        if self.is_full:
            return None
        quantized = self.reference.quantized(self.different[0])
        return None if quantized is None else (quantized, torch.float32)

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Modules that the engine was asked to keep in float32."""
        about = self.about
        if about.path is None or about.rounds_locations:
            return ()
        if self.onnx_model is not None:
            return FileMetadata.from_properties(dict(self.onnx_model.metadata_props), about.path).fp32_added
        return read_passport(about.path).metadata.fp32_added if about.file_kind == "engine" else ()

    @cached_property
    def drift_images(self) -> Images:
        """Those on which the two sides' sampling locations are compared."""
        count = self.about.batch or next((p.best for p in self.about.profiles), 4)
        return self.photos[np.arange(count) % len(self.photos)]

    @cached_property
    def locations(self) -> dict[str, Locations]:
        """What PyTorch's blocks sample on `drift_images`, by their names."""
        images, network, model = self.drift_images, self.about.network, self.reference.model
        return self.reference.remembered("locations", images, lambda: network_locations(network, model, images))

    @cached_property
    def lowered_locations(self) -> dict[str, Locations] | None:
        """The same in the engine's lower precision, if there is a `lowered`."""
        if self.lowered is None:
            return None
        what = ("locations", self.precision.name, self.about.rounds_locations, self.kept)
        return self._locations(what, *self.lowered)

    @cached_property
    def exact_locations(self) -> dict[str, Locations]:
        """The same in float64."""
        return self._locations("float64 locations", self._in_float64, torch.float64)

    def _locations(self, what: Hashable, network: torch.nn.Module, takes: torch.dtype) -> dict[str, Locations]:
        images = self.drift_images
        return self.reference.remembered(
            what, images, lambda: network_locations(self.about.network, network, images, takes)
        )

    @cached_property
    def engine_locations(self) -> dict[str, Locations] | None:
        """What the engine's do; None if it does not tell."""
        return engine_locations(
            self.runner,
            self.graph,
            self.drift_images,
            self.about.network.sampled_blocks,
            lambda b: self.progress(f"drift: {b}"),
        )

    @property
    def tried(self) -> list[int]:
        """Batches to run: of an engine with profiles, both ends and the best of each, too."""
        if self.about.batch:
            return [self.about.batch]
        own = {batch for profile in self.about.profiles for batch in (profile.least, profile.best, profile.most)}
        return sorted(own.union(batch for batch in self.batches if self.about.takes_batch(batch)))

    @cached_property
    def onnx_model(self) -> ir.Model | None:
        """The engine's file, if it is an exported one."""
        about = self.about
        return ir.load(about.path) if about.path is not None and about.file_kind == "exported" else None

    @property
    def graph(self) -> ir.Model | None:
        """The same, of a runtime that also runs parts of it."""
        return self.onnx_model if self.runner.takes_graphs else None


def _unlike(images: Images) -> Images:
    """Each once, in order."""
    return images[sorted({image.tobytes(): index for index, image in reversed(list(enumerate(images)))}.values())]


def joined(parts: Sequence[Outputs]) -> Outputs:
    """By name, one after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
