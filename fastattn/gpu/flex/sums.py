"""Gradients of captured arrays: dS times a load's derivative, added up at the element that was loaded.

A thread keeps the element that it last added to, and what it has for it, in registers, and adds to memory when another one comes. Most
functions ask for the same element many times in a row: a slope of a head, the last element of a table for all that is far.
"""
from __future__ import annotations

from typing import Any

from numba import float32, float64, uint64

from ...flex.program import Program
from ..dsl.inline import inline
from ..ptx.memory import load_b32
from ..ptx.traced import add_to, raise_b32
from ..traced import SCORE, SUM
from .config import ANY_ORDER, EXPONENTS, UNITS
from .derived import Sum, with_sums
from .distance import natural
from .fixed import add_fixed, exponent_of
from .ops import element_of, element_of_natural
from .staged import STAGES, Staged


def _make_each(staged: Staged, sums: tuple[Sum, ...], add_one: Any) -> Any:
    """add_each(a, ds, out, state): add_one of each sum. out: the outputs of the program of with_sums."""
    text, program = ["def add_each(a, ds, out, state):"], staged.program
    for i, (array, output, at) in enumerate(sums):
        known = [natural(program, program.outputs[n]) for n in at]
        address = staged.address(array, [f"out[{n}]" for n in at], known, f"a.{SUM}{array}")
        text.append(f"    add_one(a, state, {i}, ds * out[{output}], uint64({address}))")
    space: dict[str, Any] = {"add_one": add_one, "uint64": uint64, "element_of": element_of, "element_of_natural": element_of_natural}
    exec(compile("\n".join(text) + "\n", "<fastattn traced sums>", "exec"), space)
    return inline(space["add_each"])


def _make_top_of(sums: tuple[Sum, ...]) -> Any:
    """top_of(a, i): address of the largest exponent of the array of sum i (fixed.py)."""
    text = ["def top_of(a, i):", f"    top = a.{SUM}{sums[0].array}_top"]
    text += [f"    top = a.{SUM}{array}_top if i == {i} else top" for i, (array, _, _) in enumerate(sums)]
    space: dict[str, Any] = {}
    exec(compile("\n".join((*text, "    return top")) + "\n", "<fastattn traced tops>", "exec"), space)
    return inline(space["top_of"])


def make_sums(p: Program, arrays: tuple[int, ...], compute: str, order: int = ANY_ORDER) -> tuple[Any, Any, Any, int]:
    """(prepare, add_up, finish, count): the gradients of these captured arrays, for kernels on plain threads.

    tile = prepare(a, batch, head)
    add_up(a, ds, s, tile, state, batch, head, row, col): the share of one pair. s: the score that the function is given
    finish(a, state): at the end. state: (totals, places, tops), arrays of `count` numbers, uint64 and int32 of a thread, zeros at first

    order: ANY_ORDER, or a pass of sums that have the same bits in any order, EXPONENTS or UNITS.
    """
    REAL = float64 if compute == "float64" else float32
    program, sums = with_sums(p, arrays)
    staged, add, COUNT = Staged(program, SCORE, REAL), add_to(compute), len(sums)
    tile_values, row_values, column_values, element_values = (inline(staged.functions[stage]) for stage in STAGES)
    top_of, FIRST_PASS, SECOND_PASS = _make_top_of(sums), order == EXPONENTS, order == UNITS

    @inline
    def pass_on(a, state, i):
        """What the thread has for an element."""
        totals, places, tops = state
        if FIRST_PASS:
            tops[i] = max(tops[i], exponent_of(float64(totals[i])))
        elif SECOND_PASS:
            add_fixed(places[i], float64(totals[i]), load_b32(top_of(a, i)), a.sum_bits)
        else:
            add(places[i], totals[i])

    @inline
    def add_one(a, state, i, part, place):
        totals, places, _ = state
        if places[i] != place:
            if places[i] != uint64(0):
                pass_on(a, state, i)
            places[i], totals[i] = place, REAL(0)
        totals[i] += part
    add_each = _make_each(staged, sums, add_one)

    @inline
    def prepare(a, batch, head):
        return tile_values(a, batch, head, REAL(1))

    @inline
    def add_up(a, ds, s, tile, state, batch, head, row, col):
        rows, columns = row_values(a, tile, batch, head, row, REAL(1)), column_values(a, tile, batch, head, col, REAL(1))
        add_each(a, ds, element_values(a, tile, rows, columns, batch, head, row, col, s, REAL(1)), state)

    @inline
    def finish(a, state):
        _, places, tops = state
        for i in range(COUNT):
            if places[i] != uint64(0):
                pass_on(a, state, i)
            if FIRST_PASS:
                if tops[i] != 0:
                    raise_b32(top_of(a, i), tops[i])
    return prepare, add_up, finish, COUNT
