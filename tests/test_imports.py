"""The house keeps its order: imports go down only, and runtimes are imported where they are named."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dat_deploy

PACKAGE = Path(dat_deploy.__file__).parent

# Lowest first; a module may import its own layer and what is before it. The longest name that begins a module's counts.
LAYERS = [
    {"errors", "progress", "typed_json"},
    {"environment", "files", "precision"},
    {"images"},
    {"networks.family", "networks.sampling", "networks.checkpoint_file"},
    {"networks.dat.variants", "networks.dat.configuration"},
    {"metadata"},
    {"plugins"},
    {"networks"},
    {"export"},
    {"engine"},
    {"runners"},
    {"validate", "benchmark", "serving", "classify", "visualize", "doctor"},
    {"commands"},
    {"api", "cli"},
]
HOMES = {
    "tensorrt": ("plugins/tensorrt/", "engine/tensorrt/", "tensorrt_runner.py"),
    "triton": (
        "kernel.py",
        "general_form.py",
        "shared_table_form.py",
        "register_form.py",
        "half2.py",
        "online_softmax.py",
        "ptx.py",
    ),
    "onnxruntime": ("onnxruntime_runner.py", "quantize.py"),
    "openvino": ("openvino_runner.py",),
    "matplotlib": ("plotting.py",),
    "ray": ("server.py",),
    "tritonclient": ("model_config.py", "client.py"),
}


# Who may know a network of the first family: it itself, its public names, and the command that lists it.
KNOWS_DAT = {"dat_deploy", "dat_deploy.api", "dat_deploy.commands.convert"}


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Everything that a file imports, wherever in it, by `import_module` and as MODULE:FUNCTION too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else names | {node.module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= named_modules(node.args[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+:\w+", node.value):
            found.add(node.value.partition(":")[0])
    return found


def named_modules(node: ast.expr) -> set[str]:
    """The modules that a text names; what an f-string fills in stands for any name."""
    if isinstance(node, ast.Constant):
        return {node.value}
    if not isinstance(node, ast.JoinedStr) or not isinstance(node.values[0], ast.Constant):
        return set()
    parts = [re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+" for part in node.values]
    return {module for module in MODULES if re.fullmatch("".join(parts), module)}


def imported_modules(module: str) -> set[str]:
    """Those of this package."""
    return (imports(MODULES[module]) & MODULES.keys()) - {module}


def layer(module: str) -> int | None:
    own = module.removeprefix("dat_deploy.")
    matching = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if f"{own}.".startswith(f"{name}.")]
    return max(matching)[1] if matching else None


def test_imports_go_down_only():
    wrong = []
    for module in MODULES.keys() - {"dat_deploy"}:
        assert layer(module) is not None, f"{module} has no layer"
        wrong += [
            f"{module} imports {other}"
            for other in imported_modules(module) - {"dat_deploy"}
            if layer(other) > layer(module)
        ]
    assert not wrong


def test_a_network_is_known_to_its_family_alone():
    users = {
        module
        for module in MODULES
        for other in imported_modules(module)
        if f"{other}.".startswith("dat_deploy.networks.dat.")
    }
    outside = {module for module in users if not f"{module}.".startswith("dat_deploy.networks.dat.")}
    assert outside == KNOWS_DAT


def test_no_modules_import_each_other_in_a_circle():
    sorter = graphlib.TopologicalSorter({module: imported_modules(module) for module in MODULES})
    sorter.prepare()  # raises CycleError, which names the circle


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
