"""Read a run folder: settings, the lines of metrics.jsonl by kind, plan, profile, predictions.

run = read_run("runs/gsm-coconut")
run.result         the test line, else the last line of the validation set
run.stages         the last validation of every stage
verdicts(run)      warnings in plain words if it did not learn its task:

Stage 3 was not learned: 20.4 % (95 % interval 17.1 to 24.2) after 18 epochs, 100.0 % at stage 2. ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from coconut_ds.config.experiment import Experiment, load_experiment
from coconut_ds.config.methods import Method
from coconut_ds.data.curriculum import ALL_STEPS, Stage, final_stage, numbered_stage, stage_at, stage_number
from coconut_ds.data.problems import GRADINGS, card_for
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.intervals import wilson_interval
from coconut_ds.files import counted, from_start, similar_path
from coconut_ds.runs.checkpoint_folders import CheckpointFolders, best_per_stage
from coconut_ds.runs.record_shapes import (
    DS_CONFIG,
    ENVIRONMENT,
    PLAN,
    PROFILE,
    cut_answers,
    metric_lines,
    prediction_lines,
    read_record,
)
from coconut_ds.runs.run_folder import METRICS

Line = Mapping[str, Any]
SPLITS = ("test", "valid")
PREDICTIONS = "predictions.jsonl"
CHANGE_RUN = "Try more epochs (num_epochs), another lr or seed; `show` prints the model's input."
BASELINE = "As the baseline without steps and latents, it may be unable to learn more."


@dataclass(frozen=True)
class StageResult:
    """The last validation at one stage."""

    number: int
    stage: Stage
    first_epoch: int
    line: Line


@dataclass(frozen=True)
class Answers:
    """The graded answers of one `eval`; texts are "" where an older version recorded none."""

    split: str
    examples: str  # hash of questions and answers
    file: str
    grading: str
    checkpoint: str
    correct: dict[int, bool]  # by index
    expected: dict[int, str]
    differences: tuple[str, ...] = ()  # from the run's own settings

    def __str__(self) -> str:
        file = f" {Path(self.file).name}" if self.file not in ("", self.split) else ""
        return f"{self.split}{file}, {counted(len(self.correct), 'example')}"


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
        return self._by_kind.get(kind, [])

    @cached_property
    def _by_kind(self) -> dict[str, list[Line]]:
        lines: dict[str, list[Line]] = {}
        for line in self.lines:
            lines.setdefault(line["kind"], []).append(line)
        return lines

    @property
    def dataset(self) -> str:
        """Name of the data set, from its card or its file name."""
        experiment = self.experiment
        return card_for(from_start(experiment.test_path or experiment.val_path, self.folder)).name

    @property
    def memory_split(self) -> str:
        """The DeepSpeed config in a few words: 'ZeRO-2, offload, fp16'."""
        zero = self.ds_config.get("zero_optimization", {})
        words = [f"ZeRO-{zero.get('stage', 0)}"]
        words += ["offload"] if zero.get("offload_optimizer", {}).get("device", "none") != "none" else []
        halves = [name for name in ("fp16", "bf16") if self.ds_config.get(name, {}).get("enabled")]
        return ", ".join([*words, *halves])

    def stage_of(self, line: Line) -> Stage:
        """The stage of a validation or test line, as logged; the settings may have changed since."""
        if logged := Stage.parse(line.get("at")):
            return logged
        if line["kind"] == "test" and "at" not in line:  # older versions hid every step for all methods
            return numbered_stage(self.experiment.max_latent_stage + 1, self.experiment)
        return stage_at(int(line["epoch"]), self.experiment)

    def stage_number_of(self, line: Line) -> int:
        """The number of the stage of a validation line, as logged with its stage."""
        number = line.get("stage")
        if Stage.parse(line.get("at")) and isinstance(number, int):
            return number
        return stage_number(int(line["epoch"]), self.experiment)

    def best_checkpoints(self) -> dict[int, tuple[str, float | None]]:
        """The checkpoint `best_stage_N` and its validation accuracy, by N, from the manifests."""
        manifests = CheckpointFolders(self.folder).manifests()
        best = best_per_stage(manifests)
        return {number: (name, manifests[name].state.accuracy) for number, name in best.items()}

    def measured(self, split: str) -> list[Line]:
        """The lines of a split, without tests by older versions at a stage that was not trained."""
        return [line for line in self.of(split) if not self._at_untrained_stage(line)]

    @property
    def untrained_tests(self) -> list[Line]:
        """The lines that `measured` leaves out."""
        return [line for line in self.of("test") if self._at_untrained_stage(line)]

    def _at_untrained_stage(self, line: Line) -> bool:
        validated = [self.stage_of(valid) for valid in self.of("valid") if valid["epoch"] == line["epoch"]]
        trained = validated[-1] if validated else stage_at(int(line["epoch"]), self.experiment)
        tested = self.stage_of(line)
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
            stage = self.stage_of(line)
            first = results[stage].first_epoch if stage in results else epoch
            number = results[stage].number if stage in results else self.stage_number_of(line)
            results[stage] = StageResult(number, stage, first, line)
        return list(results.values())

    @property
    def is_falling(self) -> bool:
        """Whether the last epoch lowered the validation loss of its stage by more than 2 %."""
        lines = [
            line for line in self.of("valid") if self.stages and self.stage_of(line) == self.stages[-1].stage
        ]
        losses = [float(line["loss"]) for line in lines]
        return len(losses) > 1 and losses[-1] < 0.98 * min(losses[:-1])

    @property
    def ablated(self) -> dict[str, Line]:
        """The lines of `ablate_after_stage` after the last validation, by ablation."""
        epoch = self.stages[-1].line["epoch"] if self.stages else None
        return {str(line["ablation"]): line for line in self.of("ablation") if line["epoch"] == epoch}

    @property
    def has_numbered_stages(self) -> bool:
        return self.experiment.method.has_stages and self.experiment.icot_tokens_per_epoch is None

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
    def uses_gpu(self) -> bool:
        return any("gpu_allocated_peak_mib" in line for line in self.of("memory"))

    @property
    def peak_mib(self) -> float | None:
        """Peak of one GPU's tensors; without a GPU, the main rank's resident memory."""
        name = "gpu_allocated_peak_mib" if self.uses_gpu else "host_rss_peak_mib"
        return max((line[name] for line in self.of("memory") if name in line), default=None)

    @property
    def budget_mib(self) -> float | None:
        """The limit for `peak_mib`: the GPU's memory less reserved_mib, or one rank's share of the host's."""
        budget = (self.plan or {}).get("budget") or (self.profile or {}).get("budget")
        if not budget:
            return None
        if self.uses_gpu:
            return budget["gpu_memory_mib"] - budget["reserved_mib"]
        return budget["host_memory_gib"] * 1024 / max(1, len(self.environment.get("devices", ())))

    def answers(self) -> list[Answers]:
        """The answers of the intact model from `eval`; of one set of examples only the newest.

        Ordered by how they were measured (by the run's own settings first), then by split (test, validation,
        others), then the newest first.
        """
        newest: dict[tuple[Any, ...], tuple[tuple[str, int], Answers]] = {}
        for line in prediction_lines(self.folder / PREDICTIONS):
            if line.get("ablation", "intact") != "intact":
                continue
            texts = [value if isinstance(value := line.get(k), str) else "" for k in ("examples", "file")]
            grading = line["grading"] if line.get("grading") in GRADINGS else ""
            key = (line["split"], texts[0], grading, line["differences"])
            measurement = (line["checkpoint"], line["latents"])
            if newest.get(key, (None,))[0] != measurement:
                newest.pop(key, None)  # the newest comes last
                answers = Answers(
                    *key[:2], texts[1], grading, line["checkpoint"], {}, {}, line["differences"]
                )
                newest[key] = measurement, answers
            answers = newest[key][1]
            answers.correct[line["index"]] = line["correct"]
            if isinstance(line.get("expected"), str):
                answers.expected[line["index"]] = line["expected"]
        found = [answers for _, answers in reversed(newest.values())]
        return sorted(
            found,
            key=lambda answers: [bool(answers.differences), *(answers.split != split for split in SPLITS)],
        )


