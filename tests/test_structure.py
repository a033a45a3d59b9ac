"""The house: no import circles, rooms import downwards only, and gdro_core chooses by objects, never by texts."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("gdro_core", "gdro_llm", "simulations")
    for path in (ROOT / package).rglob("*.py")
}
ROOMS = ("problems", "engine", "training", "measuring")  # each may import the ones before it


def imports(tree: ast.AST) -> set[str]:
    """Modules that a file imports anywhere, but for type checking alone."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    imported: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return imported


GRAPH = {
    name: {other for other in imports(ast.parse(path.read_text(encoding="utf-8"))) if other in FILES and other != name}
    for name, path in FILES.items()
}


def test_no_file_imports_itself_through_others():
    """Of all files but the `__init__`s, which offer names of files below them."""
    files = {name: {o for o in others if FILES[o].name != "__init__.py"} for name, others in GRAPH.items()}
    try:
        list(TopologicalSorter(files).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_a_circle_would_be_found():
    """What the test above would miss, it would miss for ever."""
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).static_order())
    assert imports(ast.parse("def f():\n    from gdro_llm.engine import policy")) >= {"gdro_llm.engine.policy"}


def test_packages_import_in_one_direction():
    """The core imports no other package, nobody imports the simulations, the loop reads the core's public names."""
    for name, others in GRAPH.items():
        packages = {other.partition(".")[0] for other in others} - {name.partition(".")[0]}
        if name.startswith("gdro_core"):
            assert packages == set(), name
        else:
            private = {o for o in others if o.startswith("gdro_core.")}
            assert private == set(), f"{name} imports {sorted(private)}, not names of gdro_core"
        assert "simulations" not in packages, name


def test_rooms_import_downwards():
    """problems -> engine -> training -> measuring; integrations stand beside, the command line above."""
    for name, others in GRAPH.items():
        parts = name.split(".")
        if parts[0] != "gdro_llm" or len(parts) < 2 or parts[1] not in ROOMS:
            continue
        allowed = {*ROOMS[: ROOMS.index(parts[1]) + 1], "config", "intervals"}
        rooms = {other.split(".")[1] for other in others if other.startswith("gdro_llm.")}
        assert rooms <= allowed, f"{name} imports {sorted(rooms - allowed)}"


CHOOSERS = ("controller", "published", "difficulty", "prompt_game", "adversaries", "rollout_game", "utilities")


@pytest.mark.parametrize("module", CHOOSERS)
def test_no_text_selects_behaviour(module):
    """In controllers, games and adversaries no text is compared, but for the keys of a saved state."""
    tree = ast.parse((ROOT / "gdro_core" / f"{module}.py").read_text(encoding="utf-8"))
    compared = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node))
    ]
    assert [text for text in compared if not text.startswith("saved.get('version')")] == []
