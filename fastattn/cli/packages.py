"""Modules of the GPU engine, or one clear line where its packages are missing."""
from __future__ import annotations

import importlib
from typing import Any


def needed(command: str, *modules: str) -> list[Any]:
    """Imported modules; those that begin with a dot are fastattn's. SystemExit names the command and what is missing."""
    try:
        return [importlib.import_module(f".{module}" if module.startswith(".") else module, __package__) for module in modules]
    except (ImportError, AttributeError) as error:      # numba-cuda fails with AttributeError where NumPy is too new for it
        raise SystemExit(f"{command} needs the packages of the GPU engine ({error}): pip install 'fastattn[gpu]'.") from error
