"""INT8: QuantizeLinear and DequantizeLinear around the linear layers of an exported file, with ranges seen on images.

What is quantized: the inputs and weights of MatMul, Gemm and Conv of the network itself; products of data with constant
weights. Activations have one scale a tensor, weights one a channel; all are symmetric, as TensorRT needs them.

What stays in float32: everything that computes where the points are sampled, from the convolution of the offsets on;
what the operators compute, in nodes or inlined; LayerNormalization, biases and residuals; depthwise convolutions, which
are bound by memory and would only gain two conversions.

ONNX Runtime's calibration finds the ranges. Its own insertion would also feed the operators, which share their inputs
with linear layers, with rounded values; hence the insertion here, where each reader is chosen.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dat_deploy.errors import ExportError, ImageError, UnsupportedError
from dat_deploy.export.census import PrecisionCensus, precision_census
from dat_deploy.export.records import operator_records
from dat_deploy.files import atomic_output, check_output
from dat_deploy.images.preprocess import image_files, preprocess, read_image
from dat_deploy.metadata import Calibration, FileMetadata, load_onnx
from dat_deploy.precision import FULL, PRECISIONS
from dat_deploy.progress import Progress

# What loads a graph library or a runtime is imported after the checks, so that a wrong argument is told at once.

__all__ = ["METHODS", "QuantizeReport", "quantize"]

INT8 = PRECISIONS["int8"]

# How ONNX Runtime's calibrators are called there, and what they are told. Of Fashion-MNIST's test set `demo` has 91.83%
# right in fp32 and with these percentiles, whose mean error of a logit is the smallest, too; 91.77% with minmax, 91.73%
# with entropy.
METHODS = {
    "percentile": ("Percentile", {"symmetric": True, "num_bins": 2048, "percentile": 99.999}),
    "minmax": ("MinMax", {"symmetric": True}),
    # with its default of as many bins as quantized bins there would be one candidate, the whole range
    "entropy": ("Entropy", {"symmetric": True, "num_bins": 2048, "num_quantized_bins": 128}),
}


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` wrote.

    Attributes:
        layers: names of the nodes that compute in int8.
        census: what all nodes compute in.
        notes: images that were left out, or fewer than were asked for.
    """

    path: Path
    metadata: FileMetadata
    size_bytes: int
    nodes: int
    layers: tuple[str, ...]
    census: PrecisionCensus
    seconds: float
    notes: tuple[str, ...]


