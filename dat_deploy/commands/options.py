"""Options that several commands have, and how their texts are read."""

from pathlib import Path
from typing import Annotated

import typer

from dat_deploy.errors import DatDeployError
from dat_deploy.networks.family import Network, find_network, network_names, no_network

__all__ = [
    "BatchOption",
    "CheckpointOption",
    "EngineOption",
    "FeaturesOption",
    "ForceOption",
    "ImagesArgument",
    "JsonOption",
    "VariantOption",
    "check_pytorch_options",
    "find_named",
    "parse_features",
    "parse_image_size",
    "parse_number",
    "parse_numbers",
]

VariantOption = Annotated[str, typer.Option("--variant", help=f"One of: {', '.join(network_names(own=True))}.")]
FeaturesOption = Annotated[
    str | None,
    typer.Option("--features", help="Stages, such as 0,1,2,3: their maps instead of logits, for use as a backbone."),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="Official .pth or .safetensors file. Without it: random weights; demo has its own."
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="FILE.onnx, FILE.engine, FILE.pt2, or RUNTIME:TARGET such as openvino:FILE.onnx, pytorch:tiny.",
    ),
]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Image files.")]
BatchOption = Annotated[str, typer.Option("--batch", help="Batch sizes, such as 1,8,32.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace output files that exist.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]


def find_named(name: str) -> Network:
    """What `--variant` names; a file is for `--config`."""
    if name.endswith((".yaml", ".yml")):
        raise no_network(name, network_names())
    return find_network(name)


def parse_features(text: str | None) -> list[int] | None:
    return None if text is None else parse_numbers(text, "--features", "0,1,2,3")


def parse_number(text: str, option: str, accepted: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DatDeployError(f"{option} got '{text}'; it takes {accepted}.") from None


def parse_numbers(text: str, option: str, example: str = "1,8,32") -> list[int]:
    return [parse_number(part, option, f"numbers such as {example}") for part in text.split(",")]


def parse_image_size(text: str) -> tuple[int, int]:
    """(height, width); one side is both."""
    sides = [
        parse_number(part, "--image-size", "a side such as 448, or HEIGHTxWIDTH") for part in text.lower().split("x")
    ]
    if len(sides) > 2:
        raise DatDeployError(f"--image-size got '{text}'; it takes a side such as 448, or HEIGHTxWIDTH.")
    return sides[0], sides[-1]


def check_pytorch_options(engines: list[str], checkpoint: Path | None, features: str | None = None) -> None:
    """Refuses what only an engine of PyTorch takes where there is none."""
    from dat_deploy.runners import engine_path

    for option, value in (("--checkpoint", checkpoint), ("--features", features)):
        if value is not None and all(engine_path(engine) for engine in engines):
            raise DatDeployError(
                f"{option} is for pytorch:VARIANT, but {', '.join(engines)} holds its own; leave the option out."
            )
