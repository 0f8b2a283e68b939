"""What is wrong with the words alone, or with the files that they name, is told before anything slow is loaded.

All rows run in one interpreter, in which an import of torch, a graph library or a runtime fails; so it is quick itself.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from dat_deploy.engine.passport import Passport, Profile, sha256, write_engine
from dat_deploy.environment import installed_version
from dat_deploy.images.preprocess import golden_sha256
from dat_deploy.metadata import DOMAIN_NAME, FileMetadata
from dat_deploy.networks.dat.variants import VARIANTS, Variant
from dat_deploy.runners import RUNTIMES

# Reads what to run as JSON: name -> words; writes name -> (exit code, stderr, stdout).
SCRIPT = """
import contextlib, io, json, sys
from importlib.machinery import ModuleSpec

HEAVY = {"torch", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx", "triton", "ray", "matplotlib",
         "skimage"}

class Forbidden:  # installed as far as find_spec tells
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in HEAVY else None
    def create_module(self, spec):
        raise AssertionError(f"{spec.name} was imported")
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Forbidden())
sys.modules["tensorrt"] = None  # not installed
from dat_deploy import cli

found = {}
for name, words in json.load(sys.stdin).items():
    sys.argv = ["dat-deploy", *words]
    out, err = io.StringIO(), io.StringIO()
    code = "no exit"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        code = repr(error)
    found[name] = [code, err.getvalue(), out.getvalue()]
