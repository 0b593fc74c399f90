"""Set up a run (data, ranks, budget, engine, run folder), then train: steps, evaluations, checkpoints."""

import gc
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from coconut_ds.config.deepspeed import EIGHT_BIT, DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.config.methods import Method
from coconut_ds.data.batching import Batch, BatchConfig, num_samples_and_tokens, training_steps
from coconut_ds.data.curriculum import (
    Stage,
    is_stage_switch,
    next_epoch,
    stage_at,
    stage_number,
    stops_early,
)
from coconut_ds.data.run_data import RunData, TestSet, load_run_data
from coconut_ds.distributed import Request, Requests, Signals, lost_ranks_explained, phase
from coconut_ds.engine.engine import (
    MOMENTS_BYTES,
    Engine,
    Ranks,
    checkpoint_bytes,
    refuse_missing_operators,
    schedule,
    start_distributed,
    world_size_from_environment,
)
from coconut_ds.engine.watchdog import LossGuard, Watchdog
from coconut_ds.errors import ConfigError, StopRequested
from coconut_ds.evaluation.evaluate import Evaluation, evaluate
from coconut_ds.files import counted, print_notes
from coconut_ds.memory.budget import PeakMeter, enforce_memory_budget, judged_plan
from coconut_ds.model.coconut import Coconut
from coconut_ds.model.loading import build_module, load_config, parameter_groups, write_model
from coconut_ds.model.quantization import refuse_missing_library
from coconut_ds.runs.changes import rate_depends_on_length, settings_to_compare
from coconut_ds.runs.checkpoint_folders import LONGEST_REASONING, TrainState, misleading_best, stage_of
from coconut_ds.runs.checkpoints import Checkpoints, check_disk
from coconut_ds.runs.record_shapes import cut_answers, metric_lines
from coconut_ds.runs.run_folder import METRICS, Run
from coconut_ds.training.progress import Progress, end_lines, model_line, short_limit, start_lines, table

STUCK_EPOCHS = 3  # epochs of a stage without a new best accuracy before the run says what to change
NUM_SHOWN = 5  # predictions written to samples.jsonl at each evaluation


@dataclass(frozen=True)
class Options:
    """What the command line adds to the experiment."""

    checkpoint: str | None = None  # resume from this checkpoint instead of the newest
    allow: tuple[str, ...] = ()  # settings that may differ from the checkpoint's
    max_minutes: float | None = None  # save and stop after this time
    stuck_seconds: float = 300.0  # abort after this time without progress; 0: never
    skip_plan: bool = False  # do not check the plan against the memory budget


def train(experiment: Experiment, ds_config: DeepSpeedConfig, options: Options) -> Evaluation | None:
    """Start or resume one run and return its last evaluation. Called on every rank.

    Raises UserError for everything the user can fix, before a model is loaded where possible.
    """
    with Signals() as signals, lost_ranks_explained():
        with signals.nothing_to_save():
            run_data = check_start(experiment, ds_config, world_size_from_environment())
            ranks = start_distributed(ds_config.precision, options.stuck_seconds)
        seconds = 0 if experiment.debug else options.stuck_seconds
        with (
            open_run(experiment, ds_config, ranks) as run,
            Watchdog(run.folder, ranks.rank, ranks.world_size, seconds) as watchdog,
        ):
            watchdog.beat("planning", patience=10)
            with signals.nothing_to_save():
                guard = enforce_memory_budget(experiment, ds_config, run_data, ranks, options.skip_plan)
            if ranks.is_main:
                print(start_lines(experiment, run_data, run.folder, run.devices, guard.plan), flush=True)
            with guard:
                watchdog.beat("starting the engine", patience=10)
                engine = start_engine(experiment, ds_config, run_data, ranks)
                trainer = Trainer(experiment, run_data, engine, run, signals, options, watchdog)
                result = trainer.run_all()
            watchdog.beat("writing the report", patience=10)
            send_report(run)
        engine.close()
    return result


