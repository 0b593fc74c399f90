"""The curriculum: which reasoning steps are hidden at which epoch, and the samples that result.

    stage 0   question <start>             <end> step1 step2 step3 answer
    stage 1   question <start> [L][L]      <end>       step2 step3 answer      (c_thought 2)
    stage 2   question <start> [L][L][L][L]<end>             step3 answer

Source: Coconut, arXiv 2412.06769, sections 3 and 4.2.  Training uses `sample.tokens`, evaluation
`sample.tokens[:sample.num_prompt]`, so the two cannot disagree.
"""

import itertools
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from coconut_ds.config.experiment import Experiment, Method
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary
from coconut_ds.files import counted
from coconut_ds.objectives import latent_targets

ALL_STEPS = sys.maxsize


@dataclass(frozen=True)
class Stage:
    """How much of the reasoning is hidden, and how many latent slots replace it."""

    hidden_steps: int
    num_latents: int
    hidden_tokens: int = 0  # token-wise iCoT: leading reasoning tokens removed

    @property
    def shows_all_steps(self) -> bool:
        """Whether the model writes all of the reasoning, and can match the given one."""
        return self.hidden_steps == self.hidden_tokens == 0

    def __str__(self) -> str:
        if self.hidden_tokens:
            return f"first {counted(self.hidden_tokens, 'reasoning token')} hidden"
        steps = "all steps" if self.hidden_steps == ALL_STEPS else counted(self.hidden_steps, "step")
        return f"{steps} hidden, {counted(self.num_latents, 'latent')}"

    @classmethod
    def parse(cls, text: object) -> "Stage | None":
        """The stage that `str` describes, also in older versions ("1 steps"); None for any other text."""
        if match := re.fullmatch(r"first (\d{1,9}) reasoning tokens? hidden", str(text)):
            return cls(0, 0, int(match[1]))
        if match := re.fullmatch(r"(all|\d{1,9}) steps? hidden, (\d{1,9}) latents?", str(text)):
            return cls(ALL_STEPS if match[1] == "all" else int(match[1]), int(match[2]))
        return None


@dataclass(frozen=True)
class Sample:
    """One problem as the model sees it: `tokens[:num_prompt]` is the prompt, the rest is learned."""

    index: int
    tokens: tuple[int, ...]
    num_prompt: int
    num_latents: int
    first_latent: int  # position of the first latent slot, or where it would be
    latent_targets: tuple[tuple[int, int], ...] = ()  # (slot, token that the column before it predicts)


def stage_number(epoch: int, experiment: Experiment) -> int:
    """The number of the curriculum stage of `epoch` (from 0), at most max_latent_stage + 1.

    Token-wise iCoT, which hides more at every epoch, has two stages: 0 with nothing hidden, then 1.
    """
    if not experiment.method.has_stages:
        return 0
    if experiment.method is Method.ICOT and experiment.icot_tokens_per_epoch is not None:
        return min(epoch, 1)
    return min(_uncapped_number(epoch, experiment.epochs_per_stage), experiment.max_latent_stage + 1)


def _uncapped_number(epoch: int, lengths: int | tuple[int, ...]) -> int:
    if isinstance(lengths, int):
        return epoch // lengths
    for number, length in enumerate(lengths):
        if epoch < length:
            return number
        epoch -= length
    return len(lengths) + epoch // lengths[-1]


def stage_at(epoch: int, experiment: Experiment) -> Stage:
    """The stage of `epoch` (from 0)."""
    match experiment.method:
        case Method.COT:
            return Stage(0, 0)
        case Method.NO_COT:
            return Stage(ALL_STEPS, 0)
        case Method.PAUSE | Method.WITHOUT_CURRICULUM:
            return numbered_stage(experiment.max_latent_stage + 1, experiment)
        case Method.ICOT if experiment.icot_tokens_per_epoch is not None:
            return Stage(0, 0, hidden_tokens=experiment.icot_tokens_per_epoch * epoch)
    return numbered_stage(stage_number(epoch, experiment), experiment)


def numbered_stage(number: int, experiment: Experiment) -> Stage:
    """Stage `number`, which hides that many steps; beyond max_latent_stage, all (paper, section 4.2)."""
    has_latents = experiment.method.has_latents
    num_latents = min(number, experiment.max_latent_stage) * experiment.c_thought if has_latents else 0
    return Stage(number if number <= experiment.max_latent_stage else ALL_STEPS, num_latents)


def last_epoch(experiment: Experiment) -> int:
    """The epoch (from 0) whose stage is used for the test: the last one, or `resume` with only_eval."""
    return experiment.resume if experiment.only_eval else max(experiment.num_epochs - 1, 0)


def final_stage(experiment: Experiment) -> Stage:
    """The stage at which the model is tested: that of the last epoch.

    CoT: nothing hidden. no_cot, pause, without_curriculum: all steps. Methods with stages: all steps, or as
    many as `num_epochs` reaches. Token-wise iCoT: as many tokens as the last epoch hides.
    """
    return stage_at(last_epoch(experiment), experiment)


