"""Random calls with key and value caches: `python -m tests.fuzz.caches --seconds 60`.

Each is a Case of tests/tools/caches.py, which judges. `--device cuda` runs them on a GPU, `--device interpreter` runs its kernels' PTX.
Any instruction-set level is run with FASTATTN_ISA.
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

import fastattn
from fastattn.cpu import shared
from tests.tools.caches import Case, Eight

from .draw import Dice

DTYPES = ("float32", "float32", "float64", "float16", "bfloat16", "bfloat16")
HALVES = ("float16", "bfloat16")
WORK = 3_000_000                            # num_heads * rows * keys * (head_dim + head_dim_v) of the longest request
INTERPRETED = 100_000                       # of one that is run from its kernels' PTX
PER_KERNEL = 24                             # such calls with kernels alike: to compile one takes as long as to run ten


def draw(seed: int, index: int) -> tuple[Case, dict[str, Any]]:
    """Call `index` of a run, and options of `Case.check`. The case's name is its seed, so that it can be made again."""
    dice = Dice(seed, index, 7)
    heads_k, group = dice.upto(1, 3), dice.one([1, 1, 2, 3, 4, 8])
    dim = dice.one((dice.upto(1, 40), 16, 32, 64, 64, 96, 128))
    dim_v = dice.upto(1, 64) if dice.chance(0.2) else dim

    def keys() -> int:
        return dice.one((0, dice.upto(0, 20), dice.upto(0, 70), dice.upto(0, 600), dice.upto(200, 2600) if dice.chance(0.1) else 16))

    def rows() -> int:
        return dice.one((1, 1, 1, dice.upto(1, 9), dice.upto(0, 40), dice.upto(1, 250)))
    requests = 0 if dice.chance(0.02) else dice.upto(1, 5)
    before, packed = [keys() for _ in range(requests)], dice.chance(0.5)
    lengths = [rows() for _ in range(requests)] if packed else [rows()] * requests
    _fit(before, lengths, heads_k * group * (dim + dim_v), WORK)
    if not packed:
        lengths = [min(lengths)] * requests if requests else []
    append = dice.chance(0.7)
    paged = dice.chance(0.75)
    page = dice.one((1, 2, 3, 8, 16, 16, 16, 32, 64, 100, 256)) if paged else None
    common = min(before, default=0) // page if page and dice.chance(0.4) else 0
    even = dim // 2
    rotary = (2 * dice.upto(1, even), dice.chance(0.5)) if append and even and dice.chance(0.4) else None
    dtype = dice.one(DTYPES)
    options: dict[str, Any] = {}
    if dice.chance(0.3):
        options["causal"] = False
    if dice.chance(0.3):
        options["window"] = tuple(dice.maybe(0.7, lambda: dice.one((dice.upto(0, 5), dice.upto(0, 300)))) for _ in range(2))
    if dice.chance(0.2):
        options["softcap"] = float(dice.one([0.5, 2.0, 30.0]))
    if dice.chance(0.2):
        options["softmax_scale"] = float(dice.one([0.3, -0.2, 1.0, 0.0]))
    each = tuple(lengths) if packed else lengths[0] if lengths else 1
    case = Case(f"{seed}:{index}", dtype, tuple(before), each, heads_k * group, heads_k, dim, dim_v,
                page, not paged and dice.chance(0.4), append, common, rotary,
                dice.one([dtype, "float32"]), "bhsd" if not packed and dice.chance(0.3) else "bshd", dice.chance(0.3),
                dice.upto(0, 3) if packed else 0, options, dice.one([None, None, None, "heads", "batch"]), dice.chance(0.2))
    splits = dice.one([None, None, 1, 2, 7])
    if dtype in HALVES and dice.chance(0.4):
        case = replace(case, eight=eight_bits(dice, rotary is not None))
    if packed and dice.chance(0.3):
        options["max_seqlen_q"] = max(lengths, default=0) + dice.one([0, 1, 100])
    integers = dice.one(["int32", "int32", "int64", "list"])
    return replace(case, integers="int64" if not requests and paged else integers), {
        "num_splits": splits, "shared_prefix": said(case, dice)}     # [] is no table


def _fit(before: list[int], lengths: list[int], per_pair: int, most: int) -> None:
    """Halve the keys and rows of requests until each has no more work than `most`."""
    for n in range(len(before)):
        while per_pair * lengths[n] * (before[n] + lengths[n]) > most:
            before[n], lengths[n] = before[n] // 2, lengths[n] if lengths[n] == 1 else (lengths[n] + 1) // 2


def said(case: Case, dice: Dice) -> int | None:
    """shared_prefix of a case: all that is shared, a part of it, some keys more, or nothing."""
    if not case.page_size:
        return dice.one((None, 0))
    keys = case.shared * case.page_size
    return dice.one((None, None, 0, keys, keys, dice.upto(0, keys), keys + dice.upto(0, case.page_size - 1)))


