"""Run a Coconut model on meta tensors, which have a shape and no bytes, and record its allocations.

    fake_model = build_fake_model(...)      the real code on the meta device, cast as DeepSpeed casts it
    trace = record(fake_model, batch)       one forward and backward
    trace.events                            (+bytes, kind), (-bytes, kind), ... and Arrival(parameter)

A plan therefore needs neither weights nor a GPU, and it follows every change of the model's code.  zero.py
replays ZeRO's handling of gradients over the same trace, so one run serves every ds_config of the same
precision.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, PretrainedConfig

from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import Experiment
from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import AnswerCache, Coconut
from coconut_ds.model.loading import DTYPES
from coconut_ds.thoughts import ThoughtSettings, build_thought

ACTIVATIONS, LOSS, GRADIENTS = "activations", "loss", "gradients"
aten = torch.ops.aten
ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass(frozen=True)
class FakeModel:
    """A model without storage."""

    model: Coconut
    device: str  # "cuda" or "cpu": the device whose kernels and code paths are used

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers; none if the model keeps them in another way."""
        decoder, count = self.model.causal_lm.get_decoder(), self.model.causal_lm.config.num_hidden_layers
        lists = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return next(lists, nn.ModuleList())

    def layers_of(self, parameters: Sequence[Tensor]) -> list[int | None]:
        """The decoder layer of each parameter, None for others."""
        layers = {id(p): index for index, layer in enumerate(self.layers) for p in layer.parameters()}
        return [layers.get(id(parameter)) for parameter in parameters]

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which the model can be called with batches from `batch`."""
        with fused_attention(), looking_like_cuda() if self.device == "cuda" else nullcontext():
            yield

    def batch(self, batch: Batch) -> Batch:
        """The same batch without storage."""
        tensors: dict[str, Any] = {
            name: value.to("meta") for name, value in vars(batch).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(batch, **tensors)


@contextmanager
def looking_like_cuda() -> Iterator[None]:
    """Let tensors report `is_cuda`: code that checks the device then takes its GPU path.

    A TorchFunctionMode cannot do this: autograd disables it in the backward, where checkpointed layers run
    again.
    """
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let the attention of meta tensors run as the fused kernel wherever real tensors would take it.

    ATen always takes the composite one for them (aten/src/ATen/native/transformers/attention.cpp).  With
    dropout, the fused kernel of a GPU saves a seed, while a CPU saves every probability.
    """
    attention, choice = F.scaled_dot_product_attention, aten._fused_sdp_choice.default

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        dropout = 0.0 if query.is_cuda else dropout_p
        given = (query, key, value, attn_mask, dropout, is_causal)
        if not choice.redispatch(ON_CPU, *given, scale=scale, enable_gqa=enable_gqa):
            return attention(*given, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


def build_fake_model(
    experiment: Experiment,
    config: PretrainedConfig,
    vocabulary_size: int,
    special_token_ids: Sequence[int],
    latent_memory: LatentMemory,
    precision: str = "fp32",
    device: str = "cuda",
) -> FakeModel:
    """The experiment's model in training mode.  Raises ConfigError if it does not support a technique."""
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
        )
        if base.get_input_embeddings().weight.shape[0] < vocabulary_size:
            base.resize_token_embeddings(vocabulary_size, mean_resizing=False)
        thought = build_thought(experiment.thought, base.config.hidden_size, ThoughtSettings.of(experiment))
        if not experiment.method.has_latents:
            thought.requires_grad_(False)
        if experiment.tuning == "lora":
            from coconut_ds.model.lora import add_adapters  # imports PEFT

            base = add_adapters(base, experiment, special_token_ids)
    for parameter in (*base.parameters(), *thought.parameters()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[precision])
    with torch.device("meta"):
        model = Coconut(base, thought, latent_memory)
    model.train()
    return FakeModel(model, device)


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same architecture with fewer layers."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = num_layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:num_layers]
    return shallow


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
    # Of each event: the number of the part of the run, and the decoder layer, None outside of layers.
    places: Sequence[tuple[int, int | None]] = ()
    parameter_layers: tuple[int | None, ...] = ()

    @property
    def peak(self) -> int:
        """Peak bytes, if each gradient is released as soon as it is complete."""
        return peak_of(self.events)


def peak_of(events: Sequence[Event]) -> int:
    """Peak bytes."""
    total = highest = 0
    for event in events:
        if isinstance(event, tuple):
            total += event[0]
            highest = max(highest, total)
    return highest


