"""Is this machine ready?  Each finding says ok, what to know, or what is wrong and what to do about it.

Knows: torch's view of the cards, tools, limits of the system.  Does not know: experiments, DeepSpeed's code.
GPU checks take anything that looks like `torch.cuda`, so that they can be tested without one.
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

OK, NOTE, PROBLEM = "ok", "note", "problem"
GIB = 2**30
REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OFFLOAD_RAM_GIB = 32  # host_memory_gib of the shipped ds_configs
STALE_SECONDS = 60


@dataclass(frozen=True)
class Finding:
    """One line: `state` is ok, note or problem; `remedy` says what to do."""

    what: str
    state: str
    said: str
    remedy: str = ""


def examine(folder: Path, cuda: Any = None) -> list[Finding]:
    """Everything; `folder` is where runs will be written."""
    import torch

    cuda = torch.cuda if cuda is None else cuda
    findings = [python_version(), *torch_build(torch.__version__, torch.version.cuda, cuda)]
    if cuda.is_available():
        findings += [finding for number in range(cuda.device_count()) for finding in card(number, cuda)]
        findings += peer_access(cuda)
    findings += [*compilers(cuda.is_available(), torch.version.cuda), *stale_locks(), *versions(REQUIREMENTS)]
    return [*findings, host_memory(), locked_memory(), shared_memory(), disk(folder)]


def python_version(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    said = ".".join(map(str, version))
    if version < (3, 11):
        return Finding("python", PROBLEM, said, "make the environment with Python 3.11 or newer")
    return Finding("python", OK, said)


def torch_build(version: str, cuda_version: str | None, cuda: Any) -> Iterator[Finding]:
    """What torch was built for, and whether it sees a card."""
    built = f"{version}, CUDA {cuda_version}" if cuda_version else f"{version}, without CUDA"
    yield Finding("torch", OK, built)
    if cuda.is_available():
        return
    if shutil.which("nvidia-smi") and cuda_version is None:
        remedy = "install a CUDA build of torch (cu126 for GTX 10xx and older cards)"
        yield Finding("GPUs", PROBLEM, "there is a driver, but this torch was built without CUDA", remedy)
    elif cuda_version:
        remedy = (
            "run nvidia-smi; a driver older than the CUDA of this torch, or CUDA_VISIBLE_DEVICES, hides cards"
        )
        yield Finding("GPUs", PROBLEM, "torch was built with CUDA and sees no card", remedy)
    else:
        yield Finding(
            "GPUs", NOTE, "none; ranks run on the CPU, in fp32 or bf16", "enough to try, not to train"
        )


def card(number: int, cuda: Any) -> Iterator[Finding]:
    """One card: architecture, precision, Triton, memory that others hold."""
    what, capability = f"GPU {number}", tuple(cuda.get_device_capability(number))
    free, total = cuda.mem_get_info(number)
    name, short = cuda.get_device_name(number), f"{capability[0]}.{capability[1]}"
    said = f"{name}, compute capability {short}, {total / GIB:.1f} GiB"
    architectures = list(cuda.get_arch_list())
    if runs_on(capability, architectures):
        yield Finding(what, OK, said)
    else:
        old = capability < (7, 5)
        remedy = (
            "install the cu126 build of torch: newer CUDA builds leave out Maxwell, Pascal and Volta"
            if old
            else "install a torch built with a newer CUDA"
        )
        yield Finding(what, PROBLEM, f"{said}; this torch was built for {' '.join(architectures)}", remedy)
    yield precision(what, capability)
    yield triton(what, capability)
    if free < 0.9 * total:
        used = (total - free) / GIB
        remedy = "stop the other programs (nvidia-smi names them), or lower memory_budget.gpu_memory_mib"
        yield Finding(f"{what} memory", NOTE, f"{used:.1f} GiB are in use already", remedy)


def runs_on(capability: tuple[int, ...], architectures: list[str]) -> bool:
    """Whether a wheel's code runs on a card: a binary of its major version, or PTX of an older one."""
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
    """The rule of engine.py: bf16 from 8.0 on, fp16 from 7.0 on, else fp32."""
    if capability >= (8, 0):
        return Finding(f"{what} precision", OK, "bf16: ds_configs/zero2_offload_bf16.json")
    if capability >= (7, 0):
        said = "fp16: ds_configs/zero2_offload_fp16.json; bf16 would be emulated"
        return Finding(f"{what} precision", OK, said)
    said = "fp32: ds_configs/zero2_offload.json; fp16 runs at 1/64 of the fp32 rate on Pascal"
    return Finding(
        f"{what} precision", OK, said, "DS_ALLOW_DEPRECATED_FP16=1 allows fp16, to save memory alone"
    )


def triton(what: str, capability: tuple[int, ...]) -> Finding:
    if capability < (7, 0):
        return Finding(f"{what} Triton", NOTE, "not on this card (needs 7.0)", "nothing here needs it")
    if util.find_spec("triton") is None:
        return Finding(f"{what} Triton", NOTE, "not installed", "nothing here needs it")
    return Finding(f"{what} Triton", OK, "installed")


def peer_access(cuda: Any) -> Iterator[Finding]:
    """Whether every two cards reach each other's memory."""
    count = cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [f"{a}-{b}" for a, b in pairs if not cuda.can_device_access_peer(a, b)]
    if apart:
        remedy = (
            "NCCL copies through host memory, which works; should it hang at the start: NCCL_P2P_DISABLE=1"
        )
        yield Finding("peer access", NOTE, f"not between GPUs {', '.join(apart)}", remedy)
    elif pairs:
        yield Finding("peer access", OK, f"between all {count} GPUs")
    elif count == 1:
        yield Finding("peer access", NOTE, "one GPU", "--num_gpus 1, and twice the accumulation")


