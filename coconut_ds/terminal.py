"""Print notes, and escape control characters in printed text, which may come from untrusted files."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

# C0 and C1 except tab and line ends, surrogates, and characters that change the text direction.
CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Used by nested progress bars and by reports of transformers: cursor up, bold, colors.
HARMLESS = re.compile("(\x1b\\[(?:A|0m|1m|3[1-7]m))")


def is_printable(text: str) -> bool:
    """Whether a text has no control characters other than line ends and tabs."""
    return CONTROL.search(text) is None


def printable(text: str) -> str:
    r"""The text with control characters escaped: \\x1b."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class PrintableStream:
    """A text stream that writes `printable` text; other attributes are those of the wrapped stream."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        parts = HARMLESS.split(text)
        parts[::2] = map(printable, parts[::2])
        self._stream.write("".join(parts))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Replace stdout and stderr by PrintableStream."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PrintableStream(out), PrintableStream(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def print_notes(notes: Iterable[str]) -> None:
    """Print notes to stderr on rank 0 (or the only process); stdout has only a command's result."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
