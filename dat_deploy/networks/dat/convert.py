"""An official checkpoint -> .safetensors, which cannot hold code."""

from pathlib import Path

from dat_deploy.files import check_output
from dat_deploy.networks.checkpoint_file import check_checkpoint
from dat_deploy.networks.dat.variants import Variant
from dat_deploy.networks.family import Weights

# What loads torch is imported after the checks, so that a misspelt path is told at once.

__all__ = ["convert"]


def convert(checkpoint: Path, output: Path, *, force: bool = False) -> tuple[Variant, Weights]:
    """Rewrite a checkpoint; see `checkpoint.convert_checkpoint`.

    Args:
        checkpoint: an official .pth or .safetensors file.
        output: written whole or not at all; force: replace it if it exists.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or no variant fits.
        OutputError: if the output exists and `force` is not given, or cannot be written.
    """
    check_checkpoint(checkpoint)
    check_output(output, force=force)
    from dat_deploy.networks.dat.checkpoint import convert_checkpoint

    return convert_checkpoint(checkpoint, output, force=force)
