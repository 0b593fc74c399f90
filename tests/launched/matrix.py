"""Train some steps on one batch, save, go on; load into a fresh engine and go on again: many cases in turn.

python -m tests.launched.matrix CASES.json OUT.json
CASES.json: [{"name": ..., "experiment": {...}, "ds_config": path, "epoch": N}, ...]
"""

import json
import sys
from pathlib import Path

import torch

from coconut_ds.config.deepspeed import load_ds_config
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.batching import BatchConfig, training_steps
from coconut_ds.data.run_data import load_run_data
from coconut_ds.engine.engine import finish_distributed, start_distributed
from coconut_ds.model.loading import load_config, trainable_parameters
from coconut_ds.training.trainer import start_engine

STEPS, MORE_STEPS = 4, 2


def step(engine, micro_batches):
    """One optimizer step; gives the loss before it. The same dropout every time."""
    torch.manual_seed(engine.rank)
    shares = [engine.backward(engine.loss(batch.to(engine.device))) for batch in micro_batches]
    engine.step()
    (loss,) = engine.sum_over_ranks([float(torch.stack(shares).double().sum())])
    return loss


def saved_names(folder):
    """Names of the weights in the shards' own copy of the module."""
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    return sorted(state["module"]), sorted(state.get("frozen_param_fragments") or ())


def run_case(case, ranks, folder):
    experiment = validate_experiment(case["experiment"], case["name"])
    ds_config = load_ds_config(case["ds_config"])
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    steps = training_steps(
        run_data.train,
        case["epoch"],
        experiment,
        run_data.vocabulary,
        BatchConfig.of(experiment, ranks.world_size, ranks.rank),
    )
    micro_batches = next(steps)
    engine = start_engine(experiment, ds_config, run_data, ranks)
    engine.train()
    trainable = trainable_parameters(engine.module)
    found = {"trainable": trainable, "losses": [step(engine, micro_batches) for _ in range(STEPS)]}
    engine.save_shards(folder, {})
    found["weights"] = engine.module.thought.window_weights()
    found["straight"] = [step(engine, micro_batches) for _ in range(MORE_STEPS)]
    engine.barrier()
    if engine.zero_stage < 3:
        found["saved"], found["frozen"] = saved_names(folder)
    fresh = start_engine(experiment, ds_config, run_data, ranks)
    fresh.train()
    fresh.load_shards(folder)
    found["resumed"] = [step(fresh, micro_batches) for _ in range(MORE_STEPS)]
    return found


def main(cases_path, out_path):
    cases = json.loads(Path(cases_path).read_text())
    ranks = start_distributed()
    found = {}
    for case in cases:
        folder = Path(cases_path).parent / "shards" / case["name"]
        found[case["name"]] = run_case(case, ranks, folder)
    if ranks.is_main:
        Path(out_path).write_text(json.dumps(found))
    finish_distributed()


if __name__ == "__main__":
    main(*sys.argv[-2:])
