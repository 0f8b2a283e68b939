"""`tune` says what it needs; that it measures and keeps is tested with the kernels."""

import pytest
import torch

from dat_deploy.benchmark.tune import tune
from dat_deploy.errors import DatDeployError, ShapeError, UnsupportedError


def test_without_a_gpu_it_cannot_run_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError) as error:
        tune("tiny")
    assert str(error.value) == (
        f"torch {torch.__version__} sees no CUDA device here, and kernels are measured on one; run this where one is."
    )


def test_bad_options_are_refused_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DatDeployError, match="there is no precision 'int8'; it is one of fp32, fp16, bf16"):
        tune("tiny", precision="int8")
    with pytest.raises(ShapeError, match=r"batch sizes \[0\] cannot be run"):
        tune("tiny", batches=[0])
