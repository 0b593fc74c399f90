"""Numbers that go bad and ranks that do not move: an end in bounded time, and what one needs to look into."""

import json

import pytest

from tests.faults.comparing import Numbers
from tests.faults.conftest import Bench

LOSS = "coconut_ds.engine.engine:Engine.loss"


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_on_one_rank_ends_all(bench: Bench, reference: Numbers, rank: int) -> None:
    ended = bench.train(faults=[{"rank": rank, "at": LOSS, "call": 20, "do": "nan"}])
    assert ended.codes == [76, 76], ended.output
    assert ended.output.count("error: ") == 1 and "the loss of step 9 is nan" in ended.output
    losses = {
        rank: [
            record["loss"]
            for record in json.loads((bench.run_folder / f"diverged/step_9_rank_{rank}.json").read_text())
        ]
        for rank in (0, 1)
    }
    assert losses[rank].count(None) == 1  # JSON has no NaN
    assert None not in losses[1 - rank]
    assert bench.train().codes == [0, 0]  # from before the step; this time without the fault
    assert bench.numbers() == reference


@pytest.mark.parametrize("rank, how", [(0, "sleep"), (1, "stop")])
def test_a_rank_that_does_not_move_is_named(bench: Bench, reference: Numbers, rank: int, how: str) -> None:
    fault = {"rank": rank, "at": LOSS, "call": 18, "do": how}
    running = bench.start("--stuck-seconds", "5", faults=[fault])
    running.processes[1 - rank].join(60)
    assert running.processes[1 - rank].exitcode == 77
    assert f"waiting for rank {rank}, which makes no progress" in running.output, running.output
    if how == "sleep":
        running.processes[rank].join(60)
        assert running.processes[rank].exitcode == 77
        stacks = (bench.run_folder / f"stuck/rank_{rank}.txt").read_text()
        assert "faulty.py" in stacks and "train_epoch" in stacks  # where it sleeps
    else:
        running.processes[rank].kill()  # what a launcher does with a process that takes no signal
    running.wait()
    assert bench.train().codes == [0, 0]
    assert bench.numbers() == reference
