"""The options of a call as plain values, and `Check`, which makes the errors of a public function."""
from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import numpy as np

from .arrays import words
from .arrays.convert import view
from .arrays.readers import in_device_memory, is_array, shape_of
from .arrays.view import FLOATS, View
from .errors import message


class Check:
    """Makes the errors of one public call: `check.value("k", "has 5 heads", "a divisor of 8")`."""

    def __init__(self, call: str) -> None:
        self.call = call

    def value(self, argument: str, has: object, expected: str, hint: str = "") -> ValueError:
        return ValueError(message(self.call, argument, has, expected, hint))

    def type(self, argument: str, has: object, expected: str, hint: str = "") -> TypeError:
        return TypeError(message(self.call, argument, has, expected, hint))

    def shape(self, argument: str, view: View, shape: tuple[int, ...], meaning: str) -> None:
        if view.shape != shape:
            raise self.value(argument, f"has shape {view.shape}", f"{meaning} = {shape}")

    def dtype(self, argument: str, view: View, allowed: tuple[str, ...], hint: str | None = None) -> None:
        """`hint` None: the cast to the first allowed dtype, as the array's library writes it."""
        if view.dtype not in allowed:
            hint = words.cast(argument, view.source, allowed[0]) if hint is None else hint
            raise self.type(argument, f"has dtype {view.dtype}", " or ".join(allowed), hint)

    def scalar(self, argument: str, x: Any, expected: str, hint: str = "") -> Any:
        """A 0-d array or tensor in host memory as a Python number; other kinds of numbers as they are.

        TypeError where reading it would make the host wait, would drop a gradient, or is not possible.
        """
        if isinstance(x, np.generic):
            return x.item()
        if not is_array(x):
            return x
        stand_in = words.transformed(x)
        if stand_in is not None:
            raise self.type(argument, stand_in[0], expected, stand_in[1])
        if words.in_graph(x):
            raise self.type(argument, "requires grad, which fastattn would drop from the graph", expected, f"pass {argument}.item()")
        if in_device_memory(x):
            raise self.type(argument, "is in device memory", f"{expected}, because the host never waits for a device",
                            f"pass {argument}.item(), or keep the number on the host")
        if shape_of(x) != () or not hasattr(x, "item"):
            raise self.type(argument, f"is {words.shown(x)}", expected, hint)
        return x.item()

    def index(self, argument: str, x: Any, expected: str, hint: str = "") -> int:
        y = self.scalar(argument, x, expected, hint)
        try:
            return int(operator.index(y))
        except TypeError:
            raise self.type(argument, f"is {words.shown(x)}", expected, hint) from None

    def integer(self, argument: str, x: Any, low: int, high: int, hint: str = "") -> int:
        expected = f"an integer in [{low}, {high}]"
        n = x if type(x) is int else self.index(argument, x, expected, hint)
        if not low <= n <= high:
            raise self.value(argument, f"is {words.shown(n)}", expected, hint)
        return n

    def number(self, argument: str, x: Any, expected: str) -> float:
        y = x
        if type(x) is not float:
            y = self.scalar(argument, x, expected)
            if isinstance(y, (str, bytes, bool)):
                raise self.type(argument, f"is {words.shown(x)}", expected)
            try:
                y = float(y)
            except (TypeError, ValueError):
                raise self.type(argument, f"is {words.shown(x)}", expected) from None
            except OverflowError:
                raise self.value(argument, f"is {words.shown(y)}, beyond float64", expected) from None
        if not math.isfinite(y):
            raise self.value(argument, f"is {y}", expected)
        return y  # type: ignore[no-any-return]


# ---------------------------------------------------------------- options
class EightBitOptions(NamedTuple):
    """The arguments of 8-bit operands as plain values. A scale that is not given is 1, and so is one that is an array, an operand then."""

    given: tuple[str, ...]                                  # names of the arguments
    q_scale: float = 1.0
    k_scale: float = 1.0
    v_scale: float = 1.0
    out_scale: float = 1.0
    out_dtype: str | None = None