def stops_early(experiment: Experiment) -> str | None:
    """A note if the epochs end before stage max_latent_stage, else None."""
    number, last = stage_number(last_epoch(experiment), experiment), experiment.max_latent_stage
    token_wise = experiment.icot_tokens_per_epoch is not None
    if not experiment.method.has_stages or token_wise or number >= last:
        return None
    key = "resume" if experiment.only_eval else "num_epochs"
    return (
        f"{key}: {getattr(experiment, key)} ends in stage {number} of {last}; "
        f"the results are of that stage ({final_stage(experiment)})"
    )


def stage_spans(experiment: Experiment) -> Iterator[tuple[int, int]]:
    """First and last epoch (from 0) of every stage of the run."""
    epochs = range(experiment.resume, last_epoch(experiment) + 1)
    for _, same_stage in itertools.groupby(epochs, key=lambda epoch: stage_at(epoch, experiment)):
        first, *others = same_stage
        yield first, (others or [first])[-1]


def is_stage_switch(epoch: int, experiment: Experiment) -> bool:
    """Whether `epoch` is the first of a new stage (epoch 0 is not a switch)."""
    return epoch > 0 and stage_at(epoch, experiment) != stage_at(epoch - 1, experiment)


def next_epoch(epoch: int, accuracy: float, stale_epochs: int, experiment: Experiment) -> int:
    """The epoch after `epoch`, beyond the rest of its stage if the stage ends early; num_epochs at the end.

    `stale_epochs`: epochs without a new best accuracy, up to `epoch`.  An early end skips epochs of the
    schedule, so stage, learning rate, order of data and drawn stages stay functions of the epoch's number.
    """
    end, number = experiment.num_epochs, stage_number(epoch, experiment)
    if experiment.icot_tokens_per_epoch is not None and experiment.method is Method.ICOT:
        return epoch + 1
    in_stage = [e for e in range(end) if stage_number(e, experiment) == number]
    stop = in_stage[-1] + 1
    if epoch - in_stage[0] + 1 < experiment.min_epochs_per_stage:
        return epoch + 1
    if stop < end:
        reached = experiment.advance_at is not None and accuracy >= experiment.advance_at
        return stop if reached else epoch + 1
    patience = experiment.early_stopping_patience
    return end if patience is not None and stale_epochs >= patience else epoch + 1


def mixed_stage(num_steps: int, epoch: int, index: int, experiment: Experiment) -> Stage:
    """The stage of one training sample: its epoch's, or with probability `uniform_prob` a random one.

    Depends only on (seed, epoch, index), so every rank and every resumed run draws the same.
    """
    stage = stage_at(epoch, experiment)
    if experiment.uniform_prob == 0 or not experiment.method.has_stages or stage.hidden_tokens:
        return stage
    draw = random.Random(f"{experiment.seed} {epoch} {index}")
    if draw.random() < experiment.uniform_prob:
        return numbered_stage(draw.randint(0, num_steps), experiment)
    return stage


def latents_of(problem: TokenizedProblem, stage: Stage, experiment: Experiment) -> int:
    """The number of latents of one problem at one stage.

    With `pad_latent_to_max: false`, a problem gets latents only for the steps it has; the released code does
    this in evaluation but not in training. It tells the model the number of gold steps.
    """
    if experiment.pad_latent_to_max:
        return stage.num_latents
    return min(stage.num_latents, len(problem.steps) * experiment.c_thought)


def render(
    problem: TokenizedProblem, stage: Stage, experiment: Experiment, vocabulary: Vocabulary, index: int = 0
) -> Sample:
    """Render one problem at one stage."""
    num_latents = latents_of(problem, stage, experiment)
    if experiment.method.has_latents:
        slots = (vocabulary.start_id, *[vocabulary.latent_id] * num_latents, vocabulary.end_id)
        first_latent = len(problem.question) + 1
    else:
        slots, first_latent = (), len(problem.question)
    prompt = (*problem.question, *slots)
    reasoning = tuple(itertools.chain.from_iterable(problem.steps[stage.hidden_steps :]))
    tokens = (*prompt, *reasoning[stage.hidden_tokens :], *problem.answer)
    return Sample(index, tokens, len(prompt), num_latents, first_latent)


def supervise(
    sample: Sample,
    problem: TokenizedProblem,
    stage: Stage,
    experiment: Experiment,
    vocabulary: Vocabulary,
) -> Sample:
    """The rendered sample with the targets of its latents, for training (`latent_supervision`)."""
    name, c_thought = experiment.latent_supervision, experiment.c_thought
    if name is None or sample.num_latents == 0:
        return sample
    steps = problem.steps[: min(stage.hidden_steps, sample.num_latents // c_thought)]
    targets = tuple(latent_targets(name, steps, c_thought, vocabulary.tokenizer))
    return replace(sample, latent_targets=targets)


def answer_lengths(
    problems: Sequence[TokenizedProblem], stage: Stage, experiment: Experiment, vocabulary: Vocabulary
) -> list[int]:
    """Tokens of the correct answer to each problem at `stage`, with the steps it writes, without its eos."""
    samples = [render(problem, stage, experiment, vocabulary) for problem in problems]
    return [len(sample.tokens) - sample.num_prompt - 1 for sample in samples]


def prompt_only(sample: Sample) -> Sample:
    """The sample without what is to be learned, for evaluation."""
    return replace(sample, tokens=sample.tokens[: sample.num_prompt])
