"""What ZeRO keeps of a model's states, and where: the formulas of DeepSpeed 0.19.8, item by item.

Symbols: P trainable elements, F frozen elements, P_max the largest trainable tensor, b bytes of an element in
the model's dtype, N ranks, R reduce_bucket_size.  Source: deepspeed/runtime/zero/stage_1_and_2.py.

Knows: sizes of parameters, settings of ZeRO.  Does not know: activations, budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coconut_ds.config.deepspeed import DeepSpeedConfig

PARAMETERS, OPTIMIZER, COMMUNICATION = "parameters", "optimizer", "communication"
GRADIENTS = "gradients"
FP32, FP64 = 4, 8
NVIDIA = "cuda"
# Python, torch, DeepSpeed and, with a GPU, the CUDA libraries of one rank.  An assumption, not a formula.
PROCESS_BYTES = {"cuda": int(3.0 * 2**30), "cpu": int(0.8 * 2**30)}


@dataclass(frozen=True)
class Item:
    """Bytes that one thing takes, and why."""

    component: str
    name: str
    size: int
    formula: str


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's tensors."""

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
    """What decides where states and gradients are."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    pin_memory: bool
    bucket: int  # reduce_bucket_size, elements
    overlap: bool
    round_robin: bool
    ranks: int
    model_bytes: int  # of an element
    accumulates: bool  # more than one micro-batch a step
    device: str  # "cuda" or "cpu"
    prefetch: int = 0  # stage 3, elements
    max_live: int = 0
    persistent_below: int = 0

    @classmethod
    def of(cls, ds_config: DeepSpeedConfig, ranks: int, accumulates: bool, device: str) -> "ZeroSettings":
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
    """Which parameters a rank owns, wholly or in part, in each group."""

    size: int  # elements of one rank's partition, over all groups, padded
    owned: tuple[int, ...]  # indices into Sizes.flat
    parts: tuple[tuple[int, ...], ...]  # for every parameter the ranks that own some of it

    @classmethod
    def of_every_rank(cls, sizes: Sizes, zero: ZeroSettings) -> "list[Partition]":
        """The partitions of ranks 0, 1, ..."""
        parts: list[tuple[int, ...]] = [()] * len(sizes.flat)
        total, first = 0, 0
        for group in sizes.groups:
            size = _padded(sum(group), zero.ranks) // zero.ranks
            total += size
            offset = 0
            for place in _order(len(group), zero):
                start, offset = offset, offset + group[place]
                last = max(start, offset - 1)
                parts[first + place] = tuple(range(start // size, last // size + 1)) if size else ()
            first += len(group)
        return [
            cls(total, tuple(i for i, owners in enumerate(parts) if rank in owners), tuple(parts))
            for rank in range(zero.ranks)
        ]

    @classmethod
    def heaviest(cls, sizes: Sizes, zero: ZeroSettings) -> "Partition":
        """The rank whose parameters are the most, boundary parameters counted whole."""
        return max(
            cls.of_every_rank(sizes, zero), key=lambda partition: sum(sizes.flat[i] for i in partition.owned)
        )


def _order(count: int, zero: ZeroSettings) -> list[int]:
    """The order in which a group is flattened; stage_1_and_2.py `_round_robin_reorder`."""
    if not zero.round_robin:
        return list(range(count))
    return [i for rank in range(zero.ranks) for i in range(rank, count, zero.ranks)]


def _padded(elements: int, ranks: int) -> int:
    alignment = 2 * ranks
    return -(-elements // alignment) * alignment


def gpu_states(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """What stays on one GPU from the first optimizer step on."""
    if zero.stage == 3:
        return _gpu_states_of_stage_3(sizes, zero)
    b = zero.model_bytes
    items = [
        Item(
            PARAMETERS,
            "weights that train",
            b * sum(_padded(sum(group), zero.ranks) for group in sizes.groups),
            f"b P = {b} x {sizes.trainable:,}",
        )
    ]
    if sizes.frozen:
        items.append(Item(PARAMETERS, "frozen weights", b * sizes.frozen, f"b F = {b} x {sizes.frozen:,}"))
    if sizes.buffer_bytes:
        items.append(Item(PARAMETERS, "buffers", sizes.buffer_bytes, "constants of the model"))
    part = Partition.heaviest(sizes, zero).size
    if zero.offload_optimizer:
        staging = Item(OPTIMIZER, "offload staging", b * sizes.largest, f"b P_max = {b} x {sizes.largest:,}")
        return [*items, staging]
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
    items = [
        Item(PARAMETERS, "gathered weights", b * live, f"b min(max_live + prefetch, P + F) = {b} x {live:,}"),
        Item(PARAMETERS, "small weights kept whole", b * small, f"b x {small:,} below the threshold"),
    ]
    if not zero.offload_param:
        items.append(
            Item(PARAMETERS, "own share", b * everything // n, f"b (P + F)/N = {b} x {everything:,} / {n}")
        )
    if not zero.offload_optimizer:
        items += [
            Item(OPTIMIZER, "fp32 master weights", FP32 * part, f"4 P/N = 4 x {part:,}"),
            Item(OPTIMIZER, "Adam moments", 2 * FP32 * part, f"8 P/N = 8 x {part:,}, from the first step on"),
            Item(GRADIENTS, "own share", b * part, f"b P/N = {b} x {part:,}"),
        ]
    return items


def step_items(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """What the optimizer step takes on the GPU on top of the states; no activations live then."""
    b = zero.model_bytes
    norm = Item(GRADIENTS, "norm in fp64", FP64 * sizes.largest, f"8 P_max = 8 x {sizes.largest:,}")
    if zero.stage == 3:
        return [norm]
    if zero.offload_optimizer:
        return [Item(GRADIENTS, "one gradient back from the host", b * sizes.largest, "b P_max"), norm]
    partition = Partition.heaviest(sizes, zero)
    owned, part = sum(sizes.flat[i] for i in partition.owned), partition.size
    whole = b * sizes.trainable if zero.stage == 1 else 0
    collected = [Item(GRADIENTS, "gradients it owns", b * owned, f"b x {owned:,}")]
    if whole:
        collected += [
            Item(GRADIENTS, "whole gradients", whole, f"b P = {b} x {sizes.trainable:,}"),
            Item(COMMUNICATION, "reduce bucket", b * zero.bucket, f"b R = {b} x {zero.bucket:,}"),
        ]
    flat = [*collected[:1], Item(GRADIENTS, "flattened", b * part, f"b P/N = {b} x {part:,}")]
    if b != FP32:
        flat.append(Item(GRADIENTS, "in fp32", FP32 * part, f"4 P/N = 4 x {part:,}"))
    widest = max((_padded(sum(group), zero.ranks) // zero.ranks for group in sizes.groups), default=0)
    copies = 1 if zero.device == NVIDIA else 2
    # Seen on two CPU ranks: what was collected lives until the update is over.
    update = [
        *(item for item in collected if item.component == GRADIENTS),
        Item(GRADIENTS, "in fp32", FP32 * part, f"4 P/N = 4 x {part:,}"),
        Item(
            OPTIMIZER, "Adam's square roots", copies * FP32 * widest, f"{4 * copies} P/N of the largest group"
        ),
    ]
    return max(([*collected, norm], flat, update), key=lambda items: sum(item.size for item in items))


def host_states(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """What one rank keeps in host memory."""
    load = FP32 * (sizes.trainable + sizes.frozen)
    process = Item("process", "Python, torch, CUDA libraries", PROCESS_BYTES[zero.device], "assumed")
    if not zero.offload_optimizer:
        return [process, Item("start", "weights before they move", load, "4 (P + F), gone after the start")]
    b = zero.model_bytes
    partition = Partition.heaviest(sizes, zero)
    part = partition.size
    owned = [sizes.flat[i] for i in partition.owned]
    items = [
        Item(OPTIMIZER, "fp32 master weights", FP32 * part, f"4 P/N = 4 x {part:,}"),
        Item(GRADIENTS, "fp32 gradients", FP32 * part, f"4 P/N = 4 x {part:,}"),
        Item(OPTIMIZER, "Adam moments", 2 * FP32 * part, f"8 P/N = 8 x {part:,}, from the first step on"),
        Item(PARAMETERS, "weights on their way back", b * part, f"b P/N = {b} x {part:,}"),
        Item(
            GRADIENTS,
            "accumulators",
            b * sum(owned),
            f"b x {sum(owned):,}: parameters it owns some of, whole",
        ),
        Item(GRADIENTS, "offload staging", b * sizes.largest, f"b P_max = {b} x {sizes.largest:,}"),
    ]
    blocks = [FP32 * part, FP32 * part, b * part, b * sizes.largest, *(b * size for size in owned)]
    if zero.stage == 3:
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
        rounding = sum(_power_of_two(block) - block for block in blocks)
        items.append(
            Item("pinned", "rounding of pinned blocks", rounding, "each up to a power of two by torch")
        )
    resident = sum(item.size for item in items)
    if load > resident:
        items.append(
            Item("start", "weights before they move", load - resident, "4 (P + F) at the start, the excess")
        )
    return [process, *items]


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length() if size else 0


def trainable_sizes(parameter_groups: Sequence[Sequence[Any]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.numel() for p in group) for group in parameter_groups)
