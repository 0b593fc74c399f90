"""`python -m coconut_ds COMMAND ...`, alone or under the `deepspeed` launcher, torchrun or srun.

Only the chosen command is imported, so `--help` and `validate` do not load DeepSpeed.
A UserError ends in one message, printed by the main rank, and the exit code of its class.
"""

import argparse
import ast
import importlib
import io
import itertools
import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

import coconut_ds
from coconut_ds.errors import UserError
from coconut_ds.files import VERBOSE, home_expanded, printable_streams

# The command name is the first word of the module name: inspect_latents.py is `inspect`.
COMMANDS = {path.stem.partition("_")[0]: path for path in (Path(__file__).parent / "cli").glob("[a-z]*.py")}
_usual_format = warnings.formatwarning
LOCAL_RANK = ("--local_rank", "--local-rank")
# A launcher ends the main rank, which prints an error of all ranks, when another one ends.
MAIN_RANK_SECONDS = 2.0
# Of torch's profiler: above the level of its lines about starting and stopping.
QUIET_ENVIRONMENT = {"KINETO_LOG_LEVEL": "6"}
# On some CPUs, the import of bitsandbytes warns of a kernel that is missing and not needed.
QUIET_LOGGERS = ("bitsandbytes.backends.cpu.ops",)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are printed by the main rank alone."""

    def error(self, message: str) -> NoReturn:
        if not _is_main():
            time.sleep(MAIN_RANK_SECONDS)
            sys.exit(UserError.exit_code)
        super().error(message)


def _is_main() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end a run
    warnings.formatwarning = _format_warning
    try:
        # Before imports: libraries keep a reference to the stream.
        with printable_streams(), warnings.catch_warnings():
            code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(argv: Sequence[str] | None) -> int:
    # A shell expands ~ only at the start of a word.
    arguments = [home_expanded(word) for word in (sys.argv[1:] if argv is None else argv)]
    _set_verbose("--verbose" in arguments)
    names = sorted(COMMANDS)
    chosen = next((word for word in arguments if word in names), None)
    parser = Parser(
        prog="coconut_ds",
        description="Train language models that reason in continuous latent space (Coconut).",
        allow_abbrev=False,
    )
    parser.add_argument(*LOCAL_RANK, type=int, default=0, help="set by the launcher")
    parser.add_argument("--version", action="version", version=f"coconut_ds {coconut_ds.__version__}")
    spellings: Collection[str] = ()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in names:
        summary, _, details = _docstring(name).partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{details}",
            formatter_class=argparse.RawTextHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument(*LOCAL_RANK, type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.add_argument(
            "--verbose", action="store_true", help="show what DeepSpeed and torch print about themselves"
        )
        if name == chosen:
            try:
                module = importlib.import_module(f"coconut_ds.cli.{COMMANDS[name].stem}")
            except ModuleNotFoundError as error:
                return _not_installed(error)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            spellings = command._option_string_actions
    if not arguments:
        parser.print_help(sys.stderr)
        return UserError.exit_code
    if chosen is None and (word := _first_word(arguments)):
        parser.error(_unknown_command(word, names))
    arguments = [_as_declared(word, spellings) for word in without_bare_deepspeed(arguments)]
    args, rest = parser.parse_known_args(arguments)
    if rest:
        from coconut_ds.config.experiment import unrecognized_flags  # only for this error

        parser.error(unrecognized_flags(rest, arguments, spellings, hasattr(args, "overrides")))
    is_main = _is_main()
    if not (is_main and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        if is_main or not error.on_every_rank:
            print(f"{error.headline}: {error}", file=sys.stderr, flush=True)
        elif error.exit_code == UserError.exit_code:
            time.sleep(MAIN_RANK_SECONDS)
        return error.exit_code
    except ModuleNotFoundError as error:
        return _not_installed(error)
    except KeyboardInterrupt:
        if is_main:
            print("stopped: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def _set_verbose(verbose: bool) -> None:
    """Hide what libraries print about themselves, except errors and warnings, or show it."""
    os.environ.pop(VERBOSE, None)
    if verbose:
        os.environ[VERBOSE] = "1"
        return
    if not sys.warnoptions:  # the user's own choice, -W or PYTHONWARNINGS
        warnings.simplefilter("ignore", FutureWarning)  # for the authors of other libraries
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _not_installed(error: ModuleNotFoundError) -> int:
    """Print the remedy for a package that is not installed; an error of this package is raised."""
    if str(error.name).startswith(__package__):
        raise error
    print(
        f"error: {error.name} is not installed for {sys.executable}; "
        "`source launch/setup.sh` installs it and activates the environment",
        file=sys.stderr,
    )
    return UserError.exit_code


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our warnings without their place in the code; those of libraries as usual."""
    if category is UserWarning and __package__ in Path(filename).parts:
        return f"warning: {message}\n"
    return _usual_format(message, category, filename, lineno, line)


def without_bare_deepspeed(arguments: Sequence[str]) -> list[str]:
    """Remove `--deepspeed` unless a JSON follows it.

    DeepSpeed's add_config_arguments defines it as a flag, the Hugging Face Trainer as the config's path.
    """
    pairs = itertools.zip_longest(arguments, arguments[1:], fillvalue="")
    return [word for word, after in pairs if word != "--deepspeed" or after.endswith(".json")]


def _as_declared(word: str, options: Collection[str]) -> str:
    """An option with hyphens and underscores as the command declares it: --max_minutes -> --max-minutes."""
    name, equals, value = word.partition("=")
    if name.startswith("--") and name not in options:
        plain = name.replace("_", "-")
        name = next((option for option in options if option.replace("_", "-") == plain), name)
    return name + equals + value


def _first_word(arguments: Sequence[str]) -> str:
    """The first argument that is no option; `--local_rank N` is the launcher's."""
    pairs = zip(arguments, ["", *arguments], strict=False)
    return next((word for word, before in pairs if not word.startswith("-") and before not in LOCAL_RANK), "")


def _unknown_command(word: str, names: Sequence[str]) -> str:
    from coconut_ds.config.schema import did_you_mean  # only for this error

    hint = did_you_mean(word, names)
    if word.endswith((".yaml", ".yml")):
        hint = f"; write `train {word}` or `validate {word}`"
    return f"{word!r} is not a command{hint or '; commands: ' + ', '.join(names)}"


def _docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(COMMANDS[name].read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    sys.exit(main())
