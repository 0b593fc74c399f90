"""The committed samples are sound, small and what the commands in data/README.md write."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from coconut_ds.data.checks import check_data_files

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data" / "sample"
COMMANDS = re.findall(
    r"^python (preprocessing/\S+ +.*--output-dir data/sample.*)$", (ROOT / "data/README.md").read_text(), re.M
)


def test_samples_are_sound_and_small():
    files = sorted(path for path in SAMPLES.glob("*.json") if not path.name.endswith(".card.json"))
    assert len(files) == 6
    report = check_data_files(files)
    assert report.is_valid, report.table()
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) < 300_000


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_command_writes_the_same_bytes(tmp_path, command):
    arguments = shlex.split(command.replace("data/sample", str(tmp_path)))
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True, timeout=60)
    written = sorted(tmp_path.iterdir())
    assert len(written) == 4
    for path in written:
        assert path.read_bytes() == (SAMPLES / path.name).read_bytes()


def test_both_sample_commands_are_tried():
    assert len(COMMANDS) == 2
