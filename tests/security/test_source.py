"""What the source must not hold: code is not run from data, pickles are not read, YAML only by the safe loader."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import leibler

ROOT = Path(leibler.__file__).parent
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.Loader",
    "torch.load", "torch.jit.load", "np.fromfile", "pandas.read_pickle", "os.system", "os.popen", "shell", "runpy",
}  # fmt: skip
ALLOWED = {
    "data/sandboxed.py": {"exec", "compile"},  # runs the generated program, after giving up everything else
    "fused/gpu/generate.py": {"exec", "compile"},  # kernels that the library writes itself, from numbers
}


def used(tree: ast.AST) -> set[str]:
    """Names called, imported or reached through a module, and keyword arguments of calls that open a shell."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.keyword) and node.arg == "shell":
            found.add("shell")
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and getattr(node.value, "value", True) is not False
        ):
            found.add("pickle")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_can_run_data(path):
    name = path.relative_to(ROOT).as_posix()
    assert used(ast.parse(path.read_text("utf-8"))) & FORBIDDEN <= ALLOWED.get(name, set())


def test_arrays_are_loaded_without_pickles():
    """``np.load`` reads pickles unless told not to (older NumPy), so it must be told."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "np.save", "numpy.load"):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("allow_pickle") == "False", f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)", "import pickle", "from pickle import loads", "torch.load(path)", "yaml.load(text, yaml.Loader)",
        "subprocess.run(x, shell=True)", "np.load(p, allow_pickle=True)", "import os\nos.system(x)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    assert used(ast.parse(code)) & FORBIDDEN
