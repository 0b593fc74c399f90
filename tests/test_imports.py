"""The house has rows, and a module imports only from rows above its own."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "coconut_ds"

# Top to bottom.  Within a row a module may import those named before it.  A new room that is not named
# here sits directly below the lowest room that it imports.
ROWS = (
    ("errors", "schemas", "methods", "contradictions", "no_effect", "config", "ds_config", "settings"),
    ("problems", "runs", "signals", "watchdog"),
    ("tokens", "thoughts"),
    ("curriculum",),
    ("batching",),
    ("model", "lora", "divergence"),
    ("engine",),
    ("checkpoint",),
    ("evaluate", "build", "memory"),
    ("trainer", "train"),
    ("commands", "__main__"),
)
Arrows = Mapping[str, Mapping[str, str]]  # room -> the rooms it imports, and where
ORDER = {room: (row, place) for row, rooms in enumerate(ROWS) for place, room in enumerate(rooms)}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
NO_TORCH = (
    "errors",
    "schemas",
    "methods",
    "contradictions",
    "no_effect",
    "config",
    "ds_config",
    "settings",
    "problems",
    "curriculum",
)


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import in a file, those inside functions too."""
    package = ("coconut_ds", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "coconut_ds":
                yield from ((f"coconut_ds.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def rooms_imported(room: str) -> dict[str, str]:
    """Other rooms that `room` imports, each with 'file:line' of one such import."""
    found: dict[str, str] = {}
    for path in FILES:
        if room_of(path) == room:
            for module, line in imports(path):
                parts = module.split(".")
                if parts[0] == "coconut_ds" and len(parts) > 1 and parts[1] != room:
                    found.setdefault(parts[1], f"{name_of(path)}:{line}")
    return found


def position(
    room: str, imported: Mapping[str, Mapping[str, str]], waiting: tuple[str, ...] = ()
) -> tuple[int, ...]:
    """Where a room stands, compared like a tuple; raises on rooms that import each other."""
    if room in ORDER:
        return ORDER[room]
    assert room not in waiting, f"{' -> '.join([*waiting, room])}: these import each other"
    above = [position(other, imported, (*waiting, room)) for other in imported[room]]
    return (*max(above, default=(0,)), 0)


def down_arrows(imported: Arrows) -> list[str]:
    return [
        f"{place}: {room} imports {other}, which stands below it"
        for room, others in imported.items()
        for other, place in others.items()
        if position(other, imported) >= position(room, imported)
    ]


def test_the_walk_sees_a_down_arrow():
    new = {"tokens": {"new": "tokens.py:1"}, "new": {"batching": "new.py:2"}, "batching": {}}
    assert down_arrows(new) == ["tokens.py:1: tokens imports new, which stands below it"]
    assert down_arrows({"model": {"lora": "model/x.py:3"}, "lora": {}})
    assert not down_arrows(
        {"lora": {"model": "lora.py:3"}, "model": {"tokens": "x"}, "tokens": {"errors": "x"}}
    )
    with pytest.raises(AssertionError, match="import each other"):
        down_arrows({"a": {"b": "x"}, "b": {"a": "y"}})


def test_imports_come_from_rows_above():
    rooms = sorted({room_of(path) for path in FILES})
    assert {"config", "model", "engine", "train"} <= set(rooms)
    assert not down_arrows({room: rooms_imported(room) for room in rooms})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_engine_imports_deepspeed(path):
    lines = [line for module, line in imports(path) if module.split(".")[0] == "deepspeed"]
    assert not lines or name_of(path) == "engine.py"


def test_the_engine_does_import_deepspeed():
    assert "deepspeed" in {module for module, _ in imports(PACKAGE / "engine.py")}


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in NO_TORCH], ids=name_of)
def test_settings_and_problems_know_no_torch(path):
    heavy = {"torch", "transformers", "peft", "numpy"}
    assert not heavy & {module.split(".")[0] for module, _ in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_and_docstrings(path):
    names = {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a module says what it knows"
