"""`python -m coconut_ds COMMAND ...`, alone or under the `deepspeed` launcher, torchrun or srun.

Only the chosen command is imported, so `--help` and `validate` do not load DeepSpeed.
A UserError ends in one message, printed by the main rank, and the exit code of its class.
"""

import argparse
import ast
import importlib
import io
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from coconut_ds.errors import UserError
from coconut_ds.files import printable_streams

# The command name is the first word of the module name: inspect_latents.py is `inspect`.
COMMANDS = {path.stem.partition("_")[0]: path for path in (Path(__file__).parent / "cli").glob("[a-z]*.py")}
LOCAL_RANK = ("--local_rank", "--local-rank")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not end a run
    try:
        with printable_streams():  # before imports: libraries keep a reference to the stream
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
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = sorted(COMMANDS)
    chosen = next((word for word in arguments if word in names), None)
    parser = argparse.ArgumentParser(
        prog="coconut_ds",
        description="Train language models that reason in continuous latent space (Coconut).",
        allow_abbrev=False,
    )
    parser.add_argument(*LOCAL_RANK, type=int, default=0, help="set by the launcher")
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
        if name == chosen:
            try:
                module = importlib.import_module(f"coconut_ds.cli.{COMMANDS[name].stem}")
            except ModuleNotFoundError as error:
                if str(error.name).startswith(__package__):
                    raise
                print(
                    f"error: {error.name} is not installed for {sys.executable}; "
                    "`source launch/setup.sh` installs it and activates the environment",
                    file=sys.stderr,
                )
                return UserError.exit_code
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(without_bare_deepspeed(arguments))
    if rest and hasattr(args, "overrides"):
        from coconut_ds.config.experiment import unrecognized_flags  # only for this error

        parser.error(unrecognized_flags(rest, arguments))
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if not (is_main and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        if is_main or not error.on_every_rank:
            print(f"{error.headline}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main:
            print("stopped: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def without_bare_deepspeed(arguments: Sequence[str]) -> list[str]:
    """Remove `--deepspeed` unless a JSON follows it.

    DeepSpeed's add_config_arguments defines it as a flag, the Hugging Face Trainer as the config's path.
    """
    following = [*arguments[1:], ""]
    pairs = zip(arguments, following, strict=True)
    return [word for word, after in pairs if word != "--deepspeed" or after.endswith(".json")]


def _docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(COMMANDS[name].read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    sys.exit(main())
