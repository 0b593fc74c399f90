"""Sampled answers: noise or dropout on the latents, temperature on the text; pass@k and majority vote.

    pass@k = mean over problems of 1 - C(n - c, k) / C(n, k)      c of n samples are correct

Sources: pass@k, Chen et al. 2021 (arXiv 2107.03374, section 2.1); majority vote, Wang et al. 2022 (self-
consistency, arXiv 2203.11171); latents plus noise from N(0, sigma^2 I), and dropout while latents are
computed, You et al. 2025 (arXiv 2510.07745).  Here dropout is on the latent itself.

The random numbers of an answer depend on the seed, the problem and the sample only, not on its batch or rank.

Shapes: B rows, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import comb, inf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from coconut_ds.data.batching import Batch
from coconut_ds.data.problems import is_correct
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.ablation import thought_of
from coconut_ds.evaluation.intervals import percent_with_interval, wilson_interval
from coconut_ds.model.coconut import Choose, Coconut, most_likely
from coconut_ds.thoughts import History, Thought

if TYPE_CHECKING:
    from coconut_ds.evaluation.evaluate import Evaluation

LATENT, TEXT = 0, 1  # streams of random numbers of one answer


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; 0: that part is not random."""

    num_samples: int
    temperature: float = 0.0  # of the text
    latent_noise: float = 0.0  # standard deviation of the noise on each component of a latent
    latent_dropout: float = 0.0  # probability that a component is 0; the others are divided by 1 - p

    def __str__(self) -> str:
        scales = [f"{name} {value:g}" for name, value in self.scales().items() if value]
        return ", ".join([f"{self.num_samples} samples", *(scales or ["greedy"])])

    def scales(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "num_samples"}


def parse_sampling(num_samples: int | None, **scales: float | None) -> Sampling | None:
    """The sampling of a command line; None without options.  Raises ConfigError."""
    given = {name: value for name, value in scales.items() if value is not None}
    for name, value in given.items():
        limit = 1.0 if name == "latent_dropout" else inf
        if not 0 <= value < limit:
            raise ConfigError(f"--{name} {value:g}: must be at least 0 and below {limit:g}")
    if num_samples is None and given:
        raise ConfigError(f"--{next(iter(given))} needs --num_samples N, for example --num_samples 8")
    if num_samples is None:
        return None
    if num_samples < 1:
        raise ConfigError(f"--num_samples {num_samples}: must be at least 1")
    if not given:
        raise ConfigError(
            f"--num_samples {num_samples}: all samples would be the greedy answer; add --latent_noise 0.1, "
            "--latent_dropout 0.1 or --temperature 0.7"
        )
    return Sampling(num_samples, **given)


