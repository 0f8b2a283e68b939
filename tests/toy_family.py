"""The smallest family of networks: one classifier of three convolutions, in one file. See test_family.py."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dat_deploy.images.preprocess import Preprocessing
from dat_deploy.networks.family import Answer, Family, Network, Output, Weights
from dat_deploy.networks.untrusted import read_tensors


@dataclass(frozen=True)
class Toy(Network):
    name: str = "toy"
    family: str = "Toy"
    image_size: tuple[int, int] = (32, 32)
    classes: tuple[str, ...] = ("cat", "dog", "lizard")

    @property
    def answer(self) -> Answer:
        return Answer("classes", self.classes)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(image_size=self.image_size, resize_size=(36, 36))

    def outputs(self, *, sampled_points: bool = False) -> tuple[Output, ...]:
        return (Output("logits", (len(self.classes),)),)


class ToyFamily(Family):
    name = "toy"
    network_type = Toy
    names = ("toy",)

    def find(self, name: str) -> Toy | None:
        return Toy() if name == "toy" else None

    def weights(self, network: Toy, checkpoint: Path | None = None) -> Weights:
        if checkpoint is not None:
            return Weights(read_tensors(checkpoint), checkpoint.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Weights(_model(network).state_dict(), "seeded random weights (seed 0)")

    def module(self, network: Toy, weights: Weights, *, fused: bool = False, sampled_points: bool = False) -> nn.Module:
        model = _model(network)
        model.load_state_dict(weights.state_dict, assign=True)
        return model.eval().requires_grad_(False)


def _model(network: Toy) -> nn.Module:
    widths = (3, 8, 16, 32)
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(narrow, wide, 3, 2, 1), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, len(network.classes)))


FAMILY = ToyFamily()
