"""Everything that reaches into DeepSpeed's internals: one function per reason, written for VERSION.

Each function names the file of DeepSpeed that it depends on.  tests/engine/test_deepspeed_patches.py fails
when another version is installed or one of those places changes; then check every function here.

    python -m coconut_ds.engine.deepspeed_patches      remove the locks of interrupted builds
"""

import importlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from coconut_ds.errors import Diverged

VERSION = "0.19.8"
SHARED_MEMORY = Path("/dev/shm")
SCALER_AT_MINIMUM = "loss scale already at minimum"
STALE_SECONDS = 60  # age of a build lock


def import_muon_uncompiled() -> None:
    """Save a second in `deepspeed.initialize`: it imports Muon, whose decorators load torch's Inductor.

    deepspeed/runtime/zero/muon/muon_optimizer.py
    """
    users_own = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    with suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    del os.environ["TORCHDYNAMO_DISABLE"]
    if users_own is not None:
        os.environ["TORCHDYNAMO_DISABLE"] = users_own


def describe_processor_once() -> None:
    """Save 1.3 s per CPU Adam: DeepSpeed asks py-cpuinfo, which measures the processor's clock for a second.

    DeepSpeed reads only the architecture, the vendor and the flags.
    deepspeed/ops/adam/cpu_adam.py and deepspeed/ops/op_builder/builder.py, `get_cpu_info`
    """
    importlib.import_module("cpuinfo").get_cpu_info = _processor  # type: ignore[attr-defined]


@cache
def _processor() -> dict[str, Any]:
    from cpuinfo import cpuinfo  # starts two programs when it is imported

    cpuinfo._get_cpu_info_from_cpuid = dict  # this measures the clock; /proc/cpuinfo and lscpu have the rest
    return cpuinfo._get_cpu_info_internal()


def eight_bit_adam() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW8bit, as an optimizer that ZeRO takes without a warning.

    deepspeed/runtime/zero/utils.py, `is_zero_supported_optimizer`
    """
    from bitsandbytes.optim import AdamW8bit  # slow, and optional

    supported = importlib.import_module("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS
    if AdamW8bit not in supported:
        supported.append(AdamW8bit)
    return AdamW8bit


def unlink_shared_memory(rank: int) -> None:
    """Unlink the 69 MB of shared memory of DeepSpeed's CPU all-reduce; it then ends with the ranks.

    DeepSpeed never unlinks it, so every start would use up that much memory until the next reboot.  Call it
    on every rank when all have opened the memory.  deepspeed/ops/csrc/cpu/comm/shm.cpp, `shm_initialize`
    """
    owner = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    SHARED_MEMORY.joinpath(f"deepspeed_allreduce_buffer_{os.getuid()}_{owner}_{rank}").unlink(missing_ok=True)


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside ZeRO's."""
    return getattr(optimizer, "optimizer", optimizer)


def link_in_round_robin_order(optimizer: Any) -> None:
    """Let DeepSpeed record the position of each weight in the flat partitions, for universal checkpoints.

    DeepSpeed assumes the model's order, but `round_robin_gradients` uses another.
    deepspeed/runtime/zero/stage_1_and_2.py, `_link_all_hp_params`
    """
    if getattr(optimizer, "round_robin_gradients", False):
        model_order, optimizer.bit16_groups = optimizer.bit16_groups, optimizer.round_robin_bit16_groups
        optimizer._link_all_hp_params()
        optimizer._param_slice_mappings = optimizer._create_param_mapping()
        optimizer.bit16_groups = model_order


def forget_powers_of_beta(optimizer: Any) -> None:
    """Make the CPU Adam compute its powers of beta from the step number.

    By default it multiplies them up step by step, but uses pow() in the first step after a load, so a
    resumed run would differ in the last digits.  deepspeed/ops/csrc/includes/cpu_adam.h, `IncrementStep`
    """
    adam: Any = base_optimizer(optimizer)
    if hasattr(adam, "ds_opt_adam"):
        group = adam.param_groups[0]
        settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], adam.adam_w_mode)
        adam.ds_opt_adam.destroy_adam(adam.opt_id)
        adam.ds_opt_adam.create_adam(adam.opt_id, *settings, False)


@contextmanager
def minimum_loss_scale_explained() -> Iterator[None]:
    """Turn the bare Exception of the loss scaler into Diverged.  deepspeed/runtime/fp16/loss_scaler.py"""
    try:
        yield
    except Exception as error:
        if SCALER_AT_MINIMUM not in str(error):
            raise
        raise Diverged(
            "the fp16 loss scale is at its minimum and gradients still overflow; "
            "train in fp32 (ds_configs/zero2_offload.json), in bf16, or with LoRA"
        ) from error


def reset_moments(optimizer: Any) -> None:
    """Drop Adam's moments; keep the master weights."""
    base_optimizer(optimizer).state = defaultdict(dict)


class OwnSettings:
    """Settings that a load overwrites: learning rate, weight decay, clipping.

    deepspeed/runtime/zero/stage_1_and_2.py, `_load_legacy_checkpoint` and `_load_global_state`
    """

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self._groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in base_optimizer(optimizer).param_groups
        ]
        self._clipping = getattr(optimizer, "clip_grad", None)

    def restore(self) -> None:
        """Set them back; the learning rate is that of the scheduler's step."""
        groups = base_optimizer(self._optimizer).param_groups
        for group, own in zip(groups, self._groups, strict=True):
            group.update(own)
        if self._clipping is not None:
            self._optimizer.clip_grad = self._clipping
        if (scheduler := self._scheduler) is not None:
            scheduler.base_lrs = [own["initial_lr"] for own in self._groups]
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            scheduler._last_lr = [
                rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)
            ]
            for group, rate in zip(groups, scheduler._last_lr, strict=True):
                group["lr"] = rate


