"""PyTorch, eager or compiled: the reference that everything else is compared with."""

import functools
from collections.abc import Sequence
from pathlib import Path

from dat_deploy.networks.family import Network, family_of, find_network
from dat_deploy.runners.base import EngineDescription, Images, Outputs, Runner
from dat_deploy.runners.runtime import Runtime

# torch is imported where a network is opened, so that the table of runtimes is light.

__all__ = ["RUNTIMES", "PytorchRunner"]


class PytorchRunner(Runner):
    """A variant in PyTorch on the CPU, float32.

    Args:
        variant: see `find_network`.
        sampled_points: see `Family.module`.
        compiled: through torch.compile; the first call at each batch then takes a minute or so.
    """

    def __init__(
        self,
        variant: str | Network,
        name: str,
        *,
        checkpoint: Path | None = None,
        image_size: tuple[int, int] | None = None,
        features: Sequence[int] | None = None,
        sampled_points: bool = False,
        threads: int | None = None,
        compiled: bool = False,
    ) -> None:
        import torch

        network = find_network(variant, image_size=image_size, features=features)
        family = family_of(network)
        weights = family.weights(network, checkpoint)
        self.model = family.module(network, weights, sampled_points=sampled_points)
        self._threads = threads
        self._forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.description = EngineDescription(
            name=name,
            runtime="pytorch-compile" if compiled else "pytorch",
            runtime_version=str(torch.__version__),  # TorchVersion would import torch where it is unpickled
            network=network,
            outputs=network.output_names(sampled_points=sampled_points),
            dynamic_image_size=network.takes_any_size and not compiled,
            threads=threads or torch.get_num_threads(),
            weights_sha256=weights.sha256,
            weights_source=weights.source,
            preprocessing=network.preprocessing,
            family=family.name,
        )

    def _run(self, images_nchw: Images) -> Outputs:
        import torch

        from dat_deploy.runners.torch_threads import torch_threads

        with torch.inference_mode(), torch_threads(self._threads):
            results = self._forward(torch.from_numpy(images_nchw))
        results = results if isinstance(results, tuple) else (results,)
        return {name: result.numpy() for name, result in zip(self.description.outputs, results, strict=True)}

    def close(self) -> None:
        del self.model, self._forward


RUNTIMES = (
    Runtime("pytorch", "VARIANT", "torch", "", "PyTorch, eager, fp32", PytorchRunner),
    Runtime(
        "pytorch-compile",
        "VARIANT",
        "torch",
        "",
        "PyTorch, torch.compile, fp32",
        functools.partial(PytorchRunner, compiled=True),
        any_size=False,
    ),
)
