"""Find examples with more tokens than the model has positions, before training or evaluation starts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.curriculum import Stage, final_stage, last_epoch, numbered_stage, render, stage_at
from coconut_ds.data.token_cache import CachedProblems
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.errors import DataError

# Models with one of these settings compute their positions; others have a table of learned positions.
COMPUTED_POSITIONS = ("rope_parameters", "rope_scaling", "rope_theta", "alibi")
StagesOf = Callable[[TokenizedProblem], Iterable[Stage]]


@dataclass(frozen=True)
class Limit:
    """Maximum tokens, including latents, per row; `is_hard`: the model fails on longer rows."""

    positions: int
    is_hard: bool


def limit_of(config: PretrainedConfig) -> Limit | None:
    """The limit in a model's configuration, None if it has none."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    return Limit(positions, not any(getattr(text, name, None) for name in COMPUTED_POSITIONS))


def trained_stages(experiment: Experiment) -> list[Stage]:
    """Every stage that the epochs of a run reach, without those that `uniform_prob` draws."""
    last = last_epoch(experiment)
    epochs = range(min(experiment.resume, last), last + 1)
    return list(dict.fromkeys(stage_at(epoch, experiment) for epoch in epochs))


@dataclass(frozen=True)
class LengthCheck:
    """Checks the rows of data files against the limit of an experiment's model."""

    experiment: Experiment
    vocabulary: Vocabulary
    limit: Limit

    def refuse(
        self,
        train: Sequence[TokenizedProblem],
        valid: Sequence[TokenizedProblem],
        test: Sequence[TokenizedProblem] = (),
    ) -> list[str]:
        """Raise DataError for rows above a hard limit; return notes on rows above a soft one.

        Every row is measured at the stage where it is longest, including latents and special tokens.
        """
        experiment, every = self.experiment, trained_stages(self.experiment)
        last = [final_stage(experiment)]
        rows = [
            self._too_long(experiment.train_path, train, self._drawn_stages(every)),
            self._too_long(experiment.val_path, valid, lambda _: every),
            self._too_long(experiment.test_path, test, lambda _: last),
        ]
        if self.limit.is_hard:
            errors, notes = rows, []
        else:
            notes = [f"{text}; the model was not trained on such lengths" for text in rows if text]
            errors = [
                self._too_long(experiment.val_path, valid, lambda _: every, prompts=True),
                self._too_long(experiment.test_path, test, lambda _: last, prompts=True),
            ]
        if any(errors):
            raise DataError("\n".join(f"{text}; shorten or remove it" for text in errors if text))
        return notes

    def refuse_evaluation(self, path: str, problems: Sequence[TokenizedProblem], stage: Stage) -> None:
        """Raise DataError for rows that cannot be evaluated at `stage`."""
        if text := self._too_long(path, problems, lambda _: [stage], prompts=not self.limit.is_hard):
            raise DataError(f"{text}; shorten or remove it")

    def _drawn_stages(self, every: Sequence[Stage]) -> StagesOf:
        """The stages of a training example, including those that `uniform_prob` may draw."""
        experiment = self.experiment
        if not (experiment.uniform_prob > 0 and experiment.method.has_stages):
            return lambda _: every
        return lambda problem: [
            *every,
            *(numbered_stage(number, experiment) for number in range(len(problem.steps) + 1)),
        ]

    def _too_long(
        self,
        path: str | None,
        problems: Sequence[TokenizedProblem],
        stages_of: StagesOf,
        prompts: bool = False,
    ) -> str:
        """A message with the longest row above the limit and their number; empty if all fit."""
        too_long: list[tuple[int, int, Stage]] = []
        for index in self._candidates(problems):
            problem = problems[index]
            lengths = []
            for stage in stages_of(problem):
                sample = render(problem, stage, self.experiment, self.vocabulary)
                lengths.append((sample.num_prompt if prompts else len(sample.tokens), stage))
            tokens, stage = max(lengths, key=lambda pair: pair[0])
            if tokens > self.limit.positions:
                too_long.append((tokens, index, stage))
        if not too_long:
            return ""
        tokens, index, stage = max(too_long, key=lambda row: row[0])
        more = f", and {len(too_long) - 1} more items are too long" if len(too_long) > 1 else ""
        part = "the prompt of " if prompts else ""
        return (
            f"{path}, item {index}: {part}this example has {tokens:,} tokens ({stage}), and the model has "
            f"{self.limit.positions:,} positions{more}"
        )

    def _candidates(self, problems: Sequence[TokenizedProblem]) -> list[int]:
        """Indices of problems that are above the limit with every step and every latent."""
        experiment = self.experiment
        latents = experiment.c_thought * experiment.max_latent_stage + 2
        room = self.limit.positions - (latents if experiment.method.has_latents else 0)
        return np.flatnonzero(num_tokens(problems) > room).tolist()


def num_tokens(problems: Sequence[TokenizedProblem]) -> np.ndarray:
    """The number of tokens of every problem: question, steps and answer."""
    if isinstance(problems, CachedProblems):
        return problems.num_tokens()
    return np.array([len(p.question) + sum(map(len, p.steps)) + len(p.answer) for p in problems], dtype=int)
