"""The tolerance of every test of numbers, by the rule of fastattn/tolerance.py.

"Rounding of the result" of a gradient is taken relative to the terms it is the difference of, dP and delta: with one key they
cancel and the exact dq is 0. NaN never passes.

A probability below NOTHING may count as 0: engines flush there, because products of such numbers become denormal. It matters only
where all keys are that far below a sink; out and gradients of that row are then almost 0.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from unittest import mock

import numpy as np

from fastattn import Grads, reference, register_engine
from fastattn.arrays.view import View
from fastattn.problem import Operands, Problem
from fastattn.tolerance import EPS, allowed, distance, naive_precision, norm
from tests.tools.problems import Inputs

Array = np.ndarray[Any, Any]
NOTHING = {"float32": 2.0**-100, "float64": 2.0**-1000}


class _Naive:
    """The reference in the input's precision, as an engine."""

    @staticmethod
    def supports(problem: Problem) -> str | None:
        return None

    @classmethod
    def forward(cls, problem: Problem, o: Operands, out: View, lse: View | None, stream: None) -> None:
        reference.forward(problem, o, out, lse, naive_precision(problem.dtype))

    @classmethod
    def backward(cls, problem: Problem, o: Operands, dout: View, out: View, lse: View, dlse: View | None, grads: Grads, stream: None,
                 deterministic: bool) -> None:
        reference.backward(problem, o, dout, out, lse, dlse, grads, naive_precision(problem.dtype))


register_engine("naive", _Naive.forward, _Naive.backward, _Naive.supports, device="cpu")