def check_start(
    experiment: Experiment, ds_config: DeepSpeedConfig, world_size: int, run_data: RunData | None = None
) -> RunData:
    """Read the data and check everything that needs neither ranks nor a model; `validate` does the same.

    `run_data`: the data if it was read before.  Raises UserError.
    """
    ds_config.resolve(experiment, world_size)
    refuse_missing_operators(ds_config)
    if experiment.quantization == "nf4":
        refuse_missing_library("quantization: nf4")
    if ds_config.eight_bit_moments:
        refuse_missing_library(f"{ds_config.path}: optimizer.type: {EIGHT_BIT}")
    if run_data is None:
        run_data = load_run_data(experiment, load_config(experiment.model_id))
        print_notes(short_limit(experiment, run_data))
    return run_data


def check_model(
    experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, world_size: int
) -> None:
    """Plan the run and load its weights as `train` does, without ranks and run folder.  Raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not experiment.only_eval:
        _, refusal = judged_plan(experiment, ds_config, run_data, Ranks(0, world_size, device))
        if refusal is not None:
            raise refusal
    module = _module(experiment, ds_config, run_data)
    if not (experiment.only_eval or experiment.debug):
        weight_bytes = None if ds_config.precision == "fp32" else 2
        moments_bytes = MOMENTS_BYTES[ds_config.eight_bit_moments]
        size = checkpoint_bytes(module, ds_config.zero_stage, moments_bytes, weight_bytes)
        check_disk(experiment, size, lambda line: print_notes([line]))


def send_report(run: Run) -> None:
    """Upload the report of a finished run as a wandb artifact, if wandb is enabled."""
    if run.has_wandb:
        from coconut_ds.reports.run_page import report_of  # matplotlib takes a second to import

        try:
            run.attach(report_of(run.folder), "report")
        except (OSError, ValueError) as error:  # training is already finished and saved
            warnings.warn(f"cannot send the report to wandb: {error}", stacklevel=2)


def open_run(experiment: Experiment, ds_config: DeepSpeedConfig, ranks: Ranks) -> Run:
    """Open and lock the run folder. Raises the main rank's ConfigError on all ranks. Collective."""
    devices = ranks.gather(describe(ranks))
    settings = ds_config.resolved_file(experiment, ranks.world_size)
    opened: list[Run] = []
    ranks.on_main(lambda: opened.append(Run(experiment, settings, devices=devices)))
    return opened[0] if opened else Run(experiment, settings, is_main=False)


def _module(experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData) -> Coconut:
    module = build_module(experiment, run_data.vocabulary, ds_config.latent_memory)
    # Experts of a layer are one weight of three dimensions.
    if ds_config.zero_stage == 3 and any(p.dim() == 3 and p.requires_grad for p in module.base.parameters()):
        raise ConfigError(
            f"{ds_config.path}: zero_optimization.stage: 3 cannot train the weights of a mixture of experts: "
            "DeepSpeed reduces some twice in a backward and stops; write 'stage: 2'"
        )
    return module


@phase("initialise")
def start_engine(
    experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, ranks: Ranks
) -> Engine:
    """Build the model and wrap it. Collective."""
    module = _module(experiment, ds_config, run_data)
    layout = BatchConfig.of(experiment, ranks.world_size, ranks.rank)
    total_steps = max(1, layout.num_steps(len(run_data.train)) * experiment.num_epochs)
    warmup_steps = int(experiment.warmup_ratio * total_steps)
    factor = schedule(experiment.lr_schedule, warmup_steps, total_steps)
    settings = ds_config.resolve(experiment, ranks.world_size)
    engine = Engine(module, parameter_groups(module, experiment), settings, ranks, factor)
    torch.manual_seed(experiment.seed + ranks.rank)  # dropout differs from rank to rank
    return engine


def describe(ranks: Ranks) -> str:
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"


