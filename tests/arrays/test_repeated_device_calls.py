"""Repeated calls on CUDA arrays without a GPU: from the third on the checks are skipped, and the engine is given the same."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import memo, registry, repeat
from fastattn.arrays import readers
from fastattn.arrays.view import View
from fastattn.memo import Recent
from fastattn.problem import Grads, Operands
from tests.tools.fake_cuda import Driver, Recorder
from tests.tools.fake_torch import Tensor

Q, K = (2, 6, 4, 8), (2, 9, 2, 8)


class Prepared(Recorder):
    """An engine that says what it launches, and records the calls that were checked in full."""

    def __init__(self) -> None:
        super().__init__()
        self.long = 0

    def forward(self, problem: Any, *where: Any) -> None:
        self.long += 1
        super().forward(problem, *where)

    def backward(self, problem: Any, *where: Any) -> None:
        self.long += 1
        self.calls.append((problem, *where))

    def prepare(self, problem: Any, o: Any, *results: Any) -> Any:
        def record(operands: Operands, views: list[Any], stream: int) -> None:
            self.calls.append((problem, operands, *views, stream))
        return self._run(o, results, record)

    def prepare_backward(self, problem: Any, o: Any, *where: Any) -> Any:
        *given, grads, deterministic = where

        def record(operands: Operands, views: list[Any], stream: int) -> None:
            self.calls.append((problem, operands, *views[:4], Grads(*views[4:]), stream, deterministic))
        return self._run(o, (*given, *grads), record)

    def _run(self, o: Any, others: Any, record: Any) -> Any:
        """A launch that records the views at the addresses that it is given."""
        names = o.__slots__
        forms = [x and (x.shape, x.strides, x.dtype, x.device) for x in (*[getattr(o, name) for name in names], *others)]

        def run(addresses: Any, stream: int) -> None:
            given = iter(addresses)
            views = [form and View(next(given), *form) for form in forms]
            assert next(given, None) is None
            record(Operands(*views[:len(names)]), views[len(names):], stream)
        return run


@pytest.fixture
def prepared(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    engine = Prepared()
    monkeypatch.setattr(repeat, "_known", Recent())
    monkeypatch.setattr(registry, "_runs", {(None, "cuda"): engine})
    return engine


def seen(call: Any) -> Any:
    """An engine's arguments as numbers: views without their owners."""
    if isinstance(call, View):
        return call.ptr, call.shape, call.strides, call.dtype, call.device
    if isinstance(call, Operands):
        return [seen(getattr(call, name)) for name in call.__slots__]
    return [seen(x) for x in call] if isinstance(call, tuple) else call


@pytest.mark.parametrize("keywords", [{}, {"return_lse": True}, {"layout": "bhsd"}, {"causal": True, "window": (3, None), "softcap": 2.0},
                                      {"dropout_p": 0.5, "seed": 3}])
def test_repeated_calls_skip_the_checks(torch_streams: dict[int, int], prepared: Prepared, keywords: dict[str, Any]) -> None:
    """The third equal call skips the checks. Engine and caller get the same
    as before, and the stream is the current one."""
    shapes = ((2, 4, 6, 8), (2, 2, 9, 8)) if keywords.get("layout") else (Q, K)
    for n in range(4):
        q, k, v = (Tensor(shape, ptr=ptr) for shape, ptr in zip((shapes[0], *shapes[1:] * 2), (0x1000, 0x2000, 0x3000), strict=True))
        result = fastattn.attention(q, k, v, **keywords)
        out, lse = result if keywords.get("return_lse") else (result, None)
        assert isinstance(out, Tensor) and (out.shape, out.dtype) == (q.shape, "bfloat16")
        assert lse is None or (lse.shape, lse.dtype) == ((2, 4, 6), "float32")
        assert prepared.long == min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
    torch_streams[0] = 0x60
    fastattn.attention(Tensor(shapes[0], ptr=0x5000), k, v, **keywords)
    assert prepared.long == 2 and prepared.calls[-1][1].q.ptr == 0x5000 and prepared.calls[-1][-1] == 0x60


@pytest.mark.parametrize("keywords", [{}, {"layout": "bhsd"}, {"causal": True, "softcap": 2.0}, {"deterministic": True},
                                      {"dlse": True, "dropout_p": 0.5, "seed": 3}, {"packed": True},
                                      {"packed": True, "used": True, "dlse": True}], ids=str)
