"""Problems that people have: the attention of published models, and each problem's source. `python -m bench workloads`.

A workload is one problem by name. "training" measures its forward and its backward, "inference" the forward. Shapes are
those of one layer on one GPU: (batch, heads, seqlen, head_dim); heads (32, 8) are 32 query heads over 8 key heads.
Batches are chosen so that a call fills the GPU, where the model leaves them open. Sequences of padded or packed batches
have random lengths, the same in every run.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..arrays import ITEMSIZE
from ..case import Case
from .check import CHUNK
from .rivals import MOST_SCORES
from .worker import Budget

Use = Literal["training", "inference"]
TORCH = ("cuDNN", "flash", "efficient", "math")
BUDGET = Budget(rounds=7, turn=0.004)
MINUTES = 10.0
GROUPS = {"masks": "boolean masks and key padding", "biases": "additive biases and ALiBi", "float32": "float32",
          "head_dim 512": "head_dim above 256", "causal": "causal, long, grouped heads", "small": "small calls, from call to call",
          "decode": "one to eight queries over a cache", "grid": "like the grid: no mask, other lengths and head_dims"}
DOCUMENTS = tuple(int(n) for n in np.random.default_rng(1).integers(128, 4096, 8, endpoint=True))
IMAGES = tuple(int(n) for n in np.random.default_rng(2).integers(128, 1024, 32, endpoint=True))


@dataclass(frozen=True, slots=True)
class Workload:
    """A named problem: its group, what it is from, whether it is trained, and the forward's case."""

    name: str
    use: Use
    source: str
    case: Case

    def cases(self) -> Iterator[Case]:
        """The forward; for training the backward too, and the backward with dbias if the bias is learned."""
        forward = replace(self.case, need_dbias=False)
        yield forward
        if self.use == "training":
            backward = replace(forward, backward=True, alone=True)
            yield backward
            if self.case.need_dbias:
                yield replace(backward, need_dbias=True)


def _work(group: str, name: str, use: Use, source: str, batch: int, heads: int | tuple[int, int], seqlen: int, head_dim: int,
          dtype: str = "bfloat16", **more: Any) -> Workload:
    num_heads, num_heads_k = heads if isinstance(heads, tuple) else (heads, 0)
    rivals = ("FA4", "varlen_attn") if more.get("lengths") else (*TORCH, "FA4")
    case = Case(group, batch, num_heads, seqlen, head_dim, dtype=dtype, num_heads_k=num_heads_k, against=rivals, title=name, source=source,
                wall=group == "small", **more)
    return Workload(name, use, source, case)


def workloads() -> list[Workload]:
    """All of them, group by group."""
    return [*_masks(), *_biases(), *_float32(), *_wide(), *_causal(), *_small(), *_decode(), *_grid()]


def _masks() -> Iterator[Workload]:
    def one(*args: Any, kind: str, **more: Any) -> Workload:
        return _work("masks", *args, mask=True, mask_kind=kind, **more)

    yield one("documents in one row, boolean mask", "training",
              "packed pretraining through SDPA; document masks as in Llama 3 (2407.21783)", 1, 16, 4096, 128, kind="documents")
    yield one("a boolean mask of any shape", "training", "no model: nine pairs of ten at random, so no tile is empty", 1, 16, 4096, 128,
              kind="random")
    yield one("BERT-base, padded", "training", "BERT (1810.04805): 12 heads, head_dim 64, 512 tokens", 64, 12, 512, 64, kind="padding")
    yield one("MiniLM-L6, padded", "inference", "sentence-transformers/all-MiniLM-L6-v2: 12 heads, head_dim 32, 128 tokens",
              512, 12, 128, 32, kind="padding")
    yield one("ESM-2 650M, padded", "training", "ESM-2 (Lin et al. 2023): 20 heads, head_dim 64, 1024 residues", 16, 20, 1024, 64,
              kind="padding")
    yield one("wav2vec 2.0 large, padded", "training", "wav2vec 2.0 (2006.11477): 16 heads, head_dim 64, 15 s are 749 frames",
              16, 16, 749, 64, kind="padding")
    yield one("DETR cross-attention, padded image", "training",
              "DETR (2005.12872): 8 heads, head_dim 32, 100 queries over 25 x 34 cells", 16, 8, 100, 32, seqlen_k=850, kind="padding")
    yield one("Llama 3.2 1B, padded on the left", "inference",
              "Llama 3.2 1B: 32 over 8 heads, head_dim 64; transformers' batched generation", 8, (32, 8), 2048, 64, kind="left")
    yield one("PaliGemma, prefix mask", "training",
              "PaliGemma (2407.07726) on Gemma 2B: 8 over 1 heads, head_dim 256, 256 image tokens first",
              8, (8, 1), 1280, 256, kind="prefix")


