"""What DeepSpeed asks py-cpuinfo about the processor, answered from /proc/cpuinfo.

py-cpuinfo starts a Python process to look at the processor itself, 0.6 CPU seconds a question, and DeepSpeed
asks it on every rank three times.  It uses the architecture, the vendor and the flags of AVX2 and AVX-512.

Knows: /proc/cpuinfo of Linux on x86-64; anything else is left to py-cpuinfo.  Does not know: DeepSpeed.
"""

import functools
import platform
import sys
from pathlib import Path
from typing import Any

PROC = Path("/proc/cpuinfo")


def describe(text: str) -> dict[str, Any] | None:
    """The fields of py-cpuinfo that DeepSpeed reads; None where `text` does not have them."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    if "flags" not in fields or "vendor_id" not in fields:
        return None
    return {
        "arch": "X86_64",
        "vendor_id_raw": fields["vendor_id"],
        "flags": sorted(fields["flags"].split()),
    }


def answer_cpuinfo() -> None:
    """Put the quick answer in the place of `cpuinfo.get_cpu_info`, where there is one."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not PROC.is_file():
        return
    try:
        import cpuinfo
    except ImportError:
        return
    known = describe(PROC.read_text(encoding="utf-8", errors="replace"))
    if known is not None:
        cpuinfo.get_cpu_info = functools.partial(dict, known)