def test_repeated_backwards_skip_the_checks(torch_streams: dict[int, int], prepared: Prepared, keywords: dict[str, Any]) -> None:
    """The same of backwards, dense and packed."""
    keywords = dict(keywords)
    packed, used, with_dlse = (keywords.pop(name, False) for name in ("packed", "used", "dlse"))
    if packed:
        q_shape, k_shape, lse_shape = (12, 4, 8), (18, 2, 8), (4, 12)
    else:
        q_shape, k_shape, lse_shape = *(((2, 4, 6, 8), (2, 2, 9, 8)) if keywords.get("layout") else (Q, K)), (2, 4, 6)

    def once(first: int, dlse: bool = with_dlse, **changed: Any) -> Any:
        shapes = (q_shape, q_shape, k_shape, k_shape, q_shape, lse_shape, lse_shape)
        dout, q, k, v, out, lse, x = (Tensor(shape, "float32" if shape == lse_shape else "bfloat16", ptr=first + 0x1000 * n)
                                      for n, shape in enumerate(shapes))
        more = (keywords | changed) | ({"dlse": x} if dlse else {})
        if not packed:
            return fastattn.attention_backward(dout, q, k, v, out, lse, **more)
        lengths = [Tensor((3,), "int32", ptr=first + 0x8000), Tensor((3,), "int32", ptr=first + 0x9000)]
        if used:
            more["seqused_k"] = Tensor((2,), "int32", ptr=first + 0xA000)
        return fastattn.attention_varlen_backward(dout, q, k, v, out, lse, *lengths, **more)
    for n in range(4):
        grads = once(0x100000)
        assert [(x.shape, x.dtype) for x in grads[:3]] == [(shape, "bfloat16") for shape in (q_shape, k_shape, k_shape)]
        assert type(grads) is Grads and grads.dbias is None and grads.dsinks is None
        assert prepared.long == min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
    torch_streams[0] = 0x60
    once(0x200000)
    assert prepared.long == 2 and prepared.calls[-1][-2] == 0x60 and prepared.calls[-1][1].k.ptr == 0x202000
    once(0x200000, dlse=not with_dlse)
    once(0x200000, deterministic=not keywords.get("deterministic", False))
    once(0x200008)                                          # aligned to less
    once(0x200000, softmax_scale=1.0)
    once(0x200000, stream=0x70)
    assert prepared.long == 7 and prepared.calls[-1][-2] == 0x70
    with pytest.raises(ValueError, match="need_dbias"):
        once(0x200000, need_dbias=True)
    once(0x300000)
    assert prepared.long == 7


OPERANDS = {"bias": ((1, 4, 6, 9), "bfloat16"), "mask": ((2, 1, 1, 9), "bool"), "alibi_slopes": ((4,), "float32"),
            "sinks": ((4,), "float32")}


@pytest.mark.parametrize("names", [("bias",), ("mask", "alibi_slopes"), ("sinks",), ("bias", "mask", "alibi_slopes", "sinks")], ids=str)
def test_repeated_calls_with_operands_of_scores(torch_streams: dict[int, int], prepared: Prepared, names: tuple[str, ...]) -> None:
    def once(first: int, leave_out: str = "", **more: Any) -> Any:
        operands = {name: Tensor(*OPERANDS[name], ptr=first + 0x1000 * n) for n, name in enumerate(OPERANDS)
                    if name in names and name != leave_out}
        q, k, v, out, lse = (Tensor(shape, kind, ptr=first + 0x10000 * n) for n, (shape, kind) in enumerate(
            ((Q, "bfloat16"), (K, "bfloat16"), (K, "bfloat16"), (Q, "bfloat16"), ((2, 4, 6), "float32")), start=1))
        if more:
            return fastattn.attention_backward(out, q, k, v, out, lse, **operands, **more)
        return fastattn.attention(q, k, v, **operands)
    for n in range(4):
        once(0x100000)
        assert prepared.long == min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
    once(0x200000)
    o = prepared.calls[-1][1]
    assert prepared.long == 2 and all((getattr(o, name) is not None) == (name in names) for name in OPERANDS)
    assert all(getattr(o, name).ptr == 0x200000 + 0x1000 * n for n, name in enumerate(OPERANDS) if name in names)
    once(0x200000, leave_out=names[0])
    assert prepared.long == 3
    prepared.calls.clear()
    wants = {"need_dbias": "bias" in names}
    for n in range(4):
        grads = once(0x100000, causal=False, **wants)
        assert prepared.long == 3 + min(n + 1, 2) and seen(prepared.calls[-1]) == seen(prepared.calls[0])
        assert (grads.dbias is not None) == ("bias" in names) and (grads.dsinks is not None) == ("sinks" in names)
        assert grads.dbias is None or (grads.dbias.shape, grads.dbias.dtype) == OPERANDS["bias"]
        assert grads.dsinks is None or (grads.dsinks.shape, grads.dsinks.dtype) == OPERANDS["sinks"]


def test_what_is_stored_is_aligned(torch_streams: dict[int, int], prepared: Prepared) -> None:
    """A launch for arrays that are aligned to less is not repeated for others, nor the other way round."""
    for n, ptr in enumerate((0x1000, 0x1008, 0x1000, 0x1008, 0x1000)):
        fastattn.attention(Tensor(Q, ptr=ptr), Tensor(K), Tensor(K))
        assert prepared.long == (n + 1 if n < 4 else 4)


