"""Text that other people wrote, on a terminal: what would steer it is shown as an escape instead.

Knows: control characters.  Does not know: what is printed.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

# C0 and C1 without tab and line ends, surrogates, and what turns the direction of text.
STEERING = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Of nested progress bars, and of reports of transformers: cursor up, bold, colors.
HARMLESS = re.compile("(\x1b\\[(?:A|0m|1m|3[1-7]m))")


def is_printable(text: str) -> bool:
    """Whether a terminal shows all of a text as it is; line ends and tabs count as shown."""
    return STEERING.search(text) is None


def printable(text: str) -> str:
    r"""The text with what steers a terminal written out: \\x1b."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PrintableStream:
    """A text stream that writes `printable` text; everything else is the stream's own."""

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
    """Standard output and errors as PrintableStream."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = PrintableStream(out), PrintableStream(err)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
