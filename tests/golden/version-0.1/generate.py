"""What wrote the files in this folder, with version 0.1 (commit 6f36338); it is of no use with a later version.

`python generate.py` in a copy of this folder that holds the *.yaml alone; see README.md.
"""

import dataclasses
import json
import os
import subprocess
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import surface
import torch
from dat_deploy.checkpoint import model_from_weights, save_checkpoint, seeded_weights
from dat_deploy.configuration import variant_from_config
from PIL import Image

from dat_deploy import api
from dat_deploy.benchmark import Record
from dat_deploy.engine import lowering_choice
from dat_deploy.engine.passport import Verdict, read_passport, record_verdict, sha256, write_engine
from dat_deploy.plugins import tuning
from dat_deploy.plugins.launch import Configuration

STUB = b"Here was an engine of version 0.1; its passport is beside it.\n"


def run(*words: str, code: int = 0) -> None:
    print("$ dat-deploy", *words, flush=True)
    found = subprocess.run(["dat-deploy", *words], check=False).returncode  # noqa: S603, S607  # ours
    assert found == code, f"exit code {found}"


def edit(path: str, change: Any) -> None:
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def pictures() -> None:
    row, column = np.mgrid[:72, :80]
    kinds = {
        "class 1/disc.png": 255 * ((row - 36) ** 2 + (column - 40) ** 2 < 600),
        "class 1/ramp.png": 3 * column,
        "class 2/stripes.png": 40 * (column // 8 % 2) + 2 * row,
    }
    for name, grey in kinds.items():
        path = Path("pictures", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = np.stack([grey, 255 - grey, (grey + row) % 256], axis=-1).astype(np.uint8)
        Image.fromarray(colour).save(path, optimize=True)


def exported() -> None:
    variant = variant_from_config(Path("dat_pp.yaml"))
    save_checkpoint(model_from_weights(seeded_weights(variant, seed=1), variant), Path("dat_pp.safetensors"))
    dat = ("--config", "dat.yaml", "--batch", "2", "--opset", "17")
    run("export", *dat, "-o", "dat.onnx", "--json", "reports/export.json")
    run("export", "--from", "dat.onnx", "--lowering", "gridsample", "-o", "dat.gridsample.onnx")
    quantized = ("--images", "2", "--method", "minmax", "-o", "dat.int8.onnx", "--json", "reports/quantize.json")
    run("quantize", "dat.onnx", "--data", "pictures", *quantized)
    plus = ("--config", "dat_plus.yaml", "--image-size", "dynamic", "--features", "1,3")
    run("export", *plus, "-o", "dat_plus.onnx")
    run("export", "--from", "dat_plus.onnx", "--lowering", "plugin", "-o", "dat_plus.plugin.onnx")
    half = ("--precision", "fp16", "--fp32", "stages.3", "--no-fp32", "cls_norm")
    run("export", "--config", "dat_pp.yaml", "--checkpoint", "dat_pp.safetensors", *half, "-o", "dat_pp.onnx")


def outputs() -> None:
    found = {}
    for path in sorted(Path().glob("*.onnx")):
        if path.name != "dat_plus.plugin.onnx":
            height = 96 if path.name == "dat_plus.onnx" else 64
            with api.open_runner(path.name) as runner:
                given = runner.outputs(images(height))
            found |= {f"{path.name}:{output}": value for output, value in given.items()}
    model = api.load_model("dat_pp.yaml", Path("dat_pp.safetensors"))
    found["dat_pp.safetensors:logits"] = model(torch.from_numpy(images(64))).numpy()
    np.savez_compressed("outputs.npz", **found)


def images(height: int) -> np.ndarray:
    values = np.arange(2 * 3 * height * 64) * 7919 % 256 / 128 - 1
    return values.astype(np.float32).reshape(2, 3, height, 64)


def engines() -> None:
    """Real passports of engines whose bytes are then left out."""
    run("build", "dat_pp.onnx", "--backend", "tensorrt-rtx", "--batch", "1,2-4", "-o", "dat_pp.engine")
    run("build", "--backend", "aotinductor", "--config", "dat.yaml", "--device", "cpu", "-o", "dat.pt2")
    sentence = "dat_pp.engine agrees with pytorch:dat_pp: 18 checks passed."
    gates = {"top1_drop": 0.5}
    verdict = Verdict(True, sentence, "2026-11-28T00:00:00+00:00", 18, (1, 2), 0.1, gates)
    for path, kept in {Path("dat_pp.engine"): verdict, Path("dat.pt2"): None}.items():
        passport = dataclasses.replace(read_passport(path), engine_sha256=sha256(STUB), engine_bytes=len(STUB))
        if passport.backend == "aotinductor":
            passport = dataclasses.replace(passport, architectures=("cpu", "x86_64", "avx2"))
        else:  # no machine takes the stub for an engine of its own TensorRT-RTX
            passport = dataclasses.replace(passport, backend_version="1.0.0")
        write_engine(path, STUB, passport, force=True)
        if kept is not None:
            record_verdict(path, kept, sha256(STUB))
        run("inspect", path.name, "--json", f"reports/inspect-{path.name}.json")


def reports() -> None:
    disc = "pictures/class 1/disc.png"
    pp = ("--checkpoint", "dat_pp.safetensors")
    run("variants", "--json", "reports/variants.json")
    for path in sorted(Path().glob("*.onnx")):
        run("inspect", path.name, "--json", f"reports/inspect-{path.name}.json")
    some = ("--image", disc, "--batch", "1,2", "--data", "pictures", "--gate", "disagreement=100")
    run("validate", "--engine", "dat_pp.onnx", *pp, *some, "--json", "reports/validate.json")
    run("bisect", "--engine", "dat.onnx", "--image", disc, "--json", "reports/bisect.json")
    model = onnx.load("dat.onnx")
    (bias,) = (each for each in model.graph.initializer if each.name == "stages.2.attns.1.proj_v.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, "faulty.onnx")
    run("bisect", "--engine", "faulty.onnx", "--image", disc, "--json", "reports/bisect-faulty.json", code=2)
    Path("faulty.onnx").unlink()
    for name in ("bench", "bench-later"):
        timed = ("--rounds", "2", "--seconds", "0.05", "--batch", "2", "--threads", "1")
        both = ("--engine", "dat.onnx", "--engine", "dat.int8.onnx")
        run("bench", *both, *timed, "--json", f"reports/{name}.json")
        edit(f"reports/{name}.json", neutral)
    assert Record.read(Path("reports/bench.json")).to_json() == Path("reports/bench.json").read_text()
    run("compare", "reports/bench.json", "reports/bench-later.json", "--json", "reports/compare.json")
    run("classify", disc, "--engine", "dat.onnx", "--json", "reports/classify.json")
    run("preprocess", disc, "--check", "--engine", "dat.onnx", "--json", "reports/preprocess.json")
    run("package", "--engine", "dat.onnx", "-o", "repository", "--images", "--json", "reports/package.json")
    here = str(Path.cwd())
    edit("reports/package.json", lambda it: it.update(server=[word.replace(here, "HERE") for word in it["server"]]))
    run("visualize", disc, "--engine", "pytorch:dat.yaml", "-o", "points.png", "--json", "reports/visualize.json")


def neutral(content: dict[str, Any]) -> None:
    content["hardware"] |= {"cpu": "a CPU", "cpu_flags": ["avx2"], "cores": 2, "memory_gib": 16, "gpus": []}
    content["versions"]["os"] = "Linux"
    content["commit"] = "6f36338"


def kept() -> None:
    """What `build --lowering auto` and `tune` keep; there is no GPU, so what they measure is invented."""
    for batch, limit in ((1, None), (8, 128)):
        problem = {"batch": batch, "height": 4, "width": 4}
        configuration = Configuration((("BLOCK", 64),), num_warps=4, num_stages=2, max_registers=limit)
        tuning.store("NVIDIA H200", [("deformable_sample", problem, configuration, 7.5)])
    verdicts = (
        lowering_choice.LoweringVerdict("plugin", 0.5, 0, 0.125, ""),
        lowering_choice.LoweringVerdict("function", 70.0, 2, None, "wrong: 70 times what is allowed, in slot 2"),
        lowering_choice.LoweringVerdict("hat", None, None, None, "not built: no memory"),
    )
    lowering_choice.gpu_architecture = lambda: 90
    lowering_choice.nvidia_smi = lambda field: ["580.65"]
    lowering_choice.reasons_against_gpu = lambda *_: []
    lowering_choice.try_lowerings = lambda *_, **__: verdicts
    trt = types.SimpleNamespace(__version__="10.16.1.11")
    metadata = api.inspect(Path("dat.onnx")).metadata
    lowering_choice.choose_lowering(trt, "tensorrt", metadata, 4, (64, 64), register_plugins=lambda: "IPluginV3")
    run("doctor", "--json", "reports/doctor.json")
    edit("reports/doctor.json", neutral)


if __name__ == "__main__":
    Path("reports").mkdir()
    os.environ["DAT_DEPLOY_CONFIGURATIONS"] = "kept/configurations.json"
    for step in (pictures, exported, outputs, engines, reports, kept):
        step()
    for name in ("commands", "functions", "names"):
        Path(f"{name}.json").write_text(json.dumps(getattr(surface, name)(), indent=1) + "\n")
