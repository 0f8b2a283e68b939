"""The house keeps its order: imports go down only, and runtimes are imported where they are named."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dat_deploy

PACKAGE = Path(dat_deploy.__file__).parent

# Lowest first; a module may import its own layer and what is before it.
LAYERS = [
    {
        "errors",
        "variants",
        "configuration",
        "files",
        "preprocess",
        "labels",
        "locations",
        "photographs",
        "metadata",
        "typed_json",
        "system",
        "checkpoint_file",
    },
    {"plugins"},
    {"untrusted", "model", "checkpoint", "convert"},
    {"export"},
    {"engine"},
    {"runners"},
    {"validate", "benchmark", "serving", "classify", "visualize", "doctor", "tune", "tune_network", "preprocess_check"},
    {"stages"},
    {"api", "cli"},
]
HOMES = {
    "tensorrt": ("trt_plugin.py", "engine/", "tensorrt_runner.py"),
    "triton": (
        "kernel.py",
        "general_form.py",
        "shared_table_form.py",
        "register_form.py",
        "half2.py",
        "online_softmax.py",
        "ahead_of_time.py",
    ),
    "onnxruntime": ("onnxruntime_runner.py", "runners/__init__.py", "quantize.py"),
    "openvino": ("openvino_runner.py", "runners/__init__.py"),
    "matplotlib": ("plotting.py",),
    "ray": ("server.py",),
    "tritonclient": ("model_config.py", "client.py"),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "dat_deploy" or len(parts) == 1:
        return None
    return next((i for i, names in enumerate(LAYERS) if parts[1] in names), None)


def test_imports_go_down_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        own = layer(f"dat_deploy.{relative.with_suffix('').parts[0]}")
        if own is None:
            assert str(relative) == "__init__.py", f"{relative} has no layer"
            continue
        for module in imports(path):
            other = layer(module)
            if other is not None and other > own:
                wrong.append(f"{relative} imports {module}")
    assert not wrong


def test_runtimes_are_imported_only_in_the_files_named_for_them():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        relative = str(path.relative_to(PACKAGE))
        for module in imports(path):
            homes = HOMES.get(module.split(".")[0])
            if (
                homes
                and not relative.endswith(tuple(h for h in homes if h.endswith(".py")))
                and not any(relative.startswith(h) for h in homes if h.endswith("/"))
            ):
                wrong.append(f"{relative} imports {module}")
    assert not wrong


def test_importing_the_package_loads_neither_torch_nor_a_runtime():
    code = (
        "import dat_deploy, sys; print(sorted({'torch', 'onnx', 'numpy', 'openvino', 'tensorrt'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout.strip() == "[]"


def test_importing_the_api_loads_neither_torch_nor_a_runtime_until_a_function_is_asked_for():
    code = (
        "import dat_deploy.api, sys\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'numpy', 'PIL', 'openvino', 'tensorrt'}\n"
        "assert set(dat_deploy.api.__all__) <= set(dir(dat_deploy.api))\n"
        "from dat_deploy.api import variants\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "light = [name for name in dat_deploy.api.__all__ if name not in ('load_model', 'doctor')]\n"
        "assert all(getattr(dat_deploy.api, name) for name in light)\n"
        "print(sorted({'torch', 'onnx_ir', 'onnxscript', 'onnxruntime', 'openvino', 'tensorrt'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603  # fixed
    assert done.stdout.strip() == "[]"


def test_public_names_exist():
    import dat_deploy.api

    for module in (dat_deploy, dat_deploy.api):
        assert len(module.__all__) == len(set(module.__all__))
        assert all(hasattr(module, name) for name in module.__all__)


def test_the_api_says_the_same_to_type_checkers_and_to_python():
    import dat_deploy.api

    tree = ast.parse(Path(dat_deploy.api.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    typed = {
        alias.asname or alias.name: (statement.module, alias.name)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed == dat_deploy.api._HOMES
    assert sorted(typed) == dat_deploy.api.__all__


def test_a_misspelt_name_of_the_api_is_an_attribute_error():
    import dat_deploy.api

    with pytest.raises(AttributeError, match=r"module 'dat_deploy\.api' has no attribute 'exprot'"):
        _ = dat_deploy.api.exprot
    with pytest.raises(ImportError, match="cannot import name 'exprot'"):
        from dat_deploy.api import exprot  # noqa: F401
