"""How tritonserver is started: as a container here, and as an InferenceService of KServe on Kubernetes.

KServe's own runtime for Triton, kserve-tritonserver, listens on port 8080 and reads /mnt/models; it appends the
`args` of the service to its own.
"""

import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["HARDENED", "TRITON_TAG", "docker_command", "inference_service", "tritonserver_command"]

TRITON_TAG = "26.09-py3"  # of nvcr.io/nvidia/tritonserver, as in the Dockerfile
HARDENED = {  # option -> its value; None of an option that takes none
    "model-control-mode": "none",  # no client may load or unload
    "strict-readiness": "true",  # ready means that every model is
    "exit-on-error": "true",  # no server without its model
    "disable-auto-complete-config": None,  # the configuration is the file's, not a guess
}


def tritonserver_command(repository: str | Path) -> tuple[str, ...]:
    """The words that serve a model repository, hardened."""
    return ("tritonserver", f"--model-repository={repository}", *_HARDENED_WORDS)


_HARDENED_WORDS = tuple(f"--{name}" if value is None else f"--{name}={value}" for name, value in HARDENED.items())


def docker_command(repository: Path, *, device: str, tag: str = TRITON_TAG) -> tuple[str, ...]:
    """The words that serve a model repository on this machine: HTTP on port 8000, gRPC on 8001, metrics on 8002."""
    gpus = ("--gpus", "all") if device == "gpu" else ()
    ports = [word for port in (8000, 8001, 8002) for word in ("-p", f"127.0.0.1:{port}:{port}")]
    mount = ("-v", f"{repository.resolve()}:/models:ro")
    image = f"nvcr.io/nvidia/tritonserver:{tag}"
    return ("docker", "run", "--rm", *gpus, *ports, *mount, image, *tritonserver_command("/models"))


def inference_service(name: str, storage_uri: str, *, device: str, tag: str = TRITON_TAG) -> str:
    """YAML of an InferenceService that serves the model repository at `storage_uri`.

    Args:
        name: of the model; the service's has only what Kubernetes allows of it.
    """
    limits: dict[str, Any] = {"cpu": "4", "memory": "8Gi"} | ({"nvidia.com/gpu": 1} if device == "gpu" else {})
    model = {
        "modelFormat": {"name": "triton"},
        "protocolVersion": "v2",
        "runtimeVersion": tag,
        "storageUri": storage_uri,
        "args": list(_HARDENED_WORDS),
        "resources": {"requests": limits, "limits": limits},
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": 8080}, "failureThreshold": 60},
    }
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": _service_name(name)},
        "spec": {"predictor": {"model": model}},
    }
    text: str = yaml.dump(service, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=10**6)
    return text


def _service_name(name: str) -> str:
    """A DNS label, as Kubernetes wants it."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    return (label if label[:1].isalpha() else f"model-{label}")[:50].strip("-")  # KServe appends to it


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
