"""A profile beside its plan, and the page about it; nothing here needs a browser."""

import errno
import html.parser
import io
import json
import os
import re
import sys

import pytest

from coconut_ds.__main__ import main
from coconut_ds.config.experiment import experiment_to_yaml, validate_experiment
from coconut_ds.reports.memory_figures import kind_of
from coconut_ds.reports.memory_tables import against_plan, profile_text, totals
from tests.reports.made_profile import plan, profile

PNGS = {"accuracy", "stages", "loss", "window", "timeline", "components", "ranks", "peaks"}


def test_on_the_cpu_the_hosts_items_count():
    rows = {row.name: (row.planned, row.measured) for row in against_plan(profile(), plan())}
    assert rows == {
        "parameters": (8.0, 8.0),
        "optimizer": (10.0, 10.0),
        "gradients, staging": (2.0, 2.0),
        "forward and backward": (84.0, 82.0),  # the heavier rank's peak above 20 MiB of states
        "optimizer step": (10.0, 12.0),
        "evaluation": (26.0, 27.0),
    }
    total = totals(against_plan(profile(), plan()))
    assert (total.planned, total.measured) == (104.0, 102.0)


def test_on_a_gpu_they_do_not():
    rows = {row.name: row.planned for row in against_plan(profile("cuda:0"), plan())}
    assert (rows["optimizer"], rows["gradients, staging"]) == (6.0, 0.0)


def test_without_a_plan_only_the_measurement_is_there():
    rows = against_plan(profile(), None)
    assert {row.planned for row in rows} == {None} and totals(rows).planned is None
    assert "102.0" in profile_text(profile(), None)


def test_the_text_joins_the_passes_in_the_middle_and_judges_the_budget():
    text = profile_text(profile("cuda:0"), plan())
    assert re.search(r"step 1: pass 1 to 2 +2\.00 +57\.0 +55\.0 57\.0", text)
    assert "step 2: pass 3 " in text and "pass 2 " not in text
    assert "budget: 102 of 10,464 MiB, 10,362 MiB free" in text
    assert "2 MiB OVER BUDGET" in profile_text(profile("cuda:0", gpu=900), plan(gpu=900))
    assert "reserved" in text and "reserved" not in profile_text(profile(), plan())


@pytest.mark.parametrize(
    "phase, kind",
    [
        ("initialise", "initialise"),
        ("step 2: pass 3 (2)", "pass"),
        ("step 1: loss", "pass"),
        ("step 1: optimizer step", "optimizer"),
        ("step 1: reduce (2)", "reduce"),
    ],
)
def test_phases_have_their_colour(phase, kind):
    assert kind_of(phase) == kind


@pytest.fixture
def make_run(tmp_path):
    def make(name, device="cpu", gpu=11264, with_profile=True):
        folder = tmp_path / name
        (folder / "memory").mkdir(parents=True)
        settings = {
            "name": name, "model_id": "gpt2", "train_path": "t.json", "val_path": "v.json",
            "method": "coconut", "c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 1,
            "num_epochs": 2, "thought": "learnable_window", "latent_window_size": 2,
        }  # fmt: skip
        (folder / "experiment.yaml").write_text(experiment_to_yaml(validate_experiment(settings, "test")))
        lines = []
        for epoch in (0, 1):
            lines += [
                {"kind": "train", "time": 9.0 * epoch + n, "epoch": epoch, "loss": 2.0 - n / 4}
                for n in range(4)
            ]
            lines.append({"kind": "memory", "epoch": epoch, "host_rss_peak_mib": 300.0 + epoch})
            lines.append(
                {
                    "kind": "valid", "time": 9.0 * epoch + 5, "epoch": epoch, "stage": epoch, "accuracy": 0.5,
                    "num_correct": 2, "num_items": 4, "cot_match": 0.25, "loss": 0.5, "mean_tokens": 2.0,
                    "window_weights": [0.9, 0.1],
                }
            )  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "memory" / "plan.json").write_text(json.dumps(plan(gpu)))
        if with_profile:
            (folder / "memory" / "profile.json").write_text(json.dumps(profile(device, gpu)))
        return folder

    return make


class Page(html.parser.HTMLParser):
    """What a page links to, and whether its tags fit."""

    def __init__(self, text):
        super().__init__()
        self.links, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_by_itself(make_run, capsys):
    folder = make_run("one")
    assert main(["report", str(folder)]) == 0
    text = (folder / "memory" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert "<script" not in text and "fits &lt;well&gt;" in text
    pngs = {path.stem for path in (folder / "memory").glob("*.png")}
    assert pngs == PNGS
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (folder / "memory").glob("*.png"))
    printed = capsys.readouterr().out
    assert str(folder / "memory" / "report.html") in printed and "50.0 % [15.0, 85.0]" in printed


def test_a_folder_that_cannot_be_written_is_reported_on_without_a_page(make_run, capsys, monkeypatch):
    folder = make_run("one")
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.warns(UserWarning, match="page was not written .Read-only file system.; --html FILE"):
        assert main(["report", str(folder)]) == 0
    assert "50.0 % [15.0, 85.0]" in capsys.readouterr().out
    assert main(["report", str(folder), "--html", str(folder / "page.html")]) == 2
    assert "error: --html" in capsys.readouterr().err


def test_a_name_with_dollars_in_an_ascii_terminal(make_run, monkeypatch):
    """Matplotlib would read a formula between the dollars."""
    folder = make_run("größe $^{$")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["report", str(folder)]) == 0
    terminal.flush()
    assert b"gr\\xf6\\xdfe $" in terminal.buffer.getvalue()
    assert {path.stem for path in (folder / "memory").glob("*.png")} == PNGS


def test_two_runs_are_compared_on_one_page(make_run, tmp_path):
    one, other = make_run("one", "cuda:0", gpu=950), make_run("other", "cuda:0")
    assert main(["report", "--compare", str(one), str(other)]) == 0
    page = Page((one / "memory" / "compare_other.html").read_text())
    assert page.open == []
    assert "".join(page.texts).count("PLAN AGAINST MEASURED") == 2
    assert (one / "memory" / "compare_other_components.png").is_file()


def test_a_profile_has_no_empty_table_of_results(make_run, capsys):
    folder = make_run("profiled")
    (folder / "metrics.jsonl").unlink()
    assert main(["report", str(folder)]) == 0
    text = (folder / "memory" / "report.html").read_text()
    assert "<h2>Results</h2>" not in text and "<h2>Memory</h2>" in text
    assert "accuracy" not in capsys.readouterr().out


def test_a_run_without_a_profile_says_how_to_get_one(make_run, tmp_path):
    folder = make_run("plain", with_profile=False)
    assert main(["report", str(folder), "--html", str(tmp_path / "here" / "page.html")]) == 0
    text = (tmp_path / "here" / "page.html").read_text()
    assert "<code>profile</code>" in text and not (folder / "memory" / "report.html").exists()


def test_several_runs_print_and_write_no_page(make_run, capsys):
    folders = [make_run("one"), make_run("two")]
    assert main(["report", *map(str, folders)]) == 0
    assert not list(folders[0].glob("memory/*.html"))