def _biases() -> Iterator[Workload]:
    def one(*args: Any, **more: Any) -> Workload:
        return _work("biases", *args, bias=True, **more)

    yield one("T5-base encoder", "training", "T5 (1910.10683): 12 heads, head_dim 64, 512 tokens, a learned bias of relative positions",
              32, 12, 512, 64, need_dbias=True)
    yield one("Swin-B, stage 3", "training", "Swin (2103.14030): 16 heads, head_dim 32, windows of 7 x 7, 4 in an image",
              256, 16, 49, 32, need_dbias=True)
    yield one("Swin-B, stage 1, shifted windows", "inference", "Swin (2103.14030): 4 heads; the mask of shifted windows is in the bias",
              2048, 4, 49, 32, bias_batch=True)
    yield one("Swin-L 384, stage 3", "training", "Swin (2103.14030): 24 heads, head_dim 32, windows of 12 x 12", 128, 24, 144, 32)
    yield one("SAM ViT-B, global layer", "training",
              "Segment Anything (2304.02643): 12 heads, head_dim 64, 64 x 64 patches, a bias per image", 1, 12, 4096, 64, bias_batch=True)
    yield one("SAM ViT-H, windows", "inference", "Segment Anything (2304.02643): 16 heads, head_dim 80, 25 windows of 14 x 14",
              25, 16, 196, 80, bias_batch=True)
    yield one("AlphaFold 2, triangle attention", "training",
              "AlphaFold 2 (Jumper et al. 2021), algorithm 13: 4 heads, head_dim 32, 384 residues", 384, 4, 384, 32, need_dbias=True)
    yield one("AlphaFold 2, triangle attention, padded", "training", "AlphaFold 2, algorithm 13 with its mask, as OpenFold crops",
              384, 4, 384, 32, mask=True, mask_kind="padding")
    yield one("AlphaFold 2, template pair stack", "inference", "AlphaFold 2, algorithm 16: 4 heads, head_dim 16", 256, 4, 256, 16)
    yield one("Evoformer, MSA rows", "training", "AlphaFold 2, algorithm 7: 8 heads, head_dim 32, 128 sequences of 256 residues",
              128, 8, 256, 32, need_dbias=True)
    yield one("AlphaFold 3, diffusion transformer", "inference",
              "AlphaFold 3 (Abramson et al. 2024), algorithm 24: 16 heads, head_dim 48", 5, 16, 768, 48)
    yield one("AlphaFold 3, atoms", "inference", "AlphaFold 3, algorithm 7: 4 heads, head_dim 32, 32 atoms over 128 neighbours",
              640, 4, 32, 32, seqlen_k=128, bias_batch=True)
    yield _work("biases", "MPT-7B", "training", "MPT-7B: 32 heads, head_dim 128, 2048 tokens, ALiBi (2108.12409)",
                     2, 32, 2048, 128, causal=True, alibi=True)


