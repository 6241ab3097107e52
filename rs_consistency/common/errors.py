"""What is said to the person at the keyboard: mistakes that they can repair, and notes."""

import sys


class UserError(ValueError):
    """Bad input: a setting, file or folder that the user can correct.

    The message is one line that names the input, gives its value and says what to do. The command-line
    programs print it without a traceback and exit with status 2.
    """


def note(message: str) -> None:
    """Prints a line on stderr that tells what was done beside what was asked for."""
    print(f"note: {message}", file=sys.stderr, flush=True)
