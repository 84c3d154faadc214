"""Calls of variants.py, and the ways to run them. What lost is deleted: docs/log-gpu.md has it."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastattn.gpu.precompile import Want
from fastattn.gpu.sm80.config import ForwardSm80Config
from fastattn.gpu.sm90.config import ForwardSm90Config


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a call: a tiling of the forward, one of its other family, heads scheduled together (0: as many as always), fields of the
    backward's tiling."""

    tiling: ForwardSm90Config | None = None
    sm80: ForwardSm80Config | None = None
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


def short(**more: Any) -> dict[str, Variant]:
    """Tilings for few keys: several blocks on a multiprocessor, so that one computes while another one waits."""
    apart = {"overlap": False, "optimistic": False}
    return {"128x64/2 apart": tiling(128, 64, 2, **apart, **more), "128x48/2": tiling(128, 48, 2, **more)}


def _trials() -> list[Trial]:
    ours = {"now": Variant()}
    few64 = {**short(), "64x64/3": tiling(64, 64, 3), "64x128/2": tiling(64, 128, 2)}
    few72 = {**short(out_panels=0), "64x64/2": tiling(64, 64, 2, out_panels=2), "64x128/2": tiling(64, 128, 2, out_panels=0, stages=1)}
    wider = {"192x112": tiling(192, 112, out_panels=1)}
    apart = {"overlap": False, "optimistic": False}
    return [
        Trial("DiT", Want(head_dim=72, seqlen_q=256, batch=128), ours | few72),
        Trial("SigLIP", Want(head_dim=72, seqlen_q=729, batch=32), ours | short(out_panels=0) | wider),
        Trial("SigLIP packed", Want(head_dim=72, seqlen_q=1024, batch=32, packed=True), ours | wider, (), [729] * 16 + [500, 1018] * 8),
        Trial("ViT", Want(head_dim=64, seqlen_q=197, batch=256, num_heads=12), ours | few64),
        Trial("CLIP 224", Want(head_dim=64, seqlen_q=257, batch=64), ours | few64),
        Trial("D64 512", Want(head_dim=64, seqlen_q=512, batch=32, num_heads=32), ours | few64),
        Trial("D64 512 causal", Want(head_dim=64, seqlen_q=512, batch=32, num_heads=32, causal=True), ours | few64),
        Trial("D64 1024", Want(head_dim=64, seqlen_q=1024, batch=16, num_heads=32), ours | few64),
        Trial("D64 1024 causal", Want(head_dim=64, seqlen_q=1024, batch=16, num_heads=32, causal=True), ours | few64),
        Trial("nanoGPT", Want(head_dim=64, seqlen_q=256, batch=64, num_heads=6, causal=True), ours | few64),
        Trial("MSA columns", Want(head_dim=32, seqlen_q=128, batch=256, num_heads=8), ours | {"64x64/3": tiling(64, 64, 3),
                                                                                              "64x128/2": tiling(64, 128, 2)}),
        Trial("d40", Want(head_dim=40, seqlen_q=4096, batch=8, num_heads=8), ours | {"192x144": tiling(192, 144)}),
        Trial("gpt-oss", Want(head_dim=64, seqlen_q=8192, batch=1, num_heads=64, num_heads_k=8, window=(127, 0), causal=True,
                              sinks="float32"), ours | {"128x128": tiling(128, 128), "128x64": tiling(128, 64),
              "128x64/2 apart": tiling(128, 64, 2, **apart), "64x64/3": tiling(64, 64, 3), "64x128/2": tiling(64, 128, 2)}),
        Trial("ModernBERT", Want(head_dim=64, seqlen_q=8192, num_heads=12, window=(64, 64)), ours | {"128x128": tiling(128, 128),
              "128x64/2 apart": tiling(128, 64, 2, **apart), "64x64/3": tiling(64, 64, 3)}),
        Trial("D80 257", Want(head_dim=80, seqlen_q=257, batch=64), ours | {"64x64/2": tiling(64, 64, 2, out_panels=2)}),
        Trial("D128 512", Want(seqlen_q=512, batch=32), ours | {"64x64/2": tiling(64, 64, 2, out_panels=2)}),
        Trial("D128 512 causal", Want(seqlen_q=512, batch=32, causal=True), ours | {"64x64/2": tiling(64, 64, 2, out_panels=2)}),
        Trial("AF3 atoms", Want(head_dim=32, seqlen_q=32, seqlen_k=128, batch=640, num_heads=4, bias="bfloat16"), ours
              | {f"sm80 {16 * warps}x64/{blocks}": Variant(sm80=ForwardSm80Config(warps=warps, tiles=1, block_n=64, stages=1,
                                                                                 blocks_per_sm=blocks))
                 for warps, blocks in ((4, 4), (2, 6), (2, 8))}, ("cuDNN", "efficient")),
        Trial("Llama 64k", Want(seqlen_q=65536, batch=1, num_heads=32, num_heads_k=8, causal=True), ours
              | {"hints": tiling(128, 128, hints=True), "ahead 2": tiling(128, 128, ahead=2), "ahead 4": tiling(128, 128, ahead=4),
                 "ahead 4, hints": tiling(128, 128, ahead=4, hints=True), "heads 8": Variant(heads=8)}, (), repeats=1),
        *_backwards(ours),
    ]


def _backwards(ours: dict[str, Variant]) -> list[Trial]:
    sums = {"sums": Variant(backward={"one_tile": False, "apart": True})}
    padded = {"padded": Variant(backward={"ragged": False})}
    return [
        Trial("CLIP text back", Want(head_dim=64, seqlen_q=77, batch=512, num_heads=8, causal=True, backward=True), ours | sums,
              ("cuDNN", "efficient")),
        Trial("MSA columns back", Want(head_dim=32, seqlen_q=128, batch=256, num_heads=8, backward=True), ours),
        Trial("SD text back", Want(head_dim=40, seqlen_q=4096, seqlen_k=77, batch=16, num_heads=8, backward=True), ours | sums),
        Trial("ViT back", Want(head_dim=64, seqlen_q=197, batch=256, num_heads=12, backward=True), ours | padded),
        Trial("CLIP 224 back", Want(head_dim=64, seqlen_q=257, batch=64, backward=True), ours | padded),
        Trial("CLIP 336 back", Want(head_dim=64, seqlen_q=577, batch=32, backward=True), ours | padded),
        Trial("Whisper back", Want(head_dim=64, seqlen_q=1500, batch=16, num_heads=20, backward=True), ours
              | {"ragged": Variant(backward={"ragged": True})}),
        Trial("SD 16 back", Want(head_dim=160, seqlen_q=256, batch=32, num_heads=8, backward=True), ours),
        Trial("Flux back", Want(seqlen_q=4608, batch=1, num_heads=24, backward=True), ours),
        Trial("Llama 64k back", Want(seqlen_q=65536, batch=1, num_heads=32, num_heads_k=8, causal=True, backward=True), ours
              | {"down": Variant(backward={"down": True})}, (), repeats=1),
        Trial("D64 512 back", Want(head_dim=64, seqlen_q=512, batch=32, num_heads=32, backward=True), ours),
    ]


TRIALS = {trial.name: trial for trial in _trials()}
