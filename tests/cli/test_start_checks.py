"""`validate CONFIG --deepspeed_config JSON` refuses what `train` refuses before its engine starts."""

import json
import shutil

import pytest
import torch
import yaml

from coconut_ds.__main__ import main
from coconut_ds.distributed import Ranks
from tests.conftest import ROOT

CPU = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}
SMALL = {
    "device": "card", "gpus": 1, "gpu_memory_mib": 1024, "reserved_mib": 1023, "host_memory_gib": 1,
    "components_mib": {"activations": 1},
}  # fmt: skip
NVME = {"device": "nvme", "nvme_path": "/tmp"}


def with_template(folder, template):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def as_list(*names):
    return [{"name": name, "template": "{{ messages }}"} for name in names]


def long_item(folder):
    steps = ["<<1+1=2>>"] * 400
    (folder / "t.json").write_text(json.dumps([{"question": "1+1=?", "steps": steps, "answer": "2"}]))


@pytest.fixture
def start(tiny_experiment, tmp_path, monkeypatch, capsys):
    """Run a command on an experiment with `changes`, one rank and no process group; (exit code, error)."""
    shutil.copytree(tiny_experiment["model_id"], tmp_path / "model")
    monkeypatch.setattr(
        "coconut_ds.training.trainer.start_distributed", lambda *_: Ranks(0, 1, torch.device("cpu"))
    )

    def run(command, changes, ds_changes):
        values = tiny_experiment | {"model_id": str(tmp_path / "model"), "save_path": str(tmp_path / "runs")}
        texts = {key: str(value).replace("HERE", str(tmp_path)) for key, value in changes.items()}
        (tmp_path / "c.yaml").write_text(
            yaml.safe_dump(values | {k: yaml.safe_load(v) for k, v in texts.items()})
        )
        (tmp_path / "ds.json").write_text(json.dumps(CPU | ds_changes))
        words = [command, str(tmp_path / "c.yaml"), "--deepspeed_config", str(tmp_path / "ds.json")]
        capsys.readouterr()
        code = main([*words, *(["--ranks", "1"] if command == "validate" else [])])
        errors = capsys.readouterr().err.partition("error: ")[2]
        return code, errors.strip()

    return run