class Position(NamedTuple):
    """Where a call lies in a larger problem. None is what a call by itself has."""

    diagonal: int | None = None                             # the key on which row 0 stands; None too where there is one for each sequence
    dropout_at: tuple[int, int, int, int] | None = None     # batch, head, row and column of the first element of the dropout's mask
    dropout_heads: int | None = None                        # heads of the larger problem


class Options(NamedTuple):
    """The options of one call as plain values. Nothing behind the public functions looks at the caller's own objects.

    `read_options` makes each value exactly of the type declared here. So equal Options are the same options, in any
    cache, even if the caller's objects change later. problem.py checks the ranges.
    """

    causal: bool | str = False                              # True is bottom-right; the one string is "top_left"
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    offset: int = 0
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    eight_bit: EightBitOptions | None = None                # None: neither out_dtype nor an argument of 8-bit operands is given
    position: Position | None = None                        # None: no argument of it is given


SCALE, CAP, PROBABILITY = "a finite number", "a positive number, or None for no cap", "a probability in [0, 1]"
SEED, OFFSET, LENGTH = (-(2**63), 2**64 - 1), (0, 2**32 - 1), (0, 2**31 - 1)


def read_options(call: str, causal: Any, window: Any, softmax_scale: Any, softcap: Any, dropout_p: Any, seed: Any, offset: Any,
                 max_seqlen_q: Any = None, max_seqlen_k: Any = None) -> Options:
    """Options from a caller's arguments: numbers of any kind, 0-d arrays and tensors in host memory.

    TypeError or ValueError, naming `call` and the argument, for anything else. A value of the right type is taken as it
    is.
    """
    if type(causal) is not bool:
        causal = _causal(Check(call), causal)
    if window is not None:
        window = _window(call, window)
    if softmax_scale is not None and type(softmax_scale) is not float:
        softmax_scale = Check(call).number("softmax_scale", softmax_scale, SCALE)
    if softcap is not None and type(softcap) is not float:
        softcap = Check(call).number("softcap", softcap, CAP)
    if type(dropout_p) is not float:
        dropout_p = Check(call).number("dropout_p", dropout_p, PROBABILITY)
    if seed is not None and type(seed) is not int:
        seed = Check(call).integer("seed", seed, *SEED)
    if type(offset) is not int:
        offset = Check(call).integer("offset", offset, *OFFSET)
    if max_seqlen_q is not None and type(max_seqlen_q) is not int:
        max_seqlen_q = Check(call).integer("max_seqlen_q", max_seqlen_q, *LENGTH)
    if max_seqlen_k is not None and type(max_seqlen_k) is not int:
        max_seqlen_k = Check(call).integer("max_seqlen_k", max_seqlen_k, *LENGTH)
    return tuple.__new__(Options, (causal, window, softmax_scale, softcap, dropout_p, seed, offset, max_seqlen_q, max_seqlen_k, None,
                                   None))


DIAGONAL, COUNT = (-(2**30), 2**30), (0, 2**31 - 1)
AT = "four counts (batch, head, row, column)"


def read_position(call: str, options: Options, diagonal: Any, dropout_at: Any, dropout_heads: Any,
                  packed: bool = False) -> tuple[Options, Any]:
    """The Options with the arguments of a Position, and `diagonal` where it is an array: one number for each packed sequence."""
    if diagonal is None and dropout_at is None and dropout_heads is None:
        return options, None
    check, each = Check(call), None
    if packed and (isinstance(diagonal, (list, tuple)) or (is_array(diagonal) and shape_of(diagonal) != ())):
        diagonal, each = None, diagonal
    if diagonal is not None:
        hint = "only attention_varlen takes one for each sequence" if getattr(diagonal, "shape", ()) != () else ""
        diagonal = check.integer("diagonal", diagonal, *DIAGONAL, hint)
    if dropout_at is not None:
        if not isinstance(dropout_at, (tuple, list)) or len(dropout_at) != 4:
            raise check.value("dropout_at", f"is {words.shown(dropout_at)}", AT)
        dropout_at = tuple([check.integer(f"dropout_at[{n}]", x, *COUNT) for n, x in enumerate(dropout_at)])
    if dropout_heads is not None:
        dropout_heads = check.integer("dropout_heads", dropout_heads, *COUNT)
    return options._replace(position=Position(diagonal, dropout_at, dropout_heads)), each