class Sampler:
    """Draws one sample of every answer."""

    def __init__(self, sampling: Sampling, seed: int, sample: int) -> None:
        self._sampling, self._seed, self._sample = sampling, seed, sample

    @contextmanager
    def on(self, model: Coconut, batch: Batch) -> Iterator[Choose]:
        """A context in which `model` reads the prompts of `batch` once; yields the choice of tokens."""
        sampling, text = self._sampling, self._streams(batch, TEXT)

        def choose(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
            total_BV = (logits_BV.double() / sampling.temperature).softmax(-1).cumsum(-1)
            uniform_B1 = torch.tensor([[text[row].random()] for row in rows]).to(total_BV)
            token_B1 = torch.searchsorted(total_BV, uniform_B1 * total_BV[:, -1:], right=True)
            return token_B1[:, 0].clamp(max=logits_BV.shape[1] - 1)

        is_noisy = sampling.latent_noise or sampling.latent_dropout
        noisy = NoisyThought(model.thought, sampling, self._streams(batch, LATENT))
        with thought_of(model, noisy) if is_noisy else nullcontext():
            yield choose if sampling.temperature else most_likely

    def _streams(self, batch: Batch, kind: int) -> list[np.random.Generator]:
        """One stream of random numbers per row; the index of a padding row is -1."""
        return [np.random.default_rng([self._seed, self._sample, index + 1, kind]) for index in batch.indices]


class NoisyThought(Thought):
    """A thought whose output is disturbed; slot by slot, so that each row has one stream for all slots."""

    def __init__(self, thought: Thought, sampling: Sampling, streams: Sequence[np.random.Generator]) -> None:
        nn.Module.__init__(self)
        self.thought, self.sampling, self.streams = thought, sampling, streams

    def forward(self, history: History) -> Tensor:
        latents_BD = self.thought(history)
        size, rate = latents_BD.shape[1], self.sampling.latent_dropout
        if rate:
            kept_BD = np.stack([stream.random(size) >= rate for stream in self.streams])
            latents_BD = latents_BD * torch.from_numpy(kept_BD).to(latents_BD) / (1 - rate)
        if self.sampling.latent_noise:
            noise_BD = np.stack([stream.standard_normal(size) for stream in self.streams])
            latents_BD = latents_BD + self.sampling.latent_noise * torch.from_numpy(noise_BD).to(latents_BD)
        return latents_BD


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that one of k of the samples is correct, drawn without replacement."""
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority(answers: Sequence[str], grading: str) -> int:
    """The index of the answer that occurs most, the earliest of several; answers without text do not count.

    Two answers are the same if one is a correct answer where the other is expected (is_correct).
    """
    firsts: list[int] = []
    votes: dict[int, int] = {}
    for index, answer in enumerate(answers):
        same = (first for first in firsts if is_correct(grading, answer, answers[first]))
        first = next(same, index)
        if answer.strip():
            firsts += [first] if first == index else []
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=lambda first: votes[first], default=0)


@dataclass(frozen=True)
class Samples:
    """All sampled answers of one model to one data set; rates count problems that were too long as wrong."""

    sampling: Sampling
    evaluations: tuple["Evaluation", ...]  # one per sample

    def pass_at(self, k: int) -> float:
        evaluations = self.evaluations
        correct = zip(*([p.correct for p in e.predictions] for e in evaluations), strict=True)
        total = sum(pass_at_k(len(evaluations), sum(item), k) for item in correct)
        return total / max(evaluations[0].num_items, 1)

    def ks(self) -> list[int]:
        """1, 2, 4, ... and the number of samples."""
        count = len(self.evaluations)
        return [*(2**power for power in range(count.bit_length()) if 2**power < count), count]

    def voted(self) -> "Evaluation":
        """The majority vote of every problem; tokens and seconds are those of all its samples."""
        first = self.evaluations[0]
        chosen = []
        for answers in zip(*(e.predictions for e in self.evaluations), strict=True):
            best = answers[majority([answer.predicted for answer in answers], first.grading)]
            chosen.append(replace(best, num_tokens=sum(answer.num_tokens for answer in answers)))
        num_correct = sum(answer.correct for answer in chosen)
        return replace(
            first,
            predictions=tuple(chosen),
            num_cut=0,
            num_correct=num_correct,
            accuracy=num_correct / max(first.num_items, 1),
            mean_tokens=sum(evaluation.mean_tokens for evaluation in self.evaluations),
            seconds_per_item=sum(evaluation.seconds_per_item for evaluation in self.evaluations),
        )

    def numbers(self) -> dict[str, Any]:
        """For JSON.  A mean of fractions has at most the variance of right and wrong: Wilson's interval."""
        items, rates = self.evaluations[0].num_items, []
        for k in self.ks():
            low, high = wilson_interval(self.pass_at(k) * items, items)
            rates.append({"k": k, "value": self.pass_at(k), "low": low, "high": high})
        return {**asdict(self.sampling), "pass_at_k": rates}

    def __str__(self) -> str:
        items, voted = self.evaluations[0].num_items, self.voted()
        rates = [f"pass@{k} {percent_with_interval(self.pass_at(k) * items, items)}" for k in self.ks()]
        vote = percent_with_interval(voted.num_correct, items)
        return f"  {self.sampling}: {', '.join(rates)}, majority vote {vote}"
