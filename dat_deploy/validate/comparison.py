"""The two sides of a validation at one image size, and what the engine is held to there."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from dat_deploy.errors import DatDeployError
from dat_deploy.metadata import read_metadata
from dat_deploy.model import DAT, half_network
from dat_deploy.photographs import photographs
from dat_deploy.preprocess import preprocess_files
from dat_deploy.runners import EngineDescription, Runner, parse_engine
from dat_deploy.runners.pytorch_runner import PytorchRunner
from dat_deploy.validate.data_set import DataSet
from dat_deploy.validate.drift import Locations, engine_locations, network_locations
from dat_deploy.validate.gates import Gates
from dat_deploy.validate.kinds import FP32_TOLERANCE, PHOTOGRAPHS
from dat_deploy.validate.stress import stress_images

__all__ = [
    "DTYPES",
    "Comparison",
    "Images",
    "Outputs",
    "joined",
    "open_reference",
    "precision_of",
    "rounds_everything",
]

# PyTorch has no eager int8 to compare with. Half the spread of the logits is far more than eight bits cost a sound
# network and less than a mixed-up slot or a swapped axis does; what eight bits cost is judged on labelled data.
INT8_SHARE_OF_SPREAD = 0.5
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

Images = NDArray[np.float32]
Outputs = dict[str, NDArray[np.float32]]
Progress = Callable[[str], None]


@dataclass
class Comparison:
    """What the checks look at; what is slow to make is made when the first of them asks for it.

    Attributes:
        about: the engine, at the image size of this comparison.
        files: photographs of the user's own.
        batches: that were asked for.
        asked_tolerance: of every output; None for the default.
        data: see `compare_on_data`; strict_data: likewise.
    """

    runner: Runner
    reference: PytorchRunner
    about: EngineDescription
    files: Sequence[Path] | None
    batches: Sequence[int]
    asked_tolerance: float | None
    gates: Gates
    data: DataSet | None
    strict_data: bool
    progress: Progress

    @cached_property
    def photos(self) -> Images:
        return preprocess_files(list(self.files) if self.files else photographs(PHOTOGRAPHS), self.about.preprocessing)

    @cached_property
    def expected(self) -> Outputs:
        """PyTorch's answers to the photographs."""
        self.progress("PyTorch")
        return joined([self.reference.outputs(image[None]) for image in self.photos])

    @cached_property
    def stress(self) -> dict[str, Images]:
        return stress_images(self.about.image_size)

    @cached_property
    def stress_expected(self) -> dict[str, Outputs]:
        return {label: self.reference.outputs(image) for label, image in self.stress.items()}

    @cached_property
    def tolerances(self) -> dict[str, float]:
        """One an output: what is much for attention is little for a logit."""
        if self.asked_tolerance is not None:
            return dict.fromkeys(self.about.outputs, self.asked_tolerance)
        expected = joined([self.expected, *self.stress_expected.values()])
        precision = precision_of(self.about)
        if precision == "fp32":
            return dict.fromkeys(expected, FP32_TOLERANCE)
        if precision == "int8":
            return {name: INT8_SHARE_OF_SPREAD * float(values.std()) for name, values in self.expected.items()}
        worst = dict.fromkeys(expected, 0.0)
        images = np.concatenate([self.photos, *self.stress.values()])
        with torch.inference_mode():
            for i, image in enumerate(torch.from_numpy(images)):
                outputs = self.rounded(image[None].to(self.rounded_input))
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                for (name, exact), rounded in zip(expected.items(), outputs, strict=True):
                    error = float(np.abs(rounded[0].float().numpy() - exact[i]).max())
                    if not math.isfinite(error):
                        raise DatDeployError(
                            f"eager PyTorch in {precision} overflows at {name}, so its error is no measure. "
                            f"Say what is allowed: --tolerance {FP32_TOLERANCE:g}"
                        )
                    worst[name] = max(worst[name], error)
        return {name: 2 * error for name, error in worst.items()}

    @cached_property
    def rounded(self) -> DAT:
        """Eager PyTorch in the engine's half precision."""
        dtype = DTYPES[precision_of(self.about)]
        if rounds_everything(self.about):
            return copy.deepcopy(self.reference.model).to(dtype)
        return half_network(self.reference.model, dtype)

    @property
    def rounded_input(self) -> torch.dtype:
        return DTYPES[precision_of(self.about)] if rounds_everything(self.about) else torch.float32

    @cached_property
    def drift_images(self) -> Images:
        """Those on which the two sides' sampling locations are compared."""
        count = self.about.batch or next((p.best for p in self.about.profiles), 4)
        return self.photos[np.arange(count) % len(self.photos)]

    @cached_property
    def locations(self) -> dict[str, Locations]:
        """What PyTorch's blocks sample on `drift_images`, by their names."""
        return network_locations(self.reference.model, self.drift_images)

    @cached_property
    def engine_locations(self) -> dict[str, Locations] | None:
        """What the engine's do; None if it does not tell."""
        return engine_locations(
            self.runner,
            self.onnx_model,
            self.drift_images,
            list(self.locations),
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
        """The engine's file, if it is an ONNX file."""
        _, target = parse_engine(self.about.name)
        return ir.load(target) if target.endswith(".onnx") else None


def joined(parts: Sequence[Outputs]) -> Outputs:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def open_reference(about: EngineDescription, checkpoint: Path | None) -> PytorchRunner:
    """Eager PyTorch with the network and the weights of an engine.

    Raises:
        DatDeployError: if the checkpoint, or what stands in for none, holds other weights, or the engine has other
            outputs.
    """
    with_points = any(name.startswith("sampling_locations") for name in about.outputs)
    name = f"pytorch:{about.variant}"
    reference = PytorchRunner(about.network, name, checkpoint=checkpoint, sampled_points=with_points)
    held = reference.description
    if held.weights_sha256 != about.weights_sha256:
        raise DatDeployError(
            f"{about.name} holds the weights of {about.weights_source} (sha256 {about.weights_sha256[:12]}), the "
            f"PyTorch side those of {held.weights_source} ({held.weights_sha256[:12]}). "
            f"Pass the same --checkpoint that it was exported with."
        )
    if set(about.outputs) != set(held.outputs):
        raise DatDeployError(
            f"{about.name} gives {', '.join(about.outputs)} where its network gives {', '.join(held.outputs)}, so they "
            f"cannot be compared. Export it again, and leave its outputs as they are."
        )
    return reference


def precision_of(about: EngineDescription) -> str:
    """In which the answer was rounded: a runtime may compute in float32 with the weights of a file in float16."""
    _, target = parse_engine(about.name)
    of_file = read_metadata(Path(target)).precision if target.endswith(".onnx") else about.precision
    return of_file if about.precision == "fp32" or of_file == "int8" else about.precision


def rounds_everything(about: EngineDescription) -> bool:
    """Whether the runtime lowers the precision by itself, of coordinates too, whatever the file says."""
    return about.runtime == "openvino" and about.precision not in ("fp32", "int8")