def _float32() -> Iterator[Workload]:
    def one(*args: Any, **more: Any) -> Workload:
        return _work("float32", *args, dtype="float32", **more)

    yield one("Pythia 410M, float32", "training", "Pythia (2304.01373): 16 heads, head_dim 64, 2048 tokens",
              4, 16, 2048, 64, causal=True)
    yield one("16 heads of 128, float32", "training", "no model: the shape of Pythia 1.4B's heads without its mask", 8, 16, 1024, 128)
    yield one("BERT-base, padded, float32", "training", "BERT (1810.04805), fine-tuned in float32 on 128 tokens",
              64, 12, 128, 64, mask=True, mask_kind="padding")
    yield one("VAE of SDXL, float32", "inference",
              "SDXL (2307.01952): the decoder's middle block, 1 head of 512, which overflows float16", 1, 1, 4096, 512)


def _wide() -> Iterator[Workload]:
    def one(*args: Any, **more: Any) -> Workload:
        return _work("head_dim 512", *args, **more)

    yield one("VAE of Stable Diffusion", "inference",
              "latent diffusion (2112.10752): the decoder's middle block, 1 head of 512, 64 x 64 cells", 4, 1, 4096, 512)
    yield one("head_dim 512, causal", "training", "no model: the largest head_dim that fastattn has", 2, 8, 2048, 512, causal=True)
    yield one("DeepSeek V3, absorbed MLA decode", "inference", "DeepSeek V3 (2412.19437): 128 heads over one latent of 512 + 64",
              32, (128, 1), 1, 576, seqlen_k=4096, head_dim_v=512, latent=True)


def _causal() -> Iterator[Workload]:
    def one(*args: Any, **more: Any) -> Workload:
        return _work("causal", *args, causal=True, **more)

    llama = "Llama 3.1 8B (2407.21783): 32 over 8 heads, head_dim 128"
    gpt_oss = "gpt-oss 20B: 64 over 8 heads, head_dim 64, sinks"
    yield one("Llama 3.1 8B, 8k", "training", llama, 2, (32, 8), 8192, 128)
    yield one("Llama 3.1 8B, 64k", "training", llama, 1, (32, 8), 65536, 128)
    yield one("Llama 3.1 8B, packed documents", "training", f"{llama}; 8 documents of 128 to 4096 tokens",
              len(DOCUMENTS), (32, 8), max(DOCUMENTS), 128, lengths=DOCUMENTS)
    yield one("Llama 3.1 8B, chunked prefill", "inference", f"{llama}; 2048 new tokens over 32k, as vLLM and SGLang serve",
              1, (32, 8), 2048, 128, seqlen_k=32768)
    yield one("Llama 3 70B, one of 8 GPUs", "inference", "Llama 3 70B: 64 over 8 heads, tensor parallel", 4, (8, 1), 8192, 128)
    yield one("Qwen 2.5 7B, 32k", "inference", "Qwen 2.5 (2412.15115): 28 over 4 heads, head_dim 128", 1, (28, 4), 32768, 128)
    yield one("Qwen 3 0.6B", "training", "Qwen 3 (2505.09388): 16 over 8 heads, head_dim 128", 8, (16, 8), 4096, 128)
    yield one("Mistral 7B v0.1", "training", "Mistral 7B (2310.06825): 32 over 8 heads, head_dim 128, a window of 4096",
              1, (32, 8), 16384, 128, window=4095)
    yield one("Gemma 2 9B, local layer", "training", "Gemma 2 (2408.00118): 16 over 8 heads, head_dim 256, softcap 50, a window of 4096",
              1, (16, 8), 8192, 256, window=4095, softcap=50.0)
    yield one("Gemma 3 12B, local layer", "inference", "Gemma 3 (2503.19786): 16 over 8 heads, head_dim 256, a window of 1024",
              1, (16, 8), 32768, 256, window=1023)
    yield one("gpt-oss 20B, local layer", "training", f"{gpt_oss}, a window of 128", 1, (64, 8), 8192, 64, window=127, sinks=True)
    yield one("gpt-oss 20B, full layer", "inference", gpt_oss, 1, (64, 8), 8192, 64, sinks=True)
    yield one("DeepSeek V3, MLA", "training", "DeepSeek V3 (2412.19437): 128 heads of 192 and 128", 1, 128, 4096, 192, head_dim_v=128)
    yield one("Phi-2", "training", "Phi-2: 32 heads, head_dim 80, 2048 tokens", 4, 32, 2048, 80)
    yield one("Phi-3 mini", "training", "Phi-3 mini (2404.14219): 32 heads, head_dim 96, 4096 tokens", 2, 32, 4096, 96)
    yield one("GPT-J 6B", "training", "GPT-J 6B: 16 heads, head_dim 256, 2048 tokens", 4, 16, 2048, 256)
    yield one("GPT-2, dropout", "training", "GPT-2: 12 heads, head_dim 64, 1024 tokens, dropout 0.1", 16, 12, 1024, 64, dropout_p=0.1)
    yield one("CLIP's text encoder", "training", "CLIP ViT-B/32 (2103.00020): 8 heads, head_dim 64, 77 tokens", 512, 8, 77, 64)


