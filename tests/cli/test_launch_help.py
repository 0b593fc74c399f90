"""`bash launch/*.sh --help` prints what the script does and installs nothing."""

import shutil
import subprocess

import pytest

from tests.conftest import ROOT

SCRIPTS = [
    path.name for path in (ROOT / "launch").glob("*.sh") if path.name not in ("ranks.sh", "torch_build.sh")
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_installs_nothing(name, tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    command = ["bash", f"launch/{name}", "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and f"bash launch/{name}" in ended.stdout and not ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]
