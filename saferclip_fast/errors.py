"""The errors that a user can mend."""


class UserError(Exception):
    """A mistake that a user can mend: the message says what is wrong and what to do.

    Commands print it in one line, without a traceback.
    """
