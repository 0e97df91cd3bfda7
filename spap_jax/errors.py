"""The one error that people see, and what they are told without an error."""


class UserError(ValueError):
    """Something the person can mend: the message says in one sentence what happened, why, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Notice(UserWarning):
    """Something worth knowing that stops nothing: one sentence, which the command line prints as a line of its own."""
