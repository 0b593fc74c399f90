"""The picture of the window weights is made of the validation lines of a run."""

import json

from matplotlib.figure import Figure

from coconut_ds.reports.window_figure import draw_window_weights


def write(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def valid(epoch, stage, weights):
    measured = {"num_items": 4, "num_correct": 1, "accuracy": 0.25, "mean_tokens": 2.0}
    return {"kind": "valid", "epoch": epoch, "stage": stage, **measured, "window_weights": weights}


def test_one_line_a_state_newest_first_and_a_mark_at_each_stage_switch(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self.axes[0]), save(self, *a, **k))
    )
    lines = [valid(0, 0, [1.0, 0.0]), valid(1, 1, [0.5, 0.5]), {"kind": "train", "loss": 1.0}]
    write(tmp_path, [*lines, valid(1, 1, [0.8, 0.2]), valid(2, 1, [0.7, 0.3])])
    picture = draw_window_weights(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    curves = {
        line.get_label(): line.get_ydata() for line in drawn[0].get_lines() if line.get_linestyle() == "-"
    }
    assert list(curves["newest state"]) == [1.0, 0.8, 0.7]
    assert list(curves["1 before"]) == [0.0, 0.2, 0.3]
    assert [line.get_xdata()[0] for line in drawn[0].get_lines() if line.get_linestyle() == ":"] == [0.5]


def test_no_picture_without_a_window(tmp_path):
    write(tmp_path, [{"kind": "valid", "epoch": 0, "stage": 0, "loss": 1.0}])
    assert draw_window_weights(tmp_path) is None
    assert not list(tmp_path.glob("*.png"))
