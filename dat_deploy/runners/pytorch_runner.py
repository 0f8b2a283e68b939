"""PyTorch, eager or compiled: the reference that everything else is compared with."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dat_deploy.checkpoint import load_weights, model_from_weights
from dat_deploy.preprocess import Preprocessing
from dat_deploy.runners.base import EngineDescription, Images, Runner, available_cores
from dat_deploy.variants import get_variant

__all__ = ["PytorchRunner"]


class PytorchRunner(Runner):
    """A variant in PyTorch on the CPU, float32.

    Args:
        compiled: through torch.compile; the first call at each batch then takes a minute or so.
    """

    def __init__(
        self,
        variant: str,
        name: str,
        *,
        checkpoint: Path | None = None,
        image_size: tuple[int, int] | None = None,
        threads: int | None = None,
        compiled: bool = False,
    ) -> None:
        configuration = get_variant(variant)
        if image_size is not None:
            configuration = configuration.with_image_size(*image_size)
        weights = load_weights(configuration, checkpoint)
        torch.set_num_threads(threads or available_cores())
        self.model = model_from_weights(weights, configuration)
        self._forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.description = EngineDescription(
            name=name,
            runtime="pytorch-compile" if compiled else "pytorch",
            runtime_version=str(torch.__version__),  # TorchVersion would import torch where it is unpickled
            device="cpu",
            precision="fp32",
            variant=variant,
            image_size=configuration.image_size,
            batch=None,
            lowering=None,
            threads=torch.get_num_threads(),
            weights_sha256=weights.sha256,
            weights_source=weights.source,
            preprocessing=Preprocessing.from_variant(configuration),
        )

    @torch.inference_mode()
    def _run(self, images_nchw: Images) -> NDArray[np.float32]:
        return self._forward(torch.from_numpy(images_nchw)).numpy()  # type: ignore[no-any-return]  # untyped call

    def close(self) -> None:
        del self.model, self._forward
