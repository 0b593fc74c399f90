"""Formulas for the states that DeepSpeed 0.19.8 keeps on each GPU and host, one item each.

Symbols: P trainable elements, F frozen elements, P_max elements of the largest trainable tensor, b bytes per
element of the model's dtype, N ranks, R reduce_bucket_size.  File names in the comments are below deepspeed/.
"""

from dataclasses import dataclass
from typing import Any

from coconut_ds.config.deepspeed import DeepSpeedConfig

PARAMETERS, OPTIMIZER, COMMUNICATION = "parameters", "optimizer", "communication"
GRADIENTS = "gradients"
FP32, FP64 = 4, 8
NVIDIA = "cuda"
# Assumed, not derived: Python, torch, DeepSpeed and, with a GPU, the CUDA libraries of one rank.
PROCESS_BYTES = {"cuda": int(3.0 * 2**30), "cpu": int(0.8 * 2**30)}


@dataclass(frozen=True)
class Item:
    """Bytes of one allocation and the formula behind them."""

    component: str
    name: str
    size: int
    formula: str


@dataclass(frozen=True)
class Sizes:
    """Element counts of a model's tensors."""

    groups: tuple[tuple[int, ...], ...]  # trainable parameters of each optimizer group, in order
    frozen: int
    buffer_bytes: int

    @property
    def trainable(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest(self) -> int:
        return max((size for group in self.groups for size in group), default=0)

    @property
    def flat(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)


@dataclass(frozen=True)
class ZeroSettings:
    """The ZeRO settings that decide where states and gradients are stored."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    pin_memory: bool
    bucket: int  # reduce_bucket_size, in elements
    overlap: bool
    round_robin: bool
    ranks: int
    model_bytes: int  # per element
    accumulates: bool  # more than one micro-batch per step
    device: str  # "cuda" or "cpu"
    prefetch: int = 0  # stage 3, in elements
    max_live: int = 0
    persistent_below: int = 0

    @classmethod
    def of(cls, ds_config: DeepSpeedConfig, ranks: int, accumulates: bool, device: str) -> "ZeroSettings":
        # Defaults: runtime/zero/config.py, DeepSpeedZeroConfig.
        zero: dict[str, Any] = dict(ds_config.stock["zero_optimization"])
        return cls(
            stage=ds_config.zero_stage,
            offload_optimizer=ds_config.offload_optimizer,
            offload_param=ds_config.offload_param,
            pin_memory=bool(zero.get("offload_optimizer", {}).get("pin_memory", True)),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            overlap=bool(zero.get("overlap_comm", ds_config.zero_stage == 3)),
            round_robin=bool(zero.get("round_robin_gradients", False)),
            ranks=ranks,
            model_bytes=4 if ds_config.precision == "fp32" else 2,
            accumulates=accumulates,
            device=device,
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            persistent_below=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        )


@dataclass(frozen=True)
class Partition:
    """The parameters that one rank owns, completely or in part."""

    size: int  # padded elements of one rank's partition, all groups together
    owned: tuple[int, ...]  # indices into Sizes.flat
    parts: tuple[tuple[int, ...], ...]  # for each parameter, the ranks that own some of it

    @classmethod
    def of_every_rank(cls, sizes: Sizes, zero: ZeroSettings) -> "list[Partition]":
        """The partitions of ranks 0, 1, ..."""
        # runtime/zero/stage_1_and_2.py, get_partition_info and initialize_gradient_partition
        parts: list[tuple[int, ...]] = [()] * len(sizes.flat)
        total, first = 0, 0
        for group in sizes.groups:
            size = _padded(sum(group), zero.ranks) // zero.ranks
            total += size
            offset = 0
            for index in _order(len(group), zero):
                start, offset = offset, offset + group[index]
                last = max(start, offset - 1)
                parts[first + index] = tuple(range(start // size, last // size + 1)) if size else ()
            first += len(group)
        return [
            cls(total, tuple(i for i, owners in enumerate(parts) if rank in owners), tuple(parts))
            for rank in range(zero.ranks)
        ]

    @classmethod
    def heaviest(cls, sizes: Sizes, zero: ZeroSettings) -> "Partition":
        """The partition whose parameters have the most elements; shared parameters count in full."""
        return max(
            cls.of_every_rank(sizes, zero), key=lambda partition: sum(sizes.flat[i] for i in partition.owned)
        )


def _order(count: int, zero: ZeroSettings) -> list[int]:
    """The order in which the parameters of a group are flattened."""
    if not zero.round_robin:
        return list(range(count))
    # runtime/zero/stage_1_and_2.py, _round_robin_reorder
    return [i for rank in range(zero.ranks) for i in range(rank, count, zero.ranks)]


def _padded(elements: int, ranks: int) -> int:
    # runtime/zero/stage_1_and_2.py, __init__: nccl_start_alignment_factor * world size
    alignment = 2 * ranks
    return -(-elements // alignment) * alignment


def gpu_states(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """States on one GPU after the first optimizer step."""
    if zero.stage == 3:
        return _gpu_states_of_stage_3(sizes, zero)
    b = zero.model_bytes
    # runtime/zero/stage_1_and_2.py, __init__: bit16_groups_flat holds all parameters on every rank
    items = [
        Item(
            PARAMETERS,
            "trainable weights",
            b * sum(_padded(sum(group), zero.ranks) for group in sizes.groups),
            f"b P = {b} x {sizes.trainable:,}",
        )
    ]
    if sizes.frozen:
        items.append(Item(PARAMETERS, "frozen weights", b * sizes.frozen, f"b F = {b} x {sizes.frozen:,}"))
    if sizes.buffer_bytes:
        items.append(Item(PARAMETERS, "buffers", sizes.buffer_bytes, "the model's buffers"))
    part = Partition.heaviest(sizes, zero).size
    if zero.offload_optimizer:
        # runtime/zero/stage_1_and_2.py, __init__: temp_grad_buffer_for_gpu_offload
        staging = Item(OPTIMIZER, "offload staging", b * sizes.largest, f"b P_max = {b} x {sizes.largest:,}")
        return [*items, staging]
    # runtime/zero/stage_1_and_2.py, __init__: single_partition_of_fp32_groups; Adam allocates both moments in
    # its first step (ops/adam/fused_adam.py, FusedAdam.step, or torch.optim.Adam)
    return [
        *items,
        Item(OPTIMIZER, "fp32 master weights", FP32 * part, f"4 P/N = 4 x {part:,}"),
        Item(OPTIMIZER, "Adam moments", 2 * FP32 * part, f"8 P/N = 8 x {part:,}, from the first step on"),
    ]


def _gpu_states_of_stage_3(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    b, n = zero.model_bytes, zero.ranks
    everything = sizes.trainable + sizes.frozen
    small = sum(size for size in sizes.flat if size < zero.persistent_below)
    live = min(zero.max_live + zero.prefetch, everything)
    part = -(-sizes.trainable // n)
    # runtime/zero/partitioned_param_coordinator.py, fetch_sub_module (max_live, prefetch), and
    # runtime/zero/parameter_offload.py, mark_persistent_parameters (small weights)
    items = [
        Item(PARAMETERS, "gathered weights", b * live, f"b min(max_live + prefetch, P + F) = {b} x {live:,}"),
        Item(PARAMETERS, "small weights, never partitioned", b * small, f"b x {small:,} below the threshold"),
    ]
    if not zero.offload_param:
        # runtime/zero/stage3.py, _create_fp16_partitions_with_defragmentation
        items.append(
            Item(PARAMETERS, "own share", b * everything // n, f"b (P + F)/N = {b} x {everything:,} / {n}")
        )
    if not zero.offload_optimizer:
        # runtime/zero/stage3.py, _create_fp32_partitions, initialize_optimizer_states and
        # _setup_for_real_optimizer (grad_partitions_flat_buffer)
        items += [
            Item(OPTIMIZER, "fp32 master weights", FP32 * part, f"4 P/N = 4 x {part:,}"),
            Item(OPTIMIZER, "Adam moments", 2 * FP32 * part, f"8 P/N = 8 x {part:,}, from the first step on"),
            Item(GRADIENTS, "own share", b * part, f"b P/N = {b} x {part:,}"),
        ]
    return items


def step_items(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """Allocations of the optimizer step on one GPU beyond the states; there are no activations then."""
    b = zero.model_bytes
    # runtime/zero/stage_1_and_2.py, get_grad_norm_direct, and runtime/zero/utils.py, get_norm_dtype
    norm = Item(GRADIENTS, "norm in fp64", FP64 * sizes.largest, f"8 P_max = 8 x {sizes.largest:,}")
    if zero.stage == 3:
        return [norm]
    if zero.offload_optimizer:
        # runtime/zero/stage_1_and_2.py, _restore_cpu_offload_grad_to_gpu
        return [Item(GRADIENTS, "one gradient copied back from the host", b * sizes.largest, "b P_max"), norm]
    partition = Partition.heaviest(sizes, zero)
    owned, part = sum(sizes.flat[i] for i in partition.owned), partition.size
    complete = b * sizes.trainable if zero.stage == 1 else 0
    # runtime/zero/stage_1_and_2.py, copy_grads_in_partition: grads_in_partition
    collected = [Item(GRADIENTS, "own gradients", b * owned, f"b x {owned:,}")]
    if complete:
        # runtime/zero/stage_1_and_2.py, reduce_gradients and setup_buckets
        collected += [
            Item(GRADIENTS, "all gradients", complete, f"b P = {b} x {sizes.trainable:,}"),
            Item(COMMUNICATION, "reduce bucket", b * zero.bucket, f"b R = {b} x {zero.bucket:,}"),
        ]
    # runtime/zero/stage_1_and_2.py, step: flat_grad_partition, then its copy single_grad_partition in fp32
    flat = [*collected[:1], Item(GRADIENTS, "flattened", b * part, f"b P/N = {b} x {part:,}")]
    if b != FP32:
        flat.append(Item(GRADIENTS, "in fp32", FP32 * part, f"4 P/N = 4 x {part:,}"))
    widest = max((_padded(sum(group), zero.ranks) // zero.ranks for group in sizes.groups), default=0)
    copies = 1 if zero.device == NVIDIA else 2
    # runtime/zero/stage_1_and_2.py, _optimizer_step.  Measured on two CPU ranks: the collected gradients live
    # until the update is complete.
    update = [
        *(item for item in collected if item.component == GRADIENTS),
        Item(GRADIENTS, "in fp32", FP32 * part, f"4 P/N = 4 x {part:,}"),
        Item(
            OPTIMIZER, "Adam's square roots", copies * FP32 * widest, f"{4 * copies} P/N of the largest group"
        ),
    ]
    return max(([*collected, norm], flat, update), key=lambda items: sum(item.size for item in items))


def host_states(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """Host memory of one rank."""
    # The model is loaded in fp32 on the host: runtime/engine.py, _configure_distributed_model, moves it.
    load = FP32 * (sizes.trainable + sizes.frozen)
    process = Item("process", "Python, torch, CUDA libraries", PROCESS_BYTES[zero.device], "assumed")
    if not zero.offload_optimizer:
        return [process, Item("start", "weights before they move", load, "4 (P + F), freed after the start")]
    b = zero.model_bytes
    partition = Partition.heaviest(sizes, zero)
    part = partition.size
    owned = [sizes.flat[i] for i in partition.owned]
    # runtime/zero/stage_1_and_2.py: __init__ (single_partition_of_fp32_groups,
    # param_buffer_of_bit16_for_cpu_offload_groups, temp_grad_buffer_for_cpu_offload),
    # initialize_optimizer_states (fp32 gradients), async_accumulate_grad_in_cpu_via_gpu (accumulators);
    # Adam's moments: ops/adam/cpu_adam.py, DeepSpeedCPUAdam.step
    items = [
        Item(OPTIMIZER, "fp32 master weights", FP32 * part, f"4 P/N = 4 x {part:,}"),
        Item(GRADIENTS, "fp32 gradients", FP32 * part, f"4 P/N = 4 x {part:,}"),
        Item(OPTIMIZER, "Adam moments", 2 * FP32 * part, f"8 P/N = 8 x {part:,}, from the first step on"),
        Item(PARAMETERS, "updated weights for the GPU", b * part, f"b P/N = {b} x {part:,}"),
        Item(
            GRADIENTS,
            "accumulators",
            b * sum(owned),
            f"b x {sum(owned):,}: parameters this rank owns, also in part",
        ),
        Item(GRADIENTS, "offload staging", b * sizes.largest, f"b P_max = {b} x {sizes.largest:,}"),
    ]
    blocks = [FP32 * part, FP32 * part, b * part, b * sizes.largest, *(b * size for size in owned)]
    if zero.stage == 3:
        # runtime/zero/stage3.py, _create_fp32_partitions and _create_param_groups_fp16_flat_cpu_memory
        everything = sizes.trainable + sizes.frozen
        items = items[:3]
        blocks = blocks[:2]
        if zero.offload_param:
            share = b * everything // zero.ranks
            items.append(
                Item(PARAMETERS, "own share", share, f"b (P + F)/N = {b} x {everything:,} / {zero.ranks}")
            )
            blocks.append(share)
    if zero.pin_memory and zero.device == NVIDIA:
        # torch's CachingHostAllocator rounds each pinned block up to a power of two.
        rounding = sum(_power_of_two(block) - block for block in blocks)
        items.append(
            Item("pinned", "rounding of pinned blocks", rounding, "each rounded up to a power of two")
        )
    resident = sum(item.size for item in items)
    if load > resident:
        items.append(
            Item(
                "start",
                "weights before they move",
                load - resident,
                "4 (P + F), less the items above",
            )
        )
    return [process, *items]


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length() if size else 0
