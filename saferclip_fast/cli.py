"""Mistakes, memory and Ctrl-C: the line and the exit code that every command has for them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .errors import UserError

# Errors that a user can mend: reported in one line, without a traceback.
MISTAKES = (UserError, FloatingPointError, ImportError, OSError, ValueError)


def run_command(command: Callable[[], int], *, less_memory: str = "", when_stopped: str = "stopped") -> int:
    """Run a command's body and turn what it raises into a line for the user and an exit code.

    Args:
        command: the body; returns the exit code.
        less_memory: the option that does the same in less memory, shown when memory runs out.
        when_stopped: what to say on Ctrl-C.

    Returns:
        What `command` returns; 2 after a mistake or where memory ran out, 130 after Ctrl-C.
    """
    try:
        return command()
    except MISTAKES as error:
        return mistake(error)
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        return 130
    except RuntimeError as error:
        import torch  # here, so that --help does not wait for it

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        return mistake(f"{error}\n{less_memory}" if less_memory else error)


def mistake(message: object) -> int:
    """Print one error line; returns the exit code of a mistake, 2."""
    print(f"error: {message}", file=sys.stderr)
    return 2
