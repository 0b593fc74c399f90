"""Read, write and print what another person may have made.

    printable_streams          escape control characters in everything that is printed
    library_lines_hidden       what DeepSpeed prints about itself, unless --verbose
    json_text                  standard JSON: null for NaN and infinities
    read_bytes, read_json      read files up to a size; refuse devices, do not wait for pipes
    hash_file                  the sha256 of a file
    replace_text, ..._bytes    replace a file atomically; a link with that name is replaced, not followed
    open_append, make_folder   refuse links
    similar_path, meant_child  a hint for a misspelled path, and for the folder of what was meant
    home_expanded              a path with the home folder in place of `~`
    from_start                 a path that a run folder records, from another working folder
    run_folder_of              the run, checkpoint or exported folder that contains a path

The folder that the user names may be a link; links inside it are not followed.
"""

import difflib
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import IO, Any

from coconut_ds.errors import ConfigError

MIB = 1 << 20
MAX_JSON_BYTES = 64 * MIB
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # a file system does not support the call
MAX_DIGITS = 19  # of an integer, as in 2**63
EXPORT_FILE = "coconut.json"  # settings beside exported weights
ENVIRONMENT = "environment.json"
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal
VERBOSE = "COCONUT_VERBOSE"  # environment variable, set by --verbose
RUN_SIGNS = ("ds_config.json", ENVIRONMENT, "metrics.jsonl", "latest")
# C0 and C1 except tab and line ends, surrogates, and characters that change the text direction.
CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Used by nested progress bars and by reports of transformers: cursor up, bold, colors.
HARMLESS = re.compile("(\x1b\\[(?:A|0m|1m|3[1-7]m))")


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """The content of a file, or of a pipe that has a writer; devices are refused.

    Raises OSError, also for more than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # do not wait for the writer of a pipe
    os.set_blocking(descriptor, True)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with os.fdopen(descriptor, "rb") as reader:
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise OSError(errno.EINVAL, "not a file", str(path))
        content = reader.read() if limit is None else reader.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit / MIB:g} MiB", str(path))
    return content


def home_expanded(text: str) -> str:
    """`text` with the user's home folder for a leading `~` of a path: also in --option=~/x and KEY=~/x."""
    match = re.fullmatch(r"((?:--[\w-]+=)?(?:[\w.]+=)?)(~.*)", text, re.DOTALL)
    return match[1] + os.path.expanduser(match[2]) if match else text


def similar_path(path: str | Path) -> str:
    """'; did you mean X?' for a missing path if its folder has a similar name, else ''."""
    path = Path(path)
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1, 0.75)
    except (OSError, ValueError):
        return ""
    return f"; did you mean '{path.with_name(near[0])}'?" if near else ""


def meant_child(folder: Path, is_one: Callable[[Path], bool]) -> str:
    """'; write FOLDER/checkpoint-4' for a folder with an entry that is meant, the highest number; else ''."""

    def number(path: Path) -> tuple[int, str]:
        return int((re.findall(r"\d+", path.name) or ["0"])[-1]), path.name

    entries = [entry for entry in folder.iterdir() if is_one(entry)] if folder.is_dir() else []
    return f"; write {max(entries, key=number)}" if entries else ""


