"""The benchmark's records and picture, on a model and shape of a second."""

import json

import pytest
import torch

from benchmarks import train_step

SHAPE = "--rows 2 --question 24 --latents 2 --answer 4"
SMALL = [*SHAPE.split(), "--size", "gpt2-tiny", "--repeats", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def _small_vocabulary(monkeypatch):
    monkeypatch.setitem(train_step.VOCABULARY, "gpt2", 5000)
    monkeypatch.setattr(train_step, "WARM_UP", ())


WARM_UP = train_step.WARM_UP


def run(capsys, *arguments):
    threads = torch.get_num_threads()
    try:
        train_step.main([*SMALL, *arguments])
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_every_variant_has_a_record(capsys):
    records = {record["variant"]: record for record in run(capsys)}
    assert set(records) == set(train_step.VARIANTS)
    assert records["single_pass"]["peak_over_single_pass"] == 1
    assert all(record["tokens"] == 60 and record["seconds"] > 0 for record in records.values())
    assert records["coconut_ds"]["peak_bytes"] < 0.36 * records["textbook"]["peak_bytes"]
    for switch in ("supervised_logits_only", "deferred_weight_gradients"):
        assert records[f"coconut_ds-{switch}"]["peak_bytes"] > records["coconut_ds"]["peak_bytes"]


def test_later_passes_are_recorded_before_they_are_measured(monkeypatch):
    monkeypatch.setattr(train_step, "WARM_UP", WARM_UP)
    base = train_step.make_model("gpt2-tiny", torch.float32, 0.0)
    coconut = train_step.variant("coconut_ds", base)
    train_step.warm_up(coconut, 2, base.config.vocab_size, "cpu")
    short, wide = coconut.techniques.recorded.kinds.values()
    assert 1 in short.programs and 0 in wide.programs


def test_a_sweep_draws_its_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(train_step.POINTS, "latents", [0, 2])
    picture = tmp_path / "latents.png"
    records = run(capsys, "--variants", "coconut_ds", "--sweep", "latents", "--picture", str(picture))
    assert [record["latents"] for record in records] == [0, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")
