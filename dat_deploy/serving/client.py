"""A client of any server of the Open Inference Protocol that serves this package's models: ours, or Triton's."""

import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dat_deploy.classify import Prediction
from dat_deploy.errors import DatDeployError, ServingError, UnsupportedError
from dat_deploy.images.preprocess import Preprocessing, check_images, preprocess_files
from dat_deploy.typed_json import typed

__all__ = ["ServedClassification", "client"]


@dataclass(frozen=True)
class ServedClassification:
    """`predictions` has a tuple for each image, most probable first, of the server's `model`."""

    url: str
    model: str
    images: tuple[Path, ...]
    predictions: tuple[tuple[Prediction, ...], ...]


def client(images: Sequence[Path], url: str, *, name: str | None = None, top: int = 5) -> ServedClassification:
    """Preprocess image files as the model's configuration says, and have a server classify them, one request each.

    Args:
        url: HOST:PORT, with or without http:// before it.
        name: of the model; None for the only one whose configuration says how to preprocess.

    Raises:
        UnsupportedError: if tritonclient is not installed.
        ServingError: if the server cannot be reached, refuses, or has no such model.
        ImageError: if an image cannot be read.
    """
    if top < 1:
        raise ServingError(f"`top` got {top}; it takes 1 or more.")
    scheme, _, rest = url.rpartition("://")
    if scheme not in ("", "http", "https"):
        raise ServingError(f"`url` got '{url}'; it takes HOST:PORT, http://HOST:PORT or https://HOST:PORT.")
    check_images(images)
    try:
        import tritonclient.http as http
        from tritonclient.utils import InferenceServerException
    except ImportError as error:
        raise UnsupportedError("the client needs tritonclient: pip install 'dat-deploy[package]'") from error
    try:
        with http.InferenceServerClient(rest, ssl=scheme == "https") as server:
            model, preprocessing = _model(server, name)
            classes = server.get_model_metadata(model)["outputs"]
            count = next((output["shape"][-1] for output in classes if output["name"] == "logits"), None)
            if count is None:
                raise ServingError(f"model '{model}' at {url} is a backbone and gives no classes.")
            predictions = []
            for image in images:
                values = preprocess_files([image], preprocessing)
                tensor = http.InferInput("image", list(values.shape), "FP32")
                tensor.set_data_from_numpy(values)
                logits = http.InferRequestedOutput("logits", class_count=count)
                answer = server.infer(model, [tensor], outputs=[logits]).as_numpy("logits")
                predictions.append(_predictions(answer.ravel(), top))
    except InferenceServerException as error:
        raise ServingError(f"the server at {url} refuses: {error.message()}") from error
    except (OSError, ValueError, KeyError) as error:  # of a connection, an address, an answer
        raise ServingError(f"no server of the protocol answers at {url}: {error}. Start one with: `serve()`") from error
    return ServedClassification(url, model, tuple(images), tuple(predictions))


def _model(server: Any, name: str | None) -> tuple[str, Preprocessing]:
    """The model, and how its images are made."""
    models: dict[str, Preprocessing] = {}
    names = [entry["name"] for entry in server.get_model_repository_index()] if name is None else [name]
    for candidate in names:
        config = server.get_model_config(candidate)
        text = config.get("parameters", {}).get("dat_deploy.preprocessing", {}).get("string_value")
        if text is not None and [tensor["name"] for tensor in config["input"]] == ["image"]:
            try:
                models[candidate] = typing.cast(Preprocessing, typed(Preprocessing, json.loads(text), "preprocessing"))
            except (ValueError, DatDeployError) as error:
                raise ServingError(f"model '{candidate}' says nothing usable of its preprocessing: {error}") from error
    if len(models) != 1:
        which = "none is of dat-deploy" if not models else f"of dat-deploy are {', '.join(models)}; choose by `name`"
        raise ServingError(f"the server's models are {', '.join(names) or 'none'}; {which}.")
    return next(iter(models.items()))


def _predictions(texts: Sequence[bytes], top: int) -> tuple[Prediction, ...]:
    """Of `value:index:label`, for every class."""
    parts = [text.decode().split(":", 2) for text in texts]
    logits = np.array([float(value) for value, *_ in parts])
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return tuple(
        Prediction(int(index), label, float(share))
        for (_, index, label), share in list(zip(parts, shares, strict=True))[:top]
    )
