"""What the source never does: run code or commands that come from a file, load pickles, trust what it downloads."""

import ast
import importlib.util
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SOURCES = sorted((REPO / "anima_train").rglob("*.py"))

FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("multiprocessing", "pty", "code", "codeop", "runpy", "ctypes"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),  # but not a method of that name
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "os.startfile"),
    *("torch.load", "torch.save", "np.load", "numpy.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
}
FORBIDDEN_METHODS = {"load_state", "read_pickle"}  # Accelerate's unpickles


def dotted(node: ast.expr) -> str:
    """`os.path.join` of such an expression; empty for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def faults(tree: ast.AST) -> list[str]:
    """What a module does that it must not."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        found += [f"import {name}" for name in names if name in FORBIDDEN_CALLS]
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS or (
                isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS
            ):
                found.append(f"{name}()")
            if name.startswith("torch.utils.cpp_extension") or name.endswith("importlib.import_module"):
                found.append(f"{name}()")
            if name.endswith("Image.open") and not any(keyword.arg == "formats" for keyword in node.keywords):
                found.append("Image.open() without formats")
        if isinstance(node, ast.keyword):
            value = node.value.value if isinstance(node.value, ast.Constant) else ...
            if node.arg == "trust_remote_code" and value is not False:
                found.append("trust_remote_code")
            if node.arg in ("shell", "allow_pickle") and value is not False:
                found.append(f"{node.arg}=")
            if node.arg in ("use_safetensors", "weights_only") and value is not True:
                found.append(f"{node.arg}=")
    return found


def test_source_runs_nothing_that_comes_from_a_file():
    assert len(SOURCES) > 80
    found = {str(path.relative_to(REPO)): faults(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import multiprocessing.pool", "from torch import load",
        "eval('1')", "os.system('ls')", "torch.load('x', weights_only=True)", "np.load(x)", "accelerator.load_state(x)",
        "subprocess.run('ls', shell=True)", "subprocess.run('ls', shell=on)", "yaml.load(x)", "Image.open(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "f(trust_remote_code=setting)",
        "AutoModel.from_pretrained(x, use_safetensors=False)",
    ],
)  # fmt: skip
def test_each_of_these_would_be_found(code):
    assert faults(ast.parse(code))


def is_there(module, name):
    """True if a module has something of this name, or is a package with a module of it."""
    found = importlib.import_module(module)
    return hasattr(found, name) or (hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}"))


def test_scripts_import_what_there_is():
    """They are not type-checked, and some of them run in slow tests alone."""
    imported = [
        (path.name, node.module, name.name)
        for path in sorted((REPO / "scripts").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anima_train")
        for name in node.names
    ]
    assert len(imported) > 100
    assert [each for each in imported if not is_there(*each[1:])] == []
