"""Text that other people wrote does not steer the terminal."""

import importlib
import io
import sys

import pytest

from coconut_ds.__main__ import main
from coconut_ds.files import PrintableStream, is_printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\r\nc ⟨é⟩ 漢", "a\tb\r\nc ⟨é⟩ 漢"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x1b[2J\x9b2J", "\\x1b[2J\\x9b2J"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("half \ud800", "half \\ud800"),
        ("\x1b[A\x1b[1mbold\x1b[0m \x1b[31mred", "\x1b[A\x1b[1mbold\x1b[0m \x1b[31mred"),  # of libraries
        ("\x1b[8mhidden", "\\x1b[8mhidden"),
    ],
)
def test_what_steers_is_written_out(text, shown):
    stream = io.StringIO()
    assert PrintableStream(stream).write(text) == len(text)
    assert stream.getvalue() == shown
    assert is_printable(text) == (text == shown and "\x1b" not in text)


def test_libraries_that_a_command_imports_find_the_wrapped_streams(monkeypatch):
    """They keep the stream that they find when they are imported, for their own messages."""
    found = []
    load = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: (found.append(sys.stderr), load(name))[1])
    out, err = sys.stdout, sys.stderr
    assert main(["validate", "nowhere.yaml"]) == 2
    assert found and all(isinstance(stream, PrintableStream) for stream in found)
    assert (sys.stdout, sys.stderr) == (out, err)
