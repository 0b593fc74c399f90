"""The other benchmarks run small and print what the documents are made of; collectors read run folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scaling, startup, synthetic, variants
from benchmarks.record import objects_in
from coconut_ds.config.methods import Method
from tests.conftest import ROOT
from tests.launched.start import free_port


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_scaling_prints_a_line_a_point_and_variant(capsys, monkeypatch):
    monkeypatch.setitem(scaling.POINTS, "latents", (0, 2))
    scaling.main(["--size", "gpt2-tiny", "--axes", "latents", "--sizes", "gpt2-tiny", "--threads", "1"])
    records = list(objects_in(capsys.readouterr().out))
    assert [(r["axis"], r["latents"]) for r in records[::4]] == [("latents", 0), ("latents", 2), ("size", 6)]
    assert {record["variant"] for record in records} == set(scaling.VARIANTS)
    assert all(record["peak_bytes"] > 0 for record in records)


@pytest.mark.slow
def test_stage_switch_measures_every_size():
    command = [sys.executable, "-m", "benchmarks.stage_switch", "--items", "24", "40"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=200)
    records = list(objects_in(ended.stdout))
    assert [(record["items"], record["steps"]) for record in records] == [(24, 3), (40, 5)]
    assert all(record["switch_seconds"] > 0 for record in records)


@pytest.mark.parametrize("name, question, steps", [("prosqa", 430, 3.8), ("gsm", 58, 3.3)])
def test_lengths_are_those_of_the_real_sets(name, question, steps):
    problems = synthetic.problems_like(name, 800, 50_260)
    mean = sum(len(problem.question) for problem in problems) / len(problems)
    assert mean == pytest.approx(question, rel=0.08)
    assert sum(len(problem.steps) for problem in problems) / len(problems) == pytest.approx(steps, rel=0.08)
    assert max(max(problem.question) for problem in problems) < 50_257, "markers are not among the words"


def test_the_grid_has_every_method_and_every_thought_twice(tmp_path):
    grid = list(variants.variants())
    labels = [variant.label for variant in grid]
    assert labels[0] == "method cot", "LoRA starts from it"
    assert {f"method {method.value}" for method in Method} <= set(labels) and len(set(labels)) == len(labels)
    for thought in ("fixed_window", "learnable_window", "mlp_projection"):
        assert {f"thought {thought}, full", f"thought {thought}, LoRA"} <= set(labels)
    points = [variants.point_of(variant, 1, tmp_path, []) for variant in grid]
    assert len({point.folder for point in points}) == len(points)
    lora = [point.experiment for point in points if point.experiment.tuning == "lora"]
    cot = points[0]
    assert all(e.load_model_path == f"{cot.folder}/checkpoint_{cot.experiment.num_epochs}" for e in lora)


@pytest.mark.slow
def test_variants_run_and_are_not_run_twice(tmp_path, monkeypatch, capsys):
    def small(seed, folder):
        from preprocessing.arithmetic import main

        data = folder / f"data{seed}"
        sizes = ["--train", "64", "--valid", "8", "--test", "8", "--width", "32"]
        main(["--output-dir", str(data), "--model-dir", str(data / "gpt2"), *sizes])

    monkeypatch.setattr(variants, "make_data", small)
    short = ["--set", "num_epochs=2", "--set", "epochs_per_stage=1", "--set", "gradient_accumulation_steps=1"]
    arguments = ["--seeds", "0", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path), *short]
    variants.main([*arguments, "--only", "cot"])
    variants.main([*arguments, "--only", "learnable_window, LoRA"])
    records = json.loads((tmp_path / "variants.json").read_text())["records"]
    assert [record["label"] for record in records] == ["thought learnable_window, LoRA"]
    assert 0 <= records[0]["test"] <= 1
    capsys.readouterr()
    variants.main([*arguments, "--only", "cot"])
    assert capsys.readouterr().out.count("already finished") == 3


@pytest.mark.slow
def test_a_start_is_split_into_its_phases(arithmetic, tmp_path):
    port = int(free_port())
    found = startup.start_once(arithmetic, tmp_path / "start.json", ranks=2, port=port)
    assert set(found["seconds"]) == set(startup.ORDER)
    assert all(seconds >= 0 for seconds in found["seconds"].values())
    assert found["cpu_seconds"]["imports"] > 0.5
    left = [path.name for path in Path("/dev/shm").glob(f"*_{port}_*")]
    assert not left, "shared memory that stays after its processes"