def draw_alike(seed: int, index: int, device: str = "interpreter") -> tuple[Case, dict[str, Any]]:
    """Call `index` of a run on the GPU's kernels, with a GPU or without: they are those of the calls beside it. Lengths, pages and splits
    differ."""
    first, small = index - index % PER_KERNEL, device == "interpreter"
    while not (_interpreted if small else _has_requests)(kind := draw(seed, first)[0]):
        first += PER_KERNEL * 1000
    own, more = draw(seed, index)
    before, lengths = list(own.keys) or [3], own.lengths or [1]
    _fit(before, lengths, kind.num_heads * (kind.head_dim + (kind.head_dim_v or kind.head_dim)), INTERPRETED if small else WORK)
    rows = tuple(lengths) if kind.packed else min(lengths)
    page = None if kind.page_size is None else own.page_size or kind.page_size
    options = {name: x for name, x in kind.options.items() if name != "max_seqlen_q"}
    if "window" in options:
        options["window"] = own.options.get("window", options["window"])
    common = min(own.shared, min(before) // page) if page else 0
    case = replace(kind, name=own.name, keys=tuple(before), rows=rows, page_size=page, shared=common, options=options,
                   integers="int32" if small else own.integers)
    return case, more | {"shared_prefix": said(case, Dice(seed, index, 9))}


def _interpreted(case: Case) -> bool:
    return taken(case) and _has_requests(case)


def _has_requests(case: Case) -> bool:
    return bool(case.keys)


def eight_bits(dice: Dice, rotary: bool) -> Eight:
    """8-bit caches; a rotation is of 16-bit arrays."""
    q = not rotary and dice.chance(0.3)
    shapes = ("none", "none", "number", "one", "head", "batch")
    scales = dice.one(shapes) if q else "none", dice.one(shapes), dice.one(shapes)
    return Eight(dice.one(("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2")), scales, q, not rotary and dice.chance(0.3))


def on_device(case: Case, options: dict[str, Any]) -> None:
    """Case.check on a GPU; what no kernel takes is refused before anything is written."""
    from fastattn.gpu.sm90.caches import FEW_EIGHT
    from tests.tools.gpu.cases import on_device as to_device
    from tests.tools.gpu.cases import to_host

    def placed(x: Any) -> Any:
        """Lists are of host arrays."""
        x = np.asarray(x, np.int32) if isinstance(x, list) else x
        return to_device(x) if isinstance(x, np.ndarray) else x
    made = case.make()
    expected = made.caches_after()
    arrays = [placed(x) for x in made.arrays]
    given = {name: placed(x) for name, x in {**made.options, **options}.items()}
    rows = made.options.get("max_seqlen_q") or (made.arrays[0].shape[0] if case.packed else max(case.lengths))
    try:
        out, lse = fastattn.attention_with_kvcache(*arrays, return_lse=True, **given)
    except fastattn.UnsupportedError:
        assert not taken(case), "a call that the kernels take is refused"
        expected, out, lse = (made.arrays[1], made.arrays[2]), None, None
    for name, got, right in (("k_cache", arrays[1], expected[0]), ("v_cache", arrays[2], expected[1])):
        assert to_host(got).tobytes() == right.tobytes(), f"{name}'s bits"
    if out is not None:
        made.judge(to_host(out), to_host(lse), rewritten=rows > FEW_EIGHT)


def interpreted(case: Case, options: dict[str, Any]) -> None:
    """Case.check on the GPU's kernels, run from their PTX, which finds accesses outside the arrays."""
    from tests.tools.gpu.calls import interpreted_serving

    made = case.make()
    expected = made.caches_after()
    found = interpreted_serving(made, **options)
    for name, got, right in (("k_cache", found.k_cache, expected[0]), ("v_cache", found.v_cache, expected[1])):
        assert got.tobytes() == right.tobytes(), f"{name}'s bits"
    made.judge(found.out, found.lse)


def taken(case: Case) -> bool:
    """Whether the GPU's kernels must take the call: rows of whole pieces of 16 bytes, no float64."""
    vector = 4 if case.dtype == "float32" else 16 if case.eight else 8
    dims = case.head_dim, case.head_dim_v or case.head_dim
    return case.dtype != "float64" and not case.strided and max(dims) <= (128 if vector == 4 else 256) and not any(n % vector for n in dims)


def run(seed: int, index: int, device: str = "cpu") -> str | None:
    """None, or what is wrong with a call."""
    case, options = draw(seed, index) if device == "cpu" else draw_alike(seed, index, device)
    fastattn.set_num_threads(1 + index % 3)
    least = shared.LEAST_SAVED
    shared.LEAST_SAVED = index % 2 * least          # few keys that requests share are computed once, too
    try:
        if device != "cpu":
            (on_device if device == "cuda" else interpreted)(case, options)
        else:
            case.make().check("cpu", **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n    {case!r} {options}"
    finally:
        shared.LEAST_SAVED = least
    return None


def main() -> int:
    from .__main__ import today

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.caches", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "interpreter"), default="cpu")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calls", type=int, help="how many, however long they take; each is named before it runs")
    parser.add_argument("--seed", type=int, help="of the run; the date's by default")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first call's number")
    given = parser.parse_args()
    seed, start, index, wrong = given.seed or today(), time.monotonic(), given.first, 0
    while index - given.first < given.calls if given.calls is not None else time.monotonic() - start < given.seconds:
        if given.calls is not None:
            print(f"at {seed}:{index}", flush=True)
        found = run(seed, index, given.device)
        if found:
            wrong += 1
            print(f"{seed}:{index} {found}", flush=True)
        index += 1
    print(f"{index - given.first} calls, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
