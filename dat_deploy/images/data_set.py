"""A folder of images, with labels if it is in ImageFolder layout: a folder for each class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dat_deploy.errors import DatDeployError
from dat_deploy.images.preprocess import image_files

__all__ = ["DataSet", "open_data_set"]


@dataclass(frozen=True)
class DataSet:
    """`labels` are indices of classes, one an image; None where the folder has none. `note`: how they were read."""

    folder: Path
    images: tuple[Path, ...]
    labels: tuple[int, ...] | None
    note: str = ""


def open_data_set(folder: Path, class_names: Sequence[str], limit: int | None = None) -> DataSet:
    """The images in a folder, sorted.

    Images in subfolders are labelled: by the name of a class, by its index, or, where there are as many folders as
    classes, by the folders' alphabetical order as ImageFolder has it. Images without subfolders are not.

    Args:
        class_names: of the network, in order; signs and case do not matter.
        limit: take at most this many, evenly spaced over all of them, so that every class has its share.

    Raises:
        ImageError: if there is no such folder, or no image in it.
        DatDeployError: if there is a class that the network lacks.
    """
    if limit is not None and limit < 1:
        raise DatDeployError(f"{limit} images of '{folder}' were asked for; ask for 1 or more.")
    images = image_files(folder)
    loose = [path for path in images if path.parent == folder]
    if loose and len(loose) < len(images):
        raise DatDeployError(
            f"data '{folder}' has images beside its folders, such as {loose[0].name}; put them into the folders of "
            f"their classes, or name a folder without subfolders."
        )
    labels, note = None, "no class folders, so agreement is compared and accuracy is not"
    if not loose:
        folders = sorted({path.relative_to(folder).parts[0] for path in images})
        of_folder, note = _classes(folder, folders, class_names)
        labels = [of_folder[path.relative_to(folder).parts[0]] for path in images]
    if limit is not None and limit < len(images):
        indices = [index * len(images) // limit for index in range(limit)]
        note += f"{', ' if note else ''}{limit} of {len(images)} images, evenly spaced"
        images = [images[index] for index in indices]
        labels = None if labels is None else [labels[index] for index in indices]
    return DataSet(folder, tuple(images), None if labels is None else tuple(labels), note)


def _classes(folder: Path, folders: Sequence[str], class_names: Sequence[str]) -> tuple[dict[str, int], str]:
    """Folder -> index of its class, and by what."""
    exact = {name: index for index, name in enumerate(class_names)}
    plain = [_plain(name) for name in class_names]
    known = {name: index for index, name in enumerate(plain) if plain.count(name) == 1} | exact
    by_name = {name: known.get(name, known.get(_plain(name), -1)) for name in folders}
    by_name = {name: index for name, index in by_name.items() if index >= 0}
    if len(by_name) == len(folders):
        return by_name, "labelled by the names of classes"
    by_index = {name: int(name) for name in folders if name.isdecimal() and int(name) < len(class_names)}
    if len(by_index) == len(folders):
        return by_index, "labelled by the indices of classes"
    numbered = any(name.isdecimal() for name in folders)  # from 1, say: alphabetical order would be wrong
    if len(folders) == len(class_names) and not by_name and not numbered:
        return {name: index for index, name in enumerate(folders)}, "labelled by the folders' alphabetical order"
    strange = next(name for name in folders if name not in by_name and name not in by_index)
    raise DatDeployError(
        f"data '{folder}' has a class '{strange}' that the network lacks; its {len(class_names)} classes are "
        f"{', '.join(class_names[:3])} and so on. Name the folders after classes or their indices from 0, or give one "
        f"folder for each class."
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
