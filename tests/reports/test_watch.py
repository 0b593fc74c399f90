"""The page that `watch` serves: what it answers, and a long run."""

import http.client
import json
import re
import threading

import pytest

from coconut_ds.__main__ import main
from coconut_ds.cli.watch import ADDRESS, Pages, open_server
from coconut_ds.reports.figures import smoothed
from coconut_ds.reports.run_records import read_run
from coconut_ds.runs import record_shapes
from tests.reports.conftest import STAGED, validation


@pytest.fixture
def get():
    """GET from a server of some runs: (code, text)."""
    servers = []

    def get(folders, path="/", host=None, method="GET"):
        server = open_server(Pages(folders), 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection(ADDRESS, server.server_port, timeout=60)
        connection.request(method, path, headers={"Host": host or f"{ADDRESS}:{server.server_port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    yield get
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_page_refreshes_itself_and_shows_the_run(make_run, get):
    run = make_run("watched", [50, 60, 70], method="coconut", **STAGED).folder
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(4):
            numbers = {"gradient_norm": 1.0, "step_seconds": 0.5, "tokens_per_s": 10.0}
            line = {"kind": "train", "time": step, "epoch": 2, "loss": 1.0, "supervised_tokens_per_s": 5.0}
            file.write(json.dumps(line | numbers) + "\n")
    code, page = get([run])
    assert code == 200 and '<meta http-equiv="refresh" content="15">' in page
    assert "watched" in page and "0 running, read at" in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert [text.partition(" ")[0] for text in captions[:4]] == [
        "Validation",
        "Accuracy",
        "Token",
        "Optimizer",
    ]
    assert not re.search(r"<script|href=\"http|src=\"http", page)


@pytest.mark.parametrize(
    "code, request_",
    [
        (404, {"path": "/etc/passwd"}),
        (404, {"path": "/../experiment.yaml"}),
        (403, {"host": "elsewhere.example:8765"}),
        (403, {"host": "127.0.0.1.elsewhere.example:80"}),
        (501, {"method": "POST"}),
    ],
)
def test_it_answers_nothing_else(make_run, get, code, request_):
    assert get([make_run("watched", [50], method="cot").folder], **request_)[0] == code


def test_a_run_that_becomes_unreadable_is_named_in_the_page(make_run, get):
    run = make_run("watched", [50], method="cot").folder
    (run / "experiment.yaml").unlink()
    code, text = get([run])
    assert code == 503 and text == f"{run} is not a run folder: it has no experiment.yaml"


def test_wrong_runs_and_ports_end_in_one_message(make_run, tmp_path, capsys):
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such run folder" in capsys.readouterr().err
    run = make_run("watched", [50], method="cot").folder
    (run / "checkpoint_1").mkdir()
    assert main(["watch", str(run / "checkpoint_1")]) == 2
    assert f"it has no experiment.yaml; write {run}" in capsys.readouterr().err
    for port in (70_000, -1):
        assert main(["watch", str(run), "--port", str(port)]) == 2
        assert f"--port {port}: " in capsys.readouterr().err
    with open_server(Pages([run]), 0) as server:
        assert main(["watch", str(run), "--port", str(server.server_port)]) == 2
    assert "in use" in capsys.readouterr().err


def test_a_long_run_is_thinned_while_it_is_read(make_run, monkeypatch):
    """Every validation line stays, and the curves and the seconds of an epoch are those of all lines."""
    run = make_run("long", [], method="cot", num_epochs=4).folder
    lines = []
    for epoch in range(4):
        for step in range(5000):
            numbers = {"epoch": epoch, "loss": 4.0 - epoch - step / 5000, "time": 1000 * epoch + step / 10}
            lines.append({"kind": "train", **numbers})
        lines.append(validation(epoch, 50 + epoch))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(record_shapes, "MAX_TRAIN_LINES", 1000)
    record = read_run(run)
    assert len(record.of("train")) == 1000 and len(record.of("valid")) == 4
    assert record.seconds_per_epoch == pytest.approx(500, rel=0.01)
    epochs, losses = smoothed(record, "loss")
    assert losses[0] == pytest.approx(4.0, abs=0.02) and losses[-1] == pytest.approx(0.0, abs=0.02)
    assert epochs[0] == pytest.approx(0.5, abs=0.02) and epochs[-1] == pytest.approx(4.5, abs=0.02)
