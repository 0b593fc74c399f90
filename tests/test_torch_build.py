"""Which torch launch/setup.sh installs: a fake nvidia-smi plays GPUs and drivers."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAIL = "setup_fail() { printf 'setup: %s\\n' \"$@\" >&2; exit 2; }\n"


def shell(script: str, tmp_path: Path, nvidia_smi: str | None, **environment: str):
    """`script` in bash after launch/torch_build.sh, with a machine's nvidia-smi or none."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("bash", "grep", "cat"):
        (programs / name).unlink(missing_ok=True)
        (programs / name).symlink_to(f"/usr/bin/{name}")
    if nvidia_smi is not None:
        (programs / "nvidia-smi").write_text(f"#!/bin/bash\n{nvidia_smi}\n")
        (programs / "nvidia-smi").chmod(0o755)
    script = f"set -euo pipefail\ncd {ROOT}\n{FAIL}source launch/torch_build.sh\n{script}"
    return subprocess.run(
        ["bash", "-c", script], env={"PATH": str(programs), **environment}, capture_output=True, text=True
    )


def gpus(*capabilities: float, driver: str) -> str:
    return "echo '" + "\n".join(f"{capability}, {driver}" for capability in capabilities) + "'"


@pytest.mark.parametrize(
    "nvidia_smi, expected",
    [
        (gpus(6.1, 6.1, driver="535.183.01"), "cu126"),  # two GTX 1080 Ti
        (gpus(6.1, driver="580.65.06"), "cu126"),
        (gpus(7.0, driver="580.65.06"), "cu126"),  # V100
        (gpus(7.5, 7.5, driver="550.54.14"), "cu126"),  # two RTX 2080 Ti
        (gpus(7.5, driver="580.65.06"), "default"),
        (gpus(8.6, driver="535.183.01"), "cu126"),  # RTX 3060
        (gpus(8.6, driver="580.65.06"), "default"),
        (gpus(9.0, driver="570.86.10"), "cu126"),  # H100
        (gpus(9.0, driver="590.44"), "default"),
        (gpus(12.0, driver="580.65.06"), "default"),  # RTX 5090
        (gpus(6.1, 8.6, driver="580.65.06"), "cu126"),
        ("true", "default"),  # a driver, and no GPU
        ("echo 'NVIDIA-SMI has failed'; exit 9", "default"),
        (None, "default"),
    ],
)
def test_the_build_follows_from_gpu_and_driver(tmp_path, nvidia_smi, expected):
    done = shell('torch_build "$(list_gpus)"', tmp_path, nvidia_smi)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
    assert ("nvidia-smi failed" in done.stderr) == (nvidia_smi is not None and "failed" in nvidia_smi)


@pytest.mark.parametrize(
    "nvidia_smi, remedy",
    [
        (gpus(3.7, driver="470.1"), "DS_ACCELERATOR=cpu"),
        (gpus(6.1, driver="470.223.02"), "install a newer driver"),
        (gpus(12.0, driver="570.86.10"), "install driver 580"),
        (gpus(6.1, 12.0, driver="580.65.06"), "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_machines_without_a_build_get_a_remedy(tmp_path, nvidia_smi, remedy):
    done = shell('build=$(torch_build "$(list_gpus)"); echo "$build"', tmp_path, nvidia_smi)
    assert (done.returncode, done.stdout) == (2, "") and remedy in done.stderr


def test_the_builds_are_the_pinned_version(tmp_path):
    (pin,) = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    assert shell("torch_requirement default", tmp_path, None).stdout.strip() == pin
    assert shell("torch_requirement cu126", tmp_path, None).stdout.startswith(
        f"{pin}+cu126 --index-url https://"
    )
    unknown = shell("torch_requirement cu999", tmp_path, None)
    assert unknown.returncode == 2 and "default or cu126" in unknown.stderr


@pytest.mark.parametrize("seen", [True, False])
def test_listed_gpus_that_torch_does_not_see_stop_the_setup(tmp_path, seen):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    message = "" if seen else "torch 2.13.0 (CUDA 13.0) sees no GPU"
    python.write_text(f"#!/bin/bash\ncat >/dev/null\necho '{message}'\n")
    python.chmod(0o755)
    done = shell(f"cd {tmp_path}; check_torch '7.5, 550.1' default", tmp_path, None)
    assert done.returncode == (0 if seen else 2)
    assert seen or ("sees no GPU" in done.stderr and "TORCH_BUILD=cu126" in done.stderr)
    assert (
        shell(f"cd {tmp_path}; check_torch '' default", tmp_path, None).returncode == 0
    )  # no GPU: no question


def test_every_rank_beside_a_gpu_gets_its_share_of_the_cores(tmp_path):
    setup = (ROOT / "launch" / "setup.sh").read_text(encoding="utf-8")
    function = setup[setup.index("threads_per_rank() {") : setup.index("\nmake_environment\n")]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for program, output in (
        ("lscpu", "# c,s\n0,0\n0,0\n1,0\n2,0\n3,0\n4,0\n5,0"),
        ("nvidia-smi", "GPU 0\nGPU 1"),
    ):
        (tmp_path / program).write_text(f"#!/bin/bash\necho '{output}'\n")
        (tmp_path / program).chmod(0o755)
    for accelerator, expected in (("", "3"), ("cpu", "1")):
        environment["DS_ACCELERATOR"] = accelerator
        done = subprocess.run(
            ["bash", "-c", f"{function}\nthreads_per_rank"], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
