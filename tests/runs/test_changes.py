"""Differences between saved and current settings, and which of them prevent resuming."""

from dataclasses import fields, replace
from typing import Any

import pytest

from coconut_ds.config.experiment import Experiment, validate_experiment
from coconut_ds.config.schema import affects, settings_with
from coconut_ds.errors import CheckpointError
from coconut_ds.runs.changes import (
    Severity,
    classify_changes,
    learned_ds_settings,
    refuse_changes,
    settings_to_compare,
    splits_otherwise,
)
from coconut_ds.runs.checkpoint_folders import Manifest, TrainState

SAVED: dict[str, Any] = {
    "experiment": {
        "method": "coconut", "model_id": "/here", "thought": "last_hidden", "latent_window_size": 3,
        "lora_target_modules": ("q", "v"), "lr": 1e-4, "lr_schedule": "constant", "num_epochs": 10,
        "batch_size_training": 4, "save_path": "runs",
    },
    "ds_config": {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 10, "offload_optimizer": {"device": "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
    },
    "data": {"train": "aaa", "val": "bbb", "test": "ddd", "base_model": "ccc"},
    "card": {"grading": "exact", "max_new_tokens": 64},
    "libraries": {"torch": "2.13.0", "deepspeed": "0.19.8"},
    "code": "1234",
}  # fmt: skip


def with_(path: str, value: Any) -> dict[str, Any]:
    """SAVED with the setting at dotted `path` replaced."""
    head, _, rest = path.partition(".")

    def put(tree: dict[str, Any], key: str, rest: str) -> dict[str, Any]:
        if not rest:
            return {**tree, key: value}
        return {**tree, key: put(tree[key], *rest.split(".", 1), *([] if "." in rest else [""]))}

    return put(SAVED, head, rest)


@pytest.mark.parametrize(
    "path, value, severity",
    [
        ("experiment.save_path", "/elsewhere", Severity.HARMLESS),
        ("experiment.num_epochs", 20, Severity.HARMLESS),
        ("experiment.lr", 3e-4, Severity.NEEDS_ALLOW),
        ("experiment.batch_size_training", 8, Severity.NEEDS_ALLOW),
        ("experiment.eval_max_items", 8, Severity.NEEDS_ALLOW),
        ("experiment.grading", "latex", Severity.NEEDS_ALLOW),
        ("experiment.max_new_tokens", 8, Severity.NEEDS_ALLOW),
        ("experiment.latent_window_size", 4, Severity.NEEDS_ALLOW),
        ("experiment.model_id", "/moved", Severity.HARMLESS),
        ("experiment.method", "cot", Severity.IMPOSSIBLE),
        ("experiment.thought", "mlp_projection", Severity.IMPOSSIBLE),
        ("experiment.lora_target_modules", ["q"], Severity.IMPOSSIBLE),
        ("ds_config.zero_optimization.reduce_bucket_size", 20, Severity.HARMLESS),
        ("ds_config.zero_optimization.offload_optimizer.device", "none", Severity.NEEDS_ALLOW),
        ("ds_config.zero_optimization.offload_optimizer.device", "nvme", Severity.IMPOSSIBLE),
        ("ds_config.zero_optimization.stage", 3, Severity.NEEDS_ALLOW),
        ("ds_config.zero_optimization.round_robin_gradients", True, Severity.NEEDS_ALLOW),
        ("ds_config.zero_optimization.parameter_alignment", True, Severity.NEEDS_ALLOW),
        ("ds_config.zero_optimization.sub_group_size", 5000, Severity.NEEDS_ALLOW),
        ("ds_config.optimizer.params.torch_adam", True, Severity.NEEDS_ALLOW),
        ("ds_config.optimizer.params.betas", [0.9, 0.99], Severity.NEEDS_ALLOW),
        ("ds_config.optimizer.type", "Lion", Severity.IMPOSSIBLE),
        ("ds_config.communication_data_type", "fp16", Severity.NEEDS_ALLOW),
        ("ds_config.zero_optimization.zero_quantized_gradients", True, Severity.NEEDS_ALLOW),
        ("ds_config.optimizer.params.fp32_optimizer_states", False, Severity.IMPOSSIBLE),
        ("ds_config.fp16", {"enabled": True}, Severity.IMPOSSIBLE),
        ("ds_config.bf16", {"bf16_optimizer_states": True}, Severity.IMPOSSIBLE),
        ("ds_config.bf16", {"bf16_master_weights_and_grads": True}, Severity.IMPOSSIBLE),
        ("data.train", "xxx", Severity.NEEDS_ALLOW),
        ("data.test", "xxx", Severity.NEEDS_ALLOW),
        ("card.grading", "latex", Severity.NEEDS_ALLOW),
        ("card.max_new_tokens", 1, Severity.NEEDS_ALLOW),
        ("data.base_model", "xxx", Severity.IMPOSSIBLE),
        ("libraries.torch", "2.14.0", Severity.HARMLESS),
        ("libraries.deepspeed", "0.20.0", Severity.NEEDS_ALLOW),
        ("code", "5678", Severity.HARMLESS),
    ],
)
def test_one_change(path: str, value: Any, severity: Severity) -> None:
    (change,) = classify_changes(SAVED, with_(path, value))
    assert change.severity is severity
    key = change.key.removesuffix(f".{next(iter(value))}") if isinstance(value, dict) else change.key
    assert path.endswith(key) and (isinstance(value, dict) or repr(value)[:40] in str(change))


@pytest.mark.parametrize("key", [field.name for field in fields(Experiment)])
def test_what_a_setting_affects_decides(key: str) -> None:
    """Every setting of an experiment; the four that depend on others are tested above."""
    (change,) = classify_changes(SAVED, with_(f"experiment.{key}", "another"))
    if key in (*settings_with("path_to", "data", "weights"), "num_epochs", "resume"):
        assert change.severity is Severity.HARMLESS
    else:
        expected = {"shapes": Severity.IMPOSSIBLE, "running": Severity.HARMLESS}
        assert change.severity is expected.get(affects(key), Severity.NEEDS_ALLOW)


def test_nothing_changed_also_after_a_trip_through_json() -> None:
    assert classify_changes(SAVED, SAVED) == []
    assert classify_changes(SAVED, with_("experiment.lora_target_modules", ["q", "v"])) == []


def test_what_the_yaml_owns_is_named_once() -> None:
    current = with_("ds_config.train_micro_batch_size_per_gpu", 8)
    current["experiment"] = {**SAVED["experiment"], "batch_size_training": 8}
    assert [change.key for change in classify_changes(SAVED, current)] == ["batch_size_training"]


def test_a_model_that_was_not_hashed_needs_leave() -> None:
    saved = {**SAVED, "data": {}}
    current = {**with_("experiment.model_id", "gpt2"), "data": {}}
    assert [change.severity for change in classify_changes(saved, current)] == [Severity.NEEDS_ALLOW]


def test_a_schedule_that_ends_makes_num_epochs_matter() -> None:
    saved = with_("experiment.lr_schedule", "cosine")
    current = {**saved, "experiment": {**saved["experiment"], "num_epochs": 20}}
    assert [change.severity for change in classify_changes(saved, current)] == [Severity.NEEDS_ALLOW]


def test_so_does_a_warm_up_that_is_a_share_of_all_steps() -> None:
    saved = with_("experiment.warmup_ratio", 0.5)
    current = {**saved, "experiment": {**saved["experiment"], "num_epochs": 20}}
    assert [change.severity for change in classify_changes(saved, current)] == [Severity.NEEDS_ALLOW]


def test_older_checkpoints_without_a_test_file_or_a_card_resume() -> None:
    saved = {key: value for key, value in SAVED.items() if key != "card"}
    saved["data"] = {key: value for key, value in SAVED["data"].items() if key != "test"}
    assert classify_changes(saved, SAVED) == [] == classify_changes(SAVED, saved)


def test_settings_of_the_json_that_change_what_is_learned() -> None:
    learned = {"optimizer.type": "AdamW", "optimizer.params.betas": [0.9, 0.95]}
    assert learned_ds_settings(SAVED["ds_config"]) == learned
    assert learned_ds_settings(
        {"optimizer": {"params": {"eps": "auto"}}, "communication_data_type": "fp16"}
    ) == {"communication_data_type": "fp16"}


def test_the_card_counts_where_the_experiment_says_nothing(tmp_path, tiny_experiment) -> None:
    for name in ("train", "val"):
        (tmp_path / f"own_{name}.json").write_text('[{"question": "a", "steps": [], "answer": "b"}]')
    (tmp_path / "own.card.json").write_text('{"name": "own", "grading": "latex", "max_new_tokens": 7}')
    paths = {f"{name}_path": str(tmp_path / f"own_{name}.json") for name in ("train", "val")}
    experiment = validate_experiment({**tiny_experiment, **paths}, "test")
    recorded = settings_to_compare(experiment, {})["card"]
    assert recorded == {"grading": "latex", "max_new_tokens": 7}
    own = settings_to_compare(replace(experiment, max_new_tokens=9), {})["card"]
    assert own == {"grading": "latex"}


def test_a_window_that_is_learned_cannot_change_its_width() -> None:
    saved = with_("experiment.thought", "learnable_window")
    current = {**saved, "experiment": {**saved["experiment"], "latent_window_size": 4}}
    assert [change.severity for change in classify_changes(saved, current)] == [Severity.IMPOSSIBLE]


def test_all_differences_are_listed_and_the_command_line_is_given() -> None:
    manifest = Manifest(TrainState(), SAVED, 2, False, {})
    current = with_("experiment.lr", 3e-4)
    current["data"] = {**SAVED["data"], "val": "xxx"}
    with pytest.raises(CheckpointError, match="--allow lr --allow data.val") as caught:
        refuse_changes(manifest, current, 2, [])
    assert "0.0003 now" in str(caught.value) and "validation file" in str(caught.value)
    with pytest.raises(CheckpointError, match="--allow data.val"):
        refuse_changes(manifest, current, 2, ["lr"])
    assert len(refuse_changes(manifest, current, 2, ["lr", "data.val"])) == 2


def test_one_leave_for_all_that_splits_memory() -> None:
    manifest = Manifest(TrainState(), SAVED, 2, False, {})
    zero = {"stage": 3, "sub_group_size": 5000, "reduce_bucket_size": 20}
    current = with_("ds_config.zero_optimization", zero)
    with pytest.raises(CheckpointError, match="new value: --allow ds_layout$") as caught:
        refuse_changes(manifest, current, 2, ["zero_optimization.stage"])
    assert "stage: 2 when saved, 3 now (the shards are split again; --allow ds_layout)" in str(caught.value)
    assert len(refuse_changes(manifest, current, 2, ["ds_layout"])) == 4
    assert splits_otherwise(SAVED, current)


def test_8_bit_moments_cannot_be_split_again() -> None:
    saved = with_("ds_config.optimizer.type", "AdamW8bit")
    manifest = Manifest(TrainState(), saved, 2, False, {})
    stage_1 = {**saved, "ds_config": {**saved["ds_config"], "zero_optimization": {"stage": 1}}}
    permissions = ["ds_layout", "world_size", "rows_per_step"]
    for settings, ranks in ((stage_1, 2), (saved, 1)):
        with pytest.raises(CheckpointError, match="8-bit moments cannot be split again; impossible"):
            refuse_changes(manifest, settings, ranks, permissions)
    assert refuse_changes(manifest, saved, 2, []) == []
    assert learned_ds_settings(saved["ds_config"]) != learned_ds_settings(SAVED["ds_config"])


def test_leave_for_the_layout_does_not_help_a_precision() -> None:
    manifest = Manifest(TrainState(), SAVED, 2, False, {})
    with pytest.raises(CheckpointError, match="another precision, so the run would not continue.*impossible"):
        refuse_changes(manifest, with_("ds_config.bf16", {"enabled": True}), 2, ["ds_layout"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("fp16", {"enabled": False}),
        ("zero_optimization.round_robin_gradients", False),
        ("zero_optimization.sub_group_size", 1_000_000_000),
        ("zero_optimization.offload_optimizer.pin_memory", True),
    ],
)
def test_a_default_that_is_written_is_no_change(key: str, value: Any) -> None:
    current = with_(f"ds_config.{key}", value)
    assert classify_changes(SAVED, current) == [] == classify_changes(current, SAVED)
    assert not splits_otherwise(SAVED, current)


def test_another_optimizer_kernel_needs_no_conversion() -> None:
    assert not splits_otherwise(SAVED, with_("ds_config.zero_optimization.offload_optimizer.device", "none"))


def test_leave_does_not_help_what_is_impossible() -> None:
    manifest = Manifest(TrainState(), SAVED, 2, False, {})
    with pytest.raises(CheckpointError, match="load_model_path"):
        refuse_changes(manifest, with_("experiment.method", "cot"), 2, ["method"])
    with pytest.raises(CheckpointError, match="world_size: 2 when saved, 1 now"):
        refuse_changes(manifest, SAVED, 1, [])


def with_accumulation(number: int) -> dict[str, Any]:
    return {**SAVED, "experiment": {**SAVED["experiment"], "gradient_accumulation_steps": number}}


def test_other_ranks_with_the_same_rows_a_step_need_one_leave() -> None:
    manifest = Manifest(TrainState(), with_accumulation(2), 2, False, {})
    with pytest.raises(CheckpointError, match="new value: --allow world_size$"):
        refuse_changes(manifest, with_accumulation(4), 1, [])
    lines = refuse_changes(manifest, with_accumulation(4), 1, ["world_size"])
    assert len(lines) == 2 and "gradient_accumulation_steps: 2 when saved, 4 now" in lines[1]


def test_other_ranks_with_other_rows_a_step_change_what_is_learned() -> None:
    manifest = Manifest(TrainState(), with_accumulation(2), 2, False, {})
    with pytest.raises(CheckpointError, match="rows_per_step: 16 when saved, 8 now .*--allow rows_per_step"):
        refuse_changes(manifest, with_accumulation(2), 1, ["world_size"])
    assert len(refuse_changes(manifest, with_accumulation(2), 1, ["world_size", "rows_per_step"])) == 2


def test_harmless_differences_take_one_line_of_a_refusal():
    current = with_("experiment.lr", 2e-4)
    current["experiment"] |= {"save_path": "/elsewhere", "num_epochs": 20}
    manifest = Manifest(TrainState(), SAVED, 2, False, {})
    with pytest.raises(CheckpointError) as error:
        refuse_changes(manifest, current, 2, [])
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  lr: 0.0001 when saved, 0.0002 now") and len(lines) == 4
    assert lines[2] == "  harmless: num_epochs, save_path"
