"""The only module that imports DeepSpeed: start ranks, wrap the model, backward, step, save, load.

We accumulate gradients ourselves (`managed_gradient_accumulation: false`): the loss is already divided by the
supervised tokens of the optimizer step, over all ranks and micro-batches, so `backward` only multiplies by
the number of ranks, because DeepSpeed averages over them.
"""

import argparse
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # If DeepSpeed detects the CPU by itself, it compiles its operators again with other flags.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from coconut_ds.config.deepspeed import EIGHT_BIT, DeepSpeedConfig
from coconut_ds.data.batching import Batch
from coconut_ds.distributed import Ranks, phase, refuse_lone_process
from coconut_ds.engine import deepspeed_patches as patches
from coconut_ds.engine.deepspeed_patches import remove_stale_locks, to_compile
from coconut_ds.engine.watchdog import ended_after, free_port, meet
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.files import library_lines_hidden
from coconut_ds.model.coconut import Coconut

FP32_BYTES = 4
MOMENTS_BYTES = {False: 2 * FP32_BYTES, True: 2}  # of a weight, by whether they have 8 bits
GPU_ONLY = (
    ("zero_optimization", "zero_quantized_weights"),
    ("zero_optimization", "zero_quantized_nontrainable_weights"),
    ("zero_optimization", "zero_quantized_gradients"),
    ("zero_optimization", "offload_optimizer", "super_offload"),
    ("aio", "use_gds"),
)
START_SECONDS = 20.0  # minimum time to wait for ranks: their starts differ more than their steps
# Slurm's `srun` uses its own names for RANK, WORLD_SIZE and LOCAL_RANK.
SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def world_size_from_environment() -> int:
    """The number of ranks, from the launcher; 1 without a launcher.  Raises ConfigError."""
    refuse_lone_process()
    return int(os.environ.get("WORLD_SIZE", os.environ.get(SLURM_NAMES["WORLD_SIZE"], "1")))


def refuse_missing_operators(ds_config: DeepSpeedConfig) -> None:
    """Raise ConfigError if the config offloads to NVMe and DeepSpeed cannot build its operator for that.

    DeepSpeed notices only when it wraps the model.  deepspeed/ops/op_builder/async_io.py
    """
    if not ds_config.nvme_blocks:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        lines = [
            f"{ds_config.path}: zero_optimization.{block}.device: nvme needs DeepSpeed's async_io operator, "
            "which cannot be built on this machine; install libaio-dev (Fedora: libaio-devel), or write "
            '"device": "cpu"'
            for block in ds_config.nvme_blocks
        ]
        raise ConfigError("\n".join(lines))


def refusal_of_device(ds_config: DeepSpeedConfig) -> str | None:
    """Why `train` refuses this machine's device, None if it does not."""
    try:
        _choose_device(ds_config.precision)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _for_device(ds_config.stock, device)
    except ConfigError as error:
        return str(error)
    return None


def start_distributed(precision: str = "fp32", limit: float = 300.0) -> Ranks:
    """Join the process group of the `deepspeed` launcher, torchrun or srun; without one, a group of one.

    Raises, on all ranks, ConfigError if a rank's device cannot compute in `precision` ("fp32", "fp16",
    "bf16"), and RankLost if a rank does not connect within `limit` seconds (0: no limit).
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in SLURM_NAMES.items()})
        if torch.cuda.device_count() == 1:  # srun --gpus-per-task=1 shows each rank its own
            os.environ["LOCAL_RANK"] = "0"
    if "RANK" not in os.environ:
        refuse_lone_process()
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    rank, world_size = int(os.environ["RANK"]), world_size_from_environment()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for lock in remove_stale_locks():
            print(f"removed {lock}, left by an interrupted build of an operator", flush=True)
        if names := to_compile(installed_ops, torch.cuda.is_available()):
            print(f"compiling DeepSpeed's {' and '.join(names)} at the first start: some minutes", flush=True)
    message = None
    try:
        _choose_device(precision)
    except ConfigError as error:
        message = str(error)
        if world_size == 1:
            raise
    limit = max(limit, START_SECONDS) if limit > 0 else 0.0
    with ended_after(2 * limit, "starting the process group"):  # init_distributed has no time limit
        store = meet(rank, world_size, limit, message) if world_size > 1 else None
        with library_lines_hidden():
            deepspeed.init_distributed(verbose=False)
        del store
        device = torch.device(get_accelerator().current_device_name())
        if device.type == "cpu":
            dist.barrier()
            patches.unlink_shared_memory(dist.get_rank())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _choose_device(precision: str) -> None:
    """Select this rank's GPU.  Raises ConfigError if there is none, or if it does not support `precision`."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; lower --num_gpus"
            )
        torch.cuda.set_device(local_rank)
        # cuDNN attention makes a plan for every new shape, about a second each on Hopper.
        torch.backends.cuda.enable_cudnn_sdp(False)
        _check_precision(precision, torch.cuda.get_device_capability(local_rank))
    elif precision == "fp16":
        raise ConfigError(
            "fp16 needs a GPU; on the CPU use ds_configs/zero2_offload.json (fp32) or "
            "ds_configs/zero2_offload_bf16.json"
        )


