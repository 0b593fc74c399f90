"""Command-line flags of other trainers and their spelling here: `--learning_rate 1e-4` is `--set lr=1e-4`."""

from collections.abc import Sequence
from dataclasses import fields

from coconut_ds.config.experiment import Experiment

# Besides these, every setting may be mistaken for a flag of its name.
SETTING_OF = {
    "learning_rate": "lr",
    "batch_size": "batch_size_training",
    "per_device_train_batch_size": "batch_size_training",
    "eval_batch_size": "batch_size_eval",
    "per_device_eval_batch_size": "batch_size_eval",
    "grad_accum_steps": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "lr_scheduler_type": "lr_schedule",
    "epochs": "num_epochs",
    "num_train_epochs": "num_epochs",
    "max_eval_samples": "eval_max_items",
    "save_total_limit": "keep_checkpoints",
    "model": "model_id",
    "model_name": "model_id",
    "model_name_or_path": "model_id",
    "train_file": "train_path",
    "validation_file": "val_path",
    "test_file": "test_path",
    "run_name": "name",
    "output_dir": "save_path",
    **{field.name: field.name for field in fields(Experiment)},
}


def unrecognized(rest: Sequence[str], arguments: Sequence[str]) -> str:
    """The error for the flags `rest` of a command line, with `--set` for those that name a setting."""
    written, remedies = [], []
    following = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    for word in rest:
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        if not equals and not following.get(word, "").startswith("--"):
            value = following.get(word, "")
        written.append(f"{word} {value}".strip() if not equals else word)
        setting = SETTING_OF.get(flag.removeprefix("--").replace("-", "_"))
        if setting is not None:
            remedies.append(f"--set {setting}={value or 'true'}")
    text = f"unrecognized arguments: {' '.join(written or rest)}"
    return text + (f"; write {' '.join(remedies)}" if remedies else "")
