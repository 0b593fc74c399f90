"""Check this machine: each finding is ok, a note or a problem, with a remedy.

GPU checks accept any object with the interface of `torch.cuda`, so tests need no GPU.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import psutil

from coconut_ds.engine.build_locks import stale_locks
from coconut_ds.tables import Table

OK, NOTE, PROBLEM = "ok", "note", "problem"
GIB = 2**30
REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OFFLOAD_RAM_GIB = 32  # host_memory_gib of the shipped ds_configs


@dataclass(frozen=True)
class Finding:
    """One check: `state` is ok, note or problem; `remedy` is the suggested fix."""

    what: str
    state: str
    message: str
    remedy: str = ""


def examine(folder: Path, cuda: Any = None) -> list[Finding]:
    """Run all checks; `folder` is the location of future runs."""
    import torch

    cuda = torch.cuda if cuda is None else cuda
    findings = [python_version(), *torch_build(torch.__version__, torch.version.cuda, cuda)]
    if cuda.is_available():
        findings += [finding for number in range(cuda.device_count()) for finding in gpu(number, cuda)]
        findings += peer_access(cuda)
    findings += [*compilers(), *build_locks(), *versions(REQUIREMENTS)]
    return [*findings, host_memory(), locked_memory(), shared_memory(), disk(folder)]


def python_version(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    message = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", PROBLEM, message, "create the environment with Python 3.11 or newer")
    return Finding("python", OK, message)


def torch_build(version: str, cuda_version: str | None, cuda: Any) -> Iterator[Finding]:
    """The CUDA version of torch and whether it sees a GPU."""
    built = f"{version}, CUDA {cuda_version}" if cuda_version else f"{version}, without CUDA"
    yield Finding("torch", OK, built)
    if cuda.is_available():
        return
    if shutil.which("nvidia-smi") and cuda_version is None:
        remedy = "rm .venv/torch.sha256, then bash launch/setup.sh, which chooses the build for the GPU"
        yield Finding("GPUs", PROBLEM, "a driver is installed, but this torch was built without CUDA", remedy)
    elif cuda_version:
        remedy = (
            "run nvidia-smi; the driver may be older than torch's CUDA, or CUDA_VISIBLE_DEVICES hides GPUs"
        )
        yield Finding("GPUs", PROBLEM, "torch was built with CUDA but sees no GPU", remedy)
    else:
        yield Finding(
            "GPUs", NOTE, "none; ranks run on the CPU, in fp32 or bf16", "enough for tests, not for training"
        )


def gpu(number: int, cuda: Any) -> Iterator[Finding]:
    """One GPU: architecture, precision, Triton, memory in use."""
    what, capability = f"GPU {number}", tuple(cuda.get_device_capability(number))
    free, total = cuda.mem_get_info(number)
    name, short = cuda.get_device_name(number), f"{capability[0]}.{capability[1]}"
    message = f"{name}, compute capability {short}, {total / GIB:.1f} GiB"
    architectures = list(cuda.get_arch_list())
    if runs_on(capability, architectures):
        yield Finding(what, OK, message)
    else:
        old = capability < (7, 5)
        remedy = (
            "rm .venv/torch.sha256, then TORCH_BUILD=cu126 bash launch/setup.sh: newer CUDA builds do not "
            "include Maxwell, Pascal and Volta"
            if old
            else "install a torch built with a newer CUDA"
        )
        yield Finding(what, PROBLEM, f"{message}; this torch was built for {' '.join(architectures)}", remedy)
    yield precision(what, capability)
    yield triton(what, capability)
    if free < 0.9 * total:
        used = (total - free) / GIB
        remedy = "stop other programs (nvidia-smi lists them) or lower memory_budget.gpu_memory_mib"
        yield Finding(f"{what} memory", NOTE, f"{used:.1f} GiB already in use", remedy)


def runs_on(capability: tuple[int, ...], architectures: list[str]) -> bool:
    """Whether a wheel's code runs on a GPU: a binary of its major version or older PTX."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        major, minor = int(match[2]), int(match[3])
        if match[1] == "compute" and (major, minor) <= capability:
            return True
        if match[1] == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False


def precision(what: str, capability: tuple[int, ...]) -> Finding:
    """The rule of engine.py: bf16 from 8.0, fp16 from 7.0, else fp32."""
    if capability >= (8, 0):
        return Finding(f"{what} precision", OK, "bf16: ds_configs/zero2_offload_bf16.json")
    if capability >= (7, 0):
        message = "fp16: ds_configs/zero2_offload_fp16.json; bf16 would be emulated"
        return Finding(f"{what} precision", OK, message)
    message = "fp32: ds_configs/zero2_offload.json; fp16 runs at 1/64 of the fp32 rate on Pascal"
    return Finding(
        f"{what} precision", OK, message, "DS_ALLOW_DEPRECATED_FP16=1 allows fp16, only to save memory"
    )


def triton(what: str, capability: tuple[int, ...]) -> Finding:
    if capability < (7, 0):
        return Finding(f"{what} Triton", NOTE, "not supported by this GPU (needs 7.0)", "not required")
    if util.find_spec("triton") is None:
        return Finding(f"{what} Triton", NOTE, "not installed", "not required")
    return Finding(f"{what} Triton", OK, "installed")