def hash_file(path: str | Path) -> str:
    """The sha256 of a file, as hexadecimal text.  Raises OSError."""
    with open(path, "rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def read_json(path: str | Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file.  OSError; ValueError also for duplicate keys, NaN and huge integers."""
    return parse_json(read_bytes(path, limit), allow_nan=False)


def parse_json(text: str | bytes, allow_nan: bool = True) -> Any:
    """Parse one JSON value.  ValueError for any error, including deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{twice[:80]!r} appears twice in one object; remove one")
        return values

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise ValueError(f"{digits[:20]}... is too large a number")
        return int(digits)

    def constant(name: str) -> float:
        if not allow_nan:
            raise ValueError(f"{name} is not a JSON number; write a finite number")
        return float(name)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON, with null for NaN and infinities; `options` are those of json.dumps."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def replace_text(path: Path, text: str, durable: bool = True) -> None:
    """Replace a file atomically; `durable`: also across a power failure."""
    replace_bytes(path, text.encode("utf-8"), durable)


def replace_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """`replace_text` for bytes.  The temporary name is random, so that no link can be prepared for it."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as writer:
            writer.write(content)
            writer.flush()
            if durable:
                sync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """fsync; does nothing if the file system does not support it (some network file systems)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def open_append(path: Path, mode: str = "ab") -> IO[Any]:
    """Open a run folder's file to append ("ab", "a+", "a").  Raises OSError; ConfigError for a link."""
    access = os.O_RDWR if "+" in mode else os.O_WRONLY
    flags = access | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _is_a_link(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    if "b" in mode:
        return os.fdopen(descriptor, mode, buffering=0)  # report a full disk on write, not on close
    return os.fdopen(descriptor, mode, encoding="utf-8")


def make_folder(path: Path) -> Path:
    """Make a folder inside a run folder if it does not exist.  Raises OSError; ConfigError for a link."""
    if path.is_symlink():
        raise _is_a_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def open_output(path: str | Path, option: str) -> IO[str]:
    """Open the output file that the user named.

    Raises ConfigError, also for a link inside a run folder, whose target the user did not choose.
    """
    path = Path(path)
    if path.is_symlink() and run_folder_of(path) is not None:
        raise _is_a_link(path)
    try:
        return open(path, "w", encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} {path}: cannot be written ({reason})") from None


def run_folder_of(path: str | Path) -> Path | None:
    """The nearest run, checkpoint or exported folder that contains `path`, recognized by its files."""
    for folder in Path(os.path.abspath(path)).parents:
        if any((folder / name).is_file() for name in (EXPORT_FILE, "manifest.json")):
            return folder
        has_settings = (folder / "experiment.yaml").is_file()
        if has_settings and (
            any(os.path.lexists(folder / name) for name in RUN_SIGNS) or any(folder.glob("checkpoint_*"))
        ):
            return folder
    return None


def from_start(value: str, recorded_in: str | Path) -> str:
    """A path that a file of a run folder records.  A relative one counts from where the run was started.

    A run folder that was moved or copied with its surroundings counts from its present place first.  If the
    path exists in neither place, it counts from the working folder.  A name that exists nowhere stays as it
    is, since it may be an id of the hub, unless it has a file ending.
    """
    start = _start_folder(Path(recorded_in))
    if start is None or os.path.isabs(value) or value.startswith("hf://"):
        return value
    present = _present_start(Path(recorded_in))
    if present not in (None, start) and exists(present / value):
        start = present
    if start == Path.cwd():
        return value
    there = start / value
    if exists(there) or (there.suffix and not exists(Path(value))):
        return str(there)
    return value


def _started_run(path: Path) -> Path | None:
    """The run folder that `path` belongs to, by its record of the start."""
    folders = [Path(os.path.abspath(path)), *Path(os.path.abspath(path)).parents][:4]
    return next((folder for folder in folders if (folder / ENVIRONMENT).is_file()), None)


def _start_folder(path: Path) -> Path | None:
    """The working folder of the newest start of the run that `path` belongs to, if it is recorded."""
    folder = _started_run(path)
    if folder is None:
        return None
    try:
        start = Path(read_json(folder / ENVIRONMENT)["folder"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return start if start.is_absolute() else None


def _present_start(path: Path) -> Path | None:
    """The folder that `save_path` and `name` of a run count from at its present place, if they fit it."""
    folder = _started_run(path)
    assert folder is not None
    try:
        text = read_bytes(folder / "experiment.yaml", 1 << 17).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    # As training writes it: one line.  `config` reads the file properly, and stands on this module.
    match = re.search(r"^save_path: *['\"]?([^'\"\n]+?)['\"]? *$", text, re.MULTILINE)
    parts = Path(match[1]).parts if match else ("..",)
    if os.path.isabs(parts[0]) or ".." in parts or folder.parent.parts[-len(parts) :] != parts:
        return None
    return folder.parents[len(parts)]


def exists(path: Path) -> bool:
    """Whether a file, a folder or a checkpoint called `best_stage_N` is there."""
    try:
        # RUN/best_stage_2 is a name, not a file.
        return path.exists() or (path.name.startswith("best_stage_") and path.parent.is_dir())
    except (OSError, ValueError):  # too long a name, or a zero byte
        return False


def cannot_write(folder: Path, error: OSError) -> ConfigError:
    """The error for a run folder that cannot be created or written to."""
    match error.errno:
        case errno.ENAMETOOLONG:
            remedy = "shorten 'name' or 'save_path'"
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "free disk space, or choose another 'save_path'"
        case _:
            remedy = "choose another 'save_path'"
    where = f" {error.filename}" if error.filename and str(error.filename) != str(folder) else ""
    reason = (error.strerror or str(error)) + where
    return ConfigError(f"{folder}: cannot write here ({reason}); {remedy}")


def _is_a_link(path: Path) -> ConfigError:
    return ConfigError(f"{path} is a link, and links in a run folder are not followed; delete it")


def is_printable(text: str) -> bool:
    """Whether a text has no control characters other than line ends and tabs."""
    return CONTROL.search(text) is None


def counted(number: int, thing: str) -> str:
    """'1 step', '2 steps'."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3 h 40 min', '2 d 4 h'."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def hides_bar(is_main: bool = True) -> bool | None:
    """What tqdm's `disable` takes: None, a bar where there is a terminal, or True.

    An argument goes before tqdm's own reading of TQDM_DISABLE, which notebooks set.
    """
    return None if is_main and not os.environ.get("TQDM_DISABLE") else True


def print_now(line: str) -> None:
    """Print a line above the progress bar, if there is one, and into a log at once."""
    from tqdm import tqdm  # not needed by the commands that only read

    tqdm.write(line)
    sys.stdout.flush()


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


@contextmanager
def library_lines_hidden() -> Iterator[None]:
    """Hide what a library prints to stdout, unless --verbose or it fails; loggers and stderr still show."""
    text = io.StringIO()
    try:
        with nullcontext() if os.environ.get(VERBOSE) else redirect_stdout(text):
            yield
    except BaseException:
        print(text.getvalue(), end="", file=sys.stderr)
        raise


def print_notes(notes: Iterable[str]) -> None:
    """Print notes to stderr on rank 0 (or the only process); stdout has only a command's result."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
