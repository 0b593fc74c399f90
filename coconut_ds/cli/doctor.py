"""Check this machine (GPUs, torch, compilers, versions, memory, disk) and suggest fixes.

    python -m coconut_ds doctor

Exit code 0: ready; 1: at least one check failed.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import psutil

from coconut_ds.files import json_text
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-path",
        default="runs",
        metavar="DIR",
        help="folder that runs will be written to (default: runs)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    findings = examine(Path(args.save_path))
    print(json_text([asdict(f) for f in findings], indent=1) if args.json else as_text(findings))
    return int(any(finding.state == PROBLEM for finding in findings))


def examine(folder: Path, cuda: Any = None) -> list[Finding]:
    """Run all checks.  `folder`: of future runs; `cuda`: an object with the interface of torch.cuda."""
    import torch

    cuda = torch.cuda if cuda is None else cuda
    findings = [python_version(), *torch_build(torch.__version__, torch.version.cuda, cuda)]
    if cuda.is_available():
        findings += [finding for number in range(cuda.device_count()) for finding in gpu(number, cuda)]
        findings += peer_access(cuda)
    findings += [*compilers(), *build_locks(), *versions(REQUIREMENTS)]
    return [*findings, host_memory(), locked_memory(), shared_memory(), disk(folder)]


def python_version(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    state = OK if version >= (3, 11) else PROBLEM
    remedy = "" if state == OK else "create the environment with Python 3.11 or newer"
    return Finding("python", state, ".".join(map(str, version)), remedy)


def torch_build(version: str, cuda_version: str | None, cuda: Any) -> Iterator[Finding]:
    """The CUDA version of torch and whether it sees a GPU."""
    built = f"{version}, CUDA {cuda_version}" if cuda_version else f"{version}, without CUDA"
    yield Finding("torch", OK, built)
    if cuda.is_available():
        return
    state = PROBLEM
    if shutil.which("nvidia-smi") and cuda_version is None:
        message = "a driver is installed, but this torch was built without CUDA"
        remedy = "rm .venv/torch.sha256, then bash launch/setup.sh, which chooses the build for the GPU"
    elif cuda_version:
        message = "torch was built with CUDA but sees no GPU"
        remedy = (
            "run nvidia-smi; the driver may be older than torch's CUDA, or CUDA_VISIBLE_DEVICES hides GPUs"
        )
    else:
        state, message = NOTE, "none; ranks run on the CPU, in fp32 or bf16"
        remedy = "enough for tests, not for training"
    yield Finding("GPUs", state, message, remedy)


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
        remedy = "install a torch built with a newer CUDA"
        if capability < (7, 5):
            remedy = "rm .venv/torch.sha256, then TORCH_BUILD=cu126 bash launch/setup.sh: "
            remedy += "newer CUDA builds do not include Maxwell, Pascal and Volta"
        yield Finding(what, PROBLEM, f"{message}; this torch was built for {' '.join(architectures)}", remedy)
    yield precision(what, capability)
    yield triton(what, capability)
    if free < 0.9 * total:
        used = (total - free) / GIB
        remedy = "stop other programs (nvidia-smi lists them) or lower memory_budget.gpu_memory_mib"
        yield Finding(f"{what} memory", NOTE, f"{used:.1f} GiB already in use", remedy)


def runs_on(capability: tuple[int, ...], architectures: list[str]) -> bool:
    """Whether a wheel's code runs on a GPU: a binary of its major version or older PTX."""
    for kind, major, minor in re.findall(r"\b(sm|compute)_(\d+)(\d)[a-z]?\b", " ".join(architectures)):
        version = (int(major), int(minor))
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def precision(what: str, capability: tuple[int, ...]) -> Finding:
    """The rule of engine.py: bf16 from 8.0, fp16 from 7.0, else fp32."""
    remedy = ""
    if capability >= (8, 0):
        message = "bf16: ds_configs/zero2_offload_bf16.json"
    elif capability >= (7, 0):
        message = "fp16: ds_configs/zero2_offload_fp16.json; bf16 would be emulated"
    else:
        message = "fp32: ds_configs/zero2_offload.json; fp16 runs at 1/64 of the fp32 rate on Pascal"
        remedy = "DS_ALLOW_DEPRECATED_FP16=1 allows fp16, only to save memory"
    return Finding(f"{what} precision", OK, message, remedy)


def triton(what: str, capability: tuple[int, ...]) -> Finding:
    if capability >= (7, 0) and util.find_spec("triton"):
        return Finding(f"{what} Triton", OK, "installed")
    message = "not installed" if capability >= (7, 0) else "not supported by this GPU (needs 7.0)"
    return Finding(f"{what} Triton", NOTE, message, "not required")


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
    from coconut_ds.engine.deepspeed_patches import stale_locks  # imports torch

    for lock in stale_locks():
        age = (time.time() - lock.stat().st_mtime) / 60
        message = f"{lock} is {age:.0f} minutes old, and no build is running there"
        yield Finding("build lock", PROBLEM, message, f"rm {lock}")


def versions(path: Path) -> Iterator[Finding]:
    """Installed packages compared with requirements.txt; without that file, with what the wheel requires."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        own = list(metadata.distributions(name="coconut_ds"))[:1]
        lines = [line for part in own for line in part.requires or () if "extra ==" not in line]
    pins = [match.groups() for line in lines if (match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line))]
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
    state, remedy = OK, ""
    if total < 8 * GIB:
        state, remedy = PROBLEM, "two ranks with offloaded GPT-2 need 8 GiB; use ds_configs/zero2.json"
    elif total < 0.95 * OFFLOAD_RAM_GIB * GIB:
        assumed = f"the shipped budgets assume {OFFLOAD_RAM_GIB} GiB"
        state, remedy = NOTE, f"{assumed}; lower memory_budget.host_memory_gib"
    return Finding("RAM", state, message, remedy)


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
    remedy = "a GPT-2 checkpoint has 2 GiB, and two are kept while one is written; choose another save_path"
    state, remedy = (PROBLEM, remedy) if free < 5 else (OK, "")
    return Finding("disk", state, f"{free:.1f} GiB free at {folder.resolve()}", remedy)


def first_line(*command: str) -> str:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        output = str(error)
    return output.partition("\n")[0]


def as_text(findings: list[Finding]) -> str:
    """One line per finding, with its remedy below."""
    rows = []
    for finding in findings:
        rows.append([finding.state, finding.what, finding.message])
        rows += [["", "", f"-> {finding.remedy}"]] if finding.remedy else []
    problems = sum(finding.state == PROBLEM for finding in findings)
    table = Table(["", "", ""], rows, align="l")
    return f"{table.text()}\n\n{problems} problem" + ("" if problems == 1 else "s")