def _check_precision(precision: str, capability: tuple[int, int]) -> None:
    """Check by compute capability: DeepSpeed rejects fp16 on Pascal and accepts emulated bf16 on Turing."""
    name = f"compute capability {capability[0]}.{capability[1]}"
    if precision == "bf16" and capability < (8, 0):
        raise ConfigError(
            f"bf16 needs compute capability 8.0 (Ampere); this GPU has {name} and would emulate it; "
            "use ds_configs/zero2_offload_fp16.json (7.x) or ds_configs/zero2_offload.json (6.x)"
        )
    if precision == "fp16" and capability < (7, 0) and os.environ.get("DS_ALLOW_DEPRECATED_FP16") != "1":
        raise ConfigError(
            f"fp16 is slow on {name} (1/64 of the fp32 rate on Pascal); use ds_configs/zero2_offload.json, "
            "or set DS_ALLOW_DEPRECATED_FP16=1 to use it anyway, to save memory"
        )


def _for_device(ds_config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """`ds_config` with torch's AdamW where the optimizer is not offloaded.

    DeepSpeed would compile its fused Adam there, which needs the CUDA toolkit on a GPU; `"torch_adam": false`
    in the file asks for it.  Raises ConfigError for settings that need a GPU.
    """
    zero, on_cpu = ds_config["zero_optimization"], device.type == "cpu"
    for keys in GPU_ONLY:
        if on_cpu and reduce(lambda block, key: block.get(key) or {}, keys, ds_config):
            raise ConfigError(f"{'.'.join(keys)}: needs a GPU; delete it to run on the CPU")
    optimizer = ds_config["optimizer"]
    if optimizer["type"] == EIGHT_BIT or zero.get("offload_optimizer", {}).get("device", "none") != "none":
        return dict(ds_config)
    params = {"torch_adam": True, **optimizer.get("params", {})} | ({"torch_adam": True} if on_cpu else {})
    if not params.pop("bias_correction", True):
        return dict(ds_config)  # torch's AdamW always corrects the bias
    return {**ds_config, "optimizer": {**optimizer, "params": params}}


def schedule(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The factor of the learning rate by optimizer step, after a linear warm-up.

    `name`: constant, linear or cosine, as in Transformers, whose own would also import PEFT and accelerate.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
        return max(0.0, {"constant": 1.0, "linear": 1 - progress, "cosine": cosine}[name])

    return factor


def checkpoint_bytes(
    module: nn.Module, zero_stage: int, moments_bytes: int, weight_bytes: int | None = None
) -> int:
    """Bytes of a checkpoint of all ranks, without its small files.

    Optimizer shards: fp32 weights and AdamW's two moments, in fp32 or 8 bits.  Weights: once in Hugging
    Face form and, except with ZeRO-3, once in the shards.  `weight_bytes`: of a weight, if DeepSpeed will
    cast it.
    """
    excludes_frozen = any(not p.requires_grad for p in module.parameters())
    trained = weights = 0
    for parameter in module.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves numel() 0
        if parameter.requires_grad:
            trained += size
        if parameter.requires_grad or not excludes_frozen:
            weights += size * (weight_bytes or parameter.element_size())
    return (FP32_BYTES + moments_bytes) * trained + (1 if zero_stage == 3 else 2) * weights


class Engine(Ranks):
    """A Coconut model under DeepSpeed."""

    def __init__(
        self,
        module: Coconut,
        parameter_groups: Sequence[Mapping[str, Any]],
        ds_config: Mapping[str, Any],
        ranks: Ranks,
        rate_factor: Callable[[int], float] | None = None,
    ) -> None:
        """Wrap `module`. Collective.

        `ds_config`: DeepSpeed's settings with every "auto" resolved.  `rate_factor`: see `schedule`.
        """
        super().__init__(ranks.rank, ranks.world_size, ranks.device)
        self.excludes_frozen = any(not p.requires_grad for p in module.parameters())
        config = {**_for_device(ds_config, ranks.device), "managed_gradient_accumulation": False}
        make_optimizer = None  # DeepSpeed makes the optimizer of the config
        if config["optimizer"]["type"] == EIGHT_BIT:
            params = {**config.pop("optimizer")["params"]}
            params.pop("adam_w_mode", None)  # true, and not an argument here
            make_optimizer = partial(patches.eight_bit_adam(), **params)
        self.moments_bytes = MOMENTS_BYTES[make_optimizer is not None]
        patches.import_muon_uncompiled()
        patches.describe_processor_once()
        self._engine, self._optimizer, _, scheduler = deepspeed.initialize(
            model=module,
            model_parameters=[dict(group) for group in parameter_groups],
            config=config,
            optimizer=make_optimizer,
            lr_scheduler=partial(LambdaLR, lr_lambda=rate_factor) if rate_factor else None,
        )
        self.zero_stage: int = self._engine.zero_optimization_stage()
        patches.link_in_round_robin_order(self._optimizer)
        self._own_settings = patches.OwnSettings(self._optimizer, scheduler)
        self.learning_rate = 0.0  # of the last step; the engine's own is already that of the next one

    @property
    def module(self) -> Coconut:
        return self._engine.module

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
        """Accumulate the gradient of one micro-batch; return the detached loss."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        return loss.detach()

    @phase("optimizer step")
    def step(self) -> bool:
        """Reduce, clip, update; return false if fp16 overflowed and the update was skipped."""
        patches.forget_powers_of_beta(self._optimizer)
        self.learning_rate = self._engine.get_lr()[0]
        with patches.minimum_loss_scale_explained():
            self._engine.step()
        return bool(self._engine.was_step_applied())

    def reset_optimizer(self) -> None:
        """Reset Adam's moments; keep the master weights and the learning rate.

        Source: section 4.2 of the Coconut paper, "reset the optimizer when the training stage switches".
        """
        patches.reset_moments(self._optimizer)

    def skip_steps(self, steps: int) -> None:
        """Set the learning rate to that of `steps` optimizer steps later."""
        if (scheduler := self._engine.lr_scheduler) is not None:
            scheduler.last_epoch += steps - 1
            scheduler.step()

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """This rank's master weights and moments, on any device."""
        optimizer = patches.base_optimizer(self._optimizer)
        for group in optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    @contextmanager
    def full_weights(self) -> Iterator[Coconut]:
        """The module with complete weights on every rank, for reading. Collective."""
        gather: Any = nullcontext()
        if self.zero_stage == 3:
            gather = deepspeed.zero.GatheredParameters(list(self.module.parameters()), modifier_rank=None)
        with gather:
            yield self.module

    def checkpoint_bytes(self) -> int:
        return checkpoint_bytes(self.module, self.zero_stage, self.moments_bytes)

    def save_shards(self, folder: Path, client_state: Mapping[str, Any]) -> None:
        """Write this rank's shards of weights and optimizer to `folder`. Collective."""
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state=dict(client_state),
            save_latest=False,
            exclude_frozen_parameters=self.excludes_frozen,
        )

    def load_shards(self, folder: Path) -> dict[str, Any]:
        """Load what `save_shards` wrote and return its client_state. Collective."""
        path, client_state = self._engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=not self.excludes_frozen
        )
        if path is None:
            raise ConfigError(f"{folder}: not a DeepSpeed checkpoint")
        self._own_settings.restore()
        patches.count_steps_as(self._optimizer)
        return client_state

    def convert_shards(self, folder: Path, target: Path) -> None:
        """Convert what `save_shards` wrote to a form in `target` that this engine's ZeRO stage loads.

        Any stage and number of ranks may have written it.  Call it on one rank only.
        Source: deepspeed/checkpoint/ds_to_universal.py.
        """
        from deepspeed.checkpoint import ds_to_universal  # rarely needed

        arguments = argparse.Namespace(
            input_folder=str(folder),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            ds_to_universal.main(arguments)
        patches.translate_universal(target, self.zero_stage)

    def load_converted_shards(self, folder: Path) -> dict[str, Any]:
        """Load what `convert_shards` wrote and return the client_state of `save_shards`. Collective.

        Raises CheckpointError on every rank if a weight or buffer differs from what was saved, or if a
        parameter group is so small that a rank has no part of it, which DeepSpeed cannot load.
        """
        if self.any_over_ranks(patches.has_group_without_part(self._optimizer, self.zero_stage)):
            raise CheckpointError(
                f"a parameter group has no part for one of {self.world_size} ranks, which DeepSpeed cannot "
                "load; resume with fewer ranks"
            )
        module_file = folder / patches.module_file(self.zero_stage)
        saved = torch.load(module_file, map_location="cpu", weights_only=False)
        with patches.universal_load(self._engine, saved["module"]):
            client_state = self.load_shards(folder)
        different = self.gather(self._different_from(saved["module"], folder))
        if any(different):
            names = ", ".join(sorted({name for rank in different for name in rank})[:5])
            raise CheckpointError(
                f"{folder}: these weights differ from the saved ones: {names}; resume with the ranks and the "
                "ds_config of before, or start a new run: set a new 'name', and this checkpoint as "
                "'load_model_path'"
            )
        return client_state

    def _different_from(self, saved: Mapping[str, Tensor], folder: Path) -> list[str]:
        """Names of this rank's weights and buffers that differ from `saved`.

        Frozen weights and buffers that are not saved are skipped.  ZeRO-3 saves no complete weights, so
        the converted ones are compared.
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
                    expected = patches.universal_tensor(folder / "zero" / name / "fp32.pt")
                if not torch.equal(value.cpu().flatten(), expected.flatten().to(value.dtype)):
                    different.append(name)
        return different

    def close(self) -> None:
        """Free the memory and leave the process group."""
        self._engine.destroy()
        gc.unfreeze()
        gc.collect()
        finish_distributed()


def finish_distributed() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