def peer_access(cuda: Any) -> Iterator[Finding]:
    """Whether all pairs of GPUs can access each other's memory."""
    count = cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [f"{a}-{b}" for a, b in pairs if not cuda.can_device_access_peer(a, b)]
    if apart:
        remedy = "NCCL copies through host memory instead; if it hangs at the start, set NCCL_P2P_DISABLE=1"
        yield Finding("peer access", NOTE, f"not between GPUs {', '.join(apart)}", remedy)
    elif pairs:
        yield Finding("peer access", OK, f"between all {count} GPUs")
    elif count == 1:
        yield Finding("peer access", NOTE, "one GPU", "use --num_gpus 1 and twice the gradient accumulation")


def compilers() -> Iterator[Finding]:
    """The tools with which DeepSpeed builds CPU Adam, the only operator used here; no CUDA toolkit."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        remedy = "apt-get install g++; DeepSpeed compiles its CPU Adam at the first start"
        yield Finding("C++ compiler", PROBLEM, f"{compiler} is missing", remedy)
    else:
        yield Finding("C++ compiler", OK, first_line(compiler, "--version"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        yield Finding("Python headers", PROBLEM, f"{headers} is missing", "apt-get install python3-dev")
    beside = Path(sys.executable).parent / "ninja"
    if shutil.which("ninja"):
        yield Finding("ninja", OK, first_line("ninja", "--version"))
    else:
        remedy = f"put {beside.parent} on the PATH" if beside.exists() else "pip install ninja"
        yield Finding("ninja", PROBLEM, "not on the PATH", remedy)


def build_locks() -> Iterator[Finding]:
    """Locks of killed builds, for which every later start would wait."""
    for lock in stale_locks():
        age = (time.time() - lock.stat().st_mtime) / 60
        message = f"{lock} is {age:.0f} minutes old, and no build is running there"
        yield Finding("build lock", PROBLEM, message, f"rm {lock}")


def versions(path: Path) -> Iterator[Finding]:
    """Installed packages compared with requirements.txt."""
    if not path.is_file():
        yield Finding("packages", NOTE, f"{path} is missing", "versions were not checked")
        return
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    others = 0
    for name, pinned in pins:
        try:
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            yield Finding(name, PROBLEM, "not installed", f"pip install {name}=={pinned}")
            continue
        if installed != pinned:
            others += 1
            yield Finding(name, NOTE, f"{installed}; tested with {pinned}", f"pip install {name}=={pinned}")
    message = f"{len(pins)} pinned" + (f", {others} in other versions" if others else ", all as pinned")
    yield Finding("packages", OK, message)


def host_memory() -> Finding:
    """RAM of the machine or its container."""
    memory = psutil.virtual_memory()
    total = min(memory.total, *_container_limits(), memory.total)
    message = f"{total / GIB:.1f} GiB, {min(total, memory.available) / GIB:.1f} free"
    if total < 8 * GIB:
        return Finding(
            "RAM", PROBLEM, message, "two ranks with offloaded GPT-2 need 8 GiB; use ds_configs/zero2.json"
        )
    if total < 0.95 * OFFLOAD_RAM_GIB * GIB:
        remedy = f"the shipped budgets assume {OFFLOAD_RAM_GIB} GiB; lower memory_budget.host_memory_gib"
        return Finding("RAM", NOTE, message, remedy)
    return Finding("RAM", OK, message)


def _container_limits() -> Iterator[int]:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else ""
        if text.isdigit():
            yield int(text)


def locked_memory() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("memlock", OK, "unlimited")
    message = f"{limit / 2**20:,.0f} MiB may be locked"
    return Finding("memlock", NOTE, message, 'if pinning fails: ulimit -l unlimited, or "pin_memory": false')


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """/dev/shm, through which NCCL and gloo pass data between ranks."""
    if not path.is_dir():
        return Finding("/dev/shm", PROBLEM, "missing", "mount it; in docker: --shm-size 2g")
    free = shutil.disk_usage(path).free
    if free < GIB:
        return Finding("/dev/shm", PROBLEM, f"{free / 2**20:,.0f} MiB free", "in docker: --shm-size 2g")
    return Finding("/dev/shm", OK, f"{free / GIB:.1f} GiB free")


def disk(folder: Path) -> Finding:
    """Free space for checkpoints."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    message = f"{free:.1f} GiB free at {folder.resolve()}"
    if free < 5:
        remedy = (
            "a GPT-2 checkpoint has 2 GiB, and two are kept while one is written; choose another save_path"
        )
        return Finding("disk", PROBLEM, message, remedy)
    return Finding("disk", OK, message)


def first_line(*command: str) -> str:
    return _output(*command).partition("\n")[0]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def as_text(findings: list[Finding]) -> str:
    """One line per finding, with its remedy below."""
    rows = []
    for finding in findings:
        rows.append([finding.state, finding.what, finding.message])
        rows += [["", "", f"-> {finding.remedy}"]] if finding.remedy else []
    problems = sum(finding.state == PROBLEM for finding in findings)
    table = Table(["", "", ""], rows, align="l")
    return f"{table.text()}\n\n{problems} problem" + ("" if problems == 1 else "s")
