"""Problems without sequences, rows, keys or heads, with each feature: no kernel may count on an element that is not there.

Kernels cut an index of a caller's array to its last element, and give rows of no sequence what the last sequence has. So the launches of
every family are checked for arrays that have none; the kernels on plain threads run (emulator.py), with everything at once.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import UnsupportedError, gpu
from fastattn.gpu.flex.launch import bitmap
from fastattn.gpu.precompile import absent_device
from fastattn.gpu.spec import BackwardCall, make_spec
from tests.fuzz import judge
from tests.fuzz.found import FOUND
from tests.fuzz.inputs import make
from tests.fuzz.spec import Spec
from tests.tools.gpu.checking import Checking, first_tilings
from tests.tools.gpu.drawn import calls
from tests.tools.gpu.interpreted import Interpreted, on_ptx, on_threads

DENSE: tuple[dict[str, Any], ...] = (
    {"batch": 0, "seqlen_q": 5, "seqlen_k": 7}, {"num_heads": 0, "seqlen_q": 5, "seqlen_k": 7}, {"seqlen_q": 0, "seqlen_k": 7},
    {"seqlen_q": 5, "seqlen_k": 0}, {"seqlen_q": 0, "seqlen_k": 0})
PACKED: tuple[dict[str, Any], ...] = (
    *({"lengths_q": (), "lengths_k": (), "spare": spare} for spare in ((0, 0), (3, 0), (0, 5), (3, 5))),
    {"lengths_q": (), "lengths_k": (), "spare": (3, 5), "used_k": (), "beyond": (7, 9)},
    {"lengths_q": (0, 0), "lengths_k": (0, 0), "spare": (3, 5)}, {"lengths_q": (0, 0), "lengths_k": (4, 3), "used_k": (0, 2)},
    {"lengths_q": (3, 0), "lengths_k": (0, 4)}, {"lengths_q": (3, 2), "lengths_k": (0, 0), "spare": (3, 0)},
    {"lengths_q": (2,), "lengths_k": (3,), "num_heads": 0})


def features(s: Spec) -> Iterator[dict[str, Any]]:
    """Each alone, in the shapes that it may have, and what goes together."""
    full = s.full
    shapes = (full, full[2:], (1, full[3]), (full[2], 1), (1, 1, 1, 1), ())
    yield {}
    for shape in shapes:
        yield {"bias": shape, "bias_dtype": s.dtype, "need_dbias": True}
        yield {"mask": shape, "mask_density": 0.5}
    yield from ({"alibi": "heads"}, {"alibi": "batch"}, {"sinks": "normal"}, {"dropout_p": 0.3, "dropout_seed": 5}, {"softcap": 5.0},
                {"window": (1, 2)}, {"causal": True}, {"out_dtype": "float32"} if s.dtype != "float32" else {}, {"deterministic": True})
    each = tuple(1 for _ in s.lengths_q) if s.lengths_q is not None else 1
    yield from ({"diagonal": each, "causal": True}, {"diagonal": each, "alibi": "batch", "window": (3, 3)})
    yield from ({"score_mod": name, "need_dcaptured": True} for name in ("relative", "capped"))
    yield from ({"score_mod": "positive"}, {"mask_mod": "document"}, {"mask_mod": "chosen", "block_mask": "function"})
    yield from ({"block_mask": "blocks", "seed": seed} for seed in (1, 2, 4))       # one plane of blocks, one for each head
    yield everything(s)


def everything(s: Spec) -> dict[str, Any]:
    return {"bias": s.full, "mask": s.full, "alibi": "batch", "sinks": "normal", "dropout_p": 0.3, "dropout_seed": 5, "window": (3, 4),
            "score_mod": "relative", "mask_mod": "document", "block_mask": "blocks", "need_dbias": True, "need_dcaptured": True}


def problems(dtype: str) -> Iterator[Spec]:
    for sizes in (*DENSE, *PACKED):
        plain = Spec(**{"seed": 3, "dtype": dtype, "num_heads": 2, "num_heads_k": 1, "head_dim": 16, "head_dim_v": 16, "backward": True,
                        "dlse": True, "hidden": "nan", "library": "torch", **sizes})
        for more in features(plain):
            yield replace(plain, **more)


def check(spec: Spec, family: str) -> int:
    """How many kernels the problem's calls launch."""
    launcher = Checking(absent_device("sm_90a"))
    for call in calls(make(spec)):
        if isinstance(call, BackwardCall) or 0 not in call.out.shape:           # as gpu.forward
            try:
                gpu._launch(call, launcher, (family,), 0)
            except UnsupportedError:
                continue
    return len(launcher.sources)


