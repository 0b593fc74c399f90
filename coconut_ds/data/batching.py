"""Turn samples into batches with latent slots in the same columns, in an order that any rank can resume.

What is 3+4 ?  <start> [L] [L] <end> 7
      2+2 ?    <start> [L] [L] <end> 4 .       left-padded: slot k is one column

What is 3+4 ?  <start> <end> 7                 without latents: padded on the right only
2+2 ?          <start> <end> 1+3 = 4 .
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.curriculum import Sample, Stage, mixed_stage, prompt_only, render, supervise
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.errors import DataError

NO_LABEL = -100
PADDING_ROW = -1


@dataclass(frozen=True)
class Batch:
    """B rows of T columns. Every row's first latent slot is column `first_latent`.

    labels_BT[b, t] is the token at t if it is to be learned, else -100 (unshifted, as in Hugging Face).
    target_positions_N are the flat indices b*T+t whose hidden state predicts target_ids_N; both are computed
    on the host, so that a step needs no search on the device.  Targets of latents come last.
    """

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    latents_per_row_B: torch.Tensor
    target_positions_N: torch.Tensor
    target_ids_N: torch.Tensor
    first_latent: int
    num_latents: int  # latent columns, the same on every rank; a row may use fewer
    loss_denominator: int  # supervised tokens of the optimizer step, over all ranks and micro-batches
    indices: tuple[int, ...]  # problem of each row, PADDING_ROW for a filler row
    num_latent_targets: int = 0
    latent_denominator: int = 0  # targets of latents of the optimizer step, like loss_denominator

    @classmethod
    def from_padded(
        cls,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor,
        position_ids_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        latent_id: int,
    ) -> "Batch":
        """Make a batch from padded tensors; latents must be aligned at their first slot."""
        is_latent_BT = input_ids_BT == latent_id
        latents_per_row_B = is_latent_BT.sum(1)
        num_latents = int(latents_per_row_B.max())
        first_latent = int(is_latent_BT.any(0).int().argmax()) if num_latents else input_ids_BT.shape[1]
        positions_N, ids_N = supervised(labels_BT)
        return cls(
            input_ids_BT=input_ids_BT,
            attention_mask_BT=attention_mask_BT,
            position_ids_BT=position_ids_BT,
            labels_BT=labels_BT,
            latents_per_row_B=latents_per_row_B,
            target_positions_N=positions_N,
            target_ids_N=ids_N,
            first_latent=first_latent,
            num_latents=num_latents,
            loss_denominator=len(ids_N),
            indices=tuple(range(len(input_ids_BT))),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.input_ids_BT.shape[0], self.input_ids_BT.shape[1]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; pinned host memory is copied asynchronously."""
        tensors: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def is_latent_B(self, column: int) -> torch.Tensor:
        """Which rows have a latent slot in `column`."""
        return self.latents_per_row_B > column - self.first_latent


def num_samples_and_tokens(batch: Batch) -> tuple[int, int]:
    """Real rows of a host batch, and their tokens with latents, without padding."""
    is_real_B = torch.tensor(batch.indices) >= 0
    return int(is_real_B.sum()), int(batch.attention_mask_BT[is_real_B].sum())


