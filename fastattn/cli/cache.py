"""`cache`: show, list or clear the folders where compiled kernels are looked for."""
from __future__ import annotations

import argparse
import time

from .packages import needed

DESCRIPTION = """\
Shows where compiled kernels are kept, how many there are and how large they are. FASTATTN_CACHE names the folder,
FASTATTN_CACHE_MB its limit, 512 if it is not set."""
EXAMPLE = "cache --list"


def add(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="a line for each kernel, last used first: size, day, architecture, kernel")
    what.add_argument("--clear", action="store_true", help="remove them; they are compiled again when they are needed")


def run(given: argparse.Namespace) -> int:
    """Only the last folder, the user's own, is cleared. Status 1 if a folder is not used."""
    [cache] = needed("cache", ".gpu.runtime.cache")
    folders, status = cache.folders(), 0
    for folder in folders:
        clears = given.clear and folder == folders[-1]
        try:
            found = (cache.clear if clears else cache.entries)(folder)
            labels = cache.labels(folder) if given.list else []
        except OSError as error:
            print(f"{folder}: not used: {error}")
            status = 1
        else:
            print(f"{folder}: {len(found)} entries, {sum(entry.size for entry in found) / 1e6:.1f} MB{' removed' if clears else ''}")
            for entry, label in labels:
                day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
                print(f"  {entry.size / 1e3:6.1f} KB  {day}  {label or 'of another version: ' + entry.name}")
    return status
