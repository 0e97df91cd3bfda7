"""The one error that people see."""


class UserError(ValueError):
    """Something the person can mend: the message says in one sentence what happened, why, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
