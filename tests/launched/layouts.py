"""Train some steps, save, load into an engine that splits memory in another way: a chain of ds_configs.

python -m tests.launched.layouts CHAINS.json OUT.json
CHAINS.json: {"experiment": {...}, "chains": {name: [[optimizer steps, {ds_config keys}], ...]}}
"""

import json
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from coconut_ds.config.deepspeed import validate_ds_config
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.batching import BatchConfig, training_steps
from coconut_ds.data.run_data import load_run_data
from coconut_ds.engine.engine import finish_distributed, start_distributed
from coconut_ds.model.loading import load_config
from coconut_ds.training.trainer import start_engine


def full_state(engine):
    """fp32 weights and moments of every trained parameter, complete on each rank."""
    state = {}
    if engine.zero_stage < 3:  # DeepSpeed links all groups when it has stepped the first
        engine._optimizer._hp_optimizer_states_linked = False
        engine._optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            parts = [safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            state[name] = [t.float().cpu().clone() for t in (safe_get_full_fp32_param(parameter), *parts)]
    return state


def changed(before, after):
    """Names of the parameters whose weights or moments differ in any bit."""
    assert before.keys() == after.keys()
    return [name for name in before if not all(map(torch.equal, before[name], after[name]))]


def run_chain(chain, experiment, run_data, ranks, folder):
    steps = training_steps(
        run_data.train,
        3,
        experiment,
        run_data.vocabulary,
        BatchConfig.of(experiment, ranks.world_size, ranks.rank),
    )
    micro_batches, state, results = next(steps), None, []
    for number, (num_steps, values) in enumerate(chain):
        engine = start_engine(experiment, validate_ds_config(values, "chain"), run_data, ranks)
        engine.train()
        result = {"changed": []}
        if state is not None:
            saved, converted = folder / str(number - 1), folder / f"to_{number}"
            converted.mkdir(exist_ok=True)
            engine.barrier()
            if engine.is_main:
                engine.convert_shards(saved, converted)
            engine.barrier()
            result["client_state"] = engine.load_converted_shards(converted)
            result["changed"] = changed(state, full_state(engine))
        losses = []
        for _ in range(num_steps):
            shares = [engine.backward(engine.loss(batch.to(engine.device))) for batch in micro_batches]
            engine.step()
            losses += engine.sum_over_ranks([float(torch.stack(shares).double().sum())])
        state = full_state(engine)
        engine.save_shards(folder / str(number), {"number": number})
        results.append(result | {"losses": losses})
        engine.barrier()
    return results


def main(chains_path, out_path):
    cases = json.loads(Path(chains_path).read_text())
    experiment = validate_experiment(cases["experiment"], "chains")
    run_data = load_run_data(experiment, load_config(experiment.model_id))
    ranks = start_distributed()
    folder = Path(chains_path).parent
    results = {
        name: run_chain(chain, experiment, run_data, ranks, folder / name)
        for name, chain in cases["chains"].items()
    }
    if ranks.is_main:
        Path(out_path).write_text(json.dumps(results))
    finish_distributed()


if __name__ == "__main__":
    main(*sys.argv[-2:])
