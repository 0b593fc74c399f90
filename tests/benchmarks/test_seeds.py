"""Counting seeds: what was measured is kept, and a changed recipe is measured again."""

import json
from pathlib import Path

import pytest

from benchmarks import record, seeds


@pytest.fixture
def trained(monkeypatch):
    names = []

    def fail(chosen, ranks):
        names.append(chosen.experiment.name)
        return False

    monkeypatch.setattr(seeds, "train", fail)
    monkeypatch.setattr(seeds, "make_data", lambda seed, folder: None)
    return names


def test_a_finished_seed_is_not_trained_again(tmp_path, trained, capsys):
    recipe = seeds.recipe_of(seeds.point("coconut", 7, tmp_path, []).experiment.learning)
    known = {"run": "coconut", "seed": 7, "ranks": 1, "recipe": recipe, "test": 1.0}
    (tmp_path / "seeds.json").write_text(json.dumps({"records": [known]}))
    command = ["--seeds", "7-8", "--runs", "coconut,no_cot", "--folder", str(tmp_path)]
    command += ["--results", str(tmp_path)]
    seeds.main(command)
    assert trained == ["coconut-8", "no_cot-7", "no_cot-8"]
    assert "coconut, seed 8: failed; see" in capsys.readouterr().out
    trained.clear()
    seeds.main([*command, "--set", "lr=0.001"])
    assert trained == ["coconut-7", "coconut-8", "no_cot-7", "no_cot-8"]
    trained.clear()
    seeds.main(["--ranks", "2", *command])
    assert trained == [f"{name}-2ranks" for name in ("coconut-7", "coconut-8", "no_cot-7", "no_cot-8")]


def test_the_ranks_share_the_global_batch(tmp_path):
    sizes = [seeds.point("coconut", 7, tmp_path, [], n).experiment.batch_size_training for n in (1, 2)]
    assert sizes == [64, 32]


def test_the_recipe_ignores_seeds_paths_and_defaults(tmp_path):
    first, second = (seeds.point("coconut", seed, tmp_path / str(seed), []).experiment for seed in (1, 2))
    assert seeds.recipe_of(first.learning) == seeds.recipe_of(second.learning)
    assert seeds.recipe_of(first.learning | {"a_new_key": None}) == seeds.recipe_of(first.learning)
    assert seeds.recipe_of(first.learning | {"lr": 0.1}) != seeds.recipe_of(first.learning)


def test_the_epoch_that_learned_is_counted_in_the_last_stage():
    lines = [(0, 1.0), (1, 0.2), (1, 0.96), (1, 0.9)]

    class Run:
        def of(self, kind):
            return [{"stage": stage, "accuracy": accuracy} for stage, accuracy in lines]

    assert seeds.epoch_learned(Run()) == 2
    lines[2] = (1, 0.94)
    assert seeds.epoch_learned(Run()) is None


def test_the_shipped_results_have_the_shipped_recipes():
    records = record.known("seeds")
    recipes = {(row["run"], row["ranks"]): row["recipe"] for row in records}
    for (run, ranks), recipe in recipes.items():
        point = seeds.point(run, 0, Path("runs"), [], ranks)
        assert seeds.recipe_of(point.experiment.learning) == recipe, run
