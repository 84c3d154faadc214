"""Calls with caches that must agree, drawn at random: `python -m tests.fuzz.serving --seconds 60`.

Each takes a Case of caches.py and makes its results in another way: in chunks, from parts of its keys, by another library's signature, in
another library's arrays, one request at a time. Or it spoils one argument, which must be refused before anything is written.
"""
from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import fastattn
from fastattn.compat import flash_attn, vllm_flash
from tests.tools.caches import Call, Case
from tests.tools.guard import guarded_copy

from . import caches
from .draw import Dice

Array = np.ndarray[Any, Any]
Relation = Callable[[Case, Dice, dict[str, Any]], bool]      # False: the case has not what it is about
SCALES = ("q_scale", "k_scale", "v_scale")


def arguments(call: Call) -> dict[str, Any]:
    """Its options, lengths and tables as arrays."""
    return {name: np.array(x, np.int64) if isinstance(x, list) else x for name, x in call.options.items()}


def copied(call: Call) -> list[Any]:
    """Its arrays, the caches in memory of their own."""
    return [guarded_copy(x) if n in (1, 2) else x for n, x in enumerate(call.arrays)]


def direct(arrays: list[Any], options: dict[str, Any], more: dict[str, Any]) -> tuple[Any, Any]:
    """out and lse of attention_with_kvcache."""
    result: tuple[Any, Any] = fastattn.attention_with_kvcache(*arrays, return_lse=True, **{**options, **more})
    return result


def same(name: str, got: Any, right: Any) -> None:
    got, right = np.asarray(got), np.asarray(right)
    assert got.shape == right.shape and got.dtype == right.dtype and got.tobytes() == right.tobytes(), f"{name}'s bits"


def right_caches(arrays: list[Any], call: Call) -> None:
    for name, got, right in zip(("k_cache", "v_cache"), arrays[1:3], call.caches_after(), strict=True):
        same(name, got, right)


def renamed(case: Case, options: dict[str, Any], num_splits: int | None) -> dict[str, Any]:
    """Options by FlashAttention's names, in its words."""
    given = {name.replace("_scale", "_descale") if name in SCALES else name: x for name, x in options.items() if name != "window"}
    window = case.options.get("window")
    if window is not None:
        given["window_size"] = tuple([-1 if x is None else x for x in window])
    return {**given, "causal": case.options.get("causal", True), "num_splits": num_splits or 0, "return_softmax_lse": True}