def run_folders(path: str | Path) -> list[Path]:
    """`path` if it is a run folder, else the run folders in it and in its folders, by name."""
    path = Path(path)
    if (path / "experiment.yaml").is_file():
        return [path]
    found = {file.parent for level in ("*", "*/*") for file in path.glob(f"{level}/experiment.yaml")}
    # A checkpoint or an export inside a run has settings too.
    return sorted(folder for folder in found if not found.intersection(folder.parents))


def read_run(folder: str | Path) -> RunRecord:
    """Read all records of a run folder.  Raises ConfigError if it is no run folder."""
    folder = Path(folder)
    if not folder.exists():
        raise ConfigError(f"{folder}: no such run folder{similar_path(folder)}")
    if not (folder / "experiment.yaml").is_file():
        near = next(
            (path for path in folder.absolute().parents if (path / "experiment.yaml").is_file()), None
        )
        hint = f"; write {near}" if near else ""
        raise ConfigError(f"{folder} is not a run folder: it has no experiment.yaml{hint}")
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


@dataclass(frozen=True)
class Verdict:
    """A warning about the last stage; `not_learned`: at chance, or most of the accuracy is lost."""

    text: str
    not_learned: bool = True


def verdict_on_learning(run: RunRecord) -> Verdict | None:
    """None if the last stage is above chance and as accurate as the one before."""
    return _not_above_chance(run) or _decline(run)


