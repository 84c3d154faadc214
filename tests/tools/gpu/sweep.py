"""The GPU fuzzer's problems without a GPU: `python -m tests.tools.gpu.sweep --seconds 600 [--seed N] [--first KERNEL] [--family simt]`.

Kernels and features are drawn as for a GPU (tests/fuzz/draw.py), sizes are smaller, and all kernels run from their PTX (interpreted.py):
the fuzzer's formula judges every number, and the interpreter every access. Problems of sm90 run on sm80, which has the same features.
`--one SEED:INDEX` runs a problem again. A wrong one is printed as a line for tests/fuzz/found.py.
"""
from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import replace

from tests.fuzz import draw as draws
from tests.fuzz import judge
from tests.fuzz.draw import PER_KERNEL, Dice, draw
from tests.fuzz.spec import Spec
from tests.tools.gpu.interpreted import Interpreted, on_ptx

WORK = 3_000_000                # as draw.WORK: of heads, rows, keys and columns
ARCHS = "sm_80", "sm_90a", "sm_120"


def problem(seed: int, index: int) -> Spec:
    draws.WORK["cuda"] = WORK
    return draw(seed, index, "cuda")


def complaints(spec: Spec, arch: str) -> tuple[list[str], list[str]]:
    """(what is wrong, the kernels that ran). Refused is raised through."""
    family = "simt" if spec.engine == "simt" else "sm80"
    with judge.poisoned_results(), on_ptx(family, arch=arch) as engine:
        found = judge.complaints(replace(spec, engine=None, stream=None, library="torch"), Interpreted(engine))
    return found, engine.launched


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.gpu.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first kernel")
    parser.add_argument("--each", type=int, default=8, help="problems of a kernel")
    parser.add_argument("--family", choices=("sm90", "sm80", "simt", "decode"))
    parser.add_argument("--one", metavar="SEED:INDEX")
    parser.add_argument("--arch", choices=ARCHS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.one:
        seed, index = map(int, given.one.split(":"))
        found, launched = complaints(problem(seed, index), given.arch or ARCHS[index // PER_KERNEL % len(ARCHS)])
        print(problem(seed, index), *launched, *found, sep="\n")
        return bool(found)
    start, number, ran, refused, wrong = time.monotonic(), given.first, 0, 0, 0
    while time.monotonic() < start + given.seconds:
        features = draws.kernel(given.seed, number)
        if given.family in (None, features["family"]):
            arch = given.arch or ARCHS[number % len(ARCHS)]
            chosen = Dice(given.seed, number, 3).random.permutation(PER_KERNEL)[:given.each]
            for index in (number * PER_KERNEL + chosen).tolist():
                spec = problem(given.seed, index)
                try:
                    found, _ = complaints(spec, arch)
                    ran += 1
                except judge.Refused:
                    refused += 1
                    continue
                if found:
                    wrong += 1
                    print(f"WRONG --one {given.seed}:{index} --arch {arch}", *found[:3], f"    {spec},", sep="\n", flush=True)
            print(f"kernel {number} {features['family']} {features['dtype']} {features['head_dim']}: {ran} problems, {refused} refused, "
                  f"{wrong} wrong, {time.monotonic() - start:.0f} s", flush=True)
        number += 1
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
