"""Which torch launch/setup.sh installs: a fake nvidia-smi plays GPUs and drivers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from coconut_ds.errors import ConfigError
from coconut_ds.training.sweep import which_gpus

ROOT = Path(__file__).parents[1]
CHOICE = 'gpus=$(list_gpus); build=${TORCH_BUILD:-$(torch_build "$gpus")}; echo "$build"'
FAIL = "setup_fail() { printf 'setup: %s\\n' \"$@\" >&2; exit 2; }\n"


def shell(script: str, tmp_path: Path, nvidia_smi: str | None, **environment: str):
    """`script` in bash after launch/torch_build.sh, with a machine's nvidia-smi or none."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("bash", "grep", "cat", "cut"):
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
        (gpus(10.0, driver="580.65.06"), "default"),  # B200
        (gpus(6.1, 8.6, driver="535.183.01"), "cu126"),  # GTX 1080 Ti and RTX 3090
        (
            "echo 'WARNING: infoROM is corrupted at gpu 0000:3B:00.0'; echo '7.5, 580.65.06'; exit 14",
            "default",
        ),
        ("true", "default"),  # a driver, and no GPU
        ("echo 'No devices were found'; exit 6", "default"),
        (None, "default"),
    ],
)
def test_the_build_follows_from_gpu_and_driver(tmp_path, nvidia_smi, expected):
    done = shell(CHOICE, tmp_path, nvidia_smi)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, "")


@pytest.mark.parametrize(
    "nvidia_smi, remedy",
    [
        (gpus(3.7, driver="470.1"), "DS_ACCELERATOR=cpu"),
        (gpus(6.1, driver="470.223.02"), "install a newer driver"),
        (gpus(12.0, driver="570.86.10"), "install driver 580"),
        (gpus(10.0, driver="570.86.10"), "install driver 580"),
        (gpus(6.1, 12.0, driver="580.65.06"), "CUDA_VISIBLE_DEVICES"),
        ("echo 'NVIDIA-SMI has failed because it could not'; exit 9", "reboot"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "reboot"),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", "update a driver older than"),
        ("echo '[N/A], 580.65.06'", "TORCH_BUILD=cu126"),
    ],
)
def test_machines_without_a_build_get_a_remedy(tmp_path, nvidia_smi, remedy):
    done = shell(CHOICE, tmp_path, nvidia_smi)
    assert (done.returncode, done.stdout) == (2, "") and remedy in done.stderr


def test_a_build_may_be_named_where_nvidia_smi_does_not_tell(tmp_path):
    done = shell(CHOICE, tmp_path, "echo '[N/A], 580.65.06'", TORCH_BUILD="cu126")
    assert (done.returncode, done.stdout.strip()) == (0, "cu126")


