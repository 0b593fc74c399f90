"""The only door to DeepSpeed: start ranks, wrap the model, backward, step, save and load shards.

Knows: DeepSpeed and the collectives.  Does not know: stages, data, where checkpoints live.
DeepSpeed's gradient accumulation is left to us (`managed_gradient_accumulation: false`): the loss is already
divided by the supervised tokens of the whole optimizer step, over all ranks and micro-batches, so `backward`
multiplies by the number of ranks (DeepSpeed averages over them) and divides by nothing else.
"""

import argparse
import gc
import importlib
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # DeepSpeed compiles its operators with other flags when it finds the CPU by itself, and again in turns.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from coconut_ds.data.batching import Batch
from coconut_ds.engine.distributed import Collectives, Ranks
from coconut_ds.engine.rendezvous import free_port, meet
from coconut_ds.engine.watchdog import ended_after
from coconut_ds.errors import CheckpointError, ConfigError, Diverged
from coconut_ds.failures import phase
from coconut_ds.model.coconut import Coconut

# torch 2.13 deprecates collectives that DeepSpeed calls at every step of ZeRO-3.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

# What DeepSpeed's bare exception says (runtime/fp16/loss_scaler.py).
SCALER_AT_MINIMUM = "loss scale already at minimum"
SHARED_MEMORY = Path("/dev/shm")
FP32_BYTES = 4
START_SECONDS = 20.0  # ranks are waited for so long at least: their starts differ more than their steps
# Where Slurm's `srun` says what the other launchers say in RANK, WORLD_SIZE and LOCAL_RANK.
SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def world_size_from_environment() -> int:
    """The number of ranks as the launcher says it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get(SLURM_NAMES["WORLD_SIZE"], "1")))


def start_distributed(precision: str = "fp32", limit: float = 300.0) -> Ranks:
    """Join the process group of the `deepspeed` launcher, torchrun or srun; alone, be a group of one.

    Raises, on all ranks, ConfigError when a rank's device cannot compute in `precision` ("fp32", "fp16",
    "bf16"), and RankLost when a rank does not come within `limit` seconds (0: waits without end).
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in SLURM_NAMES.items()})
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    rank, world_size = int(os.environ["RANK"]), world_size_from_environment()
    problem = None
    try:
        _choose_device(precision)
    except ConfigError as error:
        problem = str(error)
        if world_size == 1:
            raise
    limit = max(limit, START_SECONDS) if limit > 0 else 0.0
    with ended_after(2 * limit, "starting the process group"):  # after that only this ends it
        store = meet(rank, world_size, limit, problem) if world_size > 1 else None
        deepspeed.init_distributed(verbose=False)
        del store
        device = torch.device(get_accelerator().current_device_name())
        if device.type == "cpu":
            _unname_shared_memory(dist.get_rank())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _choose_device(precision: str) -> None:
    """Take this rank's GPU.  Raises ConfigError when there is none for it, or none for `precision`."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; lower --num_gpus"
            )
        torch.cuda.set_device(local_rank)
        _check_precision(precision, torch.cuda.get_device_capability(local_rank))
    elif precision == "fp16":
        raise ConfigError("fp16 needs a GPU; on the CPU use a ds_config in fp32, or zero2_offload_bf16.json")


def _unname_shared_memory(rank: int) -> None:
    """Let the 69 MB of DeepSpeed's all-reduce on the CPU end with the processes that use them.  Collective.

    DeepSpeed never removes the name, so every start would take so much of the memory until the next reboot.
    Source: deepspeed/ops/csrc/cpu/comm/shm.cpp, `shm_initialize`; its ranks have opened it when it returns.
    """
    dist.barrier()
    owner = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    SHARED_MEMORY.joinpath(f"deepspeed_allreduce_buffer_{os.getuid()}_{owner}_{rank}").unlink(missing_ok=True)


def _check_precision(precision: str, capability: tuple[int, int]) -> None:
    """DeepSpeed refuses fp16 on Pascal and accepts emulated bf16 on Turing; decide by capability instead."""
    name = f"compute capability {capability[0]}.{capability[1]}"
    if precision == "bf16" and capability < (8, 0):
        raise ConfigError(
            f"bf16 needs compute capability 8.0 (Ampere), this GPU has {name}, where it would be emulated; "
            "use ds_configs/zero2_offload_fp16.json (7.x) or ds_configs/zero2_offload.json (6.x)"
        )
    if precision == "fp16" and capability < (7, 0) and os.environ.get("DS_ALLOW_DEPRECATED_FP16") != "1":
        raise ConfigError(
            f"fp16 is slow on {name} (1/64 of the fp32 rate on Pascal); use ds_configs/zero2_offload.json, "
            "or set DS_ALLOW_DEPRECATED_FP16=1 to save memory all the same"
        )


def _import_muon_uncompiled() -> None:
    """Spare `deepspeed.initialize` a second: it imports Muon, whose decorators load torch's Inductor."""
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    with suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    if before is None:
        del os.environ[switch]
    else:
        os.environ[switch] = before


