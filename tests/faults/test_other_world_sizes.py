"""A checkpoint resumes with other ranks or another ds_config, as if nobody had changed anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.faults.conftest import STEPS_PER_EPOCH, Bench
from tests.faults.test_damage import assert_refused
from tests.launched.forked import ROOT, Ended, Warm

STEP = "coconut_ds.engine.engine:Engine.step"
SHORT = {"num_epochs": 2, "save_steps": 100, "reset_optimizer": False}
LORA = {"tuning": "lora", "lora_r": 2, "lora_dropout": 0.0}
MLP = {"thought": "mlp_projection", "thought_lr": 0.02}  # a second parameter group
CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "lora, zero2": ("zero2", LORA | MLP),
    "full, zero2_offload": ("zero2_offload", MLP),
    "lora, zero3_offload": ("zero3_offload", LORA),
}
ONE_RANK = ("--set", "gradient_accumulation_steps=4")  # two ranks have 2: the same rows a step
ALLOW = ("--allow", "world_size")
LAYOUT = ("--allow", "ds_layout")


class PlainBench(Bench):
    """The task without dropout, whose masks depend on who computes which row."""

    def __init__(
        self, task: Path, folder: Path, warm: Warm, ds_config: str, changes: Mapping[str, Any]
    ) -> None:
        super().__init__(task, folder, warm)
        self.ds_config = ds_config
        path = folder / "model/config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)))
        experiment = yaml.safe_load(self.experiment.read_text())
        self.experiment.write_text(yaml.safe_dump({**experiment, **SHORT, **changes}))

    def arguments(self, *more: str) -> list[str]:
        ds_config = str(ROOT / f"ds_configs/{self.ds_config}.json")
        return ["train", str(self.experiment), "--deepspeed_config", ds_config, *more]

    def stop_after(self, steps: int, *more: str, ranks: int) -> None:
        """Go on for so many steps, or one more: a signal is noticed by a thread."""
        ended = self.train(*more, ranks=ranks, faults=[{"at": STEP, "call": steps, "do": "TERM@self"}])
        assert ended.codes == [75] * ranks, ended.output

    def finish(self, *more: str, ranks: int) -> Ended:
        ended = self.train(*more, ranks=ranks)
        assert ended.codes == [0] * ranks, ended.output
        assert not list(self.run_folder.glob(".tmp-*"))
        return ended

    def losses(self) -> list[float]:
        lines = map(json.loads, (self.run_folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "train"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and moments of the newest checkpoint.

        The bias of the keys has no gradient but rounding, which Adam makes as large as any other.
        """
        newest = self.run_folder / (self.run_folder / "latest").read_text().strip()
        found = {}
        for path in newest.glob("model/*.safetensors"):
            found |= {name: value for name, value in load_file(path).items() if "attn.bias" not in name}
        for path in newest.glob("engine/*optim_states.pt"):
            for group, state in _states(torch.load(path, weights_only=False)).items():
                found |= {f"{path.name} {group} {name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
        return found


def _states(shard: Mapping[str, Any]) -> Mapping[int, Mapping[str, torch.Tensor]]:
    """The optimizer's state of each parameter group, in the form of ZeRO-1 and 2 or of ZeRO-3."""
    content = shard["optimizer_state_dict"]
    return content.get("base_optimizer_state", content.get("optimizer_state_dict"))["state"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_one_rank_two_ranks(task: Path, tmp_path: Path, warm: Warm, case: str) -> None:
    reference = PlainBench(task, tmp_path / "reference", warm, *CASES[case])
    reference.finish(ranks=2)
    bench = PlainBench(task, tmp_path / "bench", warm, *CASES[case])
    bench.stop_after(4, ranks=2)
    bench.stop_after(4, *ALLOW, *ONE_RANK, ranks=1)
    ended = bench.finish(*ALLOW, ranks=2)
    assert "for world size 2" in ended.output
    assert bench.steps() == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert bench.losses() == pytest.approx(reference.losses(), rel=1e-5)
    torch.testing.assert_close(bench.tensors(), reference.tensors(), rtol=1e-3, atol=1e-5)


def test_three_ds_configs_in_turn(task: Path, tmp_path: Path, warm: Warm) -> None:
    reference = PlainBench(task, tmp_path / "reference", warm, "zero2_offload", MLP | LORA)
    reference.finish(ranks=2)
    bench = PlainBench(task, tmp_path / "bench", warm, "zero2_offload", MLP | LORA)
    bench.stop_after(4, ranks=2)
    bench.ds_config = "zero3_offload"
    assert_refused(bench.train(ranks=2), "resume with the new value: --allow ds_layout")
    bench.stop_after(4, *LAYOUT, ranks=2)
    bench.ds_config = "zero2"
    assert "for the new ZeRO settings" in bench.finish(*LAYOUT, ranks=2).output
    assert bench.steps() == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    assert bench.losses() == pytest.approx(reference.losses(), rel=1e-5)


def test_a_group_without_a_part_for_every_rank(task: Path, tmp_path: Path, warm: Warm) -> None:
    """A window of one weight: DeepSpeed's load would end in an IndexError on rank 1."""
    window = {"thought": "learnable_window", "latent_window_size": 1}
    bench = PlainBench(task, tmp_path / "bench", warm, "zero2", window)
    bench.stop_after(1, *ONE_RANK, ranks=1)
    assert_refused(bench.train(*ALLOW, ranks=2), "a parameter group has no part for one of 2 ranks")
    bench.finish(*ONE_RANK, ranks=1)
