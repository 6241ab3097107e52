"""Errors that a user can repair, notes, and the exit codes of the programs."""

import os
import sys

EXIT_FAILED_CELLS = 1  # reproduce.py: some cells failed
EXIT_USER_ERROR = 2
EXIT_NOT_REPRODUCED = 3  # certify.py --verify: a line does not come out the same
EXIT_NOT_FINISHED = 4  # certify.py --finished: the last checkpoint is missing or damaged
EXIT_CONTRADICTED = 5  # certify.py --attack: a proven adversarial image inside a certified radius
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

INTERRUPTED = "interrupted; the same command continues"


class UserError(ValueError):
    """Bad input: a setting, file or folder that the user can correct.

    The message is a line with the name of the input, its value and the remedy. The command-line programs print it
    without a traceback and exit with status 2.
    """


def note(message: str) -> None:
    """Print a line on stderr about something that the user did not ask for but should know."""
    print(f"note: {' '.join(message.split())}", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Print a line on stdout about work that is in files; where stdout is full or has no reader, the work goes on."""
    try:
        print(message, flush=True)
    except OSError:
        drop_output()


def drop_output() -> None:
    """Send stdout nowhere from now on, with the text that could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
