"""Run folders as training leaves them, made without DeepSpeed: random weights in real checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from coconut_ds.config.deepspeed import LatentMemory, load_ds_config
from coconut_ds.config.experiment import experiment_to_yaml, validate_experiment
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.model.loading import build_module, write_model
from coconut_ds.runs.checkpoint_folders import TrainState
from coconut_ds.runs.checkpoints import Checkpoints
from tests.runs.fake_shards import FakeShards

ROOT = Path(__file__).resolve().parents[1]


def make_run(values, folder, epochs=(1, 4), **changes):
    """A run folder below `folder` with a checkpoint after each of `epochs`; gives its path."""
    experiment = validate_experiment({**values, "save_path": str(folder), **changes}, "test")
    run = folder / experiment.name
    run.mkdir(parents=True)
    (run / "experiment.yaml").write_text(experiment_to_yaml(experiment))
    resolved = load_ds_config(ROOT / "ds_configs" / "zero1.json").resolve(experiment, 1)
    (run / "ds_config.json").write_text(json.dumps(resolved))
    vocabulary = load_vocabulary(experiment.model_id)
    checkpoints = Checkpoints(run, FakeShards(torch.zeros(2)), {"experiment": asdict(experiment)})
    for epoch in epochs:
        module = build_module(experiment, vocabulary, LatentMemory())
        torch.manual_seed(epoch)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        checkpoints.save(
            TrainState(epoch=epoch, global_step=epoch, accuracy=1 / epoch),  # earlier stages are easier
            lambda path, module=module: write_model(module, vocabulary, path),
        )
    return run
