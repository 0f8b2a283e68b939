"""A deserialised engine of TensorRT or TensorRT-RTX on the GPU at hand."""

import statistics
import threading
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dat_deploy.engine.passport import Passport, Profile
from dat_deploy.engine.tensorrt.library import Log, reasons_against_gpu
from dat_deploy.environment import gpu_architecture
from dat_deploy.errors import EngineRunError, ShapeError, UnsupportedError
from dat_deploy.plugins.tensorrt.calls import last_error

__all__ = ["Session", "check_fits"]

_capturing = threading.Lock()  # while a stream captures, no other thread may synchronise the device
MOST_BATCHES = 8  # whose buffers and graphs are kept, of a profile that is a range


def check_fits(passport: Passport, trt: ModuleType, name: str) -> None:
    """Refuse an engine that was built for something else, before it is deserialised.

    Raises:
        UnsupportedError: if there is no GPU, or the engine is for another TensorRT or another architecture.
    """
    again = f"Build it again here: {passport.rebuild_command}"
    if trt.__version__ != passport.backend_version:
        raise UnsupportedError(
            f"{name} was built with {passport.backend} {passport.backend_version}, and {trt.__version__} is installed; "
            f"engines run on the version that built them. {again}"
        )
    architecture = gpu_architecture()
    if architecture is None:
        raise UnsupportedError(
            f"{name} needs an NVIDIA GPU, and torch {torch.__version__} sees none here. Run it where one is."
        )
    here = f"sm_{architecture}"
    if passport.architectures and here not in passport.architectures:
        raise UnsupportedError(
            f"{name} was built for {', '.join(passport.architectures)}, and the GPU here is {here}. {again}"
        )
    reasons = reasons_against_gpu(trt, passport.backend, architecture)
    if reasons:
        raise UnsupportedError(f'{"; ".join(reasons)}. Build with `backend="tensorrt"` or `"aotinductor"`.')


