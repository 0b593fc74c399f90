"""The DeepSpeed config (JSON): how memory is split, and the memory budget of each component.

Stock DeepSpeed ignores unknown top-level keys, drops "auto" silently inside zero_optimization and
raises on some pairs of settings only when the model is wrapped.  This module refuses all three before
anything is loaded.  Learning rate, batch sizes etc. are "auto" in the file and come from the experiment.
Files for the Hugging Face Trainer, older versions of DeepSpeed and of this program are converted, with a note
for every change; what cannot be converted is left for the schema to refuse.
"""

import argparse
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coconut_ds.config.experiment import Experiment
from coconut_ds.config.schema import load_schema, parse_yaml_value, read_json, violations
from coconut_ds.errors import ConfigError
from coconut_ds.files import home_expanded, json_text

# The spellings of DeepSpeed's guide and of the Hugging Face Trainer.
DS_CONFIG_FLAGS = ("--deepspeed_config", "--deepspeed-config", "--deepspeed")
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
OUR_BLOCKS = ("memory_budget", "latent_memory", "$schema")
AUTO_SIZES: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden_size: hidden_size**2,
    "stage3_prefetch_bucket_size": lambda hidden_size: int(0.9 * hidden_size**2),
    "stage3_param_persistence_threshold": lambda hidden_size: 10 * hidden_size,
}
COMMENT = ("_", "//", "#")
EIGHT_BIT = "AdamW8bit"
# Spellings of the Hugging Face Trainer and of bitsandbytes.
EIGHT_BIT_NAMES = ("adamw8bit", "adamw_8bit", "adamw_bnb_8bit")
# Old and internal spellings of keys, and the block that each is in.
RENAMED = {
    "": {"bfloat16": "bf16"},
    "zero_optimization": {
        "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
        "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
        **{
            name: f"stage3_{name}"
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "module_granularity_threshold",
                "use_all_reduce_for_fetch_params",
                "allgather_sequential",
            )
        },
    },
}
OLD_OFFLOAD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
MIN_GPU_MIB = 200  # a smaller number is meant in GiB
DEFAULT_FILE = Path("ds_configs/zero2_offload.json")
SHIPPED = Path(__file__).parent.parent / "shipped"
# Refused keys whose `false` has an effect: it turns off a default.
FALSE_COUNTS = ("cpu_offload_use_pin_memory",)


@dataclass(frozen=True)
class MemoryBudget:
    """Memory of one GPU and the share of each component: MiB per GPU, host memory in GiB."""

    device: str
    gpus: int
    gpu_memory_mib: int
    reserved_mib: int
    host_memory_gib: float
    components_mib: Mapping[str, float]
    on_exceed: str = "error"  # "error" | "warn"


@dataclass(frozen=True)
class LatentMemory:
    """Memory options of the latent loop; none of them changes a loss."""

    supervised_logits_only: bool = True
    loss_chunk_tokens: int = 1024
    segmented_cache: bool = True
    deferred_weight_gradients: bool = True
    activation_checkpointing: str = "none"  # "none" | "layers"
    fused_activations: bool = True
    recorded_passes: bool = True


