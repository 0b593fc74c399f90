"""What a checkpoint records of its run, and whether a run with other settings may resume from it.

settings = {"experiment": {...}, "ds_config": {...}, "data": {name: sha256}, "card": {...}, "base": {...},
            "libraries": {...}, "code": "git commit"}

"card" is what the data card says about grading, where the experiment says nothing.

"base" describes the base model: weights, configuration, tokenizer.  It is made from the loaded model, not
from its files: the model may move, and a folder, a .gguf file and a snapshot of the hub's cache compare
equal.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from coconut_ds.config.deepspeed import EIGHT_BIT
from coconut_ds.config.experiment import Experiment
from coconut_ds.config.schema import affects, default_of, settings_with
from coconut_ds.data.forms import local_file
from coconut_ds.data.problems import card_for
from coconut_ds.data.tokenizer import Vocabulary
from coconut_ds.errors import CheckpointError
from coconut_ds.files import hash_file, json_text
from coconut_ds.runs.checkpoint_folders import Manifest
from coconut_ds.runs.run_folder import code_version, library_versions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SAMPLES = 1024  # elements of each tensor whose values are hashed
CHUNK = 1 << 22  # elements summed at a time
# Configuration keys that do not affect what the model computes.
IGNORED_KEYS = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class BaseRecord:
    """`weights` is None if checkpoints hold all weights."""

    weights: str | None
    config: Mapping[str, Any]
    tokenizer: str

    @classmethod
    def of(cls, base: "PreTrainedModel", vocabulary: Vocabulary, with_weights: bool) -> Self:
        """Record a model that has its final weights and the special-token rows, but no adapters."""
        config = json.loads(base.config.to_json_string(use_diff=True))
        return cls(
            weights_digest(base, vocabulary.special_token_ids) if with_weights else None,
            {key: value for key, value in config.items() if key not in IGNORED_KEYS},
            vocabulary.digest(),
        )

    @classmethod
    def read(cls, values: Any) -> Self:
        """Read a record from JSON. Raises TypeError if it is not one."""
        record = cls(**values)
        if not (
            isinstance(record.weights, str | None)
            and isinstance(record.config, dict)
            and isinstance(record.tokenizer, str)
        ):
            raise TypeError("not the record of a base model")
        return record

    def differences(self, current: "BaseRecord") -> Iterator[tuple[str, Any, Any]]:
        """Yield (part, saved, current) for every difference.

        Configuration keys that only one of the two has come from another version and are not compared.
        """
        if self.weights and current.weights and self.weights != current.weights:
            yield "weights", self.weights, current.weights
        for key in sorted(self.config.keys() & current.config.keys()):
            if self.config[key] != current.config[key]:
                yield f"config.{key}", self.config[key], current.config[key]
        if self.tokenizer != current.tokenizer:
            yield "tokenizer", self.tokenizer, current.tokenizer


def weights_digest(base: "PreTrainedModel", special_token_ids: Sequence[int]) -> str:
    """A short hash of all tensors, without the special-token rows, which are added here and may train.

    Per tensor: name, shape, evenly spaced elements, and the sum of all elements' bits. Changing one element
    always changes that sum; the order of additions does not.
    """
    import torch  # takes a second, and `report` does not need it

    digest = hashlib.sha256()
    modules: tuple[Any, Any] = (base.get_input_embeddings(), base.get_output_embeddings())
    vocabulary = {module.weight.data_ptr() for module in modules}
    for name, value in sorted(base.state_dict().items()):
        rows = special_token_ids if value.data_ptr() in vocabulary else ()
        for part in _without_rows(value, rows):
            flat = part.detach().cpu().flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLES)].float()
            bits = sum(
                int(chunk.float().view(torch.int32).sum(dtype=torch.int64)) for chunk in flat.split(CHUNK)
            )
            digest.update(f"{name} {tuple(part.shape)} {bits}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _without_rows(value: "Tensor", rows: Sequence[int]) -> "Iterator[Tensor]":
    if not rows:
        yield value
        return
    for before, after in pairwise([-1, *sorted(rows), len(value)]):
        if before + 1 < after:
            yield value[before + 1 : after]


class Severity(IntEnum):
    HARMLESS = 0  # listed only
    NEEDS_ALLOW = 1  # changes what is learned; needs --allow KEY
    IMPOSSIBLE = 2  # the saved state does not fit


@dataclass(frozen=True)
class Change:
    key: str
    saved: Any
    current: Any
    severity: Severity
    why: str

    @property
    def option(self) -> str:
        """What --allow accepts it by."""
        return LAYOUT if self.why in (SHARDS, KERNEL) else self.key

    def __str__(self) -> str:
        remedy = ("", f"; --allow {self.option}", "; impossible")[self.severity]
        values = f"{self.key}: {_short(self.saved)} when saved, {_short(self.current)} now"
        return values + (f" ({self.why}{remedy})" if self.why else "")


HARMLESS = (Severity.HARMLESS, "")
LAYOUT = "ds_layout"  # --allow: all settings with one of the next two reasons
SHARDS = "the shards are split again"
KERNEL = "another optimizer kernel: results differ in the last digits"
SHAPES = "the saved tensors have other shapes or names"
PRECISION = "the saved tensors have another precision, so the run would not continue from the same numbers"
LEARNS = "changes what is learned"
OTHER_OPTIMIZER = "the saved moments belong to another optimizer"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
METHOD = "another method needs a new run: set a new 'name', and this checkpoint as 'load_model_path'"
MEASURES = "accuracies before and after do not compare"  # and `best` compares accuracies of one run
# What an experiment's setting affects (schemas/), and whether a run may resume with another value.
SEVERITIES = {
    "shapes": (Severity.IMPOSSIBLE, SHAPES),
    "learning": (Severity.NEEDS_ALLOW, LEARNS),
    "accuracy": (Severity.NEEDS_ALLOW, MEASURES),
    "running": HARMLESS,
}
# Their product with the number of ranks is the rows of a step; they may change together with that number.
ROWS_EXPERIMENT = ("batch_size_training", "gradient_accumulation_steps")
# Also in the DeepSpeed JSON, but compared as YAML settings.
OWNED_BY_YAML = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer.params.lr", "optimizer.params.weight_decay", "scheduler",
}  # fmt: skip
# Settings of the DeepSpeed JSON; all others only change where memory is used.
DS_RULES = {
    "zero_optimization.stage": (Severity.NEEDS_ALLOW, SHARDS),
    "zero_optimization.round_robin_gradients": (Severity.NEEDS_ALLOW, SHARDS),
    "zero_optimization.parameter_alignment": (Severity.NEEDS_ALLOW, SHARDS),
    "zero_optimization.sub_group_size": (Severity.NEEDS_ALLOW, SHARDS),
    "zero_optimization.offload_optimizer.device": (Severity.NEEDS_ALLOW, KERNEL),
    "optimizer.params.torch_adam": (Severity.NEEDS_ALLOW, KERNEL),
    "fp16.enabled": (Severity.IMPOSSIBLE, PRECISION),
    "bf16.enabled": (Severity.IMPOSSIBLE, PRECISION),
    "optimizer.type": (Severity.IMPOSSIBLE, OTHER_OPTIMIZER),
    "optimizer": (Severity.NEEDS_ALLOW, LEARNS),
    "fp16.fp16_master_weights_and_grads": (Severity.IMPOSSIBLE, PRECISION),
    "bf16.bf16_master_weights_and_grads": (Severity.IMPOSSIBLE, PRECISION),
    "bf16.bf16_optimizer_states": (Severity.IMPOSSIBLE, PRECISION),
    "optimizer.params.fp32_optimizer_states": (Severity.IMPOSSIBLE, PRECISION),
    "bf16": (Severity.NEEDS_ALLOW, LEARNS),
    "fp16": (Severity.NEEDS_ALLOW, "the saved loss scale is used"),
    "torch_autocast": (Severity.NEEDS_ALLOW, LEARNS),
    "data_types": (Severity.NEEDS_ALLOW, LEARNS),
    "communication_data_type": (Severity.NEEDS_ALLOW, LEARNS),
    "prescale_gradients": (Severity.NEEDS_ALLOW, LEARNS),
    "gradient_predivide_factor": (Severity.NEEDS_ALLOW, LEARNS),
    "zero_optimization.zero_quantized_weights": (Severity.NEEDS_ALLOW, LEARNS),
    "zero_optimization.zero_quantized_nontrainable_weights": (Severity.NEEDS_ALLOW, LEARNS),
    "zero_optimization.zero_quantized_gradients": (Severity.NEEDS_ALLOW, LEARNS),
}


def settings_to_compare(
    experiment: Experiment, ds_config: Mapping[str, Any], base: BaseRecord | None = None
) -> dict[str, Any]:
    """The settings that a checkpoint records; reads the data files once, for their sha256."""
    return {
        "experiment": asdict(experiment),
        "ds_config": dict(ds_config),
        "data": data_hashes(experiment),
        "card": _card_settings(experiment),
        "base": asdict(base) if base else {},
        "libraries": library_versions(),
        "code": code_version(),
    }


def data_hashes(experiment: Experiment) -> dict[str, str]:
    """sha256 of each data file of a run that exists."""
    paths = {"train": experiment.train_path, "val": experiment.val_path, "test": experiment.test_path}
    files = {name: local_file(path) for name, path in paths.items() if path}
    return {name: hash_file(file) for name, file in files.items() if file.is_file()}


def _card_settings(experiment: Experiment) -> dict[str, Any]:
    card = card_for(experiment.val_path)
    settings = {"grading": card.grading, "max_new_tokens": card.max_new_tokens}
    return {key: value for key, value in settings.items() if getattr(experiment, key) is None}


def learned_ds_settings(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a DeepSpeed JSON that change what is learned: optimizer, arithmetic, communication."""
    return {
        key: value
        for key, value in _flatten(ds_config)
        if value != "auto" and (rule := _ds_rule(key)) is not None and rule[1] in (LEARNS, OTHER_OPTIMIZER)
    }