def _small() -> Iterator[Workload]:
    def one(*args: Any, **more: Any) -> Workload:
        return _work("small", *args, **more)

    yield one("64 tokens", "training", "no model: a call whose kernels take microseconds", 1, 8, 64, 64)
    yield one("nanoGPT, Shakespeare", "training", "nanoGPT's train_shakespeare_char: 6 heads, head_dim 64, 256 characters",
              64, 6, 256, 64, causal=True)
    yield one("BERT-base, one sentence", "inference", "BERT (1810.04805): 12 heads, head_dim 64", 1, 12, 128, 64)
    yield one("Llama 3.1 8B, one prompt of 1k", "training", "Llama 3.1 8B: 32 over 8 heads, head_dim 128; adapters tuned at batch 1",
              1, (32, 8), 1024, 128, causal=True)


def _decode() -> Iterator[Workload]:
    def one(name: str, source: str, batch: int, heads: int | tuple[int, int], keys: int, head_dim: int, queries: int = 1,
            **more: Any) -> Workload:
        return _work("decode", name, "inference", source, batch, heads, queries, head_dim, seqlen_k=keys, causal=queries > 1, **more)

    llama = "Llama 3.1 8B: 32 over 8 heads, head_dim 128"
    for keys in (1024, 8192, 65536):
        yield one(f"Llama 3.1 8B, decode over {keys // 1024}k", llama, 1, (32, 8), keys, 128)
    yield one("Llama 3.1 8B, 16 requests over 8k", llama, 16, (32, 8), 8192, 128)
    yield one("Llama 3.1 8B, speculative decode", f"{llama}; 8 draft tokens verified in one call (2211.17192)",
              32, (32, 8), 8192, 128, queries=8)
    yield one("Phi-3 mini, 16 requests over 8k", "Phi-3 mini (2404.14219): 32 heads, head_dim 96", 16, 32, 8192, 96)
    yield one("Gemma 3 12B, 16 requests over 8k", "Gemma 3 (2503.19786): 16 over 8 heads, head_dim 256", 16, (16, 8), 8192, 256)
    yield one("MPT-7B-8k, 16 requests over 8k", "MPT-7B-8k: 32 heads, head_dim 128, ALiBi", 16, 32, 8192, 128, alibi=True)
    yield one("gpt-oss 20B, 32 requests over 8k", "gpt-oss 20B: 64 over 8 heads, head_dim 64, sinks", 32, (64, 8), 8192, 64, sinks=True)
    yield one("Whisper large, decoder over the audio", "Whisper large (2212.04356): 20 heads, head_dim 64, 1500 frames",
              16, 20, 1500, 64)


