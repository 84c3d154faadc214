"""Problems with 8-bit operands, what they stand for, and how far a result may be from it."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastattn import attention, attention_varlen, quantize_fp8
from fastattn.tolerance import EPS, norm
from tests.tools.guard import guarded_copy
from tests.tools.problems import NUMPY, Case

Array = np.ndarray[Any, Any]
E4M3_STEP = 2.0**-4         # half of the distance of two numbers, relative
EPS_OUT = EPS | {"float8_e4m3fn": 2.0**-3}


@dataclass(frozen=True)
class Quantised:
    """A problem of tests/tools/problems.py with 8-bit k and v, and an 8-bit q if `dtype` is None.

    `axis`: what shares a scale, None for numbers; `dtypes`: of k and v; `fold`: a GQA group of query heads shares q's scale.
    """

    name: str
    case: Case
    dtype: str | None = None
    axis: str | None = None
    dtypes: tuple[str, str] = ("float8_e4m3fn", "float8_e4m3fn")
    out_dtype: str | None = None
    out_scale: float | None = None
    positive: bool = False                                  # v
    made: dict[str, Any] = field(default_factory=dict, compare=False)

    def _make(self) -> dict[str, Any]:
        if not self.made:
            inputs = self.case.make()
            q, k, v, *lengths = inputs.args
            q, k, v = (np.nan_to_num(x.astype(np.float32)) for x in (q, k, v))
            if self.positive:
                v = np.abs(v)
            kwargs, packed = dict(inputs.kwargs), bool(lengths)
            group = q.shape[-2] // k.shape[-2]
            folded = q.reshape(*q.shape[:-2], k.shape[-2], group * q.shape[-1])
            arrays = []
            for name, x, dtype in (("q", folded, "float8_e4m3fn"), ("k", k, self.dtypes[0]), ("v", v, self.dtypes[1])):
                if name == "q" and self.dtype is not None:
                    arrays.append(q.astype(NUMPY[self.dtype]))
                    continue
                axis: Any = "head" if packed and self.axis else self.axis
                x8, scale = quantize_fp8(x, axis, dtype)
                kwargs[f"{name}_scale"] = scale if axis else float(scale[0])
                arrays.append(x8.reshape(q.shape) if name == "q" else x8)
            for name in ("out_dtype", "out_scale"):
                if getattr(self, name) is not None:
                    kwargs[name] = getattr(self, name)
            self.made.update(args=tuple(map(guarded_copy, arrays)), lengths=tuple(lengths), kwargs=kwargs)
        return self.made

    @property
    def args(self) -> tuple[Array, ...]:
        return self._make()["args"]  # type: ignore[no-any-return]

    @property
    def lengths(self) -> tuple[Array, ...]:
        return self._make()["lengths"]  # type: ignore[no-any-return]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self._make()["kwargs"]  # type: ignore[no-any-return]

    @property
    def out_name(self) -> str:
        return self.out_dtype or self.dtype or "bfloat16"

    def call(self, engine: str | None = "cpu") -> Any:
        function: Any = attention_varlen if self.lengths else attention
        return function(*self.args, *self.lengths, return_lse=True, engine=engine, **self.kwargs)


def dequantised(x: Array, scale: Any) -> Array:
    """The float64 numbers that an array and a scale stand for; the scale is a number, by head or by (batch, head)."""
    wide = x.astype(np.float64)
    if scale is None:
        return wide
    s = np.asarray(scale, np.float64)
    return wide * (s if s.size == 1 else s[:, None] if s.ndim == 1 else s[:, None, :, None])


def exact(case: Quantised) -> tuple[Array, Array]:
    """out and lse in float64, from wide operands: no 8-bit code of the package."""
    q, k, v = case.args
    kwargs, wide = dict(case.kwargs), []
    for name, x in (("q", q), ("k", k), ("v", v)):
        scale = kwargs.pop(f"{name}_scale", None)
        if name == "q" and scale is not None and np.size(scale) > 1:
            scale = np.repeat(scale, q.shape[-2] // k.shape[-2], axis=-1)
        wide.append(dequantised(x, scale))
    kwargs.pop("out_dtype", None)
    kwargs.pop("out_scale", None)
    for name in ("bias", "alibi_slopes", "sinks"):
        if name in kwargs:
            kwargs[name] = kwargs[name].astype(np.float64)
    function: Any = attention_varlen if case.lengths else attention
    return function(*wide, *case.lengths, return_lse=True, engine="reference", **kwargs)  # type: ignore[no-any-return]


def limit(case: Quantised, want: Array, P: str | None) -> float:
    """The largest error: a rounding of the result, 2**-14 of it for float32 arithmetic, and where P is rounded to 8 bits, an independent
    rounding error of half of E4M3_STEP on each probability."""
    size = norm(want)
    rounding = EPS_OUT[case.out_name] * size
    if P is None:
        return rounding + 2.0**-14 * size
    v = dequantised(case.args[2], case.kwargs.get("v_scale"))
    return rounding + E4M3_STEP * float(np.sqrt(want.size)) * float(np.sqrt(np.mean(v**2)))


SHAPE = {"num_heads": 4, "num_heads_k": 2, "seqlen_q": 70, "seqlen_k": 150, "head_dim": 64}
CASES = [
    Quantised("plain", Case("eight_plain", num_heads=2, seqlen_q=70, head_dim=64)),
    Quantised("causal", Case("eight_causal", causal=True, **SHAPE)),  # type: ignore[arg-type]
    Quantised("gqa", Case("eight_gqa", **SHAPE), axis="head"),  # type: ignore[arg-type]
    Quantised("batch_head_scales", Case("eight_scales", causal=True, **SHAPE), axis="batch_head"),  # type: ignore[arg-type]
    Quantised("window", Case("eight_window", window=(30, 10), **SHAPE), axis="head"),  # type: ignore[arg-type]
    Quantised("e5m2", Case("eight_e5m2", **SHAPE), dtypes=("float8_e5m2", "float8_e5m2"), axis="head"),  # type: ignore[arg-type]
    Quantised("mixed", Case("eight_mixed", **SHAPE), dtypes=("float8_e4m3fn", "float8_e5m2")),  # type: ignore[arg-type]
    Quantised("float16_q", Case("eight_float16_q", "float16", causal=True, **SHAPE), "float16", "head"),  # type: ignore[arg-type]
    Quantised("bfloat16_q", Case("eight_bfloat16_q", "bfloat16", **SHAPE), "bfloat16", "batch_head"),  # type: ignore[arg-type]
    Quantised("float64_q", Case("eight_float64_q", "float64", **SHAPE), "float64"),  # type: ignore[arg-type]
    Quantised("out_float16", Case("eight_out_float16", **SHAPE), out_dtype="float16"),  # type: ignore[arg-type]
    Quantised("out_float32", Case("eight_out_float32", **SHAPE), axis="head", out_dtype="float32"),  # type: ignore[arg-type]
    Quantised("out_8", Case("eight_out_8", **SHAPE), axis="head", out_dtype="float8_e4m3fn", out_scale=0.004),  # type: ignore[arg-type]
    Quantised("positive", Case("eight_positive", num_heads=1, batch=1, seqlen_q=20, seqlen_k=3000, head_dim=64), positive=True),
    Quantised("head_dim_128", Case("eight_128", causal=True, num_heads=2, seqlen_q=130, seqlen_k=200, head_dim=128), axis="head"),
    Quantised("head_dim_256", Case("eight_256", num_heads=2, seqlen_q=65, seqlen_k=100, head_dim=256, batch=1)),
    Quantised("head_dim_40_24", Case("eight_40", num_heads=2, seqlen_q=33, seqlen_k=50, head_dim=40, head_dim_v=24)),
    Quantised("packed", Case("eight_packed", lengths_q=(17, 0, 40, 1), lengths_k=(30, 5, 64, 1), causal=True, spare=3, num_heads=4,
                             num_heads_k=2, head_dim=64), axis="head"),
    Quantised("features", Case("eight_features", softcap=3.0, alibi="batch", bias=(2, 1, 70, 150), mask=(70, 150), sinks=True,
                               causal=True, **SHAPE), axis="head"),  # type: ignore[arg-type]
    Quantised("features_bfloat16_q", Case("eight_features_q", "bfloat16", softcap=3.0, bias=(2, 1, 70, 150), causal=True,
                                          **SHAPE), "bfloat16", "head"),  # type: ignore[arg-type]
    Quantised("dropout", Case("eight_dropout", dropout_p=0.3, **SHAPE), axis="head"),  # type: ignore[arg-type]
]


def by_name(name: str) -> Quantised:
    return next(case for case in CASES if case.name == name)