def has_learned(run: RunRecord) -> bool:
    """Whether the last stage is not named as not learned."""
    verdict = verdict_on_learning(run)
    return verdict is None or not verdict.not_learned


def verdicts(run: RunRecord) -> list[str]:
    """Warnings about one run: its learning, left-out items and tests."""
    name, learning = run.experiment.name, verdict_on_learning(run)
    lines = [f"{name}: {learning.text}"] if learning else []
    if run.result and (dropped := run.result.get("num_dropped")):
        lines.append(
            f"{name}: {dropped} {run.split} items too long for the model count as wrong (too_long: drop)"
        )
    if run.untrained_tests:
        split = "test" if run.experiment.test_path else "valid"
        lines.append(
            f"{name}: its test by an older version used a stage that was not trained "
            f"and is left out; run it again: python -m coconut_ds eval {run.folder} --split {split}"
        )
    return lines


def _not_above_chance(run: RunRecord) -> Verdict | None:
    line = run.stages[-1].line if run.stages else None
    if line is None or not 0 <= line.get("chance", -1) <= 1 or not line["num_items"]:
        return None
    low, _ = wilson_interval(line["num_correct"], line["num_items"])
    if low > line["chance"] or line["accuracy"] == 1:  # nothing is left to learn
        return None
    if run.experiment.method is Method.NO_COT:
        return Verdict(
            f"not above chance: {_interval(line)}, chance is {_percent(line['chance'])}. "
            f"{_advice(line, BASELINE)}"
        )
    outcome = f"was not learned: {_interval(line)} is not above chance ({_percent(line['chance'])})"
    if run.has_numbered_stages and len(run.stages) > 1:
        before, last = run.stages[-2:]
        outcome += f"; {_percent(_accuracy(before.line))} at stage {before.number}"
        advice = _advice(line, _change_stage(run))
        return Verdict(f"Stage {last.number} {outcome}{_so_far(run)}. {advice}")
    return Verdict(f"{run.experiment.method} {outcome}{_so_far(run)}. {_advice(line, CHANGE_RUN)}")


def _decline(run: RunRecord) -> Verdict | None:
    """A verdict if the last stage is below the one before by more than its interval."""
    if not run.has_numbered_stages or len(run.stages) < 2:
        return None
    before, last = run.stages[-2:]
    accuracy, accuracy_before = _accuracy(last.line), _accuracy(before.line)
    if accuracy_before <= wilson_interval(last.line["num_correct"], last.line["num_items"])[1]:
        return None
    chance = last.line.get("chance", 0.0)
    chance = chance if 0 <= chance <= 1 else 0.0
    kept = (accuracy - chance) / max(accuracy_before - chance, 1e-9)
    what = "was not learned" if kept < 0.5 else "is less accurate than the stage before"
    epochs = counted(sum(run.stage_of(line) == last.stage for line in run.of("valid")), "epoch")
    return Verdict(
        f"Stage {last.number} {what}: {_interval(last.line)} after {epochs}{_so_far(run)}, "
        f"{_percent(accuracy_before)} at stage {before.number}. {_advice(last.line, _change_stage(run))}",
        not_learned=kept < 0.5,
    )


def _advice(line: Line, advice: str) -> str:
    """The limit of new tokens in place of `advice` if it cut half of the wrong answers; else both."""
    cut = cut_answers(line)
    if cut is None:
        return advice
    is_cause = line["longest_answer"] > line["max_new_tokens"]
    if is_cause and 2 * line["num_cut"] >= line["num_items"] - line["num_correct"]:
        return f"{cut} (--set, with --allow max_new_tokens)."
    return f"{cut}. {advice}"


def _change_stage(run: RunRecord) -> str:
    """What may help a stage that was not learned."""
    experiment = run.experiment
    latents = "latents that learn their step (latent_supervision), "
    if not experiment.method.has_latents or experiment.latent_supervision:
        latents = ""
    return (
        f"Try more epochs of this stage (epochs_per_stage), {latents}another seed, "
        "or earlier stages mixed in (uniform_prob)."
    )


def _so_far(run: RunRecord) -> str:
    """Text for a run with epochs left."""
    epochs, planned = int(run.stages[-1].line["epoch"]) + 1, run.experiment.num_epochs
    if any(saved.state.epoch >= planned for saved in CheckpointFolders(run.folder).manifests().values()):
        return ""  # it ended early
    return f", so far ({epochs} of {planned} epochs)" if epochs < planned else ""


def _accuracy(line: Line) -> float:
    return float(line["num_correct"] / max(line["num_items"], 1))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(line: Line) -> str:
    low, high = wilson_interval(line["num_correct"], line["num_items"])
    return f"{_percent(_accuracy(line))} (95 % interval {100 * low:.1f} to {100 * high:.1f})"
