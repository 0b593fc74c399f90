"""Suggest changes that save memory, the cheapest first, each with its plan."""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.config.experiment import Experiment
from coconut_ds.errors import ConfigError
from coconut_ds.memory.plan import EVALUATION, Change, Plan
from coconut_ds.memory.planner import Planner, with_rows

SMALLEST_BUCKET = 20_000_000
NUM_SHOWN = 3


@dataclass(frozen=True)
class Proposal:
    """A changed run and its description."""

    text: str
    setting: str
    experiment: Experiment
    ds_config: DeepSpeedConfig


def cheapest_changes(
    planner: Planner, experiment: Experiment, ds_config: DeepSpeedConfig, plan: Plan, limit: int = NUM_SHOWN
) -> tuple[Change, ...]:
    """The first `limit` changes that help; if the plan does not fit, those that make it fit come first."""
    changes: list[Change] = []
    enough, epoch = 0, plan.peak_stage.epoch
    for proposal in proposals(experiment, ds_config, plan):
        try:
            changed = planner.plan(proposal.experiment, proposal.ds_config, plan.ranks, quick_at=epoch)
        except ConfigError:
            continue
        if changed.gpu_bytes >= plan.gpu_bytes and (plan.host_fits or changed.host_bytes >= plan.host_bytes):
            continue
        changes.append(Change(proposal.text, proposal.setting, changed.gpu_bytes, changed.fits))
        enough += changed.fits or plan.fits
        if enough == limit:
            break
    if not plan.fits:
        changes.sort(key=lambda change: not change.fits)
    return tuple(changes[:limit])


def proposals(experiment: Experiment, ds_config: DeepSpeedConfig, plan: Plan) -> Iterator[Proposal]:
    """Changes in order of cost: first those without any, last those that change what is learned."""
    zero = ds_config.stock["zero_optimization"]
    latent = ds_config.latent_memory
    if plan.peak_phase.name == EVALUATION and experiment.batch_size_eval > 1:
        rows = experiment.batch_size_eval // 2
        yield Proposal(
            "smaller evaluation batches", f"--set batch_size_eval={rows}",
            replace(experiment, batch_size_eval=rows), ds_config,
        )  # fmt: skip
    for name in (
        "fused_activations",
        "segmented_cache",
        "supervised_logits_only",
        "deferred_weight_gradients",
    ):
        if not getattr(latent, name):
            on: dict[str, Any] = {name: True}
            yield Proposal(
                f"enable {name} (exact)", f'"latent_memory": {{"{name}": true}}',
                experiment, replace(ds_config, latent_memory=replace(latent, **on)),
            )  # fmt: skip
    if zero.get("overlap_comm"):
        yield _zero(experiment, ds_config, "one reduce bucket instead of two", overlap_comm=False)
    if zero.get("reduce_bucket_size", 5e8) > SMALLEST_BUCKET:
        yield _zero(experiment, ds_config, "a smaller reduce bucket", reduce_bucket_size=SMALLEST_BUCKET)
    if ds_config.zero_stage == 1:
        yield _zero(experiment, ds_config, "ZeRO-2 instead of ZeRO-1", stage=2)
    if experiment.batch_size_training > 1:
        fewer = with_rows(experiment, experiment.batch_size_training // 2)
        yield Proposal(
            "half the micro-batch at the same global batch size",
            f"--set batch_size_training={fewer.batch_size_training} "
            f"--set gradient_accumulation_steps={fewer.gradient_accumulation_steps}",
            fewer, ds_config,
        )  # fmt: skip
    if latent.activation_checkpointing == "none":
        yield Proposal(
            "activation checkpointing (exact, about a third slower)",
            '"latent_memory": {"activation_checkpointing": "layers"}',
            experiment, replace(ds_config, latent_memory=replace(latent, activation_checkpointing="layers")),
        )  # fmt: skip
    if not ds_config.offload_optimizer:
        yield _zero(
            experiment, ds_config, "optimizer offload to the host (slower steps)",
            stage=max(2, ds_config.zero_stage), offload_optimizer={"device": "cpu", "pin_memory": True},
        )  # fmt: skip
    if ds_config.precision == "fp32" and not experiment.bf16:
        yield Proposal(
            "16-bit weights and activations (bf16 from compute capability 8.0, fp16 on 7.x)",
            '"bf16": {"enabled": true} or "fp16": {"enabled": true}',
            experiment, replace(ds_config, stock={**ds_config.stock, "bf16": {"enabled": True}}),
        )  # fmt: skip
    if experiment.tuning == "full":
        yield Proposal(
            "LoRA instead of full tuning (changes what is learned)", "--set tuning=lora",
            replace(experiment, tuning="lora"), ds_config,
        )  # fmt: skip


def _zero(experiment: Experiment, ds_config: DeepSpeedConfig, text: str, **changes: Any) -> Proposal:
    stock = deepcopy(dict(ds_config.stock))
    stock["zero_optimization"] = {**stock["zero_optimization"], **changes}
    shown = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in changes.items())
    return Proposal(text, f'"zero_optimization": {{{shown}}}', experiment, replace(ds_config, stock=stock))
