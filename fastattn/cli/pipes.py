"""Output into a pipe whose reader ends early, as `head` does."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable

CLOSED = 128 + 13       # the exit status of a program that SIGPIPE ends


def until_closed(run: Callable[[], int | None]) -> int:
    """run(), or the status CLOSED without a traceback if the reader of stdout has ended."""
    try:
        try:
            return run() or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()      # here: at exit it could no longer be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # what is still buffered goes nowhere
        return CLOSED
