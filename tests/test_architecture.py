"""The package imports what the table of docs/architecture.md allows, and the table allows nothing else."""

from __future__ import annotations

import ast
import re

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "src" / "tdpo"


def room_of(module: str) -> str:
    """Returns the package or module directly under ``tdpo`` that a dotted name belongs to."""
    return module.split(".")[1] if "." in module else "tdpo"


def imported_modules(source: str) -> set[str]:
    """Returns the modules of tdpo that a source file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "tdpo"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tdpo":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def import_graph() -> dict[str, set[str]]:
    """Returns the rooms that each room of the package imports."""
    rooms = {path.stem for path in PACKAGE.glob("*") if path.stem.isidentifier() and path.suffix in ("", ".py")}
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imported_modules(path.read_text(encoding="utf-8")):
            graph.setdefault(room, set()).update({room_of(module)} & rooms - {room})
    return graph


def allowed() -> dict[str, set[str]]:
    """Returns the table of docs/architecture.md."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Who imports whom")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.M)
    return {name: set(re.findall(r"`(\w+)`", row)) for names, row in rows for name in re.findall(r"`(\w+)`", names)}


def test_rooms_import_what_the_architecture_allows() -> None:
    table = allowed()
    for room, imported in import_graph().items():
        if room.startswith("__") or room == "cli":
            continue
        assert imported == table.get(room, set()), f"{room} imports {sorted(imported)}, allowed: {table.get(room)}"


def test_imports_inside_functions_are_seen() -> None:
    source = "import tdpo.ops\ndef f():\n    from tdpo.data import pack\n    from tdpo import score\n"
    assert {room_of(module) for module in imported_modules(source)} == {"ops", "data", "score"}
