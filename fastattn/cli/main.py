"""The command line's parser. A command's file is imported with it, what the command needs only when it runs."""
from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from types import ModuleType

from . import bench, cache, check, precompile, show
from .pipes import until_closed

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "show-config": (show, "versions, devices, instruction set, cache folder (also without a command)"),
    "check": (check, "compare every engine of this machine with the reference"),
    "bench": (bench, "measure one shape beside the libraries that are installed"),
    "precompile": (precompile, "compile GPU kernels into the cache, for the device here or for another architecture"),
    "cache": (cache, "folder, entries and size of the kernel cache"),
}
WIDTH = 100             # of descriptions, in columns
EPILOG = """\
examples:
  {prog}                       what a bug report needs; --json for programs
  {prog} check                 is every engine right on this machine?
  {prog} bench --shape 2,4096,16,128 --causal
  {prog} precompile --arch sm_90a
"""


def program() -> str:
    """How the command was called: fastattn, or python -m fastattn."""
    return "fastattn" if os.path.basename(sys.argv[0]) == "fastattn" else "python -m fastattn"


def parser() -> argparse.ArgumentParser:
    from ..version import __version__

    prog = program()
    made = argparse.ArgumentParser(prog=prog, description="fastattn's command line. Without a command: show-config.",
                                   formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG.format(prog=prog))
    made.add_argument("--version", action="version", version=f"fastattn {__version__}")
    show.add(made)
    commands = made.add_subparsers(metavar="command")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=textwrap.fill(module.DESCRIPTION, WIDTH),
                                      formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"example:\n  {prog} {module.EXAMPLE}\n")
        module.add(command)
        command.set_defaults(run=module.run)
    made.set_defaults(run=show.run)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : list of str, optional
        Arguments after the program's name. Default: those of the process.

    Returns
    -------
    int
        The exit status.

    Raises
    ------
    SystemExit
        With a message, or status 2, if an argument is wrong or something that the command needs is missing.
    """
    return until_closed(lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    made = parser()
    given = made.parse_args(arguments)
    if "json" in given and given.run is not show.run:
        made.error("--json goes with show-config, or stands alone")
    run: Callable[[argparse.Namespace], int] = given.run
    return run(given)
