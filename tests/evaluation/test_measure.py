"""eval of a run folder: the right weights and stage, exact totals, files; on two ranks as on one."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coconut_ds.__main__ import main
from coconut_ds.config.deepspeed import LatentMemory
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.curriculum import ALL_STEPS, Stage
from coconut_ds.data.problems import card_for, examples_digest, read_problems
from coconut_ds.errors import CheckpointError, ConfigError
from coconut_ds.evaluation import measure
from coconut_ds.evaluation.data_files import DataFiles
from coconut_ds.evaluation.saved_models import ds_config_of, find_one, find_trained
from coconut_ds.files import hash_file
from coconut_ds.reports.run_records import read_run
from tests.launched.start import ROOT, environment
from tests.run_folders import make_run


@pytest.fixture(scope="module")
def run(tiny_experiment, tmp_path_factory):
    return make_run(tiny_experiment, tmp_path_factory.mktemp("runs"), batch_size_eval=5, max_new_tokens=8)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_checkpoint_knows_its_stage(run):
    first, last = find_trained(str(run), ["best_stage_0", "best"])
    assert (first.name, first.stage) == ("checkpoint_1", Stage(0, 0))
    assert (last.name, last.stage) == ("checkpoint_4", Stage(3, 3))
    assert find_trained(str(run / "checkpoint_1"))[0].stage == first.stage
    assert [t.name for t in find_trained(str(run), ["all"])] == ["checkpoint_1", "checkpoint_4"]
    assert find_one(str(run), num_latents=5).stage == Stage(3, 5)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["gpt_neox", "bloom"])
def test_checkpoints_of_other_names_and_without_positions_are_evaluated(
    kind, tiny_experiment, tmp_path, monkeypatch
):
    """GPT-NeoX saves other names than it loads; BLOOM's configuration has no max_position_embeddings."""
    monkeypatch.setattr("tests.run_folders.LatentMemory", lambda: LatentMemory(segmented_cache=False))
    tokenizer = AutoTokenizer.from_pretrained(tiny_experiment["model_id"])
    more = {"max_position_embeddings": 99, "intermediate_size": 24} if kind == "gpt_neox" else {}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES, **more)
    for part in (AutoModelForCausalLM.from_config(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    values = tiny_experiment | {"model_id": str(tmp_path / "model"), "max_new_tokens": 2}
    run = make_run(values, tmp_path / "runs", epochs=(4,))
    assert main(["eval", str(run), "--limit", "2"]) == 0


def test_a_yaml_names_weights_and_epoch(run, tiny_experiment, tmp_path):
    config = tmp_path / "eval.yaml"
    values = tiny_experiment | {"only_eval": True, "load_model_path": str(run / "checkpoint_4"), "resume": 3}
    config.write_text(yaml.safe_dump(values))
    assert find_one(str(config)).stage == Stage(3, 3)


def test_another_stage_than_trained_at_needs_leave_and_is_said(run, tiny_experiment, tmp_path, capsys):
    """By epoch and path, by the curriculum's settings or --latents; whatever names the weights."""
    config = tmp_path / "eval.yaml"
    assert main(["export", str(run), "--output", str(run / "exported")]) == 0
    for word in ("best", "checkpoint_4", "best_stage_3", "latest", "checkpoint_4/model", "exported"):
        values = tiny_experiment | {"only_eval": True, "load_model_path": str(run / word), "resume": 9}
        config.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError, match=r"another stage \(3 steps hidden.*--allow stage"):
            find_one(str(config))
        assert find_one(str(config), allow=["stage"]).stage == Stage(ALL_STEPS, 3)
        assert "(all steps hidden, 3 latents) than it was trained at" in capsys.readouterr().err
    for command in (["eval"], ["generate", "--prompt", "1+1=?"], ["export", "--output", str(tmp_path / "x")]):
        assert main([command[0], str(config), *command[1:]]) == 2
        assert "--allow stage" in capsys.readouterr().err
    (more,) = find_trained(str(run), ["best"], num_latents=5)
    assert more.notes == [
        "at another stage (3 steps hidden, 5 latents) than it was trained at (3 steps hidden, 3 latents)"
    ]
    assert find_one(str(run), "best").notes == []


def test_the_best_of_a_stage_is_a_name_like_any_other(run):
    names = {"best": "checkpoint_4", "best_stage_3": "checkpoint_4", "best_stage_0": "checkpoint_1"}
    for word, name in names.items():
        assert find_one(str(run), word).name == name
        assert find_one(str(run / word)).name == name


def test_best_of_an_older_version_says_what_it_is(tiny_experiment, tmp_path, capsys):
    old = make_run(tiny_experiment, tmp_path)
    (old / "best").write_text("checkpoint_1\n")
    find_one(str(old), "best")
    expected = "best is checkpoint_1: epoch 1, stage 0 (0 steps hidden, 0 latents). The newest stage is 3"
    assert expected in capsys.readouterr().err
    config = tmp_path / "eval.yaml"
    values = tiny_experiment | {"only_eval": True, "load_model_path": str(old / "best"), "resume": 0}
    config.write_text(yaml.safe_dump(values))
    find_one(str(config))
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (("nowhere",), ConfigError, "no such run folder"),
        (
            ("RUN", ["checkpoint_9"]),
            CheckpointError,
            "available: checkpoint_1, checkpoint_4, best, best_stage_0, best_stage_3",
        ),
        (("RUN/checkpoint_1", ["best"]), ConfigError, "is already a checkpoint; leave out --checkpoint"),
        (
            ("RUN", ["best_stage_2"]),
            CheckpointError,
            "no best_stage_2; available: best_stage_0, best_stage_3",
        ),
        (("RUN", [], ["c_thought=2"]), ConfigError, "was trained at another stage .* --allow stage"),
        (("RUN", [], ["lrr=1"]), ConfigError, "'lrr' is not a setting"),
        (("RUN", [], [], -1), ConfigError, "must be 0 or more"),
        (("RUN/checkpoint_1/model",), ConfigError, "neither a run folder .* nor an exported folder"),
    ],
)
def test_wrong_targets_are_explained(run, arguments, error, text):
    target, *rest = arguments
    with pytest.raises(error, match=text):
        find_trained(target.replace("RUN", str(run)), *rest)


