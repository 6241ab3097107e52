"""The one exception for mistakes that the person at the keyboard can repair."""


class UserError(ValueError):
    """Bad input: a setting, file or folder that the user can correct.

    The message is one line that names the input, gives its value and says what to do. The command-line
    programs print it without a traceback and exit with status 2.
    """
