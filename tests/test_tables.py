"""Tables print aligned text without colors and without a limit of width, in a pipe and in a terminal."""

import pytest

from coconut_ds.tables import Table

LONG = "x" * 300


@pytest.mark.parametrize("terminal", ["FORCE_COLOR", "COLUMNS", "NO_COLOR"])
def test_text_has_no_colors_and_is_never_cut(monkeypatch, terminal):
    monkeypatch.setenv(terminal, "40")
    rows = [["a [red] :smile:", "1,024", LONG], ["日本", "7", ""]]
    assert Table(["name", "MiB", "source"], rows, "lrl").text().splitlines() == [
        "name               MiB  source",
        f"a [red] :smile:  1,024  {LONG}",
        "日本                 7",
    ]


def test_the_last_letter_holds_for_the_other_columns():
    assert Table(["a", "b", "c"], [["1", "22", "33"]]).text() == "a   b   c\n1  22  33"
    assert Table(["a", "bbb", "ccc"], [["1", "2", "3"]], "l").text() == "a  bbb  ccc\n1  2    3"


def test_control_characters_are_escaped_and_an_empty_head_is_left_out():
    assert Table(["", ""], [["a\x1b[2J", "b"]], "l", title="T").text() == "T\na\\x1b[2J  b"
