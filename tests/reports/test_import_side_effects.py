"""No module changes a setting of matplotlib or selects a backend for the process."""

from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "coconut_ds"
DRAWS = [path for path in PACKAGE.rglob("*.py") if "matplotlib" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", DRAWS, ids=lambda path: path.stem)
def test_no_global_setting_of_matplotlib(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert "rcParams" not in code and "matplotlib.use" not in code and "pyplot" not in code


def test_drawing_modules_are_checked() -> None:
    assert {"checks", "figures", "memory_figures", "inspection_page"} <= {path.stem for path in DRAWS}