@dataclass(frozen=True)
class DeepSpeedConfig:
    """One validated JSON.  `stock` is the part for DeepSpeed, with every "auto" still in it."""

    path: str
    stock: Mapping[str, Any]
    memory_budget: MemoryBudget | None
    latent_memory: LatentMemory
    notes: tuple[str, ...] = ()  # settings of the file that were changed or ignored

    @property
    def zero_stage(self) -> int:
        return int(self.stock["zero_optimization"]["stage"])

    @property
    def eight_bit_moments(self) -> bool:
        return bool(self.stock["optimizer"]["type"] == EIGHT_BIT)

    @property
    def offload_optimizer(self) -> bool:
        return _offloads(self.stock, "offload_optimizer")

    @property
    def offload_param(self) -> bool:
        return _offloads(self.stock, "offload_param")

    @property
    def nvme_blocks(self) -> list[str]:
        """The blocks of zero_optimization that offload to an NVMe drive."""
        zero, blocks = self.stock["zero_optimization"], ("offload_optimizer", "offload_param")
        return [block for block in blocks if zero.get(block, {}).get("device") == "nvme"]

    @property
    def precision(self) -> str:
        """ "fp32", "fp16" or "bf16"."""
        return next((kind for kind in ("fp16", "bf16") if _enabled(self.stock, kind)), "fp32")

    @property
    def needs_hidden_size(self) -> bool:
        """Whether a bucket of the file is "auto"."""
        return any(self.stock["zero_optimization"].get(key) == "auto" for key in AUTO_SIZES)

    def for_run(
        self, experiment: Experiment, budget: MemoryBudget, hidden_size: int | None
    ) -> "DeepSpeedConfig":
        """A copy with "auto" precision and bucket sizes filled in, and `budget` if the file has none.

        Source of the sizes: transformers/integrations/deepspeed.py, `trainer_config_finalize`.
        """
        stock = copy.deepcopy(dict(self.stock))
        for kind, enabled in (("fp16", False), ("bf16", experiment.bf16)):
            if stock.get(kind, {}).get("enabled") == "auto":
                stock[kind]["enabled"] = enabled
        zero = stock["zero_optimization"]
        for key, size in AUTO_SIZES.items():
            if zero.get(key) == "auto":
                assert hidden_size is not None, "needs_hidden_size"
                zero[key] = size(hidden_size)
        return replace(self, stock=stock, memory_budget=self.memory_budget or budget)

    def resolve(self, experiment: Experiment, world_size: int) -> dict[str, Any]:
        """The dict for `deepspeed.initialize(config=...)`, with every "auto" filled in from the experiment.

        ConfigError: a number differs from the experiment's, or only the experiment says bf16.
        """
        assert world_size >= 1
        resolved = copy.deepcopy(dict(self.stock))
        params = resolved["optimizer"].setdefault("params", {})
        micro, steps = experiment.batch_size_training, experiment.gradient_accumulation_steps
        rows = micro * steps * world_size
        total = f"batch_size_training {micro} x gradient_accumulation_steps {steps} x {world_size} ranks"
        batch = [
            *_fill(resolved, "train_batch_size", rows, total),
            *_fill(resolved, "train_micro_batch_size_per_gpu", micro, "batch_size_training"),
            *_fill(resolved, "gradient_accumulation_steps", steps, "gradient_accumulation_steps"),
        ]
        if batch:
            batch.append(_batch_remedy(self.stock, resolved, world_size))
        errors = [
            *batch,
            *_fill(resolved, "gradient_clipping", experiment.gradient_clipping, "gradient_clipping"),
            *_fill(params, "lr", experiment.lr, "lr", "optimizer.params."),
            *_fill(params, "weight_decay", experiment.weight_decay, "weight_decay", "optimizer.params."),
        ]
        if experiment.bf16 and self.precision != "bf16":
            errors.append(
                f"bf16: the experiment says 'bf16: true', but this file trains in {self.precision}; "
                "use ds_configs/zero2_offload_bf16.json, or set bf16 to false in the YAML"
            )
        if experiment.gradient_clipping and not resolved["zero_optimization"].get("compute_grad_norm", True):
            errors.append(
                "zero_optimization.compute_grad_norm: is false, but the experiment's gradient_clipping "
                f"{experiment.gradient_clipping} needs the norm; delete it"
            )
        if experiment.quantization != "none" and experiment.tuning == "lora" and self.zero_stage == 3:
            errors.append(
                "zero_optimization.stage: is 3, which does not partition the quantized weights of "
                f"'quantization: {experiment.quantization}'; use "
                "ds_configs/zero2_qlora_fp16.json (RTX 20xx), zero2_qlora_bf16.json (Ampere and newer), or "
                "zero2_offload.json (fp32)"
            )
        secondary = resolved["zero_optimization"].get("zero_hpz_partition_size", 1)
        if secondary > 1 and world_size % min(secondary, world_size):
            errors.append(
                f"zero_optimization.zero_hpz_partition_size: {world_size} ranks do not divide into groups of "
                f"{secondary}; write the number of GPUs in one machine"
            )
        if errors:
            raise ConfigError("\n".join(f"{self.path}: {error}" for error in errors))
        return resolved

    def resolved_file(self, experiment: Experiment, world_size: int) -> dict[str, Any]:
        """The resolved settings with our two blocks, as a file of this format."""
        blocks: dict[str, Any] = {"latent_memory": asdict(self.latent_memory)}
        if self.memory_budget is not None:
            blocks["memory_budget"] = asdict(self.memory_budget)
        return {**self.resolve(experiment, world_size), **blocks}


