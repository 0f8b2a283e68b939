"""What belongs to everybody in a process. No test, and without an import of the package, of which it tells."""

import locale
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch.compiler.config
from PIL import Image


def process_state() -> dict[str, str]:
    """By name, what belongs to everybody in the process; compared by its text, so that tensors and arrays are."""
    default = multiprocessing.get_all_start_methods()[0]  # which some libraries ask for, and thereby settle
    state: dict[str, Any] = {
        "torch threads": torch.get_num_threads(),
        "torch threads between operators": torch.get_num_interop_threads(),
        "gradients": torch.is_grad_enabled(),
        "default type": torch.get_default_dtype(),
        "random numbers of torch": torch.get_rng_state().sum(),
        "random numbers of NumPy": np.random.get_state(),  # the one that everybody shares
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "allow_tf32")],
        "matmul": torch.get_float32_matmul_precision(),
        "NumPy's errors": np.geterr(),
        "tag of torch.compile's caches": torch.compiler.config.cache_key_tag,
        "environment": sorted(item for item in os.environ.items() if item[0] != "PYTEST_CURRENT_TEST"),
        "folder": os.getcwd(),  # noqa: PTH109  # as the system says it
        "path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
        "warnings": list(warnings.filters),
        "levels": {name: logging.getLogger(name or None).level for name in ("", "torch.onnx", "torch", "onnx_ir")},
        "root handlers": list(logging.root.handlers),
        "logging": logging.root.manager.disable,
        "pixels": Image.MAX_IMAGE_PIXELS,
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "start method": multiprocessing.get_start_method(allow_none=True) or default,
        "locale": locale.setlocale(locale.LC_ALL),
        "excepthook": sys.excepthook,
    }
    return {name: repr(value) for name, value in state.items()}