def _with_older_base(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Mapping[str, Any]:
    """`current` with what older checkpoints have instead of "base": one sha256 of a model folder's files.

    It includes weights only if the checkpoint does not hold them (LoRA).
    """
    if saved.get("base") or "base_model" not in saved.get("data", {}):
        return current
    folder = Path(current["experiment"]["model_id"])
    if not folder.is_dir():
        return current
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if current["experiment"].get("tuning") != "lora":
        files = [path for path in files if path.suffix not in WEIGHT_SUFFIXES]
    listed = "".join(f"{path.name} {hash_file(path)}\n" for path in files)
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return {**current, "data": {**current["data"], "base_model": digest}}


def classify_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """Every difference, the most severe first."""
    changes = [
        *_experiment_changes(saved, current),
        *_ds_changes(saved.get("ds_config", {}), current.get("ds_config", {})),
        *_data_changes(saved.get("data", {}), current.get("data", {})),
        *_card_changes(saved.get("card", {}), current.get("card", {})),
        *_base_changes(saved.get("base"), current.get("base")),
    ]
    for key, old, new in _differences(saved.get("libraries", {}), current.get("libraries", {})):
        rule = (Severity.NEEDS_ALLOW, "its checkpoint format may differ") if key == "deepspeed" else HARMLESS
        changes.append(Change(key, old, new, *rule))
    if saved.get("code") != current.get("code"):
        changes.append(Change("code", saved.get("code"), current.get("code"), *HARMLESS))
    return sorted(changes, key=lambda change: -change.severity)


def refuse_changes(
    manifest: Manifest, current: Mapping[str, Any], world_size: int, allow: Collection[str]
) -> list[str]:
    """Return one line per accepted difference; raise CheckpointError with all of them if one is refused."""
    current = _with_older_base(manifest.settings, current)
    changes = classify_changes(manifest.settings, current)
    if manifest.world_size != world_size:
        changes = _with_other_ranks(changes, manifest, current, world_size)
    if current.get("ds_config", {}).get("optimizer", {}).get("type") == EIGHT_BIT:
        # Their scales belong to 256 neighbors in a shard, and DeepSpeed's converter knows only fp32 moments.
        why = "8-bit moments cannot be split again"
        changes = [
            replace(change, severity=Severity.IMPOSSIBLE, why=why)
            if change.key == "world_size" or change.why == SHARDS
            else change
            for change in changes
        ]
    refused = [
        change
        for change in changes
        if change.severity is Severity.IMPOSSIBLE
        or (change.severity is Severity.NEEDS_ALLOW and change.option not in allow)
    ]
    if refused:
        needed = dict.fromkeys(change.option for change in refused if change.severity is Severity.NEEDS_ALLOW)
        options = " ".join(f"--allow {option}" for option in needed)
        impossible = any(change.severity is Severity.IMPOSSIBLE for change in refused)
        advice = (
            "set it back, or start a new run: set a new 'name', and this checkpoint as 'load_model_path'"
            if impossible
            else f"set it back, or resume with the new value: {options}"
        )
        lines = "".join(f"\n  {change}" for change in changes if change.severity is not Severity.HARMLESS)
        harmless = [change.key for change in changes if change.severity is Severity.HARMLESS]
        lines += f"\n  harmless: {', '.join(harmless)}" if harmless else ""
        raise CheckpointError(f"the checkpoint was made with other settings:{lines}\n{advice}")
    notes = [f"differs from the checkpoint: {change}" for change in changes]
    if current.get("base") and not manifest.settings.get("base"):
        notes.append(
            "the checkpoint is from an older version and does not describe its base model: the content of "
            "'load_model_path' and of a hub model cannot be compared"
        )
    return notes


def _with_other_ranks(
    changes: list[Change], manifest: Manifest, current: Mapping[str, Any], world_size: int
) -> list[Change]:
    """Add the changes for another number of ranks; of rows and micro-batches, only the product counts."""
    why = "the shards are split again; results differ in the last digits"
    added = [Change("world_size", manifest.world_size, world_size, Severity.NEEDS_ALLOW, why)]
    old = _rows_per_step(manifest.settings, manifest.world_size)
    new = _rows_per_step(current, world_size)
    if old != new:
        why = f"changes what is learned; to avoid that, keep {' x '.join(ROWS_EXPERIMENT)} x ranks"
        added.append(Change("rows_per_step", old, new, Severity.NEEDS_ALLOW, why))
    return added + [
        replace(change, severity=Severity.HARMLESS, why="") if change.key in ROWS_EXPERIMENT else change
        for change in changes
    ]


def _rows_per_step(settings: Mapping[str, Any], world_size: int) -> int:
    return math.prod((settings["experiment"].get(key, 1) for key in ROWS_EXPERIMENT), start=world_size)


def _experiment_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Change]:
    hashes = [
        settings.get("base") or settings.get("data", {}).get("base_model") for settings in (saved, current)
    ]
    experiment = current.get("experiment", {})
    for key, old, new in _differences(saved.get("experiment", {}), experiment):
        severity, why = SEVERITIES[affects(key)]
        if key == "method":
            why = METHOD
        elif key == "model_id" and not all(hashes):
            severity, why = SEVERITIES["learning"]
        elif key == "latent_window_size" and str(experiment.get("thought", "")).startswith("learnable"):
            severity, why = SEVERITIES["shapes"]
        elif (
            key in settings_with("path_to", "data", "weights")  # the content is compared
            or key == "resume"  # a checkpoint has its epoch
            or (key == "num_epochs" and not rate_depends_on_length(experiment))
        ):
            severity, why = HARMLESS
        yield Change(key, old, new, severity, why)