def load_ds_config(path: str | Path, overrides: Sequence[str] = ()) -> DeepSpeedConfig:
    """Read and validate one JSON; `overrides`: the KEY=VALUE of --ds.

    ConfigError with all errors of the file in one message.
    """
    values = read_json(path)
    for override in overrides:
        _override(values, override)
    return validate_ds_config(values, str(path))


def _override(values: dict[str, Any], override: str) -> None:
    """Set one value of a file in place: zero_optimization.stage=3.  An empty value deletes the key."""
    key, equals, text = override.partition("=")
    *blocks, name = key.split(".")
    if not equals or not all((*blocks, name)):
        raise ConfigError(
            f"--ds {override}: must be KEY=VALUE, with dots for nesting: --ds zero_optimization.stage=2"
        )
    block = values
    for inside in blocks:
        block = block.setdefault(inside, {})
        if not isinstance(block, dict):
            raise ConfigError(f"--ds {override}: {inside} is not a block, so it has no key {name}")
    if text:
        block[name] = parse_yaml_value(text, f"--ds {key}")
    else:
        block.pop(name, None)


def validate_ds_config(values: Mapping[str, Any], where: str) -> DeepSpeedConfig:
    """Validate `values`; `where` names their source in messages."""
    values, notes = _converted(values)
    errors = violations(values, load_schema("ds_config"), "a setting of DeepSpeed 0.19.8")
    invalid = {error.split(":", 1)[0].split(".", 1)[0] for error in errors}
    errors += _contradictions({key: value for key, value in values.items() if key not in invalid})
    if errors:
        raise ConfigError("\n".join(f"{where}: {error}" for error in errors))
    budget = values.get("memory_budget")
    return DeepSpeedConfig(
        path=where,
        stock=copy.deepcopy({key: value for key, value in values.items() if key not in OUR_BLOCKS}),
        memory_budget=None if budget is None else MemoryBudget(**budget),
        latent_memory=LatentMemory(**values.get("latent_memory", {})),
        notes=tuple(f"{where}: {note}" for note in notes),
    )


def _offloads(stock: Mapping[str, Any], block: str) -> bool:
    return stock["zero_optimization"].get(block, {}).get("device", "none") != "none"


def _enabled(stock: Mapping[str, Any], precision: str) -> bool:
    return stock.get(precision, {}).get("enabled", False) is True


def _fill(block: dict[str, Any], key: str, number: float, source: str, inside: str = "") -> Iterator[str]:
    """Fill in the experiment's number if the value is "auto" or missing; yield an error if it differs."""
    given = block.get(key, "auto")
    if given == "auto":
        block[key] = number
    elif given != number:
        yaml_line = f", or '{source}: {given}' in the YAML" if " " not in source else ""
        yield (
            f"{inside}{key}: is {given}, but the experiment sets {number} ({source}); "
            f'write "auto" here to use the YAML value{yaml_line}'
        )


def _batch_remedy(stock: Mapping[str, Any], filled: Mapping[str, Any], world_size: int) -> str:
    """The options for the experiment's batch numbers, and those for the file's where they agree."""
    text = "for the YAML's batch numbers: " + " ".join(f"--ds {key}=auto" for key in BATCH_KEYS)
    total, micro, steps = (filled[key] for key in BATCH_KEYS)
    if stock.get("gradient_accumulation_steps", "auto") == "auto":
        steps = total // (micro * world_size)
    if stock.get("train_batch_size", "auto") not in ("auto", micro * steps * world_size) or steps < 1:
        return text
    settings = f"--set batch_size_training={micro} --set gradient_accumulation_steps={steps}"
    return f"{text}; for this file's: {settings}"