def test_a_gpu_without_a_driver_is_named(tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    for vendor, noted in (("0x8086", False), ("0x10de", True)):
        (tmp_path / "0000:01:00.0" / "vendor").write_text(vendor + "\n")
        done = shell(CHOICE, tmp_path, None, PCI_DEVICES=str(tmp_path))
        assert (done.returncode, done.stdout.strip()) == (0, "default")
        assert ("no driver" in done.stderr) == noted


TWO_PARTS = (
    "GPU 0: A100 (UUID: GPU-1)\n  MIG 3g.20gb Device 0: (UUID: MIG-1)\n  MIG 3g.20gb Device 1: (UUID: 2)"
)


@pytest.mark.parametrize(
    "listed, environment, expected",
    [
        (None, {}, "--num_gpus 2"),
        ("GPU 0: a\nGPU 1: b\nGPU 2: c", {}, "--num_gpus 3"),
        ("GPU 0: a\nGPU 1: b\nGPU 2: c", {"NUM_GPUS": "1"}, "--num_gpus 1"),
        (TWO_PARTS, {}, "--num_gpus 1"),
        ("GPU 0: a\nGPU 1: b", {"CUDA_VISIBLE_DEVICES": "1"}, "--include localhost:1"),
        ("GPU 0: a", {"CUDA_VISIBLE_DEVICES": "2,3,5", "NUM_GPUS": "2"}, "--include localhost:2,3"),
        ("GPU 0: a", {"CUDA_VISIBLE_DEVICES": "1", "DS_ACCELERATOR": "cpu"}, "--num_gpus 2"),
        ("GPU 0: a", {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, None),
    ],
)
def test_ranks_run_on_the_gpus_that_are_visible(tmp_path, listed, environment, expected):
    ranks = (ROOT / "launch" / "ranks.sh").read_text(encoding="utf-8")
    function = ranks[ranks.index("which_gpus() {") : ranks.index("# Beside a GPU")]
    nvidia_smi = None if listed is None else f"echo '{listed}'"
    done = shell(f"{function}\ngpus=$(which_gpus)\necho $gpus", tmp_path, nvidia_smi, **environment)
    assert (done.stdout.strip() or None) == expected
    assert done.returncode == (2 if expected is None else 0)
    assert expected is not None or "write the numbers of the GPUs" in done.stderr


def test_a_sweep_runs_on_the_gpus_that_are_visible(monkeypatch):
    for visible, accelerator, expected in (
        ("", "", ["--num_gpus", "2"]),
        ("2,3,5", "", ["--include", "localhost:2,3"]),
        ("2,3,5", "cpu", ["--num_gpus", "2"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
        assert which_gpus(2) == expected
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(ConfigError, match="names 3"):
        which_gpus(4)


def test_the_builds_are_the_pinned_version(tmp_path):
    (pin,) = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")
    ]
    assert shell("torch_requirement default", tmp_path, None).stdout.strip() == pin
    assert shell("torch_requirement cu126", tmp_path, None).stdout.startswith(
        f"{pin}+cu126 --index-url https://"
    )
    unknown = shell("torch_requirement cu999", tmp_path, None)
    assert unknown.returncode == 2 and "default, cu126 or cpu" in unknown.stderr
    cpu = shell("torch_requirement cpu", tmp_path, None).stdout
    assert cpu.startswith(f"{pin}+cpu --index-url https://") and cpu.endswith("/cpu\n")


def test_the_small_build_for_the_cpu_stays_until_there_is_a_gpu(tmp_path):
    setup = (ROOT / "launch" / "setup.sh").read_text(encoding="utf-8")
    function = setup[setup.index("install_torch() {") : setup.index("# On the CPU DeepSpeed brings")]
    script = f"{function}\nonce() {{ :; }}\ncheck_torch() {{ :; }}\ncd {tmp_path}\ninstall_torch\n"
    script += 'echo "${DS_ACCELERATOR:-gpu}"'
    (tmp_path / ".venv").mkdir()
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    gpu = gpus(8.6, driver="580.65.06")
    for nvidia_smi, environment, suffix in (
        (None, {}, ""),
        (gpu, {"TORCH_BUILD": "cpu"}, "+cpu"),
        (None, {}, "+cpu"),
        (gpu, {}, ""),
        (gpu, {"DS_ACCELERATOR": "cpu"}, ""),
    ):
        (tmp_path / "bin" / "nvidia-smi").unlink(missing_ok=True)
        done = shell(script, tmp_path, nvidia_smi, **environment)
        requirement = (tmp_path / ".venv/torch.requirement").read_text().split()[0]
        assert (done.returncode, requirement.endswith("+cpu")) == (0, suffix == "+cpu"), done.stderr
        on_gpu = nvidia_smi is not None and not environment
        assert done.stdout.strip() == ("gpu" if on_gpu else "cpu")


@pytest.mark.parametrize("seen", [True, False])
def test_listed_gpus_that_torch_does_not_see_stop_the_setup(tmp_path, seen):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    message = "" if seen else "torch 2.13.0+cu130 sees none"
    python.write_text(f"#!/bin/bash\ncat >/dev/null\necho '{message}'\n")
    python.chmod(0o755)
    done = shell(f"cd {tmp_path}; check_torch '7.5, 550.1' default", tmp_path, None)
    assert done.returncode == (0 if seen else 2)
    assert seen or (
        "GPUs, but torch 2.13.0+cu130 sees none" in done.stderr and "TORCH_BUILD=cu126" in done.stderr
    )
    assert (
        shell(f"cd {tmp_path}; check_torch '' default", tmp_path, None).returncode == 0
    )  # no GPU: no question


@pytest.mark.parametrize(
    "cores, numactl, environment, binds",
    [
        ("8 8", "exit 0", {}, True),
        ("4 8", "exit 0", {}, False),  # a container with fewer cores than the machine
        ("8 8", "exit 1", {}, False),
        ("8 8", None, {}, False),
        ("8 8", "exit 0", {"BIND_CORES": "0"}, False),
        ("8 8", "exit 0", {"DS_ACCELERATOR": "cpu"}, False),
    ],
)
def test_ranks_beside_gpus_get_cores_of_their_own(tmp_path, cores, numactl, environment, binds):
    ranks = (ROOT / "launch" / "ranks.sh").read_text(encoding="utf-8")
    function = ranks[ranks.index("can_bind_cores() {") : ranks.index("# Every rank leaves")]
    assert "if can_bind_cores; then launcher_arguments+=(--bind_cores_to_rank); fi" in ranks
    available, installed = cores.split()
    nproc = f'if [ "${{1:-}}" = --all ]; then echo {installed}; else echo {available}; fi'
    numactl = f"numactl() {{ {numactl.replace('exit', 'return')}; }}" if numactl else ""
    script = f"nproc() {{ {nproc}; }}\n{numactl}\n{function}\ncan_bind_cores && echo yes || echo no"
    assert shell(script, tmp_path, None, **environment).stdout.strip() == ("yes" if binds else "no")


def test_every_rank_beside_a_gpu_gets_its_share_of_the_cores(tmp_path):
    setup = (ROOT / "launch" / "setup.sh").read_text(encoding="utf-8")
    function = setup[setup.index("threads_per_rank() {") : setup.index("\nmake_environment\n")]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for program, output in (
        ("lscpu", "# c,s\n0,0\n0,0\n1,0\n2,0\n3,0\n4,0\n5,0"),
        ("nvidia-smi", "GPU 0: a\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\nGPU 1: b"),
    ):
        (tmp_path / program).write_text(f"#!/bin/bash\necho '{output}'\n")
        (tmp_path / program).chmod(0o755)
    for accelerator, expected in (("", "3"), ("cpu", "1")):
        environment["DS_ACCELERATOR"] = accelerator
        done = subprocess.run(
            ["bash", "-c", f"{function}\nthreads_per_rank"], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
