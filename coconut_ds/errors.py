"""Errors caused by the user's input or machine, and their exit codes.

The commands print the text of such an error without a traceback.
"""

from typing import ClassVar


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, up to the last word within 400 characters."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 400 else (line[:397].rpartition(" ")[0] or line[:397]) + "..."


class UserError(ValueError):
    """An error that the user can fix; the text says what is wrong, where, and what to do."""

    exit_code: ClassVar[int] = 2
    headline: ClassVar[str] = "error"
    on_every_rank: ClassVar[bool] = True  # raised on all ranks, so only the main rank prints it


class ConfigError(UserError):
    """A YAML or JSON settings file, or a command line, that cannot be used."""


class DataError(UserError):
    """A data file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the run."""


class OneRankFailed(CheckpointError):
    """One rank could not write its part and could not tell the others."""

    on_every_rank = False


class StopRequested(UserError):
    """The run was asked to stop and saved its state; the same command resumes it.  75: EX_TEMPFAIL."""

    exit_code = 75
    headline = "stopped"


class Diverged(UserError):
    """Training diverged: the loss is not finite, or steps are skipped again and again."""

    exit_code = 76


class RankLost(UserError):
    """Another rank cannot be reached, or this one makes no progress.  Every rank prints its own message."""

    exit_code = 77
    on_every_rank = False


class BudgetError(UserError):
    """A plan that exceeds its memory budget."""

    exit_code = 3


class OutOfMemory(UserError):
    """A rank ran out of memory; its report is in the run folder.  All ranks end with this error."""

    exit_code = 78
    on_every_rank = False


def port_in_use(address: str, port: int | str) -> ConfigError:
    """The error if another program uses the port."""
    return ConfigError(
        f"{address}:{port}: another program uses this port, so the ranks cannot connect; use another one: "
        "deepspeed --master_port N, or MASTER_PORT=N before the scripts of launch/"
    )
