"""What DeepSpeed 0.19.8 keeps on each GPU and host: formulas of the states, and a replay of the backward.

Symbols: P trainable elements, F frozen elements, P_max elements of the largest trainable tensor, b bytes per
element of the model's dtype, N ranks, R reduce_bucket_size.  File names in the comments are below deepspeed/.

`replay` follows one trace of a micro-batch, in which every gradient is dropped when it is complete, and keeps
each gradient as DeepSpeed does with `managed_gradient_accumulation: false`: in the bucket, in a flattened
copy, then with its owner.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from coconut_ds.config.deepspeed import DeepSpeedConfig
from coconut_ds.memory.fake_run import GRADIENTS, Arrival, BackwardBegins, Trace
from coconut_ds.model.quantization import NF4Linear

PARAMETERS, OPTIMIZER, COMMUNICATION = "parameters", "optimizer", "communication"
EIGHT_BIT, FP32, FP64 = 1, 4, 8
NVIDIA = "cuda"
# With more ranks than this, only a sample of them is replayed.
MAX_RANKS = 8
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
    quantized: int = 0  # weights in 4 bits; their bytes are buffers

    @classmethod
    def of(cls, model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> "Sizes":
        """The sizes of a model; `groups`: its optimizer's parameter groups."""
        return cls(
            groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
            frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
            quantized=sum(
                layer.in_features * layer.out_features
                for layer in model.modules()
                if isinstance(layer, NF4Linear)
            ),
        )

    @property
    def trainable(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def elements(self) -> int:
        return self.trainable + self.frozen + self.quantized

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
    master_bytes: int = FP32  # per element of the master weights, and of the gradients on the host
    moment_bytes: int = FP32
    rounds_up_to: int | None = None  # pinned blocks of at most so many bytes are rounded up; None: all
    saved_bytes: int = FP32  # per element of the weights that become 4 bits, when they are loaded

    @property
    def bucket_bytes(self) -> int:
        # runtime/zero/stage_1_and_2.py, setup_buckets
        return self.model_bytes * self.bucket * (2 if self.overlap and self.stage < 3 else 1)

    @classmethod
    def of(
        cls,
        ds_config: DeepSpeedConfig,
        ranks: int,
        accumulates: bool,
        device: str,
        rounds_up_to: int | None = None,
        saved_bytes: int = FP32,
    ) -> "ZeroSettings":
        # Defaults: runtime/zero/config.py, DeepSpeedZeroConfig.
        zero: dict[str, Any] = dict(ds_config.stock["zero_optimization"])
        master, moments = _state_bytes(ds_config)
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
            master_bytes=master,
            moment_bytes=moments,
            rounds_up_to=rounds_up_to,
            saved_bytes=saved_bytes,
        )


def _state_bytes(ds_config: DeepSpeedConfig) -> tuple[int, int]:
    """Bytes per element of the master weights and of each of Adam's moments."""
    kind = ds_config.precision
    block: dict[str, Any] = dict(ds_config.stock.get(kind, {}))
    # runtime/base_optimizer.py, _configure_master_weights
    master = 2 if block.get(f"{kind}_master_weights_and_grads") else FP32
    params = ds_config.stock["optimizer"].get("params", {})
    # runtime/engine.py, _configure_basic_optimizer; ops/adam/cpu_adam.py, step: moments in the dtype of the
    # master weights.  torch's AdamW makes them so too.
    in_fp32 = params.get("fp32_optimizer_states", True) and not block.get("bf16_optimizer_states")
    if ds_config.eight_bit_moments:
        return master, EIGHT_BIT
    uses_cpu_adam = ds_config.offload_optimizer and not params.get("torch_adam")
    return master, FP32 if uses_cpu_adam and in_fp32 else master


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


def _product(component: str, name: str, symbols: str, factor: int, elements: int, more: str = "") -> Item:
    """An item of `factor * elements` bytes, with its formula in symbols and in numbers."""
    return Item(component, name, factor * elements, f"{symbols} = {factor} x {elements:,}{more}")


