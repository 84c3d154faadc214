"""FlashAttention-4's calls of `bench flex` (bench/flex_fa4.py) with a stand-in of its package: they mean what ours do.

The stand-in has the parameters of flash_attn.cute 4.0.0b36 and computes with torch. It calls a score_mod with vectors of two scores, of one
beside auxiliary tensors, and a mask_mod with vectors of one, by the names and in the order of that version.
"""
from __future__ import annotations

import importlib.machinery
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from bench import __main__ as command  # noqa: E402
from bench import flex, flex_fa4  # noqa: E402

SHAPE = (1, 16, 2, 8)
KINDS = ["causal", "ALiBi", "softcap", "learned table", "sliding", "document", "prefix-LM", "NATTEN 13 x 13"]


class Registers:
    """cute.make_rmem_tensor: numbers of a thread."""

    def __init__(self, size: int, dtype: Any) -> None:
        self.numbers = torch.zeros(size, dtype=dtype)

    def __setitem__(self, n: int, x: Any) -> None:
        self.numbers[n] = x

    def load(self) -> Any:
        return self.numbers


def scalar_to_ssa(x: Any, dtype: Any) -> Any:
    return torch.full((1,), int(x), dtype=dtype)


def vector(x: Any) -> Any:
    return torch.as_tensor(x).reshape(-1)


class Auxiliary:
    """An auxiliary tensor as a kernel has it."""

    def __init__(self, x: Any) -> None:
        self.x, self.element_type = x, x.dtype

    def __getitem__(self, at: Any) -> Any:
        return self.x[tuple(int(n) for n in at) if isinstance(at, tuple) else int(at)]


def flash_attn_func(q: Any, k: Any, v: Any, *, causal: bool = False, window_size: tuple[int | None, int | None] = (None, None),
                    softcap: float = 0.0, score_mod: Any = None, mask_mod: Any = None, aux_tensors: Any = None,
                    block_sparse_tensors: Any = None) -> tuple[Any, None]:
    aux, (_, n, heads, dim) = [Auxiliary(x) for x in aux_tensors or ()], q.shape
    size = 1 if aux_tensors else 2
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    seen = torch.ones(n, n, dtype=torch.bool)
    left, right = (None, 0) if causal else window_size
    apart = torch.arange(n)[:, None] - torch.arange(n)
    seen &= (apart >= (-n if right is None else -right)) & (apart <= (n if left is None else left))
    for head in range(heads):
        for row in range(n):
            for key in range(0, n, size) if score_mod else ():
                at = [vector([x] * size) for x in (0, head)]
                keys = slice(key, key + size)
                s[0, head, row, keys] = score_mod(s[0, head, row, keys], *at, q_idx=vector([row] * size),
                                                  kv_idx=vector(range(key, key + size)), seqlen_info=None, aux_tensors=aux)
    masked = torch.stack([seen] * heads)
    if mask_mod is not None:
        assert block_sparse_tensors == ((128, 128), (1, 1, n, n), mask_mod, aux_tensors), "the blocks of that mask"
        for head, row, key in torch.cartesian_prod(torch.arange(heads), torch.arange(n), torch.arange(n)).tolist():
            masked[head, row, key] &= bool(mask_mod(vector(0), vector(head), vector(row), vector(key), None, aux)[0])
    p = torch.where(masked, s, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), None


def compute_block_sparsity(tile_m: int, tile_n: int, batch_size: int, num_heads: int, seqlen_q: int, seqlen_k: int,
                           mask_mod: Callable[..., Any], aux_tensors: Any, device: Any) -> Any:
    assert torch.device(device).type == "cpu"
    return (tile_m, tile_n), (batch_size, num_heads, seqlen_q, seqlen_k), mask_mod, aux_tensors


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)
        return made
    math_of_cute = types.SimpleNamespace(exp2=torch.exp2)
    cute = module("cutlass.cute", jit=lambda function: function, math=math_of_cute, make_rmem_tensor=Registers)
    module("cutlass", cute=cute, Float32=torch.float32)
    parts = {"interface": {"flash_attn_func": flash_attn_func},
             "compute_block_sparsity": {"compute_block_sparsity": compute_block_sparsity}, "utils": {"scalar_to_ssa": scalar_to_ssa}}
    found = {name: module(f"flash_attn.cute.{name}", **members) for name, members in parts.items()}
    module("flash_attn", cute=module("flash_attn.cute", **found))
    yield


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_the_formula(name: str) -> None:
    [kind] = [kind for kind in flex.kinds(SHAPE[1], SHAPE[2], "cpu") if kind.name == name]
    case = flex.Case(kind, SHAPE, "float32", "cpu", False)
    assert case.error(flex_fa4.call(name, False, case.q, case.k, case.v, kind.numbers)()) < 1e-5
    other = flex_fa4.Numbers(**{**vars(kind.numbers), "window": 2, "prefix": 9, "side": 2, "cap": 0.1, "table": 3 - kind.numbers.table,
                                "document": 0 * kind.numbers.document, "heads": 9})
    if name != "causal":
        assert case.error(flex_fa4.call(name, False, case.q, case.k, case.v, other)()) > 1e-3


def test_no_gradients_of_functions() -> None:
    for kind in flex.kinds(SHAPE[1], SHAPE[2], "cpu"):
        case = flex.Case(kind, SHAPE, "float32", "cpu", True)
        if kind.name in ("causal", "softcap", "sliding"):
            assert flex_fa4.call(kind.name, True, case.q, case.k, case.v, kind.numbers)().requires_grad
        else:
            with pytest.raises(NotImplementedError, match="its gradients of functions are functions of their own"):
                flex_fa4.call(kind.name, True, case.q, case.k, case.v, kind.numbers)


def test_a_row_has_its_time_and_says_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(flex_fa4, "missing", lambda device: None)
    [row] = flex.run("cpu", SHAPE, "float32", False, "causal", "reference", rounds=1)
    assert row.times["FA4"] and "FA4" not in row.note
    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.setattr(interface, "flash_attn_func", lambda q, k, v, **options: (0 * q, None))
    [row] = flex.run("cpu", SHAPE, "float32", False, "causal", "reference", rounds=1)
    assert "FA4 is WRONG by" in row.note
    [row] = flex.run("cpu", SHAPE, "float32", True, "ALiBi", "reference", rounds=1)
    assert "FA4: its gradients of functions" in row.note and "FA4" not in row.times


def test_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert flex_fa4.missing("cuda") is None and flex_fa4.missing("cpu") == "it needs a CUDA device"
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    assert flex_fa4.missing("cuda") == "not installed: flash_attn.cute"
    monkeypatch.setattr(flex, "run", lambda *arguments: iter(()))
    command.main(["flex", "--device", "cuda"])
    assert "no FA4: not installed: flash_attn.cute\n\n| kind |" in capsys.readouterr().out
