"""Record every allocation and release of one forward and backward, and when each gradient is complete.

    trace = record(fake_model, batch)       one run of the real code without storage
    trace.events                            (+bytes, kind), (-bytes, kind), ... and Arrival(parameter)

gradient_path.py replays ZeRO's handling of gradients over the same trace, so one run serves every ds_config
of the same precision.  Storages are followed by weak references, as in torch.distributed._tools.mem_tracker.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from coconut_ds.data.batching import Batch
from coconut_ds.memory.fake_model import FakeModel
from coconut_ds.model.answer_cache import AnswerCache
from coconut_ds.model.coconut import Coconut

ACTIVATIONS, LOSS, GRADIENTS = "activations", "loss", "gradients"


@dataclass(frozen=True)
class Arrival:
    """The gradient of parameter `index` is complete; its storage was released just before."""

    index: int


@dataclass(frozen=True)
class BackwardBegins:
    """The boundary between forward and backward."""


Event = tuple[int, str] | Arrival | BackwardBegins


@dataclass(frozen=True)
class Trace:
    """The allocations and releases of one micro-batch."""

    events: list[Event]
    parameter_sizes: tuple[int, ...]  # elements per trainable parameter, in the optimizer's order

    @property
    def peak(self) -> int:
        """Peak bytes, if each gradient is released as soon as it is complete."""
        return peak_of(self.events)[0]


def peak_of(events: list[Event]) -> tuple[int, dict[str, int]]:
    """Peak bytes, and the bytes of each kind at the peak."""
    total, highest, at_highest = 0, 0, {}
    alive: dict[str, int] = {}
    for event in events:
        if isinstance(event, tuple):
            size, kind = event
            total += size
            alive[kind] = alive.get(kind, 0) + size
            if total > highest:
                highest, at_highest = total, dict(alive)
    return highest, at_highest


class StorageLog(TorchDispatchMode):
    """Calls `note(+bytes, kind)` when an operator allocates a storage and `note(-bytes, kind)` on release.

    `workspace`: temporary bytes inside an operator.

    Autograd adds the gradients of a tensor with several uses in place if nothing else holds them, but not
    under a dispatch mode (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace).  Such a sum is noted
    after the release of its operand, which follows at once.
    """

    def __init__(
        self,
        note: Callable[[int, str], None],
        kind_of: Callable[[Tensor], str],
        workspace: Callable[[Any, tuple[Any, ...]], int] = lambda func, args: 0,
    ) -> None:
        super().__init__()
        self._note, self._kind_of, self._workspace = note, kind_of, workspace
        self._known: dict[int, Any] = {}
        self._sum: tuple[int, str] | None = None  # bytes and kind of a sum not yet noted
        self._operands: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a storage that exists before the run and stays."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note_sum()
        result = func(*args, **(kwargs or {}))
        may_accumulate = func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled()
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, may_accumulate)
        if self._sum is not None:
            self._operands = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        if inside := self._workspace(func, args):
            self._note(inside, ACTIVATIONS)
            self._note(-inside, ACTIVATIONS)
        return result

    def _note_sum(self) -> None:
        if self._sum is not None:
            noted, self._sum = self._sum, None
            self._note(*noted)

    def _see(self, tensor: Tensor, may_accumulate: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._known:
            return
        kind = self._kind_of(tensor)
        self._known[key] = None
        weakref.finalize(storage, self._drop, key, size, kind).atexit = False
        if may_accumulate:
            self._sum = size, kind
        else:
            self._note(size, kind)

    def _drop(self, key: int, size: int, kind: str) -> None:
        self._known.pop(key, None)
        if self._sum is not None and key not in self._operands:
            self._note_sum()
        self._note(-size, kind)
        self._note_sum()


def record(fake_model: FakeModel, batch: Batch) -> Trace:
    """One forward and backward of a micro-batch; each gradient is released when complete."""
    model = fake_model.model
    batch = fake_model.batch(batch)
    events: list[Event] = []
    trainable = [p for p in model.parameters() if p.requires_grad]
    shapes = {tuple(p.shape) for p in trainable} | {tuple(reversed(p.shape)) for p in trainable}
    vocabulary_size = fake_model.vocabulary_size
    is_backward = False

    def kind_of(tensor: Tensor) -> str:
        shape = tuple(tensor.shape)
        if is_backward and shape in shapes:
            return GRADIENTS
        return LOSS if vocabulary_size in shape[-1:] else ACTIVATIONS

    log = StorageLog(lambda size, kind: events.append((size, kind)), kind_of, fake_model.workspace)
    for tensor in (*model.parameters(), *model.buffers(), *_tensors(batch)):
        log.ignore(tensor)
    with fake_model.running(), _dropping_gradients(trainable, events), log:
        loss = model(batch)
        is_backward = True
        events.append(BackwardBegins())
        loss.backward()
        del loss
    return Trace(list(events), tuple(p.numel() for p in trainable))


def record_evaluation(fake_model: FakeModel, batch: Batch, max_new_tokens: int = 0) -> Trace:
    """One forward without gradients, or with `max_new_tokens`, generation of that many tokens."""
    model = fake_model.model
    batch = fake_model.batch(batch)
    events: list[Event] = []
    vocabulary_size = fake_model.vocabulary_size
    log = StorageLog(
        lambda bytes_, kind: events.append((bytes_, kind)),
        lambda tensor: LOSS if vocabulary_size in tensor.shape[-1:] else ACTIVATIONS,
        fake_model.workspace,
    )
    for tensor in (*model.parameters(), *model.buffers(), *_tensors(batch)):
        log.ignore(tensor)
    model.eval()
    with fake_model.running(), torch.no_grad(), log:
        result = _last_logits(model, batch, max_new_tokens) if max_new_tokens else model(batch)
        del result
    model.train()
    return Trace(list(events), ())


def _last_logits(model: Coconut, batch: Batch, max_new_tokens: int) -> Tensor:
    """Generation at its two extremes, the prompts and the last token; tokens between are skipped."""
    columns = batch.shape[1] + max_new_tokens - 1
    cache = AnswerCache(model.causal_lm.config.num_hidden_layers, columns + 1)
    mask_BT = F.pad(batch.attention_mask_BT, (0, max_new_tokens), value=1)
    hidden_BD, position_B = model.read_prompts(batch, cache)
    token_B = model.head(hidden_BD).argmax(dim=-1)
    cache.fill(columns - 1)
    return model.head(model.read_tokens(token_B, mask_BT[:, :columns], position_B, cache))


@contextmanager
def _dropping_gradients(parameters: list[nn.Parameter], events: list[Event]) -> Iterator[None]:
    def drop(index: int, parameter: Tensor) -> None:
        parameter.grad = None
        events.append(Arrival(index))

    handles = [
        p.register_post_accumulate_grad_hook(lambda p, index=index: drop(index, p))
        for index, p in enumerate(parameters)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]
