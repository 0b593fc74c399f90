"""The package has rooms, and a module imports only from its own room and from rooms above it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "coconut_ds"

# Top to bottom.
ROOMS = (
    "errors",
    "templates",
    "distributed",
    "files",
    "tables",
    "config",
    "objectives",
    "data",
    "runs",
    "thoughts",
    "model",
    "engine",
    "evaluation",
    "memory",
    "reports",
    "training",
    "cli",
    "__main__",
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
WITHOUT_TORCH = ("errors.py", "config/", "data/problems.py", "data/curriculum.py")
ENGINE = "engine/engine.py"


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import in a file, including those inside functions."""
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


def upward_imports(room: str, imported: list[tuple[str, str]]) -> list[str]:
    """Faults among (module, 'file:line') imports of one room."""
    faults = []
    for module, place in imported:
        parts = module.split(".")
        if parts[0] == "coconut_ds" and len(parts) > 1 and ROOMS.index(parts[1]) > ROOMS.index(room):
            faults.append(f"{place}: {room} imports {parts[1]}, which is below it")
    return faults


def test_an_import_from_below_is_a_fault():
    assert upward_imports("data", [("coconut_ds.model.loading", "data/x.py:3")]) == [
        "data/x.py:3: data imports model, which is below it"
    ]
    assert not upward_imports("model", [("coconut_ds.data.batching", "x"), ("torch.nn", "y")])


def test_every_room_is_known():
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_come_from_rooms_above(path):
    found = [(module, f"{name_of(path)}:{line}") for module, line in imports(path)]
    assert not upward_imports(room_of(path), found)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_engine_imports_deepspeed(path):
    lines = [line for module, line in imports(path) if module.split(".")[0] == "deepspeed"]
    assert bool(lines) == (name_of(path) == ENGINE)


@pytest.mark.parametrize(
    "path", [path for path in FILES if name_of(path).startswith(WITHOUT_TORCH)], ids=name_of
)
def test_settings_and_problems_know_no_torch(path):
    heavy = {"torch", "transformers", "peft", "numpy"}
    assert not heavy & {module.split(".")[0] for module, _ in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_and_docstrings(path):
    names = {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
    assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a module says what it knows"


def modules_loaded_with(path: Path, seen: set[str]) -> set[str]:
    """Modules of the package that `path` imports when it is imported itself, and theirs."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("coconut_ds."):
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                place = PACKAGE.parent / name.replace(".", "/")
                found = [p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()]
                if found and name not in seen:
                    seen.add(name)
                    modules_loaded_with(found[0], seen)
    return seen


def test_training_loads_nothing_that_reports_on_runs_or_evaluates_saved_models():
    loaded = modules_loaded_with(PACKAGE / "training" / "trainer.py", set())
    assert "coconut_ds.engine.engine" in loaded and "coconut_ds.evaluation.evaluate" in loaded
    after = ("coconut_ds.reports", "coconut_ds.cli.", "coconut_ds.templates")
    assert not [name for name in loaded if name.startswith(after)]
    parts = ("ablation", "intervals", "inspection", "export", "pretrained", "saved_models", "measure")
    assert not loaded & {f"coconut_ds.evaluation.{part}" for part in parts}
