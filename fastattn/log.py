"""FASTATTN_LOG=info or debug: what the logger "fastattn" says goes to stderr.

Without it the package leaves logging alone, as a library should: a program that wants the records configures the logger
"fastattn" itself. Nothing is imported here until the variable is set.
"""
from __future__ import annotations

import os

VARIABLE = "FASTATTN_LOG"
LEVELS = ("info", "debug")
FORMAT = "%(asctime)s %(levelname)s %(message)s"


def setup(text: str) -> bool:
    """Let the logger "fastattn" write to stderr from this level on.

    An unknown level is one warning, and changes nothing. Returns whether the level is known.
    """
    level = text.strip().lower()
    if level not in LEVELS:
        import warnings

        warnings.warn(f"{VARIABLE} is {text!r}; expected {' or '.join(LEVELS)}. Nothing is logged.", RuntimeWarning, stacklevel=2)
        return False
    import logging

    logger = logging.getLogger("fastattn")
    logger.setLevel(level.upper())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))
    logger.addHandler(handler)
    return True


if os.environ.get(VARIABLE):
    setup(os.environ[VARIABLE])