def _grid() -> Iterator[Workload]:
    def one(*args: Any, **more: Any) -> Workload:
        return _work("grid", *args, **more)

    vit, sd = "ViT (2010.11929)", "Stable Diffusion 1.5 (2112.10752), with guidance: 8 heads"
    yield one("ViT-B/16, 224", "training", f"{vit}: 12 heads, head_dim 64, 197 tokens", 256, 12, 197, 64)
    yield one("CLIP ViT-L/14, 224", "training", "CLIP (2103.00020): 16 heads, head_dim 64, 257 tokens", 64, 16, 257, 64)
    yield one("CLIP ViT-L/14, 336", "training", "CLIP (2103.00020), LLaVA's encoder: 577 tokens", 32, 16, 577, 64)
    yield one("OpenCLIP ViT-H/14", "training", "OpenCLIP (2212.07143): 16 heads, head_dim 80, 257 tokens", 64, 16, 257, 80)
    yield one("SigLIP So400m", "training", "SigLIP (2303.15343): 16 heads, head_dim 72, 729 tokens", 32, 16, 729, 72)
    yield one("SigLIP So400m, images packed", "inference", "NaViT (2307.06304): images of 128 to 1024 patches in one row",
              len(IMAGES), 16, max(IMAGES), 72, lengths=IMAGES)
    yield one("DINOv2 ViT-g/14, 518", "training", "DINOv2 (2304.07193): 24 heads, head_dim 64, 1370 tokens", 8, 24, 1370, 64)
    yield one("DiT-XL/2", "training", "DiT (2212.09748): 16 heads, head_dim 72, 256 tokens", 128, 16, 256, 72)
    yield one("Whisper large, encoder", "training", "Whisper large (2212.04356): 20 heads, head_dim 64, 1500 frames", 16, 20, 1500, 64)
    yield one("ModernBERT-base, local layer", "inference", "ModernBERT (2412.13663): 12 heads, head_dim 64, 64 tokens on both sides",
              4, 12, 8192, 64, window=64)
    yield one("Evoformer, MSA columns", "inference", "AlphaFold 2, algorithm 8: 8 heads, head_dim 32", 256, 8, 128, 32)
    yield one("Stable Diffusion 1.5, 64 x 64", "training", f"{sd}, head_dim 40", 8, 8, 4096, 40)
    yield one("Stable Diffusion 1.5, 32 x 32", "training", f"{sd}, head_dim 80", 16, 8, 1024, 80)
    yield one("Stable Diffusion 1.5, 16 x 16", "training", f"{sd}, head_dim 160", 32, 8, 256, 160)
    yield one("Stable Diffusion 1.5, over the text", "inference", f"{sd}, head_dim 40, 77 text tokens", 16, 8, 4096, 40, seqlen_k=77)
    yield one("SDXL, 64 x 64", "inference", "SDXL (2307.01952): 10 heads, head_dim 64", 4, 10, 4096, 64)
    yield one("Flux.1, 1024 x 1024", "training", "Flux.1: 24 heads, head_dim 128, 4096 + 512 tokens", 1, 24, 4608, 128)
    yield one("CogVideoX-2B, 480p", "inference", "CogVideoX (2408.06072): 30 heads, head_dim 64, 17550 + 226 tokens", 1, 30, 17776, 64)
    yield one("Wan 2.1 1.3B, 480p", "inference", "Wan 2.1 (2503.20314): 12 heads, head_dim 128, 81 frames are 32760 tokens",
              1, 12, 32760, 128)


# ---------------------------------------------------------------- what is measured, and how long that takes
def choose(only: str | None, skip: tuple[str, ...] = ()) -> list[Case]:
    """Cases whose name contains the regular expression `only`, without the rivals in `skip`. SystemExit if there are none."""
    chosen = [replace(case, against=tuple(name for name in case.against if name not in skip))
              for work in workloads() for case in work.cases() if only is None or re.search(only, case.name)]
    if not chosen:
        raise SystemExit(f"no workload has a name that matches {only!r}")
    return chosen


