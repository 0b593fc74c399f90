"""Flags of other trainers end in an error that says how to write them here."""

import pytest

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import unrecognized_flags
from coconut_ds.config.schema import load_schema


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr 1e-4", "--lr 1e-4; write --set lr=1e-4"),
        ("--lr=1e-4", "--lr=1e-4; write --set lr=1e-4"),
        ("--batch_size 4", "--batch_size 4; write --set batch_size_training=4"),
        ("--per-device-train-batch-size 4", "write --set batch_size_training=4"),
        ("--epochs 3 --output_dir out", "write --set num_epochs=3 --set save_path=out"),
        ("--model gpt2", "write --set model_id=gpt2"),
        ("--num_epochs 3", "write --set num_epochs=3"),
        ("--bf16 --seed 3", "write --set bf16=true --set seed=3"),
        ("lr=1e-4", "; write --set lr=1e-4"),
        ("--set lr 1e-4", "; write --set lr=1e-4"),
        ("--nonsense 3", "unrecognized arguments: --nonsense 3\n"),
        ("--nonsense --lr 3", "--nonsense --lr 3; write --set lr=3"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_error_names_our_spelling(capsys, words, message, first):
    command = ["c.yaml", "--deepspeed_config", "ds.json"]
    command = [*words.split(), *command] if first else [*command, *words.split()]
    with pytest.raises(SystemExit) as ended:
        main(["train", *command])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments: " in error and message.strip() in error
    assert ("write" in error) is ("write" in message)


def test_every_name_of_a_setting_is_understood_as_a_flag():
    for key, rule in load_schema("experiment")["properties"].items():
        for name in (key, *rule.get("also_called", ())):
            assert unrecognized_flags([f"--{name}"], [f"--{name}", "1"]).endswith(f"write --set {key}=1")


def test_commands_without_settings_only_name_the_flag(capsys):
    with pytest.raises(SystemExit):
        main(["report", "run", "--lr", "3"])
    assert "unrecognized arguments: --lr 3" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words, message",
    [
        ("trian x.yaml", "'trian' is not a command; did you mean 'train'?"),
        ("frobnicate", "'frobnicate' is not a command; commands: configs, doctor"),
        ("--local_rank 0 x.yaml", "'x.yaml' is not a command; write `train x.yaml` or `validate x.yaml`"),
        ("report run --no_pages", "--no_pages; did you mean '--no-page'?"),
        ("train x.yaml --deepspeed d.json --chekpoint a", "--chekpoint a; did you mean '--checkpoint'?"),
        ("train x.yaml --deepspeed d.json --num_gpus 2", "the launcher sets it: deepspeed --num_gpus N"),
    ],
)
def test_unknown_commands_and_options_get_a_hint(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_no_arguments_print_the_commands(capsys):
    assert main([]) == 2
    assert "    validate " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--max_minutes 3 --stuck_seconds=4 --skip_plan --deepspeed-config d.json",
        "--max-minutes=3 --stuck-seconds 4 --skip-plan --deepspeed_config=d.json",
    ],
)
def test_options_with_hyphens_and_underscores_are_one(words, monkeypatch):
    seen = []
    monkeypatch.setattr("coconut_ds.cli.train.run", seen.append)
    assert main(["train", "x.yaml", *words.split(), "--set", "name=--max_x"]) == 0
    (args,) = seen
    assert (args.max_minutes, args.stuck_seconds, args.skip_plan) == (3, 4, True)
    assert args.deepspeed_config == "d.json" and args.overrides == ["name=--max_x"]


@pytest.mark.parametrize("command", ["plan x.yaml --deepspeed d.json", "show x.yaml", "validate x.yaml"])
def test_the_number_of_gpus_has_one_name(command, monkeypatch):
    seen = []
    name = command.split()[0]
    monkeypatch.setattr(f"coconut_ds.cli.{name}.run", seen.append)
    for option in ("--num-gpus", "--num_gpus"):
        assert main([*command.split(), option, "2"]) == 0
    assert all(2 in (getattr(args, "ranks", None), getattr(args, "gpus", None)) for args in seen)
