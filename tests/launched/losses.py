"""Train a few steps for every case of a JSON list and write the losses of each; any number of ranks.

python -m tests.launched.losses CASES.json OUT.json
CASES.json: [{"name": ..., "experiment": {...}, "ds_config": path, "latent_memory": {...}, "steps": N}, ...]
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.batching import BatchConfig, training_steps
from coconut_ds.data.run_data import load_run_data
from coconut_ds.engine.engine import finish_distributed, start_distributed
from coconut_ds.memory.budget import read_ds_config
from coconut_ds.model.loading import load_config
from coconut_ds.training.trainer import start_engine


def losses_of(case, ranks):
    experiment = validate_experiment(case["experiment"], case["name"])
    ds_config = read_ds_config(case["ds_config"], experiment)
    memory = replace(ds_config.latent_memory, **case.get("latent_memory", {}))
    ds_config = replace(ds_config, latent_memory=memory)
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    engine = start_engine(experiment, ds_config, run_data, ranks)
    engine.train()
    losses = []
    epoch = case.get("epoch", 0)
    layout = BatchConfig.of(experiment, ranks.world_size, ranks.rank)
    while len(losses) < case["steps"]:
        for micro_batches in training_steps(run_data.train, epoch, experiment, run_data.vocabulary, layout):
            shares = [engine.backward(engine.loss(batch.to(engine.device))) for batch in micro_batches]
            engine.step()
            (loss,) = engine.sum_over_ranks([float(torch.stack(shares).double().sum())])
            losses.append(loss)
            if len(losses) == case["steps"]:
                break
        epoch += 1
    return losses


def main(cases_path, out_path):
    cases = json.loads(Path(cases_path).read_text())
    ranks = start_distributed()
    found = {case["name"]: losses_of(case, ranks) for case in cases}
    if ranks.is_main:
        Path(out_path).write_text(json.dumps(found))
    finish_distributed()


if __name__ == "__main__":
    main(*sys.argv[-2:])
