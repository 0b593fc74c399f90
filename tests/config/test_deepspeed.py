"""The DeepSpeed JSON: what stock DeepSpeed would ignore, drop or fail on later is refused at once."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coconut_ds.config.deepspeed import (
    DeepSpeedConfig,
    LatentMemory,
    MemoryBudget,
    default_ds_config,
    load_ds_config,
    validate_ds_config,
)
from coconut_ds.config.experiment import Experiment, validate_experiment
from coconut_ds.config.schema import load_schema
from coconut_ds.errors import ConfigError
from coconut_ds.memory.budget import read_ds_config

DS_CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"

BUDGET = {
    "device": "GTX 1080 Ti",
    "gpus": 2,
    "gpu_memory_mib": 11264,
    "reserved_mib": 800,
    "host_memory_gib": 32,
    "components_mib": {"parameters": 1000, "activations": 6000},
}
PLAIN = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}


def experiment(**changes: object) -> Experiment:
    values = {
        "name": "run",
        "model_id": "gpt2",
        "method": "cot",
        "train_path": "t",
        "val_path": "v",
        "batch_size_training": 4,
        "gradient_accumulation_steps": 8,
        "lr": 1e-4,
    }
    return validate_experiment(values | changes, "test")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, block by block."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def plain(**changes: Any) -> DeepSpeedConfig:
    return validate_ds_config(merged(PLAIN, changes), "ds_configs/x.json")


# --- files that must work ------------------------------------------------------------------------------


def test_smallest_file():
    config = plain()
    assert (config.zero_stage, config.offload_optimizer, config.offload_param) == (2, False, False)
    assert config.precision == "fp32" and config.memory_budget is None
    assert config.latent_memory == LatentMemory()


def test_our_blocks_never_reach_deepspeed():
    config = plain(
        memory_budget=BUDGET, latent_memory={"activation_checkpointing": "layers"}, **{"$schema": "x"}
    )
    assert set(config.stock) == set(PLAIN)
    assert config.memory_budget is not None and config.memory_budget.on_exceed == "error"
    assert config.memory_budget.components_mib["activations"] == 6000
    assert config.latent_memory == LatentMemory(activation_checkpointing="layers")


@pytest.mark.parametrize("value", ["none", "layers"])
def test_former_name_of_activation_checkpointing(value):
    former = plain(latent_memory={"recompute": value, "segmented_cache": False})
    assert former.latent_memory == LatentMemory(activation_checkpointing=value, segmented_cache=False)
    assert former.notes == (
        "ds_configs/x.json: latent_memory.recompute: is now called activation_checkpointing",
    )
    assert former.resolved_file(experiment(), 2) == (
        plain(latent_memory={"activation_checkpointing": value, "segmented_cache": False}).resolved_file(
            experiment(), 2
        )
    )


def test_both_names_of_activation_checkpointing_are_refused():
    with pytest.raises(ConfigError, match="latent_memory.recompute: is not a setting"):
        plain(latent_memory={"recompute": "layers", "activation_checkpointing": "none"})


def test_latent_memory_defaults_are_the_schema_s():
    stated = load_schema("ds_config")["properties"]["latent_memory"]["properties"]
    assert {key: rule["default"] for key, rule in stated.items()} == LatentMemory().__dict__


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision(precision):
    assert plain(**{precision: {"enabled": True}}).precision == precision
    assert plain(**{precision: {"enabled": False}}).precision == "fp32"


def test_resolve_fills_everything_from_the_experiment():
    config = plain(gradient_clipping="auto", optimizer={"params": {"lr": "auto", "betas": [0.9, 0.95]}})
    resolved = config.resolve(experiment(gradient_clipping=0.5, weight_decay=0.1), world_size=2)
    assert resolved["train_batch_size"] == 4 * 8 * 2
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 8
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["optimizer"]["params"] == {"lr": 1e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert config.stock["gradient_clipping"] == "auto", "resolving must not change the record"


def test_resolve_accepts_numbers_that_agree():
    config = plain(train_batch_size=64, gradient_accumulation_steps=8.0, optimizer={"params": {"lr": 1e-4}})
    assert config.resolve(experiment(), 2)["train_batch_size"] == 64


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"train_batch_size": 128}, ["train_batch_size: is 128", "sets 64", "batch_size_training 4 x"]),
        ({"train_micro_batch_size_per_gpu": 2}, ["per_gpu: is 2", "sets 4 (batch_size_training)"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps: is 1", "sets 8"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping: is 0.5", "sets 1.0"]),
        ({"optimizer": {"params": {"lr": 0.001}}}, ["optimizer.params.lr: is 0.001", "sets 0.0001 (lr)"]),
        (
            {"optimizer": {"params": {"weight_decay": 0}}},
            ["optimizer.params.weight_decay: is 0", "sets 0.01"],
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            ["compute_grad_norm: is false", "1.0 needs the norm"],
        ),
    ],
)
def test_disagreement_shows_both_numbers(changes, parts):
    with pytest.raises(ConfigError) as caught:
        plain(**changes).resolve(experiment(), 2)
    assert all(part in str(caught.value) for part in ["ds_configs/x.json: ", *parts])


@pytest.mark.parametrize("ranks, size, divides", [(4, 3, False), (4, 2, True), (2, 3, True), (4, 0, True)])
def test_ranks_divide_into_secondary_partitions(ranks, size, divides):
    file = plain(zero_optimization={"stage": 3, "zero_hpz_partition_size": size})
    if divides:
        file.resolve(experiment(), ranks)
    else:
        with pytest.raises(ConfigError, match="4 ranks do not divide into groups of 3"):
            file.resolve(experiment(), ranks)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bf16_experiment_needs_a_bf16_file(precision):
    config = plain() if precision == "fp32" else plain(fp16={"enabled": True})
    with pytest.raises(ConfigError, match=f"trains in {precision}; use ds_configs/zero2_offload_bf16.json"):
        config.resolve(experiment(bf16=True), 2)
    assert plain(bf16={"enabled": True}).resolve(experiment(bf16=True), 2)["bf16"]["enabled"]


# --- bad files -----------------------------------------------------------------------------------------

BAD = [
    ({"gradient_accumulation_step": 4}, "did you mean 'gradient_accumulation_steps'?"),
    ({"memory_budgets": BUDGET}, "did you mean 'memory_budget'?"),
    (
        {"zero_optimization": {"reduce_bucket": 1}},
        "zero_optimization.reduce_bucket: is not a setting of DeepSpeed",
    ),
    ({"optimizer": {"params": {"beta": [0.9, 0.99]}}}, "optimizer.params.beta: is not a setting"),
    ({"fp16": {"enabled": True, "initial_scale": 2}}, "write 'initial_scale_power' instead"),
    ({"latent_memory": {"recomputation": "layers"}}, "latent_memory.recomputation: is not a setting"),
    ({"elasticity": {}}, "elasticity: was removed from DeepSpeed"),
    ({"amp": {"enabled": True}}, "amp: was removed from DeepSpeed; enable fp16 or bf16"),
    ({"curriculum_learning": {}}, "curriculum_learning: was removed"),
    ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size: MiCS was removed"),
    ({"memory_breakdown": True}, "memory_breakdown: resets the peak-memory counters"),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        'set "latent_memory": {"activation_checkpointing": "layers"}',
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "offload_optimizer.super_offload: has no effect below ZeRO stage 3",
    ),
    (
        {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 50_000}},
        "stage3_module_granularity_threshold: fetches whole modules as one",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "ratio: below 1 is for ZeRO stage 3",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
        "device: must be one of none, cpu, nvme, got 'gpu'",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
        "nvme needs ZeRO stage 3",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}},
        "offload_optimizer.device: is missing",
    ),
    ({"zero_optimization": {"stage": 3, "allgather_bucket_size": 3}}, "must be an even whole number"),
    ({"zero_optimization": {"overlap_comm": "auto"}}, "overlap_comm: 'auto' is not filled in here"),
    ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage: must be one of 1, 2, 3, got '2'"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, 'a whole number of at least 1, or "auto", got 0'),
    ({"zero_optimization": {"reduce_bucket_size": True}}, 'of at least 1, or "auto", got true'),
    ({"zero_optimization": {"reduce_bucket_size": "200000000"}}, "must be a whole number of at least 1"),
    ({"gradient_clipping": -1}, 'gradient_clipping: must be a number of at least 0, or "auto", got -1'),
    ({"gradient_clipping": "automatic"}, 'gradient_clipping: must be a number of at least 0, or "auto"'),
    ({"optimizer": {"type": "AdamWW"}}, "did you mean 'AdamW'?"),
    ({"zero_optimization": {"stage": "4"}}, "zero_optimization.stage: must be one of 1, 2, 3, got '4'\n"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: must be one of 1, 2, 3, got 4\n"),
    ({"zero_optimization": {"stage": "2"}}, "got '2'; write 2 without quotes\n"),
    ({"optimizer": {"type": "PagedAdamW8bit"}}, "or AdamW8bit of bitsandbytes (paged, "),
    ({"optimizer": {"type": "AdamW8bit"}, "zero_optimization": {"stage": 3}}, 'write "stage": 2, or "type"'),
    (
        {"optimizer": {"type": "AdamW8bit"}, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "moves them to the host; delete offload_optimizer",
    ),
    (
        {"optimizer": {"type": "AdamW8bit", "params": {"bias_correction": False}}},
        "is not an argument of AdamW8bit",
    ),
    (
        {
            "optimizer": {"type": "AdamW8bit"},
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
        },
        "needs DeepSpeed's CPU Adam, not AdamW8bit; delete it",
    ),
    ({"optimizer": {"type": "OneBitAdam"}}, 'write "type": "AdamW", got \'OneBitAdam\''),
    ({"pipeline": {"stages": 2}}, "pipeline parallelism cannot run the latent loop; delete it"),
    ({"autotuning": {"enabled": True}}, "use the fit command instead"),
    ({"compression_training": {"weight_quantization": {}}}, "compression_training: was removed"),
    ({"expert_parallel": {"enabled": True}}, "there are no experts here; delete it"),
    (
        {"zero_optimization": {"cpu_offload_use_pin_memory": False}},
        "write pin_memory with the same value inside offload_optimizer",
    ),
    ({"gradient_predivide_factor": 2}, "gradient_predivide_factor: cannot be combined with reduce_scatter"),
    ({"prescale_gradients": True}, "prescale_gradients: cannot be combined with reduce_scatter"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "needs DeepSpeed's CPU Adam"),
    ({"optimizer": {"params": {"torch_adam": True, "bias_correction": True}}}, "always corrects the bias"),
    (
        {"zero_optimization": {"compute_grad_norm": False, "offload_optimizer": {"device": "cpu"}}},
        "compute_grad_norm: cannot be false with offload_optimizer",
    ),
    (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "compute_grad_norm": False}},
        "compute_grad_norm: false needs stage 2 in bf16",
    ),
    ({"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["MLP"]}}}, "for mixtures of experts"),
    ({"checkpoint": {"load_universal": True}}, "load_universal: is decided by the trainer"),
    ({"optimizer": {"params": {"max_grad_norm": 1}}}, "max_grad_norm: is not an optimizer argument"),
    ({"optimizer": {"params": {"betas": [0.9, 1.0]}}}, "optimizer.params.betas"),
    (
        {"optimizer": {"params": {"fp32_optimizer_states": False}}},
        "has no effect without DeepSpeed's CPU Adam",
    ),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16, bf16: both are enabled"),
    (
        {"fp16": {"enabled": True, "loss_scale": -1}},
        "fp16.loss_scale: must be a number of at least 0, got -1",
    ),
    ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "needs DeepSpeed's CPU Adam"),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "needs bf16_master_weights_and_grads"),
    ({"data_types": {"param_dtype": "bf16"}}, "param_dtype: is bf16, but the file trains in fp32"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast: is not supported by the latent loop"),
    ({"wandb": {"enabled": True}}, "wandb: would start a second wandb run"),
    (
        {"memory_budget": {**BUDGET, "components_mib": {"activations": 10465}}},
        "sum to 10465 MiB, but gpu_memory_mib 11264",
    ),
    ({"memory_budget": {**BUDGET, "components_mib": {"activation": 1}}}, "did you mean 'activations'?"),
    ({"memory_budget": {**BUDGET, "components_mib": {"loss": "1"}}}, "components_mib.loss: must be a number"),
    (
        {"memory_budget": {**BUDGET, "reserved_mib": 11264}},
        "reserved_mib: 11264 leaves no gpu_memory_mib",
    ),
    (
        {"memory_budget": {**BUDGET, "gpu_memory_mib": 12}},
        "memory_budget.gpu_memory_mib: is 12 MiB; for 12 GiB write 12288",
    ),
    ({"memory_budget": {"device": "x"}}, "memory_budget.gpus: is missing"),
    ({"memory_budget": {**BUDGET, "on_exceed": "ignore"}}, "on_exceed: must be one of error, warn"),
    (
        {"latent_memory": {"activation_checkpointing": True}},
        "latent_memory.activation_checkpointing: must be one of none, layers, got true",
    ),
    ({"latent_memory": {"loss_chunk_tokens": 0}}, "loss_chunk_tokens: must be a whole number of at least 1"),
    (
        {"zero_optimization": {"stage": 2, "zenflow": {}}},
        "zenflow: updates some weights with stale gradients",
    ),
    ({"zero_optimization": 2}, "zero_optimization: must be a block, got 2"),
]


@pytest.mark.parametrize("changes, part", BAD, ids=[part[:60] for _, part in BAD])
def test_bad_files(changes, part):
    with pytest.raises(ConfigError) as caught:
        plain(**changes)
    message = str(caught.value)
    assert part in message + "\n"
    assert all(
        line.startswith("ds_configs/x.json: ") and (len(line) < 400 or "valid keys" in line)
        for line in message.splitlines()
    )


# --- files of other programs ---------------------------------------------------------------------------

NOTED = [
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the learning rate follows lr_schedule"),
    (
        {"zero_optimization": {"allgather_bucket_size": 2e8}},
        "allgather_bucket_size: has no effect at ZeRO stage 1 and 2",
    ),
    ({"zero_optimization": {"stage": 1, "allgather_bucket_size": 2}}, "has no effect at ZeRO stage 1 and 2"),
    (
        {"zero_optimization": {"stage3_max_live_parameters": 1}},
        "stage3_max_live_parameters: has no effect below ZeRO stage 3",
    ),
    ({"zero_optimization": {"sub_group_size": "auto"}}, "sub_group_size: has no effect below ZeRO stage 3"),
    ({"zero_optimization": {"stage": 3, "round_robin_gradients": True}}, "has no effect at ZeRO stage 3"),
    (
        {"zero_optimization": {"stage": 1, "ignore_unused_parameters": False}},
        "has an effect at ZeRO stage 2 only",
    ),
    ({"optimizer": {"type": "Adam"}}, 'optimizer.type: is "Adam", which DeepSpeed runs as AdamW'),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage: is 0; stage 1 is used"),
]
REFUSED = load_schema("ds_config")["properties"]
OFF = [
    *[{key: {"enabled": False}} for key, rule in REFUSED.items() if "not" in rule],
    *[{key: False} for key, rule in REFUSED.items() if "not" in rule],
    *[
        {"zero_optimization": {key: False}}
        for key, rule in REFUSED["zero_optimization"]["properties"].items()
        if "not" in rule and key != "cpu_offload_use_pin_memory"
    ],
]


@pytest.mark.parametrize("changes, part", NOTED, ids=[part[:60] for _, part in NOTED])
def test_settings_without_effect_are_noted_and_left_out(changes, part):
    config = plain(**changes)
    assert [part in note for note in config.notes] == [True]
    bare = {**PLAIN, "zero_optimization": {"stage": config.zero_stage}}
    assert config.stock == bare


CPU = {"device": "cpu"}
RENAMED = [
    ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
    ({"zero_optimization": {"cpu_offload": True}}, {"zero_optimization": {"offload_optimizer": CPU}}),
    (
        {"zero_optimization": {"cpu_offload": True, "cpu_offload_use_pin_memory": False}},
        {"zero_optimization": {"offload_optimizer": {**CPU, "pin_memory": False}}},
    ),
    (
        {"zero_optimization": {"stage": 3, "cpu_offload_param": True, "max_live_parameters": 9}},
        {"zero_optimization": {"stage": 3, "offload_param": CPU, "stage3_max_live_parameters": 9}},
    ),
    (
        {"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}},
        {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    ),
    ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {"zero_optimization": {"stage": 1}}),
    ({"zero_optimization": {"stage": 2, "offload_param": CPU}}, {"zero_optimization": {"stage": 2}}),
    (
        {"optimizer": {"type": "adamw_bnb_8bit", "params": {"torch_adam": False, "eps": 1e-6}}},
        {"optimizer": {"type": "AdamW8bit", "params": {"eps": 1e-6}}},
    ),
]


@pytest.mark.parametrize("written, meant", RENAMED, ids=lambda values: str(values)[:60])
def test_old_spellings_are_converted_and_noted(written, meant):
    config = plain(**written)
    assert config.stock == plain(**meant).stock and 1 <= len(config.notes) <= 2


@pytest.mark.parametrize(
    "batch, micro, steps",
    [
        ({"train_batch_size": 32}, 4, 4),
        ({"train_micro_batch_size_per_gpu": 2}, 2, 16),
        ({"gradient_accumulation_steps": 2}, 4, 2),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            2,
            4,
        ),
        ({"train_batch_size": 7}, None, None),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 3}, None, None),
    ],
    ids=str,
)
def test_batch_numbers_that_differ_come_with_the_options_for_either(batch, micro, steps):
    config = plain(**batch)
    with pytest.raises(ConfigError) as error:
        config.resolve(experiment(), 2)
    assert "for the YAML's batch numbers: --ds train_batch_size=auto" in str(error.value)
    assert ("for this file's" in str(error.value)) is (micro is not None)
    if micro is not None:
        settings = f"--set batch_size_training={micro} --set gradient_accumulation_steps={steps}"
        assert settings in str(error.value)
        changed = experiment(batch_size_training=micro, gradient_accumulation_steps=steps)
        assert config.resolve(changed, 2)["train_micro_batch_size_per_gpu"] == micro


def test_the_default_file_is_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(DS_CONFIGS.parent)
    assert default_ds_config() == "ds_configs/zero2_offload.json"
    monkeypatch.chdir(tmp_path)
    assert load_ds_config(default_ds_config()).offload_optimizer


def test_a_new_spelling_beside_the_old_one_is_refused():
    with pytest.raises(ConfigError, match="is the old spelling"):
        plain(bfloat16={"enabled": True}, bf16={"enabled": False})


def test_ds_overrides(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(PLAIN))
    config = load_ds_config(
        path, ["zero_optimization.stage=3", "zero_optimization.offload_optimizer.device=cpu"]
    )
    assert config.zero_stage == 3 and config.offload_optimizer
    assert load_ds_config(path, ["bf16.enabled=true"]).precision == "bf16"
    assert load_ds_config(path, ["optimizer="]).stock["optimizer"]["type"] == "AdamW"
    for override, part in (
        ("zero_optimization", "must be KEY=VALUE"),
        ("zero_optimization..stage=1", "must be KEY=VALUE"),
        ("zero_optimization.stage.x=1", "stage is not a block"),
        ("zero_optimization.stag=1", "did you mean 'stage'?"),
        ("zero_optimization.stage=[", "not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=re.escape(part)):
            load_ds_config(path, [override])


@pytest.mark.parametrize("changes", OFF, ids=str)
def test_advice_about_a_setting_that_is_off_never_turns_it_on(changes):
    config = plain(**changes)
    assert config.stock == plain().stock
    (note,) = config.notes
    assert "it is ignored" in note and "write" not in note


TRAINER_FILE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "_comment": "from a tutorial",
    "//": {"fp16": "for older cards"},
}
ASSUMED = MemoryBudget("card", 2, 11264, 800, 32, {})


@pytest.mark.parametrize("bf16", [True, False])
def test_a_file_of_the_hugging_face_trainer_is_filled_in(bf16):
    config = validate_ds_config(TRAINER_FILE, "x")
    assert config.notes == () and config.needs_hidden_size
    config = config.for_run(experiment(bf16=bf16), ASSUMED, hidden_size=100)
    resolved = config.resolve(experiment(bf16=bf16), 2)
    assert config.precision == ("bf16" if bf16 else "fp32") and config.memory_budget == ASSUMED
    assert resolved["fp16"]["enabled"] is False and resolved["bf16"]["enabled"] is bf16
    assert resolved["optimizer"]["params"] == {"lr": 1e-4, "weight_decay": 0.01}
    zero = resolved["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000 and zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    assert "auto" not in json.dumps(resolved) and "comment" not in json.dumps(resolved)


def test_a_budget_of_the_file_stays():
    assert (
        plain(memory_budget=BUDGET).for_run(experiment(), ASSUMED, None).memory_budget.device == "GTX 1080 Ti"
    )


@pytest.mark.parametrize("missing", ["optimizer", "zero_optimization"])
def test_missing_blocks_are_filled_in_and_noted(missing):
    config = validate_ds_config({key: value for key, value in PLAIN.items() if key != missing}, "x")
    assert config.stock["optimizer"]["type"] == "AdamW" and config.zero_stage in (1, 2)
    assert [note.startswith(f"x: {missing}") for note in config.notes] == [True]


def test_all_problems_of_a_file_in_one_message():
    changes = {
        "gradient_accumulation_step": 4,
        "pipeline": {},
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
        "zero_optimization": {"reduce_bucket": 1},
        "memory_budget": {**BUDGET, "gpus": 0},
    }
    with pytest.raises(ConfigError) as caught:
        plain(**changes)
    assert len(str(caught.value).splitlines()) == 5


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("auto")
JSON_VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=2)
    | st.dictionaries(
        st.sampled_from(["enabled", "device", "stage", "params", "type", "components_mib", "x"]),
        SCALARS,
        max_size=3,
    )
)


@given(
    st.dictionaries(st.sampled_from(sorted(load_schema("ds_config")["properties"])), JSON_VALUES, max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_nothing_but_a_config_error_escapes(changes):
    try:
        assert isinstance(validate_ds_config(PLAIN | changes, "test"), DeepSpeedConfig)
    except ConfigError as error:
        assert str(error).startswith("test: ")


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_stock_deepspeed_accepts_the_shipped_file(path):
    from deepspeed.runtime.config import DeepSpeedConfig as StockConfig

    config = load_ds_config(path)
    stock = StockConfig(config.resolve(experiment(bf16=config.precision == "bf16"), world_size=1))
    assert stock.train_batch_size == 32 and stock.gradient_accumulation_steps == 8
    assert stock.zero_config.stage == config.zero_stage
    assert stock.float16_config.enabled == (config.precision == "fp16")
    assert stock.bfloat16_config.enabled == (config.precision == "bf16")
    assert stock.gradient_clipping == 1.0
    text = json.dumps(config.resolve(experiment(bf16=config.precision == "bf16"), 1))
    assert "auto" not in text and "memory_budget" not in text and "latent_memory" not in text


@pytest.mark.parametrize("overrides", [(), ("fp16.enabled=true",)])
def test_a_file_of_another_program_says_its_precision_and_gpu(tmp_path, capsys, overrides):
    path = tmp_path / "trainer.json"
    path.write_text('{"fp16": {"enabled": "auto"}, "optimizer": {"type": "AdamW"}}')
    read_ds_config(str(path), experiment(), overrides)
    notes = capsys.readouterr().err
    assert "memory_budget: missing; no GPU here, so using GTX 1080 Ti: 11,178 MiB" in notes
    says = 'fp16.enabled: "auto" is fp32 here; for 16 bit: --ds fp16.enabled=true' in notes
    assert says is (not overrides)
