"""Layers, cycles and function-local imports."""

import ast
from pathlib import Path

import pytest

import pyro_vharm

ROOT = Path(pyro_vharm.__file__).parent
LAYERS = [
    {"errors", "estimates", "tables"},
    {"particles"},
    {"model"},
    {"inference"},
    {"objectives"},
    {"learning"},
    {"diagnostics"},
    {"output"},
    {"auditing"},
]
FILES = sorted(ROOT.rglob("*.py"))


def layer_of(module):
    part = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if part in names)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vharm."):
            yield node.module
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("pyro_vharm."))


def local_imports(tree):
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        node.lineno
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def name_of(file):
    return ".".join(["pyro_vharm", *file.relative_to(ROOT).with_suffix("").parts])


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file):
    tree = ast.parse(file.read_text())
    assert not local_imports(tree)
    if file == ROOT / "__init__.py":
        return
    for module in imported(tree):
        assert layer_of(module) <= layer_of(name_of(file)), f"{name_of(file)} imports {module}"


def test_no_cycles():
    graph = {name_of(f): set(imported(ast.parse(f.read_text()))) for f in FILES}
    graph.pop("pyro_vharm.__init__")
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_the_checks_can_fail():
    assert local_imports(ast.parse("def f():\n    import math\n"))
    assert layer_of("pyro_vharm.auditing") > layer_of("pyro_vharm.model.units")


def test_no_module_has_the_name_of_a_public_function():
    assert not {f.stem for f in FILES} & set(pyro_vharm.__all__)


def test_only_the_model_layer_reads_traces():
    for file in FILES:
        if "model" not in file.relative_to(ROOT).parts:
            assert "poutine" not in file.read_text(), file


def test_public_names_have_docstrings():
    missing = [n for n in pyro_vharm.__all__ if not (getattr(pyro_vharm, n).__doc__ or "").strip()]
    assert not missing
