"""Test whether the latents matter: replace what fills their slots and compare the answers.

    intact   [x0][x1][x2]      zero   [0][0][0]      mean   [m0][m1][m2]   the batch's mean of each slot
    noise    [r0][r1][r2]  of the same norms         shuffle  [x1][x2][x0]   swap  another problem's
    fewer    [x0]              none   no slot at all

The thoughts of an intact pass are recorded, changed and replayed in place of the model's thought.  The latent
loop itself stays the same.

Shapes: B rows, K latent slots, D hidden size.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from coconut_ds.data.batching import PADDING_ROW, Batch
from coconut_ds.data.curriculum import Stage
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.intervals import mcnemar_exact, p_value_text, percent_with_interval
from coconut_ds.model.coconut import Choose, Coconut, most_likely
from coconut_ds.thoughts import History, Thought

# (latents_BKD, real_BK: the slots that counted rows have, generator) -> replacement latents_BKD
Change = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def zeros(latents_BKD: Tensor, real_BK: Tensor, generator: torch.Generator) -> Tensor:
    return torch.zeros_like(latents_BKD)


def batch_mean(latents_BKD: Tensor, real_BK: Tensor, generator: torch.Generator) -> Tensor:
    """Each slot's mean over the rows that have it."""
    weights_BK1 = real_BK[..., None].to(latents_BKD.dtype)
    sum_1KD = (latents_BKD * weights_BK1).sum(0, keepdim=True)
    mean_1KD = sum_1KD / weights_BK1.sum(0, keepdim=True).clamp(min=1)
    return mean_1KD.expand_as(latents_BKD)


