"""The GPU script: every part runs on a CPU in its dry run, and goes on where it was."""

import json
import random
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts import Setting, capacity, learning

DRY, GPU = Setting("cpu", True, None), Setting("cuda", False, None)


def in_this_process(monkeypatch):
    """Let the worker run here: starting Python for every part takes most of the time."""

    monkeypatch.setattr(gpu, "run_worker", lambda command, seconds: gpu.main(command[3:]) or 0)


def entries(journal, part):
    return {entry["case"]: entry for entry in gpu.read_journal(journal) if entry["part"] == part}


@pytest.mark.slow
def test_parts_a_to_c_dry(monkeypatch, tmp_path):
    in_this_process(monkeypatch)
    threads = torch.get_num_threads()
    journal = tmp_path / "gpu.jsonl"
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--parts",
        "a,b,c",
        "--minutes",
        "60",
        "--journal",
        str(journal),
    ]
    gpu.main(arguments)
    torch.set_num_threads(threads)
    exact = [entry for case, entry in entries(journal, "a").items() if "coconut_ds" in case]
    assert len(exact) == 4
    for entry in exact:
        errors = [value for key, value in entry.items() if "difference" in key or "error" in key]
        assert len(errors) == 4 and max(errors) < 1e-5
    assert all("error" not in entry for part in "abc" for entry in entries(journal, part).values())
    assert all(entry["rows"] == capacity.TINY_ROWS for entry in entries(journal, "b").values())
    assert all(set(entries(journal, p)) == set(gpu.part_module(p).cases(DRY)) for p in "abc")
    before = journal.read_bytes()
    gpu.main(arguments)
    assert journal.read_bytes() == before, "finished cases are not measured again"


@pytest.mark.slow
def test_parts_d_to_f_dry(tmp_path):
    journal = tmp_path / "gpu.jsonl"
    arguments = ["--device", "cpu", "--tiny", "--parts", "d,e,f", "--minutes", "60"]
    gpu.main([*arguments, "--journal", str(journal)])
    for part in "def":
        found = entries(journal, part)
        assert set(found) == set(gpu.part_module(part).cases(DRY))
        assert all("error" not in entry for entry in found.values()), found
    assert all(entry["fits"] for entry in entries(journal, "d").values())
    assert "test_accuracy" in entries(journal, "e")["prosqa_like coconut"]
    overlap = entries(journal, "f")["overlap_comm"]
    assert overlap["largest_difference"] == overlap["difference_when_repeated"] == 0
    bf16 = entries(journal, "f")["bf16"]
    assert bf16["skipped"] == 0 and 0 < bf16["largest_difference"] < 0.05
    assert gpu.part_module("f").cases(GPU) == ["overlap_comm", "fp16", "launcher", "bf16"]
    assert entries(journal, "f")["launcher"]["epochs"] == 1


def test_the_default_parts_are_nine_minutes_within_their_limits_of_memory(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(
        gpu, "run_part", lambda letter, setting, journal, seconds, *_: started.append((letter, seconds))
    )
    gpu.main(["--device", "cpu", "--tiny", "--journal", str(tmp_path / "gpu.jsonl")])
    assert [letter for letter, _ in started] == gpu.DEFAULT_PARTS.split(",")
    assert sum(gpu.PARTS[letter][1] for letter, _ in started) == 540
    assert all(0 < gpu.PARTS[letter][2] < gpu.PARTS[letter][1] for letter, _ in started)
    limits = {letter: getattr(gpu.part_module(letter), "LIMIT_GIB", None) for letter in gpu.PARTS}
    assert limits == {"a": None, "c": None, **dict.fromkeys("bdef", 10.22)}


def test_cases_are_selected_by_a_text(tmp_path):
    journal = tmp_path / "gpu.jsonl"
    every = gpu.missing("c", GPU, journal, again=False)
    assert every[:3] == [f"bf16 stage 6 {name}" for name in capacity.VARIANTS]
    for model in ("gpt2", "llama-3.2-1b"):
        hosts = {case for case in every if f"host {model} " in case}
        assert hosts >= {f"bf16 host {model} {name}" for name in ("single_pass", *capacity.VARIANTS)}
    chosen = gpu.missing("c", GPU, journal, False, "fp32 stage 0")
    assert chosen == [case for case in every if "fp32 stage 0" in case] and len(chosen) == 3


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
    size = journal.stat().st_size
    gpu.work("b", cases, DRY, journal, seconds=-1)
    assert journal.stat().st_size == size, "no case begins after the time is over"


def test_a_case_that_ends_its_process_does_not_take_the_others_with_it(monkeypatch, tmp_path):
    """The worker dies at the second case, hangs at the third; in the last, the part's time is over."""
    journal, first, *others = tmp_path / "gpu.jsonl", *gpu.part_module("c").cases(GPU)
    codes = {others[0]: 139, others[1]: -signal.SIGALRM, others[2]: None}
    started = []

    def run_worker(command, seconds):
        group = json.loads(command[command.index("--group") + 1])
        started.append(group[0])
        for case in group:
            gpu.write_journal(journal, {"part": "c", "case": case, "error": "?", "unfinished": True})
            if case in codes:
                return codes[case]
            gpu.write_journal(journal, {"part": "c", "case": case})
        return 0

    clock = SimpleNamespace(monotonic=lambda: 1e9 * (len(started) == 3))
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu, "run_worker", run_worker)
    gpu.run_part("c", GPU, journal, 60, again=False)
    assert started == [first, others[1], others[2]]
    errors = {entry["case"]: entry.get("error") for entry in gpu.read_journal(journal)}
    assert errors == {
        first: None,
        others[0]: "the process ended with code 139",
        others[1]: "the process took longer than its limit",
        others[2]: "?",
    }
    assert gpu.missing("c", GPU, journal, again=False) == others[2:], "failures only with --again"
    assert gpu.missing("c", GPU, journal, again=True) == others


def test_a_worker_that_begins_no_case_ends_its_part(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "run_worker", lambda command, seconds: 1)
    gpu.run_part("c", GPU, tmp_path / "gpu.jsonl", 60, again=False)
    assert "part c: no case was begun, exit code 1" in capsys.readouterr().err


def test_nothing_that_a_worker_started_outlives_it(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/id; wait"
    assert gpu.run_worker(["bash", "-c", script], 0.5) is None
    number, deadline = int((tmp_path / "id").read_text()), time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):  # whoever adopted it has to take note of its end
        while psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_every_case_has_a_limit_on_a_gpu(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(gpu.signal, "alarm", limits.append)
    monkeypatch.setattr(capacity, "run", lambda *_: {"rows": 1})
    monkeypatch.setattr(Setting, "described", lambda self: {"device": "x", "tiny": False, "limit_gib": None})
    monkeypatch.setattr(Setting, "prepare", lambda self: None)
    gpu.work("b", ["x"], Setting("cpu", False, None), tmp_path / "gpu.jsonl", seconds=60)
    assert limits == [gpu.PARTS["b"][2], 0]


def test_a_line_that_was_cut_off_is_not_a_record(tmp_path):
    journal = tmp_path / "j.jsonl"
    journal.write_text('{"part": "a", "case": "x"}\n{"part": "a", "ca')
    assert gpu.read_journal(journal) == [{"part": "a", "case": "x"}]
    gpu.write_journal(journal, {"part": "a", "case": "y"})
    assert [entry["case"] for entry in gpu.read_journal(journal)] == ["x", "y"]


def test_unknown_parts_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--tiny", "--parts", "a,z"])
    assert "no part z; write some of a,c,d,f,b,e" in capsys.readouterr().err


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
