"""Lengths of packed sequences: checked where the host can read them, and copied, because the caller's arrays may change."""
from __future__ import annotations

from typing import Any

import numpy as np

from .arrays.dlpack import address
from .arrays.view import LENGTHS, View
from .options import DIAGONAL, LENGTH, Check


def read_lengths(check: Check, argument: str, lengths: View) -> tuple[View, np.ndarray[Any, Any] | None]:
    """A private int64 copy of lengths in host memory, as a View and as an array. Lengths on a device stay where they
    are, array None.

    The copy is what engines use, so another thread that writes to the caller's array cannot change what was checked.
    """
    check.dtype(argument, lengths, LENGTHS)
    if lengths.device[0] != "cpu":
        return lengths, None
    own = lengths.numpy().astype(np.int64, order="C")
    return View(address(own), own.shape, own.strides, "int64", owner=own), own


def cumulative(check: Check, argument: str, lengths: View, total: int, most: Any, most_name: str) -> tuple[View, int, int]:
    """(private cumulative lengths, number of sequences, longest sequence). Values are read only in host memory."""
    cu, c = read_lengths(check, argument, lengths)
    if len(cu.shape) != 1 or cu.shape[0] < 1:
        raise check.value(argument, f"has shape {cu.shape}", "one axis, (number of sequences + 1,)")
    given = None if most is None else check.integer(most_name, most, *LENGTH)
    if c is None:
        return cu, cu.shape[0] - 1, total if given is None else given
    falls = c[1:] < c[:-1]                                  # no difference, because it may overflow
    if c[0] != 0 or falls.any():
        i = int(np.argmax(falls)) + 1 if c[0] == 0 else 0
        raise check.value(argument, f"starts {c[:8].tolist()}, entry {i} is {c[i]}", "cumulative lengths: 0 first, never decreasing")
    if c[-1] > total:
        raise check.value(argument, f"ends at {c[-1]}", f"at most the {total} rows of the packed array")
    longest = int((c[1:] - c[:-1]).max(initial=0))
    if given is not None and given < longest:
        raise check.value(most_name, f"is {given}", f"at least the longest sequence of {argument}, {longest}")
    return cu, cu.shape[0] - 1, longest if given is None else given


def used_lengths(check: Check, used: View, cu_seqlens_k: View, batch: int) -> View:
    """A private copy of seqused_k, each entry at most its sequence's length."""
    used, counts = read_lengths(check, "seqused_k", used)
    check.shape("seqused_k", used, (batch,), "(number of sequences,)")
    if counts is not None:
        c = cu_seqlens_k.numpy()
        room = c[1:] - c[:-1]
        wrong = (counts < 0) | (counts > room)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise check.value("seqused_k", f"has {counts[i]} for sequence {i}", f"a count from 0 to its length, {room[i]}")
    return used


def read_diagonals(check: Check, diagonals: View, batch: int) -> View:
    """The keys on which the first rows of sequences stand, in host memory a private copy whose values are checked."""
    own, values = read_lengths(check, "diagonal", diagonals)
    check.shape("diagonal", own, (batch,), "a number or (number of sequences,)")
    if values is not None:
        low, high = DIAGONAL
        wrong = (values < low) | (values > high)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise check.value("diagonal", f"has {values[i]} for sequence {i}", f"an integer in [{low}, {high}]")
    return own
