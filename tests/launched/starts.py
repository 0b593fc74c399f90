"""Start an engine with each of many ds_configs in turn and train one step; write what each gave.

python -m tests.launched.starts CASES.json OUT.json
CASES.json: {"experiment": {...}, "ds_configs": [{...}, ...]};  OUT.json: a loss or a traceback for each
"""

import gc
import json
import sys
import traceback
from pathlib import Path

import torch

from coconut_ds.config.deepspeed import validate_ds_config
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.batching import BatchConfig, training_steps
from coconut_ds.data.run_data import load_run_data
from coconut_ds.engine.engine import finish_distributed, start_distributed
from coconut_ds.memory.budget import default_budget
from coconut_ds.model.loading import load_config
from coconut_ds.training.trainer import start_engine


def loss_of(values, experiment, run_data, ranks, micro_batches):
    ds_config = validate_ds_config(values, "drawn")
    ds_config = ds_config.for_run(experiment, default_budget(), 32)
    engine = start_engine(experiment, ds_config, run_data, ranks)
    try:
        engine.train()
        torch.manual_seed(0)
        shares = [engine.backward(engine.loss(batch.to(engine.device))) for batch in micro_batches]
        engine.step()
        return float(torch.stack(shares).double().sum())
    finally:
        engine._engine.destroy()
        gc.collect()


def main(cases_path, out_path):
    cases = json.loads(Path(cases_path).read_text())
    experiment = validate_experiment(cases["experiment"], "starts")
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    ranks = start_distributed()
    layout = BatchConfig.of(experiment, ranks.world_size, ranks.rank)
    micro_batches = next(training_steps(run_data.train, 3, experiment, run_data.vocabulary, layout))
    results = []
    for values in cases["ds_configs"]:
        try:
            results.append(loss_of(values, experiment, run_data, ranks, micro_batches))
        except Exception:  # every kind is what the test looks for
            results.append(traceback.format_exc())
    Path(out_path).write_text(json.dumps(results))
    finish_distributed()


if __name__ == "__main__":
    main(*sys.argv[-2:])
