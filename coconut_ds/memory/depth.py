"""The trace of a model with many equal layers, from those of copies of two and three layers.

What happens in the middle of three layers happens in every middle layer of the full model.  Sizes outside of
it that differ between the copies grow by the same number of bytes with every layer: one buffer, for example,
holds the keys and values of all layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from coconut_ds.memory.fake_run import Arrival, Event, Trace
from coconut_ds.memory.zero import Sizes

# Layers of the copies, and the layer that is repeated.
SHALLOW, MIDDLE = (2, 3), 1

T = TypeVar("T")


def with_depth(traces: Sequence[Trace], num_layers: int) -> Trace | None:
    """The trace of a model of `num_layers` layers, or None if the traces of the copies do not correspond.

    `traces`: of the copies with SHALLOW layers.
    """
    low, high = traces
    more = num_layers - SHALLOW[1]
    others = iter(low.events)
    grown: list[Event] = []
    for event, (_, layer) in zip(high.events, high.places, strict=True):
        other = event if layer == MIDDLE else next(others, None)
        if type(event) is not type(other):
            return None
        if isinstance(event, tuple) and isinstance(other, tuple):
            if event[1] != other[1] or (event[0] > 0) != (other[0] > 0):
                return None
            event = event[0] + more * (event[0] - other[0]), event[1]
        grown.append(event)
    indices = _full_indices(high, more)
    events: list[Event] = []
    for event in _repeated(zip(high.places, grown, strict=True), more):
        if isinstance(event, Arrival):
            if not indices[event.index]:
                return None
            event = Arrival(indices[event.index].pop())  # the backward begins with the last layer
        events.append(event)
    is_complete = next(others, None) is None and not any(indices)
    if not is_complete or _sum(events) != _sum(high.events) + more * (_sum(high.events) - _sum(low.events)):
        return None
    return Trace(events, tuple(_of_parameters(high.parameter_layers, high.parameter_sizes, more)))


def sizes_with_depth(
    sizes: Sequence[Sizes], num_layers: int, layers: Sequence[Sequence[int | None]]
) -> Sizes:
    """The sizes of the full model; `layers`: of each parameter of the larger copy's groups."""
    low, high = sizes
    more = num_layers - SHALLOW[1]
    groups = (tuple(_of_parameters(own, group, more)) for own, group in zip(layers, high.groups, strict=True))
    frozen = high.frozen + more * (high.frozen - low.frozen)
    return Sizes(
        tuple(groups),
        frozen,
        high.buffer_bytes + more * (high.buffer_bytes - low.buffer_bytes),
        high.quantized + more * (high.quantized - low.quantized),
    )


def _repeated(values: Iterable[tuple[tuple[int, int | None], T]], more: int) -> Iterator[T]:
    """The values; each run of values of the middle layer comes `more` times more."""
    for (_, layer), group in groupby(values, key=itemgetter(0)):
        part = [value for _, value in group]
        yield from part * (1 + more if layer == MIDDLE else 1)


def _of_parameters(layers: Sequence[int | None], values: Iterable[T], more: int) -> Iterator[T]:
    return _repeated(zip(((0, layer) for layer in layers), values, strict=True), more)


def _full_indices(trace: Trace, more: int) -> list[list[int]]:
    """For each parameter of the copy, the indices in the full model that it stands for."""
    layers = trace.parameter_layers
    indices: list[list[int]] = [[] for _ in layers]
    for full, index in enumerate(_of_parameters(layers, range(len(layers)), more)):
        indices[index].append(full)
    return indices


def _sum(events: Sequence[Event]) -> int:
    return sum(event[0] for event in events if isinstance(event, tuple))
