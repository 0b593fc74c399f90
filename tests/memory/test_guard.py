"""The guard: what counts as out of memory, which phase it was, and that all ranks end together."""

import gc
import inspect
import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from coconut_ds.config.deepspeed import MemoryBudget
from coconut_ds.distributed import Ranks, phase, phase_of
from coconut_ds.engine.engine import Engine
from coconut_ds.errors import BudgetError, ConfigError, OutOfMemory
from coconut_ds.evaluation.evaluate import evaluate
from coconut_ds.memory.budget import MemoryGuard, enforce_memory_budget, largest_tensors, refuse_or_warn
from coconut_ds.memory.phases import BatchShape, Phase, StagePlan
from coconut_ds.memory.planner import MIB, Plan
from coconut_ds.memory.zero import Item
from coconut_ds.model.coconut import Coconut
from coconut_ds.runs.checkpoints import Checkpoints
from coconut_ds.training import trainer
from tests.launched.forked import ROOT

CPU = torch.device("cpu")


def plan_of(activations_mib, on_exceed="error", share=10_000):
    budget = MemoryBudget("card", 1, 1000, 200, 64, {"activations": share}, on_exceed)
    phase = Phase("forward and backward", (Item("activations", "all", activations_mib * MIB, ""),))
    stage = StagePlan(0, "stage", BatchShape(1, 1, 1, 0, 1), activations_mib * MIB)
    return Plan("x", "x.json", "model", 1, budget, (), (phase,), (stage,), ())


def test_a_plan_over_the_budget_is_refused_with_the_number():
    with pytest.raises(
        BudgetError, match=r"needs 801 MiB, 1 MiB more than 800 MiB usable \(1,000 less 200 reserved\)"
    ):
        refuse_or_warn(plan_of(801))


def test_a_plan_over_the_budget_only_warns_where_the_budget_says_so():
    with pytest.warns(UserWarning, match="does not fit"):
        refuse_or_warn(plan_of(801, on_exceed="warn"))


def test_a_component_over_its_share_warns(recwarn):
    refuse_or_warn(plan_of(800, share=800))
    assert not recwarn
    with pytest.warns(UserWarning, match="activations needs 800 MiB, more than its share of 799 MiB"):
        refuse_or_warn(plan_of(800, share=799))


PHASES = {
    "initialise": trainer.start_engine,
    "forward": Engine.loss,
    "backward": Engine.backward,
    "optimizer step": Engine.step,
    "checkpoint": Checkpoints.save,
    "loading a checkpoint": Checkpoints.load,
    "evaluation": evaluate,
    "generation": Coconut.generate,
}


@pytest.mark.parametrize("name", PHASES)
def test_every_phase_names_itself(name, monkeypatch):
    """Whatever the function is called and wherever it stands: its first lookup runs out of memory."""

    class Exhausted:
        def __getattribute__(self, _):
            raise MemoryError("Tried to allocate 2 GiB")

    arguments = [Exhausted()] * sum(
        parameter.default is parameter.empty
        for parameter in inspect.signature(PHASES[name]).parameters.values()
    )
    monkeypatch.setattr(trainer, "_module", lambda *_: None)  # of the start, what follows the model
    with pytest.raises(MemoryError) as caught:
        PHASES[name](*arguments)
    assert phase_of(caught.value) == name


@phase("forward")
def run_out():
    raise MemoryError("Tried to allocate 2 GiB")


def test_the_report_names_phase_plan_tensors_and_changes(tmp_path):
    plan = plan_of(500).to_json()
    change = {"change": "fewer rows", "setting": "--set batch_size_training=1", "gpu_mib": 9, "fits": True}
    plan["changes"] = [change]
    kept = torch.zeros(3, 5, 7, 11)
    with pytest.raises(OutOfMemory) as caught, MemoryGuard(tmp_path, 0, 1, CPU, plan):
        run_out()
    text = str(caught.value)
    assert "phase 'forward'" in text and "Tried to allocate 2 GiB" in text
    assert "planned: 500 MiB" in text and "--set batch_size_training=1" in text
    report = json.loads((tmp_path / "out_of_memory_rank_0.json").read_text())
    assert report["plan"]["gpu_mib"] == 500
    assert report["reached_mib"]["host_rss_peak"] > 0
    assert (
        any(item["what"].startswith("(3, 5, 7, 11)") for item in largest_tensors(10_000)) and kept is not None
    )


def test_the_report_lists_what_the_trainer_has_frozen():
    kept = torch.zeros(3, 5, 7, 13)
    gc.freeze()
    listed = [item["what"] for item in largest_tensors(10_000)]
    assert any(what.startswith(str(tuple(kept.shape))) for what in listed)


