"""Write a data set's files and its card so that they appear complete or not at all.

Knows: atomic output, cards, how a script reports failure.  Does not know: where data comes from.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coconut_ds.data.problems import Card
from coconut_ds.errors import UserError
from coconut_ds.files import hides_bar, sync_path

FAILED = 2  # exit code of anything that kept the files from being written, an interruption included


def script_arguments(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.register("type", Path, lambda text: Path(text).expanduser())
    parser.add_argument(
        "--output-dir", type=Path, default=Path("data"), help="where to write (default: data/)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N problems a split")
    return parser


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main and end the process: 0, or 2 with one clear sentence on stderr."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except UserError as error:
        sys.exit(_failure(str(error)))
    except KeyboardInterrupt:
        sys.exit(_failure("interrupted; no output file was changed. Run the same command again to go on."))
    except OSError as error:
        sys.exit(
            _failure(f"{error.filename or 'the output'}: {error.strerror or error}; nothing was changed")
        )


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _failure(text: str) -> int:
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    return FAILED


def write_dataset(
    output_dir: Path,
    card: Card,
    splits: Mapping[str, Iterable[dict[str, Any]]],
    totals: Mapping[str, int] | None = None,
) -> Card:
    """Write NAME_SPLIT.json for every split, then NAME.card.json with their digests and counts.

    Every file is written beside its place and synced; all are renamed only when the last one is complete,
    and the card goes last.  Whatever is raised while a split is being produced leaves the folder as it was.
    `totals` serves the progress bars.  Returns the card as written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    waiting: list[tuple[Path, Path]] = []
    digests: dict[str, str] = {}
    counts: dict[str, int] = {}
    try:
        for split, problems in splits.items():
            final = output_dir / f"{card.name}_{split}.json"
            total = (totals or {}).get(split) or (len(problems) if isinstance(problems, Sequence) else None)
            with _waiting_file(final, waiting) as file:
                progress = tqdm(problems, desc=final.name, total=total, unit=" problems", disable=hides_bar())
                digests[final.name], counts[final.name] = _write_list(file, progress)
        card = dataclasses.replace(card, sha256=digests, counts=counts)
        final = output_dir / f"{card.name}.card.json"
        with _waiting_file(final, waiting) as file:
            file.write(json.dumps(dataclasses.asdict(card), indent=2, ensure_ascii=False).encode() + b"\n")
        for temporary, final in waiting:
            os.replace(temporary, final)
        sync_path(output_dir)
    finally:
        for temporary, _ in waiting:
            temporary.unlink(missing_ok=True)
    for name, count in counts.items():
        print(f"{output_dir / name}: {count:,} problems, sha256 {digests[name][:16]}...")
    return card


class _waiting_file:
    """A file written under another name in the folder where it will be renamed; synced when closed."""

    def __init__(self, final: Path, waiting: list[tuple[Path, Path]]):
        descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".json", dir=final.parent)
        waiting.append((Path(name), final))
        self.file = os.fdopen(descriptor, "wb")

    def __enter__(self):
        return self.file

    def __exit__(self, *_: object) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            os.fchmod(self.file.fileno(), 0o644)


def _write_list(file: Any, problems: Iterable[dict[str, Any]]) -> tuple[str, int]:
    """The bytes json.dump would write for the whole list, one element at a time; their digest and number."""
    digest, count = hashlib.sha256(), 0
    for problem in problems:
        for piece in (b", " if count else b"[", json.dumps(problem).encode()):
            digest.update(piece)
            file.write(piece)
        count += 1
    ending = b"]" if count else b"[]"
    digest.update(ending)
    file.write(ending)
    return digest.hexdigest(), count


def markdown_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Measures by column, as Markdown; columns after the first also say how far they are from it."""
    names = list(columns)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for measure, first in columns[names[0]].items():
        cells = [_number(first)]
        for name in names[1:]:
            value = columns[name][measure]
            apart = f" ({value / first - 1:+.1%})" if first and isinstance(value, float) else ""
            cells.append(_number(value) + apart)
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
