"""A trainer in this process: one rank, SGD, no DeepSpeed, no process group."""

import contextlib
from pathlib import Path

import torch

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.run_data import load_run_data
from coconut_ds.distributed import Ranks, Signals
from coconut_ds.engine.watchdog import Watchdog
from coconut_ds.evaluation.evaluate import ReadingEngine
from coconut_ds.model.loading import build_module, load_config
from coconut_ds.runs.run_folder import Run
from coconut_ds.training.trainer import Options, Trainer
from tests.runs.fake_shards import FakeShards


class PlainEngine(ReadingEngine):
    """The calls of engine.Engine that a trainer makes."""

    expected_bytes = 0
    learning_rate, gradient_norm, loss_scale = 0.05, None, None

    def __init__(self, module, rate=0.05):
        super().__init__(module, Ranks(0, 1, torch.device("cpu")))
        self.parameters = [p for p in module.requires_grad_(True).parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, rate)
        self.shards = FakeShards(torch.zeros(1))
        self.skipped_steps = []

    def backward(self, loss):
        loss.backward()
        return loss.detach()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def reset_optimizer(self):
        pass

    def skip_steps(self, steps):
        self.skipped_steps.append(steps)

    def checkpoint_bytes(self):
        return self.expected_bytes

    def save_shards(self, folder: Path, client_state):
        self.shards.weights = torch.nn.utils.parameters_to_vector(self.parameters).detach()
        self.shards.save_shards(folder, client_state)

    def load_shards(self, folder: Path):
        state = self.shards.load_shards(folder)
        torch.nn.utils.vector_to_parameters(self.shards.weights, self.parameters)
        return state

    @contextlib.contextmanager
    def full_weights(self):
        yield self.module


@contextlib.contextmanager
def plain_trainer(values, allow=(), **changes):
    """A Trainer of the experiment `values | changes`, ready for `run_all`."""
    experiment = validate_experiment({**values, **changes}, "test")
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    engine = PlainEngine(build_module(experiment, run_data.vocabulary, LatentMemory()))
    with Signals() as signals, Run(experiment, {}) as run:
        watchdog = Watchdog(run.folder, 0, 1, 0)
        options = Options(allow=tuple(allow), stuck_seconds=0)
        yield Trainer(experiment, run_data, engine, run, signals, options, watchdog)
