"""Packages import each other in one direction: a part can be read, and replaced, without those above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOPS = ("actors", "cluster")


def _package(module: str) -> str:
    """`actors.engine` of `actors.engine.costs`."""
    return ".".join(module.split(".")[:2])


def _imports(node: ast.AST) -> Iterator[str]:
    """Modules that run-time code imports, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            yield child.module
        elif isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        yield from _imports(child)


def _graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in (path for top in TOPS for path in (ROOT / top).rglob("*.py")):
        package = _package(".".join(path.relative_to(ROOT).with_suffix("").parts))
        imported = {_package(m) for m in _imports(ast.parse(path.read_text())) if m.split(".")[0] in TOPS}
        graph.setdefault(package, set()).update(imported - {package})
    return graph


def test_packages_import_in_one_direction() -> None:
    """Raises CycleError, which names the packages, where two need each other."""
    order = list(TopologicalSorter(_graph()).static_order())
    assert order.index("actors.sampling") < order.index("actors.engine") < order.index("cluster.deployments")


def test_workers_do_not_need_the_cluster() -> None:
    above = {
        a: {b for b in bs if b.startswith("cluster")} for a, bs in _graph().items() if a.startswith("actors")
    }
    assert not {package: found for package, found in above.items() if found}
