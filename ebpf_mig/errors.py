# SPDX-License-Identifier: Apache-2.0
"""The expected errors, each with its documented exit code.

Raised anywhere, printed in one place (`cli.main`) as one line: what happened, why, and what helps.
Any other exception is a bug and exits with 1.
"""


class EbpfMigError(Exception):
    """Base of every expected error. `remedy`, if given, is printed after the message."""

    exit_code = 1

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class UsageError(EbpfMigError):
    """The command line cannot be carried out as written."""

    exit_code = 2


class PreflightError(EbpfMigError):
    """This machine or this user lacks something: a privilege, a kernel feature or a program."""

    exit_code = 3


class VmmError(EbpfMigError):
    """The VMM refused, went away, or the migration failed or was cancelled."""

    exit_code = 4


class RecordingError(EbpfMigError):
    """A recording cannot be read (truncated header, garbage, unknown version) or written (disk full)."""

    exit_code = 2


class IncompleteError(EbpfMigError):
    """Events were lost and the user asked for `--strict`."""

    exit_code = 5


class RegressionError(EbpfMigError):
    """A comparison found a regression that the user excluded with `--fail-if`."""

    exit_code = 6
