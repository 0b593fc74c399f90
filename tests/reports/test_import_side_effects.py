"""Importing the package changes no setting of matplotlib: the functions that draw set what they need."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "coconut_ds"
DRAWS = [path for path in PACKAGE.rglob("*.py") if "matplotlib" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", DRAWS, ids=lambda path: path.stem)
def test_no_setting_of_matplotlib_at_import(path: Path) -> None:
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    outside = [s for s in statements if not isinstance(s, (ast.FunctionDef, ast.ClassDef))]
    code = "\n".join(map(ast.unparse, outside))
    assert "rcParams" not in code and "matplotlib.use" not in code and "pyplot" not in code


def test_drawing_modules_are_checked() -> None:
    assert {"figures", "memory_figures", "page", "window_figure"} <= {path.stem for path in DRAWS}
