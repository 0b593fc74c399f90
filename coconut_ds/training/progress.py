"""What a person sees of a training run: start lines, progress, warnings about the loss, results.

On a terminal there is a bar; without one (nohup, Slurm, CI) a line every LINE_SECONDS.  Only the main rank
prints.
"""

import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import harmonic_mean, mean, median
from typing import Any

from torch import nn
from tqdm import tqdm

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch, BatchConfig
from coconut_ds.data.curriculum import answer_lengths, final_stage, stage_at, stage_number, stage_spans
from coconut_ds.data.problems import enough_tokens
from coconut_ds.data.run_data import RunData, trained_stages
from coconut_ds.evaluation.evaluate import show_progress
from coconut_ds.files import LINE_SECONDS, counted, duration, hides_bar, print_now

PACE_STEPS = 101  # the median time of the last steps is the pace
FIRST_STEPS = 20  # before the expected end is named
BAR = "{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}"
MAX_SPANS = 8  # stages listed at the start
MAX_PROMPT = 80  # characters of a question in a suggested command
WINDOW, HIGH_WINDOWS, START_WINDOWS = 25, 4, 12  # steps; windows of that many steps

LIMIT_ITEMS, LIMIT_SHARE = 1_000, 0.1  # of the problems; published limits cut some of the longest answers
LEARNED_LOSS = 0.1  # a run that starts below need not fall


@dataclass
class LossTrend:
    """Warns once per stage if the training loss rises far above its level, or does not fall at the start.

    Rises: for HIGH_WINDOWS windows in a row, the median is above 1.5 times the lowest one before them plus
    0.5.  Does not fall: START_WINDOWS windows after the first step it is within 3 % of the first window.
    """

    lr: float  # of the settings, for the advice
    is_new: bool = True  # this process takes the first step of the run
    _stage: int | None = None
    _first: list[float] = field(default_factory=list)
    _window: list[float] = field(default_factory=list)
    _medians: list[float] = field(default_factory=list)
    _warned: bool = False

    def add(self, stage: int, loss: float) -> str | None:
        """Take the loss of the next step; return a warning or None."""
        if stage != self._stage:
            self.is_new = self.is_new and self._stage is None
            self._stage, self._warned = stage, False
            self._first, self._window, self._medians = [], [], []
        if len(self._first) < 5:
            self._first.append(loss)
        self._window.append(loss)
        if len(self._window) < WINDOW or self._warned:
            self._window = self._window[-WINDOW:]
            return None
        self._medians.append(median(self._window))
        self._window = []
        text = self._rises() or self._stays()
        self._warned = text is not None
        return text

    def _rises(self) -> str | None:
        before, recent = self._medians[:-HIGH_WINDOWS], self._medians[-HIGH_WINDOWS:]
        if not before or min(recent) <= 1.5 * min(before) + 0.5:
            return None
        return (
            f"warning: the loss diverges: {recent[-1]:.3g}, after {min(before):.3g} earlier in this stage; "
            f"stop, and resume with --checkpoint best --set lr={self.lr / 3:.1g} --allow lr"
        )

    def _stays(self) -> str | None:
        first, last = median(self._first), self._medians[-1]
        if not self.is_new or len(self._medians) != START_WINDOWS or first < LEARNED_LOSS:
            return None
        if last <= 0.9 * first or last <= 0.97 * self._medians[0]:
            return None
        return (
            f"warning: the loss has not fallen in {WINDOW * START_WINDOWS} steps ({first:.3g}, "
            f"now {last:.3g}): try --set lr={10 * self.lr:.1g}; `show` prints what the model reads and learns"
        )


