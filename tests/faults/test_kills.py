"""SIGKILL of one rank at every kind of place: the other ends by itself, and the resumed run is the same."""

import itertools
import socket
from pathlib import Path

import pytest

from tests.faults.comparing import Numbers
from tests.faults.conftest import Bench
from tests.launched.forked import Ended, Warm

ENGINE = "coconut_ds.engine.engine:Engine"
PROTOCOL, FOLDERS = "coconut_ds.runs.checkpoints", "coconut_ds.runs.checkpoint_folders"
PUBLISH = f"{FOLDERS}:CheckpointFolders.publish"
# name: (place, call, when, newest checkpoint after it).  There is one every 4 steps and every epoch (6).
PLACES = {
    "forward": (f"{ENGINE}.loss", 11, "before", "checkpoint_0_step_0000004"),
    "between forward and backward": (f"{ENGINE}.backward", 20, "before", "checkpoint_1_step_0000002"),
    "before the optimizer step": ("torch.optim:AdamW.step", 9, "before", "checkpoint_1_step_0000002"),
    "after the optimizer step": ("torch.optim:AdamW.step", 9, "after", "checkpoint_1_step_0000002"),
    "evaluation": ("coconut_ds.model.coconut:Coconut.generate", 1, "before", "checkpoint_0_step_0000004"),
    "saving: random state": (f"{PROTOCOL}:save_random_state", 2, "after", "checkpoint_0_step_0000004"),
    "saving: inside DeepSpeed": (
        "deepspeed.runtime.engine:DeepSpeedEngine._save_zero_checkpoint",
        2,
        "before",
        "checkpoint_0_step_0000004",
    ),
    "saving: shards": (f"{ENGINE}.save_shards", 2, "after", "checkpoint_0_step_0000004"),
    "saving: hashing": (f"{PROTOCOL}:sync_and_hash", 2, "before", "checkpoint_0_step_0000004"),
}
ON_THE_MAIN_RANK = {
    "saving: model": ("coconut_ds.training.trainer:write_model", 2, "before", "checkpoint_0_step_0000004"),
    "saving: manifest": (f"{PROTOCOL}:Manifest.write", 2, "before", "checkpoint_0_step_0000004"),
    "saving: before the rename": (
        f"{FOLDERS}:CheckpointFolders.publish",
        2,
        "before",
        "checkpoint_0_step_0000004",
    ),
    "saving: after the rename": ("pathlib:Path.rename", 2, "after", "checkpoint_1"),
    "saving: before retention": (f"{FOLDERS}:CheckpointFolders.retire", 2, "before", "checkpoint_1"),
    "saving: in retention": (f"{FOLDERS}:CheckpointFolders._remove", 1, "after", "checkpoint_1"),
}


def check(bench: Bench, reference: Numbers, rank: int, place, launched: bool) -> None:
    at, call, when, newest = place
    fault = {"rank": rank, "at": at, "call": call, "when": when, "do": "kill"}
    ended = bench.launch(faults=[fault]) if launched else bench.train(faults=[fault])
    assert ended.left == []
    if launched:
        assert ended.code != 0
    else:
        assert ended.codes[rank] == -9
        assert ended.codes[1 - rank] == 77, ended.output
        assert f"rank {1 - rank} lost contact with another rank" in ended.output
    resumed = bench.train()
    assert resumed.codes == [0, 0], resumed.output
    assert f"resumed from {bench.run_folder}/{newest}:" in resumed.output
    assert bench.numbers() == reference
    assert bench.steps() == sorted(set(bench.steps()))
    assert not list(bench.run_folder.glob(".tmp-*"))


@pytest.mark.parametrize("name, rank", list(zip(PLACES, itertools.cycle([0, 1]), strict=False)))
def test_kill(bench: Bench, reference: Numbers, name: str, rank: int) -> None:
    check(bench, reference, rank, PLACES[name], launched=False)


@pytest.fixture(scope="module")
def lone_ranks(
    task: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm
) -> dict[str, tuple[str, Ended]]:
    """(port, end) of starts whose ranks do not meet; each waits for 20 seconds, so they wait together."""
    benches = {name: Bench(task, tmp_path_factory.mktemp("lone"), warm) for name in ("0", "1", "port")}
    killed = {"at": "coconut_ds.training.trainer:start_distributed", "do": "kill"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        running = {
            name: benches[name].start("--stuck-seconds", "1", faults=[{"rank": int(name), **killed}])
            for name in ("0", "1")
        }
        running["port"] = benches["port"].start(variables={"MASTER_PORT": port})
        return {name: (port, run.wait()) for name, run in running.items()}


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_before_the_ranks_meet(lone_ranks: dict[str, tuple[str, Ended]], rank: int) -> None:
    _, ended = lone_ranks[str(rank)]
    assert ended.codes[rank] == -9 and ended.codes[1 - rank] == 77, ended.output
    assert f"rank {rank} of 2 did not connect to" in ended.output and ended.seconds < 100


def test_port_in_use(lone_ranks: dict[str, tuple[str, Ended]]) -> None:
    port, ended = lone_ranks["port"]
    assert ended.codes == [2, 2] and ended.left == [], ended.output
    assert ended.output.count("error: ") == 1
    assert f"127.0.0.1:{port}: another program uses this port" in ended.output


@pytest.mark.parametrize("name", ON_THE_MAIN_RANK)
def test_kill_of_the_main_rank(bench: Bench, reference: Numbers, name: str) -> None:
    check(bench, reference, 0, ON_THE_MAIN_RANK[name], launched=False)


@pytest.mark.parametrize("rank, name", [(0, "before the optimizer step"), (1, "saving: shards")])
def test_kill_under_the_launcher(bench: Bench, reference: Numbers, rank: int, name: str) -> None:
    check(bench, reference, rank, PLACES[name], launched=True)
