"""`show-config`, which runs without a command too."""
from __future__ import annotations

import argparse
import json

from ..report import facts, show_config

DESCRIPTION = "Prints what a bug report needs: versions, devices, instruction set, threads, engines, the folder of the kernel cache."
EXAMPLE = "show-config --json"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="the same as JSON, with stable keys")


def run(given: argparse.Namespace) -> int:
    if "json" in given:
        print(json.dumps(facts(), indent=2))
    else:
        show_config()
    return 0