def kernels(case: Case) -> tuple[object, ...]:
    """What the compilers tell apart: cases with the same key share compiled kernels, or almost."""
    return (case.head_dim, case.head_dim_v, case.dtype, case.passes, case.features, bool(case.lengths), case.few_queries,
            bool(case.num_heads_k))


def compile_seconds(case: Case) -> float:
    """About how long one process compiles a case. FlashAttention-4 takes half a minute where it has the features."""
    unknown = {"alibi", "bias", "mask", "dropout"}.intersection(case.features) or case.dtype == "float32" or case.head_dim > 256
    return 8.0 + (25.0 if "FA4" in case.against and not unknown else 0.0)


def split(chosen: Sequence[Case], jobs: int) -> list[list[Case]]:
    """At most `jobs` parts, for one process each, that compile about equally long. Cases that share kernels stay together."""
    shared: dict[tuple[object, ...], list[Case]] = {}
    for case in chosen:
        shared.setdefault(kernels(case), []).append(case)
    parts: list[list[Case]] = [[] for _ in range(jobs)]
    loads = [0.0] * jobs
    for group in sorted(shared.values(), key=lambda cases: -compile_seconds(cases[0])):
        least = loads.index(min(loads))
        parts[least] += group
        loads[least] += compile_seconds(group[0])
    return [part for part in parts if part]


def gigabytes(case: Case) -> float:
    """About the most device memory of a case beside the check: inputs, results, float32 sums, a bias or mask and what SDPA
    makes of it, stored scores."""
    query_rows = sum(case.lengths) or case.batch * case.seqlen
    key_rows = sum(case.lengths) or case.batch * case.shape_k[2]
    rows = query_rows * case.num_heads * (case.head_dim + case.shape_v[3])
    arrays = rows + key_rows * case.shape_k[1] * (case.head_dim + case.shape_v[3])
    pairs = 0 if case.lengths else case.seqlen * case.shape_k[2]
    added = pairs * (case.num_heads * (case.batch if case.bias_batch or case.mask else 1) if case.bias or case.alibi else 0)
    hidden = pairs * (case.batch if case.mask_kind == "left" else 1) if case.mask or case.window else 0
    scores = 8 * case.batch * case.num_heads * pairs
    stored = 2 * scores if "math" in case.against and scores <= MOST_SCORES else 0
    copies = 3 * ITEMSIZE[case.dtype] + 8 if case.alone else 2 * ITEMSIZE[case.dtype]
    return (arrays * copies + added * 12 + hidden * 4 + stored) / 1e9


CHECK_GIGABYTES = 6 * 8 * CHUNK / 1e9       # of a chunk of the check: scores in float64, and what autograd keeps of them


def seconds(chosen: Sequence[Case], jobs: int = 16) -> float:
    """An estimate of the whole run on one H200: processes start and compile at once, then cases are measured one after the other."""
    parts = [{kernels(case): case for case in part}.values() for part in split(chosen, jobs)]
    compiling = max(sum(map(compile_seconds, part)) for part in parts)
    return 20.0 + compiling + sum(map(_seconds, chosen))


def _seconds(case: Case) -> float:
    """Of one case: rounds of all implementations at 200 TFLOP/s (15 in float32) and 2 TB/s, the queue's head start, and the check."""
    call = case.flops / (15e12 if case.dtype == "float32" else 200e12) + case.kv_bytes / 2e12 + 50e-6
    turn = max(BUDGET.turn, call) + min(0.02, 64 * 50e-6)
    group = case.num_heads // case.shape_k[1]
    scores = 2 * group * (max(case.lengths) ** 2 if case.lengths else case.seqlen * case.shape_k[2])
    return (1 + len(case.against)) * (BUDGET.rounds + 3) * turn + (3 if case.alone else 2) * scores * 8 * 12 / 3e12 + 0.3