def matched_noise(latents_BKD: Tensor, real_BK: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction of the same norm."""
    noise_BKD = torch.randn(latents_BKD.shape, generator=generator).to(latents_BKD)
    norm_BK1 = latents_BKD.float().norm(dim=-1, keepdim=True).to(latents_BKD.dtype)
    return nn.functional.normalize(noise_BKD, dim=-1) * norm_BK1


def other_order(latents_BKD: Tensor, real_BK: Tensor, generator: torch.Generator) -> Tensor:
    """Each row's latents rotated by a random number of slots; a single latent stays."""
    slots_BK = torch.arange(latents_BKD.shape[1]).repeat(len(latents_BKD), 1)
    for row, count in enumerate(real_BK.sum(1).tolist()):
        if count > 1:
            shift = int(torch.randint(1, count, (), generator=generator))
            slots_BK[row, :count] = (slots_BK[row, :count] + shift) % count
    return latents_BKD.gather(1, slots_BK[..., None].to(latents_BKD.device).expand_as(latents_BKD))


class OtherProblems:
    """The latent of the same slot in the next row that has it; a single row uses an earlier batch."""

    def __init__(self) -> None:
        self.earlier: dict[int, Tensor] = {}

    def __call__(self, latents_BKD: Tensor, real_BK: Tensor, generator: torch.Generator) -> Tensor:
        swapped_BKD = latents_BKD.clone()
        for slot in range(latents_BKD.shape[1]):
            rows = real_BK[:, slot].nonzero().squeeze(1)
            if len(rows) > 1:
                swapped_BKD[rows, slot] = latents_BKD[rows.roll(1), slot]
            elif len(rows) and slot in self.earlier:
                swapped_BKD[rows, slot] = self.earlier[slot]
            if len(rows):
                self.earlier[slot] = latents_BKD[rows[0], slot].clone()
        return swapped_BKD


class OnlySlot:
    """A change of one slot (from 1); the others keep their latents."""

    def __init__(self, change: Change, slot: int) -> None:
        self.change, self.slot = change, slot

    def __call__(self, latents_BKD: Tensor, real_BK: Tensor, generator: torch.Generator) -> Tensor:
        changed_BKD = latents_BKD.clone()
        column = slice(self.slot - 1, self.slot)
        changed_BKD[:, column] = self.change(latents_BKD, real_BK, generator)[:, column]
        return changed_BKD


CHANGES: dict[str, Callable[[], Change]] = {
    "zero": lambda: zeros,
    "mean": lambda: batch_mean,
    "noise": lambda: matched_noise,
    "shuffle": lambda: other_order,
    "swap": OtherProblems,
}
ABLATIONS = (*CHANGES, "fewer", "none")
ONE_SLOT = re.compile(r"(zero|mean|noise|swap):([1-9]\d*)")


def parse_ablations(text: str) -> tuple[str, ...]:
    """'zero,swap:2' -> ('zero', 'swap:2'); 'all' stands for all of ABLATIONS.  Raises ConfigError."""
    names: list[str] = []
    for name in map(str.strip, text.split(",")):
        names += ABLATIONS if name == "all" else [name]
    unknown = [name for name in names if name not in ABLATIONS and not ONE_SLOT.fullmatch(name)]
    if unknown:
        raise ConfigError(f"--ablate: {unknown[0]!r} is not an ablation; use {', '.join(ABLATIONS)} or 'all'")
    return tuple(dict.fromkeys(names))


def ablated_stage(stage: Stage, name: str) -> Stage:
    """The stage with half of the latent slots (fewer) or none; other ablations keep the stage."""
    kept = {"fewer": stage.num_latents // 2, "none": 0}
    return replace(stage, num_latents=kept.get(name, stage.num_latents))


class Ablator:
    """Applies one ablation to the batches of one evaluation."""

    def __init__(self, name: str, seed: int) -> None:
        self._change: Change | None = CHANGES[name]() if name in CHANGES else None
        if slot := ONE_SLOT.fullmatch(name):
            self._change = OnlySlot(CHANGES[slot[1]](), int(slot[2]))
        self._generator = torch.Generator().manual_seed(seed)

    @contextmanager
    def on(self, model: Coconut, batch: Batch) -> Iterator[Choose]:
        """A context in which each pass of `model` over `batch` gets the changed latents."""
        if self._change is None or batch.num_latents == 0:
            yield most_likely
            return
        latents_BKD = record_latents(model, batch)
        slots_K = torch.arange(batch.num_latents, device=latents_BKD.device)
        counted_B = torch.tensor([index != PADDING_ROW for index in batch.indices]).to(latents_BKD.device)
        real_BK = (slots_K < batch.latents_per_row_B[:, None]) & counted_B[:, None]
        replay = Replay(self._change(latents_BKD, real_BK, self._generator))
        with thought_of(model, replay):
            yield most_likely


@torch.no_grad()
def record_latents(model: Coconut, batch: Batch) -> Tensor:
    """The thoughts of the model in every latent column of all rows: latents_BKD."""
    recorder = Recorder(model.thought)
    with thought_of(model, recorder):
        model.hidden_states(batch)
    return torch.stack(recorder.seen, dim=1) if recorder.seen else model.embedding(batch.input_ids_BT[:, :0])


@contextmanager
def thought_of(model: Coconut, thought: Thought) -> Iterator[None]:
    """A context in which `model` has this thought."""
    own, model.thought = model.thought, thought
    try:
        yield
    finally:
        model.thought = own


class Recorder(Thought):
    """A thought that records its outputs."""

    def __init__(self, thought: Thought) -> None:
        nn.Module.__init__(self)
        self.thought = thought
        self.seen: list[Tensor] = []

    def forward(self, history: History) -> Tensor:
        self.seen.append(self.thought(history))
        return self.seen[-1]


class Replay(Thought):
    """A thought that returns given latents slot by slot, starting over after the last."""

    def __init__(self, latents_BKD: Tensor) -> None:
        nn.Module.__init__(self)
        self._latents_KBD = latents_BKD.unbind(1)
        self._slot = 0

    def forward(self, history: History) -> Tensor:
        latents_BD = self._latents_KBD[self._slot]
        self._slot = (self._slot + 1) % len(self._latents_KBD)
        return latents_BD


class Answer(Protocol):
    """The part of a graded answer that a comparison uses."""

    @property
    def correct(self) -> bool: ...
    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class Comparison:
    """An ablated model compared with the intact model on the same items."""

    name: str
    num_items: int
    num_correct: int
    mean_tokens: float  # per answer; without latents a model may write out the steps
    lost: int  # items solved only by the intact model
    gained: int  # items solved only by the ablated model
    p_value: float  # McNemar, exact, two-sided

    @classmethod
    def between(cls, name: str, intact: Sequence[Answer], ablated: Sequence[Answer]) -> "Comparison":
        """Compare answers to the same items in the same order."""
        pairs = [(a.correct, b.correct) for a, b in zip(intact, ablated, strict=True)]
        lost, gained = pairs.count((True, False)), pairs.count((False, True))
        return cls(
            name=name,
            num_items=len(pairs),
            num_correct=sum(right for _, right in pairs),
            mean_tokens=sum(answer.num_tokens for answer in ablated) / max(len(pairs), 1),
            lost=lost,
            gained=gained,
            p_value=mcnemar_exact(lost, gained),
        )

    def against_intact(self) -> dict[str, float]:
        """Numbers for the log line of the ablated model."""
        return {"lost": self.lost, "gained": self.gained, "p_value": self.p_value}

    def __str__(self) -> str:
        return (
            f"{self.name:<8} {percent_with_interval(self.num_correct, self.num_items):<22} "
            f"{self.mean_tokens:5.1f} tokens, lost {self.lost}, gained {self.gained}, "
            f"{p_value_text(self.p_value)}"
        )
