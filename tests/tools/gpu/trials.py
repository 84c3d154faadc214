"""Calls of variants.py, and the ways to run them. docs/log-gpu.md has what else was tried."""
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
    """What is chosen now beside what was, or nearly was."""
    ours = {"now": Variant()}
    plain, rows, small = tiling(128, 128), tiling(192, 128), tiling(64, 64, 3)
    apart = {"one_tile": False, "pair": False, "apart": True}
    sums = {"sums": Variant(backward=apart), "split": Variant(backward=apart | {"split": True, "halves": False})}
    one: dict[str, Any] = {"tiles": 1, "block_n": 64, "stages": 1}
    return [
        Trial("DiT", Want(head_dim=72, seqlen_q=256, batch=128), ours | {"192x112": tiling(192, 112, out_panels=1)}),
        Trial("SigLIP", Want(head_dim=72, seqlen_q=729, batch=32), ours | {"128x128": plain, "panels": tiling(192, 112, out_panels=1)}),
        Trial("SigLIP packed", Want(head_dim=72, seqlen_q=1024, batch=32, packed=True), ours | {"128x128": plain}, (),
              [729] * 16 + [500, 1018] * 8),
        Trial("ViT", Want(head_dim=64, seqlen_q=197, batch=256, num_heads=12), ours | {"128x128": plain, "64x64/3": small}),
        Trial("CLIP 224", Want(head_dim=64, seqlen_q=257, batch=64), ours | {"192x128": rows, "128x48/2": tiling(128, 48, 2)}),
        Trial("D64 512", Want(head_dim=64, seqlen_q=512, batch=32, num_heads=32), ours | {"192x128": rows}),
        Trial("D64 1024 causal", Want(head_dim=64, seqlen_q=1024, batch=16, num_heads=32, causal=True), ours | {"128x128": plain}),
        Trial("gpt-oss", Want(head_dim=64, seqlen_q=8192, batch=1, num_heads=64, num_heads_k=8, window=(127, 0), causal=True,
                              sinks="float32"), ours | {"192x128": rows}),
        Trial("AF3 atoms", Want(head_dim=32, seqlen_q=32, seqlen_k=128, batch=640, num_heads=4, bias="bfloat16"), ours
              | {"64x64/4": Variant(sm80=ForwardSm80Config(warps=4, blocks_per_sm=4, **one))}, ("cuDNN", "efficient")),
        Trial("Llama 64k", Want(seqlen_q=65536, batch=1, num_heads=32, num_heads_k=8, causal=True), ours
              | {"128 keys": plain, "heads 4": Variant(heads=4)}, (), repeats=1),
        Trial("CLIP text back", Want(head_dim=64, seqlen_q=77, batch=512, num_heads=8, causal=True, backward=True), ours
              | {"sums": Variant(backward={"one_tile": False, "apart": True})}, ("cuDNN", "efficient")),
        Trial("ViT back", Want(head_dim=64, seqlen_q=197, batch=256, num_heads=12, backward=True), ours | sums),
        Trial("D64 256 causal back", Want(head_dim=64, seqlen_q=256, batch=128, causal=True, backward=True), ours | sums),
        Trial("D64 256 back", Want(head_dim=64, seqlen_q=256, batch=128, backward=True), ours | sums),
        Trial("SD 16 back", Want(head_dim=160, seqlen_q=256, batch=32, num_heads=8, backward=True), ours
              | {"80 keys": Variant(dq=DqSm90Config(block_n=80, stages=3, stages_v=1))}),
    ]


TRIALS = {trial.name: trial for trial in _trials()}
