"""The first kernels of a process take seconds to compile. On a terminal, one line says so after two of them.

Without it, nothing would explain why a first call takes so long. Without a terminal nothing is written, and where the
log shows the start of each compilation neither.
"""
from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

PATIENCE = 2.0      # seconds of compiling before the line is written
log = logging.getLogger("fastattn")


class _Notice:
    """What this process has compiled so far: seconds, and whether the line was written."""

    def __init__(self) -> None:
        self.seconds, self.said = 0.0, False

    def say(self, kernel: str, arch: str) -> None:
        self.said = True
        sys.stderr.write(f"fastattn: compiling {kernel} for {arch}. A first call waits for this; `python -m fastattn precompile` does it "
                         "in advance.\n")
        sys.stderr.flush()


notice = _Notice()


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):        # None or some other object, closed
        return False


def _wanted() -> bool:
    """Whether somebody reads stderr and has not been told."""
    return not notice.said and _on_terminal() and not log.isEnabledFor(logging.INFO)


@contextlib.contextmanager
def announced(kernel: str, arch: str) -> Iterator[None]:
    """Compile inside: writes the line once the process has compiled for PATIENCE seconds.

    One compilation runs at a time (compile.py's lock). The thread that waits has ended when the block ends. A child
    that is forked meanwhile has neither the thread nor the compilation.
    """
    if not _wanted():
        yield
        return
    start = time.perf_counter()
    timer = threading.Timer(max(0.0, PATIENCE - notice.seconds), notice.say, (kernel, arch))
    timer.daemon = True
    with contextlib.suppress(RuntimeError):     # no thread to be had: the kernel is worth more than the line
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        notice.seconds += time.perf_counter() - start