def test_a_call_that_differs_is_checked_in_full(torch_streams: dict[int, int], prepared: Prepared) -> None:
    q, k, v, usual = Tensor(Q), Tensor(K), Tensor(K), {"causal": True, "window": (1, None), "softmax_scale": 1.0}
    for _ in range(3):
        fastattn.attention(q, k, v, **usual)
    assert prepared.long == 2
    for changes in ({"causal": 1}, {"window": (1.0, None)}, {"softmax_scale": True}, {"causal": [True]},
                    {"window": [1.0, None]}, {"layout": "thd"}, {"layout": ["bshd"]}, {"dropout_p": False}, {"engine": "nobody"},
                    {"engine": ["cpu"]}, {"engine": "cpu"}):
        with pytest.raises((TypeError, ValueError)):
            fastattn.attention(q, k, v, **(usual | changes))

    class Sparse(Tensor):
        def stride(self) -> tuple[int, ...]:
            raise RuntimeError("sparse tensors do not have strides")

    class Transformed(Tensor):
        def data_ptr(self) -> int:
            raise RuntimeError("cannot access data pointer")
    for kind in (Sparse, Transformed):
        readers.by_type[kind] = readers.by_type[Tensor]
        with pytest.raises(TypeError, match=r"\(Tensor\)|cannot be exported"):
            fastattn.attention(*[kind(shape) for shape in (Q, K, K)], **usual)
        del readers.by_type[kind]
    for x, error in ((Tensor(K, ptr=-1), "cannot access data pointer"), (Tensor(K, ptr=0), "no memory of its own"),
                     (Tensor(K, "float16"), "dtype"), (Tensor(K, device=1), "device")):
        with pytest.raises((TypeError, ValueError), match=error):
            fastattn.attention(q, k, x, **usual)
    for name in ("requires_grad", "negative"):
        x = Tensor(K)
        setattr(x, name, True)
        with pytest.raises(TypeError):
            fastattn.attention(q, k, x, **usual)
    assert prepared.long == 2 and len(prepared.calls) == 3
    fastattn.attention(q, k, Tensor(K, ptr=0x1008), **usual)            # aligned to less
    fastattn.attention(q, k, v, **usual, stream=0x70)
    assert fastattn.attention(q, k, v, **usual, out=(out := Tensor(Q, ptr=0x8000))) is out and out._version == 1
    fastattn.attention(q, k, v, **usual, mask=Tensor((6, 9), "bool"))
    assert prepared.long == 6 and prepared.calls[-3][-1] == 0x70
    with fastattn.register_engine("other", (other := Recorder()).forward, None, other.supports).activate():
        fastattn.attention(q, k, v, **usual)
    assert prepared.long == 6 and len(other.calls) == 1


@pytest.mark.parametrize("name, before, after", [("softmax_scale", 0.25, 1.0), ("softcap", 1.0, 2.0), ("dropout_p", 0.25, 0.5),
                                                 ("seed", 1, 2), ("offset", 0, 1), ("causal", False, True), ("window", [2, 0], [0, 3])])
def test_options_changed_in_place(torch_streams: dict[int, int], prepared: Prepared, name: str, before: Any, after: Any) -> None:
    """A replayed launch uses the option's present value, whatever object holds it."""
    q, k, usual = Tensor(Q), Tensor(K), {"dropout_p": 0.5, "seed": 7}
    holder, plain = np.array(before), lambda x: tuple(x) if isinstance(x, list) else x
    for value in (before, after, before):
        holder[...] = value
        for _ in range(3):
            fastattn.attention(q, k, k, **(usual | {name: holder}))
            found = prepared.calls[-1][0]
            fastattn.attention(q, k, k, **(usual | {name: plain(value)}))
            assert prepared.calls[-1][0] is found
    assert len({id(call[0]) for call in prepared.calls}) == 2 and prepared.long == 4


def test_remembered_calls_are_bounded(torch_streams: dict[int, int], prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "MOST", 10)
    q, k = Tensor(Q), Tensor(K)
    for seed in range(25):
        fastattn.attention(q, k, k, dropout_p=0.5, seed=seed)
        assert len(repeat._known) <= 10 and not any(repeat._known.values())
    assert [call[0].dropout.seed for call in prepared.calls] == list(range(25))
    for _ in range(3):
        fastattn.attention(q, k, k)
    assert prepared.long == 27 and len(prepared.calls) == 28


def test_explain_knows_repeated_calls(torch_streams: dict[int, int], prepared: Prepared) -> None:
    q, k = Tensor(Q), Tensor(K)
    for _ in range(3):
        fastattn.attention(q, k, k)
    assert fastattn.explain(fastattn.attention, q, k, k, device="cpu").engine == "cpu" and len(prepared.calls) == 3
