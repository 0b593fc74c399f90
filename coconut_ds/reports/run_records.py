"""Read a run folder: settings, the lines of metrics.jsonl by kind, plan, profile, predictions.

run = read_run("runs/gsm-coconut")
run.result         the test line, else the last line of the validation set
run.stages         the last validation of every stage
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from coconut_ds.config.experiment import Experiment, load_experiment
from coconut_ds.data.curriculum import ALL_STEPS, Stage, final_stage, numbered_stage, stage_at, stage_number
from coconut_ds.data.problems import card_for
from coconut_ds.errors import ConfigError
from coconut_ds.runs.record_shapes import (
    DS_CONFIG,
    ENVIRONMENT,
    PLAN,
    PROFILE,
    metric_lines,
    prediction_lines,
    read_record,
)
from coconut_ds.runs.run_folder import METRICS

Line = Mapping[str, Any]
SPLITS = ("test", "valid")
PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class StageResult:
    """The last validation at one stage."""

    number: int
    stage: Stage
    first_epoch: int
    line: Line


@dataclass(frozen=True)
class Budget:
    """Budget of one GPU and the host, MiB, from the plan or the profile of the run."""

    device: str
    gpu_mib: float  # the GPU's memory less reserved_mib
    reserved_mib: float
    host_mib: float
    components_mib: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """The records of one run folder."""

    folder: Path
    experiment: Experiment
    lines: Sequence[Line]
    ds_config: Mapping[str, Any]
    environment: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    profile: Mapping[str, Any] | None

    def of(self, kind: str) -> list[Line]:
        """The lines of metrics.jsonl of one kind: train, valid, test, memory, save."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def dataset(self) -> str:
        """Name of the data set, from its card or its file name."""
        experiment = self.experiment
        return card_for(experiment.test_path or experiment.val_path).name

    @property
    def memory_split(self) -> str:
        """The DeepSpeed config in a few words: 'ZeRO-2, offload, fp16'."""
        zero = self.ds_config.get("zero_optimization", {})
        words = [f"ZeRO-{zero.get('stage', 0)}"]
        words += ["offload"] if zero.get("offload_optimizer", {}).get("device", "none") != "none" else []
        halves = [name for name in ("fp16", "bf16") if self.ds_config.get(name, {}).get("enabled")]
        return ", ".join([*words, *halves])

    def stage_of(self, line: Line) -> Stage:
        """The stage of a validation or test line."""
        if line["kind"] == "test" and "at" not in line:  # older versions hid every step for all methods
            return numbered_stage(self.experiment.max_latent_stage + 1, self.experiment)
        return stage_at(int(line["epoch"]), self.experiment)

    def measured(self, split: str) -> list[Line]:
        """The lines of a split, without tests by older versions at a stage that was not trained."""
        return [line for line in self.of(split) if not self._at_untrained_stage(line)]

    @property
    def untrained_tests(self) -> list[Line]:
        """The lines that `measured` leaves out."""
        return [line for line in self.of("test") if self._at_untrained_stage(line)]

    def _at_untrained_stage(self, line: Line) -> bool:
        trained, tested = stage_at(int(line["epoch"]), self.experiment), self.stage_of(line)
        # Stage max_latent_stage hides all steps of problems with that many steps.
        same = trained.hidden_tokens or trained.hidden_steps >= self.experiment.max_latent_stage
        return trained.num_latents != tested.num_latents or not (trained == tested or same)

    @property
    def split(self) -> str | None:
        """The split of `result`."""
        return next((split for split in SPLITS if self.measured(split)), None)

    @property
    def result(self) -> Line | None:
        """The test line, else the last validation line; None before the first."""
        return self.measured(self.split)[-1] if self.split else None

    @property
    def result_stage(self) -> Stage:
        """The stage of `result`."""
        return final_stage(self.experiment) if self.result is None else self.stage_of(self.result)

    @cached_property
    def stages(self) -> list[StageResult]:
        """The last validation of every stage, in order."""
        results: dict[Stage, StageResult] = {}
        for line in self.of("valid"):
            epoch = int(line["epoch"])
            stage = stage_at(epoch, self.experiment)
            first = results[stage].first_epoch if stage in results else epoch
            number = results[stage].number if stage in results else stage_number(epoch, self.experiment)
            results[stage] = StageResult(number, stage, first, line)
        return list(results.values())

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median seconds of training per complete epoch, so interruptions do not count."""
        times: dict[int, list[float]] = {}
        for line in self.of("train"):
            times.setdefault(int(line["epoch"]), []).append(line["time"])
        num_lines = max(map(len, times.values()), default=0)
        spans = [
            (seen[-1] - seen[0]) * len(seen) / (len(seen) - 1)
            for seen in times.values()
            if len(seen) == num_lines and num_lines > 1
        ]
        return median(spans) if spans else None

    @property
    def num_ranks(self) -> int:
        return max(1, len(self.environment.get("devices", ())))

    @property
    def uses_gpu(self) -> bool:
        return any("gpu_allocated_peak_mib" in line for line in self.of("memory"))

    @property
    def peak_mib(self) -> float | None:
        """Peak of one GPU's tensors; without a GPU, the main rank's resident memory."""
        name = "gpu_allocated_peak_mib" if self.uses_gpu else "host_rss_peak_mib"
        return max((line[name] for line in self.of("memory") if name in line), default=None)

    @property
    def budget(self) -> Budget | None:
        """The memory budget of the run, if its plan or profile has one."""
        for source in (self.plan, self.profile):
            given = (source or {}).get("budget")
            if given:
                reserved = given["reserved_mib"]
                gpu, host = given["gpu_memory_mib"] - reserved, given["host_memory_gib"] * 1024
                return Budget(given["device"], gpu, reserved, host, given.get("components_mib", {}))
        return None

    @property
    def budget_mib(self) -> float | None:
        """The limit for `peak_mib`: the GPU's budget, or one rank's share of the host's."""
        if self.budget is None:
            return None
        return self.budget.gpu_mib if self.uses_gpu else self.budget.host_mib / self.num_ranks

    def predictions(self) -> dict[str, dict[int, bool]]:
        """For each split, whether each item is correct, from the newest `eval` of the intact model."""
        newest: dict[str, tuple[Any, dict[int, bool]]] = {}
        for line in prediction_lines(self.folder / PREDICTIONS):
            if line.get("ablation", "intact") != "intact":
                continue
            measurement = (line["checkpoint"], line["latents"])
            if newest.get(line["split"], (None,))[0] != measurement:
                newest[line["split"]] = (measurement, {})
            newest[line["split"]][1][line["index"]] = bool(line["correct"])
        return {split: correct for split, (_, correct) in newest.items()}


def read_run(folder: str | Path) -> RunRecord:
    """Read all records of a run folder.  Raises ConfigError if it is no run folder."""
    folder = Path(folder)
    if not (folder / "experiment.yaml").is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no experiment.yaml")
    return RunRecord(
        folder=folder,
        experiment=load_experiment(folder / "experiment.yaml"),
        lines=metric_lines(folder / METRICS),
        ds_config=read_record(folder / "ds_config.json", DS_CONFIG) or {},
        environment=read_record(folder / "environment.json", ENVIRONMENT) or {},
        plan=read_record(folder / "memory" / "plan.json", PLAN),
        profile=read_record(folder / "memory" / "profile.json", PROFILE),
    )


def describe_stage(stage: Stage) -> str:
    """'2 steps in 4 latents', 'all steps as text'."""
    if stage.hidden_tokens:
        return f"first {stage.hidden_tokens} tokens hidden"
    if stage.hidden_steps == 0 and stage.num_latents == 0:
        return "all steps as text"
    steps = "all steps" if stage.hidden_steps == ALL_STEPS else counted(stage.hidden_steps, "step")
    return f"{steps} in {counted(stage.num_latents, 'latent')}" if stage.num_latents else f"{steps} hidden"


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
