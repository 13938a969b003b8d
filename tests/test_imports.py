"""Imports form no circle inside a package, and go down from one package to the next only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.sources import PROJECT

#: package -> its folder, lowest first: each may import itself and those before it
PACKAGES = {
    "mlx_contentvec": PROJECT / "mlx_contentvec",
    "contentvec_convert": PROJECT / "convert" / "contentvec_convert",
    "contentvec_parity": PROJECT / "parity" / "contentvec_parity",
}


def module_paths(package: str, folder: Path) -> dict[str, Path]:
    """Dotted name -> file of every module; a package is named as its folder."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path, *, in_functions: bool) -> Iterator[str]:
    """Dotted names that a module imports, each name of ``from a import b`` as ``a.b``."""
    parents = module.split(".")[: None if path.name == "__init__.py" else -1]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not in_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def import_graph(modules: dict[str, Path], *, in_functions: bool) -> dict[str, set[str]]:
    """Module -> the modules among ``modules`` that it imports."""

    def resolve(name: str) -> str:
        # `from module import name` imports the module
        return name if name in modules else name.rpartition(".")[0]

    graph = {
        module: {resolve(name) for name in imported(module, path, in_functions=in_functions)}
        for module, path in modules.items()
    }
    return {module: (found & set(modules)) - {module} for module, found in graph.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, its first one twice; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("in_functions", [False, True], ids=["at import", "in functions too"])
@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package: str, in_functions: bool) -> None:
    modules = module_paths(package, PACKAGES[package])
    found = circle(import_graph(modules, in_functions=in_functions))
    assert not found, " -> ".join(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_itself_and_those_below(package: str) -> None:
    names = list(PACKAGES)
    above = set(names[names.index(package) + 1 :])
    wrong = [
        f"{module} imports {name}"
        for module, path in module_paths(package, PACKAGES[package]).items()
        for name in imported(module, path, in_functions=True)
        if name.split(".")[0] in above
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("first", "second", "in_functions"),
    [
        ("import pack.b", "from pack import a", False),
        ("from .b import thing", "from . import a", False),
        ("from . import b", "def later():\n    from .a import thing", True),
    ],
)
def test_a_circle_is_found(tmp_path: Path, first: str, second: str, in_functions: bool) -> None:
    (tmp_path / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "a.py").write_text(first, encoding="utf-8")
    (tmp_path / "b.py").write_text(second, encoding="utf-8")
    modules = module_paths("pack", tmp_path)
    assert set(circle(import_graph(modules, in_functions=True))) == {"pack.a", "pack.b"}
    assert bool(circle(import_graph(modules, in_functions=False))) is not in_functions
