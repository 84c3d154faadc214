"""The kernels that tests compile: the shipped ones of a list of calls, and random ones. test_compile.py says how many.

machine_code.py takes the same.
"""
from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastattn import UnsupportedError, gpu
from fastattn.gpu import precompile
from fastattn.gpu.precompile import Want
from tests.tools.day import SEED

FULL = os.environ.get("FASTATTN_COMPILE") == "full"
ARCHS, HALVES = ("sm_80", "sm_89", "sm_90a", "sm_120"), ("float16", "bfloat16")
EVERYTHING: dict[str, Any] = {"causal": True, "window": (100, None), "softcap": True, "alibi": "float32", "bias": "float32", "mask": True,
                              "sinks": "float32", "dropout": True, "num_heads_k": 4}
FEATURES: dict[str, dict[str, Any]] = precompile.SCORE_FEATURES | {"bias_half": {"bias": "half"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {}, "causal": {"causal": True}, "window": {"window": (100, 0)}, "packed": {"packed": True},
    "packed_causal": {"packed": True, "causal": True},
}
DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
UNEQUAL = ((192, 128), (64, 256), (48, 32))


@dataclass(frozen=True)
class Job:
    family: str
    arch: str
    want: Want
    what: str

    @property
    def id(self) -> str:
        dims = f"{self.want.head_dim}" + (f"_{self.want.head_dim_v}" if self.want.head_dim_v else "")
        more = "-backward" * self.want.backward + "-lse" * self.want.lse
        return f"{self.family}-{self.arch}-{self.want.dtype}-{dims}-{self.what}{more}"


def _want(dtype: str, dim: int, dim_v: int | None = None, lse: bool = True, **settings: Any) -> Want:
    if settings.get("bias") == "half":
        settings["bias"] = dtype
    return Want(dtype, dim, dim_v, lse=lse, **settings)


def _tensor_cores(family: str, arch: str, short: bool) -> Iterator[Job]:
    """The tensor-core families; `short` where another architecture has the long list of the same kernels."""
    half, other, hopper = "bfloat16", "float16", family == "sm90"
    for dim in (128, 256) if short else (64, 80, 128, 192, 256):
        yield Job(family, arch, _want(half, dim, causal=True), "causal")
    yield Job(family, arch, _want(other, 128, **EVERYTHING), "everything")
    if short:
        return
    for dim in (64, 128, 256) if hopper else (128,):
        yield Job(family, arch, _want(other, dim, lse=False), "full")
        yield Job(family, arch, _want(half, dim, packed=True, causal=True), "packed_causal")
    yield Job(family, arch, _want(half, 128, window=(100, 0)), "window")
    for name in ("softcap", "bias", "mask", "dropout") if hopper else ("bias_half", "dropout"):
        yield Job(family, arch, _want(half, 128, **FEATURES[name]), name)
    yield Job(family, arch, _want(half, 64, **EVERYTHING), "everything")
    yield Job(family, arch, _want(half, 192, **EVERYTHING), "everything")
    yield Job(family, arch, _want(half, 128, **EVERYTHING, packed=True, seqused=True), "everything_packed")


def _simt(arch: str, short: bool) -> Iterator[Job]:
    yield Job("simt", arch, _want("float32", 64, causal=True), "causal")
    if short:
        return
    yield Job("simt", arch, _want("float64", 64, causal=True), "causal")
    for dtype in ("float64", "bfloat16"):
        yield Job("simt", arch, _want(dtype, 128, **{**EVERYTHING, "bias": dtype}), "everything")
    yield Job("simt", arch, _want("float32", 40, 24, **EVERYTHING, packed=True, seqused=True), "everything_packed")
    yield Job("simt", arch, _want("float32", 512), "full")


def _float() -> Iterator[Job]:
    """float32 on tensor cores: each head size's tile, features that take registers, and the tile of every architecture."""
    def job(family: str, arch: str, dim: int, what: str, **settings: Any) -> Job:
        return Job(family, arch, _want("float32", dim, lse=not settings.get("backward"), **settings), what)
    several: dict[str, Any] = {**EVERYTHING, "packed": True, "seqused": True}
    window: dict[str, Any] = {"packed": True, "window": (100, 50)}
    for dim in (64, 128):
        yield job("sm90", "sm_90a", dim, "causal", causal=True)
        yield Job("sm90", "sm_90a", _want("float32", dim, lse=False, packed=True), "packed")
        yield Job("sm90", "sm_90a", _want("float32", dim, lse=False, **EVERYTHING), "everything")
        yield job("sm90", "sm_90a", dim, "dropout_packed", dropout=True, packed=True, window=(100, 50))
        yield job("sm80", "sm_80", dim, "everything_packed", **several)
        yield job("sm80", "sm_90a", dim, "causal", causal=True)
        yield job("sm80", "sm_90a", dim, "everything_packed", backward=True, **{**several, "bias": None})
        yield job("sm80", "sm_80", dim, "causal", backward=True, causal=True)
        yield job("sm90", "sm_90a", dim, "causal", backward=True, causal=True)
        yield job("sm90", "sm_90a", dim, "mask", backward=True, mask=True)
        yield job("sm90", "sm_90a", dim, "softcap_dropout_packed", backward=True, softcap=True, dropout=True, packed=True, window=(100, 50))
        yield job("sm90", "sm_90a", dim, "mask_packed", mask=True, packed=True, window=(100, 50))
    for dim, what, settings in ((192, "causal", {"causal": True}), (256, "full", {}), (256, "mask_packed", {"mask": True, **window}),
                                (384, "softcap", {"softcap": True}), (512, "full", {}), (320, "bias", {"bias": "float32"}),
                                (512, "dropout_packed", {"dropout": True, **window})):
        yield job("sm90", "sm_90a", dim, what, **settings)
    yield Job("sm90", "sm_90a", _want("float32", 576, 512, causal=True), "causal")
    for dim, dim_v in ((192, 256), (512, 512)):
        yield Job("sm90", "sm_90a", _want("float32", dim, dim_v, lse=dim > 256, batch=1, num_heads=1, seqlen_k=8192), "split_keys")
    yield job("sm90", "sm_90a", 64, "alibi_packed", alibi="float32", packed=True, window=(100, 50))
    yield job("sm90", "sm_90a", 64, "everything_packed", **several)
    yield job("sm80", "sm_89", 128, "causal", causal=True)
    yield job("sm80", "sm_120", 64, "causal", backward=True, causal=True)


def _backward_sm80() -> Iterator[Job]:
    for arch, dim, what in (("sm_80", 64, "causal"), ("sm_80", 128, "everything"), ("sm_80", 256, "causal"), ("sm_89", 64, "everything"),
                            ("sm_120", 128, "causal")):
        settings = {"causal": True} if what == "causal" else {**EVERYTHING, "bias": None}      # it has no dbias
        yield Job("sm80", arch, _want("bfloat16", dim, lse=False, backward=True, **settings), what)


def _backward_sm90() -> Iterator[Job]:
    """Hopper: each feature, with dbias where there is a bias, and the deterministic pair of kernels; three of them over 128 columns."""
    def job(dim: int, what: str, dim_v: int | None = None, **settings: Any) -> Job:
        return Job("sm90", "sm_90a", _want("bfloat16", dim, dim_v, lse=False, backward=True, **settings), what)
    for dim in (64, 128, 192, 256):
        yield job(dim, "causal", causal=True)
        yield job(dim, "packed_window", packed=True, window=(100, 50))
    for dim in (64, 128):
        yield job(dim, "deterministic", deterministic=True, causal=True)
    for dim in (128, 256):
        yield job(dim, "bias", bias="bfloat16", causal=True)
        yield job(dim, "dropout", dropout=True)
        yield job(dim, "packed_dropout", dropout=True, packed=True, window=(100, 50))
        yield job(dim, "softcap", softcap=True, causal=True)
        yield job(dim, "mask", mask=True, alibi="float32")
    yield job(192, "causal", 128, causal=True)
    yield job(192, "packed_window", 128, packed=True, window=(100, 50))
    yield job(64, "causal", 256, causal=True)
    yield job(128, "softcap_deterministic", softcap=True, deterministic=True)


def _sliced() -> Iterator[Job]:
    """Hopper: head sizes over 256, where warpgroups share rows and divide columns; three of them over 512."""
    for backward in (False, True):
        def job(dim: int, what: str, dim_v: int | None = None, backward: bool = backward, **settings: Any) -> Job:
            return Job("sm90", "sm_90a", _want("bfloat16", dim, dim_v, lse=not backward, backward=backward, **settings), what)
        yield job(512, "causal", causal=True)
        yield job(576, "packed_window", 512, packed=True, window=(100, 50))
        yield job(320, "bias", bias="float32", packed=True, window=(100, 50))
        yield job(512, "mask_dropout", mask=True, dropout=True, packed=True, window=(100, 50))
    yield Job("sm90", "sm_90a", _want("bfloat16", 384, lse=False, backward=True, packed=True, causal=True), "packed_causal")
    yield Job("sm90", "sm_90a", _want("bfloat16", 64, 576, lse=False, backward=True), "full")
    yield Job("sm90", "sm_90a", _want("bfloat16", 512, **EVERYTHING, packed=True, seqused=True), "everything_packed")
    yield Job("sm90", "sm_90a", _want("float16", 576, softcap=True, alibi="float32", sinks="float32", causal=True), "softcap_alibi")


def _float32_out() -> Iterator[Job]:
    """float32 results of 16-bit operands: each way in which kernels store them."""
    for family, arch in (("sm90", "sm_90a"), ("sm80", "sm_80"), ("simt", "sm_80")):
        yield Job(family, arch, _want("bfloat16", 128, causal=True, out_dtype="float32"), "float32_out")
        yield Job(family, arch, _want("bfloat16", 128, lse=False, causal=True, out_dtype="float32", backward=True), "float32_out")
    for settings in ({}, {"packed": True, "dropout": True}):
        for dim, dim_v in ((64, None), (192, 128), (256, None), (512, None)):
            for backward in (False, True):
                yield Job("sm90", "sm_90a", _want("bfloat16", dim, dim_v, lse=not backward, backward=backward, causal=True,
                                                  out_dtype="float32", **settings), "float32_out" + "_packed_dropout" * bool(settings))
    yield Job("sm90", "sm_90a", _want("bfloat16", 128, lse=False, backward=True, causal=True, deterministic=True, out_dtype="float32"),
              "float32_out_deterministic")
    yield Job("sm80", "sm_80", _want("float16", 256, lse=False, backward=True, causal=True, packed=True, out_dtype="float32"),
              "float32_out_packed")
    yield Job("sm80", "sm_80", _want("bfloat16", 128, seqlen_q=1, num_heads_k=4, out_dtype="float32"), "float32_out_decode")


def _diagonals() -> Iterator[Job]:
    """Packed sequences that each have a diagonal: how each kind of kernel comes to know it."""
    settings: dict[str, Any] = {"packed": True, "diagonals": True, "window": (100, 50), "alibi": "float32"}
    for family, arch in (("sm90", "sm_90a"), ("sm80", "sm_80")):
        for backward in (False, True):
            yield Job(family, arch, _want("bfloat16", 128, lse=not backward, backward=backward, **settings), "diagonals")
    for dim, more in ((64, {"deterministic": True}), (256, {})):
        yield Job("sm90", "sm_90a", _want("bfloat16", dim, lse=False, backward=True, **settings, **more), "diagonals")


def _found() -> Iterator[Job]:
    """Kernels that spilled when drawn at random, one of each kind, and a softcap over 64."""
    both: dict[str, Any] = {"bias": "float16", "mask": True, "lse": False}
    window: dict[str, Any] = {"window": (100, 50)}
    yield Job("sm90", "sm_90a", _want("float16", 192, mask=True, dropout=True, packed=True, **window), "mask_dropout_packed")
    yield Job("sm90", "sm_90a", _want("float16", 192, mask=True, softcap=True, packed=True, **window), "mask_softcap_packed")
    yield Job("sm90", "sm_90a", _want("bfloat16", 128, wide_cap=True, causal=True), "wide_cap")
    for dim in (128, 192):      # at 256 the kernel of dV spills 4 bytes, which nothing has cured: docs/log-gpu.md, "Open"
        yield Job("sm90", "sm_90a", _want("float16", dim, backward=True, **both, **window), "bias_mask_window")
    yield Job("sm90", "sm_90a", _want("float16", 128, backward=True, packed=True, **both, **window), "bias_mask_packed")
    yield Job("sm90", "sm_90a", _want("bfloat16", 192, lse=False, softcap=True, dropout=True, packed=True, backward=True, **window),
              "softcap_dropout_packed")
    yield Job("sm90", "sm_90a", _want("bfloat16", 48, mask=True, packed=True, **window), "mask_packed")
    for dim, what, settings in ((16, "mask", {"mask": True}), (64, "plain_deterministic", {"deterministic": True}),
                                (128, "softcap_window", {"softcap": True, "packed": True, "window": (100, None)}),
                                (128, "bias_whole_packed", {"bias": "bfloat16", "packed": True}),
                                (128, "bias_float32", {"bias": "float32", "causal": True}),
                                (256, "mask_softcap_packed", {"mask": True, "softcap": True, "packed": True, **window})):
        yield Job("sm90", "sm_90a", _want("bfloat16", dim, lse=False, backward=True, **settings), what)
    for dim in (128, 192, 256):
        yield Job("sm90", "sm_90a", _want("float16", dim, softcap=True), "softcap")
    yield Job("sm80", "sm_90a", _want("bfloat16", 128, packed=True, **window), "window_packed")
    yield Job("sm90", "sm_90a", _want("float32", 32, 128, causal=True), "causal")
    yield Job("sm90", "sm_90a", _want("bfloat16", 128, softcap=True, **window), "softcap_window")
    yield Job("sm80", "sm_80", _want("float16", 256, dropout=True, **both, **window), "bias_mask_dropout")
    for dim in (192, 256):
        yield Job("sm80", "sm_80", _want("float16", dim, dropout=True, backward=True, dbias=False, **both, **window), "bias_mask_dropout")
    yield Job("simt", "sm_80", _want("float16", 32, backward=True, **both, softcap=True, dropout=True, alibi="float32"), "small_many")
    yield Job("simt", "sm_80", _want("float16", 16, lse=False, backward=True, dropout=True), "small_dropout")
    yield Job("simt", "sm_90a", _want("bfloat16", 16, 32, lse=False, backward=True, causal=True), "small")
    yield Job("simt", "sm_80", _want("float64", 8, lse=False, backward=True, packed=True, seqused=True, causal=True, alibi="float32",
                                     bias="float32"), "small_float64")
    yield Job("simt", "sm_80", _want("float16", 16, lse=False, backward=True, packed=True, seqused=True, causal=True, softcap=True,
                                     bias="float16"), "small_packed_softcap")
    yield Job("simt", "sm_120", _want("float16", 16, packed=True), "packed")        # the plan: with the compilers of CUDA 13.0
    yield Job("simt", "sm_90a", _want("float64", 32, lse=False, backward=True, packed=True, causal=True), "small_packed")
    yield Job("simt", "sm_90a", _want("float16", 16, lse=False, backward=True, dropout=True, bias="float32"), "small_dropout_bias")
    yield Job("sm80", "sm_90a", _want("float32", 32, 128, packed=True, causal=True), "packed_causal")
    yield Job("sm90", "sm_90a", _want("bfloat16", 64, softcap=True, dropout=True, causal=True, sinks="float32"), "softcap_dropout")
    yield Job("sm90", "sm_90a", _want("float16", 64, softcap=True, bias="float16", causal=True, sinks="float32"), "softcap_bias")
    yield Job("sm90", "sm_90a", _want("float32", 128, mask=True, dropout=True, causal=True, sinks="float32", seqlen_q=100),
              "few_keys_mask_dropout")      # on Python 3.12
    for name in ("softcap", "mask"):
        yield Job("sm90", "sm_90a", _want("bfloat16", 16, lse=False, seqlen_q=64, backward=True, **FEATURES[name]), f"short_{name}")


def _pairs() -> Iterator[Job]:
    """Hopper: two features together. The backwards of both head sizes take turns: random kernels draw the others."""
    for n, (one, other) in enumerate(itertools.combinations(("softcap", "alibi", "bias_half", "mask", "dropout"), 2)):
        settings, name = FEATURES[one] | FEATURES[other], f"{one}_{other}"
        yield Job("sm90", "sm_90a", _want("bfloat16", 128, packed=True, causal=True, **settings), name)
        for dim in (64, 128) if FULL else ((64, 128)[(n + SEED) % 2],):
            yield Job("sm90", "sm_90a", _want("float16", dim, lse=False, backward=True, causal=True, **settings), name)


def _backward(arch: str, short: bool) -> Iterator[Job]:
    """simt, dbias and the preprocess kernel of every backward; float64 with head_dim 512 needs the most registers."""
    def want(dtype: str, dim: int, dim_v: int | None = None, **settings: Any) -> Want:
        return _want(dtype, dim, dim_v, lse=False, backward=True, **settings)
    yield Job("simt", arch, want("bfloat16", 64, **{**EVERYTHING, "bias": "bfloat16"}), "everything")
    if short:
        return
    yield Job("simt", arch, want("float32", 40, 24, **EVERYTHING, packed=True, seqused=True), "everything_packed")
    yield Job("simt", arch, want("float64", 512, **EVERYTHING), "everything")


def _decode() -> Iterator[Job]:
    """Few queries and many keys: plain, and with all features of this kernel."""
    shape: dict[str, Any] = {"seqlen_q": 2, "seqlen_k": 8192, "num_heads": 32, "num_heads_k": 8}
    for arch, dim in itertools.product(ARCHS, (64, 128)):
        yield Job("sm80", arch, _want("bfloat16", dim, lse=False, **shape), "decode")
        yield Job("sm80", arch, _want("float16", dim, window=(100, 5), softcap=True, sinks="float32", **shape), "decode_all")
    yield Job("sm80", "sm_90a", _want("bfloat16", 128, 64, causal=True, **shape), "decode_causal")
    every: dict[str, Any] = {"window": (100, 5), "softcap": True, "sinks": "float32", **shape}
    for arch, dim in itertools.product(("sm_80", "sm_90a"), (32, 64, 128)):
        yield Job("sm80", arch, _want("float32", dim, lse=False, **every), "decode_all")
    for dim, dim_v in ((32, 32), (80, 80), (96, 96), (160, 160), (192, 128), (256, 256), (104, 40)):
        yield Job("sm80", "sm_90a", _want("float16", dim, dim_v, **every), "decode_all")
    for arch in ARCHS:
        yield Job("sm80", arch, _want("bfloat16", 256, **every), "decode_all")
    for dtype, dim in (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float32", 128)):      # 32 and 64 rows
        yield Job("sm80", "sm_90a", _want(dtype, dim, lse=dtype != "float32", **{**every, "seqlen_q": 8}), "decode_rows_32")
        yield Job("sm80", "sm_90a", _want(dtype, dim, lse=dtype != "float32", **{**every, "seqlen_q": 16}), "decode_rows_64")
    most = {**EVERYTHING, "dropout": False, **shape}
    for dtype, dim in itertools.product(("bfloat16", "float32"), (64, 128, 256)):
        if (dtype, dim) != ("float32", 256):
            yield Job("sm80", "sm_90a", _want(dtype, dim, **most), "decode_most")
            yield Job("sm80", "sm_80", _want(dtype, dim, **{**most, "causal": False, "window": (100, 5), "seqlen_q": 8}), "decode_most")
    for name in ("alibi", "bias", "bias_half", "mask"):
        yield Job("sm80", "sm_90a", _want("bfloat16", 128, **FEATURES[name], **shape), f"decode_{name}")
        if name != "bias_half":
            yield Job("sm80", "sm_90a", _want("float32", 128, **FEATURES[name], **shape), f"decode_{name}")


def _short() -> Iterator[Job]:
    """Few queries and few keys: one kernel is the backward."""
    most = {**EVERYTHING, "sinks": None, "softcap": False}
    for arch in ("sm_80", "sm_90a", "sm_120"):
        yield Job("sm80", arch, _want("bfloat16", 64, backward=True, lse=False, seqlen_q=64, **most), "short_all")
    for dim, dbias in itertools.product((32, 64), (False, True)):
        yield Job("sm90", "sm_90a", _want("bfloat16", dim, lse=False, seqlen_q=49, bias="half", one_bias=True, backward=True, dbias=dbias),
                  f"short_bias{'_dbias' * dbias}")
    for name, settings in {"full": {}, "causal": {"causal": True}, "dropout": {"dropout": True}, "softcap": {"softcap": True}}.items():
        yield Job("sm90", "sm_90a", _want("float16", 64, lse=False, seqlen_q=64, backward=True, **settings), f"short_{name}")


def _bias_tiles() -> Iterator[Job]:
    """A bias that TMA copies."""
    for name, dim in (("full", 32), ("causal", 64), ("window", 64)):
        for mask in (False, True):
            want = _want("float16", dim, bias="half", mask=mask, **VARIANTS[name])
            yield Job("sm90", "sm_90a", want, f"bias_tiles_{name}{'_mask' * mask}")
    for dim, dbias, mask in itertools.product((64, 128), (False, True), (False, True)):
        yield Job("sm90", "sm_90a", _want("bfloat16", dim, lse=False, bias="half", backward=True, dbias=dbias, mask=mask, window=(100, 50)),
                  f"bias_tiles{'_dbias' * dbias}{'_mask' * mask}")


def _few_keys() -> Iterator[Job]:
    """Several thread blocks on a multiprocessor; dQ of a head whose keys are one tile, or two; 32 rows of the mma.sync kernel."""
    yield Job("sm90", "sm_90a", _want("float16", 64, lse=False, seqlen_q=197), "few_keys")
    yield Job("sm90", "sm_90a", _want("bfloat16", 64, 48, seqlen_q=300, packed=True, window=(100, 0), sinks="float32"), "few_keys_window")
    yield Job("sm90", "sm_90a", _want("float16", 80, 96, packed=True, causal=True, sinks="float32"), "rows_192")
    for name, settings in {"causal": {"causal": True}, "alibi_dropout": {"alibi": "float32", "dropout": True},
                           "dbias": {"bias": "half", "causal": True}}.items():
        yield Job("sm90", "sm_90a", _want("float16", 64, lse=False, seqlen_q=128, backward=True, **settings), f"one_tile_{name}")
    for dim in (32, 64):
        yield Job("sm90", "sm_90a", _want("float16", dim, lse=False, seqlen_q=197, backward=True), "two_tiles")
    for arch in ("sm_80", "sm_90a"):
        yield Job("sm80" if arch == "sm_80" else "sm90", arch, _want("bfloat16", 32, seqlen_q=32, seqlen_k=128, bias="half"), "few_rows")


def _everything_there_is() -> Iterator[Job]:
    """The full list: every dtype, head size and variant, every feature alone at three sizes."""
    for family, arch in [("sm90", "sm_90a"), *(("sm80", arch) for arch in ARCHS), *(("simt", arch) for arch in ARCHS)]:
        for dtype in ("float16", "bfloat16", *(("float32", "float64") if family == "simt" else ())):
            for dim in DIMS:
                for name, settings in VARIANTS.items():
                    for lse in (True, False):
                        yield Job(family, arch, _want(dtype, dim, lse=lse, **settings), name)
                yield Job(family, arch, _want(dtype, dim, **EVERYTHING), "everything")
                yield Job(family, arch, _want(dtype, dim, **EVERYTHING, packed=True, seqused=True), "everything_packed")
            for dim, dim_v in UNEQUAL:
                yield Job(family, arch, _want(dtype, dim, dim_v, causal=True), "causal")
            for dim in (64, 128, 256):
                for name, settings in FEATURES.items():
                    yield Job(family, arch, _want(dtype, dim, **settings), name)
                    yield Job(family, arch, _want(dtype, dim, packed=True, causal=True, **settings), f"packed_{name}")


def _eight_bit() -> Iterator[Job]:
    """8-bit operands: Hopper's products, with the transposition of V, and copies around the kernels of 16 bits."""
    for dim in (64, 128):
        for lse in (False, True):
            yield Job("sm90", "sm_90a", _want("float8_e4m3fn", dim, lse=lse), "full")
            yield Job("sm90", "sm_90a", _want("float8_e4m3fn", dim, lse=lse, causal=True, num_heads_k=4), "causal")
        yield Job("sm90", "sm_90a", _want("float8_e4m3fn", dim, window=(100, 50)), "window")
        yield Job("sm90", "sm_90a", _want("float8_e4m3fn", dim, packed=True, causal=True), "packed_causal")
        yield Job("sm90", "sm_90a", _want("float8_e4m3fn", dim, packed=True, seqused=True, window=(100, 50)), "packed_window")
    yield Job("sm90", "sm_90a", _want("float8_e4m3fn", 256, causal=True), "widened")
    yield Job("sm80", "sm_80", _want("float8_e4m3fn", 128, packed=True, softcap=True), "widened")


def _ci() -> Iterator[Job]:
    """What fits into CI: a Hopper kernel takes three seconds with its PTX."""
    yield from _pairs()
    yield from _found()
    yield from _sliced()
    yield from _decode()
    yield from _float()
    yield from _short()
    yield from _bias_tiles()
    yield from _few_keys()
    yield from _eight_bit()
    half, other, packed = "bfloat16", "float16", {"packed": True, "causal": True}
    groups: dict[str, Any] = {"causal": True, "batch": 1, "num_heads": 32, "num_heads_k": 8, "seqlen_q": 1024}
    for dim in (64, 128):
        yield Job("sm90", "sm_90a", _want(half, dim, lse=False, backward=True, **groups), "groups")
    for dim in (64, 128, 256):
        yield Job("sm90", "sm_90a", _want(half, dim, causal=True), "causal")
    for dim in (128, 256):
        yield Job("sm90", "sm_90a", _want(half, dim, **packed), "packed_causal")
    yield Job("sm90", "sm_90a", _want(other, 128, lse=False), "full")
    yield Job("sm90", "sm_90a", _want(half, 128, window=(100, 0)), "window")
    for name in ("bias", "dropout"):
        yield Job("sm90", "sm_90a", _want(half, 128, **FEATURES[name]), name)
    for dim in (128, 192):
        yield Job("sm90", "sm_90a", _want(other, dim, **EVERYTHING), "everything")
    yield Job("sm90", "sm_90a", _want(half, 128, **EVERYTHING, packed=True, seqused=True), "everything_packed")
    for arch, dim in (("sm_80", 64), ("sm_80", 128), ("sm_80", 256), ("sm_89", 256), ("sm_90a", 128), ("sm_120", 128)):
        yield Job("sm80", arch, _want(half, dim, causal=True), "causal")
    for arch, dim in (("sm_80", 64), ("sm_80", 128), ("sm_89", 128), ("sm_120", 128)):
        yield Job("sm80", arch, _want(other, dim, **EVERYTHING), "everything")
    yield Job("sm80", "sm_80", _want(half, 128, **packed), "packed_causal")
    for arch in ("sm_80", "sm_120"):
        yield Job("simt", arch, _want("float32", 64, causal=True), "causal")
    yield Job("simt", "sm_80", _want("float64", 128, **EVERYTHING), "everything")
    for backward in (False, True):
        want = _want("float32", 40, 24, lse=not backward, backward=backward, **EVERYTHING, packed=True, seqused=True)
        yield Job("simt", "sm_80", want, "everything_packed")
    yield from (job for job in _backward_sm80() if job.id.startswith(("sm80-sm_80-bfloat16-128", "sm80-sm_120")))
    backward = ("0-causal-backward", "64-causal-backward", "128-causal-backward", "256-causal-backward", "-bias-backward",
                "-softcap-backward", "128-deterministic-backward", "192_128-packed_window-backward")
    yield from (job for job in _backward_sm90() if job.id.endswith(backward))
    yield from (job for job in _diagonals() if job.id.endswith(("128-diagonals-lse", "128-diagonals-backward")))
    yield from (job for job in _float32_out() if job.id.endswith(("128-float32_out-backward", "64-float32_out_packed_dropout-lse")))


# ---------------------------------------------------------------- and random kernels
SAMPLES = int(os.environ.get("FASTATTN_SAMPLES", "40"))
SAMPLE_ARCHS = {"sm90": ("sm_90a",), "sm80": ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120"), "simt": ARCHS}


def draw_job(draw: random.Random) -> Job:
    """A kernel of the whole space that its family takes: architecture, direction, dtype, head sizes, features, masks, lengths."""
    while True:
        family = draw.choice(("sm90", "sm90", "sm80", "simt"))
        arch, want = draw.choice(SAMPLE_ARCHS[family]), _draw_want(draw, family)
        try:
            with gpu.use(family):
                gpu.choose(want.call()[0], precompile.absent_device(arch))
        except UnsupportedError:
            continue
        return Job(family, arch, want, "sample")


def _draw_want(draw: random.Random, family: str) -> Want:
    def flip(p: float) -> bool:
        return draw.random() < p

    def head_dim() -> int:
        most = {"simt": 512, "sm90": 576, "sm80": 256}[family] if flip(0.2) else 256
        return draw.choice((draw.randint(1, most), draw.randrange(8, most + 1, 8), draw.randrange(16, most + 1, 16)))
    dtype = draw.choice((*HALVES, "float32", "float64") if family == "simt" else (*HALVES, "float32"))
    dim, heads = head_dim(), draw.choice((4, 16))
    settings: dict[str, Any] = {}
    for name in draw.sample(sorted(precompile.SCORE_FEATURES), draw.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        settings |= precompile.SCORE_FEATURES[name]
    if "bias" in settings and dtype in HALVES and flip(0.6):
        settings["bias"] = dtype
    backward, packed, few = flip(0.5), flip(0.4), flip(0.1)
    if few:     # the keys are split
        settings |= {"seqlen_q": draw.choice((1, 2, 4, 9, 16)), "seqlen_k": 4096}
    elif flip(0.15):        # few queries and few keys
        settings |= {"seqlen_q": draw.choice((49, 64, 100)), "seqlen_k": draw.choice((49, 64)), "one_bias": flip(0.5)}
    else:       # bias is read in tiles, in pieces of 16 or 4 bytes, or by elements; tiles are chosen by length
        settings |= {"seqlen_q": 1024, "seqlen_k": draw.choice((4096, 1024, 4098, 1023))}
    window = draw.choice((None, None, (100, None), (100, 0), (100, 50), (None, 50)))
    return Want(dtype, dim, head_dim() if flip(0.25) else None, causal=draw.choice((False, True, True)), window=window, packed=packed,
                seqused=packed and flip(0.5), lse=not backward and flip(0.5), num_heads=heads,
                num_heads_k=draw.choice((heads, 1, heads // 2)), backward=backward, deterministic=backward and flip(0.2), **settings)


def _samples() -> list[Job]:
    """SAMPLES of them, from the seed. One that fails prints its Want, so that it can become a named job above."""
    draw = random.Random(SEED)
    return [replace(draw_job(draw), what=f"sample_{SEED}_{n}") for n in range(SAMPLES)]


def _jobs() -> list[Job]:
    jobs = [*_ci(), *_samples()]
    if FULL:
        jobs += [*_tensor_cores("sm90", "sm_90a", False), *(job for arch in ARCHS for job in _tensor_cores("sm80", arch, arch != "sm_80")),
                 *(job for arch in ARCHS for job in _simt(arch, arch != "sm_80")),
                 *(job for arch in ARCHS for job in _backward(arch, arch != "sm_80")), *_backward_sm80(), *_backward_sm90(),
                 *_float32_out(), *_diagonals(),
                 *_everything_there_is()]
    return list({job.id: job for job in jobs}.values())


JOBS = _jobs()