def test_the_run_folder_splits_memory_for_any_number_of_ranks(run):
    config = ds_config_of(run)
    assert config.resolve(find_one(str(run)).experiment, 3)["train_batch_size"] == 24


def evaluate(warm, run, *arguments, ranks=1):
    return warm.run("coconut_ds", "eval", run, *arguments, ranks=ranks, cwd=run.parent)


def evaluate_under_torchrun(run, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["coconut_ds", "eval", str(run), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_a_result_knows_its_file(run, tiny_experiment, tmp_path):
    """By the run's own settings, whatever `--set` or --split name; a copy of the training file too."""
    train, valid = (Path(tiny_experiment[key]) for key in ("train_path", "val_path"))
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    copy.write_bytes(train.read_bytes())
    other.write_text(json.dumps(json.loads(valid.read_text())[:3]))
    for split, value, role in (
        ("valid", None, "own"),
        ("valid", f"val_path={valid.parent}/../{valid.parent.name}/{valid.name}", "own"),
        ("valid", f"val_path={other}", "other"),
        ("valid", f"val_path={train}", "training"),
        ("valid", f"val_path={copy}", "training"),
        ("test", f"test_path={valid}", "other"),
        ("train", None, "training"),
        (str(valid), None, "own"),
        (str(other), f"train_path={other}", "other"),
    ):
        for target in (run, run / "checkpoint_4"):
            trained = find_one(str(target), overrides=[value] if value else [])
            assert trained.files.role(split, measure.split_path(trained.experiment, split)) == role, split


WINDOW = ("thought=fixed_window", "latent_window_weights=[0.5, 0.3, 0.2]")


@pytest.mark.parametrize(
    "overrides, num_latents, differences",
    [
        ([], None, ()),
        ([], 3, ()),
        (["max_new_tokens=8", "batch_size_eval=2", "eval_max_items=3"], None, ()),
        (["max_new_tokens=1"], 0, ("max_new_tokens 1 instead of 8", "0 latents instead of 3")),
        (["max_new_tokens=null"], None, ("max_new_tokens 48 instead of 8",)),  # the data card's
        (["grading=exact"], None, ()),  # the data card's
        (["grading=latex"], None, ("grading latex instead of exact",)),
        (["c_thought=2"], None, ("c_thought 2 instead of 1", "6 latents instead of 3")),
        (
            WINDOW,
            None,
            (
                "thought fixed_window instead of last_hidden",
                "latent_window_weights [0.5, 0.3, 0.2] instead of [0.6, 0.3, 0.1]",
            ),
        ),
    ],
)
def test_a_measurement_says_how_it_differs_from_the_runs_own(run, overrides, num_latents, differences):
    allow = ("stage", "c_thought", "thought", "latent_window_weights")
    for target in (run, run / "checkpoint_4"):
        trained = find_one(str(target), None, overrides, num_latents, allow)
        card = replace(card_for(trained.experiment.val_path), max_new_tokens=48, grading="exact")
        assert trained.differences(card) == differences


@pytest.mark.parametrize(
    "overrides, allow, refused",
    [
        (WINDOW, [], ["thought", "latent_window_weights"]),
        (WINDOW, ["thought"], ["latent_window_weights"]),
        (["seed=5"], [], ["seed"]),
        (["c_thought=2"], ["stage"], ["c_thought"]),
        (["max_new_tokens=1", "train_path=x.json", "batch_size_eval=1"], [], []),
    ],
)
def test_settings_that_the_weights_were_trained_with_need_leave(run, overrides, allow, refused, capsys):
    words = [word for text in overrides for word in ("--set", text)]
    words += [word for key in allow for word in ("--allow", key)]
    try:
        find_trained(str(run), (), overrides, None, allow)
        assert not refused
    except ConfigError as error:
        assert [line.partition("=")[0].removeprefix("--set ") for line in str(error).splitlines()] == refused
        for command in (["eval"], ["generate", "--prompt", "1+1=?"]):
            assert main([command[0], str(run), *command[1:], *words]) == 2
            printed = capsys.readouterr().err
            assert all(f"--allow {key} if this is intended" in printed for key in refused)


def test_a_yaml_edited_beside_its_run_is_labeled(run, tmp_path):
    values = yaml.safe_load((run / "experiment.yaml").read_text())
    values |= {"only_eval": True, "load_model_path": str(run / "checkpoint_4"), "resume": 4}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(values | {"max_new_tokens": 1}))
    card = card_for(values["val_path"])
    trained = find_one(str(tmp_path / "e.yaml"), allow=["stage"])
    assert trained.folder == run and "max_new_tokens 1 instead of 8" in trained.differences(card)


def test_a_result_of_another_way_does_not_replace_the_runs_own(tiny_experiment, tmp_path, capsys):
    own = make_run(tiny_experiment, tmp_path, epochs=(4,), batch_size_eval=5, max_new_tokens=8)
    for words in ([], ["--set", "max_new_tokens=1"], ["--latents", "0"], []):
        assert main(["eval", str(own), "--limit", "3", *words]) == 0
    assert "not the run's own result: max_new_tokens 1 instead of 8" in capsys.readouterr().out
    recorded = [line["differences"] for line in lines(own / "evaluations.jsonl")]
    assert recorded == [[], ["max_new_tokens 1 instead of 8"], ["0 latents instead of 3"], []]
    answers = read_run(own).answers()
    assert [list(one.differences) for one in answers] == [[], recorded[2], recorded[1]]
    assert [len(one.correct) for one in answers] == [3, 3, 3]
    assert len(lines(own / "predictions.jsonl")) == 9


def test_a_file_that_was_trained_on_counts_after_it_changed(tmp_path):
    (tmp_path / "now.json").write_text("[1]")
    (tmp_path / "copy.json").write_text("[2]")
    files = DataFiles(str(tmp_path / "now.json"), train_sha256=hash_file(tmp_path / "copy.json"))
    assert files.role("valid", str(tmp_path / "copy.json")) == "training"
    assert files.role("valid", str(tmp_path / "now.json")) == "training"


@pytest.mark.parametrize(
    "val_path, test_path, split, label",
    [
        ("data/gsm_test.json", None, "valid", "test"),  # as the published eval files name it
        ("data/gsm_valid.json", None, "valid", "valid"),
        ("data/x.json", "data/x.json", "valid", "test"),
        ("data/gsm_valid.json", "data/x.json", "test", "test"),
        ("data/test.json", None, "valid", "valid"),
    ],
)
def test_a_test_file_is_called_test(tiny_experiment, val_path, test_path, split, label):
    values = tiny_experiment | {"val_path": val_path, "test_path": test_path}
    assert measure.split_label(validate_experiment(values, "test"), split) == label


def test_a_measurement_prints_and_records_what_it_was_measured_on(run, tiny_experiment, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(Path(tiny_experiment["val_path"]).read_text())[:3]))
    assert main(["eval", str(run), "--set", f"val_path={other}"]) == 0
    assert "valid (other.json), 3 steps hidden" in capsys.readouterr().out
    last = lines(run / "evaluations.jsonl")[-1]
    assert (last["file"], last["role"], last["grading"]) == (str(other), "other", "exact")
    assert (last["stage"], last["examples"]) == (
        "3 steps hidden, 3 latents", examples_digest(read_problems(other)),
    )  # fmt: skip
    assert all(last["examples"] == p["examples"] for p in lines(run / "predictions.jsonl")[-3:])