def _master_weights_and_moments(part: int, zero: ZeroSettings) -> list[Item]:
    # runtime/zero/stage_1_and_2.py, __init__: single_partition_of_fp32_groups; runtime/zero/stage3.py,
    # _create_fp32_partitions and initialize_optimizer_states.  Adam allocates both moments in its first step:
    # ops/adam/fused_adam.py, FusedAdam.step, torch.optim.Adam, or ops/adam/cpu_adam.py, DeepSpeedCPUAdam.step
    b, m = zero.master_bytes, zero.moment_bytes
    master = _product(OPTIMIZER, _in_bits("master weights", zero), f"{b} P/N", b, part)
    since = ", from the first step on"
    if m > EIGHT_BIT:
        return [master, _product(OPTIMIZER, "Adam moments", f"{2 * m} P/N", 2 * m, part, since)]
    # bitsandbytes/optim/optimizer.py, init_state: two fp32 scales for every 256 elements, two tables of 256
    size = 2 * part + 2 * FP32 * (-(-part // 256) + 256)
    formula = f"2 P/N + 8 P/N / 256 = 2.03 x {part:,}{since}"
    return [master, Item(OPTIMIZER, "8-bit Adam moments", size, formula)]


def _in_bits(name: str, zero: ZeroSettings) -> str:
    return f"{'fp32' if zero.master_bytes == FP32 else '16-bit'} {name}"


def gpu_states(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """States on one GPU after the first optimizer step."""
    if zero.stage == 3:
        return _gpu_states_of_stage_3(sizes, zero)
    b = zero.model_bytes
    # runtime/zero/stage_1_and_2.py, __init__: bit16_groups_flat holds all parameters on every rank
    flat = b * sum(_padded(sum(group), zero.ranks) for group in sizes.groups)
    items = [Item(PARAMETERS, "trainable weights", flat, f"b P = {b} x {sizes.trainable:,}")]
    if sizes.frozen:
        items.append(_product(PARAMETERS, "frozen weights", "b F", b, sizes.frozen))
    if sizes.buffer_bytes:
        items.append(Item(PARAMETERS, "buffers", sizes.buffer_bytes, "the model's buffers"))
    if zero.offload_optimizer:
        # runtime/zero/stage_1_and_2.py, __init__: temp_grad_buffer_for_gpu_offload
        return [*items, _product(OPTIMIZER, "offload staging", "b P_max", b, sizes.largest)]
    return items + _master_weights_and_moments(Partition.heaviest(sizes, zero).size, zero)


def _gpu_states_of_stage_3(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    b, n = zero.model_bytes, zero.ranks
    everything = sizes.trainable + sizes.frozen
    small = sum(size for size in sizes.flat if size < zero.persistent_below)
    live = min(zero.max_live + zero.prefetch, everything)
    part = -(-sizes.trainable // n)
    # runtime/zero/partitioned_param_coordinator.py, fetch_sub_module (max_live, prefetch), and
    # runtime/zero/parameter_offload.py, mark_persistent_parameters (small weights)
    items = [
        _product(PARAMETERS, "gathered weights", "b min(max_live + prefetch, P + F)", b, live),
        Item(PARAMETERS, "small weights, never partitioned", b * small, f"b x {small:,} below the threshold"),
    ]
    if not zero.offload_param:
        # runtime/zero/stage3.py, _create_fp16_partitions_with_defragmentation
        items.append(_own_share(b, everything, n))
    if not zero.offload_optimizer:
        # runtime/zero/stage3.py, _setup_for_real_optimizer (grad_partitions_flat_buffer)
        items += _master_weights_and_moments(part, zero)
        items.append(_product(GRADIENTS, "own share", "b P/N", b, part))
    return items


def _own_share(b: int, everything: int, n: int) -> Item:
    return Item(PARAMETERS, "own share", b * everything // n, f"b (P + F)/N = {b} x {everything:,} / {n}")


def step_items(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """Allocations of the optimizer step on one GPU beyond the states; there are no activations then."""
    b = zero.model_bytes
    # runtime/zero/stage_1_and_2.py, get_grad_norm_direct, and runtime/zero/utils.py, get_norm_dtype
    norm = _product(GRADIENTS, "norm in fp64", "8 P_max", FP64, sizes.largest)
    if zero.stage == 3:
        return [norm]
    # runtime/utils.py, all_gather_dp_groups: without a GPU, gloo copies what it gathers
    weights = max(sum(group) for group in sizes.groups) if zero.ranks > 1 and zero.device != NVIDIA else 0
    gathered = [Item(COMMUNICATION, "gathered weights", b * weights, "b P")]
    if zero.offload_optimizer:
        # runtime/zero/stage_1_and_2.py, _restore_cpu_offload_grad_to_gpu
        one = Item(GRADIENTS, "one gradient copied back from the host", b * sizes.largest, "b P_max")
        return max([one, norm], gathered, key=_total)
    partition = Partition.heaviest(sizes, zero)
    owned = sum(sizes.flat[i] for i in partition.owned)
    # runtime/zero/stage_1_and_2.py, copy_grads_in_partition: grads_in_partition
    collected = [Item(GRADIENTS, "own gradients", b * owned, f"b x {owned:,}")]
    moments = [[*collected, norm], gathered]
    if zero.stage == 1:
        # runtime/zero/stage_1_and_2.py, reduce_gradients, at the first full bucket: its gradients have moved
        # into it, and are copied or collected.  The others and the bucket are freed before the norm.
        moved = max(total for total in accumulate(sizes.flat, initial=0) if total <= zero.bucket)
        left = sizes.trainable - min(moved, owned)
        others = Item(GRADIENTS, "gradients not yet reduced", b * left, f"b x {left:,}")
        moments.append([*collected, others, Item(COMMUNICATION, "reduce bucket", zero.bucket_bytes, "b R")])
    for number, group in enumerate(sizes.groups, 1):
        share = _padded(sum(group), zero.ranks) // zero.ranks
        # runtime/zero/stage_1_and_2.py, step: flat_grad_partition, then its copy in fp32
        in_fp32 = _product(GRADIENTS, "in fp32", "4 P/N", FP32, share)
        flat = [collected[0], _product(GRADIENTS, "flattened", "b P/N", b, share)]
        moments.append(flat if b == FP32 else [*flat, in_fp32])
        # runtime/zero/stage_1_and_2.py, _optimizer_step.  Collected gradients of all groups are parts of one
        # tensor, which lives until those of the last group are flattened.
        held = collected if number < len(sizes.groups) else []
        copies = 1 if zero.device == NVIDIA else 2
        if zero.moment_bytes == EIGHT_BIT:  # one kernel on a GPU; on the CPU, moments and roots in fp32
            copies = 0 if zero.device == NVIDIA else 5
        roots = _product(OPTIMIZER, "Adam's square roots", f"{4 * copies} P/N", FP32 * copies, share)
        moments.append([*held, in_fp32, roots])
    return max(moments, key=_total)


def _total(items: Sequence[Item]) -> int:
    return sum(item.size for item in items)


def host_states(sizes: Sizes, zero: ZeroSettings) -> list[Item]:
    """Host memory of one rank."""
    # The model is loaded in fp32 on the host: runtime/engine.py, _configure_distributed_model, moves it.
    # Weights that become 4 bits have the dtype of their file: model/loading.py.
    load, start = FP32 * (sizes.trainable + sizes.frozen), "weights before they move"
    load += zero.saved_bytes * sizes.quantized
    symbols = "4 (P + F)" + (f" + {zero.saved_bytes} Q" if sizes.quantized else "")
    process = Item("process", "Python, torch, CUDA libraries", PROCESS_BYTES[zero.device], "assumed")
    if not zero.offload_optimizer:
        return [process, Item("start", start, load, f"{symbols}, freed after the start")]
    items, blocks = _offloaded(sizes, zero)
    if zero.pin_memory and zero.device == NVIDIA:
        # torch's CachingHostAllocator rounds each pinned block up to a power of two, or only those below
        # pinned_max_round_threshold_mb.
        limit = zero.rounds_up_to
        rounded = [block for block in blocks if block and (limit is None or block <= limit)]
        rounding = sum((1 << (block - 1).bit_length()) - block for block in rounded)
        formula = "each rounded up to a power of two"
        formula += "" if limit is None else f", those up to {limit >> 20} MiB"
        items.append(Item("pinned", "rounding of pinned blocks", rounding, formula))
    resident = sum(item.size for item in items)
    if load > resident:
        items.append(Item("start", start, load - resident, f"{symbols}, less the items above"))
    return [process, *items]


def _offloaded(sizes: Sizes, zero: ZeroSettings) -> tuple[list[Item], list[int]]:
    """The host's states with an offloaded optimizer, and the bytes of each pinned block."""
    b, partition = zero.model_bytes, Partition.heaviest(sizes, zero)
    part, owned = partition.size, [sizes.flat[i] for i in partition.owned]
    master, moments = _master_weights_and_moments(part, zero)
    # runtime/zero/stage_1_and_2.py, initialize_optimizer_states (fp32 gradients)
    b_master = zero.master_bytes
    gradients = _product(GRADIENTS, _in_bits("gradients", zero), f"{b_master} P/N", b_master, part)
    items = [master, gradients, moments]
    blocks = [b_master * part, b_master * part]
    if zero.stage == 3:
        # runtime/zero/stage3.py, _create_param_groups_fp16_flat_cpu_memory
        if zero.offload_param:
            items.append(_own_share(b, sizes.trainable + sizes.frozen, zero.ranks))
            blocks.append(items[-1].size)
        return items, blocks
    # runtime/zero/stage_1_and_2.py: __init__ (param_buffer_of_bit16_for_cpu_offload_groups,
    # temp_grad_buffer_for_cpu_offload), async_accumulate_grad_in_cpu_via_gpu (accumulators)
    total = sum(owned)
    items += [
        _product(PARAMETERS, "updated weights for the GPU", "b P/N", b, part),
        _product(GRADIENTS, "offload staging", "b P_max", b, sizes.largest),
    ]
    blocks += [b * part, b * sizes.largest]
    if b_master == FP32:  # 16-bit gradients are summed where the optimizer reads them
        formula = f"b x {total:,}: parameters this rank owns, also in part"
        items.append(Item(GRADIENTS, "accumulators", b * total, formula))
        blocks += [b * size for size in owned]
    return items, blocks


def replay(trace: Trace, sizes: Sizes, zero: ZeroSettings) -> "Replay":
    """The replay of `trace` on the rank with the highest peak.

    The owner of the last layers holds gradients early in the backward, while most activations are alive.
    The owner of the most parameters may hold them only at the end.  `sizes.flat` is in the trace's order.
    """
    assert sizes.flat == trace.parameter_sizes
    partitions = Partition.of_every_rank(sizes, zero)
    step = -(-len(partitions) // MAX_RANKS)
    return max((Replay(trace, sizes, zero, p) for p in partitions[::step]), key=lambda run: run.peak)


class Replay:
    """Memory of the rank that owns `partition` during a micro-batch, with contiguous gradients.

    peak: bytes beyond the persistent states;  parts: bytes of each kind then;  own: peak of each kind
    """

    def __init__(self, trace: Trace, sizes: Sizes, zero: ZeroSettings, partition: Partition) -> None:
        self.sizes, self.zero, self.partition = sizes, zero, partition
        self.owned = set(partition.owned)
        self.owned_bytes = zero.model_bytes * sum(sizes.flat[i] for i in self.owned)
        self.alive: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self.total = self.peak = 0
        self.is_backward = self.peak_in_backward = False
        self.bucket: list[int] = []
        self.elements = 0
        self.has_bucket = self.has_partition = False
        self.held: dict[int, int] = {}
        # runtime/zero/stage_1_and_2.py: stage 1 accumulates in each param.grad until reduce_gradients;
        # stage 2 in all_grad_tensors (independent_gradient_partition_epilogue).
        if zero.stage == 1 and zero.accumulates:  # the bucket stays until then, too
            self.add(zero.model_bytes * sizes.trainable, GRADIENTS)
            self.has_bucket = True
            self.add(zero.bucket_bytes, COMMUNICATION)
        if zero.stage == 2 and zero.accumulates and not zero.offload_optimizer:
            self.add(self.owned_bytes, GRADIENTS)
        for event in trace.events:
            if isinstance(event, BackwardBegins):
                self.is_backward = True
            elif isinstance(event, Arrival):
                self.arrive(event.index)
            else:
                self.add(*event)
        if zero.stage == 2:
            self.reduce()

    def add(self, size: int, kind: str) -> None:
        self.alive[kind] += size
        self.total += size
        self.own[kind] = max(self.own[kind], self.alive[kind])
        if self.total > self.peak:
            self.peak, self.parts, self.peak_in_backward = self.total, +self.alive, self.is_backward

    def briefly(self, size: int, kind: str) -> None:
        self.add(size, kind)
        self.add(-size, kind)

    def arrive(self, index: int) -> None:
        b, size = self.zero.model_bytes, self.sizes.flat[index]
        if not self.has_bucket:
            self.has_bucket = True
            self.add(self.zero.bucket_bytes, COMMUNICATION)
        if self.zero.stage == 3:  # approximately: each gradient passes through the bucket and is freed
            # runtime/zero/stage3.py, __add_grad_to_ipg_bucket and __reduce_and_partition_ipg_grads
            self.briefly(2 * b * size if size > self.zero.bucket else b * size, GRADIENTS)
            return
        if self.zero.stage == 1:
            if not self.zero.accumulates:
                self.hold(index)
            return
        # runtime/zero/stage_1_and_2.py, reduce_independent_p_g_buckets_and_remove_grads
        if self.elements + size > self.zero.bucket:
            self.reduce()
        if size > self.zero.bucket:
            if self.zero.offload_optimizer:
                self.briefly(2 * b * size, GRADIENTS)
            self.hold(index)
        else:
            self.briefly(b * size, GRADIENTS)
        self.bucket.append(index)
        self.elements += size

    def hold(self, index: int) -> None:
        self.held[index] = self.zero.model_bytes * self.sizes.flat[index]
        self.add(self.held[index], GRADIENTS)

    def release(self, index: int) -> None:
        self.add(-self.held.pop(index, 0), GRADIENTS)

    def reduce(self) -> None:
        """Average the bucket over the ranks and pass each gradient to its owner."""
        # runtime/zero/stage_1_and_2.py, average_tensor and allreduce_bucket: slices of several owners are
        # flattened into a copy
        runs = [owners for i in self.bucket for owners in self.partition.parts[i]]
        slices = sum(1 for before, after in zip([None, *runs], runs, strict=False) if before != after)
        if slices > 1 and self.zero.ranks > 1:
            self.briefly(self.zero.model_bytes * self.elements, COMMUNICATION)
        # runtime/zero/stage_1_and_2.py, reduce_ipg_grads and copy_grads_in_partition
        for index in self.bucket:
            is_kept = index in self.owned and not self.zero.offload_optimizer
            if is_kept and not self.has_partition:
                self.has_partition = True
                self.add(self.owned_bytes, GRADIENTS)
            if is_kept or index not in self.owned:
                self.release(index)
        self.bucket, self.elements = [], 0