@pytest.mark.parametrize(
    "changes, ds_changes, prepare, text",
    [
        ({"val_path": "HERE/none.json"}, {}, None, "none.json"),
        ({"train_path": "HERE/t.json"}, {}, lambda f: (f / "t.json").write_text("[1]"), "must be an object"),
        ({"test_path": "HERE/t.json"}, {}, long_item, "item 0: this example has"),
        ({"model_id": "HERE/none"}, {}, None, "does not exist"),
        ({}, {}, lambda f: (f / "model" / "tokenizer.json").write_text("{"), "cannot load a tokenizer"),
        ({}, {}, lambda f: with_template(f / "model", as_list("/tmp/x")), "chat template named '/tmp/x'"),
        ({}, {"train_batch_size": 24}, None, "train_batch_size: is 24, but the experiment sets 8"),
        ({}, {"gradient_accumulation_steps": 3}, None, "gradient_accumulation_steps: is 3"),
        ({}, {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, None, "optimizer.params.lr: is 0.5"),
        ({"bf16": True}, {}, None, "the experiment says 'bf16: true'"),
        ({"lrr": 1}, {}, None, "lrr: is not a setting"),
        ({}, {"zero_optimization": {"stage": 7}}, None, "zero_optimization.stage"),
        ({}, {"zero_optimization": {"stage": 3, "offload_param": NVME}}, None, "libaio-dev"),
        ({"load_model_path": "HERE/none"}, {}, None, "load_model_path"),
        ({"thought": "learnable_window", "load_model_path": "HERE/c.yaml"}, {}, None, "c.yaml"),
        pytest.param({}, {"memory_budget": SMALL}, None, "needs", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_validate_and_train_refuse_alike(start, tmp_path, monkeypatch, changes, ds_changes, prepare, text):
    monkeypatch.setattr(
        "deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose=True: False
    )
    if prepare:
        prepare(tmp_path)
    refused = start("validate", changes, ds_changes)
    assert refused[0] == 2 and text in refused[1], refused[1]
    code, message = start("train", changes, ds_changes)
    assert code in (2, 3) and message == refused[1]
    assert (
        not list(tmp_path.glob("runs/*/checkpoint_*"))
        and not (tmp_path / "runs" / "tiny" / "latest").exists()
    )


def test_validate_refuses_a_disk_too_small_for_the_checkpoints(start, monkeypatch):
    monkeypatch.setattr("coconut_ds.runs.checkpoints._free_bytes", lambda folder: 2**20)
    code, error = start("validate", {}, {})
    assert code == 2 and "checkpoints of" in error and "1 MiB are free, enough for 0 more" in error


@pytest.mark.parametrize("limit, is_noted", [(3, True), (64, False)])
def test_validate_notes_a_limit_that_cuts_correct_answers(start, monkeypatch, limit, is_noted):
    notes = []
    monkeypatch.setattr("coconut_ds.training.trainer.print_notes", lambda lines: notes.extend(lines))
    assert start("validate", {"max_new_tokens": limit}, {})[0] == 0
    assert [note.startswith("max_new_tokens: 3 cuts ") for note in notes] == [True] * is_noted


def test_what_validate_accepts_starts(start, capsys):
    assert start("validate", {}, {}) == (0, "")
    assert start("validate", {}, {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}) == (0, "")


@pytest.mark.parametrize(
    "ds_changes, reason",
    [
        ({"fp16": {"enabled": True}}, "fp16 needs a GPU"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "gradients: needs a GPU"),
        ({"aio": {"use_gds": True}}, "aio.use_gds: needs a GPU"),
    ],
)
def test_what_this_machine_cannot_run_is_named(start, monkeypatch, ds_changes, reason):
    lines = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
    assert start("validate", {}, ds_changes)[0] == 0
    (line,) = [line for line in lines if "`train` would start: " in line]
    assert "; not on this machine: " in line and reason in line


def test_settings_and_ranks_of_the_command_line_count(tiny_experiment, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_experiment | {"val_path": "nowhere.json"}))
    (tmp_path / "ds.json").write_text(json.dumps(CPU | {"train_batch_size": 24}))
    words = ["validate", str(tmp_path / "c.yaml"), "--deepspeed_config", str(tmp_path / "ds.json")]
    assert main([*words, "--ranks", "3", "--set", f"val_path={tiny_experiment['val_path']}"]) == 0
    assert "`train` would start: coconut on 3 ranks" in capsys.readouterr().out
    assert main(words) == 2
    assert "batch_size_training 8 x gradient_accumulation_steps 1 x 2 ranks" in capsys.readouterr().err


def test_a_model_that_is_not_here_is_said_not_to_be_checked(tiny_experiment, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_experiment | {"model_id": "nobody/nothing-such"}))
    json_file = ROOT / "ds_configs" / "zero1.json"
    assert main(["validate", str(tmp_path / "c.yaml"), "--deepspeed_config", str(json_file)]) == 0
    assert "data not checked, since this machine does not have nobody/nothing-such" in capsys.readouterr().out


@pytest.mark.parametrize("block", ["offload_optimizer", "offload_param"])
@pytest.mark.parametrize("is_compatible", [True, False])
def test_nvme_needs_the_operator(tmp_path, monkeypatch, capsys, block, is_compatible):
    monkeypatch.setattr(
        "deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda self, verbose=True: is_compatible
    )
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CPU | {"zero_optimization": {"stage": 3, block: NVME}}))
    assert main(["validate", str(path)]) == (0 if is_compatible else 2)
    error = capsys.readouterr().err
    assert (f"zero_optimization.{block}.device: nvme needs" in error) is not is_compatible
    assert is_compatible or ("install libaio-dev" in error and '"device": "cpu"' in error)


@pytest.mark.parametrize(
    "template, accepted",
    [
        (as_list("default", "tool_use"), True),
        ("{{ messages }}", True),
        *(
            (as_list("default", name), False)
            for name in ("/tmp/x", "../x", "a/b", "..", "", "x" * 300, "a\0b")
        ),
        ({"/tmp/right_canary": "x"}, False),
        ({"default": "\ud800"}, False),
        (as_list("default") + [{"name": 5, "template": "x"}], False),
        ({"default": 5}, False),
    ],
)
def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(start, tmp_path, template, accepted):
    with_template(tmp_path / "model", template)
    before = sorted(tmp_path.rglob("*"))
    code, message = start("validate", {}, {})
    assert code == (0 if accepted else 2)
    assert accepted or message.startswith("model_id: ")
    made = set(tmp_path.rglob("*")) - {*before, tmp_path / "c.yaml", tmp_path / "ds.json"}
    assert not [path for path in made if "jinja" in path.name]


def test_notes_on_the_data_are_printed_once_for_all_deepspeed_configs(
    tiny_experiment, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("coconut_ds.training.trainer.check_model", lambda *_: None)
    values = tiny_experiment | {"save_path": str(tmp_path), "train_path": tiny_experiment["val_path"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for file in files:
        shutil.copy(ROOT / "ds_configs" / "zero1.json", file)
    assert main(["validate", str(tmp_path / "c.yaml"), "--deepspeed_config", *files]) == 0
    out, err = capsys.readouterr()
    assert out.count("`train` would start") == 2
    assert err.count("24 of 24 questions are also in") == 1