class Session:
    """An engine ready to run; one call at a time, in whatever thread: others wait.

    The first call at a batch allocates its buffers and captures a CUDA graph; later calls copy, replay and copy back,
    without Python in between. Call `check_fits` first.

    Args:
        content: the serialised engine, whose passport was checked.
        profiles: the batches that it takes, in the order of the engine's own profiles.
        cuda_graphs: capture graphs; without, every call is launched anew.

    Raises:
        EngineRunError: if TensorRT refuses the engine.
    """

    def __init__(
        self,
        trt: ModuleType,
        content: bytes,
        *,
        name: str,
        profiles: Sequence[Profile],
        outputs: Sequence[str],
        image_size: tuple[int, int],
        device: str = "cuda",
        cuda_graphs: bool = True,
    ) -> None:
        self._name, self._profiles, self._outputs, self._image_size = name, profiles, outputs, image_size
        self._device, self._cuda_graphs = device, cuda_graphs
        self._trt, self._log = trt, Log(trt)
        self._runtime = trt.Runtime(self._log.logger)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineRunError(f"TensorRT cannot open {name}; it said: {self._log.tail()}. Build it again here.")
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._lock = threading.Lock()
        self._bindings: OrderedDict[int, _Binding] = OrderedDict()

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Outputs by name for normalised images [B, 3, H, W]; both in host memory.

        Raises:
            ShapeError: if no profile takes that batch.
            EngineRunError: if the engine fails.
        """
        with self._lock, torch.cuda.stream(self._stream):
            binding = self._binding(images.shape[0])
            binding.host_image.numpy()[...] = images
            binding.image.copy_(binding.host_image, non_blocking=True)
            self._execute(binding)
            for name, result in binding.outputs.items():
                binding.host_outputs[name].copy_(result, non_blocking=True)
            self._stream.synchronize()
            return {name: result.numpy().copy() for name, result in binding.host_outputs.items()}

    def run_on_device(self, images: Tensor) -> dict[str, Tensor]:
        """The same for a CUDA tensor of any floating-point type; the results are on the device, of the caller's stream.

        Raises:
            ShapeError, EngineRunError: as `run`.
        """
        if images.device.type != self._device or tuple(images.shape[1:]) != (3, *self._image_size):
            raise ShapeError(
                f"{self._name} got images of shape {list(images.shape)} on {images.device}; it takes "
                f"[batch, 3, {self._image_size[0]}, {self._image_size[1]}] on a CUDA device."
            )
        caller = torch.cuda.current_stream()
        with self._lock:
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                binding = self._binding(images.shape[0])
                binding.image.copy_(images)
                self._execute(binding)
                results = {name: result.clone() for name, result in binding.outputs.items()}
            caller.wait_stream(self._stream)
            images.record_stream(self._stream)
            for result in results.values():
                result.record_stream(caller)
            return results

    def replay_ms(self, batch: int, times: int) -> float:
        """The median time of the engine alone on the device, without copies, in milliseconds."""
        milliseconds = []
        with self._lock, torch.cuda.stream(self._stream):
            binding = self._binding(batch)
            for _ in range(times):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
                start.record()
                self._execute(binding)
                end.record()
                end.synchronize()
                milliseconds.append(float(start.elapsed_time(end)))
        return statistics.median(milliseconds)

    def close(self) -> None:
        """Free the engine and its buffers."""
        with self._lock:
            self._stream.synchronize()  # what `run_on_device` started may still run
            self._bindings.clear()
            self._engine = self._runtime = None

    def _binding(self, batch: int) -> "_Binding":
        if self._engine is None:
            raise EngineRunError(f"{self._name} is closed; open it again.")
        if batch in self._bindings:
            self._bindings.move_to_end(batch)
            return self._bindings[batch]
        index = profile_of(self._profiles, batch, self._name)
        if len(self._bindings) >= max(MOST_BATCHES, len(self._profiles)):
            self._stream.synchronize()
            self._bindings.popitem(last=False)
        with _capturing:
            try:
                self._bindings[batch] = self._new_binding(batch, index)
            except RuntimeError as error:  # torch's, of CUDA: out of memory, or nothing can be captured
                text = " ".join(str(error).split())[:500]
                raise EngineRunError(
                    f"{self._name} cannot be made ready for batch {batch}: {text} Close other engines, or build it for "
                    f"smaller `batches`."
                ) from error
        return self._bindings[batch]

    def _new_binding(self, batch: int, index: int) -> "_Binding":
        context = self._context()
        if context is None:
            raise EngineRunError(
                f"TensorRT has no memory for another context of {self._name} at batch {batch}; it said: "
                f"{self._log.tail()}. Close other engines, or build it for smaller `batches`."
            )
        shape = (batch, 3, *self._image_size)
        several = self._engine.num_optimization_profiles > 1
        if (several and not context.set_optimization_profile_async(index, self._stream.cuda_stream)) or (
            not context.set_input_shape("image", shape)
        ):
            raise EngineRunError(
                f"{self._name} does not take its profile {index} at batch {batch}: {self._log.tail()}."
            )
        binding = _Binding(context, shape, {n: tuple(context.get_tensor_shape(n)) for n in self._outputs}, self._device)
        self._launch(binding)  # loads and, with TensorRT-RTX, compiles; neither can be captured
        self._stream.synchronize()
        if self._cuda_graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._launch(binding)
            binding.graph = graph
        return binding

    def _context(self) -> Any:
        """TensorRT-RTX compiles for the shapes at hand: at once, or a graph would keep what stands in till then."""
        if self._trt.__name__ != "tensorrt_rtx":
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self._engine.create_execution_context(config)

    def _execute(self, binding: "_Binding") -> None:
        if binding.graph is None:
            self._launch(binding)
        else:
            binding.graph.replay()

    def _launch(self, binding: "_Binding") -> None:
        last_error()  # of something earlier
        if not binding.context.execute_async_v3(self._stream.cuda_stream):
            plugin = last_error()
            if plugin is not None:
                raise EngineRunError(f"a plugin of {self._name} failed: {plugin}") from plugin
            raise EngineRunError(f"{self._name} failed; TensorRT said: {self._log.tail()}.")


class _Binding:
    """A context for one batch, with tensors at addresses that stay: on the device and, pinned, on the host."""

    def __init__(self, context: Any, shape: Sequence[int], outputs: dict[str, tuple[int, ...]], device: str) -> None:
        pinned = device == "cuda"
        self.context = context
        self.image = torch.zeros(tuple(shape), device=device)
        self.host_image = torch.zeros(tuple(shape), pin_memory=pinned)
        self.outputs = {name: torch.zeros(size, device=device) for name, size in outputs.items()}
        self.host_outputs = {name: torch.zeros(size, pin_memory=pinned) for name, size in outputs.items()}
        self.graph: torch.cuda.CUDAGraph | None = None
        for name, tensor in {"image": self.image, **self.outputs}.items():
            context.set_tensor_address(name, tensor.data_ptr())


def profile_of(profiles: Sequence[Profile], batch: int, name: str) -> int:
    """The index of the profile for this batch: the one that is best there, else the first that takes it.

    Raises:
        ShapeError: if none does.
    """
    taking = [i for i, profile in enumerate(profiles) if profile.least <= batch <= profile.most]
    if not taking:
        listing = ", ".join(map(str, profiles))
        raise ShapeError(
            f"{name} has no profile for batch {batch}; it takes {listing}. Split or fill up the batch, or build it "
            f"again with `batches={[*map(str, profiles), str(batch)]}`."
        )
    return min(taking, key=lambda i: abs(profiles[i].best - batch))