class Progress:
    """The lines or the bar of one process; the other ranks print nothing."""

    def __init__(
        self,
        experiment: Experiment,
        steps_per_epoch: int,
        is_main: bool,
        memory: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory`: the peak as text."""
        self.experiment, self.steps_per_epoch, self.is_main = experiment, steps_per_epoch, is_main
        self.memory, self._clock = memory, clock
        self.trend = LossTrend(experiment.lr)
        self._times: deque[float] = deque(maxlen=PACE_STEPS)  # seconds of the last steps
        self._rates: deque[tuple[float, float]] = deque(maxlen=PACE_STEPS)  # tokens/s, all and supervised
        self._num_steps = 0  # of this process
        self._between: list[float] = []  # seconds of what happens between two epochs
        self._printed = self._last = clock()
        self._ended: float | None = None
        self._bar: tqdm | None = None
        self._epoch = self._done = self._total = 0

    def print_line(self, line: str) -> None:
        if self.is_main:
            print_now(line)
            self._printed = self._clock()

    @contextmanager
    def epoch(self, epoch: int, done: int, total: int) -> Iterator[None]:
        """The steps of one epoch, of which `done` were taken by an earlier start."""
        self._epoch, self._done, self._total = epoch, done, total
        self._last = self._clock()
        if self._ended is not None:
            self._between.append(self._last - self._ended)
        title = f"epoch {epoch + 1}/{self.experiment.num_epochs}{self._stage()}"
        disable = hides_bar(self.is_main)
        with tqdm(desc=title, total=total, initial=done, leave=False, bar_format=BAR, disable=disable) as bar:
            self._bar = bar
            yield
        self._bar, self._ended = None, self._clock()

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report one optimizer step, number `step` of the run, with the numbers of its log line."""
        now = self._clock()
        self._times.append(now - self._last)
        self._rates.append((numbers["tokens_per_s"], numbers["supervised_tokens_per_s"]))
        self._last = now
        self._done += 1
        self._num_steps += 1
        if not self.is_main:
            return
        number = stage_number(self._epoch, self.experiment)
        if warning := self.trend.add(number, numbers["loss"]):
            self.print_line(warning)
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(self._status(numbers, short=True), refresh=False)
            self._bar.update()
        elif now - self._printed >= LINE_SECONDS:
            where = f"epoch {self._epoch + 1}/{self.experiment.num_epochs} ({self._done} of {self._total})"
            self.print_line(f"step {step:,}  {where}{self._stage()}  {self._status(numbers)}")
        if self._num_steps == FIRST_STEPS:
            self.print_line(f"expected end: {clock_time(self._left()[1])}, at the pace of these steps")

    def _stage(self) -> str:
        has_stages = self.experiment.method.has_stages
        return f"  stage {stage_number(self._epoch, self.experiment)}" if has_stages else ""

    def _status(self, numbers: Mapping[str, float], short: bool = False) -> str:
        """The cells of a line; `short`: of the bar, the most needed first, since a terminal cuts it."""
        epoch, run = map(duration, self._left())
        latent = numbers.get("latent_loss")
        loss = f"loss {numbers['loss']:.3g}" + ("" if latent is None else f", latent loss {latent:.3g}")
        speed, supervised = map(harmonic_mean, zip(*self._rates, strict=True))  # steps have like sizes
        tokens = f"{speed:,.0f} tokens/s ({supervised:,.0f} supervised)"
        if short:
            return f"{epoch} left, run {run}, {loss}, {self.memory()}, {tokens}"
        return f"{loss}  {tokens}  {self.memory()}  epoch ends in {epoch}, run in {run}"

    def _left(self) -> tuple[float, float]:
        """Expected seconds to the end of the epoch and of the run, at the present pace."""
        pace, more = median(self._times), self.experiment.num_epochs - self._epoch - 1
        epoch = pace * (self._total - self._done)
        between = mean(self._between) if self._between else 0.0
        return epoch, epoch + more * pace * self.steps_per_epoch + (more + 1) * between

    def batches(self, batches: Iterable[Batch], name: str, total: int) -> Iterator[Batch]:
        """The batches of an evaluation, with a bar or lines."""
        return show_progress(batches, name, total, self.is_main, self.print_line, self._clock)


def short_limit(experiment: Experiment, data: RunData) -> Iterator[str]:
    """A note if the limit of new tokens is too low for some of the validation answers."""
    limit = experiment.max_new_tokens or data.valid.card.max_new_tokens
    problems = data.valid.tokenized[:LIMIT_ITEMS]
    for stage in trained_stages(experiment):
        lengths = answer_lengths(problems, stage, experiment, data.vocabulary)
        above = sum(length > limit for length in lengths)
        if above > LIMIT_SHARE * len(problems):
            yield (
                f"max_new_tokens: {limit} cuts {above} of {len(problems)} correct answers of "
                f"{experiment.val_path} at {stage}, so they count as wrong; the longest has "
                f"{max(lengths)} tokens: write max_new_tokens: {enough_tokens(max(lengths))}"
            )
            return


def clock_time(seconds: float) -> str:
    """'Fri 27 Nov 14:20 (in 3 h 10 min)'."""
    end = time.localtime(time.time() + seconds)
    return f"{time.strftime('%a %d %b %H:%M', end)} (in {duration(seconds)})"


def start_lines(
    experiment: Experiment,
    run_data: RunData,
    folder: Path,
    devices: Sequence[str],
    plan: Mapping[str, Any] | None,
) -> str:
    """What the run will do, before the model is loaded."""
    layout = BatchConfig.of(experiment, len(devices), 0)
    ranks = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    gpus = plan["budget"]["gpus"] if plan and plan["budget"] else len(devices)
    if len(devices) != gpus:
        rows = BatchConfig.of(experiment, gpus, 0).rows_per_step
        ranks += f"; the DeepSpeed config is for {gpus}, which take {rows} rows a step"
    steps = layout.num_steps(len(run_data.train))
    epochs = max(0, experiment.num_epochs - experiment.resume)
    has_thoughts = experiment.method.has_latents and not experiment.method.is_pause
    thought = f", thought {experiment.thought}" if has_thoughts else ""
    sizes = {
        "training": len(run_data.train),
        "validation": len(run_data.valid),
        "test": len(run_data.test or ()),
    }
    spans = [
        f"{stage_number(first, experiment)}: {stage_at(first, experiment)} "
        f"(epoch {first + 1}" + (f" to {last + 1})" if last > first else ")")
        for first, last in stage_spans(experiment)
    ]
    if len(spans) > MAX_SPANS:
        spans = [*spans[: MAX_SPANS // 2], f"... (of {len(spans)})", spans[-1]]
    if not experiment.method.has_stages:
        spans = [f"none: {final_stage(experiment)}"]
    return table(
        {
            "run": f"{folder}" + (" (debug: nothing is saved)" if experiment.debug else ""),
            "method": f"{experiment.method}{thought}, tuning {experiment.tuning}",
            "data": ", ".join(f"{size:,} {name}" for name, size in sizes.items() if size),
            "stages": ("\n" + " " * 10).join(spans),
            "steps": f"{counted(steps * epochs, 'step')}: {steps} of {layout.rows_per_step} rows per epoch",
            "ranks": ranks,
            "memory": plan["verdict"] if plan else "not planned",
        }
    )


def model_line(experiment: Experiment, model: nn.Module) -> str:
    """'gpt2: 124.4 M parameters, 0.3 M trained'.  ZeRO-3 leaves numel() 0."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    if experiment.quantization != "none":  # 4-bit weights are packed
        return f"{experiment.model_id} in {experiment.quantization}: {million(trained)} parameters trained"
    part = "all" if trained == total else million(trained)
    return f"{experiment.model_id}: {million(total)} parameters, {part} trained"


def million(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 50_000 else f"{number:,}"


def table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items())


def end_lines(folder: Path, num_ranks: int, question: str) -> list[str]:
    """The results by stage, warnings, and the next commands.  `question`: an example for `generate`."""
    from coconut_ds.reports.comparison import group_runs, percent  # not needed to train
    from coconut_ds.reports.conclusions import conclusions
    from coconut_ds.reports.run_records import read_run, verdicts

    run = read_run(folder)
    groups = group_runs([run])
    split, results = groups[0].results()
    learned = conclusions(groups) or ([f"{groups[0].label}: {split} {percent(results)}"] if split else [])
    launcher = f"deepspeed --num_gpus {num_ranks} --module" if num_ranks > 1 else "python -m"
    is_short = len(question) <= MAX_PROMPT and question.isprintable()
    prompt = f" --prompt {shlex.quote(question)}" if is_short else ""
    ablate = " --ablate all" if run.result_stage.num_latents else ""
    name, tested = shlex.quote(str(folder)), "test" if run.experiment.test_path else "valid"
    commands = [
        f"{launcher} coconut_ds eval {name} --split {tested}{ablate}",
        f"python -m coconut_ds report {name}",
        f"python -m coconut_ds generate {name}{prompt}",
    ]
    return [*learned, *verdicts(run), "next:", *(f"  {command}" for command in commands)]
