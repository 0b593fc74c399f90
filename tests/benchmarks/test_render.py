"""README and docs/benchmarks.md say what benchmarks/results/ says, and "not measured" without it."""

import json
import re

import pytest

from benchmarks import record, render, sections
from benchmarks.gpu_section import gpu_text, part_table

SURROUNDINGS = {
    "machine": {"processor": "a processor", "cores": 2, "memory_gib": 8.0},
    "versions": {"python": "3.11", "torch": "2.13", "peft": None},
    "date": "2026-01-01",
    "commit": "abc1234",
}


def result(*records, command="python -m benchmarks.something"):
    return {**SURROUNDINGS, "command": command, "records": list(records)}


def step_record(variant, time, peak):
    return {
        "variant": variant, "seconds": 2 * time, "seconds_min": time, "seconds_max": 3 * time,
        "time_over_single_pass": time, "peak_bytes": peak * 10**6, "peak_over_single_pass": peak / 100,
        "peak_over_textbook": peak / 400,
    }  # fmt: skip


STEPS = result(
    *(step_record(*numbers) for numbers in [("textbook", 1.5, 400), ("single_pass", 1, 100)]),
    *(step_record(*numbers) for numbers in [("coconut_ds", 1.1, 110), ("coconut_ds+checkpointing", 1.4, 80)]),
    step_record("coconut_ds-segmented_cache", 1.2, 140),
)
SEEDS = result(
    *(
        {"run": "coconut", "stages": {"0": 1.0, "1": test}, "seed": seed, "ranks": ranks, **more}
        for seed, ranks, test, more in (
            (7, 1, 1.0, {"test": 1.0, "epoch_learned": 1, "swap": 0.11}),
            (32, 1, 0.48, {"test": 0.48, "epoch_learned": None, "swap": 0.41}),
            (7, 2, 0.99, {"test": 0.99, "epoch_learned": 2, "swap": 0.15}),
        )
    ),
    {"run": "no_cot", "seed": 7, "ranks": 1, "stages": {"0": 0.1}, "test": 0.104, "swap": None},
)


def test_the_tree_is_what_the_results_give():
    for path, text in render.rendered(render.read_results()).items():
        assert (record.ROOT / path).read_text(encoding="utf-8") == text, (
            f"{path}: python -m benchmarks.render"
        )


def test_every_picture_of_the_page_is_there():
    page = (record.ROOT / render.PAGE).read_text(encoding="utf-8")
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (record.ROOT / "docs" / picture).is_file(), picture


def test_without_results_everything_is_not_measured():
    page, block = render.page({}), sections.readme_block({})
    assert page.count("Not measured.") == len(sections.SECTIONS)
    assert not re.search(r"\|", page)
    assert block.count("not measured") == 5


def test_numbers_of_the_json_reach_both_texts():
    results = {"train_step": STEPS, "seeds": SEEDS}
    page, block = render.page(results), sections.readme_block(results)
    assert "| without segmented_cache | 2.40 (1.20 to 3.60) | 1.20 | 140 | 1.40 | 0.35 |" in page
    assert "a processor, 2 cores, 8.0 GiB; python 3.11, torch 2.13; 2026-01-01, commit abc1234" in page
    assert "| coconut_ds + activation checkpointing | 80 MB | 1.40 |" in block
    assert "| Coconut, latents supervised | 1 of 2 (9 to 91 %) | 48.0 to 100.0 % | 11.0 to 41.0 % |" in block
    assert "| no CoT | 0 of 1 (0 to 79 %) | 10.4 % |  |" in block
    assert "| Coconut, latents supervised, two ranks | 1 of 1 (21 to 100 %) | 99.0 % | 15.0 % |" in block
    assert "| coconut, seed 7 | 100.0 % | 100.0 % | 100.0 % | 1 | 11.0 % |  | 10.4 % |" in page
    assert "| coconut, seed 32 | 100.0 % | 48.0 % | 48.0 % | never | 41.0 % |  |  |" in page
    assert "| coconut, seed 7, two ranks | 100.0 % | 99.0 % | 99.0 % | 2 | 15.0 % |  |  |" in page


def test_the_block_between_the_markers_alone_changes():
    text = "before\n<!-- results -->\nold\n<!-- /results -->\nafter\n"
    new = render.rendered_readme(text, {})
    assert new.startswith("before\n<!-- results -->\n") and new.endswith("<!-- /results -->\nafter\n")
    assert "old" not in new and "not measured" in new
    with pytest.raises(SystemExit, match="results"):
        render.rendered_readme("no markers", {})


def test_pictures_are_drawn_from_records(tmp_path):
    from benchmarks.pictures import draw_all

    points = [
        {**step_record(variant, 1, 100), "axis": axis, "latents": n, "rows": n, "question": n}
        for axis in ("latents", "rows", "question")
        for variant in sections.STEP_NAMES
        for n in (1, 2)
    ]
    draw_all({"scaling": result(*points), "seeds": SEEDS}, tmp_path)
    for name in ("scaling", "seeds"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_part_is_a_table_of_whatever_its_cases_have():
    shown = part_table(
        [
            {"part": "b", "case": "one", "rows": 12, "measured_bytes": 3 * 2**20},
            {"part": "b", "case": "two", "error": "OutOfMemoryError: no", "measured_bytes": None},
        ]
    )
    assert shown.splitlines() == [
        "| case | rows | measured bytes | error |",
        "|---|---:|---:|---:|",
        "| one | 12 | 3 MiB |  |",
        "| two |  | not measured | OutOfMemoryError: no |",
    ]


def test_objects_are_found_among_other_output():
    text = 'words\n{"a": 1}\n{broken\n{\n "b": [2,\n 3]\n}\nmore {"c": 4}\n'
    assert list(record.objects_in(text)) == [{"a": 1}, {"b": [2, 3]}]


def test_a_machine_without_git_has_results_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record.surroundings()["commit"] is None


def test_a_written_result_says_where_it_comes_from(tmp_path):
    path = record.write("name", "a command", [{"a": 1}], tmp_path)
    written = json.loads(path.read_text())
    assert written["records"] == [{"a": 1}] and written["command"] == "a command"
    assert written["versions"]["torch"] and written["machine"]["cores"] >= 1
    assert render.read_results(tmp_path)["name"] == written


def test_the_gpu_section_has_every_part():
    records = [
        {"part": "c", "case": "bf16 stage 6 textbook", "device": "a GPU", "limit_gib": None, "rows": 32},
        {
            "part": "c",
            "case": "bf16 host gpt2 textbook",
            "device": "a GPU",
            "limit_gib": None,
            "host_ms": 7.5,
        },
        {"part": "b", "case": "one", "device": "a GPU", "limit_gib": 10.22, "error": "?", "unfinished": True},
    ]
    text = gpu_text(result(*records))
    assert text.startswith("a GPU.") and text.count("### ") == 7 and text.count("Not measured.") == 4
    assert "| case | rows |\n|---|---:|\n| bf16 stage 6 textbook | 32 |" in text
    assert "| case | host ms |\n|---|---:|\n| bf16 host gpt2 textbook | 7.5 |" in text
    assert "at most 10.22 GiB\n\n| case | error |" in text