# ---------------------------------------------------------------- the same attention, another way
def in_chunks(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """Prefill in chunks: some rows of each request a call. Without a causal mask rows see those of later chunks."""
    if not case.append or not case.options.get("causal", True) or not sum(case.lengths):
        return False
    call = case.make()
    arrays, options = copied(call), arguments(call)
    exact_out, exact_lse = call.expected()
    out, lse = np.zeros_like(exact_out, np.float32), np.full_like(exact_lse, -np.inf, np.float32)
    done, starts = [0] * len(case.keys), np.concatenate([[0], np.cumsum(case.lengths)])
    q, k, v = (np.concatenate([call.rows_of(arrays[n], b) for b in range(len(case.keys))]) for n in (0, 3, 4))
    given = {name: x for name, x in options.items() if name not in ("cu_seqlens_q", "max_seqlen_q", "layout")}
    while done != case.lengths:
        step = [min(n - at, dice.one((0, 1, 1, dice.upto(0, 7), dice.upto(0, 100)))) for n, at in zip(case.lengths, done, strict=True)]
        rows = np.concatenate([np.arange(start + at, start + at + n) for start, at, n in zip(starts, done, step, strict=False)]).astype(int)
        cu = np.concatenate([[0], np.cumsum(step)]).astype(np.int32)
        given["cache_seqlens"] = np.array(case.keys, np.int32) + np.array(done, np.int32)
        part, part_lse = fastattn.attention_with_kvcache(q[rows], *arrays[1:3], k[rows], v[rows], cu_seqlens_q=cu, return_lse=True,
                                                         **{**given, **more})
        for b, n in enumerate(step):
            call.rows_of(out, b)[done[b]:done[b] + n] = part[cu[b]:cu[b + 1]]
            whose = lse[:, starts[b]:] if case.packed else lse[b]
            whose[:, done[b]:done[b] + n] = part_lse[:, cu[b]:cu[b + 1]]
            done[b] += n
    right_caches(arrays, call)
    compute = np.float64 if case.dtype == "float64" else np.float32
    call.judge(out.astype(part.dtype), lse.astype(compute)) if case.dtype != "float64" else None
    return True


def from_a_prefix(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """The first keys as one call, without a mask, and those behind them as another, merged."""
    windows = case.options.get("window") or (None, None)
    if case.append or case.alibi or case.sinks or windows != (None, None) or case.packed or not case.page_size or not case.keys:
        return False
    cut = dice.upto(0, min(case.keys) // case.page_size)
    if cut * case.page_size + case.lengths[0] > min(case.keys):         # each row sees the whole prefix
        return False
    call, more = case.make(), {"num_splits": more.get("num_splits")}
    options = arguments(call)
    table, keys = options.pop("block_table"), options.pop("cache_seqlens")
    parts = [direct(call.arrays, {**options, "cache_seqlens": lengths, "block_table": part, **extra}, more) for lengths, part, extra in (
        (np.full_like(keys, cut * case.page_size), table, {"causal": False}),
        (keys - cut * case.page_size, np.ascontiguousarray(table[:, cut:]), {}))]
    out, lse = fastattn.merge_states([part[0] for part in parts], [part[1] for part in parts], layout=case.layout)
    exact = call.expected()[0]
    error, size = np.linalg.norm(out.astype(np.float64) - exact), np.linalg.norm(exact)
    eps = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[case.out_dtype]
    assert error <= eps * (size + 1e-3), f"out: error {error:.3e} of {size:.3e}"
    right = direct(call.arrays, arguments(call), more)[1]
    assert np.allclose(lse, right, atol=1e-4, rtol=1e-5), "lse"
    return True


def one_by_one(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """With one split: a request alone, in a batch, packed or in rows of any table width, has the same bits."""
    if not case.keys or case.strided:
        return False
    call = case.make()
    arrays, options = copied(call), {**arguments(call), "num_splits": 1}
    out, lse = direct(arrays, options, {})
    right_caches(arrays, call)
    b = dice.upto(0, len(case.keys) - 1)
    own = copied(call)
    mine = {name: x for name, x in options.items() if name not in ("cu_seqlens_q", "max_seqlen_q", "layout")}
    for name in ("cache_seqlens", "block_table", "cache_batch_idx", *SCALES, "alibi_slopes"):
        x = mine.get(name)
        if isinstance(x, np.ndarray) and (x.ndim == 2 or name.startswith("cache_")):
            mine[name] = x[b:b + 1]
    if "block_table" in mine:
        mine["block_table"] = np.concatenate([mine["block_table"], np.full((1, dice.upto(0, 40)), -7, np.int32)], axis=1)
    elif "cache_batch_idx" not in mine:
        own[1:3] = [x[b:b + 1] for x in own[1:3]]
    rows = [None if x is None else np.ascontiguousarray(call.rows_of(x, b)) for x in (own[0], *own[3:])]
    if dice.chance(0.5):
        mine["cu_seqlens_q"] = np.array([0, case.lengths[b]], np.int32)
    else:
        rows = [None if x is None else x[None] for x in rows]
    alone, alone_lse = direct([rows[0], *own[1:3], *rows[1:]], mine, {})
    packed = "cu_seqlens_q" in mine
    same("out", alone if packed else alone[0], np.ascontiguousarray(call.rows_of(out, b)))
    start = sum(case.lengths[:b])
    of_batch = lse[:, start:start + case.lengths[b]] if case.packed else lse[b]
    same("lse", alone_lse if packed else alone_lse[0], np.ascontiguousarray(of_batch))
    return True


# ---------------------------------------------------------------- other signatures and libraries
def by_flash_attn(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """flash_attn_with_kvcache, FlashAttention-2's and -3's names. It has no sinks."""
    causal, window = case.options.get("causal", True), case.options.get("window")
    open_window = window is None or window == (None, None)
    if case.sinks or case.layout == "bhsd" or (case.rotary and not causal and open_window and (case.packed or case.lengths[:1] != [1])):
        return False
    call = case.make()
    one, other, options = copied(call), copied(call), arguments(call)
    out, lse = direct(one, options, more)
    given = renamed(case, options, more.get("num_splits"))
    if "block_table" in given and dice.chance(0.5):
        given["page_table"] = given.pop("block_table")
    if "cu_seqlens_q" in given and case.append and dice.chance(0.5):
        given["cu_seqlens_k_new"] = given["cu_seqlens_q"].copy()
    got, got_lse = flash_attn.flash_attn_with_kvcache(*other, **given)
    same("out", got, out)
    same("softmax_lse", got_lse, lse)
    right_caches(other, call)
    return True


def with_used_rows(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """flash_attn_with_kvcache's seqused_q: as many of a batch's rows as a packed case has."""
    causal, window = case.options.get("causal", True), case.options.get("window")
    if not case.packed or case.sinks or (case.rotary and not causal and window in (None, (None, None))) or case.spare:
        return False
    call = case.make()
    one, other, options = copied(call), copied(call), arguments(call)
    out, lse = direct(one, options, {"num_splits": 1})
    most = max(case.lengths, default=0) + dice.upto(0, 3)
    given = renamed(case, {**options, "seqused_q": np.array(case.lengths, np.int32)}, 1)
    for name in ("cu_seqlens_q", "max_seqlen_q"):
        given.pop(name, None)

    def wide(x: Any) -> Any:
        if x is None:
            return None
        rows = np.full((len(case.keys), most, *x.shape[1:]), np.nan, x.dtype)
        for b, n in enumerate(case.lengths):
            rows[b, :n] = call.rows_of(x, b)
        return rows
    got, got_lse = flash_attn.flash_attn_with_kvcache(wide(other[0]), *other[1:3], *map(wide, other[3:]), **given)
    start = 0
    for b, n in enumerate(case.lengths):
        same("out", np.ascontiguousarray(got[b, :n]), np.ascontiguousarray(out[start:start + n]))
        same("softmax_lse", np.ascontiguousarray(got_lse[b, :, :n]), np.ascontiguousarray(lse[:, start:start + n]))
        assert not np.asarray(got[b, n:], np.float32).any() and (got_lse[b, :, n:] == -np.inf).all(), "rows that do not count"
        start += n
    right_caches(other, call)
    return True


def with_left_padding(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """flash_attn_with_kvcache's cache_leftpad: a contiguous cache whose requests begin at any row."""
    if case.page_size or case.sinks or case.rotary or case.layout == "bhsd" or not case.keys:
        return False
    call = case.make()
    one, options = copied(call), arguments(call)
    out, lse = direct(one, options, {"num_splits": 1})
    pads = [dice.upto(0, 9) for _ in case.keys]
    padded = []
    for x in call.arrays[1:3]:
        wide = np.full((x.shape[0], x.shape[1] + max(pads), *x.shape[2:]), np.nan, x.dtype)
        for b, pad in enumerate(pads):
            row = call.table[b, 0]
            wide[row, pad:pad + x.shape[1]] = x[row]
        padded.append(wide)
    moved = {"cache_leftpad": np.array(pads, np.int32), "cache_seqlens": options["cache_seqlens"] + np.array(pads, np.int32)}
    given = renamed(case, {**options, **moved}, 1)
    got, got_lse = flash_attn.flash_attn_with_kvcache(call.arrays[0], *padded, *call.arrays[3:], **given)
    same("out", got, out)
    same("softmax_lse", got_lse, lse)
    for name, wide, right in zip(("k_cache", "v_cache"), padded, call.caches_after(), strict=True):
        for b, pad in enumerate(pads):
            row = call.table[b, 0]
            same(name, np.ascontiguousarray(wide[row, pad:pad + right.shape[1]]), np.ascontiguousarray(right[row]))
    return True


def by_vllm(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """vllm_flash_attn's flash_attn_varlen_func: packed queries over pages that hold the keys already."""
    if case.append or not case.packed or not case.page_size:
        return False
    call = case.make()
    options = arguments(call)
    out, lse = direct(call.arrays, {**options, "max_seqlen_q": max(case.lengths, default=0)}, more)
    given = renamed(case, options, more.get("num_splits"))
    given |= {"seqused_k": given.pop("cache_seqlens"), "max_seqlen_q": max(case.lengths, default=0),
              "max_seqlen_k": max(case.keys, default=0)}
    sinks = given.pop("sinks", None)
    got, got_lse = vllm_flash.flash_attn_varlen_func(*call.arrays[:3], **given, s_aux=sinks)
    same("out", got, out)
    same("softmax_lse", got_lse, lse)
    return True


def in_torch(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """torch's tensors on the CPU, where it is installed."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    codes: dict[str, Any] = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
                             "float8_e5m2": (np.uint8, torch.float8_e5m2)}

    def there(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        if x.dtype.name in codes:
            raw, kind = codes[x.dtype.name]
            return torch.from_numpy(x.view(raw)).view(kind)
        return torch.from_numpy(x)
    call = case.make()
    one, other, options = copied(call), copied(call), arguments(call)
    out, lse = direct(one, options, more)
    got, got_lse = direct([there(x) for x in other], {name: there(x) for name, x in options.items()}, more)
    assert got.dtype is getattr(torch, case.out_dtype)
    same("out", got.view(torch.int16).numpy() if case.out_dtype == "bfloat16" else got.numpy(),
         out.view(np.int16) if case.out_dtype == "bfloat16" else out)
    same("lse", got_lse.numpy(), lse)
    right_caches(other, call)
    return True


# ---------------------------------------------------------------- what is refused
def refused(case: Case, dice: Dice, more: dict[str, Any]) -> bool:
    """A length or an entry of a table that is none, of one request. Its number is named, and nothing has been written."""
    call = case.make()
    arrays, options = copied(call), arguments(call)
    if not case.keys:
        return False
    b = dice.upto(0, len(case.keys) - 1)
    new = case.lengths[b] if case.append else 0
    pages, size = arrays[1].shape[:2]
    room = size * (options["block_table"].shape[1] if case.page_size else 1)
    used = -(-(case.keys[b] + new) // size)
    kinds = ["seqlens"] + ["table"] * (case.page_size is not None and used > 0) + ["rows"] * case.batch_idx
    kind = dice.one(kinds)
    name = {"seqlens": "cache_seqlens", "table": "block_table", "rows": "cache_batch_idx"}[kind]
    wrong = options[name] = options[name].copy()
    if kind == "seqlens":
        wrong[b] = dice.one((-1, room - new + 1, 2**31 - 1, -2**31))
    else:
        at = (b, dice.upto(0, used - 1)) if kind == "table" else b
        wrong[at] = dice.one((-1, pages, 2**31 - 1, -2**31))
    try:
        fastattn.attention_with_kvcache(*arrays, **{**options, **more})
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"attention_with_kvcache(): {name} has {wrong[at] if kind != 'seqlens' else wrong[b]} for request {b}"), text
    else:
        raise AssertionError(f"{name} of {wrong} was not refused")
    same("k_cache", arrays[1], call.arrays[1])
    same("v_cache", arrays[2], call.arrays[2])
    return True


RELATIONS: tuple[Relation, ...] = (in_chunks, from_a_prefix, one_by_one, by_flash_attn, with_used_rows, with_left_padding, by_vllm,
                                   in_torch, refused)


def draw(seed: int, index: int) -> tuple[Relation, Case, Dice, dict[str, Any]]:
    """Relation and case `index` of a run: a case that the relation is about, as far as a few draws find one."""
    dice = Dice(seed, index, 8)
    case, more = caches.draw(seed, index)
    relation = RELATIONS[index % len(RELATIONS)]
    if relation is from_a_prefix:
        case = replace(case, append=False, rotary=None, alibi=None, sinks=False, rows=min(case.lengths, default=1), spare=0,
                       page_size=case.page_size or 16, batch_idx=False,
                       options={n: x for n, x in case.options.items() if n in ("softcap", "causal")})
    elif relation is by_vllm:
        each = tuple(case.lengths)
        case = replace(case, append=False, rotary=None, rows=each, page_size=case.page_size or 16, batch_idx=False, layout="bshd")
    elif relation is with_left_padding:
        case = replace(case, page_size=None, rotary=None, layout="bshd", sinks=False, shared=0)
    elif relation is with_used_rows:
        case = replace(case, rows=tuple(case.lengths), spare=0, sinks=False, layout="bshd")
    elif relation is in_chunks:
        case = replace(case, append=True, options={n: x for n, x in case.options.items() if n != "causal"})
    return relation, case if case.keys else replace(case, integers="int64"), dice, more         # a list of no rows is no table


def run(seed: int, index: int) -> str | bool:
    """What is wrong with a call, or whether its relation was tried."""
    relation, case, dice, more = draw(seed, index)
    fastattn.set_num_threads(1 + index % 3)
    try:
        return relation(case, dice, more)
    except Exception as error:
        return f"{relation.__name__}: {type(error).__name__}: {error}\n    {case!r} {more}"


def main() -> int:
    from .__main__ import today

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.serving", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calls", type=int, help="how many, however long they take; each is named before it runs")
    parser.add_argument("--seed", type=int, help="of the run; the date's by default")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first call's number")
    given = parser.parse_args()
    seed, start, index, wrong, tried = given.seed or today(), time.monotonic(), given.first, 0, dict.fromkeys(RELATIONS, 0)
    while index - given.first < given.calls if given.calls is not None else time.monotonic() - start < given.seconds:
        if given.calls is not None:
            print(f"at {seed}:{index}", flush=True)
        found = run(seed, index)
        if isinstance(found, str):
            wrong += 1
            print(f"{seed}:{index} {found}", flush=True)
        tried[RELATIONS[index % len(RELATIONS)]] += bool(found)
        index += 1
    print(", ".join(f"{count} {relation.__name__}" for relation, count in tried.items()))
    print(f"{index - given.first} calls, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
