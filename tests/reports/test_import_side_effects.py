"""No module changes a setting of matplotlib or selects a backend; tables and pages do not load torch."""

import os
import subprocess
import sys
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


def test_tables_and_pages_of_runs_do_not_wait_for_torch(make_run, tmp_path) -> None:
    program = (
        "import sys; from coconut_ds.__main__ import main\n"
        "code = main(['report', *sys.argv[1:], '--no-page'])\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "code = code or main(['report', *sys.argv[1:], '--html', 'page.html'])\n"
        "sys.exit(code or str({'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    runs = [str(make_run(name, [50, 60], method="coconut").folder) for name in ("a", "b")]
    ended = subprocess.run(
        [sys.executable, "-c", program, *runs],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert ended.stderr.strip() == "" and "60.0 %" in ended.stdout
