"""metadata.py: what a file says of itself comes back as it was, and anything else is one sentence with its name."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dat_deploy.errors import ExportError
from dat_deploy.images.preprocess import Preprocessing
from dat_deploy.metadata import FileMetadata
from dat_deploy.networks.dat.variants import VARIANTS

PATH = Path("folder/tiny.onnx")
GOLDEN = Path(__file__).parent / "golden"
METADATA = FileMetadata(
    network=VARIANTS["tiny"].with_image_size(224, 448),
    batch=None,
    dynamic_image_size=False,
    lowering="function",
    precision="fp32",
    opset_version=18,
    preprocessing=Preprocessing((224, 448), (256, 512)),
    class_names=("tench", "crête"),
    weights_sha256="ab" * 32,
    weights_source="dat_tiny.pth",
    version="0.1.0",
)
PREPROCESSING: dict[str, Any] = json.loads(json.dumps(asdict(METADATA.preprocessing)))  # tuples as lists


def refusal(properties: dict[str, str]) -> str:
    with pytest.raises(ExportError) as raised:
        FileMetadata.from_properties(properties, PATH)
    assert type(raised.value) is ExportError
    return str(raised.value)


@pytest.mark.parametrize("batch", [None, 4])
def test_metadata_comes_back_from_its_properties(batch: int | None) -> None:
    metadata = replace(METADATA, batch=batch)
    assert FileMetadata.from_properties(metadata.to_properties(), PATH) == metadata


def test_each_field_is_one_property_in_json_and_properties_of_others_are_left_alone() -> None:
    properties = METADATA.to_properties()
    assert json.loads(properties["dat_deploy.network"])["image_size"] == [224, 448]
    assert properties["dat_deploy.batch"] == "null"
    assert json.loads(properties["dat_deploy.preprocessing"]) == PREPROCESSING
    others = {"author": "someone", "dat_deploy.operators": "none of the fields"}
    assert FileMetadata.from_properties(properties | others, PATH) == METADATA


def test_what_an_earlier_version_wrote_is_read_and_written_again_as_it_was() -> None:
    properties = json.loads((GOLDEN / "metadata-0.1.json").read_text())  # of METADATA
    assert FileMetadata.from_properties(properties, PATH) == replace(METADATA, golden_sha256="")
    assert replace(METADATA, golden_sha256="").to_properties() == properties


def test_a_file_of_the_first_family_names_none_and_one_that_names_it_is_read_alike() -> None:
    properties = METADATA.to_properties()
    assert METADATA.family == "dat"
    assert "dat_deploy.family" not in properties
    assert FileMetadata.from_properties(properties | {"dat_deploy.family": '"dat"'}, PATH) == METADATA


def test_a_file_of_another_tool_is_named() -> None:
    assert refusal({"author": "someone"}) == (
        "folder/tiny.onnx was not exported by dat-deploy: it has no dat_deploy.* metadata. "
        'Export it with: `export(variant=variant, output="tiny.onnx")`'
    )


def network(**changes: object) -> str:
    return json.dumps(asdict(METADATA.network) | changes)


MALFORMED = {
    "batch is text": ("batch", '"two"', "metadata.batch is 'two' and should be <class 'int'>"),
    "batch is a truth": ("batch", "true", "metadata.batch is True and should be <class 'int'>"),
    "size is text": (
        "network",
        network(image_size="ab"),
        "metadata.network.image_size is 'ab' and should be tuple[int, int]",
    ),
    "size of one side": (
        "network",
        network(image_size=[224]),
        "metadata.network.image_size is [224] and should be tuple[int, int]",
    ),
    "size of fractions": (
        "network",
        network(image_size=[224, 1.5]),
        "metadata.network.image_size[1] is 1.5 and should be <class 'int'>",
    ),
    "names are text": ("class_names", '"ab"', "metadata.class_names is 'ab' and should be tuple[str, ...]"),
    "name is a number": ("network", network(name=3), "metadata.network.name is 3 and should be <class 'str'>"),
    "a stage without blocks": (
        "network",
        network(stages=[asdict(METADATA.network.stages[0]) | {"blocks": ""}] * 4),
        "a stage cannot be StageConfig(channels=96, blocks='', heads=3, window_size=7, neighborhood_size=0, "
        "offset_groups=0, offset_kernel_size=0, offset_stride=1, offset_range_factor=0.0, local_perception=False, "
        "depthwise_mlp=False); blocks are of L, S, D, N, heads divide channels, groups divide heads, and what its "
        "blocks need is set, up to 65536.",
    ),
    "network is none": (
        "network",
        "null",
        "metadata.network is None and should be <class 'dat_deploy.networks.dat.variants.Variant'>",
    ),
    "family unknown": ("family", '"swin"', "there is no family of networks 'swin' here, only dat"),
    "family is a number": ("family", "3", "there is no family of networks '3' here, only dat"),
    "not JSON": ("network", "tiny", "Expecting value: line 1 column 1 (char 0)"),
    "preprocessing is a number": (
        "preprocessing",
        "7",
        "metadata.preprocessing is 7 and should be <class 'dat_deploy.images.preprocess.Preprocessing'>",
    ),
    "preprocessing lacks a field": (
        "preprocessing",
        json.dumps({name: value for name, value in PREPROCESSING.items() if name != "mean"}),
        "metadata.preprocessing lacks, or should not have: mean",
    ),
    "preprocessing with text for numbers": (
        "preprocessing",
        json.dumps(PREPROCESSING | {"mean": ["a", 0, 0]}),
        "metadata.preprocessing.mean[0] is 'a' and should be <class 'float'>",
    ),
}


@pytest.mark.parametrize(("field", "text", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_value_is_named_with_its_file(field: str, text: str, reason: str) -> None:
    assert refusal(METADATA.to_properties() | {f"dat_deploy.{field}": text}) == (
        f"the dat_deploy.* metadata of folder/tiny.onnx cannot be read ({reason}); it was made by another version or "
        f"edited. Export the file again."
    )


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("preprocessing", json.dumps(PREPROCESSING | {"crop": "none"})),
        ("preprocessing", json.dumps(PREPROCESSING | {"image_size": [0, 448]})),
        ("preprocessing", json.dumps(PREPROCESSING | {"std": [0, float("nan"), 1]})),
        ("preprocessing", json.dumps(PREPROCESSING | {"mean": [10**400, 0, 0]})),
        ("class_names", "[" * 100_000),
        ("batch", "1" * 5000),
    ],
    ids=["unknown crop", "crop of nothing", "NaN", "number beyond float", "deep nesting", "number of 5000 digits"],
)
def test_whatever_the_json_holds_the_refusal_names_the_file(field: str, text: str) -> None:
    sentence = refusal(METADATA.to_properties() | {f"dat_deploy.{field}": text})
    assert sentence.startswith("the dat_deploy.* metadata of folder/tiny.onnx cannot be read (")


def test_a_missing_field_is_named() -> None:
    properties = METADATA.to_properties()
    del properties["dat_deploy.batch"]
    assert "(metadata lacks, or should not have: batch)" in refusal(properties)
