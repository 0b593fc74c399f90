"""Notes on data that trains or is evaluated, but may not mean what it seems to.

questions of an evaluation file that are also in the training file
text that the tokenizer does not know, so that the model reads the same unknown token for all of it
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from coconut_ds.data.problems import Problem, read_problems
from coconut_ds.data.run_data import TestSet
from coconut_ds.data.tokenizer import TokenizedProblem, Vocabulary

MAX_NAMED = 5  # unknown texts in a note
MAX_LETTERS = 60


def shared_questions(
    train: Sequence[TokenizedProblem], train_path: str, sets: Mapping[str, TestSet]
) -> Iterator[str]:
    """A note for each evaluation file with questions of the training file; compared as token ids."""
    asked = {problem.question for test_set in sets.values() for problem in test_set.tokenized}
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


def unknown_text(
    vocabulary: Vocabulary, train: Sequence[TokenizedProblem], train_path: str, sets: Mapping[str, TestSet]
) -> Iterator[str]:
    """One note with the count and the texts that the tokenizer maps to its unknown token, if any."""
    unknown = vocabulary.tokenizer.unk_token_id
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
            known = read_problems(path, indices[-1] + 1) if problems is None else problems
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
    # The answer ends with eos, which is the unknown token in GPT-2's vocabulary.
    return (
        unknown in problem.question
        or unknown in problem.answer[:-1]
        or any(unknown in s for s in problem.steps)
    )


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
