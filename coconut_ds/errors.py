"""What can go wrong because of the user's input or machine, and the exit code of each.

Knows: nothing of the rest.  The commands print such an error's text without a traceback.
"""

from typing import ClassVar


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line of at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class UserError(ValueError):
    """Something the user can mend; the text says what, where, and what to do."""

    exit_code: ClassVar[int] = 2
    headline: ClassVar[str] = "error"
    on_every_rank: ClassVar[bool] = True  # raised on all ranks alike, so the main rank's message is enough


class ConfigError(UserError):
    """A YAML or JSON settings file, or a command line, that cannot be used."""


class DataError(UserError):
    """A data file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or made for something else."""


class OneRankFailed(CheckpointError):
    """One rank could not write its part, where it could not tell the others."""

    on_every_rank = False


class StopRequested(UserError):
    """Somebody asked the run to stop; its state is saved, the same command goes on.  75: EX_TEMPFAIL."""

    exit_code = 75
    headline = "stopped"


class Diverged(UserError):
    """The numbers went bad: a loss that is not finite, or a step that is skipped again and again."""

    exit_code = 76


class RankLost(UserError):
    """This rank cannot reach another one, or it stopped moving.  Every rank says it for itself."""

    exit_code = 77
    on_every_rank = False


class BudgetError(UserError):
    """A plan that exceeds its memory budget."""

    exit_code = 3


class OutOfMemory(UserError):
    """A rank ran out of memory; its report is in the run folder.  Every rank ends with it."""

    exit_code = 78
    on_every_rank = False


def port_in_use(address: str, port: int | str) -> ConfigError:
    """What is wrong where another program has the port, and the remedy."""
    return ConfigError(
        f"{address}:{port}: another program uses this port, so the ranks cannot meet there; give another "
        "one: deepspeed --master_port N, or MASTER_PORT=N before the scripts of launch/"
    )