def test_a_report_that_cannot_be_written_does_not_hide_the_reason(tmp_path):
    (tmp_path / "memory").write_text("a file in the way")
    with (
        pytest.raises(OutOfMemory, match="(?s)phase 'forward'.*report not written"),
        MemoryGuard(tmp_path / "memory", 0, 1, CPU),
    ):
        run_out()


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(ValueError, match="mine"), MemoryGuard(tmp_path, 0, 1, CPU):
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())


def test_a_waiting_rank_ends_when_another_runs_out(tmp_path):
    ended = threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()

    with MemoryGuard(tmp_path, 1, 2, CPU, end=end):
        with pytest.raises(OutOfMemory), MemoryGuard(tmp_path, 0, 2, CPU, end=end):
            raise MemoryError("no more")
        assert ended.wait(10)
    assert codes == [OutOfMemory.exit_code]
    assert json.loads((tmp_path / "out_of_memory_rank_1.json").read_text())["phase"] == "waiting"


def test_the_reports_of_an_earlier_run_end_nobody(tmp_path):
    (tmp_path / "out_of_memory_rank_0.json").write_text("{}")
    codes = []
    with MemoryGuard(tmp_path, 1, 2, CPU, end=codes.append):
        time.sleep(1.2)
    assert codes == []


@pytest.fixture(scope="module")
def written(arithmetic, tiny_experiment, tmp_path_factory):
    """An experiment file on the tiny task and two ds_configs, of plenty and of no memory."""
    folder = tmp_path_factory.mktemp("guard")
    values = {**tiny_experiment, "save_path": str(folder / "runs"), "gradient_accumulation_steps": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    plenty = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    plenty["zero_optimization"]["reduce_bucket_size"] = 100_000
    (folder / "plenty.json").write_text(json.dumps(plenty))
    plenty["memory_budget"] |= {"gpu_memory_mib": 802, "components_mib": {}}
    (folder / "tight.json").write_text(json.dumps(plenty))
    return folder


@pytest.mark.parametrize("num_epochs, is_written", [(3, True), (2, False)])
def test_the_start_of_a_trained_run_keeps_its_plan(num_epochs, is_written, tmp_path, monkeypatch):
    monkeypatch.setattr("coconut_ds.memory.budget.judged_plan", lambda *_: ({"ranks": 1}, None))
    (tmp_path / "checkpoint_2").mkdir()
    experiment = SimpleNamespace(
        debug=False, save_path=str(tmp_path.parent), name=tmp_path.name, num_epochs=num_epochs
    )
    ds_config = SimpleNamespace(memory_budget=SimpleNamespace())
    enforce_memory_budget(experiment, ds_config, None, Ranks(0, 1, CPU))
    assert (tmp_path / "memory/plan.json").exists() == is_written


def test_a_model_that_is_refused_while_it_is_planned(monkeypatch):
    refusal = ConfigError("model_id: no")
    monkeypatch.setattr("coconut_ds.memory.budget.judged_plan", lambda *_: (None, refusal))
    experiment, ds_config = SimpleNamespace(debug=True), SimpleNamespace(memory_budget=SimpleNamespace())
    with pytest.raises(ConfigError, match="model_id: no"):
        enforce_memory_budget(experiment, ds_config, None, Ranks(0, 1, CPU))


@pytest.mark.slow
def test_a_run_whose_plan_exceeds_the_budget_does_not_start(written, warm):
    arguments = ["train", f"{written}/tiny.yaml", "--deepspeed_config", f"{written}/tight.json"]
    ended = warm.start(arguments, written).wait()
    assert ended.codes == [BudgetError.exit_code], ended.output[-2000:]
    assert "does not fit" in ended.output and "--skip-plan" in ended.output
    assert not (written / "runs/tiny/checkpoint_1").exists()
    assert json.loads((written / "runs/tiny/memory/plan.json").read_text())["fits"] is False


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_out_of_memory_ends_both_within_30_seconds(written, warm, failing):
    """Without a launcher, which would end the other."""
    reports = [written / f"runs/tiny/memory/out_of_memory_rank_{rank}.json" for rank in (0, 1)]
    for report in reports:
        report.unlink(missing_ok=True)
    arguments = [f"{written}/tiny.yaml", f"{written}/plenty.json", str(failing)]
    run = warm.start(arguments, written, ranks=2, module="tests.memory.out_of_memory").wait()
    ended = time.time()
    assert run.codes == [OutOfMemory.exit_code] * 2, run.output[-3000:]
    assert "out of memory in phase 'backward'" in run.output
    assert all(report.exists() for report in reports)
    first = min(report.stat().st_mtime for report in reports)
    assert ended - first < 30
    assert json.loads(reports[failing].read_text())["phase"] == "backward"
    assert json.loads(reports[1 - failing].read_text())["phase"] == "waiting"
