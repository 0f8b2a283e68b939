"""DAT, DAT+ and DAT++, a family of networks; what needs torch is imported when it is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING

from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.networks.family import Block, Family, Weights

if TYPE_CHECKING:
    import torch

    from dat_deploy.networks.dat.model import DAT

__all__ = ["FAMILY"]


class _DatFamily(Family):
    name = "dat"
    network_type = Variant
    names = tuple(VARIANTS)

    def find(self, name: str) -> Variant | None:
        """A released variant, or an official YAML file (`.yaml` or `.yml`); raises VariantError if that is refused."""
        if name.endswith((".yaml", ".yml")):
            from dat_deploy.networks.dat.configuration import variant_from_config

            return variant_from_config(Path(name))
        return VARIANTS.get(name)

    def weights(self, network: Variant, checkpoint: Path | None = None) -> Weights:
        from dat_deploy.networks.dat.checkpoint import load_weights

        return load_weights(network, checkpoint)

    def module(self, network: Variant, weights: Weights, *, fused: bool = False, sampled_points: bool = False) -> "DAT":
        from dat_deploy.networks.dat.checkpoint import model_from_weights

        return model_from_weights(weights, network, fused=fused, sampled_points=sampled_points)

    def blocks(self, network: Variant) -> list[Block]:
        from dat_deploy.networks.dat.boundaries import network_blocks

        return network_blocks(network)

    def sampling_locations(self, module: "torch.nn.Module", images: "torch.Tensor") -> "dict[str, torch.Tensor]":
        from dat_deploy.networks.dat.model import DAT

        assert isinstance(module, DAT)
        _, sampled = module.forward_features(images)
        return {name: points.locations for name, points in sampled.items()}

    def rounded(self, module: "torch.nn.Module", dtype: "torch.dtype") -> "DAT":
        from dat_deploy.networks.dat.model import DAT, half_network

        assert isinstance(module, DAT)
        return half_network(module, dtype)

    def quantized(self, module: "torch.nn.Module", images: "torch.Tensor") -> "torch.nn.Module":
        from dat_deploy.networks.quantized import quantized_network

        # what computes the sampling locations stays as it is
        return quantized_network(module, images, stays=lambda name: name.endswith(".pointwise"))


FAMILY = _DatFamily()