@pytest.fixture(scope="module")
def one_rank(run, warm):
    """All checkpoints, with two ablations."""
    output = evaluate(
        warm, run, "--checkpoint", "checkpoint_4", "--ablate", "zero,none", "--json", str(run / "all.json")
    )
    examples = lines(run / "evaluations.jsonl")[-1]["examples"]  # other tests measure other files
    predictions = [p for p in lines(run / "predictions.jsonl") if p["examples"] == examples]
    return output, predictions, json.loads((run / "all.json").read_text())


@pytest.mark.slow
def test_files_and_output(one_rank, run):
    output, predictions, numbers = one_rank
    assert [(n["ablation"], n["num_items"]) for n in numbers] == [("intact", 24), ("zero", 24), ("none", 24)]
    assert len(predictions) == 3 * 24
    for n in numbers:
        mine = [p for p in predictions if p["ablation"] == n["ablation"]]
        assert [p["index"] for p in mine] == list(range(24))
        assert sum(p["correct"] for p in mine) == n["num_correct"]
        assert n["accuracy_low"] <= n["accuracy"] <= n["accuracy_high"]
        assert n["seconds_per_item"] > 0
    assert {n["latents"] for n in numbers} == {3}  # as trained; the ablation says what it did to them
    assert "lost" in output
    assert len(lines(run / "evaluations.jsonl")) >= 3


