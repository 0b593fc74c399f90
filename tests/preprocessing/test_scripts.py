"""The scripts as a user starts them: from anywhere, without network, interrupted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "preprocessing").glob("*.py") if "def main" in path.read_text()
)
NO_NETWORK = {"https_proxy": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}


def start(*command: object, **options: object) -> subprocess.Popen:
    environment = os.environ | NO_NETWORK | {"PYTHON": sys.executable}
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores SIGINT, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_all_five_scripts_are_tried():
    assert SCRIPTS == ["arithmetic", "gsm8k", "hendrycks_math", "prontoqa", "prosqa"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_from_another_folder_and_as_a_module(tmp_path, script):
    runs = [
        start(sys.executable, ROOT / "preprocessing" / f"{script}.py", "--help", cwd=tmp_path),
        start(sys.executable, "-m", f"preprocessing.{script}", "--help", cwd=ROOT),
        start(sys.executable, f"{script}.py", "--help", cwd=ROOT / "preprocessing"),
    ]
    for run in runs:
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0 and out.startswith("usage:"), err


@pytest.mark.parametrize(
    "command, expected",
    [
        (["gsm_icot.bash"], "Internalize_CoT_Step_by_Step"),
        (["gsm8k.py", "--form", "original"], "openai/grade-school-math"),
        (["prosqa.py"], "facebookresearch/coconut"),
        (["prontoqa.py"], "5hop_0shot_random.json"),
        (["hendrycks_math.py"], "EleutherAI/hendrycks_math"),
        (["hendrycks_math.py", "--split", "fork"], "qwedsacf/competition_math"),
    ],
)
def test_without_network_the_file_and_its_place_are_named(tmp_path, command, expected):
    script, *options = command
    interpreter = "bash" if script.endswith(".bash") else sys.executable
    output = tmp_path / "data"
    options += ["--output-dir", output]
    run = start(interpreter, ROOT / "preprocessing" / script, *options, cwd=tmp_path)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and expected in err and str(output) in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, more, number",
    [
        ("prosqa.py", ["--generate", "--train", "1000000"], signal.SIGINT),
        ("prontoqa.py", ["--generate", "--train", "1000000"], signal.SIGTERM),
        ("gsm8k.py", ["--source"], signal.SIGINT),
    ],
)
def test_an_interruption_leaves_what_was_there(tmp_path, script, more, number):
    output = tmp_path / "data"
    output.mkdir()
    (output / "mine.json").write_text("[]")
    if more[-1] == "--source":
        more = [*more, endless_gsm8k(tmp_path / "source")]
    run = start(sys.executable, ROOT / "preprocessing" / script, *more, "--output-dir", output)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 100_000 for path in output.iterdir()):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.01)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and "interrupted" in err and "Traceback" not in err
    assert [path.name for path in output.iterdir()] == ["mine.json"]


def endless_gsm8k(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("What is one and one?||<<1+1=2>> #### 2\n" * 500_000)
    return folder


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    run = start(
        sys.executable, ROOT / "preprocessing/prosqa.py", "--generate", "--output-dir", tmp_path / "file"
    )
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and str(tmp_path / "file") in err and "Traceback" not in err


def test_wrong_options_are_refused_before_anything_is_written(tmp_path):
    for options in (["--limit", "0"], ["--hops", "9"], ["--hops", "6-3"], ["--train", "-1"]):
        run = start(
            sys.executable, ROOT / "preprocessing" / "prosqa.py", "--generate", *options, cwd=tmp_path
        )
        _, err = run.communicate(timeout=60)
        assert run.returncode == 2 and options[0] in err and list(tmp_path.iterdir()) == []
