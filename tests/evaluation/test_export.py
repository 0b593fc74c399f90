"""Exported folders: read by plain transformers and PEFT with equal logits, asked with latents, explained."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import coconut_ds
from coconut_ds.__main__ import main
from coconut_ds.config.experiment import validate_experiment
from coconut_ds.data.curriculum import Stage
from coconut_ds.data.tokenizer import load_vocabulary
from coconut_ds.errors import CheckpointError
from coconut_ds.evaluation.evaluate import Prediction, summarize
from coconut_ds.evaluation.export import read_back_difference
from coconut_ds.evaluation.measure import Measurement, write_results
from coconut_ds.evaluation.model_card import _question
from coconut_ds.evaluation.saved_models import find_one
from coconut_ds.model.lora import read_origin
from tests.run_folders import make_run

PLACEHOLDER = "'YOUR QUESTION'"
QUESTIONS = ["3+4+2+7=?", "1+1+1+1=?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def full(tiny_experiment, folder):
    return make_run(tiny_experiment, folder, name="full", thought="mlp_projection", max_new_tokens=6)


@pytest.fixture(scope="module")
def lora(tiny_experiment, folder):
    keys = {"name": "lora", "tuning": "lora", "thought": "learnable_window", "max_new_tokens": 6}
    return make_run(tiny_experiment, folder, **keys)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.tensor([[3, 4, 5, 18, 20, 19, 6]])).logits


def test_stock_transformers_reads_a_fully_tuned_model(full, tmp_path):
    assert main(["export", str(full), "--output", str(tmp_path / "out")]) == 0
    own = find_one(str(full)).build(load_vocabulary(str(full / "checkpoint_4" / "model"))).causal_lm
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(stock), logits(own))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<|latent|>") == len(tokenizer) - 1


@pytest.mark.parametrize("run", ["full", "lora"])
@pytest.mark.parametrize("merge", [False, True])
def test_the_exported_model_answers_with_latents_as_the_run_does(request, tmp_path, run, merge):
    source = request.getfixturevalue(run)
    if run == "full" and merge:
        assert main(["export", str(source), "--output", str(tmp_path / "out"), "--merge"]) == 2
        return
    assert main(["export", str(source), "--output", str(tmp_path / "out"), *["--merge"] * merge]) == 0
    inside = coconut_ds.CoconutForCausalLM.from_pretrained(source)
    outside = coconut_ds.CoconutForCausalLM.from_pretrained(tmp_path / "out")
    assert outside.trained.stage == inside.trained.stage
    for num_latents in (None, 0, 5):
        answers = outside.answer_questions(QUESTIONS, num_latents)
        assert answers == inside.answer_questions(QUESTIONS, num_latents)
        assert [outside.answer_questions(question, num_latents) for question in QUESTIONS] == answers


def test_merged_lora_is_a_plain_model_with_the_same_logits(lora, tmp_path):
    assert main(["export", str(lora), "--output", str(tmp_path / "out"), "--merge"]) == 0
    trained = find_one(str(lora))
    own = trained.build(load_vocabulary(trained.experiment.model_id)).causal_lm
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(stock), logits(own), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_plain_peft_reads_the_adapter_as_the_card_says(tiny_experiment, tmp_path, quantization, monkeypatch):
    if quantization == "nf4":
        modules = pytest.importorskip("bitsandbytes").nn.modules
        # A kernel of some CPUs, for evaluation, rounds scales to bf16.
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    keys = {"tuning": "lora", "quantization": quantization, "thought": "learnable_window"}
    run, out = make_run(tiny_experiment, tmp_path, **keys), tmp_path / "out"
    assert main(["export", str(run), "--output", str(out)]) == 0
    trained = find_one(str(run))
    own = trained.build(load_vocabulary(trained.experiment.model_id)).causal_lm
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    torch.testing.assert_close(logits(as_the_card_says(card, out)), logits(own), atol=1e-5, rtol=1e-5)


def as_the_card_says(card, out):
    """The model of the card's code for plain Transformers."""
    (recipe,) = re.findall(r"```python\n(from transformers.*?)```", card, re.S)
    names: dict = {}
    exec(recipe.replace("THIS_FOLDER", str(out)), names)
    return names["model"].eval()


