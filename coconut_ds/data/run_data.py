"""The data of a run, read and checked before any model.

Examples longer than the model are refused.  Notes name questions of an evaluation file that are also in the
training file, and text that the tokenizer does not know, so that the model reads one unknown token for it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
from transformers import PretrainedConfig

from coconut_ds.config.experiment import Experiment
from coconut_ds.data.curriculum import (
    Stage,
    final_stage,
    last_epoch,
    numbered_stage,
    render,
    stage_at,
    supervise,
)
from coconut_ds.data.problems import Card, Problem, card_for, enough_tokens, examples_digest, read_problems
from coconut_ds.data.tokenizer import (
    HASHED,
    SPECIAL,
    CachedProblems,
    TokenizedProblem,
    Vocabulary,
    cached_tokens,
    load_vocabulary,
    mark_of,
    refuse_missing_rows,
    refuse_unsavable,
    tokenize,
)
from coconut_ds.errors import DataError
from coconut_ds.files import counted, print_notes

DEBUG_TRAIN_ITEMS, DEBUG_VALID_ITEMS = 128, 32
Changes = Mapping[int, TokenizedProblem | None]  # by index; None: dropped
MAX_NAMED, MAX_LETTERS = 5, 60  # unknown texts in a note
MAX_SUPERVISED = 100  # examples searched for targets of latents
# Models with one of these settings compute their positions; others have a table of learned positions.
COMPUTED_POSITIONS = ("rope_parameters", "rope_scaling", "rope_theta", "alibi")


@dataclass(frozen=True)
class TestSet:
    """Problems with their token ids and their data card."""

    problems: Sequence[Problem]
    tokenized: Sequence[TokenizedProblem]
    card: Card
    num_dropped: int = 0  # too long for the model; they count as wrong answers
    __test__ = False  # not a test class for pytest

    def __len__(self) -> int:
        return len(self.problems)

    @cached_property
    def examples(self) -> str:
        """A hash of its questions and answers: equal for results that compare example by example."""
        return examples_digest(self.problems)

    def shortened(self, changes: Changes) -> "TestSet":
        """The same set with `changes`; a dropped problem counts as a wrong answer."""
        kept = [problem for i, problem in enumerate(self.problems) if changes.get(i, problem) is not None]
        num_dropped = len(self.problems) - len(kept)
        return TestSet(kept, shortened(self.tokenized, changes), self.card, num_dropped)


@dataclass(frozen=True)
class RunData:
    """What a run reads from disk before any model."""

    vocabulary: Vocabulary
    train: Sequence[TokenizedProblem]
    valid: TestSet
    test: TestSet | None


def load_run_data(experiment: Experiment, config: PretrainedConfig) -> RunData:
    """Read and tokenize every file of an experiment; the main process prints notes on them.

    `config`: its model's.  Raises ConfigError for the tokenizer, DataError for the data and for examples that
    are too long.
    """
    debug = experiment.debug
    vocabulary = load_vocabulary(experiment.model_id, experiment.chat_template)
    train: Sequence[TokenizedProblem] = []
    if not experiment.only_eval:
        refuse_unsavable(vocabulary, experiment.model_id)
        limit = DEBUG_TRAIN_ITEMS if debug else None
        train = cached_tokens(experiment.train_path, vocabulary, limit=limit, fields=experiment.fields)
    limit = DEBUG_VALID_ITEMS if debug else experiment.eval_max_items
    print_notes(refuse_missing_rows(vocabulary, config, experiment.model_id))
    if isinstance(train, CachedProblems):
        print_notes(marked_text(experiment.train_path, train.marks))
    refuse_unsupervised(train, experiment, vocabulary)
    valid = load_test_set(experiment.val_path, vocabulary, limit, experiment.fields)
    test = (
        load_test_set(experiment.test_path, vocabulary, limit, experiment.fields)
        if experiment.test_path
        else None
    )
    sets = {experiment.val_path: valid} | ({str(experiment.test_path): test} if test else {})
    print_notes(shared_questions(train, experiment.train_path, sets, unknown_id(vocabulary)))
    if experiment.test_path == experiment.val_path:
        print_notes([f"test_path is val_path ({experiment.val_path}), so the test measures nothing new"])
    elif test:
        print_notes(shared_questions(valid.tokenized, experiment.val_path, {str(experiment.test_path): test}))
    print_notes(unknown_text(vocabulary, train, experiment.train_path, sets, experiment.fields))
    print_notes(stages_beyond(train, experiment))
    check = LengthCheck(experiment, vocabulary, limit_of(config, experiment.max_tokens))
    uses = check.uses(train, valid.tokenized, test.tokenized if test else ())
    for use, card in ((uses[1], valid.card), (uses[2], test.card if test else None)):
        if card:
            print_notes(check.cut_answers(use, experiment.max_new_tokens or card.max_new_tokens))
    if experiment.too_long == "error":
        print_notes(check.refuse(uses))
        return RunData(vocabulary, train, valid, test)
    changes = [check.changes(use) for use in uses]
    print_notes(note for _, notes in changes for note in notes)
    fit = [change for change, _ in changes]
    return RunData(
        vocabulary, shortened(train, fit[0]), valid.shortened(fit[1]), test and test.shortened(fit[2])
    )


def refuse_unsupervised(
    train: Sequence[TokenizedProblem], experiment: Experiment, vocabulary: Vocabulary
) -> None:
    """Raise DataError if `latent_supervision` finds no target in the first steps of the training data."""
    if experiment.latent_supervision is None or not experiment.method.has_latents:
        return
    stage = numbered_stage(experiment.max_latent_stage, experiment)
    problems = [train[index] for index in range(min(len(train), MAX_SUPERVISED))]
    samples = (
        supervise(render(p, stage, experiment, vocabulary), p, stage, experiment, vocabulary)
        for p in problems
    )
    if problems and not any(sample.latent_targets for sample in samples):
        raise DataError(
            f"{experiment.train_path}: latent_supervision: {experiment.latent_supervision} has no target in "
            f"the steps of the first {len(problems)} examples; add steps with a result, or write "
            "'latent_supervision: none'"
        )


def read_files(experiment: Experiment) -> list[list[Problem]]:
    """The problems of train_path, val_path and test_path, empty for a path that is not set.

    Raises DataError as `load_run_data` does; items of evaluation files may lack steps.
    """
    train = read_problems(experiment.train_path, None, experiment.fields) if experiment.train_path else []
    paths = (experiment.val_path, experiment.test_path)
    return [train, *(read_problems(path, None, experiment.fields, {}) if path else [] for path in paths)]


def load_evaluation_data(
    experiment: Experiment, config: PretrainedConfig, path: str, stage: Stage, limit: int | None
) -> tuple[Vocabulary, TestSet]:
    """Read and tokenize a file to evaluate at `stage`.  Prints and raises like `load_run_data`."""
    vocabulary = load_vocabulary(experiment.model_id, experiment.chat_template)
    test_set = load_test_set(path, vocabulary, limit, experiment.fields)
    check = LengthCheck(experiment, vocabulary, limit_of(config, experiment.max_tokens))
    use = Use(path, test_set.tokenized, [stage])
    print_notes(check.cut_answers(use, experiment.max_new_tokens or test_set.card.max_new_tokens))
    if experiment.too_long == "error":
        print_notes(check.refuse([use]))
        return vocabulary, test_set
    changes, notes = check.changes(use)
    print_notes(notes)
    return vocabulary, test_set.shortened(changes)


def load_test_set(
    path: str, vocabulary: Vocabulary, limit: int | None = None, fields: Mapping[str, Any] | None = None
) -> TestSet:
    """Read problems to grade, with their card; a note counts those without steps.  Raises DataError."""
    without_steps: dict[int, str] = {}
    problems = read_problems(path, limit, fields, without_steps)
    if without_steps:
        hint = next(iter(without_steps.values()))
        count = f"{len(without_steps)} of {len(problems)} problems have no 'steps'{hint}"
        print_notes([f"{path}: {count}; their loss and CoT match are of the answer alone"])
    marks = np.array([mark_of(problem, vocabulary) for problem in problems], np.uint8)
    if np.all(marks & HASHED):
        text = f"{path}: all {len(problems)} answers contain '#', where grading splits"
        raise DataError(f"{text}, so no prediction can be correct; write answers without it")
    print_notes(marked_text(path, marks))
    return TestSet(problems, tokenize(problems, vocabulary), card_for(path))


def marked_text(path: str, marks: np.ndarray) -> Iterator[str]:
    """Notes on text of problems that is read in another way than it seems (mark_of)."""
    for bit, text in (
        (HASHED, "answers contain '#', where grading splits: no prediction can be correct for them"),
        (SPECIAL, "problems contain the text of a special token, such as <|latent|>, which is read as text"),
    ):
        if len(indices := np.flatnonzero(marks & bit)):
            yield f"{path}: {len(indices)} of {len(marks)} {text}; the first is item {indices[0]}"


@dataclass(frozen=True)
class Limit:
    """Maximum tokens, including latents, per row; `is_hard`: the model fails on longer rows."""

    positions: int
    is_hard: bool
    name: str = "the model has {:,} positions"


def limit_of(config: PretrainedConfig, max_tokens: int | None = None) -> Limit | None:
    """The smaller of a model's own limit and `max_tokens`, which is hard; None if there is neither."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if max_tokens is not None and (positions is None or max_tokens <= positions):
        return Limit(max_tokens, is_hard=True, name="max_tokens allows {:,}")
    if positions is None:
        return None
    return Limit(positions, not any(getattr(text, name, None) for name in COMPUTED_POSITIONS))