def cpu_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Temporary bytes inside a CPU operator, which a dispatch mode does not see.

    These are the input copies that ATen's TensorIterator makes in the dtype of the computation; dropout
    multiplies by a bool mask (aten/src/ATen/native/Dropout.cpp) and therefore converts it as well.  GPU
    kernels convert while they read.
    """
    operator = func.overloadpacket
    if operator in (aten.native_dropout, aten.native_dropout_backward):
        return args[0].numel() * args[0].element_size()
    tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
    if operator not in (aten.mul, aten.add, aten.sub, aten.div) or len(tensors) < 2:
        return 0
    common = torch.result_type(*tensors)
    return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common and t.dim())


# Of operators on meta tensors: shape, strides and dtype of each result; IN_PLACE: the first argument.
_results: dict[Any, Any] = {}
IN_PLACE = "in place"


def run_operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator; on meta tensors, where most are slow Python code, run once per shape."""
    if func.is_view or not args or not isinstance(given := args[0], Tensor | list):
        return func(*args, **kwargs)
    first = given[0] if isinstance(given, list) and given else given
    if not (isinstance(first, Tensor) and first.is_meta):
        return func(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        return False  # as if every mask had padding
    key = func, *map(_described, args), *((name, _described(value)) for name, value in kwargs.items())
    known = _results.get(key)
    if known is None:
        result = func(*args, **kwargs)
        _results[key] = IN_PLACE if result is first else _fresh(result, (args, kwargs))
        return result
    if known is IN_PLACE:
        return first
    if known is ...:
        return func(*args, **kwargs)
    made = [_empty(*of) if isinstance(of, tuple) else of for of in known[1]]
    return made[0] if known[0] is Tensor else known[0](made)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else (type(value), value)


def _empty(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _fresh(result: Any, given: Any) -> Any:
    """What `_results` has of results with storages of their own, `...` for others."""
    kind = Tensor if isinstance(result, Tensor) else type(result)
    values = [result] if kind is Tensor else list(result)
    storages = {v.untyped_storage()._cdata for v in tree_iter(given) if isinstance(v, Tensor)}
    described = []
    for value in values:
        if isinstance(value, Tensor):
            own = value.shape, value.stride(), value.dtype
            storage = value.untyped_storage()
            if storage._cdata in storages or storage.nbytes() != _empty(*own).untyped_storage().nbytes():
                return ...
            value = own
        described.append(value)
    return kind, described


class LiveBytes(TorchDispatchMode):
    """A context manager that records when operators allocate storages and when these are released.

    events: (+bytes, kind) and (-bytes, kind), in order.  `workspace`: temporary bytes inside an operator.
    places: of each event, its part of the run and its decoder layer (`enter`); a release outside of layers
    belongs to the layer of the allocation.
    Works on real tensors of any device and on fake ones.  Storages are followed by weak references, as in
    torch.distributed._tools.mem_tracker.

    Autograd adds the gradients of a tensor with several uses in place if nothing else holds them, but not
    under a dispatch mode (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace).  Such a sum is
    recorded after the release of its operand, which follows at once.
    """

    def __init__(
        self,
        kind_of: Callable[[Tensor], str] = lambda tensor: ACTIVATIONS,
        workspace: Callable[[Any, tuple[Any, ...]], int] | None = None,
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.places: list[tuple[int, int | None]] = []
        self._part, self._leaves = 0, False
        self._layer: int | None = None
        self._kind_of, self._workspace = kind_of, workspace
        self._known: dict[int, Any] = {}
        self._sum: tuple[int, str] | None = None  # bytes and kind of a sum not yet recorded
        self._operands: set[int] = set()

    @property
    def current(self) -> int:
        """Bytes alive now."""
        self._record_sum()
        return sum(event[0] for event in self.events if isinstance(event, tuple))

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
        self._record_sum()
        return peak_of(self.events)

    def enter(self, layer: int | None) -> None:
        """Begin another part of the run, in a decoder layer or outside of layers."""
        self._part, self._layer, self._leaves = self._part + 1, layer, False

    def leave_layers(self) -> None:
        """Like `enter(None)`, with the next allocation: releases before it belong to the last layer."""
        self._leaves = True

    def add(self, event: Event, layer: int | None = None) -> None:
        """Append an event; `layer`: outside of layers, the one it belongs to."""
        if self._leaves and isinstance(event, tuple) and event[0] > 0:
            self.enter(None)
        self.events.append(event)
        self.places.append((self._part, layer if self._layer is None else self._layer))

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a storage that exists before the run and stays."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._record_sum()
        result = run_operator(func, args, kwargs or {})
        may_accumulate = func is aten.add.Tensor and not torch.is_grad_enabled()
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, args, kwargs, may_accumulate)
        if self._sum is not None:
            self._operands = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        if self._workspace is not None and (inside := self._workspace(func, args)):
            self.add((inside, ACTIVATIONS))
            self.add((-inside, ACTIVATIONS))
        return result

    def _record_sum(self) -> None:
        if self._sum is not None:
            self.add(self._sum)
            self._sum = None

    def _see(self, tensor: Tensor, args: Any, kwargs: Any, may_accumulate: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0 or key in self._known:
            return
        given = (value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        if any(value.untyped_storage()._cdata == key for value in given):
            return  # a view or an in-place result of a tensor from before the run
        kind = self._kind_of(tensor)
        self._known[key] = None
        weakref.finalize(storage, self._drop, key, size, kind, self._layer).atexit = False
        if may_accumulate:
            self._sum = size, kind
        else:
            self.add((size, kind))

    def _drop(self, key: int, size: int, kind: str, layer: int | None) -> None:
        self._known.pop(key, None)
        if self._sum is not None and key not in self._operands:
            self._record_sum()
        self.add((-size, kind), layer)
        self._record_sum()


def record(fake_model: FakeModel, batch: Batch) -> Trace:
    """One forward and backward of a micro-batch; each gradient is released when complete."""
    model, batch = fake_model.model, fake_model.batch(batch)
    trainable = [p for p in model.parameters() if p.requires_grad]
    shapes = {tuple(p.shape) for p in trainable} | {tuple(reversed(p.shape)) for p in trainable}
    is_backward = False
    log = _log(fake_model, batch, lambda tensor: is_backward and tuple(tensor.shape) in shapes)

    layers = fake_model.layers_of(trainable)

    def drop(index: int, parameter: Tensor) -> None:
        parameter.grad = None
        log.add(Arrival(index), layers[index])

    with ExitStack() as stack:
        for index, parameter in enumerate(trainable):
            hook = parameter.register_post_accumulate_grad_hook(partial(drop, index))
            stack.callback(hook.remove)
        stack.enter_context(fake_model.running())
        stack.enter_context(_following_layers(fake_model, log, lambda: is_backward))
        stack.enter_context(log)
        loss = model(batch)
        is_backward = True
        log.add(BackwardBegins())
        loss.backward()
        log.enter(None)
        del loss
    return Trace(log.events, tuple(p.numel() for p in trainable), log.places, tuple(layers))


def record_evaluation(fake_model: FakeModel, batch: Batch, max_new_tokens: int = 0) -> Trace:
    """One forward without gradients, or with `max_new_tokens`, generation of that many tokens."""
    model, batch = fake_model.model, fake_model.batch(batch)
    log = _log(fake_model, batch)
    model.eval()
    with _following_layers(fake_model, log), fake_model.running(), torch.no_grad(), log:
        result = _last_logits(model, batch, max_new_tokens) if max_new_tokens else model(batch)
        del result
    model.train()
    return Trace(log.events, (), log.places)


@contextmanager
def _following_layers(
    fake_model: FakeModel, log: LiveBytes, is_backward: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Tell `log` when a decoder layer begins and ends, in the forward and in the backward."""

    def begin(layer: int, _: nn.Module, inputs: Any) -> None:
        if is_backward():
            return  # a checkpointed layer runs again
        if layer == 0 and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: log.enter(None))
        log.enter(layer)

    def end(layer: int, _: nn.Module, inputs: Any, outputs: Any) -> None:
        if is_backward():
            return
        hidden = next(value for value in tree_iter(outputs) if isinstance(value, Tensor))
        if hidden.requires_grad:
            hidden.register_hook(lambda _: log.enter(layer))
        if layer == len(fake_model.layers) - 1:
            log.leave_layers()

    with ExitStack() as stack:
        for index, layer in enumerate(fake_model.layers):
            stack.callback(layer.register_forward_pre_hook(partial(begin, index)).remove)
            stack.callback(layer.register_forward_hook(partial(end, index)).remove)
        yield


def _log(
    fake_model: FakeModel, batch: Batch, is_gradient: Callable[[Tensor], bool] = lambda tensor: False
) -> LiveBytes:
    """A recorder that ignores the tensors of the model and of the batch."""
    model: Any = fake_model.model
    vocabulary_size = model.causal_lm.get_input_embeddings().weight.shape[0]

    def kind_of(tensor: Tensor) -> str:
        if is_gradient(tensor):
            return GRADIENTS
        return LOSS if vocabulary_size in tensor.shape[-1:] else ACTIVATIONS

    log = LiveBytes(kind_of, cpu_workspace if fake_model.device == "cpu" else None)
    tensors = (value for value in vars(batch).values() if isinstance(value, Tensor))
    for tensor in (*model.parameters(), *model.buffers(), *tensors):
        log.ignore(tensor)
    return log


def _last_logits(model: Coconut, batch: Batch, max_new_tokens: int) -> Tensor:
    """Generation at its two extremes, the prompts and the last token; tokens between are skipped."""
    columns = batch.shape[1] + max_new_tokens - 1
    cache = AnswerCache(model.causal_lm.config.num_hidden_layers, columns + 1)
    mask_BT = F.pad(batch.attention_mask_BT, (0, max_new_tokens), value=1)
    hidden_BD, position_B = model.read_prompts(batch, cache)
    token_B = model.head(hidden_BD).argmax(dim=-1)
    cache.fill(columns - 1)
    return model.head(model.read_tokens(token_B, mask_BT[:, :columns], position_B, cache))
