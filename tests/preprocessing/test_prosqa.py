"""ProsQA-like problems: the released files obey the same invariants, and the numbers agree."""

import json
import os
import random
from pathlib import Path

import pytest

from coconut_ds.errors import DataError
from preprocessing.prosqa import OUT_OF_DISTRIBUTION, write_generated
from preprocessing.prosqa_like import Recipe, generate, statistics, violations

SHARED_DATA = Path(os.environ.get("SHARED_DIR", Path(__file__).parents[3] / "shared")) / "data"


@pytest.fixture(scope="module")
def released():
    paths = [SHARED_DATA / f"prosqa_{split}.json" for split in ("valid", "test")]
    for path in paths:
        if not path.is_file():
            pytest.skip(f"{path} is not on this machine")
    return [item for path in paths for item in json.loads(path.read_text())]


def drawn(count: int, recipe: Recipe = Recipe(), seed: int = 0) -> list[dict]:  # noqa: B008 frozen
    return list(generate(count, recipe, lambda index: random.Random(f"{seed}/{index}"), set()))


@pytest.fixture(scope="module")
def ten_thousand():
    return drawn(10_000)


def test_all_released_problems_obey_the_invariants(released):
    assert len(released) == 800
    assert [violations(item) for item in released] == [[]] * 800


def test_ten_thousand_generated_problems_obey_the_invariants(ten_thousand):
    assert len({item["question"] for item in ten_thousand}) == 10_000
    assert [violations(item) for item in ten_thousand] == [[]] * 10_000


def test_generated_statistics_are_within_five_percent_of_the_released_ones(released, ten_thousand):
    theirs, ours = statistics(released), statistics(ten_thousand)
    for measure in (
        *("nodes", "edges", "hops", "entities", "decoy depth", "words", "share asking about node 1"),
        *("nodes reached from the root", "children of the root", "share naming the target first"),
    ):
        assert ours[measure] == pytest.approx(theirs[measure], rel=0.05), measure
    for hops in range(3, 7):  # three standard errors of 800 problems are at most 0.053
        share = f"share with {hops} hops"
        assert ours[share] == pytest.approx(theirs[share], abs=0.053), share


def breakers():
    def edit(**changes):
        return lambda item: item | {key: change(item) for key, change in changes.items()}

    return {
        "answer": edit(answer=lambda i: i["answer"].replace(" is a ", " is the ")),
        "leaf": edit(target=lambda i: next(c for _, c in i["edges"] if any(c == p for p, _ in i["edges"]))),
        "other root": edit(root=lambda i: 1 - i["root"]),
        "swapped": edit(target=lambda i: i["neg_target"], neg_target=lambda i: i["target"]),
        "short": edit(steps=lambda i: i["steps"][:-1]),
        "detour": edit(steps=lambda i: i["steps"] + i["steps"][-1:]),
        "reversed": edit(steps=lambda i: i["steps"][::-1]),
        "fact twice": edit(question=lambda i: i["steps"][0] + " " + i["question"]),
        "fact lost": edit(question=lambda i: i["question"].replace(i["steps"][1] + " ", "")),
        "edge up": edit(edges=lambda i: [[c, p] for p, c in i["edges"]]),
        "edge twice": edit(edges=lambda i: i["edges"][:1] + i["edges"]),
        "symbol twice": edit(idx_to_symbol=lambda i: i["idx_to_symbol"][:-1] + i["idx_to_symbol"][-2:-1]),
        "concept named": edit(idx_to_symbol=lambda i: ["wumpus", *i["idx_to_symbol"][1:]]),
        "isolated": edit(idx_to_symbol=lambda i: [*i["idx_to_symbol"], "Zoe"]),
    }


@pytest.mark.parametrize("name", breakers())
def test_the_checker_sees_what_is_broken(ten_thousand, name):
    for item in ten_thousand[:20]:
        assert violations(breakers()[name](item)), name


@pytest.mark.parametrize("name", OUT_OF_DISTRIBUTION)
def test_out_of_distribution_problems(name):
    recipe = Recipe(**OUT_OF_DISTRIBUTION[name])
    found = statistics(drawn(10, recipe))
    if name == "dense":
        assert found["edges"] > 45
    else:
        assert found["hops"] == recipe.min_hops == recipe.max_hops == int(name[0])


def test_depth_matched_decoys_are_as_deep_as_the_target():
    items = drawn(100, Recipe(depth_matched=True))
    assert statistics(items)["decoy depth"] == statistics(items)["hops"]
    assert all(violations(item, depth_matched=True) == [] for item in items)
    assert any(violations(item, depth_matched=True) for item in drawn(20))


def test_a_recipe_that_no_graph_fulfils_ends_with_advice(monkeypatch):
    monkeypatch.setattr("preprocessing.prosqa_like._MAX_GRAPHS", 50)
    with pytest.raises(
        DataError, match="none of 50 graphs had a problem of 8 to 8 hops with a decoy as deep"
    ):
        drawn(1, Recipe(min_hops=8, max_hops=8, depth_matched=True))


def test_files_depend_on_the_seed_alone_and_a_limit_takes_the_first_problems(tmp_path):
    for folder, seed, count in (("a", 0, 30), ("again", 0, 30), ("first", 0, 5), ("other", 1, 30)):
        counts = {"train": count, "test": count}
        write_generated(tmp_path / folder, "prosqa_like", Recipe(), counts, seed)
    names = ["prosqa_like_train.json", "prosqa_like_test.json", "prosqa_like.card.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
    train, test = (json.loads((tmp_path / "a" / name).read_text()) for name in names[:2])
    first = json.loads((tmp_path / "first" / names[0]).read_text())
    assert first == train[:5] and not {i["question"] for i in train} & {i["question"] for i in test}
