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