def _for_device(ds_config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """`ds_config` with torch's own AdamW on CPU ranks without offload.

    DeepSpeed would take its fused Adam there, a C++ operator that has to be compiled first.
    Raises ConfigError for what DeepSpeed has on GPUs only.
    """
    if device.type != "cpu":
        return dict(ds_config)
    zero = ds_config["zero_optimization"]
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            raise ConfigError(f"zero_optimization.{key}: needs a GPU; delete it to run on the CPU")
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return dict(ds_config)
    optimizer = ds_config["optimizer"]
    params = {**optimizer["params"], "torch_adam": True}
    if not params.pop("bias_correction", True):
        return dict(ds_config)  # torch's always corrects
    return {**ds_config, "optimizer": {**optimizer, "params": params}}


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the run: `name` is constant, linear or cosine, after a linear warm-up."""

    name: str
    warmup_steps: int
    total_steps: int

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at an optimizer step."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        match self.name:
            case "constant":
                return 1.0
            case "linear":
                return max(0.0, 1 - progress)
            case "cosine":
                return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        raise ValueError(self.name)

    def build(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Transformers has the same three, and takes PEFT and accelerate along."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step))


class Engine(Collectives):
    """A Coconut model under DeepSpeed."""

    def __init__(
        self,
        module: Coconut,
        parameter_groups: Sequence[Mapping[str, Any]],
        ds_config: Mapping[str, Any],
        ranks: Ranks,
        schedule: Schedule | None = None,
    ) -> None:
        """Wrap `module`; `ds_config` is DeepSpeed's own settings, every "auto" resolved.

        Collective: every rank must call it.
        """
        self.ranks = ranks
        self.excludes_frozen = any(not p.requires_grad for p in module.parameters())
        config = {**_for_device(ds_config, ranks.device), "managed_gradient_accumulation": False}
        _import_muon_uncompiled()
        self._engine, self._optimizer, _, self._scheduler = deepspeed.initialize(
            model=module,
            model_parameters=[dict(group) for group in parameter_groups],
            config=config,
            lr_scheduler=schedule.build if schedule is not None else None,
        )
        self.zero_stage: int = self._engine.zero_optimization_stage()
        self._own_groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._base_optimizer.param_groups
        ]
        self._own_clipping = getattr(self._optimizer, "clip_grad", None)
        if getattr(self._optimizer, "round_robin_gradients", False):
            self._link_in_round_robin_order()

    def _link_in_round_robin_order(self) -> None:
        """Have DeepSpeed note where each weight lies in the flat partitions: `convert_shards` needs it.

        It counts in the model's order, though `round_robin_gradients` laid the weights out in another.
        Source: deepspeed/runtime/zero/stage_1_and_2.py, `_link_all_hp_params`.
        """
        optimizer = self._optimizer
        model_order, optimizer.bit16_groups = optimizer.bit16_groups, optimizer.round_robin_bit16_groups
        optimizer._link_all_hp_params()
        optimizer._param_slice_mappings = optimizer._create_param_mapping()
        optimizer.bit16_groups = model_order

    @property
    def module(self) -> Coconut:
        return self._engine.module

    @property
    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping, over all ranks."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def loss_scale(self) -> float | None:
        """The fp16 loss scale, None in other precisions."""
        return float(self._optimizer.cur_scale) if self._engine.fp16_enabled() else None

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    @phase("forward")
    def loss(self, batch: Batch) -> Tensor:
        """This rank's share of the step's loss: sum of its token losses / supervised tokens of the step."""
        return self._engine(batch)

    @phase("backward")
    def backward(self, loss: Tensor) -> Tensor:
        """Accumulate the gradient of one micro-batch; gives the loss back, cut from its graph."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        return loss.detach()

    @phase("optimizer step")
    def step(self) -> bool:
        """Reduce, clip, update; false when fp16 overflowed and the update was skipped."""
        self._forget_powers_of_beta()
        try:
            self._engine.step()
        except Exception as error:
            if SCALER_AT_MINIMUM not in str(error):
                raise
            raise Diverged(
                "the fp16 loss scale is at its minimum and gradients still overflow: fp16 cannot hold some "
                "values; train in fp32 (ds_configs/zero2_offload.json), in bf16, or with LoRA"
            ) from error
        return bool(self._engine.was_step_applied())

    def _forget_powers_of_beta(self) -> None:
        """Have the CPU Adam compute its powers of beta from the step number.

        Left alone it multiplies them up from step to step, and calls pow() in the first step after a load: a
        resumed run would differ in the last digits (IncrementStep in DeepSpeed's cpu_adam.h).
        """
        adam = self._base_optimizer
        if isinstance(adam, DeepSpeedCPUAdam):
            group = adam.param_groups[0]
            settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], adam.adam_w_mode)
            adam.ds_opt_adam.destroy_adam(adam.opt_id)
            adam.ds_opt_adam.create_adam(adam.opt_id, *settings, False)

    def reset_optimizer(self) -> None:
        """Forget Adam's moments; the master weights and the learning rate stay.

        Source: section 4.2 of the Coconut paper, "reset the optimizer when the training stage switches".
        """
        self._base_optimizer.state = defaultdict(dict)

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """This rank's master weights and moments, wherever they lie."""
        optimizer = self._base_optimizer
        for group in optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self._optimizer, "optimizer", self._optimizer)

    @contextmanager
    def full_weights(self) -> Iterator[Coconut]:
        """The module with every weight whole on every rank, for reading. Collective."""
        gather: Any = nullcontext()
        if self.zero_stage == 3:
            gather = deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=None)
        with gather:
            yield self.module

    def checkpoint_bytes(self) -> int:
        """Bytes that a checkpoint of all ranks takes, without its small files.

        Optimizer shards: fp32 weights and AdamW's two moments.  Weights: once in the shards, unless ZeRO-3
        splits them, and once in the model's own form.
        """
        trained = weights = 0
        for parameter in self.module.parameters():
            size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves numel() 0
            if parameter.requires_grad:
                trained += size
            if parameter.requires_grad or not self.excludes_frozen:
                weights += size * parameter.element_size()
        return 3 * FP32_BYTES * trained + (1 if self.zero_stage == 3 else 2) * weights

    def save_shards(self, folder: Path, client_state: Mapping[str, Any]) -> None:
        """Write this rank's part of weights and optimizer into `folder`. Collective."""
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state=dict(client_state),
            save_latest=False,
            exclude_frozen_parameters=self.excludes_frozen,
        )

    def load_shards(self, folder: Path) -> dict[str, Any]:
        """Read what `save_shards` wrote; gives its client_state back. Collective."""
        path, client_state = self._engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=not self.excludes_frozen
        )
        if path is None:
            raise ConfigError(f"{folder}: DeepSpeed found no checkpoint here")
        self._keep_own_settings()
        return client_state

    def convert_shards(self, folder: Path, target: Path) -> None:
        """Write what `save_shards` wrote into `target` in a form that any number of ranks can load.

        For one rank alone.  Source: deepspeed/checkpoint/ds_to_universal.py.
        """
        from deepspeed.checkpoint import ds_to_universal  # a start does not need it

        arguments = argparse.Namespace(
            input_folder=str(folder),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            ds_to_universal.main(arguments)

    def load_converted_shards(self, folder: Path) -> dict[str, Any]:
        """Read what `convert_shards` wrote; gives the client_state of `save_shards` back. Collective.

        Raises CheckpointError, on every rank, when a weight or buffer is not what was saved, and when a
        parameter group is so small that a rank has no part of it, which DeepSpeed cannot load.
        """
        groups = [] if self.zero_stage == 3 else self._optimizer.bit16_groups
        if self.any_over_ranks(any(all(p._hp_mapping is None for p in group) for group in groups)):
            raise CheckpointError(
                f"a parameter group has no part for one of {self.world_size} ranks, which DeepSpeed cannot "
                "load; go on with fewer ranks"
            )
        (first_file, *_) = sorted(folder.glob("*mp_rank_00_model_states.pt"))
        saved = torch.load(first_file, map_location="cpu", weights_only=False)
        # DeepSpeed's universal load brings master weights and moments, but no buffer.
        self._engine.load_module_state_dict(saved, strict=not self.excludes_frozen)
        config = self._engine._config
        config.load_universal_checkpoint = True
        try:
            client_state = self.load_shards(folder)
        finally:
            config.load_universal_checkpoint = False
        different = self.gather(self._different_from(saved["module"], folder))
        if any(different):
            names = ", ".join(sorted({name for rank in different for name in rank})[:5])
            raise CheckpointError(
                f"{folder} does not give back what was saved: {names}; go on with as many ranks as before, "
                "or give the run a new 'name' and this checkpoint as 'load_model_path'"
            )
        return client_state

    def _different_from(self, saved: Mapping[str, Tensor], folder: Path) -> list[str]:
        """Names of weights and buffers that this rank's module has otherwise than `saved`.

        Frozen weights and what never is saved are not in it.  ZeRO-3 saves no whole weight: there the
        converted one is compared.
        """
        different = []
        with self.full_weights() as module:
            for name, value in (*module.named_parameters(), *module.named_buffers()):
                if name not in saved:
                    if value.requires_grad:
                        different.append(name)
                    continue
                expected = saved[name]
                if expected.numel() != value.numel():
                    expected = torch.load(folder / "zero" / name / "fp32.pt", weights_only=False)
                if not torch.equal(value.cpu().flatten(), expected.flatten().to(value.dtype)):
                    different.append(name)
        return different

    def _keep_own_settings(self) -> None:
        """Undo what a load takes from the checkpoint though the settings own it: rate, decay, clipping.

        Source: deepspeed/runtime/zero/stage_1_and_2.py, `_load_legacy_checkpoint` and `_load_global_state`.
        """
        for group, own in zip(self._base_optimizer.param_groups, self._own_groups, strict=True):
            group.update(own)
        if self._own_clipping is not None:
            self._optimizer.clip_grad = self._own_clipping
        if self._scheduler is not None:
            scheduler = self._scheduler
            scheduler.base_lrs = [own["initial_lr"] for own in self._own_groups]
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(self._base_optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def close(self) -> None:
        """Give the memory back and leave the process group."""
        self._engine.destroy()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


def finish_distributed() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