SCALES = ("q_scale", "k_scale", "v_scale", "out_scale")
ONE_SCALE = "a positive finite number"


NO_SCALES = (None, None, None, None)


def read_eight_bit(call: str, options: Options, scales: tuple[Any, Any, Any, Any],
                   out_dtype: Any) -> tuple[Options, tuple[Any, ...] | None]:
    """The Options with out_dtype and the arguments of 8-bit operands, and the scales that stay arrays, in the order of SCALES.

    The second is None where no scale stays one. A scale of shape () or (1,) in host memory is a number: its value is read. One of
    (batch, num_heads_k) is none, where that is (1, 1) either: a request of any batch is computed as one alone.
    """
    if out_dtype is None and not any(x is not None for x in scales):
        return options, None
    check, numbers, arrays = Check(call), dict[str, float](), list[Any]()
    for name, x in zip(SCALES, scales, strict=True):
        number = None if x is None else _one_scale(check, name, x)
        if number is not None:
            numbers[name] = number
        arrays.append(x if number is None else None)
    given = tuple([name for name, x in zip((*SCALES, "out_dtype"), (*scales, out_dtype), strict=True) if x is not None])
    wanted = None if out_dtype is None else words.dtype_of(out_dtype) or repr(out_dtype)
    options = options._replace(eight_bit=EightBitOptions(given, out_dtype=wanted, **numbers))
    return options, tuple(arrays) if any(x is not None for x in arrays) else None


def _one_scale(check: Check, argument: str, x: Any) -> float | None:
    """A scale as a number; None where it is one of several axes or elements, or on a device."""
    if isinstance(x, (list, tuple)):
        return _one_scale(check, argument, x[0]) if len(x) == 1 and not isinstance(x[0], (list, tuple)) else None
    if is_array(x):
        if in_device_memory(x):
            return None
        found = view(x, check.call, argument)
        if found.shape not in ((), (1,)) and (argument != "out_scale" or math.prod(found.shape) != 1):
            return None
        check.dtype(argument, found, FLOATS)
        x = float(found.numpy().reshape(()))
    number = check.number(argument, x, ONE_SCALE)
    if number <= 0:
        raise check.value(argument, f"is {number}", ONE_SCALE)
    return number


def _causal(check: Check, causal: Any) -> bool | str:
    expected = "False, True, 'bottom_right' or 'top_left'"
    plain = check.scalar("causal", causal, expected, "an array of what may be attended goes in mask=")
    if isinstance(plain, bool):
        return plain
    if isinstance(plain, str) and plain in ("top_left", "bottom_right"):
        return True if plain == "bottom_right" else "top_left"
    raise check.value("causal", f"is {words.shown(causal)}", expected)


def _is_limit(x: Any) -> bool:
    return x is None or (type(x) is int and 0 <= x < 2**31)


def _window(call: str, window: Any) -> tuple[int | None, int | None]:
    if type(window) is tuple and len(window) == 2 and _is_limit(window[0]) and _is_limit(window[1]):
        return window
    check = Check(call)
    if getattr(window, "shape", None) != (2,) and not (isinstance(window, (tuple, list)) and len(window) == 2):
        hint = f"window=({window}, 0) looks back only" if isinstance(window, int) else ""
        raise check.value("window", f"is {words.shown(window)}", "a pair (left, right) of counts, None for no limit", hint)
    left, right = (None if w is None else check.integer("window", w, *LENGTH, "None means no limit") for w in window)
    return left, right