def _contradictions(valid: Mapping[str, Any]) -> Iterator[str]:
    """Errors that involve several keys; `valid` holds the blocks that the schema accepts."""
    fp16, bf16 = valid.get("fp16", {}), valid.get("bf16", {})
    precision = next((kind for kind in ("fp16", "bf16") if _enabled(valid, kind)), "fp32")
    if fp16.get("enabled") is True and bf16.get("enabled") is True:
        yield "fp16, bf16: both are enabled; keep one (fp16 for RTX 20xx, bf16 for Ampere and newer)"
    stated = valid.get("data_types", {}).get("param_dtype", precision)
    if stated != precision:
        yield f"data_types.param_dtype: is {stated}, but the file trains in {precision}; delete it"
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states: needs bf16_master_weights_and_grads: true as well"
    if valid.get("tensorboard", {}).get("enabled") and find_spec("tensorboard") is None:
        yield "tensorboard.enabled: the tensorboard package is not installed; pip install it, or write false"
    params = valid.get("optimizer", {}).get("params", {})
    if params.get("torch_adam") and "bias_correction" in params:
        yield "optimizer.params.bias_correction: torch's AdamW always corrects the bias; delete it"
    if valid.get("optimizer", {}).get("type") == EIGHT_BIT:
        yield from _eight_bit_contradictions(valid, params)
    elif "zero_optimization" in valid:
        yield from _offload_contradictions(valid, params)
    if "zero_optimization" in valid:
        yield from _zero_contradictions(valid)
    if "memory_budget" in valid:
        yield from _budget_contradictions(valid["memory_budget"])