@pytest.mark.parametrize("start", ["checkpoint_4", "best", "checkpoint_4/model", "state_dict.pt"])
def test_the_card_of_an_adapter_names_the_weights_that_it_belongs_to(tiny_experiment, tmp_path, start):
    cot = make_run(tiny_experiment, tmp_path, name="cot", method="cot")
    torch.save(
        find_one(str(cot)).build(load_vocabulary(tiny_experiment["model_id"])).causal_lm.state_dict(),
        cot / "state_dict.pt",
    )
    keys = {"name": "lora", "tuning": "lora", "load_model_path": str(cot / start)}
    lora = make_run(tiny_experiment, tmp_path, **keys)
    out = tmp_path / "out"
    assert main(["export", str(lora), "--output", str(out)]) == 0
    card = (out / "README.md").read_text()
    if start == "state_dict.pt":
        assert "export again with `--merge`" in card and "PeftModel" not in card
        return
    trained = find_one(str(lora))
    own = trained.build(load_vocabulary(trained.experiment.model_id)).causal_lm
    torch.testing.assert_close(logits(as_the_card_says(card, out)), logits(own), atol=1e-5, rtol=1e-5)
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert f'from_pretrained("{base}")' in card and (Path(base) / "config.json").is_file()


def test_half_precision(full, tmp_path):
    assert main(["export", str(full), "--output", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_card_has_data_settings_results_and_memory(full, tmp_path):
    predictions = [Prediction(i, "### 1", "1", "1", i < 3, False, 2) for i in range(4)]
    trained = find_one(str(full))
    evaluation = summarize(predictions, 0.5, "exact")
    measured = Measurement(trained.name, "test", trained.stage, None, evaluation, file="t.json", role="own")
    write_results(measured, full)
    memory = {"kind": "memory", "gpu_peak_mib": 812.4, "epoch": 0}
    (full / "metrics.jsonl").write_text(
        "".join(json.dumps(memory | {"gpu_peak_mib": m}) + "\n" for m in (5, 812.4))
    )
    assert main(["export", str(full), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    question = json.loads(Path(trained.experiment.val_path).read_text())[0]["question"]
    for part in (
        f"model.answer_questions({question!r}, num_latents=3)",
        "| test, t.json (the run's own file), 4 items | 3 steps hidden, 3 latents | 3 | exact | "
        "75.0 % [30.1, 95.4] | 2.0 |",
        "made by preprocessing/arithmetic.py",
        "| thought | mlp_projection |",
        "| lr_schedule | constant |",
        "| gpu peak | 812 |",
        "library_name: transformers",
    ):
        assert part in card
    record = json.loads((tmp_path / "out" / "coconut.json").read_text())
    assert (record["thought"], record["method"], record["c_thought"], record["num_latents"]) == (
        "mlp_projection", "coconut", 1, 3,
    )  # fmt: skip


def test_a_folder_that_reads_back_wrong_is_refused(full, tmp_path):
    vocabulary = load_vocabulary(str(full / "checkpoint_4" / "model"))
    module = find_one(str(full)).build(vocabulary)
    with pytest.raises(CheckpointError, match="its logits differ"):
        read_back_difference(module, vocabulary, full / "checkpoint_1" / "model", "fp32")


def test_zero_is_explained_with_this_runs_paths(full, tmp_path, capsys):
    assert main(["export", str(full), "--to", "zero", "--output", str(tmp_path / "state")]) == 0
    command = (
        f"python -m deepspeed.utils.zero_to_fp32 {full / 'checkpoint_4'} {tmp_path / 'state'} --tag engine"
    )
    assert command in capsys.readouterr().out


def test_nothing_is_uploaded_without_the_flag_and_a_failed_upload_says_what_to_do(
    full, tmp_path, capsys, monkeypatch
):
    asked = []

    class Hub:
        def create_repo(self, repository, private, exist_ok):
            asked.append((repository, private))
            raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["export", str(full), "--output", str(tmp_path / "a")]) == 0
    assert asked == []
    assert main(["export", str(full), "--output", str(tmp_path / "b"), "--push", "me/it", "--private"]) == 2
    assert asked == [("me/it", True)]
    assert "no route to the hub" in capsys.readouterr().err
    assert (tmp_path / "b" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--output", "HERE"], "already exists; name a new folder"),
        (["--output", "NEW", "--checkpoint", "checkpoint_7"], "no such checkpoint"),
        (["--output", "NEW", "--private"], "--private needs --push"),
        (["--output", "NEW", "--to", "zero", "--merge"], "use --merge and --push with --to hf"),
        (["--output", "/proc/nothing/here"], "cannot be written"),
    ],
)
def test_wrong_use(full, tmp_path, capsys, arguments, text):
    (tmp_path / "something").write_text("")
    places = {"HERE": str(tmp_path), "NEW": str(tmp_path / "new")}
    assert main(["export", str(full), *[places.get(word, word) for word in arguments]]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "question, shown",
    [
        ("Tom has 3 apples.\nHow many?", r"'Tom has 3 apples.\nHow many?'"),
        ("a ` b", PLACEHOLDER),
        (None, PLACEHOLDER),
    ],
)
def test_the_card_asks_a_question_of_the_run_s_own_data(question, shown, tiny_experiment, tmp_path):
    path = tmp_path / "v.json"
    if question:
        path.write_text(json.dumps([{"q": question, "steps": [], "answer": "3"}]))
    values = tiny_experiment | {"val_path": str(path), "train_path": str(tmp_path / "gone.json")}
    experiment = validate_experiment(values | {"fields": {"question": "q"}}, "test")
    assert _question(experiment) == shown


def test_a_received_result_adds_nothing_to_the_card(full, tmp_path):
    line = {"checkpoint": "checkpoint_4", "split": "valid", "latents": 3, "num_correct": 1, "num_items": 2}
    (full / "evaluations.jsonl").write_text(
        json.dumps(line | {"mean_tokens": 2.0, "ablation": "a\n# b | c", "grading": ["x"]}) + "\n"
    )
    assert main(["export", str(full), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3, a # b \\| c" in card and "| not recorded |" in card


def test_every_row_of_the_card_says_file_stage_and_grading(tiny_experiment, tmp_path):
    """One split name is no data set: each file, stage and rule has a row, and training data its label."""
    run = make_run(tiny_experiment, tmp_path)
    trained = find_one(str(run))
    result = summarize([Prediction(0, "### 1", "1", "1", True, False, 2)], 0.5, "exact")
    own = Measurement(trained.name, "valid", trained.stage, None, result, file="v.json", role="own")
    other_rule = replace(result, grading="latex")
    for measured in (
        own,
        replace(own, file="/data/x.json", role="other"),
        replace(own, file="/data/train.json", role="training"),
        replace(own, stage=Stage(1, 1)),
        replace(own, evaluation=other_rule),
        replace(own, evaluation=replace(other_rule, num_correct=0)),  # measured again: replaces its row
    ):
        write_results(measured, run)
    with open(run / "evaluations.jsonl", "a") as writer:  # an older version, and a received line
        old = {"checkpoint": trained.name, "split": "valid", "latents": 3, "ablation": "intact"}
        old |= {"num_correct": 1, "num_items": 1, "mean_tokens": 2.0, "file": 5, "role": ["own"]}
        writer.write(json.dumps(old) + "\n")
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [row.split(" | ")[:5] for row in card.splitlines() if row.startswith("| valid")]
    at, all_right = "3 steps hidden, 3 latents", "100.0 % [20.7, 100.0]"
    assert rows == [
        ["| valid, v.json (the run's own file), 1 item", at, "3", "exact", all_right],
        ["| valid, x.json (not a file of this run's settings), 1 item", at, "3", "exact", all_right],
        ["| valid, train.json (**training data**), 1 item", at, "3", "exact", all_right],
        [
            "| valid, v.json (the run's own file), 1 item",
            f"1 step hidden, 1 latent (trained at: {at})", "1", "exact", all_right,
        ],
        ["| valid, v.json (the run's own file), 1 item", at, "3", "latex", "0.0 % [0.0, 79.3]"],
        ["| valid, file not recorded, 1 item", "not recorded", "3", "not recorded", all_right],
    ]  # fmt: skip


def test_a_result_of_another_way_does_not_replace_the_own_row_of_the_card(tiny_experiment, tmp_path):
    run = make_run(tiny_experiment, tmp_path)
    trained = find_one(str(run))
    result = summarize([Prediction(0, "### 1", "1", "1", True, False, 2)], 0.5, "exact")
    own = Measurement(trained.name, "valid", trained.stage, None, result, file="v.json", role="own")
    wrong = replace(result, num_correct=0, accuracy=0.0)
    for texts in (("max_new_tokens 1 instead of 8",), (), ("thought fixed | b", "0 latents instead of 3")):
        write_results(replace(own, differences=texts, evaluation=wrong if texts else result), run)
    with open(run / "evaluations.jsonl", "a") as writer:  # a received line
        writer.write(json.dumps({**own.numbers(), "differences": [5]}) + "\n")
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [row for row in card.splitlines() if row.startswith("| valid")]
    assert [row.split(" item")[1].split(" | ")[0] for row in rows] == [
        "",
        "; **max_new_tokens 1 instead of 8**",
        "; **thought fixed \\| b, 0 latents instead of 3**",
    ]
    assert ["100.0 %" in row for row in rows] == [True, False, False]


@pytest.mark.parametrize("weights", [False, 0, ""])
def test_a_received_base_record_is_checked(lora, tmp_path, weights):
    path = lora / "checkpoint_4" / "model" / "base.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"weights": weights}))
    try:
        with pytest.raises(CheckpointError, match="does not describe an adapter's base"):
            read_origin(path.parent)
    finally:
        path.write_text(before)
