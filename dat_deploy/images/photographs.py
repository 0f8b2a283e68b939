"""Real photographs with free licences, for checks and demonstrations; they ship in scikit-image's wheel.

Random noise says little about a network that moves its samples to where the objects are; these are cheap real inputs.
"""

import importlib.util
from pathlib import Path

from dat_deploy.errors import UnsupportedError

__all__ = ["LICENCES", "photographs"]

# File in skimage/data -> licence, from the docstrings of skimage/data/_fetchers.py (scikit-image 0.26), colour first.
# Left out because no licence is stated there: moon.png, motorcycle_left.png and motorcycle_right.png.
LICENCES = {
    "astronaut.png": "public domain (NASA)",
    "chelsea.png": "CC0 (Stefan van der Walt)",
    "coffee.png": "CC0 (Rachel Michetti)",
    "rocket.jpg": "public domain (SpaceX)",
    "hubble_deep_field.jpg": "public domain (NASA)",
    "retina.jpg": "CC0 (Mikael Häggström)",
    "ihc.png": "no known copyright restrictions (CMMI)",
    "camera.png": "CC0 (Lav Varshney)",
    "coins.png": "no known copyright restrictions (Brooklyn Museum)",
    "clock_motion.png": "public domain (Stefan van der Walt)",
    "grass.png": "CC0 (linolafett)",
    "gravel.png": "CC0 (CC0Textures)",
    "brick.png": "CC0 (CC0Textures)",
}


def photographs(count: int | None = None) -> list[Path]:
    """The first `count` photographs, or all; always the same ones in the same order, colour before greyscale.

    Raises:
        UnsupportedError: if scikit-image is not installed, lacks a file, or has fewer photographs than `count`.
    """
    if count is not None and not 0 <= count <= len(LICENCES):
        raise UnsupportedError(
            f"{count} photographs were asked for; scikit-image carries {len(LICENCES)}. Name image files of your own."
        )
    spec = importlib.util.find_spec("skimage")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError(
            "the photographs come with scikit-image, which is not installed. Install it with: "
            "pip install 'dat-deploy[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0], "data")
    paths = [folder / name for name in LICENCES][:count]
    for path in paths:
        if not path.is_file():
            raise UnsupportedError(
                f"scikit-image in '{folder}' lacks the photograph '{path.name}'; its wheels carry it. Install one "
                f"with: pip install --force-reinstall --only-binary :all: scikit-image"
            )
    return paths