def supervised(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions whose hidden state predicts a label, and those labels. For host tensors."""
    shifted = torch.full_like(labels_BT, NO_LABEL)
    shifted[:, :-1] = labels_BT[:, 1:]
    positions_N = (shifted.flatten() != NO_LABEL).nonzero().squeeze(1)
    return positions_N, shifted.flatten()[positions_N]


def collate(
    samples: Sequence[Sample | None],
    pad_id: int,
    num_latents: int | None = None,
    loss_denominator: int = 1,
    latent_denominator: int = 0,
) -> Batch:
    """Pad samples to one batch with aligned latent slots; `None` makes a filler row without loss.

    Without latents there is nothing to align: rows start in column 0, so no column is only padding.

    num_latents: latent columns of the step, if rows of other ranks may have more.
    """
    real = [sample for sample in samples if sample is not None]
    if not real:
        raise ValueError("a batch needs at least one sample that is not None")
    first_latent = max(sample.first_latent for sample in real)
    widest = max(sample.num_latents for sample in real)
    num_latents = widest if num_latents is None else num_latents
    starts = [first_latent - (sample or real[0]).first_latent if num_latents else 0 for sample in samples]
    columns = max(start + len((s or real[0]).tokens) for start, s in zip(starts, samples, strict=True))
    if num_latents:
        columns = max(columns, first_latent + num_latents)
    shape = (len(samples), columns)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, NO_LABEL, dtype=torch.long)
    for row, (start, sample) in enumerate(zip(starts, samples, strict=True)):
        # A filler row repeats a real one without labels: its attention is well-defined, its loss is 0.
        shown = real[0] if sample is None else sample
        stop = start + len(shown.tokens)
        ids[row, start:stop] = torch.tensor(shown.tokens)
        mask[row, start:stop] = 1
        positions[row, start:stop] = torch.arange(len(shown.tokens))
        if sample is not None:
            labels[row, start + sample.num_prompt : stop] = ids[row, start + sample.num_prompt : stop]
    positions_N, ids_N = supervised(labels)
    latent_targets = [
        (row * columns + first_latent + slot - 1, token)
        for row, sample in enumerate(samples)
        if sample is not None
        for slot, token in sample.latent_targets
    ]
    if latent_targets:
        positions_M2 = torch.tensor(latent_targets)
        positions_N = torch.cat([positions_N, positions_M2[:, 0]])
        ids_N = torch.cat([ids_N, positions_M2[:, 1]])
    return Batch(
        input_ids_BT=ids,
        attention_mask_BT=mask,
        position_ids_BT=positions,
        labels_BT=labels,
        latents_per_row_B=torch.tensor([(s or real[0]).num_latents for s in samples]),
        target_positions_N=positions_N,
        target_ids_N=ids_N,
        first_latent=first_latent,
        num_latents=num_latents,
        loss_denominator=loss_denominator,
        indices=tuple(PADDING_ROW if s is None else s.index for s in samples),
        num_latent_targets=len(latent_targets),
        latent_denominator=latent_denominator,
    )


def refuse_long_prompts(lengths: Sequence[int], num_positions: int | None, name: str) -> None:
    """Raise DataError if a prompt has more tokens, including latents, than the model has positions.

    `name`: what the message calls a prompt.
    """
    for number, length in enumerate(lengths, 1):
        if num_positions is not None and length > num_positions:
            raise DataError(
                f"{name} {number} has {length:,} tokens with its latents, and the model has "
                f"{num_positions:,} positions: shorten it"
            )


@dataclass(frozen=True)
class BatchConfig:
    """Rows per micro-batch and rank, micro-batches per step, number of ranks, and this rank."""

    rows: int
    accumulation: int
    world_size: int
    rank: int

    @property
    def rows_per_step(self) -> int:
        return self.rows * self.accumulation * self.world_size

    @classmethod
    def of(cls, experiment: Experiment, world_size: int, rank: int) -> "BatchConfig":
        """The batch config of an experiment's training."""
        accumulation = experiment.gradient_accumulation_steps
        return cls(experiment.batch_size_training, accumulation, world_size, rank)

    def num_steps(self, num_problems: int) -> int:
        """Optimizer steps per epoch; the last may be smaller."""
        return -(-num_problems // self.rows_per_step)


def epoch_order(num_problems: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order of one epoch. Depends only on (seed, epoch), so any rank can resume anywhere."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_problems, generator=generator).tolist()


def training_steps(
    problems: Sequence[TokenizedProblem],
    epoch: int,
    experiment: Experiment,
    vocabulary: Vocabulary,
    layout: BatchConfig,
    first_sample: int = 0,
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of every optimizer step of an epoch, starting at `first_sample`.

    Every rank gets the same number of micro-batches. Each problem is used exactly once: filler rows complete
    the last step. Latent columns are the maximum over all ranks' rows, and the loss denominator counts all
    ranks' labels; both are computed from the shared order, without communication.
    """
    order = epoch_order(len(problems), experiment.seed, epoch)

    def draw(index: int) -> Sample:
        problem = problems[index]
        stage = mixed_stage(len(problem.steps), epoch, index, experiment)
        sample = render(problem, stage, experiment, vocabulary, index)
        return supervise(sample, problem, stage, experiment, vocabulary)

    for start in range(first_sample, len(order), layout.rows_per_step):
        samples = [draw(index) for index in order[start : start + layout.rows_per_step]]
        denominator = sum(len(sample.tokens) - sample.num_prompt for sample in samples)
        latents = sum(len(sample.latent_targets) for sample in samples)
        yield [
            collate(rows, vocabulary.pad_id, num_latents, denominator, latents)
            for rows, num_latents in _shares(samples, layout.rows, layout)
        ]


def evaluation_batches(
    problems: Sequence[TokenizedProblem],
    stage: Stage,
    experiment: Experiment,
    vocabulary: Vocabulary,
    layout: BatchConfig,
    prompts: bool,
) -> Iterator[Batch]:
    """Yield this rank's batches, every problem once; with `prompts` only the prompts, else with labels.

    Rows are sorted by length to reduce padding. `loss_denominator` is 1: evaluation sums losses.
    """
    arrange: Callable[[Sample], Sample] = prompt_only if prompts else (lambda sample: sample)
    samples = [arrange(render(p, stage, experiment, vocabulary, i)) for i, p in enumerate(problems)]
    samples.sort(key=lambda sample: (-len(sample.tokens), sample.index))
    size = layout.rows * layout.world_size
    for start in range(0, len(samples), size):
        for rows, num_latents in _shares(samples[start : start + size], layout.rows, layout):
            yield collate(rows, vocabulary.pad_id, num_latents)


def _shares(
    samples: Sequence[Sample], rows: int, layout: BatchConfig
) -> Iterator[tuple[list[Sample | None], int]]:
    """Yield this rank's rows of each micro-batch, and the number of latent columns on all ranks.

    Rows are distributed round-robin, so the ranks' shares of a short step differ by at most one; a rank
    without rows gets the last sample as filler.
    """
    size = rows * layout.world_size
    for start in range(0, len(samples), size):
        together = samples[start : start + size]
        num_latents = max(sample.num_latents for sample in together)
        own: list[Sample | None] = list(together[layout.rank :: layout.world_size])
        longest = -(-len(together) // layout.world_size)
        own += [None] * (longest - len(own))
        if own == [None]:
            last = together[-1]
            own = [Sample(PADDING_ROW, last.tokens, len(last.tokens), last.num_latents, last.first_latent)]
        yield own, num_latents