@dataclass(frozen=True)
class Use:
    """Problems of a file and the stages that they are rendered at."""

    path: str | None
    problems: Sequence[TokenizedProblem]
    stages: Sequence[Stage]
    trains: bool = False  # also at the stages that `uniform_prob` draws; no answer needs room


@dataclass(frozen=True)
class LengthCheck:
    """Checks rows against the limit of an experiment's model."""

    experiment: Experiment
    vocabulary: Vocabulary
    limit: Limit | None

    def uses(
        self,
        train: Sequence[TokenizedProblem],
        valid: Sequence[TokenizedProblem],
        test: Sequence[TokenizedProblem],
    ) -> list[Use]:
        """What a run does with its data."""
        experiment = self.experiment
        every = trained_stages(experiment)
        return [
            Use(experiment.train_path, train, every, trains=True),
            Use(experiment.val_path, valid, every),
            Use(experiment.test_path, test, [final_stage(experiment)]),
        ]

    def refuse(self, uses: Iterable[Use]) -> list[str]:
        """Raise DataError for rows above a hard limit or prompts above a soft one; return notes on the rest.

        Every row is measured at the stage where it is longest, including latents and special tokens.
        """
        if self.limit is None:
            return []
        notes, errors = [], []
        for use in uses:
            text = self._too_long(use, self.limit)
            if text and self.limit.is_hard:
                errors.append(text)
            elif text:
                notes.append(
                    f"{text}; the model was not trained on such lengths, which 'max_tokens: "
                    f"{self.limit.positions}' refuses"
                )
                errors.append("" if use.trains else self._too_long(use, self.limit, prompts=True))
        if any(errors):
            remedy = "shorten or remove it, or write 'too_long: drop' or 'too_long: truncate_question'"
            raise DataError("\n".join(f"{text}; {remedy}" for text in errors if text))
        return notes

    def cut_answers(self, use: Use, limit: int) -> Iterator[str]:
        """A note if generated text ends at `limit` tokens before the reference does, at the first stage."""
        stage = use.stages[0]
        samples = (render(problem, stage, self.experiment, self.vocabulary) for problem in use.problems)
        lengths = [len(sample.tokens) - sample.num_prompt - 1 for sample in samples]  # without eos
        if cut := sum(length > limit for length in lengths):
            yield (
                f"{use.path}: {cut} of {len(lengths)} references are longer than {limit} tokens ({stage}), "
                f"where answers are cut; write 'max_new_tokens: {enough_tokens(max(lengths))}'"
            )

    def changes(self, use: Use) -> "tuple[Changes, list[str]]":
        """What `too_long` makes of the rows above the limit, and a note.

        Raises DataError if no row is left, or if truncating a question does not make its row fit.
        """
        rows = self._rows_above(use, self.limit) if self.limit else []
        if not rows or self.limit is None:
            return {}, []
        changes: dict[int, TokenizedProblem | None] = dict.fromkeys(index for _, index, _ in rows)
        action = "dropped" if use.trains else "not asked, and count as wrong answers"
        if self.experiment.too_long == "truncate_question":
            action = "shortened at the start of their questions"
            for tokens, index, _ in rows:
                changes[index] = self._truncated(use, index, tokens - self.limit.positions)
        elif len(rows) == len(use.problems):
            raise DataError(f"{use.path}: every example is too long; {self._describe(use, self.limit, rows)}")
        counts = (
            f"{len(rows)} of {len(use.problems)} examples are {action} (too_long: {self.experiment.too_long})"
        )
        return changes, [f"{use.path}: {counts}; {self._describe(use, self.limit, rows)}"]

    def _truncated(self, use: Use, index: int, excess: int) -> TokenizedProblem:
        problem = use.problems[index]
        start = int(problem.question[:1] == (self.vocabulary.tokenizer.bos_token_id,))
        if excess >= len(problem.question) - start - 1:  # its line break stays
            raise DataError(
                f"{use.path}, item {index}: this example is {excess:,} tokens too long, more than its "
                "question has; write 'too_long: drop'"
            )
        return replace(problem, question=problem.question[:start] + problem.question[start + excess :])

    def _too_long(self, use: Use, limit: Limit, prompts: bool = False) -> str:
        """A message with the longest row above the limit and their number; empty if all fit."""
        rows = self._rows_above(use, limit, prompts)
        return self._describe(use, limit, rows, "the prompt of " if prompts else "") if rows else ""

    def _rows_above(self, use: Use, limit: Limit, prompts: bool = False) -> list[tuple[int, int, Stage]]:
        """(tokens, index, stage) of every problem above the limit, at the stage where it is longest."""
        experiment = self.experiment
        mixes = use.trains and experiment.uniform_prob > 0 and experiment.method.has_stages
        last = experiment.c_thought * experiment.max_latent_stage
        latents = max(last, *(stage.num_latents for stage in use.stages)) + 2
        room = limit.positions - (latents if experiment.method.has_latents else 0)
        rows: list[tuple[int, int, Stage]] = []
        # Only problems that are above the limit with every step and every latent are rendered.
        for index in np.flatnonzero(num_tokens(use.problems) > room).tolist():
            problem, lengths = use.problems[index], []
            drawn = [numbered_stage(n, experiment) for n in range(len(problem.steps) + 1)] if mixes else []
            for stage in [*use.stages, *drawn]:
                sample = render(problem, stage, experiment, self.vocabulary)
                lengths.append((sample.num_prompt if prompts else len(sample.tokens), stage))
            tokens, stage = max(lengths, key=lambda pair: pair[0])
            if tokens > limit.positions:
                rows.append((tokens, index, stage))
        return rows

    def _describe(
        self, use: Use, limit: Limit, rows: Sequence[tuple[int, int, Stage]], part: str = ""
    ) -> str:
        tokens, index, stage = max(rows, key=lambda row: row[0])
        more = f", and {len(rows) - 1} more items are too long" if len(rows) > 1 else ""
        return (
            f"{use.path}, item {index}: {part}this example has {tokens:,} tokens ({stage}), "
            f"and {limit.name.format(limit.positions)}{more}"
        )


