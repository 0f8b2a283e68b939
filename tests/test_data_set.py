"""A folder becomes images and labels, or one sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dat_deploy.errors import DatDeployError
from dat_deploy.images.data_set import open_data_set

NAMES = ("T-shirt/top", "Trouser", "Ankle boot")


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return folder


@pytest.mark.parametrize(
    ("folders", "labels", "how"),
    [
        (("ankle_boot", "T-shirt-top", "Trouser"), (0, 1, 2), "labelled by the names of classes"),
        (("Trouser",), (1,), "labelled by the names of classes"),
        (("0", "2"), (0, 2), "labelled by the indices of classes"),
        (("n01", "n02", "n03"), (0, 1, 2), "labelled by the folders' alphabetical order"),
    ],
    ids=["names", "some names", "indices", "order"],
)
def test_subfolders_are_classes(folders: tuple[str, ...], labels: tuple[int, ...], how: str, tmp_path: Path) -> None:
    data = open_data_set(pictures(tmp_path, *(f"{name}/x.png" for name in folders)), NAMES)
    assert sorted(data.labels or ()) == sorted(labels)
    assert data.note == how
    by_folder = dict(zip([path.parent.name for path in data.images], data.labels or (), strict=True))
    if "Trouser" in by_folder:
        assert by_folder["Trouser"] == 1
    if "ankle_boot" in by_folder:
        assert by_folder["ankle_boot"] == 2


def test_a_flat_folder_has_no_labels_and_hidden_and_other_files_do_not_count(tmp_path: Path) -> None:
    pictures(tmp_path, "b.png", "a.JPG", ".hidden.png", ".cache/x.png")
    (tmp_path / "readme.txt").write_text("no image")
    data = open_data_set(tmp_path, NAMES)
    assert [path.name for path in data.images] == ["a.JPG", "b.png"]
    assert (data.labels, data.note) == (None, "no class folders, so agreement is compared and accuracy is not")


def test_a_limit_takes_images_evenly_from_every_class(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{index}/{n}.png" for index in range(3) for n in range(10)))
    data = open_data_set(tmp_path, NAMES, limit=6)
    assert data.labels == (0, 0, 1, 1, 2, 2)
    assert data.note == "labelled by the indices of classes, 6 of 30 images, evenly spaced"
    assert len(open_data_set(tmp_path, NAMES, limit=1000).images) == 30


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda folder: folder / "none",
            "'{folder}/none' does not exist; name a folder of images, at any depth.",
        ),
        (
            lambda folder: pictures(folder, "x.png") / "x.png",
            "'{folder}/x.png' is no folder; name a folder of images, at any depth.",
        ),
        (
            lambda folder: folder,
            "folder '{folder}' holds no images; accepted are files that end in .bmp, .gif, .jpeg, .jpg, .pgm, .png, "
            ".ppm, .tif, .tiff, .webp, at any depth.",
        ),
        (
            lambda folder: pictures(folder, "Trouser/x.png", "y.png"),
            "data '{folder}' has images beside its folders, such as y.png; put them into the folders of their classes, "
            "or name a folder without subfolders.",
        ),
        (
            lambda folder: pictures(folder, "Trouser/x.png", "Hat/y.png"),
            "data '{folder}' has a class 'Hat' that the network lacks; its 3 classes are T-shirt/top, Trouser, "
            "Ankle boot and so on. Name the folders after classes or their indices from 0, or give one folder for each "
            "class.",
        ),
    ],
    ids=["missing", "file", "empty", "mixed", "strange class"],
)
def test_what_is_no_data_is_one_sentence(make, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DatDeployError) as caught:
        open_data_set(make(tmp_path), NAMES)
    assert str(caught.value) == sentence.format(folder=tmp_path)


def test_a_limit_of_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatDeployError) as caught:
        open_data_set(pictures(tmp_path, "x.png"), NAMES, limit=0)
    assert str(caught.value) == f"0 images of '{tmp_path}' were asked for; ask for 1 or more."
