"""Errors that a user can repair, notes, and the exit codes of the programs."""

import sys

EXIT_FAILED_CELLS = 1  # of reproduce.py: some cells failed
EXIT_USER_ERROR = 2
EXIT_NOT_REPRODUCED = 3  # of certify.py --verify: a line does not come out the same
EXIT_NOT_FINISHED = 4  # of certify.py --finished: the last checkpoint is missing or damaged
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class UserError(ValueError):
    """Bad input: a setting, file or folder that the user can correct.

    The message is one line that names the input, gives its value and says what to do. The command-line
    programs print it without a traceback and exit with status 2.
    """


def note(message: str) -> None:
    """Prints a line on stderr that tells what was done beside what was asked for."""
    print(f"note: {message}", file=sys.stderr, flush=True)
