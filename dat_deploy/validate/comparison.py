"""The two sides of a validation at one image size, and what the engine is held to there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from dat_deploy.errors import DatDeployError
from dat_deploy.images.data_set import DataSet
from dat_deploy.images.photographs import photographs
from dat_deploy.images.preprocess import preprocess_files
from dat_deploy.precision import PRECISIONS
from dat_deploy.progress import Progress
from dat_deploy.runners import EngineDescription, Outputs, Runner
from dat_deploy.runners.base import Images
from dat_deploy.validate.accuracy import Accuracy
from dat_deploy.validate.defaults import FP32_TOLERANCE, PHOTOGRAPHS
from dat_deploy.validate.drift import BlockDrift, Locations, engine_locations, network_locations
from dat_deploy.validate.gates import Gates
from dat_deploy.validate.reference import Reference
from dat_deploy.validate.stress import stress_images

__all__ = ["Comparison"]

# PyTorch has no eager int8 to compare with. Half the spread of the logits is far more than eight bits cost a sound
# network and less than a mixed-up slot or a swapped axis does; what eight bits cost is judged on labelled data.
INT8_SHARE_OF_SPREAD = 0.5


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
    drift: tuple[BlockDrift, ...] = ()

    @cached_property
    def photos(self) -> Images:
        return preprocess_files(list(self.files) if self.files else photographs(PHOTOGRAPHS), self.about.preprocessing)

    @cached_property
    def expected(self) -> Outputs:
        """PyTorch's answers to the photographs."""
        self.progress("PyTorch")
        return _joined([self.reference.answers(image[None]) for image in self.photos])

    @cached_property
    def stress(self) -> dict[str, Images]:
        return stress_images(self.about.image_size)

    @cached_property
    def stress_expected(self) -> dict[str, Outputs]:
        return {label: self.reference.answers(image) for label, image in self.stress.items()}

    @cached_property
    def tolerances(self) -> dict[str, float]:
        """One an output: what is much for attention is little for a logit."""
        if self.asked_tolerance is not None:
            return dict.fromkeys(self.about.outputs, self.asked_tolerance)
        expected = _joined([self.expected, *self.stress_expected.values()])
        precision = PRECISIONS[self.about.answer_precision]
        if not precision.is_exported:
            return {name: INT8_SHARE_OF_SPREAD * float(values.std()) for name, values in self.expected.items()}
        if not precision.is_half:
            return dict.fromkeys(expected, FP32_TOLERANCE)
        images = np.concatenate([self.photos, *self.stress.values()])
        errors = self.reference.remembered(("errors", *self.lowered), images, lambda: self._errors(images, expected))
        for name, error in errors.items():
            if not math.isfinite(error):
                raise DatDeployError(
                    f"eager PyTorch in {precision.name} overflows at {name}, so its error is no measure. "
                    f"Say what is allowed: `tolerance={FP32_TOLERANCE:g}`"
                )
        return {name: 2 * error for name, error in errors.items()}

    def _errors(self, images: Images, expected: Outputs) -> dict[str, float]:
        """The largest of eager PyTorch in the engine's half precision, by output; NaN where it is one."""
        network, takes = self.reference.rounded(*self.lowered)
        worst = dict.fromkeys(expected, 0.0)
        with torch.inference_mode():
            for i, image in enumerate(torch.from_numpy(images)):
                outputs = network(image[None].to(takes))
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                for (name, exact), rounded in zip(expected.items(), outputs, strict=True):
                    error = float(np.abs(rounded[0].float().numpy() - exact[i]).max())
                    worst[name] = float(np.maximum(worst[name], error))  # NaN stays
        return worst

    @property
    def lowered(self) -> tuple[torch.dtype, bool]:
        """The half precision that the engine computes in, and whether it rounds the locations, too."""
        return PRECISIONS[self.about.answer_precision].dtype, self.about.rounds_locations

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
    def rounded_locations(self) -> dict[str, Locations]:
        """The same in the engine's half precision."""
        images = self.drift_images
        half, takes = self.reference.rounded(*self.lowered)
        return self.reference.remembered(
            ("locations", *self.lowered), images, lambda: network_locations(self.about.network, half, images, takes)
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


def _joined(parts: Sequence[Outputs]) -> Outputs:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
