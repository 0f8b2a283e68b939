"""Which network is meant: a released variant by its name, or an official configuration file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dat_deploy.variants import Variant, get_variant

__all__ = ["find_variant", "variant_from_config"]


def find_variant(
    name: str | Variant, *, image_size: tuple[int, int] | None = None, features: Sequence[int] | None = None
) -> Variant:
    """The network that `name` means.

    Args:
        name: a released variant, a YAML file, or the variant itself.
        image_size: (height, width) in pixels, if not the variant's own.
        features: see `Variant.as_backbone`.
    """
    if isinstance(name, Variant):
        variant = name
    elif name.endswith((".yaml", ".yml")):
        variant = variant_from_config(Path(name))
    else:
        variant = get_variant(name)
    if image_size is not None:
        variant = variant.with_image_size(*image_size)
    return variant if features is None else variant.as_backbone(features)


def variant_from_config(path: Path) -> Variant:
    raise NotImplementedError
