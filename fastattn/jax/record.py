"""`Record`: what a compiled program keeps of a call. Arrays are XLA's; all the rest of the call is in here.

It travels in the program as text, an attribute of XLA's custom call, not as a number in a table of this process. So a
program that is compiled ahead of time, cached on disk or serialised still says what it computes.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from ..memo import Recent
from ..options import Options

FORMAT = 1      # raised when the text changes its meaning, so that an older program is refused


@dataclass(frozen=True, slots=True)
class Record:
    """One attention call but for its arrays: hashable, so that JAX can key compiled programs on it.

    `operands` and `results` name the arrays in the order in which XLA passes them. `seed` and `offset` among the
    operands replace those of `options` when the program runs. `engines` are those of use_engine when it was traced.
    """

    call: str                           # as errors name it: "attention", "attention_varlen_backward", ...
    operands: tuple[str, ...]
    results: tuple[str, ...]
    options: Options
    layout: str
    engine: str | None = None
    engines: tuple[str, ...] | None = None
    deterministic: bool = False
    flex: str | None = None             # the functions, as flex.py of this folder writes them

    @property
    def packed(self) -> bool:
        return self.layout == "thd"

    @property
    def backward(self) -> bool:
        return "dq" in self.results

    def text(self) -> str:
        """The record as JSON. Floats are written so that reading gives the same bits."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return json.dumps({"format": FORMAT, **values, "options": self.options._asdict()})


_FIELDS = tuple(field.name for field in fields(Record))
_read: Recent[bytes, Record] = Recent()


def read(text: bytes) -> Record:
    """The Record of a text. RuntimeError for one of another format."""
    found = _read.get(text)
    if found is None:
        values: dict[str, Any] = json.loads(text)
        given = values.pop("format")
        if given != FORMAT:
            raise RuntimeError(f"the program was compiled for another version of fastattn.jax (format {given}; expected {FORMAT}); "
                               "compile it again")
        options = Options(**{name: _tuples(x) for name, x in values.pop("options").items()})
        found = _read[text] = Record(options=options, **{name: _tuples(x) for name, x in values.items()})
    return found


def _tuples(x: Any) -> Any:
    """JSON has lists for what a Record, which is hashable, has as tuples."""
    return tuple(x) if isinstance(x, list) else x