def _eight_bit_contradictions(valid: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[str]:
    for key in ("bias_correction", "fp32_optimizer_states"):
        if key in params:
            yield f"optimizer.params.{key}: is not an argument of {EIGHT_BIT}; delete it"
    for kind in ("fp16", "bf16"):
        if valid.get(kind, {}).get(key := f"{kind}_master_weights_and_grads"):
            yield f"{kind}.{key}: needs DeepSpeed's CPU Adam, not {EIGHT_BIT}; delete it"
    zero = valid.get("zero_optimization", {})
    if zero and _offloads(valid, "offload_optimizer"):
        yield (
            f"optimizer.type: {EIGHT_BIT} keeps its moments on the GPU, but zero_optimization."
            'offload_optimizer moves them to the host; delete offload_optimizer, or write "type": "AdamW"'
        )
    if zero.get("stage") == 3:
        yield f'optimizer.type: {EIGHT_BIT} needs ZeRO 1 or 2; write "stage": 2, or "type": "AdamW"'


def _offload_contradictions(valid: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[str]:
    offloads = _offloads(valid, "offload_optimizer")
    if offloads and not params.get("torch_adam", False):
        return  # DeepSpeed's CPU Adam
    for key in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"):
        block, name = key.split(".")
        if valid.get(block, {}).get(name):
            yield (
                f"{key}: needs DeepSpeed's CPU Adam; "
                "add offload_optimizer with device cpu, and delete torch_adam"
            )
    if "fp32_optimizer_states" in params:
        yield (
            "optimizer.params.fp32_optimizer_states: has no effect without DeepSpeed's CPU Adam "
            "(offload_optimizer, no torch_adam); delete it"
        )


def _zero_contradictions(valid: Mapping[str, Any]) -> Iterator[str]:
    """Pairs that DeepSpeed refuses only when it wraps the model (runtime/engine.py, runtime/zero/)."""
    zero = valid["zero_optimization"]
    if zero["stage"] >= 2 and zero.get("reduce_scatter", True):
        for key, plain in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if valid.get(key, plain) != plain:
                yield (
                    f"{key}: cannot be combined with reduce_scatter at stage {zero['stage']}; delete it, or "
                    'write "reduce_scatter": false in zero_optimization'
                )
    if zero.get("compute_grad_norm") is False:
        dtype = valid.get("data_types", {}).get("grad_accum_dtype")
        if _offloads(valid, "offload_optimizer"):
            yield "zero_optimization.compute_grad_norm: cannot be false with offload_optimizer; delete it"
        elif zero["stage"] == 1 and _enabled(valid, "bf16") and dtype in (None, "fp32"):
            yield "zero_optimization.compute_grad_norm: false needs stage 2 in bf16; delete it"


def _budget_contradictions(budget: Mapping[str, Any]) -> Iterator[str]:
    memory, reserved = budget["gpu_memory_mib"], budget["reserved_mib"]
    total = sum(budget["components_mib"].values())
    if memory < MIN_GPU_MIB:
        yield f"memory_budget.gpu_memory_mib: is {memory:g} MiB; for {memory:g} GiB write {memory * 1024:g}"
    elif reserved >= memory:
        yield f"memory_budget.reserved_mib: {reserved:g} leaves no gpu_memory_mib ({memory:g}); lower it"
    elif total > memory - reserved:
        yield (
            f"memory_budget.components_mib: the components sum to {total:g} MiB, but "
            f"gpu_memory_mib {memory:g} - reserved_mib {reserved:g} is {memory - reserved:g}; "
            f"lower them by {total - memory + reserved:g} MiB"
        )


def _converted(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file for another program or version as the schema has them, and notes."""
    result, schema = _cleaned(values), load_schema("ds_config")
    notes = [*_convert(result), *_drop_without_effect(result, schema, schema["$defs"], "")]
    return result, notes


def _cleaned(value: Any) -> Any:
    """Without comment keys, without null, which is DeepSpeed's "not set", and with `~` expanded."""
    if isinstance(value, str):
        return home_expanded(value)
    if not isinstance(value, Mapping):
        return value
    return {k: _cleaned(v) for k, v in value.items() if not str(k).startswith(COMMENT) and v is not None}


def _convert(values: dict[str, Any]) -> Iterator[str]:
    if "optimizer" not in values:
        yield "optimizer: is missing; AdamW with the YAML's lr and weight_decay is used"
    optimizer = values.setdefault("optimizer", {"type": "AdamW", "params": {}})
    kind = str(optimizer.get("type")).lower() if isinstance(optimizer, dict) else ""
    if kind in ("adam", "adamw"):
        optimizer["type"] = "AdamW"
        if kind == "adam":
            yield 'optimizer.type: is "Adam", which DeepSpeed runs as AdamW'
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if kind in EIGHT_BIT_NAMES:
        optimizer["type"] = EIGHT_BIT
        if isinstance(params, dict) and "torch_adam" in params:
            del params["torch_adam"]
            yield f"optimizer.params.torch_adam: has no effect on {EIGHT_BIT}; it is ignored"
    for key in ("betas", "eps"):
        if isinstance(params, dict) and params.get(key) == "auto":
            del params[key]  # the defaults of AdamW, as in the Trainer
    zero = values.setdefault("zero_optimization", {})
    # Stage 1 instead of 0 is the same on one GPU, and needs less memory on several.
    if isinstance(zero, dict) and zero.get("stage", 0) == 0 and zero.get("stage") is not False:
        why = "is 0" if "stage" in zero else "is missing"
        zero["stage"] = 1
        yield f"zero_optimization.stage: {why}; stage 1 is used, which shards the optimizer states"
    if isinstance(zero, dict):
        yield from _convert_offload(zero)
        if zero.get("stage") == 1 and zero.get("overlap_comm"):
            del zero["overlap_comm"]
            yield "zero_optimization.overlap_comm: is not possible at stage 1; it is ignored"
    for block, names in RENAMED.items():
        inside = values.get(block, {}) if block else values
        for old, new in names.items():
            if isinstance(inside, dict) and not _is_off(inside.get(old)) and new not in inside:
                inside[new] = inside.pop(old)
                yield f"{block}{'.' if block else ''}{old}: is now called {new}"
    latent = values.get("latent_memory")
    if isinstance(latent, dict) and "recompute" in latent and "activation_checkpointing" not in latent:
        latent["activation_checkpointing"] = latent.pop("recompute")
        yield "latent_memory.recompute: is now called activation_checkpointing"


def _convert_offload(zero: dict[str, Any]) -> Iterator[str]:
    """The offload blocks in today's spelling, and without what has no effect at the file's stage."""
    pins = zero.get("cpu_offload_use_pin_memory")
    for old, new in OLD_OFFLOAD.items():
        if zero.get(old) is True and new not in zero:
            del zero[old]
            zero[new] = {"device": "cpu"} | ({"pin_memory": pins} if isinstance(pins, bool) else {})
            zero.pop("cpu_offload_use_pin_memory", None)
            yield f'zero_optimization.{old}: is now written "{new}": {json_text(zero[new])}'
    block = zero.get("offload_param")
    if zero.get("stage") in (1, 2) and isinstance(block, dict):
        del zero["offload_param"]
        if block.get("device", "none") != "none":
            yield "zero_optimization.offload_param: has no effect below stage 3; it is ignored"


def _drop_without_effect(
    values: dict[str, Any], schema: Mapping[str, Any], definitions: Mapping[str, Any], inside: str
) -> Iterator[str]:
    """Remove keys that have no effect here, and refused keys that are switched off."""
    rules = _rules(values, schema)
    for key in [key for key in values if key in rules]:
        rule, value = rules[key], values[key]
        if "inert" in rule:
            del values[key]
            yield f"{inside}{key}: {rule['inert']}; it is ignored"
        elif rule.get("not") == {} and _is_off(value) and key not in FALSE_COUNTS:
            del values[key]
            yield f"{inside}{key}: is off, and is not a setting here; it is ignored, delete it"
        elif isinstance(value, dict):
            if "$ref" in rule:
                block = definitions[rule["$ref"].rsplit("/", 1)[1]]
                rule = {"properties": {**block["properties"], **rule.get("properties", {})}}
            yield from _drop_without_effect(value, rule, definitions, f"{inside}{key}.")


def _rules(values: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of every key, including the rules for the file's ZeRO stage."""
    rules = dict(schema.get("properties", {}))
    for condition in schema.get("allOf", ()):
        stages = condition.get("if", {}).get("properties", {}).get("stage", {}).get("enum", ())
        if values.get("stage") in stages:
            for key, rule in condition["then"]["properties"].items():
                rules[key] = {**rules.get(key, {}), **rule}
    return rules


def _is_off(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is False or value is None
    if "enabled" in value:
        return _is_off(value["enabled"])
    return bool(value) and all(map(_is_off, value.values()))


def add_ds_config_argument(
    parser: argparse.ArgumentParser, needed: bool = True, several: bool = False
) -> None:
    """--deepspeed_config and --ds, into `ds_overrides`.

    `needed`: without the option, `default_ds_config` is used.  `several`: the option takes a list of files.
    """
    what = "DeepSpeed configs to compare" if several else "DeepSpeed config"
    default = f"default: {DEFAULT_FILE}" if needed else f"for example {DEFAULT_FILE}"
    parser.add_argument(
        *DS_CONFIG_FLAGS,
        nargs="+" if several else None,
        default=[None] if several and needed else [] if several else None,
        metavar="JSON",
        help=f"{what} ({default})",
    )
    parser.add_argument(
        "--ds",
        dest="ds_overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting of the DeepSpeed config, with dots for nesting: "
        "zero_optimization.stage=3; can be repeated",
    )


def default_ds_config() -> str:
    """The file of a run without --deepspeed_config.

    That of `accelerate launch --deepspeed_config_file`; else the one of this folder or of the package.
    """
    if given := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        return given
    return str(DEFAULT_FILE if DEFAULT_FILE.exists() else SHIPPED / DEFAULT_FILE)
