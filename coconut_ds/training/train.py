"""Set up a run (data, ranks, budget, engine, run folder), then run the training loop (trainer.py)."""

import warnings

import torch

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import BatchConfig
from coconut_ds.data.run_data import RunData, load_run_data
from coconut_ds.engine.engine import (
    Engine,
    Ranks,
    refuse_missing_operators,
    schedule,
    start_distributed,
    world_size_from_environment,
)
from coconut_ds.engine.signals import Signals
from coconut_ds.engine.watchdog import Watchdog
from coconut_ds.errors import BudgetError
from coconut_ds.evaluation.evaluate import Evaluation
from coconut_ds.failures import lost_ranks_explained, phase
from coconut_ds.memory.budget import enforce_memory_budget, judged_plan
from coconut_ds.model.loading import build_module, load_config, parameter_groups
from coconut_ds.runs.run_folder import Run
from coconut_ds.training.trainer import Options, Trainer


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
            with guard:
                watchdog.beat("starting the engine", patience=10)
                engine = start_engine(experiment, ds_config, run_data, ranks)
                trainer = Trainer(experiment, run_data, engine, run, signals, options, watchdog)
                result = trainer.run_all()
            watchdog.beat("writing the report", patience=10)
            send_report(run)
        engine.close()
    return result


def check_start(experiment: Experiment, ds_config: DeepSpeedConfig, world_size: int) -> RunData:
    """Read the data and check everything that needs neither ranks nor a model; `validate` does the same.

    Raises UserError.
    """
    ds_config.resolve(experiment, world_size)
    refuse_missing_operators(ds_config)
    return load_run_data(experiment, load_config(experiment.model_id))


def check_model(
    experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, world_size: int
) -> None:
    """Plan the run and load its weights as `train` does, without ranks and run folder.  Raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not experiment.only_eval:
        _, refusal = judged_plan(experiment, ds_config, run_data, Ranks(0, world_size, device))
        if refusal is not None:
            raise BudgetError(refusal)
    build_module(experiment, run_data.vocabulary, ds_config.latent_memory)


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


@phase("initialise")
def start_engine(
    experiment: Experiment, ds_config: DeepSpeedConfig, run_data: RunData, ranks: Ranks
) -> Engine:
    """Build the model and wrap it. Collective."""
    module = build_module(experiment, run_data.vocabulary, ds_config.latent_memory)
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
