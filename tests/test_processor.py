"""The quick description of the processor says what py-cpuinfo says."""

import platform

import cpuinfo
import pytest

from coconut_ds import processor

HERE = pytest.mark.skipif(
    platform.machine() != "x86_64" or not processor.PROC.is_file(), reason="only for Linux on x86-64"
)
# Before anything replaces it: py-cpuinfo's own answer is `cpuinfo.cpuinfo.get_cpu_info`.
THEIRS = cpuinfo.cpuinfo.get_cpu_info


@HERE
def test_it_says_what_py_cpuinfo_says(monkeypatch):
    monkeypatch.setattr(cpuinfo, "get_cpu_info", THEIRS)
    processor.answer_cpuinfo()
    ours, theirs = cpuinfo.get_cpu_info(), THEIRS()
    assert (ours["arch"], ours["vendor_id_raw"]) == (theirs["arch"], theirs["vendor_id_raw"])
    assert set(ours["flags"]) <= set(theirs["flags"])
    assert [flag in ours["flags"] for flag in ("avx2", "avx512f")] == [
        flag in theirs["flags"] for flag in ("avx2", "avx512f")
    ]


def test_text_without_the_fields_is_left_to_py_cpuinfo():
    assert processor.describe("processor : 0\nFeatures : fp asimd\n") is None


def test_the_first_core_speaks_for_all():
    text = "vendor_id\t: One\nflags\t\t: fpu avx2 abm\n\nvendor_id\t: Two\nflags\t: fpu\n"
    expected = {"arch": "X86_64", "vendor_id_raw": "One", "flags": ["abm", "avx2", "fpu"]}
    assert processor.describe(text) == expected
