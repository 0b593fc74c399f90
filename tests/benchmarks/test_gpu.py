"""The GPU script: every part runs on a CPU in its dry run, and goes on where it was."""

import json
import random

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts import Setting, capacity, learning

DRY = Setting("cpu", True, 11.0)


def in_this_process(monkeypatch):
    """Let the worker run here: starting Python for every part takes most of the time."""

    def run(command, **_):
        arguments = [str(word) for word in command[3:]]
        gpu.main(arguments)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(gpu.subprocess, "run", run)


def entries(journal, part):
    return {entry["case"]: entry for entry in gpu.read_journal(journal) if entry["part"] == part}


@pytest.mark.slow
def test_parts_a_to_c_dry(monkeypatch, tmp_path):
    in_this_process(monkeypatch)
    threads = torch.get_num_threads()
    journal = tmp_path / "gpu.jsonl"
    arguments = ["--device", "cpu", "--tiny", "--parts", "a,b,c", "--journal", str(journal)]
    gpu.main(arguments)
    torch.set_num_threads(threads)
    exact = [entry for case, entry in entries(journal, "a").items() if "coconut_ds" in case]
    assert len(exact) == 4
    for entry in exact:
        assert entry["loss_difference"] < 1e-5 and entry["largest_gradient_error"] < 1e-5
    assert all("error" not in entry for part in "abc" for entry in entries(journal, part).values())
    assert all(entry["rows"] == capacity.TINY_ROWS for entry in entries(journal, "b").values())
    assert all(set(entries(journal, p)) == set(gpu.part_module(p).cases(DRY)) for p in "abc")
    before = journal.read_bytes()
    gpu.main(arguments)
    assert journal.read_bytes() == before, "finished cases are not measured again"


@pytest.mark.slow
def test_parts_d_and_e_dry(tmp_path):
    journal = tmp_path / "gpu.jsonl"
    gpu.main(["--device", "cpu", "--tiny", "--parts", "d,e", "--journal", str(journal)])
    for part in "de":
        found = entries(journal, part)
        assert set(found) == set(gpu.part_module(part).cases(DRY))
        assert all("error" not in entry for entry in found.values()), found
    assert all(entry["fits"] for entry in entries(journal, "d").values())
    assert "test_accuracy" in entries(journal, "e")["prosqa_like coconut"]


def test_a_failure_is_a_record_and_is_measured_again_when_asked(monkeypatch, tmp_path):
    journal = tmp_path / "gpu.jsonl"

    def fails(case, setting, seconds):
        raise RuntimeError("no luck\nand more")

    monkeypatch.setattr(capacity, "run", fails)
    cases = capacity.cases(DRY)
    gpu.work("b", cases[:2], DRY, journal, seconds=60)
    assert [entry["error"] for entry in gpu.read_journal(journal)] == ["RuntimeError: no luck"] * 2
    assert gpu.missing("b", DRY, journal, again=False) == cases[2:]
    assert gpu.missing("b", DRY, journal, again=True) == cases
    gpu.work("b", cases, DRY, journal, seconds=-1)
    assert len(journal.read_text().splitlines()) == 2, "no case begins after the time is over"


@pytest.mark.parametrize("most", [0, 1, 2, 5, 37, 300])
def test_the_largest_batch_is_found_to_a_sixteenth(most):
    asked = []
    found = capacity.largest(lambda rows: asked.append(rows) or rows <= most)
    assert most - max(1, most // 16) < found <= most or found == most
    assert len(asked) < 20


def test_without_a_gpu_a_real_run_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main([])
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main(["--device", "cpu"])


def test_a_graph_in_symbols_is_the_problem_it_came_from():
    from preprocessing.prosqa_like import Recipe, draw_problem

    draw = random.Random(3)
    for _ in range(20):
        problem = draw_problem(draw, Recipe(max_hops=4))
        made = learning.symbols(problem, draw)
        facts, _, rest = made["question"].partition(" [Q] ")
        edges = {tuple(edge.split()) for edge in facts.split(" | ")}
        pair, _, root = rest.partition(" [R] ")
        walked = [root, *made["steps"]]
        assert all(edge in edges for edge in zip(walked, walked[1:], strict=False))
        assert made["answer"] == made["steps"][-1] and made["answer"] in pair.split()
        assert len(made["steps"]) == len(problem["steps"]) and len(edges) == len(problem["edges"])


def test_records_are_json_lines(tmp_path):
    journal = tmp_path / "j.jsonl"
    for number in (1, 2):
        gpu.write_journal(journal, {"part": "a", "case": "x", "number": number})
    assert [json.loads(line)["number"] for line in journal.read_text().splitlines()] == [1, 2]
    assert gpu.read_journal(journal) == [{"part": "a", "case": "x", "number": 2}]
