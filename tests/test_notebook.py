"""The example notebook runs from top to bottom, with less data and fewer epochs.

A line with ! is a shell command; those that do not train run in this process, which saves their imports.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from coconut_ds.__main__ import main
from tests.conftest import ROOT

CELLS = json.loads((ROOT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
SMALLER = {
    "epochs_per_stage: [10, 4, 18]": "epochs_per_stage: [1, 1, 1]",
    "num_epochs: 32": "num_epochs: 3",
    "--train 800 --valid 100 --test 100": "--train 200 --valid 20 --test 20",
}
PROGRAM = "python -m coconut_ds "


def shell(command: str) -> None:
    if command.startswith(PROGRAM) and not command.startswith((PROGRAM + "train", PROGRAM + "profile")):
        assert main(shlex.split(command.removeprefix(PROGRAM))) == 0
    else:
        subprocess.run(command, shell=True, check=True)


@pytest.mark.slow
def test_first_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert main(["configs", "copy"]) == 0
    code = "\n".join("".join(cell["source"]) + "\n" for cell in CELLS if cell["cell_type"] == "code")
    for large, small in SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    environment = dict(os.environ)
    try:
        exec(re.sub(r"^!(.*)$", lambda line: f"shell({line[1]!r})", code, flags=re.M), {"shell": shell})
    finally:
        os.environ.clear()
        os.environ.update(environment)


def test_outputs_are_those_of_a_complete_run():
    outputs = [cell["outputs"] for cell in CELLS if cell["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in outputs for output in cell)
    assert sum(map(bool, outputs)) > len(outputs) // 2
