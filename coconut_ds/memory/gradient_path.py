"""Replay ZeRO's handling of each gradient over a trace to get the peak of the backward.

The trace drops every gradient on arrival.  The replay keeps it as DeepSpeed 0.19.8 does (file names are below
deepspeed/): in the bucket, in a flattened copy, then with its owner, with
`managed_gradient_accumulation: false`.
"""

from dataclasses import dataclass

from coconut_ds.memory.fake_trace import GRADIENTS, Arrival, BackwardBegins, Event, Trace
from coconut_ds.memory.zero import COMMUNICATION, Partition, Sizes, ZeroSettings

# With more ranks than this, only a sample of them is replayed.
MAX_RANKS = 8


@dataclass(frozen=True)
class Peak:
    """The peak bytes of one micro-batch beyond the persistent states, and what they hold."""

    size: int
    parts: dict[str, int]
    in_backward: bool
    own: dict[str, int]  # the peak bytes of each kind on its own


def replay(trace: Trace, sizes: Sizes, zero: ZeroSettings) -> Peak:
    """The peak of `trace` under `zero` on the rank with the highest peak.

    The owner of the last layers holds gradients early in the backward, while most activations are alive.
    The owner of the most parameters may hold them only at the end.  `sizes.flat` is in the trace's order.
    """
    assert sizes.flat == trace.parameter_sizes
    partitions = Partition.of_every_rank(sizes, zero)
    step = -(-len(partitions) // MAX_RANKS)
    return max((replay_on(trace, sizes, zero, p) for p in partitions[::step]), key=lambda peak: peak.size)


def replay_on(trace: Trace, sizes: Sizes, zero: ZeroSettings, partition: Partition) -> Peak:
    """The peak on the rank that owns `partition`."""
    run = (_StageThree if zero.stage == 3 else _Replay)(sizes, zero, partition)
    for event in trace.events:
        run.take(event)
    run.finish()
    parts = {kind: size for kind, size in run.at_highest.items() if size}
    return Peak(run.highest, parts, run.highest_in_backward, run.own)


class _Replay:
    """ZeRO-1 and ZeRO-2 with contiguous gradients."""

    def __init__(self, sizes: Sizes, zero: ZeroSettings, partition: Partition) -> None:
        self.sizes, self.zero, self.partition = sizes, zero, partition
        self.owned = set(partition.owned)
        self.owned_bytes = zero.model_bytes * sum(sizes.flat[i] for i in self.owned)
        self.alive: dict[str, int] = {}
        self.total = self.highest = 0
        self.at_highest: dict[str, int] = {}
        self.own: dict[str, int] = {}
        self.is_backward = self.highest_in_backward = False
        self.bucket: list[int] = []
        self.elements = 0
        self.has_bucket = self.has_partition = False
        self.held: dict[int, int] = {}
        # runtime/zero/stage_1_and_2.py: stage 1 accumulates in each param.grad until reduce_gradients;
        # stage 2 in all_grad_tensors (independent_gradient_partition_epilogue).
        if zero.stage == 1 and zero.accumulates:
            self.add(zero.model_bytes * sizes.trainable, GRADIENTS)
        if zero.stage == 2 and zero.accumulates and not zero.offload_optimizer:
            self.add(self.owned_bytes, GRADIENTS)

    def take(self, event: Event) -> None:
        if isinstance(event, BackwardBegins):
            self.is_backward = True
        elif isinstance(event, Arrival):
            self.arrive(event.index)
        else:
            self.add(*event)

    def add(self, size: int, kind: str) -> None:
        self.alive[kind] = self.alive.get(kind, 0) + size
        self.total += size
        if self.alive[kind] > self.own.get(kind, 0):
            self.own[kind] = self.alive[kind]
        if self.total > self.highest:
            self.highest, self.at_highest = self.total, dict(self.alive)
            self.highest_in_backward = self.is_backward

    def briefly(self, size: int, kind: str) -> None:
        self.add(size, kind)
        self.add(-size, kind)

    def arrive(self, index: int) -> None:
        b, size = self.zero.model_bytes, self.sizes.flat[index]
        # runtime/zero/stage_1_and_2.py, setup_buckets
        if not self.has_bucket:
            self.has_bucket = True
            self.add(b * self.zero.bucket * (1 + self.zero.overlap), COMMUNICATION)
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
            if index not in self.owned:
                self.release(index)
            elif not self.zero.offload_optimizer:
                if not self.has_partition:
                    self.has_partition = True
                    self.add(self.owned_bytes, GRADIENTS)
                self.release(index)
        self.bucket, self.elements = [], 0

    def finish(self) -> None:
        if self.zero.stage == 2:
            self.reduce()


class _StageThree(_Replay):
    """ZeRO-3, approximately: each gradient passes through the bucket and is freed."""

    def arrive(self, index: int) -> None:
        b, size = self.zero.model_bytes, self.sizes.flat[index]
        if not self.has_bucket:
            self.has_bucket = True
            self.add(b * self.zero.bucket, COMMUNICATION)
        # runtime/zero/stage3.py, __add_grad_to_ipg_bucket and __reduce_and_partition_ipg_grads
        self.briefly(2 * b * size if size > self.zero.bucket else b * size, GRADIENTS)

    def finish(self) -> None:
        return