class Trainer:
    """One run in progress."""

    def __init__(
        self,
        experiment: Experiment,
        run_data: RunData,
        engine: Engine,
        run: Run,
        signals: Signals,
        options: Options,
        watchdog: Watchdog,
    ) -> None:
        self.experiment, self.run_data, self.engine, self.run = experiment, run_data, engine, run
        self.options, self.watchdog = options, watchdog
        run.is_stopping = lambda: signals.received is not None
        self.layout = BatchConfig.of(experiment, engine.world_size, engine.rank)
        self.peak = PeakMeter(engine.device)
        steps_per_epoch = self.layout.num_steps(len(run_data.train))
        self.progress = Progress(experiment, steps_per_epoch, engine.is_main, self.peak.summary)
        self.print_line = self.progress.print_line
        self.checkpoints = Checkpoints(
            run.folder,
            engine,
            self.settings() if engine.is_main else {},
            keep=experiment.keep_checkpoints,
            only_improving=experiment.save_only_improve,
            expected_bytes=engine.checkpoint_bytes(),
            log=self.print_line,
        )
        self.state = TrainState(epoch=experiment.resume)
        self.saved_at: tuple[int, int] | None = None  # (epoch, step) of the newest checkpoint
        self.requests = Requests(
            signals,
            engine,
            run.folder,
            save_minutes=experiment.save_minutes,
            save_steps=experiment.save_steps,
            max_minutes=options.max_minutes,
            failed=lambda: run.write_error is not None,
        )
        self.request = Request.NOTHING  # after the newest step
        self.guard = LossGuard(run.folder, engine.rank)

    def settings(self) -> dict[str, Any]:
        """The settings that a checkpoint records."""
        settings = settings_to_compare(self.experiment, self.run.ds_config, self.engine.module.base_record)
        if self.experiment.icot_tokens_per_epoch is not None:
            lengths = [sum(map(len, problem.steps)) for problem in self.run_data.valid.tokenized]
            settings[LONGEST_REASONING] = max(lengths, default=0)
        return settings

    def run_all(self) -> Evaluation | None:
        """Run the remaining epochs, then evaluate on the test set."""
        self.resume()
        if self.engine.on_main(self.has_ended):
            self.print_line(self.finished())
            self.print_end()
            return None
        if not self.experiment.debug:
            size = self.checkpoints.expected_bytes
            self.engine.on_main(lambda: check_disk(self.experiment, size, self.print_line))
        self.start_writing()
        self.progress.trend.is_new = self.state.global_step == 0
        self.print_line(table(self.start()))
        start = self.experiment.load_model_path
        if start and (note := misleading_best(Path(start))):
            self.print_line(f"load_model_path: {note}")
        if self.checkpoints.loaded and self.state.epoch >= self.experiment.num_epochs:
            self.print_line(self.finished())
        elif (early := stops_early(self.experiment)) and not self.run_data.test:
            self.print_line(early)
        result = None
        while (epoch := self.state.epoch) < self.experiment.num_epochs:
            if self.state.step_in_epoch == 0 and self.resets_optimizer(epoch):
                self.engine.reset_optimizer()
            self.train_epoch(epoch)
            result = self.validate(epoch)
            following = self.end_epoch(epoch, result)
            self.ablate(epoch, result, following)
            self.save(following)
        if self.run_data.test is not None:
            # The epoch of the weights: a finished run may be started again with a smaller num_epochs.
            epoch = max(self.state.epoch - 1, 0)
            if early := stops_early(replace(self.experiment, num_epochs=epoch + 1)):
                self.print_line(early)
            result = self.evaluate(self.run_data.test, self.trained_stage(), "test", epoch)
        self.check_written()
        self.print_end()
        return result

    def print_end(self) -> None:
        """The results by stage and the next commands."""
        if self.run.writes:
            question = self.run_data.valid.problems[0].question
            for line in end_lines(self.run.folder, self.engine.world_size, question):
                self.print_line(line)

    def has_ended(self) -> bool:
        """Whether an earlier start trained all epochs and tested the newest weights on this test set."""
        if self.checkpoints.loaded is None or self.state.epoch < self.experiment.num_epochs:
            return False
        test = self.run_data.test
        return test is None or any(
            line["kind"] == "test"
            and (line.get("step"), line.get("examples")) == (self.state.global_step, test.examples)
            for line in metric_lines(self.run.folder / METRICS)
        )

    def start(self) -> dict[str, str]:
        """What only the loaded run knows, for the first lines of a run."""
        epoch, end = self.state.epoch + 1, self.experiment.num_epochs
        step = f", step {self.state.step_in_epoch + 1}" if self.state.step_in_epoch else ""
        return {
            "model": model_line(self.experiment, self.engine.module),
            "wandb": self.run.wandb_state,
            "start": f"epoch {min(epoch, end)} of {end}{step}{', resumed' * bool(self.checkpoints.loaded)}",
        }

    def finished(self) -> str:
        """What a run that has no epoch left says at its start: accuracy, checkpoints, how to train on."""
        accuracy, best = self.state.accuracy, self.checkpoints.folders.pointed_at("best")
        measured = "" if accuracy is None else f", validation accuracy {100 * accuracy:.1f} %"
        epoch, planned = self.state.epoch, self.experiment.num_epochs
        epochs = f"{epoch} of {planned} epochs" if epoch <= planned else f"{epoch} epochs, {planned} planned"
        num_epochs = f"num_epochs={epoch + 1}"
        allow = " --allow num_epochs" if rate_depends_on_length(asdict(self.experiment)) else ""
        return (
            f"{self.run.folder} is finished: {epochs}{measured} ({self.trained_stage()}). "
            f"Newest checkpoint: {self.run.folder / 'latest'}"
            + (f"; best: {self.run.folder / 'best'} ({best})" if best else "")
            + f". To train on: --set {num_epochs}{allow} (or more)"
        )

    def trained_stage(self) -> Stage:
        """The stage of the weights: by the settings that trained them if this start has trained nothing."""
        loaded = self.checkpoints.loaded
        if loaded is not None and loaded.state.global_step == self.state.global_step:
            recorded = stage_of(loaded)
            if recorded is not None:
                return recorded
        return stage_at(max(self.state.epoch - 1, 0), self.experiment)

    def resume(self) -> None:
        if self.experiment.debug:
            return
        self.watchdog.beat("loading a checkpoint", patience=10)
        if state := self.checkpoints.load(self.options.checkpoint, allow=self.options.allow):
            self.state = state
            self.saved_at = (state.epoch, state.step_in_epoch)

    def start_writing(self) -> None:
        """Write this start's settings; forget what was logged after the loaded checkpoint."""
        if self.experiment.debug:
            return
        self.engine.on_main(self.run.write_settings)
        self.run.rewind(self.state.positions)
        self.state = replace(self.state, wandb_id=self.run.start_wandb(self.state.wandb_id))

    def resets_optimizer(self, epoch: int) -> bool:
        match self.experiment.reset_optimizer:
            case "every_epoch":
                return epoch > 0
            case "stage_switch":
                return is_stage_switch(epoch, self.experiment)
        return False

    def train_epoch(self, epoch: int) -> None:
        """Run the remaining steps of one epoch."""
        first, done = self.state.step_in_epoch, self.state.samples_in_epoch
        steps = training_steps(
            self.run_data.train, epoch, self.experiment, self.run_data.vocabulary, self.layout, done
        )
        total = first + self.layout.num_steps(len(self.run_data.train) - done)
        self.engine.train()  # transformers loads models in evaluation mode
        # Later collections skip all that is loaded: a quarter of a second every few dozen steps.
        gc.collect()
        gc.freeze()
        self.peak.start()
        with self.progress.epoch(epoch, first, total):
            for micro_batches in steps:
                numbers = self.step(micro_batches)
                self.progress.step(self.state.global_step, numbers)
                self.log("train", epoch, stage=stage_number(epoch, self.experiment), **numbers)
                match self.request:
                    case Request.SAVE:
                        self.write_checkpoint()
                    case Request.STOP:
                        self.stop()
                    case Request.FAIL:
                        self.check_written()
        if self.state.step_in_epoch > first:
            self.log("memory", epoch, **self.peak.numbers())

    def log(self, kind: str, epoch: int, **numbers: Any) -> None:
        """Append a line to metrics.jsonl."""
        self.run.log(kind, step=self.state.global_step, epoch=epoch, **numbers)

    def step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """Run one optimizer step and return its numbers for the log."""
        started = time.perf_counter()
        number = self.state.global_step + 1
        shares, latent_shares = [], []
        for batch in micro_batches:
            self.watchdog.beat(f"step {number}, forward")
            share = self.engine.loss(batch.to(self.engine.device))
            latent_shares.append(self.engine.module.latent_loss)
            self.watchdog.beat(f"step {number}, backward")
            shares.append(self.engine.backward(share))
        self.watchdog.beat(f"step {number}, optimizer")
        applied = self.engine.step()
        losses = torch.stack(shares)
        supervised = [share for share in latent_shares if share is not None]
        own = [sum(numbers) for numbers in zip(*map(num_samples_and_tokens, micro_batches), strict=True)]
        totals = [losses.sum(), *([torch.stack(supervised).sum()] if supervised else [])]
        own += self.requests.counts(number)
        totals += torch.tensor(own, dtype=torch.float64).to(self.engine.device).unbind()
        sums = self.engine.sum_over_ranks(torch.stack([total.double() for total in totals]))
        (loss, *latent_loss, all_samples, all_tokens), counts = sums[: -len(Request)], sums[-len(Request) :]
        self.request = Request.highest(counts)
        self.guard.check(number, loss, applied, micro_batches, losses)
        tokens, samples = micro_batches[0].loss_denominator, int(all_samples)
        self.state = replace(
            self.state,
            step_in_epoch=self.state.step_in_epoch + 1,
            samples_in_epoch=self.state.samples_in_epoch + samples,
            global_step=self.state.global_step + 1,
            samples_seen=self.state.samples_seen + samples,
            tokens_seen=self.state.tokens_seen + tokens,
            skipped_steps=self.state.skipped_steps + (not applied),
        )
        seconds = time.perf_counter() - started
        numbers = {
            "loss": loss,
            "lr": self.engine.learning_rate,
            "step_seconds": seconds,
            "tokens_per_s": all_tokens / seconds,
            "supervised_tokens_per_s": tokens / seconds,
        }
        if latent_loss:  # "loss" stays that of the text, comparable with other runs and with validation
            numbers["latent_loss"] = latent_loss[0]
            numbers["loss"] -= self.engine.module.latent_weight * latent_loss[0]
        if self.engine.gradient_norm is not None:
            numbers["gradient_norm"] = self.engine.gradient_norm
        if self.engine.loss_scale is not None:
            numbers["loss_scale"] = self.engine.loss_scale
        return numbers

    def validate(self, epoch: int) -> Evaluation:
        return self.evaluate(self.run_data.valid, stage_at(epoch, self.experiment), "valid", epoch)

    def end_epoch(self, epoch: int, result: Evaluation) -> int:
        """Decide which epoch follows, and say why a stage ends early or was not learned."""
        accuracy, best, end = result.accuracy, self.state.stage_best, self.experiment.num_epochs
        is_best = best is None or accuracy > best
        stale = 0 if is_best else self.state.stale_epochs + 1
        following = next_epoch(epoch, accuracy, stale, self.experiment)
        number = stage_number(epoch, self.experiment)
        if following > epoch + 1:
            reason = f"no new best in {counted(stale, 'epoch')} (early_stopping_patience)"
            if following < end:
                reason = f"accuracy {accuracy:.1%} reached advance_at {self.experiment.advance_at}"
            self.print_line(f"stage {number} ends early: {reason}")
            skipped = following - epoch - 1  # the learning rate, too, follows the epoch's number
            self.engine.skip_steps(skipped * self.layout.num_steps(len(self.run_data.train)))
        switches = following < end and stage_number(following, self.experiment) != number
        self.state = replace(
            self.state,
            accuracy=accuracy,
            stage_best=None if switches else accuracy if is_best else best,
            stale_epochs=0 if switches else stale,
        )
        is_stuck = stale > 0 and stale % STUCK_EPOCHS == 0 and self.experiment.method is not Method.NO_COT
        if switches or (is_stuck and following < end):
            self.print_verdict(only_not_learned=not switches)
        return following

    def print_verdict(self, only_not_learned: bool) -> None:
        """A warning of the main rank about the stage, unless its loss is still falling."""
        if self.run.writes:
            from coconut_ds.reports.run_records import read_run, verdict_on_learning  # not needed to train

            record = read_run(self.run.folder)
            verdict = None if record.is_falling else verdict_on_learning(record)
            if verdict and (verdict.not_learned or not only_not_learned):
                self.print_line(f"{self.experiment.name}: {verdict.text}")

    def ablate(self, epoch: int, intact: Evaluation, following: int) -> None:
        """After the last epoch of a stage with latents, validate with the latents replaced."""
        names, stage = self.experiment.ablate_after_stage, stage_at(epoch, self.experiment)
        is_over = following >= self.experiment.num_epochs
        next_is_same_stage = not is_over and stage_at(following, self.experiment) == stage
        if not names or next_is_same_stage or stage.num_latents == 0:
            return
        from coconut_ds.evaluation.ablation import Comparison  # not needed to train

        for name in names:
            result = self.measure(self.run_data.valid, stage, ablation=name)
            comparison = Comparison.between(name, intact.predictions, result.predictions)
            numbers = {**result.numbers(), **comparison.against_intact()}
            self.log("ablation", epoch, ablation=name, **numbers)
            self.print_line(f"  {comparison}")

    def measure(self, test_set: TestSet, stage: Stage, ablation: str | None = None) -> Evaluation:
        vocabulary = self.run_data.vocabulary
        shown = self.progress.batches
        return evaluate(
            self.engine, test_set, stage, self.experiment, vocabulary, shown, self.keep_going, ablation
        )

    def evaluate(self, test_set: TestSet, stage: Stage, name: str, epoch: int) -> Evaluation:
        """Evaluate, log the numbers and print one line."""
        result = self.measure(test_set, stage)
        weights = self.engine.module.thought.window_weights()
        extra = {} if weights is None else {"window_weights": weights}
        self.log(
            name,
            epoch,
            stage=stage_number(epoch, self.experiment),
            at=str(stage),
            **result.numbers(),
            **extra,
        )
        if weights is not None and self.run.writes:
            from coconut_ds.reports.figures import draw_window_weights  # takes half a second to import

            try:
                draw_window_weights(self.run.folder)
            except OSError as error:  # the numbers are in metrics.jsonl
                warnings.warn(f"cannot plot the window weights: {error}", stacklevel=2)
        for prediction in result.predictions[:NUM_SHOWN]:
            self.run.sample(kind=name, epoch=epoch, **asdict(prediction))
        self.run.show_samples()
        is_part = result.num_items == self.experiment.eval_max_items
        part = f" of the first {result.num_items} examples" if is_part else ""
        match = f"CoT match {100 * result.cot_match:.1f} %  " if stage.shows_all_steps else ""
        self.print_line(
            f"epoch {epoch + 1}/{self.experiment.num_epochs}  {stage}:  {name} loss {result.loss:.4f}  "
            f"accuracy {100 * result.accuracy:.1f} %{part} ({result.grading} grading)  "
            f"{match}{self.peak.summary()}"
        )
        if cut := cut_answers(result.numbers()):
            self.print_line(f"  {cut}")
        self.check_written()
        return result

    def save(self, following: int) -> None:
        """Finish the epoch, continue with `following`, and write its checkpoint."""
        self.state = replace(self.state, epoch=following, step_in_epoch=0, samples_in_epoch=0)
        self.write_checkpoint()

    def write_checkpoint(self) -> None:
        position = (self.state.epoch, self.state.step_in_epoch)
        if self.experiment.debug or position == self.saved_at:
            return
        self.check_written()
        self.watchdog.beat("saving a checkpoint", patience=10)
        state = replace(self.state, positions=self.run.positions())
        started = time.perf_counter()
        name = self.checkpoints.save(state, self.write_model)
        self.run.log("save", step=state.global_step, name=name, seconds=time.perf_counter() - started)
        self.saved_at = position
        self.requests.saved()

    def check_written(self) -> None:
        """Raise ConfigError on all ranks if the main rank could not write a log line. Collective."""
        self.engine.on_main(self.run.check_written)

    def keep_going(self) -> None:
        """Handle requests between the batches of an evaluation."""
        self.watchdog.beat("evaluation, synchronizing")
        match self.requests.poll():
            case Request.STOP:
                self.stop()
            case Request.FAIL:
                self.check_written()
        self.watchdog.beat("evaluation, a batch")

    def stop(self) -> NoReturn:
        """Save a checkpoint and raise StopRequested on all ranks."""
        reason = self.requests.reason()
        if self.experiment.only_eval:
            raise StopRequested(f"{reason}; the evaluation was not finished")
        self.write_checkpoint()
        advice = "debug: true saves nothing" if self.experiment.debug else "run the same command to resume"
        raise StopRequested(f"{reason}; stopped after step {self.state.global_step}; {advice}")

    def write_model(self, folder: Path) -> None:
        with self.engine.full_weights() as module:
            if self.engine.is_main:
                write_model(module, self.run_data.vocabulary, folder)