json.dump(found, sys.stdout)
"""

EXISTS = "{folder}/notes.txt exists; pass --force to replace it, or choose another name."
NO_ONNX = (
    "there is no file {folder}/missing.onnx. Export one with: dat-deploy export --variant tiny --output missing.onnx"
)
NO_CHECKPOINT = "cannot read {folder}/missing.pth: No such file or directory."
NO_CHECKPOINT_AT_ALL = "{folder}/notes.txt is not a checkpoint: neither torch.save nor safetensors wrote it."
NO_VARIANT = "no variant 'tinny'. Did you mean tiny or pp-tiny? Variants: {variants}."
NO_IMAGE = (
    "image '{folder}/missing.png' does not exist; accepted are BMP, GIF, JPEG, PNG, PPM, TIFF and WEBP files. "
    "Check the path."
)
NO_FOLDER = "'{folder}/missing' does not exist; name a folder of images, at any depth."
NOT_ONNX = "{folder}/notes.onnx is not an ONNX file, or it is truncated. Export it again."
FOREIGN = (
    "{folder}/foreign.onnx was not exported by dat-deploy: it has no dat_deploy.* metadata. Export it with: "
    "dat-deploy export --variant VARIANT --output foreign.onnx"
)
OTHER_SIZE = "{folder}/tiny.onnx is made for images of 224x224, not 320x320. Export it again with --image-size 320x320."
NO_SUCH_SIZE = (
    "image size 300x300 does not fit variant 'tiny': its windows tile only sides that are multiples of 224 px. "
    "Nearest that work: 224x224 or 448x448."
)
NO_TENSORRT = (
    "backend tensorrt cannot be used here: package tensorrt is not installed: pip install 'dat-deploy[tensorrt]'"
)
REPLACED = (
    "{folder}/replaced.engine is not the engine that replaced.engine.json describes (its SHA-256 differs): it was"
    " replaced or is damaged. Build it again with: dat-deploy build"
)
NO_NAME = (
    "'a/b' cannot be a model's name; it takes up to 63 letters, digits, '_', '.' and '-', and begins with a "
    "letter or digit, for URLs have it. Give another with --name."
)

# What is wrong -> (the words after `dat-deploy`, exit code, the whole sentence).
EARLY: dict[str, tuple[str, int, str]] = {
    "variants existing json": ("variants --json {folder}/notes.txt", 1, EXISTS),
    "convert missing": ("convert {folder}/missing.pth {folder}/out.safetensors", 1, NO_CHECKPOINT),
    "convert folder": (
        "convert {folder} {folder}/out.safetensors",
        1,
        "{folder} is a folder; name the checkpoint file in it.",
    ),
    "convert not a checkpoint": ("convert {folder}/notes.txt {folder}/out.safetensors", 1, NO_CHECKPOINT_AT_ALL),
    "convert empty": ("convert {folder}/empty.pth {folder}/out.safetensors", 1, "{folder}/empty.pth is empty."),
    "convert output exists": ("convert {folder}/weights.safetensors {folder}/notes.txt", 1, EXISTS),
    "convert existing json": (
        "convert {folder}/weights.safetensors {folder}/out.safetensors --json {folder}/notes.txt",
        1,
        EXISTS,
    ),
    "export variant": ("export --variant tinny", 1, NO_VARIANT),
    "export lowering": (
        "export --variant tiny -o {folder}/out.onnx --lowering plugn",
        1,
        "no lowering 'plugn'. Lowerings: function, plugin, gather, gridsample, hat.",
    ),
    "export precision": (
        "export --variant tiny -o {folder}/out.onnx --precision fp8",
        1,
        "no precision 'fp8'. Precisions: fp32, fp16, bf16.",
    ),
    "export int8": (
        "export --variant tiny -o {folder}/out.onnx --precision int8",
        1,
        (
            "--precision int8 needs images to measure ranges on. Export in fp32, then: dat-deploy quantize "
            "FILE.onnx --data FOLDER"
        ),
    ),
    "export fp32 islands of fp32": (
        "export --variant tiny -o {folder}/out.onnx --fp32 stages.3",
        1,
        (
            "--fp32 and --no-fp32 change what stays in float32 in a lower precision; with --precision fp32 "
            "everything does. Leave them out, or add --precision fp16."
        ),
    ),
    "export opset": (
        "export --variant tiny -o {folder}/out.onnx --opset 20",
        1,
        (
            "opset 20 is not supported; it takes 17, 18 or 19. From opset 20 on, TensorRT up to 11.1 reads "
            "GridSample's 'linear' as nearest (NVIDIA/TensorRT#4646). Use --opset 18."
        ),
    ),
    "export batch": (
        "export --variant tiny -o {folder}/out.onnx --batch 0",
        1,
        "batch 0 is not possible; give a number from 1, or 'dynamic'.",
    ),
    "export batch word": (
        "export --variant tiny -o {folder}/out.onnx --batch many",
        1,
        "--batch got 'many'; it takes a number, or 'dynamic'.",
    ),
    "export size": ("export --variant tiny -o {folder}/out.onnx --image-size 300", 1, NO_SUCH_SIZE),
    "export dynamic": (
        "export --variant tiny -o {folder}/out.onnx --image-size dynamic",
        1,
        (
            "variant 'tiny' cannot have a dynamic image size: its windows and bias tables are made for one. "
            "Export it once for each with --image-size HEIGHTxWIDTH."
        ),
    ),
    "export features": (
        "export --variant tiny -o {folder}/out.onnx --features 1,4",
        1,
        "features 1,4 are not stages of 'tiny'; they are some of 0,1,2,3, in this order, each once.",
    ),
    "export output exists": ("export --variant tiny -o {folder}/notes.txt", 1, EXISTS),
    "export missing folder": (
        "export --variant tiny -o {folder}/missing/out.onnx",
        1,
        "folder {folder}/missing does not exist; make it first: mkdir -p {folder}/missing",
    ),
    "export missing checkpoint": (
        "export --variant tiny -o {folder}/out.onnx --checkpoint {folder}/missing.pth",
        1,
        NO_CHECKPOINT,
    ),
    "export not a checkpoint": (
        "export --variant tiny -o {folder}/out.onnx --checkpoint {folder}/notes.txt",
        1,
        NO_CHECKPOINT_AT_ALL,
    ),
    "export missing config": (
        "export --config {folder}/dat.yaml -o {folder}/out.onnx",
        1,
        "cannot read {folder}/dat.yaml: No such file or directory.",
    ),
    "export bad config": (
        "export --config {folder}/bad.yaml -o {folder}/out.onnx",
        1,
        (
            "{folder}/bad.yaml: it is not YAML, line 1: while parsing a flow node, expected the node content, but"
            " found '<stream end>'."
        ),
    ),
    "export config ending": (
        "export --config {folder}/notes.txt -o {folder}/out.onnx",
        1,
        "--config got '{folder}/notes.txt'; it takes a .yaml file of LeapLabTHU/DAT or like it.",
    ),
    "export existing json": ("export --variant tiny -o {folder}/out.onnx --json {folder}/notes.txt", 1, EXISTS),
    "relower missing": ("export --from {folder}/missing.onnx --lowering hat", 1, NO_ONNX),
    "relower lowering": (
        "export --from {folder}/tiny.onnx --lowering hatt -o {folder}/out.onnx",
        1,
        "no lowering 'hatt'. Lowerings: function, plugin, gather, gridsample, hat.",
    ),
    "relower inlined": (
        "export --from {folder}/inlined.onnx --lowering hat -o {folder}/out.onnx",
        1,
        (
            "the operators of this file are already inlined, so its lowering cannot change. Export it again with "
            "--lowering, or start from a file of lowering 'function' or 'plugin'."
        ),
    ),
    "relower not onnx": (
        "export --from {folder}/notes.txt --lowering hat -o {folder}/out.onnx",
        1,
        "{folder}/notes.txt is not an ONNX file, or it is truncated. Export it again.",
    ),
    "relower output": ("export --from {folder}/tiny.onnx --lowering hat -o {folder}/notes.txt", 1, EXISTS),
    "quantize missing": ("quantize {folder}/missing.onnx --data {folder}/data -o {folder}/out.onnx", 1, NO_ONNX),
    "quantize method": (
        "quantize {folder}/tiny.onnx --data {folder}/data --method mean -o {folder}/out.onnx",
        1,
        "no calibration method 'mean'. Methods: percentile, minmax, entropy.",
    ),
    "quantize images": (
        "quantize {folder}/tiny.onnx --data {folder}/data --images 0 -o {folder}/out.onnx",
        1,
        "0 images cannot calibrate anything; give a number from 1, such as 512.",
    ),
    "quantize data": ("quantize {folder}/tiny.onnx --data {folder}/missing -o {folder}/out.onnx", 1, NO_FOLDER),
    "quantize no images": (
        "quantize {folder}/tiny.onnx --data {folder}/none -o {folder}/out.onnx",
        1,
        (
            "folder '{folder}/none' holds no images; accepted are files that end in .bmp, .gif, .jpeg, .jpg, "
            ".pgm, .png, .ppm, .tif, .tiff, .webp, at any depth."
        ),
    ),
    "quantize fp16": (
        "quantize {folder}/fp16.onnx --data {folder}/data -o {folder}/out.onnx",
        1,
        (
            "{folder}/fp16.onnx is fp16 already; quantize takes fp32. Export it again with --precision fp32, or "
            "find the file that it was made from."
        ),
    ),
    "quantize no list": (
        "quantize {folder}/tiny.onnx --data {folder}/data -o {folder}/out.onnx",
        1,
        (
            "the metadata of {folder}/tiny.onnx no longer lists its operators, so what computes coordinates "
            "cannot be told from the rest. Export it again."
        ),
    ),
    "quantize output": ("quantize {folder}/tiny.onnx --data {folder}/data -o {folder}/notes.txt", 1, EXISTS),
    "build backend": (
        "build {folder}/tiny.onnx --backend tensort",
        1,
        "no backend 'tensort'. Backends: tensorrt, tensorrt-rtx, aotinductor.",
    ),
    "build batch": (
        "build {folder}/tiny.onnx --batch 8-1",
        1,
        (
            "--batch got '8-1'; a profile is a batch such as 8, a range such as 1-32, or a range and its "
            "commonest batch, 1-8-32. Give several as 1,8,32."
        ),
    ),
    "build suffix": (
        "build {folder}/tiny.onnx -o {folder}/out.trt",
        1,
        ("--output got '{folder}/out.trt'; what tensorrt makes ends in .engine, by which the other commands know it."),
    ),
    "build no source": (
        "build --variant tiny",
        1,
        (
            "backend tensorrt builds from an exported file. Make one with: dat-deploy export --variant tiny "
            "--precision fp16 --output tiny.onnx"
        ),
    ),
    "build output": (
        "build {folder}/tiny.onnx --backend tensorrt-rtx -o {folder}/tiny.engine",
        1,
        "{folder}/tiny.engine exists; pass --force to replace it, or choose another name.",
    ),
    "build lowering": (
        "build {folder}/tiny.onnx --backend tensorrt-rtx --lowering hatt -o {folder}/out.engine",
        1,
        "no lowering 'hatt'. Lowerings: auto, function, plugin, gather, gridsample, hat.",
    ),
    "build plugins": (
        "build {folder}/tiny.onnx --backend tensorrt-rtx --plugins v4 -o {folder}/out.engine",
        1,
        "no plugin form 'v4'. Forms: auto, IPluginV3, ahead-of-time.",
    ),
    "build missing": ("build {folder}/missing.onnx --backend tensorrt-rtx -o {folder}/out.engine", 1, NO_ONNX),
    "build size": (
        "build {folder}/tiny.onnx --backend tensorrt-rtx --image-size 320 -o {folder}/out.engine",
        1,
        OTHER_SIZE,
    ),
    "build inlined": (
        "build {folder}/inlined.onnx --backend tensorrt-rtx --lowering gather -o {folder}/out.engine",
        1,
        (
            "{folder}/inlined.onnx has its operators inlined (lowering 'hat'), so it cannot be built as 'gather'."
            " Export it with --lowering function, or leave --lowering out."
        ),
    ),
    "build plugins of gather": (
        "build {folder}/tiny.onnx --backend tensorrt-rtx --lowering gather --plugins IPluginV3 -o {folder}/out.engine",
        1,
        (
            "--plugins IPluginV3 is for --lowering plugin, and this is gather; leave --plugins out, or build a "
            "file of lowering function or plugin with --lowering plugin."
        ),
    ),
    "build fixed batch": (
        "build {folder}/batch4.onnx --backend tensorrt-rtx --batch 8 -o {folder}/out.engine",
        1,
        (
            "{folder}/batch4.onnx has the fixed batch 4 and cannot be built for batch 8. Build it with --batch 4,"
            " or export it again with --batch dynamic."
        ),
    ),
    "build cache of rtx": (
        "build {folder}/tiny.onnx --backend tensorrt-rtx --timing-cache {folder}/cache -o {folder}/out.engine",
        3,
        ("TensorRT-RTX times nothing while it builds, so --timing-cache is for --backend tensorrt; leave it out."),
    ),
    "build package missing": ("build {folder}/tiny.onnx -o {folder}/out.engine", 3, NO_TENSORRT),
    "build aot variant": ("build --backend aotinductor --variant tinny -o {folder}/out.pt2", 1, NO_VARIANT),
    "build aot range": (
        "build --backend aotinductor --variant tiny --batch 1-8 -o {folder}/out.pt2",
        1,
        "an AOTInductor package has static batches, and --batch got 1-8; give each, as 1,8,32.",
    ),
    "build aot precision": (
        "build --backend aotinductor --variant tiny --precision int4 -o {folder}/out.pt2",
        1,
        "no precision 'int4'. Precisions: fp32, fp16, bf16.",
    ),
    "build aot device": (
        "build --backend aotinductor --variant tiny --device tpu -o {folder}/out.pt2",
        1,
        "no device 'tpu'. Devices: cpu, cuda.",
    ),
    "build aot size": (
        "build --backend aotinductor --variant tiny --image-size 300 -o {folder}/out.pt2",
        1,
        NO_SUCH_SIZE,
    ),
    "build aot checkpoint": (
        "build --backend aotinductor --variant tiny --checkpoint {folder}/missing.pth -o {folder}/out.pt2",
        1,
        NO_CHECKPOINT,
    ),
    "build json": ("build {folder}/tiny.onnx --json {folder}/notes.txt", 1, EXISTS),
    "inspect missing": ("inspect {folder}/missing.onnx", 1, NO_ONNX),
    "inspect missing engine": (
        "inspect {folder}/missing.engine",
        1,
        "there is no file {folder}/missing.engine. Build one with: dat-deploy build tiny.onnx",
    ),
    "inspect not onnx": ("inspect {folder}/notes.onnx", 1, NOT_ONNX),
    "inspect foreign": ("inspect {folder}/foreign.onnx", 1, FOREIGN),
    "inspect no passport": (
        "inspect {folder}/alone.engine",
        1,
        (
            "{folder}/alone.engine has no passport alone.engine.json beside it, so nothing says what it holds; "
            "copy both files, or build the engine again, see dat-deploy build."
        ),
    ),
    "inspect replaced": ("inspect {folder}/replaced.engine", 1, REPLACED),
    "inspect json": ("inspect {folder}/tiny.onnx --json {folder}/notes.txt", 1, EXISTS),
    "package missing": ("package --engine {folder}/missing.onnx -o {folder}/repository", 1, NO_ONNX),
    "package kind": (
        "package --engine {folder}/notes.txt -o {folder}/repository",
        1,
        "--engine got '{folder}/notes.txt'; Triton serves FILE.onnx and TensorRT's FILE.engine.",
    ),
    "package device": (
        "package --engine {folder}/tiny.onnx --device tpu -o {folder}/repository",
        3,
        "no device 'tpu'; a model is served on gpu or cpu.",
    ),
    "package instances": (
        "package --engine {folder}/tiny.onnx --instances 0 -o {folder}/repository",
        1,
        "--instances got 0; it takes a number from 1 to 2147483647.",
    ),
    "package name": ("package --engine {folder}/tiny.onnx --name a/b -o {folder}/repository", 1, NO_NAME),
    "package batch": (
        "package --engine {folder}/tiny.onnx --batch 0 -o {folder}/repository",
        1,
        "--batch got '0'; it takes the batches to prefer, such as 8,32, each from 1 on.",
    ),
    "package kserve": (
        "package --engine {folder}/tiny.onnx --kserve {folder}/k.yaml -o {folder}/repository",
        1,
        (
            "--kserve and --storage-uri go together: the file to write, and where the repository will be, such as"
            " s3://bucket/model_repository."
        ),
    ),
    "package output": (
        "package --engine {folder}/tiny.onnx -o {folder}/notes.txt",
        1,
        "{folder}/notes.txt is a file; --output takes a folder, such as model_repository.",
    ),
    "validate missing": ("validate --engine {folder}/missing.onnx", 1, NO_ONNX),
    "validate kind": (
        "validate --engine {folder}/tiny.pt",
        1,
        (
            "cannot tell what runs '{folder}/tiny.pt'; an engine is FILE.onnx, FILE.engine, FILE.pt2 or "
            "RUNTIME:TARGET, such as pytorch:tiny or openvino:tiny.onnx. Runtimes: {runtimes}."
        ),
    ),
    "validate runtime": (
        "validate --engine openvinno:{folder}/tiny.onnx",
        1,
        (
            "no runtime 'openvinno' in 'openvinno:{folder}/tiny.onnx'. Did you mean openvino or openvino-bf16? "
            "Runtimes: {runtimes}."
        ),
    ),
    "validate variant": ("validate --engine pytorch:tinny", 1, NO_VARIANT),
    "validate none": ("validate", 1, "validate takes --engine ENGINE, such as --engine tiny.onnx, or --self-test."),
    "validate not onnx": ("validate --engine {folder}/notes.onnx", 1, NOT_ONNX),
    "validate foreign": ("validate --engine {folder}/foreign.onnx", 1, FOREIGN),
    "validate batch": (
        "validate --engine {folder}/tiny.onnx --batch 1,0",
        1,
        "batches [1, 0] are not possible; give numbers from 1, such as 1,2,3,8.",
    ),
    "validate skip": (
        "validate --engine {folder}/tiny.onnx --skip stres",
        1,
        (
            "there is no check 'stres' to skip; checks are preprocessing, photographs, telling, decisions, stress, "
            "slots, repeats, precision, weights, range, rounding, coordinates, drift, data."
        ),
    ),
    "validate gate": (
        "validate --engine {folder}/tiny.onnx --gate top2-drop=1",
        1,
        (
            "there is no gate 'top2-drop'; gates are top1-drop, top5-drop, disagreement, cosine-distance, "
            "unreadable, batch-spread, repeats, drift-px."
        ),
    ),
    "validate gate value": (
        "validate --engine {folder}/tiny.onnx --gate top1-drop=-1 --data {folder}/data",
        1,
        "gate 'top1-drop' got -1.0; it takes the largest value that passes, from 0 on.",
    ),
    "validate gate of data": (
        "validate --engine {folder}/tiny.onnx --gate top1-drop=1",
        1,
        "gate 'top1-drop' is about data; name a folder of images with --data.",
    ),
    "validate gate of labels": (
        "validate --engine {folder}/tiny.onnx --gate top1-drop=1 --data {folder}/data",
        1,
        (
            "gate 'top1-drop' needs labels, and data '{folder}/data' has none; put its images into a folder for "
            "each class."
        ),
    ),
    "validate tolerance": (
        "validate --engine {folder}/tiny.onnx --tolerance 0",
        1,
        "tolerance got 0.0; it takes a number above 0, such as 1e-4.",
    ),
    "validate size": ("validate --engine {folder}/tiny.onnx --image-size 320", 1, OTHER_SIZE),
    "validate image": ("validate --engine {folder}/tiny.onnx --image {folder}/missing.png", 1, NO_IMAGE),
    "validate data": ("validate --engine {folder}/tiny.onnx --data {folder}/missing", 1, NO_FOLDER),
    "validate limit": (
        "validate --engine {folder}/tiny.onnx --data {folder}/data --limit 0",
        1,
        "0 images of '{folder}/data' were asked for; ask for 1 or more.",
    ),
    "validate data of a backbone": (
        "validate --engine {folder}/backbone.onnx --data {folder}/data",
        1,
        (
            "{folder}/backbone.onnx is a backbone and classifies nothing; leave --data out, or validate an engine"
            " with logits."
        ),
    ),
    "validate checkpoint": ("validate --engine {folder}/tiny.onnx --checkpoint {folder}/missing.pth", 1, NO_CHECKPOINT),
    "validate html": ("validate --engine {folder}/tiny.onnx --html {folder}/notes.txt", 1, EXISTS),
    "validate json": ("validate --engine {folder}/tiny.onnx --json {folder}/notes.txt", 1, EXISTS),
    "validate plugin": (
        "validate --engine {folder}/plugin.onnx",
        1,
        (
            "{folder}/plugin.onnx has lowering 'plugin': its operators have no body, so only TensorRT with the "
            "plugins runs it. Export it with --lowering function."
        ),
    ),
    "validate tensorrt missing": ("validate --engine tensorrt:{folder}/tiny.engine", 3, NO_TENSORRT),
    "validate other backend": (
        "validate --engine tensorrt-rtx:{folder}/tiny.engine",
        3,
        (
            "{folder}/tiny.engine was built with backend tensorrt, not tensorrt-rtx. Open it as "
            "tensorrt:{folder}/tiny.engine"
        ),
    ),
    "validate replaced": ("validate --engine {folder}/replaced.engine", 1, REPLACED),
    "self-test kind": (
        "validate --self-test --engine pytorch:demo",
        1,
        "faults are put into ONNX files, and 'pytorch:demo' is none; name a FILE.onnx.",
    ),
    "self-test missing": ("validate --self-test --engine {folder}/missing.onnx", 1, NO_ONNX),
    "self-test fp16": (
        "validate --self-test --engine {folder}/fp16.onnx",
        1,
        (
            "the self-test takes an fp32 file that classifies batches, and {folder}/fp16.onnx is none; export it "
            "with --batch dynamic and --precision fp32, without --features."
        ),
    ),
    "self-test option": (
        "validate --self-test --skip drift",
        1,
        "--self-test takes no other option than --engine, --checkpoint, --json and --force.",
    ),
    "bisect missing": ("bisect --engine {folder}/missing.onnx", 1, NO_ONNX),
    "bisect kind": (
        "bisect --engine pytorch:tiny",
        3,
        (
            "pytorch:tiny cannot be bisected: that runs pieces of an ONNX file, and pytorch takes none. Bisect "
            "the file that it was made from: dat-deploy bisect --engine FILE.onnx"
        ),
    ),
    "bisect image": ("bisect --engine {folder}/tiny.onnx --image {folder}/missing.png", 1, NO_IMAGE),
    "bisect checkpoint": (
        "bisect --engine {folder}/tiny.onnx --checkpoint {folder}/notes.txt",
        1,
        NO_CHECKPOINT_AT_ALL,
    ),
    "bisect json": ("bisect --engine {folder}/tiny.onnx --json {folder}/notes.txt", 1, EXISTS),
    "bench missing": ("bench --engine {folder}/missing.onnx", 1, NO_ONNX),
    "bench variant": (
        "bench --engine pytorch:tinny",
        1,
        "engine 'pytorch:tinny': no variant 'tinny'. Did you mean tiny or pp-tiny? Variants: {variants}.",
    ),
    "bench runtime": (
        "bench --engine tensort:{folder}/tiny.engine",
        1,
        (
            "no runtime 'tensort' in 'tensort:{folder}/tiny.engine'. Did you mean tensorrt or tensorrt-rtx? "
            "Runtimes: {runtimes}."
        ),
    ),
    "bench baseline": (
        "bench --engine {folder}/tiny.onnx --baseline other",
        1,
        "baseline 'other' is not measured here. Engines: tiny.onnx.",
    ),
    "bench batch": ("bench --engine {folder}/tiny.onnx --batch 0", 1, "batch is 0; it must be at least 1."),
    "bench fixed batch": (
        "bench --engine {folder}/batch4.onnx --batch 8",
        1,
        (
            "engine 'batch4.onnx' has the fixed batch 4 and cannot run batch 8. Measure it with --batch 4, or "
            "export it again with --batch dynamic."
        ),
    ),
    "bench rounds": ("bench --engine {folder}/tiny.onnx --rounds 0", 1, "rounds is 0; it must be at least 1."),
    "bench seconds": (
        "bench --engine {folder}/tiny.onnx --seconds -1",
        1,
        "seconds is -1; it must be a finite number from 0.",
    ),
    "bench size": ("bench --engine {folder}/tiny.onnx --image-size 320", 1, OTHER_SIZE),
    "bench features": (
        "bench --engine pytorch:tiny --features 9",
        1,
        (
            "engine 'pytorch:tiny': features 9 are not stages of 'tiny'; they are some of 0,1,2,3, in this order,"
            " each once."
        ),
    ),
    "bench features of a file": (
        "bench --engine {folder}/tiny.onnx --features 0",
        1,
        "--features is for pytorch:VARIANT, but {folder}/tiny.onnx holds its own; leave the option out.",
    ),
    "bench checkpoint": (
        "bench --engine pytorch:tiny --checkpoint {folder}/missing.pth",
        1,
        "engine 'pytorch:tiny': cannot read {folder}/missing.pth: No such file or directory.",
    ),
    "bench plot": (
        "bench --engine {folder}/tiny.onnx --plot {folder}/plot.svg",
        1,
        "{folder}/plot.svg does not end in .png, and plots are PNG; write {folder}/plot.png",
    ),
    "bench plot exists": (
        "bench --engine {folder}/tiny.onnx --plot {folder}/picture.png",
        1,
        "{folder}/picture.png exists; pass --force to replace it, or choose another name.",
    ),
    "bench json": ("bench --engine {folder}/tiny.onnx --json {folder}/notes.txt", 1, EXISTS),
    "compare missing": (
        "compare {folder}/a.json {folder}/b.json",
        1,
        "cannot read {folder}/a.json: No such file or directory. Check the path.",
    ),
    "compare kind": (
        "compare {folder}/notes.txt {folder}/notes.txt",
        1,
        (
            "{folder}/notes.txt: not a benchmark record: Expecting value: line 1 column 1 (char 0). Make one "
            "with: dat-deploy bench --json FILE"
        ),
    ),
    "classify missing image": ("classify {folder}/missing.png --engine {folder}/tiny.onnx", 1, NO_IMAGE),
    "classify not an image": (
        "classify {folder}/notes.txt --engine {folder}/tiny.onnx",
        1,
        (
            "image '{folder}/notes.txt' is no image that can be read: it starts with b'root:x:0'; accepted are "
            "BMP, GIF, JPEG, PNG, PPM, TIFF and WEBP files. Convert it to PNG or JPEG, or copy it again."
        ),
    ),
    "classify missing engine": ("classify {folder}/picture.png --engine {folder}/missing.onnx", 1, NO_ONNX),
    "classify top": (
        "classify {folder}/picture.png --engine {folder}/tiny.onnx --top 0",
        1,
        "top_k got k = 0; it takes 1 or more. Ask for at least one class.",
    ),
    "classify checkpoint": (
        "classify {folder}/picture.png --engine pytorch:tiny --checkpoint {folder}/missing.pth",
        1,
        NO_CHECKPOINT,
    ),
    "classify json": ("classify {folder}/picture.png --engine {folder}/tiny.onnx --json {folder}/notes.txt", 1, EXISTS),
    "preprocess nothing": (
        "preprocess {folder}/picture.png",
        1,
        "preprocess takes one of --check, --output FILE.npy and --golden FILE.png.",
    ),
    "preprocess no engine": (
        "preprocess --check",
        1,
        "preprocess needs --engine, which says how; such as --engine tiny.onnx.",
    ),
    "preprocess output": (
        "preprocess {folder}/picture.png --engine {folder}/tiny.onnx --output {folder}/notes.txt",
        1,
        EXISTS,
    ),
    "preprocess golden": ("preprocess --golden {folder}/notes.txt", 1, EXISTS),
    "preprocess missing engine": (
        "preprocess {folder}/picture.png --engine {folder}/missing.onnx --output {folder}/out.npy",
        1,
        NO_ONNX,
    ),
    "preprocess missing image": ("preprocess {folder}/missing.png --engine {folder}/tiny.onnx --check", 1, NO_IMAGE),
    "preprocess missing array": (
        "preprocess --engine {folder}/tiny.onnx --check --array {folder}/missing.npy",
        1,
        ("array '{folder}/missing.npy' does not exist, or is no file; accepted are .npy files. Check the path."),
    ),
    "preprocess array shape": (
        "preprocess --engine {folder}/tiny.onnx --check --array {folder}/wrong.npy",
        1,
        (
            "array '{folder}/wrong.npy' has shape [1, 3, 8, 8]; {folder}/tiny.onnx takes [1, 3, 224, 224] for the"
            " golden picture. Resize and crop to 224x224 first."
        ),
    ),
    "tune variant": ("tune --variant tinny", 1, NO_VARIANT),
    "tune precision": (
        "tune --variant tiny --precision int8",
        1,
        "there is no precision 'int8'; it is one of fp32, fp16, bf16.",
    ),
    "tune batch": (
        "tune --variant tiny --batch 0",
        1,
        "batch sizes [0] cannot be run; give sizes of at least 1, such as 1,8,32.",
    ),
    "tune size": ("tune --variant tiny --image-size 300", 1, NO_SUCH_SIZE),
    "tune json": ("tune --variant tiny --json {folder}/notes.txt", 1, EXISTS),
    "visualize image": ("visualize {folder}/missing.png --engine pytorch:tiny -o {folder}/out.png", 1, NO_IMAGE),
    "visualize engine": (
        "visualize {folder}/picture.png --engine {folder}/missing.onnx -o {folder}/out.png",
        1,
        NO_ONNX,
    ),
    "visualize three": (
        "visualize {folder}/picture.png -o {folder}/out.png" + 3 * " --engine pytorch:tiny",
        1,
        "3 engines were named; visualize draws one, or two and their drift. Name one or two.",
    ),
    "visualize suffix": (
        "visualize {folder}/picture.png --engine pytorch:tiny -o {folder}/out.svg",
        1,
        "{folder}/out.svg does not end in .png, and plots are PNG; write {folder}/out.png",
    ),
    "visualize output": (
        "visualize {folder}/picture.png --engine pytorch:tiny -o {folder}/picture.png",
        1,
        "{folder}/picture.png exists; pass --force to replace it, or choose another name.",
    ),
    "visualize without points": (
        "visualize {folder}/picture.png --engine {folder}/tiny.onnx -o {folder}/out.png",
        1,
        (
            "{folder}/tiny.onnx gives logits and no sampling locations. Export it again with --sampling-locations"
            " to see its points."
        ),
    ),
    "serve none": ("serve", 1, "there is no engine to serve; name one: dat-deploy serve --engine tiny.onnx"),
    "serve missing": ("serve --engine {folder}/missing.onnx", 1, NO_ONNX),
    "serve variant": (
        "serve --engine pytorch:tiny",
        1,
        (
            "'pytorch:tiny' is no file; a server takes FILE.onnx, FILE.engine or FILE.pt2. Export it with: "
            "dat-deploy export --variant tiny --output tiny.onnx"
        ),
    ),
    "serve port": (
        "serve --engine {folder}/tiny.onnx --port 70000",
        1,
        "--port: Input should be less than or equal to 65535.",
    ),
    "serve config": (
        "serve --config {folder}/missing.yaml",
        1,
        "cannot read {folder}/missing.yaml: [Errno 2] No such file or directory: '{folder}/missing.yaml'",
    ),
    "serve name": ("serve --engine {folder}/tiny.onnx --name a/b", 1, NO_NAME),
    "client image": ("client {folder}/missing.png", 1, NO_IMAGE),
    "client top": ("client {folder}/picture.png --top 0", 1, "--top got 0; it takes 1 or more."),
    "client url": (
        "client {folder}/picture.png --url ftp://x",
        1,
        "--url got 'ftp://x'; it takes HOST:PORT, http://HOST:PORT or https://HOST:PORT.",
    ),
    "client json": ("client {folder}/picture.png --json {folder}/notes.txt", 1, EXISTS),
    "doctor json": ("doctor --json {folder}/notes.txt", 1, EXISTS),
    "demo folder": (
        "demo --directory {folder}/notes.txt",
        1,
        "cannot make folder {folder}/notes.txt: File exists; choose another --directory.",
    ),
}

# Errors of the parser of options come from typer, which is tested in test_cli.
INSPECT = "inspect {folder}/tiny.onnx --json {folder}/inspection.json"


def metadata_of(network: Variant, **changes: Any) -> FileMetadata:
    preprocessing = network.preprocessing
    fields: dict[str, Any] = {
        "network": network,
        "batch": None,
        "dynamic_image_size": False,
        "lowering": "function",
        "precision": "fp32",
        "opset_version": 18,
        "preprocessing": preprocessing,
        "class_names": network.answer.class_names,
        "weights_sha256": "5" * 64,
        "weights_source": "seeded random weights (seed 0)",
        "version": "0.1.0",
        "golden_sha256": golden_sha256(preprocessing),
    }
    return FileMetadata(**fields | changes)


def write_onnx(path: Path, network: Variant, *, inlined: bool = False, **changes: Any) -> FileMetadata:
    """A file that says of itself what an exported one does, with one node in it."""
    metadata = metadata_of(network, **changes)
    output = "feature_map_3" if network.features else "logits"
    operator, domain = ("Identity", "") if inlined else ("window_attention", DOMAIN_NAME)
    graph = helper.make_graph(
        [helper.make_node(operator, ["image"], [output], domain=domain)],
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 1000])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN_NAME, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="dat-deploy")
    model.producer_version = metadata.version
    helper.set_model_props(model, metadata.to_properties())
    onnx.save(model, path)
    return metadata


def write_engine_of(path: Path, metadata: FileMetadata) -> None:
    content = b"an engine"
    passport = Passport(
        engine_sha256=sha256(content),
        engine_bytes=len(content),
        backend="tensorrt",
        backend_version="11.0",
        versions={},
        architectures=("sm_90",),
        profiles=(Profile(1, 1, 1),),
        outputs=("logits",),
        layers={},
        kinds={},
        engine_layers=None,
        plugins={},
        plugin_form=None,
        metadata=metadata,
        source=None,
        source_sha256=None,
        rebuild=("dat-deploy", "build"),
    )
    write_engine(path, content, passport)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the rows name."""
    folder = tmp_path_factory.mktemp("early")
    tiny = VARIANTS["tiny"]
    metadata = write_onnx(folder / "tiny.onnx", tiny)
    write_onnx(folder / "inlined.onnx", tiny, inlined=True, lowering="hat")
    write_onnx(folder / "fp16.onnx", tiny, precision="fp16")
    write_onnx(folder / "batch4.onnx", tiny, batch=4)
    write_onnx(folder / "plugin.onnx", tiny, lowering="plugin")
    write_onnx(folder / "backbone.onnx", tiny.as_backbone((3,)))
    onnx.save(helper.make_model(helper.make_graph([], "empty", [], [])), folder / "foreign.onnx")
    for name in ("tiny.engine", "replaced.engine"):
        write_engine_of(folder / name, metadata)
    for name in ("replaced.engine", "alone.engine", "empty.pth"):
        (folder / name).write_bytes(b"" if name == "empty.pth" else b"another")
    for name in ("notes.txt", "notes.onnx"):
        (folder / name).write_text("root:x:0:0")
    (folder / "bad.yaml").write_text("MODEL: [")
    (folder / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("data", "none"):
        (folder / name).mkdir()
    for name in ("picture.png", "data/a.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    np.save(folder / "wrong.npy", np.zeros((1, 3, 8, 8), np.float32))
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, tuple[object, str, str]]:
    """What each row says: exit code, stderr, stdout."""
    rows = {name: words for name, (words, _, _) in EARLY.items()} | {"inspect": INSPECT}
    sent = json.dumps({name: words.format(folder=folder).split() for name, words in rows.items()})
    environment = os.environ | {"COLUMNS": "160"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(  # noqa: S603  # our own interpreter and code
        command, input=sent, capture_output=True, text=True, check=True, env=environment
    )
    return {name: (code, err, out) for name, (code, err, out) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", EARLY)
def test_a_mistake_is_told_whole_before_anything_slow_is_loaded(
    name: str, told: dict[str, tuple[object, str, str]], folder: Path
) -> None:
    if name.startswith("serve") and installed_version("ray") is None:
        pytest.skip("the extra serve is not installed")
    _, code, sentence = EARLY[name]
    expected = sentence.format(folder=folder, variants=", ".join(VARIANTS), runtimes=", ".join(RUNTIMES))
    assert told[name] == (code, f"error: {expected}\n", "")


def test_every_command_has_a_row() -> None:
    from dat_deploy import cli

    commands = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert {words.split()[0] for words, _, _ in EARLY.values()} == commands


def test_inspecting_an_exported_file_prints_what_is_in_it_and_loads_nothing_slow(
    told: dict[str, tuple[object, str, str]], folder: Path
) -> None:
    code, err, out = told["inspect"]
    assert (code, err) == (0, "")
    path = folder / "tiny.onnx"
    content = path.read_bytes()
    *rows, _ = (line.strip() for line in out.splitlines())
    assert [" ".join(row.split()) for row in rows] == [
        f"file {path}, {len(content) / 1e6:.1f} MB, sha256 {sha256(content)}",
        "written by dat-deploy 0.1.0; opset 18, IR version 10",
        "network tiny 224x224, DAT, batch dynamic",
        "input image float32 [batch, 3, 224, 224]",
        "output logits float32 [batch, 1000]",
        "classes 1000: tench to toilet tissue",
        "preprocessing RGB, resized to 256x256 (bicubic), center crop of 224x224, mean 0.485 0.456 0.406, std 0.229 "
        "0.224 0.225",
        "lowering function",
        "operators 1 window_attention; nodes without bodies",
        "precision fp32",
        "nodes 1; that compute: fp32 1 nodes",
        f"weights seeded random weights (seed 0), sha256 {'5' * 64}",
    ]
    found = json.loads((folder / "inspection.json").read_text())
    assert found["metadata"]["network"]["name"] == "tiny"
    assert found["file"] == {
        "sha256": sha256(content),
        "size_bytes": len(content),
        "written_by": "dat-deploy 0.1.0",
        "ir_version": 10,
        "opset_version": 18,
        "inputs": [{"name": "image", "type": "float32", "shape": ["batch", 3, 224, 224]}],
        "outputs": [{"name": "logits", "type": "float32", "shape": ["batch", 1000]}],
        "nodes": 1,
        "operators": {"window_attention": 1},
        "operator_form": "nodes without bodies",
        "census": {"nodes": {"fp32": {"window_attention": 1}}, "casts": 0, "islands": 1},
    }


@pytest.mark.parametrize("words", [INSPECT + " --force", EARLY["validate missing"][0], EARLY["bench variant"][0]])
def test_it_takes_little_more_than_to_import_its_libraries(words: str, folder: Path) -> None:
    def seconds(code: str, *arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True)  # noqa: S603  # ours
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    arguments = words.format(folder=folder).split()
    ratios = [
        seconds("from dat_deploy.cli import main; main()", *arguments)
        / seconds("import numpy, onnx, pydantic, rich.console, typer")
        for _ in range(3)
    ]
    assert statistics.median(ratios) < 3  # 1.5 to 2.1 here; importing torch makes it 5 and more
