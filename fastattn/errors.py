"""The errors of fastattn: every message quotes the call, what the argument has, what was expected, and what would work.
"""
from __future__ import annotations

from collections.abc import Mapping


class UnsupportedError(NotImplementedError):
    """The call is valid, but no engine that may run it takes it. The message quotes the reason of each engine.

    Attributes
    ----------
    reasons : dict of str to str
        Each engine's name and its reason.
    """

    def __init__(self, text: str, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.reasons = dict(reasons or {})


def refused(call: str, reasons: Mapping[str, str], where: str = "", hint: str = "") -> UnsupportedError:
    """`attention(): no engine takes this call on an H200: sm90: it has no float32 MMA; sm80: ...`"""
    text = f"{call}(): no engine takes this call{where}: {'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}"
    return UnsupportedError(f"{text} ({hint})." if hint else f"{text}.", reasons)


def message(call: str, argument: str, has: object, expected: str, hint: str = "") -> str:
    """`attention(): k has 5 heads; expected a divisor of num_heads = 8; num_heads_k = 4 works.`"""
    text = f"{call}(): {argument} {has}; expected {expected}"
    return f"{text}; {hint}." if hint else f"{text}."