def test_results_that_cannot_be_written_are_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the results were not written .Not a directory"):
        measure._save(None, tmp_path / "file" / "run")


def intact(run, split):
    examples = lines(run / "evaluations.jsonl")[-1]["examples"]
    return {
        p["index"]: p
        for p in lines(run / "predictions.jsonl")
        if (p["ablation"], p["split"], p["examples"]) == ("intact", split, examples)
    }


@pytest.mark.slow
def test_two_ranks_answer_token_by_token_as_one(one_rank, run):
    """Batches of 5 on one rank against one prompt at a time on two, where a rank runs dry."""
    expected = {p["index"]: p for p in one_rank[1] if p["ablation"] == "intact"}
    evaluate_under_torchrun(run, "--checkpoint", "checkpoint_4", "--set", "batch_size_eval=1")
    assert intact(run, "valid") == expected
    assert len(expected) == 24
    assert len({p["completion"] for p in expected.values()}) > 2


@pytest.mark.slow
def test_ragged_latents_answer_the_same_in_any_company(run, warm, tiny_experiment, tmp_path):
    """With pad_latent_to_max false every row has as many latents as its problem has steps."""
    problems = json.loads(Path(tiny_experiment["val_path"]).read_text())[:9]
    for index, problem in enumerate(problems):
        problem["steps"] = problem["steps"][: index % 4]
    path = tmp_path / "ragged.json"
    path.write_text(json.dumps(problems))
    common = (
        "--split",
        str(path),
        "--set",
        "pad_latent_to_max=false",
        "--allow",
        "pad_latent_to_max",
        "--set",
    )
    evaluate(warm, run, *common, "batch_size_eval=1")
    expected = intact(run, str(path))
    evaluate(warm, run, *common, "batch_size_eval=4", ranks=2)
    assert intact(run, str(path)) == expected
    assert len(expected) == 9


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--ablate", "zeros"], "'zeros' is not an ablation"),
        (["--checkpoint", "checkpoint_1", "--ablate", "zero"], "has no latents at its stage"),
        (["--ablate", "zero:7"], "there are only 3 latent slots"),
        (["--ablate", "swap", "--set", "batch_size_eval=1"], "needs at least two rows per batch"),
        (["--split", "nothing.json"], "no such file; use valid, test, train or a file"),
        (["--split", "test"], "has no test_path"),
        (["--deepspeed_config", "nothing.json"], "nothing.json"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(run, capsys, arguments, text):
    assert main(["eval", str(run), *arguments]) == 2
    assert text in capsys.readouterr().err
