"""Calls of variants.py, and the ways to run them. What lost is deleted: docs/log-gpu.md has it."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastattn.gpu.precompile import Want
from fastattn.gpu.sm80.config import ForwardSm80Config
from fastattn.gpu.sm90.config import ForwardSm90Config
from fastattn.gpu.sm90.config_alone import DqSm90Config


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a call: a tiling of the forward, one of its other family, heads scheduled together (0: as many as always), fields of the
    backward's tiling."""

    tiling: ForwardSm90Config | None = None
    sm80: ForwardSm80Config | None = None
    dq: DqSm90Config | None = None
    heads: int = 0
    backward: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """A call, and variants and torch's backends by name. lengths: of packed sequences. repeats: calls timed together."""

    name: str
    want: Want
    variants: dict[str, Variant]
    rivals: tuple[str, ...] = ("cuDNN",)
    lengths: list[int] | None = None
    repeats: int = 4


def tiling(block_m: int, block_n: int, blocks: int = 1, *, turns: bool | None = None, **more: Any) -> Variant:
    """A forward's tiling: `blocks` thread blocks on a multiprocessor."""
    turns = block_m > 64 if turns is None else turns
    return Variant(ForwardSm90Config(block_m=block_m, block_n=block_n, blocks_per_sm=blocks, turns=turns, **more))


def _trials() -> list[Trial]:
    ours, apart = {"now": Variant()}, {"overlap": False, "optimistic": False}
    small, wide, waiting = tiling(64, 64, 3), tiling(192, 112, out_panels=1), tiling(128, 64, 2, **apart)
    few64 = {"128x48/2": tiling(128, 48, 2), "64x64/3": small}
    wider = {"192x112": wide}
    one: dict[str, Any] = {"tiles": 1, "block_n": 64, "stages": 1}
    sm80 = {f"sm80 {16 * warps}x64/{blocks}": Variant(sm80=ForwardSm80Config(warps=warps, blocks_per_sm=blocks, **one))
            for warps, blocks in ((4, 4), (2, 8))}
    return [
        Trial("DiT", Want(head_dim=72, seqlen_q=256, batch=128), ours | {
            "out 0": tiling(128, 128, out_panels=0), "hints": tiling(128, 128, hints=True), "no turns": tiling(128, 128, turns=False),
            "64 keys": tiling(128, 64), "64 keys, 4 stages": tiling(128, 64, stages=4, out_panels=1), "192x112": wide,
            "64x64/2 out 1": tiling(64, 64, 2, out_panels=1)}),
        Trial("D72 256 as 64", Want(head_dim=64, seqlen_q=256, batch=128), ours | few64),
        Trial("D80 257", Want(head_dim=80, seqlen_q=257, batch=64), ours | wider),
        Trial("D80 1024", Want(head_dim=80, seqlen_q=1024, batch=16, num_heads=8), ours | wider),
        Trial("D80 2048 causal", Want(head_dim=80, seqlen_q=2048, num_heads=32, causal=True), ours | wider),
        Trial("D96 4096 causal", Want(head_dim=96, seqlen_q=4096, batch=2, num_heads=32, causal=True), ours | wider),
        Trial("D96 1024", Want(head_dim=96, seqlen_q=1024, batch=16), ours | wider),
        Trial("D72 512 causal", Want(head_dim=72, seqlen_q=512, batch=32, causal=True), ours | wider),
        Trial("D64 1024", Want(head_dim=64, seqlen_q=1024, batch=16, num_heads=32), ours | few64),
        Trial("D64 1024 causal", Want(head_dim=64, seqlen_q=1024, batch=16, num_heads=32, causal=True), ours | few64),
        Trial("D64 2048 causal", Want(head_dim=64, seqlen_q=2048, batch=8, num_heads=32, causal=True), ours | few64),
        Trial("D64 384", Want(head_dim=64, seqlen_q=384, batch=32, num_heads=16), ours | few64),
        Trial("D64 577", Want(head_dim=64, seqlen_q=577, batch=32), ours | few64),
        Trial("D64 77 causal", Want(head_dim=64, seqlen_q=77, batch=512, num_heads=8, causal=True), ours | few64),
        Trial("nanoGPT", Want(head_dim=64, seqlen_q=256, batch=64, num_heads=6, causal=True), ours | few64),
        Trial("MSA columns", Want(head_dim=32, seqlen_q=128, batch=256, num_heads=8), ours | few64),
        Trial("SD text", Want(head_dim=40, seqlen_q=4096, seqlen_k=77, batch=16, num_heads=8), ours | {"64x64/3": small}),
        Trial("ModernBERT", Want(head_dim=64, seqlen_q=8192, num_heads=12, window=(64, 64)), ours | {
            "128x64/2 apart": waiting, "64x64/3": small}),
        Trial("window 255", Want(head_dim=64, seqlen_q=8192, num_heads=12, window=(255, 0), causal=True), ours | {
            "128x64/2 apart": waiting, "64x64/3": small}),
        Trial("window 511", Want(head_dim=64, seqlen_q=8192, num_heads=12, window=(511, 0), causal=True), ours | {"64x64/3": small}),
        Trial("window 1023", Want(head_dim=64, seqlen_q=8192, num_heads=12, window=(1023, 0), causal=True), ours | {"64x64/3": small}),
        Trial("AF3 64 rows", Want(head_dim=64, seqlen_q=64, seqlen_k=128, batch=128), ours | sm80, ("cuDNN", "efficient")),
        Trial("AF3 64 rows 256", Want(head_dim=64, seqlen_q=64, seqlen_k=256, batch=128), ours | sm80, ("cuDNN", "efficient")),
        Trial("AF3 32 rows 512", Want(head_dim=64, seqlen_q=32, seqlen_k=512, batch=128), ours | sm80, ("cuDNN", "efficient")),
        Trial("Llama 64k", Want(seqlen_q=65536, batch=1, num_heads=32, num_heads_k=8, causal=True), ours
              | {"heads 2": Variant(heads=2), "heads 1": Variant(heads=1), "160": tiling(128, 160)}, (), repeats=1),
        *_backwards(ours),
    ]


def _backwards(ours: dict[str, Variant]) -> list[Trial]:
    joined = {"not apart": Variant(backward={"apart": False}), "crowded": Variant(backward={"halves": False, "crowded": True})}
    return [
        Trial("ViT back", Want(head_dim=64, seqlen_q=197, batch=256, num_heads=12, backward=True), ours | joined),
        Trial("CLIP 336 back", Want(head_dim=64, seqlen_q=577, batch=32, backward=True), ours | joined),
        Trial("Whisper back", Want(head_dim=64, seqlen_q=1500, batch=16, num_heads=20, backward=True), ours | joined),
        Trial("SD 16 back", Want(head_dim=160, seqlen_q=256, batch=32, num_heads=8, backward=True), ours
              | {"dq 64": Variant(dq=DqSm90Config(block_n=64, stages=3, stages_v=2))}),
        Trial("Llama 64k back", Want(seqlen_q=65536, batch=1, num_heads=32, num_heads_k=8, causal=True, backward=True), ours
              | {"down": Variant(backward={"down": True})}, (), repeats=1),
    ]


TRIALS = {trial.name: trial for trial in _trials()}
