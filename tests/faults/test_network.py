"""Two network namespaces as two hosts with one rank each: the same numbers; an end when the link is cut."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.faults.comparing import Numbers
from tests.faults.conftest import Bench
from tests.faults.processes import run
from tests.launched.forked import ROOT, Ended, environment

ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces joined by one link, `link0` on each side."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = (f"coconut{os.getpid()}a", f"coconut{os.getpid()}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "link0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "link0",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
            for device in ("lo", "link0"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel gives no network namespaces: {error.stderr}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_hosts(bench: Bench, hosts: tuple[str, str], *more: str, cut: bool = False) -> Ended:
    link = {
        "rank": 0,
        "at": "coconut_ds.engine.engine:Engine.step",
        "call": 9,
        "do": "run ip link set link0 down",
    }
    variables = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "link0"}
    names = {f"NAMESPACE_{rank}": name for rank, name in enumerate(hosts)}
    return bench.train(*more, faults=[link] if cut else [], variables=variables | names)


def test_link_cut_in_training(bench: Bench, reference: Numbers, hosts: tuple[str, str]) -> None:
    ended = on_hosts(bench, hosts, "--stuck-seconds", "8", cut=True)
    assert ended.codes == [77, 77] and ended.left == [], ended.output
    assert "no progress for" in ended.output or "lost contact with another rank" in ended.output
    ip("-n", hosts[0], "link", "set", "link0", "up")
    resumed = on_hosts(bench, hosts)
    assert resumed.codes == [0, 0], resumed.output
    assert bench.numbers() == reference  # of two ranks on one host


def test_multinode_script_without_ssh(bench: Bench, reference: Numbers, hosts: tuple[str, str]) -> None:
    """The script on each host; a signal to the one of the second host stops both."""
    hostfile = bench.folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    stop = {
        "rank": 1,
        "at": "coconut_ds.engine.engine:Engine.step",
        "call": 9,
        "do": f"TERM@{bench.folder}/script_1.pid",
    }
    ended: dict[int, Ended] = {}

    def start(rank: int) -> None:
        variables = environment(
            [stop], HOSTFILE=str(hostfile), NODE_RANK=str(rank), MASTER_ADDR=ADDRESSES[0],
            MASTER_PORT="29511", GLOO_SOCKET_IFNAME="link0", DS_CONFIG="ds_configs/zero2.json",
        )  # fmt: skip
        script = (
            f"echo $$ > {bench.folder}/script_{rank}.pid; exec bash launch/multinode.sh {bench.experiment}"
        )
        ended[rank] = run(["ip", "netns", "exec", hosts[rank], "bash", "-c", script], ROOT, variables)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ended[rank].code for rank in (0, 1)] == [75, 75], ended[0].output + ended[1].output
    assert not ended[0].left and not ended[1].left
    assert bench.train().codes == [0, 0]
    assert bench.numbers() == reference
