"""The shipped files, listed, printed, copied, and inside the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coconut_ds import __version__
from coconut_ds.__main__ import main

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, suffixes in (
        ("configs", (".yaml",)),
        ("ds_configs", (".json",)),
        ("preprocessing", (".py", ".bash")),
    )
    for path in (ROOT / folder).rglob("*")
    if path.suffix in suffixes
)


def test_list_and_show(capsys):
    assert main(["configs", "list"]) == 0
    assert capsys.readouterr().out.split() == SHIPPED
    assert main(["configs", "show", "ds_configs/zero2.json"]) == 0
    assert capsys.readouterr().out == (ROOT / "ds_configs" / "zero2.json").read_text()
    assert main(["configs", "show", "zero9.json"]) == 2
    assert "coconut-ds configs list" in capsys.readouterr().err
    assert main(["configs", "show", "zero2.json"]) == 2
    assert "did you mean ds_configs/zero2.json?" in capsys.readouterr().err


def test_copy_keeps_what_the_user_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "copy", "configs/quickstart/", "ds_configs/zero2.json"]) == 0
    copied = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert copied == [
        "configs/quickstart/coconut.yaml",
        "configs/quickstart/no_cot.yaml",
        "configs/quickstart/no_thoughts.yaml",
        "configs/quickstart/plain.yaml",
        "ds_configs/zero2.json",
    ]
    own = tmp_path / "ds_configs" / "zero2.json"
    own.write_text("{}")
    assert main(["configs", "copy"]) == 2
    assert "ds_configs/zero2.json: exists and differs" in capsys.readouterr().err
    assert own.read_text() == "{}" and not (tmp_path / "preprocessing").exists()
    assert main(["configs", "copy", "--force"]) == 0
    assert own.read_text() != "{}" and (tmp_path / "preprocessing" / "arithmetic.py").is_file()
    assert main(["configs", "copy", "--to", "sub/folder", "ds_configs/zero2.json"]) == 0
    assert [path.name for path in (tmp_path / "sub").rglob("*.*")] == ["zero2.json"]


EXTRAS = ("requirements-qlora.txt", "tests/requirements.txt")


@pytest.mark.slow
def test_the_wheel_works_in_another_folder(tmp_path):
    """Built, unpacked and used far from the checkout, up to a valid experiment on data made there."""
    source = tmp_path / "source"  # a build writes beside its sources
    source.mkdir()
    for name in ("configs", "ds_configs", "preprocessing", "coconut_ds"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", *EXTRAS):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        "wheel",
        str(source),
    ]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert f"-{__version__}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {f"coconut_ds/shipped/{name}" for name in SHIPPED} <= set(names) and "coconut_ds/py.typed" in names
    metadata = next(name for name in names if name.endswith("/METADATA"))
    text = (tmp_path / "site" / metadata).read_text()
    assert "Requires-Dist: deepspeed==" in text and "License-Expression: MIT" in text
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", "import sys; from coconut_ds.__main__ import main; sys.exit(main())"]
    for arguments in (
        [*command, "configs", "copy"],
        [sys.executable, "preprocessing/arithmetic.py", "--model-dir", "data/arithmetic_gpt2"],
        [
            *command,
            "validate",
            "configs/quickstart/coconut.yaml",
            "ds_configs/zero2_offload.json",
            "data/arithmetic_test.json",
        ],
    ):
        done = subprocess.run(arguments, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
