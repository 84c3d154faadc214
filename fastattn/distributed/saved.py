"""What a forward has received, kept for its backward."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..arrays.streams import Stream
from ..arrays.view import View, size_of
from ..options import Check
from ..problem import Problem
from .messages import Group
from .plan import Method


@dataclass(frozen=True, slots=True)
class Saved:
    """Keys and values that a rank holds for its rows, with Ulysses q, k and v of its heads. `arrays`: of each group of heads."""

    problem: Problem
    place: tuple[int, int]          # rank and number of ranks
    method: Method
    stream: Stream | None
    arrays: list[list[View]]

    @property
    def nbytes(self) -> int:
        """Of the memory that it keeps."""
        return sum(size_of(x) for of_heads in self.arrays for x in of_heads)

    @property
    def pieces(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        return f"Saved({self.method}, {self.nbytes} bytes)"


def described(problem: Problem) -> Problem:
    """The Problem without the name of the call."""
    return replace(problem, call="")


def refuse_to_save(check: Check, method: Method) -> None:
    if method.ulysses == 1 and method.keys == "ring":
        raise check.value("return_saved", "is True", "a method that holds all keys of its rows at once, 'gather' or 'ulysses'",
                          f"this call runs {method} ({method.why})")


def saved_of(check: Check, saved: Any, method: Method, asked: bool, pieces: Any, problem: Problem, group: Group,
             stream: Stream | None) -> Saved:
    """The argument `saved`, if it is that of this call's forward. `method`: the call's, and whether the caller has asked for it."""
    if not isinstance(saved, Saved):
        raise check.type("saved", f"is {type(saved).__name__}", "what attention(..., return_saved=True) returned last")
    has, expected = f"is of method {saved.method} in {saved.pieces} pieces", ""
    if asked and saved.method[:3] != method[:3]:
        expected = f"what a forward with method {method} returned"
    elif pieces is not None and pieces != saved.pieces:
        expected = f"what a forward with pieces={pieces} returned"
    elif saved.problem != described(problem) or saved.place != (group.rank, group.size):
        has, expected = "is of another problem or rank", "what this call's forward returned: the same shapes, options and ranks"
    elif (saved.stream and saved.stream.handle) != (stream and stream.handle):
        has, expected = "was made on another stream", "a backward on the stream of its forward"
    if expected:
        raise check.value("saved", has, expected, "saved=None sends keys and values again")
    return saved
