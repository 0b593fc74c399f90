"""ProntoQA: the published conversion, and generated problems whose labels a reasoner agrees with."""

import json
import os
import random
import re
from pathlib import Path

import pytest

from coconut_ds.errors import DataError
from preprocessing.prontoqa import generated, read_raw, write_raw
from preprocessing.prontoqa_like import draw_problem, statistics, violations

SHARED_DATA = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[3] / "shared")) / "data"


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


def solve(question: str) -> str:
    """Forward chaining over the sentences as they are written; raises KeyError when the query stays open."""
    sentences = re.findall(r"[^.:]+[.:]", question)
    rules, known, query = [], {}, None
    for position, sentence in enumerate(sentences):
        words = sentence.strip(" .:").lower().split()
        verb = next(index for index, word in enumerate(words) if word in ("is", "are", "true"))
        subject = words[verb - 1] if verb else ""
        rest = [word for word in words[verb + 1 :] if word not in ("a", "an")]
        truth = rest[:1] != ["not"]
        what = re.sub(r"es$", "", rest[-1]) if rest[-1].endswith("puses") else rest[-1]
        if words[:3] == ["true", "or", "false"]:
            continue
        if position == len(sentences) - 1:
            query = (what, truth)
        elif "pus" in subject:
            rules.append((re.sub(r"es$", "", subject), what, truth))
        else:
            known[what] = truth
    while True:
        new = {what: truth for concept, what, truth in rules if known.get(concept) and what not in known}
        if not new:
            break
        known |= new
    assert query is not None
    return str(known[query[0]] == query[1])


def check_proof(item: dict) -> None:
    """Every step starts from what the one before concluded, and uses a sentence of the question."""
    for step, following in zip(item["steps"], item["steps"][1:], strict=False):
        fact, rule = (part.strip() + "." for part in step.rstrip(".").split("."))
        assert rule in item["question"]
        concept = fact.rstrip(".").split()[-1]
        assert re.match(rf"(Every |Each )?{concept}(es)? ", rule, re.IGNORECASE)
        conclusion = following.split(".")[0]
        is_not = " not " in f" {conclusion} "
        assert is_not == (" not " in rule)
        assert re.sub(r"es$", "", rule.rstrip(".").split()[-1]).startswith(conclusion.split()[-1][:-1])


@pytest.fixture(scope="module")
def released():
    return [
        i for split in ("valid", "test") for i in json.loads(shared(f"prontoqa_{split}.json").read_text())
    ]


def test_the_solver_solves_the_released_problems(released):
    items = released
    assert len(items) == 1_000
    assert [solve(item["question"]) for item in items] == [item["answer"] for item in items]
    assert [violations(item) for item in items] == [[]] * 1_000


def test_the_solver_agrees_with_every_generated_label():
    items = list(generated(1_000, 7, "test", 5, set()))
    assert [solve(item["question"]) for item in items] == [item["answer"] for item in items]
    for item in items:
        check_proof(item)
    assert 440 < sum(item["answer"] == "True" for item in items) < 560


def test_generated_statistics_are_those_of_the_official_output(released):
    theirs, ours = statistics(released), statistics(generated(3_000, 0, "train", 5, set()))
    for measure in ("sentences", "words", "steps", "words in the steps", "sentences with not"):
        assert ours[measure] == pytest.approx(theirs[measure], rel=0.05), measure
    for measure in ("share True", "share of queries with not", "share of conclusions with not"):
        assert ours[measure] == pytest.approx(theirs[measure], abs=0.055), measure  # 3 sd of both samples


def test_raw_output_becomes_the_published_structure(tmp_path):
    path = shared("prontoqa_raw_5hop_300.json")
    items = read_raw(path)
    raw = [example["test_example"] for example in json.loads(path.read_text()).values()]
    assert len(items) == 300
    for item, example in zip(items, raw, strict=True):
        assert list(item) == ["question", "steps", "answer"]
        assert item["question"] == f"{example['question']} {example['query']}"
        assert " ".join(item["steps"]) == " ".join(example["chain_of_thought"]) and len(item["steps"]) == 6
        assert solve(item["question"]) == item["answer"] == example["answer"]
        assert violations(item) == []
    write_raw(tmp_path, path, {"train": 200, "valid": 20}, limit=None)
    for split, part in (("train", items[:200]), ("valid", items[200:220]), ("test", items[220:])):
        assert (tmp_path / f"prontoqa_{split}.json").read_text() == json.dumps(part)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "not JSON"),
        ("[]", "the raw output"),
        ('{"example1": {}}', "example1: 'test_example'"),
        ('{"example1": {"test_example": {"question": "q"}}}', "'query' is missing"),
        ('{"example1": []}', "example1"),
    ],
)
def test_what_is_wrong_with_raw_output_is_said(tmp_path, content, expected):
    (tmp_path / "raw.json").write_text(content)
    with pytest.raises(DataError, match=expected):
        read_raw(tmp_path / "raw.json")


def test_too_few_raw_problems_for_the_published_split():
    with pytest.raises(DataError, match="300 problems leave nothing to test"):
        write_raw(Path("nowhere"), shared("prontoqa_raw_5hop_300.json"), {"train": 9_000, "valid": 200}, None)


@pytest.mark.parametrize("hops", range(1, 6))
def test_other_numbers_of_hops(hops):
    for index in range(50):
        item = draw_problem(random.Random(index), hops)
        assert violations(item, hops) == [] and solve(item["question"]) == item["answer"]


def test_the_form_checker_sees_what_is_broken():
    item = draw_problem(random.Random(0))
    other = {"True": "False", "False": "True"}[item["answer"]]
    first_rule = item["question"].split(". ")[0] + ". "
    for broken in (
        item | {"answer": other},
        item | {"steps": item["steps"][:-1]},
        item | {"steps": [item["steps"][1], *item["steps"][1:]]},
        item | {"question": item["question"].replace(first_rule, "")},
        item | {"question": first_rule + item["question"]},
        item | {"question": "Every wumpus is green. " + item["question"].replace(first_rule, "")},
    ):
        assert violations(broken)
