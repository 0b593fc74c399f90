"""Text that other people wrote does not steer the terminal."""

import importlib
import io
import os
import sys
import warnings
from types import SimpleNamespace

import pytest

from coconut_ds.__main__ import COMMANDS, main
from coconut_ds.files import VERBOSE, PrintableStream, is_printable, library_lines_hidden


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


def test_lines_of_libraries_are_hidden_unless_verbose_or_they_fail(monkeypatch, capsys):
    with library_lines_hidden():
        print("built successfully")
        print("a warning", file=sys.stderr)
    assert capsys.readouterr() == ("", "a warning\n")
    with pytest.raises(RuntimeError), library_lines_hidden():
        print("g++: not found")
        raise RuntimeError
    assert capsys.readouterr() == ("", "g++: not found\n")
    monkeypatch.setenv(VERBOSE, "1")
    with library_lines_hidden():
        print("built successfully")
    assert capsys.readouterr().out == "built successfully\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_every_command_hides_future_warnings_unless_verbose(verbose, monkeypatch, recwarn):
    def load(name):
        warnings.warn("an argument will go", FutureWarning, stacklevel=1)
        warnings.warn("the learning rate is 0", UserWarning, stacklevel=1)
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(importlib, "import_module", load)
    for name in COMMANDS:
        recwarn.clear()
        assert main([name, *["--verbose"] * verbose]) == 2
        assert [warning.category for warning in recwarn] == [FutureWarning] * verbose + [UserWarning]
        assert (VERBOSE in os.environ) is verbose
    monkeypatch.delenv(VERBOSE, raising=False)


def test_every_command_knows_verbose(monkeypatch, capsys):
    module = SimpleNamespace(add_arguments=lambda parser: None, run=None)
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert "--verbose" in capsys.readouterr().out