def compilers(on_gpu: bool, cuda_version: str | None) -> Iterator[Finding]:
    """What DeepSpeed builds its operators with, at the first start."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        remedy = "install it (apt-get install g++); DeepSpeed compiles its CPU Adam at the first start"
        yield Finding("C++ compiler", PROBLEM, f"{compiler} is not there", remedy)
    else:
        yield Finding("C++ compiler", OK, first_line(compiler, "--version"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        yield Finding("Python headers", PROBLEM, f"{headers} is absent", "apt-get install python3-dev")
    beside = Path(sys.executable).parent / "ninja"
    if shutil.which("ninja"):
        yield Finding("ninja", OK, first_line("ninja", "--version"))
    else:
        remedy = f"put {beside.parent} on the PATH" if beside.exists() else "pip install ninja"
        yield Finding("ninja", PROBLEM, "not on the PATH", remedy)
    if on_gpu:
        yield cuda_compiler(cuda_version)


def cuda_compiler(cuda_version: str | None) -> Finding:
    """nvcc, which operators for the GPU need; the offloading Adam does, too."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else "nvcc"
    if shutil.which(nvcc) is None:
        remedy = (
            'install the CUDA toolkit of torch\'s version, or write "torch_adam": true into optimizer.params'
        )
        return Finding("nvcc", PROBLEM, "not there", remedy)
    said = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    found = f"{said[1]}.{said[2]}" if said else "unknown version"
    if said and cuda_version and said[1] != cuda_version.split(".")[0]:
        return Finding(
            "nvcc", PROBLEM, f"{found}, torch has {cuda_version}", "point CUDA_HOME at the same version"
        )
    return Finding("nvcc", OK, found)


def stale_locks() -> Iterator[Finding]:
    """A build that was killed leaves a lock behind, and the next start waits for it for ever."""
    roots = {Path.home() / ".cache" / "torch_extensions", Path(sys.prefix) / "torch_extensions"}
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        roots = {Path(os.environ["TORCH_EXTENSIONS_DIR"])}
    for lock in sorted(lock for root in roots for lock in root.glob("**/lock")):
        age = time.time() - lock.stat().st_mtime
        if age > STALE_SECONDS and not _works_in(lock.parent):
            said = f"{lock} is {age / 60:.0f} minutes old, and nothing is being compiled there"
            yield Finding("build lock", PROBLEM, said, "delete it; every start waits for it")


def _works_in(folder: Path) -> bool:
    """Whether a process, such as ninja, runs in a folder."""
    return any(process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"]))


def versions(path: Path) -> Iterator[Finding]:
    """Installed packages against the pins of requirements.txt."""
    if not path.is_file():
        yield Finding("packages", NOTE, f"{path} is absent", "nothing to compare with")
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
    said = f"{len(pins)} pinned" + (f", {others} in other versions" if others else ", all as pinned")
    yield Finding("packages", OK, said)


def host_memory() -> Finding:
    """RAM, as the machine or the container allows it."""
    memory = psutil.virtual_memory()
    total = min(memory.total, *_container_limits(), memory.total)
    said = f"{total / GIB:.1f} GiB, {min(total, memory.available) / GIB:.1f} free"
    if total < 8 * GIB:
        return Finding(
            "RAM", PROBLEM, said, "two ranks that offload GPT-2 need 8 GiB; use ds_configs/zero2.json"
        )
    if total < 0.95 * OFFLOAD_RAM_GIB * GIB:
        remedy = f"the shipped budgets count on {OFFLOAD_RAM_GIB} GiB; lower memory_budget.host_memory_gib"
        return Finding("RAM", NOTE, said, remedy)
    return Finding("RAM", OK, said)


def _container_limits() -> Iterator[int]:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).is_file() else ""
        if text.isdigit():
            yield int(text)


def locked_memory() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("memlock", OK, "unlimited")
    said = f"{limit / 2**20:,.0f} MiB may be locked"
    return Finding("memlock", NOTE, said, 'ulimit -l unlimited, or "pin_memory": false, if pinning fails')


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """NCCL and gloo pass data between ranks through it."""
    if not path.is_dir():
        return Finding("/dev/shm", PROBLEM, "is absent", "mount it: --shm-size 2g for docker")
    free = shutil.disk_usage(path).free
    if free < GIB:
        return Finding("/dev/shm", PROBLEM, f"{free / 2**20:,.0f} MiB free", "--shm-size 2g for docker")
    return Finding("/dev/shm", OK, f"{free / GIB:.1f} GiB free")


def disk(folder: Path) -> Finding:
    """Room for checkpoints where runs are written."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    said = f"{free:.1f} GiB free at {folder.resolve()}"
    if free < 5:
        remedy = (
            "a checkpoint of GPT-2 takes 2 GiB, two are kept while one is written; choose another save_path"
        )
        return Finding("disk", PROBLEM, said, remedy)
    return Finding("disk", OK, said)


def first_line(*command: str) -> str:
    return _output(*command).partition("\n")[0]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def as_text(findings: list[Finding]) -> str:
    """One line a finding, its remedy below."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<8} {finding.what:<{width}}  {finding.said}")
        if finding.remedy:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    problems = sum(finding.state == PROBLEM for finding in findings)
    return "\n".join([*lines, "", f"{problems} problems" if problems != 1 else "1 problem"])