def count_steps_as(optimizer: Any) -> None:
    """Let loaded states count steps as the optimizer does that has them now.

    torch's AdamW counts in a tensor, DeepSpeed's Adams in an int.  deepspeed/ops/adam/cpu_adam.py
    """
    base = base_optimizer(optimizer)
    for state in base.state.values():
        if "step" in state:
            step = int(state["step"])
            state["step"] = torch.tensor(float(step)) if isinstance(base, torch.optim.AdamW) else step


def has_group_without_part(optimizer: Any, zero_stage: int) -> bool:
    """Whether this rank has no part of a parameter group, which a universal load cannot handle.

    deepspeed/runtime/base_optimizer.py, `load_hp_checkpoint_state_from_checkpoint_dir`
    """
    if zero_stage == 3:
        return False
    groups: Sequence[Any] = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    return any(all(parameter._hp_mapping is None for parameter in group) for group in groups)


def module_file(zero_stage: int) -> str:
    """The file of the module that a ZeRO stage looks for in a universal checkpoint.

    deepspeed/runtime/engine.py, `_get_ckpt_name`
    """
    return ("zero_pp_rank_0_" if zero_stage == 3 else "") + "mp_rank_00_model_states.pt"


def universal_tensor(path: Path) -> Tensor:
    """A tensor of a universal checkpoint, in the form of any stage."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    return content["param"] if isinstance(content, dict) else content


def translate_universal(folder: Path, zero_stage: int) -> None:
    """Let `zero_stage` read a universal checkpoint that was made from shards of another stage.

    Stage 3 has flat tensors and one step for all; stages 1 and 2 have tensors with their shape inside a
    dict, a step beside each, and DeepSpeed's version.  deepspeed/checkpoint/ds_to_universal.py, `main`;
    runtime/zero/stage3.py, `load_hp_checkpoint_state_from_checkpoint_dir_stage3`
    """
    wanted, common_file = folder / module_file(zero_stage), folder / "zero" / "optimizer_state.pt"
    if wanted.exists():
        return
    written = folder / module_file(2 if zero_stage == 3 else 3)
    common = torch.load(common_file, map_location="cpu", weights_only=False)
    tensors = [path for path in common_file.parent.iterdir() if path.is_dir()]
    if zero_stage == 3:
        step = torch.load(tensors[0] / "step.pt", weights_only=False)
        common["optimizer_state_dict"] = {
            "state": {0: {"step": step}},
            "param_groups": common["param_groups"],
        }
    else:
        common["ds_version"] = VERSION
        step = common.pop("optimizer_state_dict")["state"][0]["step"]
        groups = torch.load(written, map_location="cpu", weights_only=False)["param_shapes"]
        shapes = {name: shape for group in groups for name, shape in group.items()}
        for tensor in tensors:
            for path in list(tensor.iterdir()):
                torch.save({"param": universal_tensor(path).view(shapes[tensor.name]), "cat_dim": 0}, path)
            torch.save(step, tensor / "step.pt")
    torch.save(common, common_file)
    written.rename(wanted)


@contextmanager
def universal_load(engine: Any, saved: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `engine.load_checkpoint` read a universal checkpoint, and restore the buffers from `saved`.

    Such a load restores master weights and moments, but no buffers.  deepspeed/runtime/engine.py
    """
    buffers = {name: saved[name] for name, _ in engine.module.named_buffers() if name in saved}
    engine.module.load_state_dict(buffers, strict=False)
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def stale_locks() -> Iterator[Path]:
    """Locks older than a minute in whose folder no process works; ninja runs in the folder it builds in."""
    for lock in sorted(lock for root in _build_folders() for lock in root.glob("**/lock")):
        if time.time() - lock.stat().st_mtime > STALE_SECONDS and not _works_in(lock.parent):
            yield lock


def remove_stale_locks() -> list[Path]:
    """Remove what interrupted builds left; returns the removed locks."""
    locks = list(stale_locks())
    for lock in locks:
        lock.unlink(missing_ok=True)
    return locks


def to_compile(installed: Mapping[str, object], on_gpu: bool) -> list[str]:
    """The operators without a binary, neither `installed` with DeepSpeed nor built by an earlier start."""
    names = ["cpu_adam"] if on_gpu else ["deepspeed_shm_comm", "cpu_adam"]
    return [name for name in names if not (installed.get(name) or _is_built(name))]


def _is_built(name: str) -> bool:
    """Whether this environment's torch built the operator; ninja builds it again for another one's."""
    own_torch = str(Path(torch.__file__).parent)
    return any(
        (binary.parent / "build.ninja").is_file() and own_torch in (binary.parent / "build.ninja").read_text()
        for folder in _build_folders()
        for binary in folder.glob(f"**/{name}/{name}.so")
    )


def _build_folders() -> list[Path]:
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return [Path(os.environ["TORCH_EXTENSIONS_DIR"])]
    return [Path.home() / ".cache" / "torch_extensions", Path(sys.prefix) / "torch_extensions"]


def _works_in(folder: Path) -> bool:
    return any(process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"]))


if __name__ == "__main__":
    for removed in remove_stale_locks():
        print(f"removed {removed}, left by an interrupted build")
