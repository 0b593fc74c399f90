"""Find settings that need less memory: single changes, and the largest micro-batch within a budget.

    cheapest_changes(planner, experiment, ds_config, plan)      changes that help, for a plan or an error
    fit(planner, experiment, ds_config)      Fit(memory_options=("offload_optimizer: cpu",), max_rows=4, ...)

`fit` keeps the global batch size.  If not even one row fits, memory options are tried one after another.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from coconut_ds.config.deepspeed import EIGHT_BIT, DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import BudgetError, ConfigError
from coconut_ds.files import json_text
from coconut_ds.memory.planner import BOTH, MIB, PINNED_ROUNDING, MemoryOption, Plan, Planner
from coconut_ds.model.quantization import has_library
from coconut_ds.runs.record_shapes import EVALUATION

# In the order in which `fit` adds them; the precision comes last.
OPTIONS = ("activation_checkpointing", "overlap_comm", "reduce_bucket_size", "offload_optimizer")
SMALLEST_BUCKET, NUM_CHANGES = 20_000_000, 3
ZERO, LATENT = "zero_optimization", "latent_memory"
EXACT_TECHNIQUES = (
    "fused_activations",
    "segmented_cache",
    "supervised_logits_only",
    "deferred_weight_gradients",
)


def memory_options(
    experiment: Experiment, ds_config: DeepSpeedConfig, peak_phase: str = "", precision: str = "bf16"
) -> Iterator[MemoryOption]:
    """Changes in order of cost: first those without any, last those that change what is learned."""
    zero, latent = ds_config.stock[ZERO], ds_config.latent_memory

    def override(text: str, **changes: Any) -> MemoryOption:
        setting = " ".join(f"--set {key}={value}" for key, value in changes.items())
        return MemoryOption(text, setting, replace(experiment, **changes), ds_config)

    def change(block: str, text: str, name: str = "", **changes: Any) -> MemoryOption:
        changed = with_settings(ds_config, block, **changes)
        return MemoryOption(text, ds_options(block, changes), experiment, changed, name)

    if peak_phase == EVALUATION and experiment.batch_size_eval > 1:
        yield override("smaller evaluation batches", batch_size_eval=experiment.batch_size_eval // 2)
    for technique in EXACT_TECHNIQUES:
        if not getattr(latent, technique):
            yield change(LATENT, f"enable {technique} (exact)", "", **{technique: True})
    if zero.get("overlap_comm"):
        yield change(ZERO, "one reduce bucket instead of two", "overlap_comm: false", overlap_comm=False)
    if zero.get("reduce_bucket_size", 5e8) > SMALLEST_BUCKET:
        name = f"reduce_bucket_size: {SMALLEST_BUCKET}"
        yield change(ZERO, "a smaller reduce bucket", name, reduce_bucket_size=SMALLEST_BUCKET)
    if ds_config.zero_stage == 1:
        yield change(ZERO, "ZeRO-2 instead of ZeRO-1", stage=2)
    if experiment.batch_size_training > 1:
        fewer = with_rows(experiment, experiment.batch_size_training // 2)
        yield override(
            "half the micro-batch at the same global batch size",
            batch_size_training=fewer.batch_size_training,
            gradient_accumulation_steps=fewer.gradient_accumulation_steps,
        )
    if latent.activation_checkpointing == "none":
        text, name = "activation checkpointing (exact, about a third slower)", "activation_checkpointing: "
        yield change(LATENT, text, name + "layers", activation_checkpointing="layers")
    if not ds_config.offload_optimizer:
        if experiment.tuning == "full" and ds_config.zero_stage < 3 and not ds_config.eight_bit_moments:
            text, setting = "8-bit Adam moments (changes what is learned a little)", "optimizer.type"
            yield MemoryOption(text, f"--ds {setting}={EIGHT_BIT}", experiment, eight_bit(ds_config))
        stage, offload = max(2, ds_config.zero_stage), {"device": "cpu", "pin_memory": True}
        text, name = "optimizer offload to the host (slower steps)", "offload_optimizer: cpu"
        option = change(ZERO, text, name, stage=stage, offload_optimizer=offload)
        optimizer = option.ds_config.stock["optimizer"]
        params = {key: value for key, value in optimizer.get("params", {}).items() if key != "torch_adam"}
        changed = with_settings(option.ds_config, "optimizer", type="AdamW", params=params)
        setting = option.setting + " --ds optimizer.type=AdamW" * ds_config.eight_bit_moments
        yield replace(option, setting=setting, ds_config=changed)
    if ds_config.precision == "fp32" and not experiment.bf16:
        yield MemoryOption(
            "16-bit weights and activations (bf16 from compute capability 8.0, fp16 on 7.x)",
            f"--ds {precision}.enabled=true",
            experiment,
            with_settings(ds_config, precision, enabled=True),
            precision,
        )
    if experiment.tuning == "full":
        yield override("LoRA instead of full tuning (changes what is learned)", tuning="lora")
    elif _can_quantize(experiment, ds_config):
        text = "frozen weights in 4 bits (QLoRA, changes what is learned a little)"
        yield override(text, quantization="nf4")


def _can_quantize(experiment: Experiment, ds_config: DeepSpeedConfig) -> bool:
    is_plain = experiment.quantization == "none" and not experiment.lora_use_dora
    return is_plain and ds_config.zero_stage < 3 and has_library()


def host_options(experiment: Experiment, ds_config: DeepSpeedConfig, ranks: int) -> Iterator[MemoryOption]:
    """Changes that save memory of the host, in order of cost."""
    if not ds_config.offload_optimizer:
        if experiment.tuning == "full" and ranks == 1:
            return
    else:
        setting = f"PYTORCH_ALLOC_CONF={PINNED_ROUNDING}:1 in front of the command"
        text = "pinned blocks in their own size (exact, torch >= 2.13)"
        yield MemoryOption(text, setting, experiment, ds_config, rounds_pinned=False)
    kind = ds_config.precision
    if ds_config.offload_optimizer and kind != "fp32":
        master = {f"{kind}_master_weights_and_grads": True}
        changed = with_settings(ds_config, kind, **master)
        text = "16-bit master weights and gradients on the host (changes what is learned a little)"
        yield MemoryOption(text, ds_options(kind, master), experiment, changed)
        optimizer = ds_config.stock["optimizer"]
        params = {**optimizer.get("params", {}), "fp32_optimizer_states": False}
        if kind == "bf16":
            master |= {"bf16_optimizer_states": True}
            changed, setting = with_settings(ds_config, kind, **master), ds_options(kind, master)
        else:
            changed = with_settings(changed, "optimizer", params=params)
            setting = ds_options(kind, master) + " --ds optimizer.params.fp32_optimizer_states=false"
        text = "16-bit master weights, gradients and moments (changes what is learned)"
        yield MemoryOption(text, setting, experiment, changed)
    if ranks > 1:
        steps = experiment.gradient_accumulation_steps * ranks
        setting = f"--num_gpus 1 --set gradient_accumulation_steps={steps}"
        fewer = replace(experiment, gradient_accumulation_steps=steps)
        yield MemoryOption("one rank at the same global batch size", setting, fewer, ds_config, ranks=1)
    if ds_config.offload_optimizer and ds_config.zero_stage < 3:
        changed = with_settings(ds_config, ZERO, offload_optimizer={"device": "none"})
        changed = with_settings(
            changed, "optimizer", params={**changed.stock["optimizer"].get("params", {}), "torch_adam": True}
        )
        setting = "--ds zero_optimization.offload_optimizer.device=none --ds optimizer.params.torch_adam=true"
        yield MemoryOption("optimizer on the GPU (faster steps)", setting, experiment, changed)
        text, setting = "optimizer on the GPU with 8-bit moments", setting.split(" --ds optimizer")[0]
        yield MemoryOption(text, f"{setting} --ds optimizer.type={EIGHT_BIT}", experiment, eight_bit(changed))


def eight_bit(ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """With bitsandbytes' AdamW in the place of torch's."""
    params = dict(ds_config.stock["optimizer"].get("params", {}))
    params.pop("torch_adam", None)
    return with_settings(ds_config, "optimizer", type=EIGHT_BIT, params=params)


def ds_options(block: str, changes: Mapping[str, Any]) -> str:
    """The --ds options that set some keys of a block."""
    parts = []
    for key, value in changes.items():
        if isinstance(value, dict):
            parts.append(ds_options(f"{block}.{key}", value))
        else:
            parts.append(f"--ds {block}.{key}={value if isinstance(value, str) else json_text(value)}")
    return " ".join(parts)


def with_settings(ds_config: DeepSpeedConfig, block: str, **changes: Any) -> DeepSpeedConfig:
    """The DeepSpeed config with some settings of a block changed."""
    if block == LATENT:
        return replace(ds_config, latent_memory=replace(ds_config.latent_memory, **changes))
    return replace(ds_config, stock={**ds_config.stock, block: {**ds_config.stock.get(block, {}), **changes}})


def with_rows(experiment: Experiment, rows: int) -> Experiment:
    """The same global batch size from micro-batches of `rows` rows, rounded up."""
    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    return replace(experiment, batch_size_training=rows, gradient_accumulation_steps=-(-total // rows))


def cheapest_changes(
    planner: Planner, experiment: Experiment, ds_config: DeepSpeedConfig, plan: Plan, limit: int = NUM_CHANGES
) -> tuple[MemoryOption, ...]:
    """For the GPU and the host, whichever does not fit, the first `limit` changes that help; those that make
    it fit come first, and if none does, several together.  If both fit: changes for the GPU.  If neither does
    and several together fit both, these come first.
    """
    targets = [name for name, fits in (("GPU", plan.gpu_fits), ("host", plan.host_fits)) if not fits]
    result: list[MemoryOption] = []
    for target in targets or ["GPU"]:
        start = MemoryOption("", "", experiment, ds_config, ranks=plan.ranks)
        changes = list(islice(_that_help(planner, start, plan, target), limit if plan.fits else None))
        changes.sort(key=lambda change: not change.fits)
        if targets and not any(change.fits for change in changes):
            changes = [*_together(planner, start, plan, target), *changes]
        result += changes[:limit]
    return (*(_for_both(planner, start, plan) if len(targets) > 1 else ()), *result)


def _for_both(planner: Planner, start: MemoryOption, plan: Plan) -> list[MemoryOption]:
    """Options added in order of cost until GPU and host fit, as one; nothing if none suffice."""
    for order in (("GPU", "host"), ("host", "GPU")):
        option, its_plan, parts = start, plan, []
        for target in order:
            option = replace(option, fits=False)
            if not (its_plan.gpu_fits if target == "GPU" else its_plan.host_fits):
                if not (added := _together(planner, option, its_plan, target)):
                    break
                (option,) = added
                parts.append(option)
                its_plan = _planner_of(planner, option).plan(
                    option.experiment, option.ds_config, option.ranks, only_epoch=plan.peak_stage.epoch
                )
        if its_plan.fits:
            text, settings = " + ".join(part.text for part in parts), [part.setting for part in parts]
            settings.sort(key=lambda setting: not setting.startswith("PYTORCH"))
            setting = "  ".join(settings)
            return [replace(option, text=text, setting=setting, target=BOTH, fits=True)]
    return []


def _planner_of(planner: Planner, option: MemoryOption) -> Planner:
    return planner if option.rounds_pinned else replace(planner, rounds_up_to=MIB)


def _that_help(planner: Planner, start: MemoryOption, plan: Plan, target: str) -> Iterator[MemoryOption]:
    """The options beyond `start`, whose plan is `plan`, that save memory of `target`, with their plans."""
    ranks = start.ranks or plan.ranks
    options = (
        memory_options(start.experiment, start.ds_config, plan.peak_phase.name)
        if target == "GPU"
        else host_options(start.experiment, start.ds_config, ranks)
    )
    for option in options:
        rounds = start.rounds_pinned and option.rounds_pinned
        try:
            changed = _planner_of(planner, replace(option, rounds_pinned=rounds)).plan(
                option.experiment, option.ds_config, option.ranks or ranks, only_epoch=plan.peak_stage.epoch
            )
        except ConfigError:
            continue
        if target == "GPU":
            helps, fits = changed.gpu_bytes < plan.gpu_bytes, changed.gpu_fits
            breaks = plan.host_fits and not changed.host_fits
        else:
            helps, fits = changed.host_bytes < plan.host_bytes, changed.host_fits
            breaks = plan.gpu_fits and not changed.gpu_fits
        if helps and not breaks:
            yield replace(
                option,
                target=target,
                fits=fits,
                ranks=option.ranks or ranks,
                rounds_pinned=rounds,
                gpu_bytes=changed.gpu_bytes,
                host_bytes=changed.host_bytes,
            )


def _together(planner: Planner, start: MemoryOption, plan: Plan, target: str) -> list[MemoryOption]:
    """Options added in order of cost until `target` fits, as one; nothing if they do not suffice."""
    texts: list[str] = []
    settings: list[str] = []
    while not start.fits:
        option = next((o for o in _that_help(planner, start, plan, target) if o.text not in texts), None)
        if option is None:
            return []
        texts, settings, start = [*texts, option.text], [*settings, option.setting], option
        epoch, its_planner = plan.peak_stage.epoch, _planner_of(planner, option)
        plan = its_planner.plan(option.experiment, option.ds_config, option.ranks, only_epoch=epoch)
    settings.sort(key=lambda setting: not setting.startswith("PYTORCH"))
    return [replace(start, text=" + ".join(texts), setting="  ".join(settings))]


@dataclass(frozen=True)
class Fit:
    """The settings that fit."""

    experiment: Experiment
    ds_config: DeepSpeedConfig
    memory_options: tuple[str, ...]  # changes of the DeepSpeed config, in order
    max_rows: int  # the largest micro-batch that fits; the experiment has the largest divisor of the batch
    plan: Plan

    @property
    def settings(self) -> str:
        """The settings as command-line options."""
        return (
            f"--set batch_size_training={self.experiment.batch_size_training} "
            f"--set gradient_accumulation_steps={self.experiment.gradient_accumulation_steps}"
        )


def fit(
    planner: Planner,
    experiment: Experiment,
    ds_config: DeepSpeedConfig,
    ranks: int | None = None,
    precision: str | None = None,
) -> Fit:
    """The largest micro-batch that fits, with as few memory options as possible.

    `precision`: a 16-bit format that the GPU supports ("bf16", "fp16"), tried last.
    Raises ConfigError without a memory_budget and BudgetError if nothing fits.
    """
    if ds_config.memory_budget is None:
        raise ConfigError(f'{ds_config.path} has no memory_budget to fit into; add a "memory_budget" block')
    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    for used, changed in _changed_configs(experiment, ds_config, precision):
        largest = max_rows(planner, experiment, changed, ranks)
        if largest:
            rows = max(count for count in range(1, largest + 1) if total % count == 0)
            chosen = with_rows(experiment, rows)
            return Fit(chosen, changed, used, largest, planner.plan(chosen, changed, ranks))
    smallest = planner.plan(with_rows(experiment, 1), changed, ranks)
    raise BudgetError(
        f"not even one row fits {ds_config.path}'s budget, with {', '.join(used) or 'no option left'}: "
        f"{smallest.verdict()}. Use a smaller model, tuning: lora, or zero3_offload.json"
    )


def _changed_configs(
    experiment: Experiment, ds_config: DeepSpeedConfig, precision: str | None
) -> Iterator[tuple[tuple[str, ...], DeepSpeedConfig]]:
    """The DeepSpeed config as it is, then with one memory option after another, cumulatively."""
    used: tuple[str, ...] = ()
    yield used, ds_config
    for key in (*OPTIONS, *([precision] if precision else [])):
        for option in memory_options(experiment, ds_config, precision=precision or "bf16"):
            if option.name.partition(":")[0] == key:
                used, ds_config = (*used, option.name), option.ds_config
                yield used, ds_config


def max_rows(
    planner: Planner,
    experiment: Experiment,
    ds_config: DeepSpeedConfig,
    ranks: int | None = None,
    epoch: int | None = None,
) -> int:
    """The largest micro-batch, up to the global batch of one GPU, whose plan fits; 0 if none does.

    `epoch`: plan only its stage.  Memory grows nearly linearly with the rows: the search follows a line.
    """

    def plan(rows: int, only_epoch: int | None) -> Plan:
        return planner.plan(with_rows(experiment, rows), ds_config, ranks, only_epoch=only_epoch)

    total = experiment.batch_size_training * experiment.gradient_accumulation_steps
    first = plan(1, epoch)
    if not first.fits or total == 1 or first.available_bytes is None:
        return int(first.fits)
    low, high, guess = 1, total + 1, 2
    while high - low > 1:
        tried = plan(guess, first.peak_stage.epoch)
        low, high = (guess, high) if tried.fits else (low, guess)
        slope = max(1, (tried.gpu_bytes - first.gpu_bytes) // (guess - 1))
        line = 1 + (first.available_bytes - first.gpu_bytes) // slope
        guess = min(max(line if line != guess else line + 1, low + 1), high - 1)
    while epoch is None and low > 1 and not plan(low, None).fits:
        low -= 1
    return low
