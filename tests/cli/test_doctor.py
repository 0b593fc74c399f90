"""The doctor on machines that are not at hand: cards are played by an object with torch.cuda's functions."""

import json
import os
import subprocess
import time
from importlib import metadata

import pytest

from coconut_ds.__main__ import main
from coconut_ds.cli import doctor

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
PASCAL, VOLTA, TURING, AMPERE, HOPPER, BLACKWELL = (6, 1), (7, 0), (7, 5), (8, 6), (9, 0), (12, 0)


class FakeCuda:
    """Some cards of one kind."""

    def __init__(self, capability=TURING, count=2, architectures=CU130, peers=True, free=1.0):
        self.capability, self.count, self.architectures = capability, count, architectures
        self.peers, self.free = peers, free

    def is_available(self):
        return self.count > 0

    def device_count(self):
        return self.count

    def get_device_capability(self, number):
        return self.capability

    def get_device_name(self, number):
        return f"card {number}"

    def get_arch_list(self):
        return self.architectures

    def mem_get_info(self, number):
        total = 11 * doctor.GIB
        return int(self.free * total), total

    def can_device_access_peer(self, one, other):
        return self.peers


def states(findings):
    return {finding.what: finding.state for finding in findings}


@pytest.mark.parametrize(
    "capability, architectures, runs",
    [
        (PASCAL, CU126, True),  # sm_60 binaries run on 6.1
        (PASCAL, CU130, False),
        (VOLTA, CU130, False),
        (TURING, CU130, True),
        (HOPPER, ["sm_90a"], True),
        (BLACKWELL, CU126, False),
        (BLACKWELL, [*CU126, "compute_90"], True),  # compiled at the start from PTX
        (AMPERE, ["sm_89"], False),  # a binary of a newer minor version
        (PASCAL, [], False),
    ],
)
def test_a_wheel_fits_a_card(capability, architectures, runs):
    assert doctor.runs_on(capability, architectures) is runs


def test_pascal_is_sent_to_the_cu126_build():
    findings = list(doctor.gpu(0, FakeCuda(PASCAL)))
    assert findings[0].state == doctor.PROBLEM
    assert "6.1" in findings[0].message and "cu126" in findings[0].remedy
    assert "newer CUDA" in next(doctor.gpu(0, FakeCuda(BLACKWELL, architectures=CU126))).remedy


@pytest.mark.parametrize(
    "capability, word",
    [(PASCAL, "fp32"), (VOLTA, "fp16"), (TURING, "fp16"), (AMPERE, "bf16"), (HOPPER, "bf16")],
)
def test_precision_goes_by_the_capability(capability, word):
    assert doctor.precision("GPU 0", capability).message.startswith(word)


def test_triton_needs_seven():
    assert doctor.triton("GPU 0", PASCAL).state == doctor.NOTE


def test_memory_that_others_hold_is_noted():
    assert "GPU 0 memory" not in states(doctor.gpu(0, FakeCuda(free=0.95)))
    assert states(doctor.gpu(0, FakeCuda(free=0.5)))["GPU 0 memory"] == doctor.NOTE


def test_peer_access():
    assert next(doctor.peer_access(FakeCuda())).state == doctor.OK
    (apart,) = doctor.peer_access(FakeCuda(count=3, peers=False))
    assert apart.state == doctor.NOTE and "0-1, 0-2, 1-2" in apart.message
    assert "one GPU" in next(doctor.peer_access(FakeCuda(count=1))).message


def test_a_torch_without_cuda_on_a_machine_with_a_driver(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = list(doctor.torch_build("2.13.0+cpu", None, FakeCuda(count=0)))
    assert [finding.state for finding in found] == [doctor.OK, doctor.PROBLEM]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert states(doctor.torch_build("2.13.0+cpu", None, FakeCuda(count=0)))["GPUs"] == doctor.NOTE
    assert states(doctor.torch_build("2.13.0", "13.0", FakeCuda(count=0)))["GPUs"] == doctor.PROBLEM
    assert states(doctor.torch_build("2.13.0", "13.0", FakeCuda())) == {"torch": doctor.OK}


def test_what_deepspeed_compiles_with(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = states(doctor.compilers())
    assert found == {"C++ compiler": doctor.PROBLEM, "ninja": doctor.PROBLEM}  # and no CUDA toolkit


def test_an_old_build_lock_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert list(doctor.build_locks()) == []
    os.utime(lock, (time.time() - 3600,) * 2)
    (found,) = doctor.build_locks()
    assert found.state == doctor.PROBLEM and str(lock) in found.message
    with subprocess.Popen(["sleep", "30"], cwd=lock.parent) as compiler:
        assert list(doctor.build_locks()) == []
        compiler.kill()


def test_versions_are_compared_with_the_pins(tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text(f"# pins\npytest=={metadata.version('pytest')}\nnumpy==0.0.1\nno-such-package==1.0\n")
    found = {finding.what: finding for finding in doctor.versions(pins)}
    assert {name: finding.state for name, finding in found.items()} == {
        "numpy": doctor.NOTE,
        "no-such-package": doctor.PROBLEM,
        "packages": doctor.OK,
    }
    assert found["no-such-package"].remedy == "pip install no-such-package==1.0"
    assert "3 pinned, 1 in other versions" in found["packages"].message


def test_versions_are_compared_with_the_wheel_s_requirements(tmp_path, monkeypatch):
    (tmp_path / "coconut_ds-9.dist-info").mkdir()
    (tmp_path / "coconut_ds-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: coconut_ds\nVersion: 9\nRequires-Dist: numpy==0.0.1\n"
        "Requires-Dist: no-such-package==1.0; extra == 'dev'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.what: finding.message for finding in doctor.versions(tmp_path / "requirements.txt")}
    assert found["packages"] == "1 pinned, 1 in other versions" and "tested with 0.0.1" in found["numpy"]


def test_limits_of_the_system(monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 64 * 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor.shared_memory(tmp_path).state == doctor.PROBLEM  # docker's default
    assert doctor.disk(tmp_path / "not" / "yet").state == doctor.PROBLEM
    monkeypatch.setattr(doctor, "_container_limits", lambda: iter([4 * doctor.GIB]))
    assert doctor.host_memory().state == doctor.PROBLEM
    assert doctor.python_version((3, 9, 1)).state == doctor.PROBLEM


def test_the_command_ends_with_what_it_found(monkeypatch, capsys, tmp_path):
    ready = [
        doctor.Finding("python", doctor.OK, "3.11"),
        doctor.Finding("RAM", doctor.NOTE, "16", "buy more"),
    ]
    monkeypatch.setattr("coconut_ds.cli.doctor.examine", lambda folder: ready)
    assert main(["doctor"]) == 0
    assert "-> buy more" in capsys.readouterr().out
    ill = [*ready, doctor.Finding("disk", doctor.PROBLEM, "full", "empty it")]
    monkeypatch.setattr("coconut_ds.cli.doctor.examine", lambda folder: ill)
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[-1]["remedy"] == "empty it"


def test_this_machine_can_be_examined(tmp_path):
    found = states(doctor.examine(tmp_path, FakeCuda()))
    assert {"python", "torch", "GPU 0", "GPU 1 precision", "peer access", "RAM", "disk", "packages"} <= set(
        found
    )
