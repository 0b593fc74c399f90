"""Count the bytes of live tensors while code runs, by origin at the peak.

Every storage that an operator creates is counted from creation to release with its origin: forward or
backward, call of a module, operator.  Works on real tensors of any device and under FakeTensorMode.
Temporary memory inside an operator is not counted.
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Origin:
    """Where a storage was created."""

    phase: str  # "forward", "backward", or "replay": a forward inside the backward
    module: str  # qualified name of the innermost module; in the backward, the autograd node
    call: int  # 0 for the module's first call; in a latent loop, the pass
    operator: str


class LiveBytes(TorchDispatchMode):
    """A context manager that measures `peak` (bytes above those alive at entry) and `at_peak`.

    Without `model`, origins have no module.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.current = 0
        self.peak = 0
        self._peak_live: list[tuple[int, Origin]] = []
        names = [] if self.model is None else self.model.named_modules()
        self._names = {module: name for name, module in names}
        self._calls: Counter[nn.Module] = Counter()
        self._stack: list[nn.Module] = []
        self._live: dict[int, tuple[int, Origin]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "LiveBytes":
        if self.model is not None:
            enter = register_module_forward_pre_hook(self._enter_module)
            leave = register_module_forward_hook(self._leave_module, always_call=True)
            self._hooks = [enter, leave]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # Views and in-place results share the storage of an argument.
            if storage._cdata not in given and storage._cdata not in self._live:
                self._add(storage, func)
        return result

    def by(self, *parts: str) -> list[tuple[tuple[Any, ...], int]]:
        """Bytes at the peak grouped by fields of Origin, largest first: by("module", "operator")."""
        groups: Counter[tuple[Any, ...]] = Counter()
        for origin, size in self.at_peak.items():
            groups[tuple(getattr(origin, part) for part in parts)] += size
        return groups.most_common()

    def _add(self, storage: torch.UntypedStorage, func: Any) -> None:
        size = storage.nbytes()
        self._live[storage._cdata] = size, self._origin(str(func))
        weakref.finalize(storage, self._release, storage._cdata).atexit = False
        self.current += size
        if self.current > self.peak:
            self.peak = self.current
            self._peak_live = list(self._live.values())

    def _release(self, key: int) -> None:
        size, _ = self._live.pop(key)
        self.current -= size

    @property
    def at_peak(self) -> dict[Origin, int]:
        """Bytes of the live storages at the peak, by origin."""
        sizes: Counter[Origin] = Counter()
        for size, origin in self._peak_live:
            sizes[origin] += size
        return dict(sizes)

    def _origin(self, operator: str) -> Origin:
        node = torch._C._current_autograd_node()
        if self._stack:
            module = self._stack[-1]
            phase = "forward" if node is None else "replay"
            return Origin(phase, self._names[module], self._calls[module] - 1, operator)
        if node is not None:
            return Origin("backward", node.name(), 0, operator)
        return Origin("forward", "", 0, operator)

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if module in self._names:
            self._calls[module] += 1
            self._stack.append(module)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]