@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_launches(family: str) -> None:
    launched = 0
    with first_tilings():
        for dtype in ("float16", "float32"):
            for spec in problems(dtype):
                try:
                    launched += check(spec, family)
                except Exception as error:
                    error.add_note(str(spec))
                    raise
    assert launched > 300, launched


def complaints(spec: Spec, machine: Any) -> tuple[list[str], set[str]]:
    """What is wrong, and the kernels that ran."""
    with judge.poisoned_results(), machine as engine:
        return judge.complaints(spec, Interpreted(engine)), {key.split()[0] for key in engine.launched}


RUN = PACKED[4], PACKED[6], PACKED[8]


@pytest.mark.parametrize("sizes", [*DENSE, *RUN], ids=str)
def test_numbers(sizes: dict[str, Any]) -> None:
    """On plain threads, with everything at once."""
    plain = Spec(**{"seed": 3, "head_dim": 4, "head_dim_v": 4, "backward": True, "hidden": "nan", "library": "torch", **sizes})
    assert complaints(replace(plain, **everything(plain)), on_threads())[0] == []


def test_numbers_of_a_diagonal_for_each() -> None:
    plain = Spec(seed=3, head_dim=4, head_dim_v=4, hidden="nan", library="torch", **PACKED[3])
    assert complaints(replace(plain, diagonal=(), causal=True, alibi="batch"), on_threads()) == ([], {"plan_packed", "forward_simt"})


def test_found() -> None:
    """The kernel of sm80 for a problem whose kernel of sm90 read at address 0."""
    [spec] = [spec for spec in FOUND if spec.lengths_q == () and spec.block_mask == "blocks"]
    assert complaints(spec, on_ptx("sm80")) == ([], {"plan_packed", "forward_sm80"})


def test_few_rows_before_all_keys() -> None:
    """The limit of keys is a negative number, which the split-key kernel loads into a register of 64 bits."""
    spec = Spec(seed=1, dtype="float16", num_heads=2, num_heads_k=2, seqlen_q=4, seqlen_k=317, head_dim=64, head_dim_v=64, causal=True,
                library="torch")
    for diagonal in (-3, -1000):
        assert complaints(replace(spec, diagonal=diagonal), on_ptx("sm80")) == ([], {"forward_decode"})


def test_a_bitmap_has_room_for_lengths_beyond_the_longest() -> None:
    """Lengths are on the device: a sequence may have all keys, whatever max_seqlen_k is. Kernels read the words of its tiles."""
    spec = Spec(seed=1, num_heads=2, dtype="float16", lengths_q=(1, 3), lengths_k=(20, 3000), spare=(0, 2000), head_dim=16, head_dim_v=16,
                mask_mod="heads", library="torch")
    (call,), launcher = calls(make(spec)), Sizes(absent_device("sm_80"))
    call = replace(call, problem=replace(call.problem, seqlen_k=20))
    with first_tilings(), bitmap(call, make_spec(call.problem, call.operands, True), 64, 32, launcher, 0) as values:
        _, words, lines, _, by_head, _ = values
    last = 8 * (by_head + words * (lines - 1))          # where the last line of the last head begins
    assert launcher.sizes == [last + 8 * -(-5020 // (32 * 32))]


class Sizes(Checking):
    def __init__(self, device: Any) -> None:
        super().__init__(device)
        self.sizes = list[int]()

    def temporary(self, size: int, stream: int) -> Any:
        self.sizes.append(size)
        return super().temporary(size, stream)
