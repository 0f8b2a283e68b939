from dataclasses import replace

import numpy as np
import pytest

from dat_deploy.errors import ShapeError, VerificationError
from dat_deploy.images.labels import imagenet_class_names, top_k
from dat_deploy.networks.dat.variants import VARIANTS

LETTERS = "abcdefghij"


def test_there_are_1000_names_each_once_whatever_the_case() -> None:
    names = imagenet_class_names()
    assert len(names) == 1000
    assert len({name.lower() for name in names}) == 1000
    assert all(name and name == name.strip() and name.isascii() for name in names)


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0, "tench"),
        (1, "goldfish"),
        (134, "crane (bird)"),
        (207, "golden retriever"),
        (264, "Cardigan Welsh corgi"),
        (281, "tabby"),
        (282, "tiger cat"),
        (285, "Egyptian cat"),
        (474, "cardigan"),
        (504, "coffee mug"),
        (517, "crane (machine)"),
        (638, "maillot (tights)"),
        (639, "tank suit"),
        (657, "missile"),
        (744, "projectile"),
        (836, "sunglass (lens)"),
        (837, "sunglasses"),
        (967, "espresso"),
        (980, "volcano"),
        (999, "toilet tissue"),
    ],
)
def test_an_index_has_its_ilsvrc2012_name(index: int, name: str) -> None:
    assert imagenet_class_names()[index] == name


def test_top_k_gives_the_best_classes_with_their_softmax() -> None:
    # softmax of ln 1, ln 2, ln 5 is 1/8, 2/8, 5/8
    (row,) = top_k(np.log([[1.0, 5.0, 2.0]]), LETTERS[:3], k=2)
    assert [(index, name) for index, name, _ in row] == [(1, "b"), (2, "c")]
    assert [probability for *_, probability in row] == pytest.approx([5 / 8, 2 / 8], rel=1e-12)


def test_1000_classes_get_imagenets_names_in_every_row() -> None:
    logits = np.zeros((2, 1000), dtype=np.float32)
    logits[0, 281], logits[1, 999] = 10, 10
    rows = top_k(logits, VARIANTS["tiny"].answer.class_names)
    assert [len(row) for row in rows] == [5, 5]
    assert [row[0][:2] for row in rows] == [(281, "tabby"), (999, "toilet tissue")]


def test_all_probabilities_sum_to_one_for_large_float16_logits() -> None:
    (row,) = top_k(np.array([[6e4, 6e4, -6e4]], dtype=np.float16), LETTERS[:3], k=10)
    assert [probability for *_, probability in row] == [0.5, 0.5, 0.0]


def test_ties_come_in_the_order_of_the_index() -> None:
    assert [index for index, *_ in top_k([[1, 2, 2, 1]], LETTERS[:4], k=4)[0]] == [1, 2, 0, 3]


def test_an_empty_batch_has_no_rows() -> None:
    assert top_k(np.zeros((0, 10)), LETTERS) == []


def test_names_are_the_networks_own_or_imagenets_or_numbers() -> None:
    assert VARIANTS["demo"].answer.class_names[:2] == ("T-shirt/top", "Trouser")
    assert VARIANTS["tiny"].answer.class_names == imagenet_class_names()
    assert replace(VARIANTS["tiny"], classes=3).answer.class_names == ("class 0", "class 1", "class 2")
    assert VARIANTS["tiny"].as_backbone((0,)).answer.class_names == ()


def test_a_class_without_a_name_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        top_k(np.zeros((1, 3)), LETTERS[:2])
    assert str(caught.value) == "logits are of 3 classes and there are 2 names. Name each class."


def test_logits_without_a_batch_axis_are_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        top_k(np.zeros(10), LETTERS)
    assert str(caught.value) == "logits have shape (10,); top_k takes [B, classes]. Add the batch axis."


def test_a_k_below_one_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        top_k(np.zeros((1, 3)), LETTERS[:3], k=0)
    assert str(caught.value) == "top_k got k = 0; it takes 1 or more. Ask for at least one class."


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_a_verification_error(wrong: float) -> None:
    with pytest.raises(VerificationError) as caught:
        top_k([[1.0, 2.0], [wrong, 0.0]], LETTERS[:2])
    assert str(caught.value) == (
        "logits of image 1 hold NaN or infinity; they must be finite. Find the first wrong layer with: `validate()`"
    )
