"""Signals, files and clocks stop a run on all ranks at the same step; the next start goes on from there."""

from pathlib import Path

import pytest

from tests.faults.comparing import Numbers
from tests.faults.conftest import STEPS_PER_EPOCH, Bench
from tests.faults.processes import run
from tests.launched.forked import ROOT, Ended, Faults, environment

STEP, GENERATE = "coconut_ds.engine.engine:Engine.step", "coconut_ds.model.coconut:Coconut.generate"


def signal_at(target: str, name: str = "TERM", rank: int = 0, at: str = STEP, call: int = 9) -> Faults:
    return [{"rank": rank, "at": at, "call": call, "do": f"{name}@{target}"}]


def check_stopped_and_resumed(bench: Bench, reference: Numbers, ended: Ended, reason: str) -> None:
    assert ended.left == []
    assert "stopped: " in ended.output and reason in ended.output, ended.output
    assert "Traceback" not in ended.output and "error:" not in ended.output, ended.output
    stopped_at = bench.steps()[-1]
    resumed = bench.train()
    assert resumed.codes == [0, 0], resumed.output
    assert f"step {stopped_at}" in resumed.output.partition("resumed from")[2].splitlines()[0]  # none is lost
    assert bench.numbers() == reference


@pytest.mark.parametrize(
    "faults, reason",
    [
        (signal_at("self", "TERM", rank=0), "received SIGTERM"),
        (signal_at("self", "INT", rank=0), "received SIGINT"),
        (signal_at("self", "USR1", rank=1), "received SIGUSR1"),
        (signal_at("self", "TERM", rank=0, at=GENERATE, call=1), "received SIGTERM"),
        (
            signal_at("self", "TERM", rank=0, at="coconut_ds.training.trainer:write_model", call=1),
            "received SIGTERM",
        ),
        (signal_at("self", "TERM", rank=0, call=STEPS_PER_EPOCH), "received SIGTERM"),
    ],
    ids=[
        "TERM main",
        "INT main",
        "USR1 other",
        "TERM evaluating",
        "TERM saving",
        "last step",
    ],
)
def test_signal_to_a_rank(bench: Bench, reference: Numbers, faults: Faults, reason: str) -> None:
    ended = bench.train(faults=faults)
    assert ended.codes == [75, 75], ended.output
    check_stopped_and_resumed(bench, reference, ended, reason)


@pytest.mark.parametrize(
    "faults, code, reason",
    [
        (signal_at("self", "TERM", rank=1), 75, "received SIGTERM"),
        (signal_at("parent", "TERM"), 1, "received SIGTERM"),
        (signal_at("grandparent", "TERM"), -15, "the launcher ended"),
        (signal_at("parent", "KILL"), 0, "the launcher ended"),
    ],
    ids=["TERM rank", "TERM launcher", "TERM runner", "KILL launcher"],
)
def test_signal_under_the_launcher(
    bench: Bench, reference: Numbers, faults: Faults, code: int, reason: str
) -> None:
    ended = bench.launch(faults=faults)
    assert ended.code == code, ended.output  # what DeepSpeed makes of it; launch/train.sh says 75
    check_stopped_and_resumed(bench, reference, ended, reason)


@pytest.mark.parametrize("name, target", [("USR1", "script"), ("KILL", "parent")])
def test_train_script_hands_signals_on(bench: Bench, reference: Numbers, name: str, target: str) -> None:
    target_file = bench.folder / "script.pid"
    faults = signal_at(str(target_file) if target == "script" else target, name)
    command = f"echo $$ > {bench.folder}/script.pid; exec bash launch/train.sh {bench.experiment}"
    variables = environment(faults, NUM_GPUS="2", DS_CONFIG="ds_configs/zero2.json")
    ended = run(["bash", "-c", command], ROOT, variables)
    assert ended.code == 75, ended.output
    assert ended.left == [] and "stopped: " in ended.output
    resumed = bench.train()
    assert resumed.codes == [0, 0], resumed.output
    assert bench.numbers() == reference


def test_stop_file(bench: Bench, reference: Numbers) -> None:
    ended = bench.train(faults=[{"rank": 0, "at": STEP, "call": 9, "do": f"touch {bench.run_folder}/STOP"}])
    assert ended.codes == [75, 75] and not (bench.run_folder / "STOP").exists()
    check_stopped_and_resumed(bench, reference, ended, f"found {bench.run_folder}/STOP")


def test_save_file_saves_and_goes_on(bench: Bench, reference: Numbers) -> None:
    ended = bench.train(faults=[{"rank": 0, "at": STEP, "call": 9, "do": f"touch {bench.run_folder}/SAVE"}])
    assert ended.codes == [0, 0] and not (bench.run_folder / "SAVE").exists()
    assert bench.numbers() == reference
    saved = [
        line for line in (bench.run_folder / "metrics.jsonl").read_text().splitlines() if '"save"' in line
    ]
    assert any("checkpoint_1_step_0000003" in line for line in saved)


def test_max_minutes(bench: Bench, reference: Numbers) -> None:
    ended = bench.train("--max-minutes", "0.0001")
    assert ended.codes == [75, 75] and bench.steps() == [1]
    check_stopped_and_resumed(bench, reference, ended, "--max-minutes 0.0001 reached")


def test_stopped_again_and_again(bench: Bench, reference: Numbers) -> None:
    """Every fifth step of a rank, until it is through."""
    codes: list[list[int]] = []
    while len(codes) < 10:
        ended = bench.train(faults=signal_at("self", "TERM", rank=1, call=5))
        codes.append(ended.codes)
        if ended.codes == [0, 0]:
            break
    assert codes[-1] == [0, 0] and len(codes) >= 4
    assert bench.numbers() == reference


def test_slurm_script_queues_the_job_again(bench: Bench) -> None:
    """With an srun that starts two ranks and gives them Slurm's variables."""
    tools = bench.folder / "bin"
    tools.mkdir()
    tool(
        tools / "scontrol", 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > "$FOLDER/requeued"; fi'
    )
    tool(
        tools / "srun",
        """while [ "${1#-}" != "$1" ]; do shift; done
        for id in 0 1; do SLURM_NTASKS=2 SLURM_PROCID=$id SLURM_LOCALID=$id "$@" & ids="$ids $!"; done
        for id in $ids; do wait $id || code=$?; done; exit $code""",
    )
    faults = signal_at("self", "USR1", rank=1, call=2)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here"}
    variables = environment(faults, DS_CONFIG="ds_configs/zero2.json", FOLDER=str(bench.folder), **slurm)
    variables["PATH"] = f"{tools}:{variables['PATH']}"
    ended = run(["bash", str(ROOT / "launch/slurm.sbatch"), str(bench.experiment)], bench.folder, variables)
    assert ended.code == 75 and ended.left == [], ended.output
    assert (bench.folder / "requeued").read_text() == "requeue 4711\n"


def tool(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
