"""Generate text with a trained model from scripts and notebooks.

model = coconut_ds.CoconutForCausalLM.from_pretrained("exported")
model.generate("3+4+2+7=?")                 ->  "### 6"
model.generate(questions, num_latents=2)    ->  one text per question
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from coconut_ds.data.batching import Batch, collate, refuse_long_prompts
from coconut_ds.data.curriculum import Sample, prompt_only, render
from coconut_ds.data.problems import Problem, card_for
from coconut_ds.data.tokenizer import Vocabulary, load_vocabulary, tokenize
from coconut_ds.errors import ConfigError
from coconut_ds.evaluation.evaluate import max_new_tokens
from coconut_ds.evaluation.saved_models import Trained, find_one
from coconut_ds.model.coconut import Coconut


@dataclass(frozen=True)
class CoconutForCausalLM:
    """A model with its vocabulary and stage; `model` is the torch module."""

    model: Coconut
    vocabulary: Vocabulary
    trained: Trained

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device | None = None, allow_pickle: bool = False
    ) -> Self:
        """Load an exported folder, a run folder or one of its checkpoints.

        `device`: default the first GPU, else the CPU.  `allow_pickle`: also read pickled weights, which can
        run code of their author; the folder's own setting is ignored.
        Raises ConfigError and CheckpointError.
        """
        overrides = ["allow_pickle=true"] if allow_pickle else []
        return cls.of(find_one(str(folder), overrides=overrides), device)

    @classmethod
    def of(cls, trained: Trained, device: str | torch.device | None = None) -> Self:
        vocabulary = load_vocabulary(trained.experiment.model_id)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(trained.build(vocabulary).to(device), vocabulary, trained)

    @property
    def max_new_tokens(self) -> int:
        """The limit used in evaluation."""
        return max_new_tokens(self.trained.experiment, card_for(self.trained.experiment.val_path))

    def generate(
        self,
        questions: str | Sequence[str],
        num_latents: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 32,
    ) -> str | list[str]:
        """Greedy answers, without the question: a text for a text, a list for a list.

        `num_latents`: latent slots, by default as many as the model was trained with at last.
        """
        if isinstance(questions, str):
            return self._answers([questions], num_latents, max_new_tokens, 1)[0]
        return self._answers(questions, num_latents, max_new_tokens, batch_size)

    def _answers(
        self, questions: Sequence[str], num_latents: int | None, limit: int | None, batch_size: int
    ) -> list[str]:
        texts: list[str] = []
        limit = self._limit(limit)
        samples = self.samples(questions, num_latents)
        for start in range(0, len(samples), batch_size):
            batch = self._collated(samples[start : start + batch_size])
            texts += map(self.vocabulary.decode, self.model.generate(batch, limit, self.vocabulary.eos_id))
        return texts

    def stream(
        self, question: str, num_latents: int | None = None, max_new_tokens: int | None = None
    ) -> Iterator[str]:
        """The answer to one question, streamed in pieces."""
        ids: list[int] = []
        shown = ""
        batch = self.prompts([question], num_latents)
        for tokens in self.model.stream(batch, self._limit(max_new_tokens), self.vocabulary.eos_id):
            ids += tokens.values()
            text = self.vocabulary.decode(ids)
            # An incomplete character of several tokens decodes to the replacement character.
            if not text.endswith("\N{REPLACEMENT CHARACTER}") and text != shown:
                yield text[len(shown) :]
                shown = text
        if (text := self.vocabulary.decode(ids)) != shown:
            yield text[len(shown) :]

    def prompts(self, questions: Sequence[str], num_latents: int | None = None) -> Batch:
        """The batch of these questions.  Raises DataError for a question longer than the model."""
        return self._collated(self.samples(questions, num_latents))

    def samples(self, questions: Sequence[str], num_latents: int | None = None) -> list[Sample]:
        """The prompt of each question.  Raises DataError for a question longer than the model."""
        trained = self.trained.with_latents(num_latents)
        # The number of steps of a new question is unknown, so it gets all slots.
        experiment = replace(trained.experiment, pad_latent_to_max=True)
        problems = tokenize([Problem(question, (), "") for question in questions], self.vocabulary)
        samples = [
            prompt_only(render(problem, trained.stage, experiment, self.vocabulary, index))
            for index, problem in enumerate(problems)
        ]
        lengths = [len(sample.tokens) for sample in samples]
        refuse_long_prompts(lengths, self.model.num_positions, "question")
        return samples

    def _collated(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.vocabulary.pad_id).to(next(self.model.parameters()).device)

    def _limit(self, limit: int | None) -> int:
        if limit is not None and limit < 1:
            raise ConfigError(f"max_new_tokens {limit}: must be 1 or more")
        return self.max_new_tokens if limit is None else limit