class Judge:
    """Exact and naive results of one problem; `forward` and `backward` raise AssertionError for a result that is too far off."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.dtype = inputs, inputs.dtype
        self.result = inputs.kwargs.get("out_dtype", self.dtype)        # of out, dq, dk and dv
        self.exact_inputs = inputs.float64()
        self.exact = self.exact_inputs.forward("reference")
        # float64 has no better arithmetic to be judged by: its rival is float32's error scaled to its rounding
        self.rival = inputs.map(_to_float32) if self.dtype == "float64" else inputs
        self.shrink = EPS["float64"] / EPS["float32"] if self.dtype == "float64" else 1.0
        self.naive = self.rival.forward("naive")
        sizes = [1 + norm(x) for x in (*self.exact_inputs.args[:3], self.exact_inputs.dout)]
        self.nothing = NOTHING["float64" if self.dtype == "float64" else "float32"] * float(np.prod(sizes))
        self.of_lse = 0.0               # the relative error of P in a backward that was given a rounded lse (docs/accuracy.md)

    def forward(self, out: Any, lse: Any) -> None:
        """lse: None where the call did not ask for it."""
        compute = "float64" if self.dtype == "float64" else "float32"
        self._check("out", out, self.exact[0], self.naive[0], self.result, norm(self.exact[0]))
        if lse is None:
            return
        # a logit's rounding is absolute: q.k may cancel
        size = np.sqrt(np.isfinite(self.exact[1]).sum())
        self._check("lse", lse, self.exact[1], self.naive[1], compute, norm(self.exact[1]) + float(size))

    def backward(self, grads: Grads) -> None:
        for name, got, e, n, terms in zip(Grads._fields, grads, *self._gradients, strict=True):
            assert (got is None) == (e is None), f"{name} is {type(got)}"
            if got is not None:
                dtype = np.asarray(got).dtype.name
                assert dtype == self.result or name in ("dbias", "dsinks"), f"{name} has dtype {dtype}, expected {self.result}"
                # out is given in the result's dtype, and all gradients inherit its rounding through delta
                self._check(name, got, e, n, dtype, norm(e) + norm(terms), self.result, self.of_lse)

    @cached_property
    def _gradients(self) -> tuple[Grads, Grads, Grads]:
        """The exact ones, the naive ones, the terms."""
        return self.exact_inputs.backward(*self.exact, "reference"), self.rival.backward(*self.naive, "naive"), self._terms()

    def _terms(self) -> Grads:
        """The gradients without delta; sums over many rows, dbias and dsinks, with |delta|: what the exact ones are differences of."""
        inputs, (out, lse) = self.exact_inputs, self.exact
        zero = np.zeros_like(out)
        terms = inputs.backward(zero, lse, "reference")
        if terms.dbias is None and terms.dsinks is None:
            return terms
        delta = np.abs(inputs.dout * out).sum(axis=-1)
        delta = delta if inputs.kwargs.get("layout") == "bhsd" else delta.swapaxes(-1, -2)
        dlse = delta if inputs.dlse is None else delta + np.abs(inputs.dlse)
        positive = replace(inputs, dlse=dlse).backward(zero, lse, "reference")
        return terms._replace(dbias=positive.dbias, dsinks=positive.dsinks)

    def _check(self, name: str, got: Any, exact: Array, naive: Array, dtype: str, size: float, rounding: str | None = None,
               more: float = 0.0) -> None:
        close(name, got, exact, naive, dtype, size, rounding, self.shrink, self.nothing + more * size)


def close(name: str, got: Any, exact: Array, naive: Array, dtype: str, size: float, rounding: str | None = None, shrink: float = 1.0,
          nothing: float = 0.0) -> None:
    """The rule: AssertionError where `got` is of another shape or dtype, or farther from `exact` than the naive rival allows.

    `size` is the norm that a rounding of the result is taken of, in `dtype` or, if that is coarser, in `rounding`. `shrink`: the rival's
    precision is that much worse than `got`'s. `nothing`: what may be lost where probabilities count as 0.
    """
    got = np.asarray(got)
    assert got.shape == exact.shape, f"{name} has shape {got.shape}, expected {exact.shape}"
    assert got.dtype.name == dtype, f"{name} has dtype {got.dtype}, expected {dtype}"
    error, rival = distance(got, exact), distance(naive, exact) * shrink
    limit = allowed(rival, dtype, size, rounding, shrink) + nothing
    assert error <= limit, f"{name}: error {error:.3e}, allowed {limit:.3e} (naive {rival:.3e}, exact norm {norm(exact):.3e})"


def close_captured(got: tuple[Any, ...], backward: Callable[..., Grads], inputs: tuple[Array, ...], captured: tuple[Array, ...],
                   given: tuple[Array, Array], cu: tuple[Array, ...] = (), **options: Any) -> None:
    """The rule for gradients of captured arrays: AssertionError where `got` is too far from the exact ones of the same out and lse.

    The backward takes out and lse as they are given (contracts.md), and the rounding of an out of 16 bits moves delta. A slope's gradient
    adds that up over all pairs, up to the size of the gradient itself. So the exact result begins with what the kernels were given, not
    with an out of float64. What is left is arithmetic, always float32, relative to the terms of the sums, one rounding of each sum,
    and what contracts.md allows P: |lse| * 2^-24. Far keys have scores of 2000, which float32 rounds to 1e-4.

    backward: attention_backward or attention_varlen_backward; `cu` and `options` are its further arguments
    inputs: q, k, v and dout, in float32 or 16 bits, rows before heads; given: the out and lse that the kernels had
    """
    def gradients(arrays: tuple[Array, ...], mod: tuple[Array, ...], out: Array, lse: Array, dlse: Array | None = None) -> tuple[Any, ...]:
        *qkv, dout = arrays
        grads = backward(dout, *qkv, out, lse, *cu, captured=mod, dlse=dlse, need_dcaptured=True, engine="reference", **options)
        assert grads.dcaptured is not None
        return grads.dcaptured
    wide, wide_mod, (out, lse) = tuple(map(_to_float64, inputs)), tuple(map(_to_float64, captured)), map(_to_float64, given)
    exact = gradients(wide, wide_mod, out, lse)
    # engines of others, as "naive" is, take no functions
    with mock.patch.object(reference, "backward", partial(reference.backward, precision=naive_precision(inputs[0].dtype.name))):
        naive = gradients(inputs, captured, *given)
    delta = np.abs(wide[3] * out).sum(axis=-1).swapaxes(-1, -2)
    terms = gradients(wide, wide_mod, np.zeros_like(out), lse, delta)
    of_lse = 2.0**-24 * float(np.abs(lse[np.isfinite(lse)]).max(initial=0.0))
    for n, (x, e, rival, parts) in enumerate(zip(got, exact, naive, terms, strict=True)):
        assert (x is None) == (e is None), f"dcaptured[{n}] is {type(x)}"
        if x is None:
            continue
        assert x.shape == e.shape and x.dtype == rival.dtype, f"dcaptured[{n}] has {x.dtype} {x.shape}, expected {rival.dtype} {e.shape}"
        error, other = distance(x, e), distance(rival, e)
        limit = allowed(other, x.dtype.name, norm(e)) + allowed(0.0, "float32", norm(parts)) + of_lse * norm(parts)
        assert limit < norm(e), f"dcaptured[{n}]: 0 would pass, choose another problem: allowed {limit:.3e}, exact norm {norm(e):.3e}"
        assert error <= limit, f"dcaptured[{n}]: error {error:.3e}, allowed {limit:.3e} (naive {other:.3e}, exact norm {norm(e):.3e})"


def _to_float64(x: Array) -> Array:
    """Floats only: indices of a function stay whole numbers."""
    return x if x.dtype.kind in "iub" else x.astype(np.float64)


def _to_float32(x: Array) -> Array:
    return x.astype(np.float32) if x.dtype == np.float64 else x
