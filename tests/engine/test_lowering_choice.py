"""A lowering is taken only if it is right in every slot, and then the fastest; ONNX Runtime stands in for the GPU."""

import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dat_deploy.doctor import doctor
from dat_deploy.engine.tensorrt import lowering_choice as library
from dat_deploy.engine.tensorrt.lowering_choice import (
    Choice,
    LoweringVerdict,
    choose_lowering,
    try_lowerings,
)
from dat_deploy.errors import EngineBuildError, VerificationError
from dat_deploy.metadata import read_metadata
from dat_deploy.networks.dat.variants import VARIANTS, Variant

MS = {"gather": 3.0, "function": 1.0, "hat": 2.0, "gridsample": 4.0}


def faulty(lowering: str, model: onnx.ModelProto, images: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """There are no plugins, `function` mixes up the last two slots, and `hat` has a NaN in slot 1."""
    if lowering == "plugin":
        raise EngineBuildError("no plugins")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"image": images}), strict=True))
    if lowering == "function":
        outputs["feature_map_2"][[1, 2]] = outputs["feature_map_2"][[2, 1]]
    if lowering == "hat":
        outputs["feature_map_3"][1, 0, 0, 0] = np.nan
    return outputs, MS[lowering]


def test_the_network_tried_has_one_block_of_each_kind() -> None:
    small = VARIANTS["pp-base"].small()
    assert [stage.blocks for stage in small.stages] == ["ND", "ND", "ND", "D"]
    assert small.image_size == VARIANTS["pp-base"].image_size


def test_what_is_right_passes_and_what_is_wrong_in_one_slot_does_not(mini: Variant) -> None:
    verdicts = {verdict.lowering: verdict for verdict in try_lowerings(mini, "fp16", 3, faulty)}
    assert verdicts["plugin"] == LoweringVerdict("plugin", None, None, None, "not built: no plugins")
    for lowering in ("gather", "gridsample"):
        assert verdicts[lowering].passed, verdicts[lowering]
        assert verdicts[lowering].ms == MS[lowering]
    assert not verdicts["function"].passed
    assert verdicts["function"].slot in (1, 2)
    assert verdicts["function"].ms is None
    assert verdicts["hat"] == LoweringVerdict("hat", None, 1, None, "wrong: not a number in slot 1")


RIGHT = LoweringVerdict("gather", 0.5, 0, 3.0, "")
SLOWER = LoweringVerdict("hat", 0.2, 0, 4.0, "")
WRONG = LoweringVerdict("function", 70.0, 2, None, "wrong: 70 times what is allowed, in slot 2")
NOT_BUILT = LoweringVerdict("plugin", None, None, None, "not built: no plugins")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine that has a GPU, as far as the choice can see; called with what is found there."""
    monkeypatch.setenv("DAT_DEPLOY_CONFIGURATIONS", str(tmp_path / "cache" / "configurations.json"))
    monkeypatch.setattr(library, "gpu_architecture", lambda: 89)
    monkeypatch.setattr(library, "nvidia_smi", lambda field: ["580.65"])

    def finds(*verdicts: LoweringVerdict) -> None:
        monkeypatch.setattr(library, "try_lowerings", lambda *_, **__: verdicts or pytest.fail("tried again"))

    return finds


def choose(exported: Callable[[str, str, str], Path]) -> Choice:
    metadata = read_metadata(exported("mini", "fp32", "function"))
    trt = types.SimpleNamespace(__version__="10.16.1.11")
    return choose_lowering(trt, "tensorrt", metadata, 3, (224, 224), register_plugins=lambda: "IPluginV3")


def test_the_fastest_that_is_right_is_taken_and_kept(
    exported: Callable[[str, str, str], Path], gpu: Callable[..., None]
) -> None:
    gpu(NOT_BUILT, SLOWER, RIGHT, WRONG)
    choice = choose(exported)
    assert choice.lowering == "gather"
    assert choice.reason == (
        "took gather, the fastest that is right with tensorrt 10.16.1.11, sm_89, driver 580.65: plugin not built: no "
        "plugins; hat 4.000 ms; gather 3.000 ms; function wrong: 70 times what is allowed, in slot 2."
    )
    kept = doctor().lowerings["tensorrt 10.16.1.11, sm_89, driver 580.65"]
    ((what, verdicts),) = kept.items()
    assert what.startswith("mini 224x224, fp32, batch 3, ")
    assert verdicts == (NOT_BUILT, SLOWER, RIGHT, WRONG)
    gpu()
    assert choose(exported).lowering == "gather"


def test_if_none_is_right_none_is_taken(exported: Callable[[str, str, str], Path], gpu: Callable[..., None]) -> None:
    gpu(NOT_BUILT, WRONG)
    with pytest.raises(VerificationError) as caught:
        choose(exported)
    assert str(caught.value) == (
        "no lowering is right with tensorrt 10.16.1.11, sm_89, driver 580.65: plugin not built: no plugins; function "
        'wrong: 70 times what is allowed, in slot 2. Use `backend="aotinductor"`, and report this.'
    )
    gpu(RIGHT)  # after what was wrong has been mended
    assert choose(exported).lowering == "gather"
