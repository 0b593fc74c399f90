"""Operators that launch a kernel, and host milliseconds, of one training step.

    python -m benchmarks.launches

Counted by a dispatch mode on tiny tensors, so the host's time is nearly all there is.  Views and metadata are
left out.  One JSON line per model, variant and number of latents; `cpu_ms` is the least process time of a
forward and backward, in turns with the other variants, once the latent passes run from their recordings.
On a GPU an operator may be several kernels.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.textbook import textbook_loss
from benchmarks.train_step import allocate_gradients
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.data.batching import Batch
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought

VOCABULARY = 211
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_layer": 12, "n_embd": 48, "n_head": 12, "n_positions": 128, **NO_DROPOUT}),
    "llama": (
        "llama",
        {
            "hidden_size": 48,
            "intermediate_size": 128,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
    ),
}
VARIANTS = ("textbook", "coconut_ds", "coconut_ds+checkpointing")
ROWS, QUESTION, ANSWER = 2, 10, 3
WARM_UP = 10  # steps until every pass of a batch has been recorded: one a step, none in the first
# Operators without a kernel that are no views by their schema.
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "_local_scalar_dense", "lift_fresh")


@dataclass(frozen=True)
class Launches:
    """Operators of one step that launch a kernel."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


class LaunchCounter(TorchDispatchMode):
    """Counts the operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # below autograd, operators such as `reshape` arrive whole
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if launches(func):
            name = func.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def launches(func: Any) -> bool:
    """Whether an operator runs a kernel: it is neither a view nor metadata."""
    if func.overloadpacket.__name__.startswith(NO_KERNEL):
        return False
    returns = func._schema.returns
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in returns)
    return bool(returns) and not is_view


def count(loss_of: Callable[[Batch], Tensor], batch: Batch) -> Launches:
    """Operators of one forward and backward."""
    with LaunchCounter() as counter:
        loss = loss_of(batch)
        forward = counter.total
        loss.backward()
        return Launches(forward, counter.total - forward)


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """Random weights, tiny; gradients allocated, as in all micro-batches but the first."""
    architecture, settings = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, **{"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2} | settings | changes
    )
    model = AutoModelForCausalLM.from_config(config).train()
    allocate_gradients(model)
    return model


def make_batch(latents: int, rows: int = ROWS, question: int = QUESTION, answer: int = ANSWER) -> Batch:
    """Left-padded rows of unequal length; the last id is the latent's."""
    generator = torch.Generator().manual_seed(0)
    columns = question + latents + answer
    ids = torch.randint(3, VOCABULARY - 1, (rows, columns), generator=generator)
    ids[:, question : question + latents] = VOCABULARY - 1
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    labels = ids.clone()
    labels[:, : question + latents] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch.from_padded(ids, mask, positions, labels, VOCABULARY - 1)


def variant(name: str, model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    """The loss of a variant of `model`, which is changed in place."""
    if name == "textbook":
        return lambda batch: textbook_loss(model, batch)
    settings = LatentMemory()
    if name.endswith("+checkpointing"):
        settings = replace(settings, activation_checkpointing="layers")
    thought = build_thought("last_hidden", model.config.hidden_size, ThoughtSettings())
    return Coconut(model, thought, settings).train()


def cpu_ms(losses: Mapping[str, Callable[[Batch], Tensor]], batch: Batch, repeats: int) -> dict[str, float]:
    """Least process milliseconds of a forward and backward of each variant, in turns."""
    times: dict[str, list[float]] = {kind: [] for kind in losses}
    for _ in range(repeats):
        for kind, loss_of in losses.items():
            start = time.process_time()
            loss_of(batch).backward()
            times[kind].append(time.process_time() - start)
    return {kind: 1000 * min(seconds) for kind, seconds in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--latents", nargs="+", type=int, default=[0, 6])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.models:
        losses = {kind: variant(kind, make_model(name)) for kind in VARIANTS}
        for latents in options.latents:
            batch = make_batch(latents)
            cpu_ms(losses, batch, WARM_UP)
            times = cpu_ms(losses, batch, options.repeats)
            for kind, loss_of in losses.items():
                counted = count(loss_of, batch)
                record = {"model": name, "variant": kind, "latents": latents, **vars(counted)}
                record |= {"operators": counted.total, "cpu_ms": round(times[kind], 2)}
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