class _Shortened(Sequence[TokenizedProblem]):
    """Problems without those that `changes` drops, and with those that it replaces."""

    def __init__(self, problems: Sequence[TokenizedProblem], changes: Changes) -> None:
        self.problems, self.changes = problems, changes
        self.indices = [i for i in range(len(problems)) if changes.get(i, problems) is not None]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedProblem: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedProblem]: ...
    def __getitem__(self, index: int | slice) -> TokenizedProblem | list[TokenizedProblem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        original = self.indices[index]
        return self.changes.get(original) or self.problems[original]


def shortened(problems: Sequence[TokenizedProblem], changes: Changes) -> Sequence[TokenizedProblem]:
    """`problems` with `changes`, without a copy."""
    return _Shortened(problems, changes) if changes else problems


def trained_stages(experiment: Experiment) -> list[Stage]:
    """Every stage that the epochs of a run reach, without those that `uniform_prob` draws."""
    last = last_epoch(experiment)
    epochs = range(min(experiment.resume, last), last + 1)
    return list(dict.fromkeys(stage_at(epoch, experiment) for epoch in epochs))


def num_tokens(problems: Sequence[TokenizedProblem]) -> np.ndarray:
    """The number of tokens of every problem: question, steps and answer."""
    if isinstance(problems, CachedProblems):
        return problems.num_tokens()
    return np.array([len(p.question) + sum(map(len, p.steps)) + len(p.answer) for p in problems], dtype=int)


def shared_questions(
    train: Sequence[TokenizedProblem],
    train_path: str,
    sets: Mapping[str, TestSet],
    unknown: int | None = None,
) -> Iterator[str]:
    """A note for each evaluation file with questions of the training file; compared as token ids.

    `unknown`: the id of text that the tokenizer does not know; such questions cannot be compared.
    """
    asked = {
        problem.question
        for test_set in sets.values()
        for problem in test_set.tokenized
        if unknown is None or unknown not in problem.question
    }
    seen: dict[tuple[int, ...], int] = {}  # question -> index in the training file
    for index, problem in enumerate(train):
        if problem.question in asked:
            seen.setdefault(problem.question, index)
    for path, test_set in sets.items():
        shared = [i for i, problem in enumerate(test_set.tokenized) if problem.question in seen]
        if shared:
            first = shared[0]
            yield (
                f"{path}: {len(shared)} of {len(test_set)} questions are also in {train_path}, so accuracy "
                f"on them does not measure generalization; the first is item {first} = item "
                f"{seen[test_set.tokenized[first].question]}: {_short(test_set.problems[first].question)!r}"
            )


def stages_beyond(train: Sequence[TokenizedProblem], experiment: Experiment) -> Iterator[str]:
    """A note if the curriculum has stages for more steps than any training problem has."""
    if not (train and experiment.method.has_stages):
        return
    if isinstance(train, CachedProblems):
        longest = int(train.num_pieces().max()) - 2  # without question and answer
    else:
        longest = max(len(problem.steps) for problem in train)
    if longest == 0:
        yield f"{experiment.train_path}: no problem has steps, so no stage hides anything; add 'steps'"
    elif longest < experiment.max_latent_stage:
        yield (
            f"{experiment.train_path}: no problem has more than {counted(longest, 'step')}, so the later "
            f"stages hide no more than stage {longest}: --set max_latent_stage={longest}"
        )


def unknown_id(vocabulary: Vocabulary) -> int | None:
    """The token for text that the tokenizer does not know; None if it has none, or is eos or bos (GPT-2)."""
    tokenizer = vocabulary.tokenizer
    return (
        None if tokenizer.unk_token in (tokenizer.eos_token, tokenizer.bos_token) else tokenizer.unk_token_id
    )


def unknown_text(
    vocabulary: Vocabulary,
    train: Sequence[TokenizedProblem],
    train_path: str,
    sets: Mapping[str, TestSet],
    fields: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """One note with the count and the texts that the tokenizer maps to its unknown token, if any."""
    unknown = unknown_id(vocabulary)
    if unknown is None:
        return
    texts: Counter[str] = Counter()
    files = []
    for path, problems, tokenized in [
        (train_path, None, train),
        *((path, test_set.problems, test_set.tokenized) for path, test_set in sets.items()),
    ]:
        indices = [i for i, problem in enumerate(tokenized) if _has(problem, unknown)]
        if indices:
            files.append(path)
            known = read_problems(path, indices[-1] + 1, fields) if problems is None else problems
            for index in indices:
                texts.update(_unknown_parts(known[index], vocabulary, unknown))
    if not texts:
        return
    named = ", ".join(f"{_short(text)!r} ({count})" for text, count in texts.most_common(MAX_NAMED))
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    yield (
        f"{', '.join(files)}: the tokenizer of model_id does not know {sum(texts.values())} pieces of text, "
        f"and the model cannot tell them apart: {named}{more}"
    )


def _has(problem: TokenizedProblem, unknown: int) -> bool:
    return any(unknown in ids for ids in (problem.question, problem.answer, *problem.steps))


def _unknown_parts(problem: Problem, vocabulary: Vocabulary, unknown: int) -> Iterator[str]:
    """The pieces of a problem that become the unknown token; the texts, without a fast tokenizer."""
    tokenizer = vocabulary.tokenizer
    for text in (problem.question + "\n", *(step + "\n" for step in problem.steps), "### " + problem.answer):
        options = {"add_special_tokens": False, "split_special_tokens": True}
        encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, **options)
        spans = (
            encoded["offset_mapping"] if tokenizer.is_fast else [(0, len(text))] * len(encoded["input_ids"])
        )
        for token, (start, end) in zip(encoded["input_ids"], spans, strict=True):
            if token == unknown:
                yield text[start:end]


def _short(text: str) -> str:
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 3] + "..."
