"""What can go wrong because of the user's input or machine, and the exit code of each.

Knows: nothing of the rest.  The commands print such an error's text without a traceback.
"""

from typing import ClassVar


class UserError(ValueError):
    """Something the user can mend; the text says what, where, and what to do."""

    exit_code: ClassVar[int] = 2


class ConfigError(UserError):
    """A YAML or JSON settings file, or a command line, that cannot be used."""


class DataError(UserError):
    """A data file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or made for something else."""