def rate_depends_on_length(experiment: Mapping[str, Any]) -> bool:
    """Whether another `num_epochs` changes the learning rate of the steps before: decay and warm-up do."""
    return experiment.get("lr_schedule") != "constant" or bool(experiment.get("warmup_ratio"))


def splits_otherwise(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether shards of a run with `saved` settings must be converted to load with `current` ones."""
    changes = _ds_changes(saved.get("ds_config", {}), current.get("ds_config", {}))
    return any(change.why == SHARDS for change in changes)


def _ds_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Change]:
    """The differences; a missing key has DeepSpeed's default."""
    settings = [dict(_flatten(values)) for values in (saved, current)]
    defaults = {key: default_of("ds_config", key) for key in (*settings[0], *settings[1])}
    for key, old, new in _differences(*(defaults | values for values in settings)):
        if (rule := _ds_rule(key)) is None:
            continue
        if key == "zero_optimization.offload_optimizer.device" and "nvme" in (old, new):
            rule = (Severity.IMPOSSIBLE, "the moments on an NVMe drive have a form of their own")
        yield Change(key, old, new, *rule)


def _ds_rule(key: str) -> tuple[Severity, str] | None:
    """The rule of a dotted key, from its longest block that has one; None for keys that the YAML owns."""
    parts = key.split(".")
    blocks = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    if not OWNED_BY_YAML.isdisjoint(blocks):
        return None
    return next((DS_RULES[block] for block in blocks if block in DS_RULES), HARMLESS)


def _data_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Change]:
    whys = {
        "train": (Severity.NEEDS_ALLOW, "the training file's content changed, and with it the order"),
        "val": (Severity.NEEDS_ALLOW, "the validation file's content changed: accuracies do not compare"),
        "test": (Severity.NEEDS_ALLOW, "the test file's content changed: accuracies do not compare"),
        "base_model": (Severity.IMPOSSIBLE, "the base model's files changed"),
    }
    if "test" not in saved or "test" not in current:  # older checkpoints have none; a test may come later
        saved, current = ({k: v for k, v in hashes.items() if k != "test"} for hashes in (saved, current))
    for key, old, new in _differences(saved, current):
        severity, why = whys.get(key, (Severity.NEEDS_ALLOW, "its content changed"))
        yield Change(f"data.{key}", old, new, severity, why)


def _card_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Change]:
    """Changes of the data card, where neither the saved nor the current experiment overrides it."""
    for key in sorted(saved.keys() & current.keys()):
        if saved[key] != current[key]:
            yield Change(f"card.{key}", saved[key], current[key], Severity.NEEDS_ALLOW, MEASURES)


def _base_changes(saved: Any, current: Any) -> Iterator[Change]:
    if not saved or not current:
        return
    whys = {
        "weights": "the frozen weights ('load_model_path' or 'model_id') are not those it was trained with",
        "tokenizer": "text gets other token ids than in training",
    }
    try:
        record = BaseRecord.read(saved)
    except TypeError as error:
        raise CheckpointError(f"the manifest does not describe a base model ({error})") from error
    for part, old, new in record.differences(BaseRecord.read(current)):
        why = whys.get(part, "the model's computation changed")
        yield Change(f"base.{part}", old, new, Severity.IMPOSSIBLE, why)


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*saved, *current}):
        old, new = _plain(saved.get(key)), _plain(current.get(key))
        if old != new:
            yield key, old, new


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json_text(value, default=str))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
