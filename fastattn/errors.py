"""The errors of fastattn: every message quotes the call, what the argument has, what was expected, and what would work."""
from __future__ import annotations


class UnsupportedError(NotImplementedError):
    """The problem is valid, but no engine that may run it has this combination; the message quotes each engine's reason."""


def message(call: str, argument: str, has: object, expected: str, hint: str = "") -> str:
    """`attention(): k has 5 heads; expected a divisor of num_heads = 8; num_heads_k = 4 works.`"""
    text = f"{call}(): {argument} {has}; expected {expected}"
    return f"{text}; {hint}." if hint else f"{text}."