def quantize(
    source: Path,
    output: Path,
    data: Path,
    *,
    images: int = 512,
    method: str = "percentile",
    force: bool = False,
    progress: Progress = lambda _: None,
) -> QuantizeReport:
    """Write an exported file anew with its linear layers in int8.

    Args:
        source: a file of `export` in fp32, its operators as functions or inlined.
        output: written whole or not at all.
        data: a folder of images like those that the network will see, in folders or not; labels are not needed.
        images: how many of them to take at most, evenly spaced over the sorted names.
        method: one of METHODS, how ranges come from what was seen.
        force: replace `output` if it exists.
        progress: called with what is being done.

    Raises:
        DatDeployError: one of its subclasses for each thing that can be wrong with the arguments; UnsupportedError if
            ONNX Runtime is not installed.
    """
    start = time.monotonic()
    check_output(output, force=force)
    if method not in METHODS:
        raise ExportError(f"no calibration method '{method}'. Methods: {', '.join(METHODS)}.")
    if images < 1:
        raise ExportError(f"{images} images cannot calibrate anything; give a number from 1, such as 512.")
    progress("reading the file")
    proto = load_onnx(source)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    metadata = FileMetadata.from_properties(properties, source)
    _check_source(source, metadata)
    files = image_files(data)
    if importlib.util.find_spec("onnxruntime") is None:
        raise UnsupportedError(
            "quantize cannot run here: package onnxruntime is not installed: pip install 'dat-deploy[onnxruntime]'"
        )
    if not operator_records(properties):
        raise ExportError(
            f"the metadata of {source} no longer lists its operators, so what computes coordinates cannot be told from "
            f"the rest. Export it again."
        )
    import onnx_ir as ir

    from dat_deploy.export.quantized_graph import insert_quantization, linear_layers

    model = ir.from_proto(proto)
    layers = linear_layers(model)
    sample = [files[index * len(files) // images] for index in range(images)] if len(files) > images else files
    notes = []
    if len(files) < images:
        notes.append(f"{data} holds {len(files)} images, all of which were taken; {images} were asked for.")
    pictures = _Pictures(data, sample, metadata, progress)
    ranges = _calibrated(source, method, pictures)
    if pictures.unreadable:
        names = ", ".join(pictures.unreadable[:5]) + (", ..." if len(pictures.unreadable) > 5 else "")
        notes.append(f"{len(pictures.unreadable)} of {len(sample)} images cannot be read and were left out: {names}")
    progress("writing")
    insert_quantization(model, layers, ranges)
    import onnxruntime

    calibration = Calibration(
        folder=data.resolve().name,
        images=pictures.count,
        sha256=pictures.sha256(),
        method=method,
        library="onnxruntime",
        library_version=onnxruntime.__version__,
    )
    metadata = dataclasses.replace(metadata, precision=INT8.name, calibration=calibration)
    model.metadata_props.update(metadata.to_properties())
    with atomic_output(output, force=force) as temporary:
        ir.save(model, temporary)
    return QuantizeReport(
        path=output,
        metadata=metadata,
        size_bytes=output.stat().st_size,
        nodes=len(model.graph),
        layers=tuple(str(layer.name) for layer in layers),
        census=precision_census(load_onnx(output)),
        seconds=time.monotonic() - start,
        notes=tuple(notes),
    )


def _check_source(source: Path, metadata: FileMetadata) -> None:
    if metadata.precision != FULL.name:
        raise ExportError(
            f"{source} is {metadata.precision} already; quantize takes {FULL.name}. Export it again with "
            f'`precision="{FULL.name}"`, or find the file that it was made from.'
        )
    if metadata.lowering == "plugin":
        raise ExportError(
            f"{source} has lowering plugin, whose operators have no bodies that could run for calibration. Quantize "
            f"a file of another lowering: `relower(source={str(source)!r}, lowering='function')`"
        )


class _Pictures:
    """The chosen images, preprocessed as the file says, in batches that the file takes; what was read is recorded."""

    def __init__(self, folder: Path, files: Sequence[Path], metadata: FileMetadata, progress: Progress) -> None:
        self._folder = folder
        self._files = files
        self._rule = metadata.preprocessing
        self._batch = metadata.batch or 1
        self.progress = progress
        self._digest = hashlib.sha256()
        self.count = 0
        self.unreadable: list[str] = []

    def sha256(self) -> str:
        """Of the names, in the folder, and the bytes of the images that were read, in their order."""
        return self._digest.hexdigest()

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """[B, 3, H, W] each; the last one of a fixed batch is filled up with its own images.

        Raises:
            ImageError: if none of the images can be read.
        """
        batch: list[NDArray[np.float32]] = []
        for index, path in enumerate(self._files):
            self.progress(f"calibrating, image {index + 1} of {len(self._files)}")
            name = path.relative_to(self._folder).as_posix()
            try:
                content = path.read_bytes()
                batch.append(preprocess(read_image(path), self._rule))
            except (ImageError, OSError) as error:
                self.unreadable.append(name)
                failure = error
                continue
            self.count += 1
            for part in (os.fsencode(name), content):
                self._digest.update(len(part).to_bytes(8, "little") + part)
            if len(batch) == self._batch:
                yield np.stack(batch)
                batch = []
        if not self.count:
            raise ImageError(
                f"none of the {len(self._files)} images of folder {self._folder} can be read; the last: {failure}"
            ) from failure
        if batch:
            yield np.stack([batch[index % len(batch)] for index in range(self._batch)])


class _Feed:
    """One batch, as ONNX Runtime's calibrators want it: more at a time would keep every tensor of all of them."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._feeds: list[dict[str, NDArray[np.float32]]] = [{"image": images}]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return self._feeds.pop() if self._feeds else None


def _calibrated(source: Path, method: str, pictures: _Pictures) -> dict[str, float]:
    """The largest magnitude to represent, of each tensor around the linear layers, by name."""
    from onnxruntime import quantization

    kind, options = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(source, Path(folder, "model.onnx")))  # files are made beside it
        with _quietly(source):
            calibrator = quantization.create_calibrator(
                copy,
                ["MatMul", "Gemm", "Conv"],
                augmented_model_path=str(Path(folder, "augmented.onnx")),
                calibrate_method=quantization.CalibrationMethod[kind],
                extra_options=options,
            )
        for images in pictures.batches():
            with _quietly(source):
                calibrator.collect_data(_Feed(images))
        pictures.progress(f"finding ranges, {method}")
        with _quietly(source):
            ranges: Any = calibrator.compute_data()
    return {name: float(np.abs(np.array(tensor.range_value)).max()) for name, tensor in ranges.items()}


@contextlib.contextmanager
def _quietly(source: Path) -> Iterator[None]:
    """ONNX Runtime's calibration prints what it does and warns of what is not a number, which is refused later."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        text = " ".join(str(error).split()).rstrip(".")
        raise ExportError(f"ONNX Runtime cannot calibrate {source}: {text}. Validate that file first.") from error
