"""A repeated call in host memory takes the short way (repeat.py). It gives the bits of the full way, whatever differs."""
from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import cpu, dispatch, repeat

Array = np.ndarray[Any, Any]


def arrays(seed: int = 0, dtype: str = "float32", q: tuple[int, ...] = (2, 5, 4, 8), k: tuple[int, ...] = (2, 7, 2, 8)) -> list[Array]:
    draw = np.random.default_rng(seed)
    return [draw.standard_normal(shape).astype(dtype) for shape in (q, k, k)]


def full(*qkv: Any, **options: Any) -> Any:
    """The call by the full way: `repeat` takes none with a mask."""
    return fastattn.attention(*qkv, mask=np.ones((1, 1, 1, 1), bool), **options)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that took the full way."""
    calls, forward = list[str](), dispatch.forward
    for module in (fastattn.api, dispatch):                 # of which the second has those that could be repeated
        monkeypatch.setattr(module, "forward", lambda *a, **k: (calls.append("full"), forward(*a, **k))[1])
    monkeypatch.setattr(repeat, "_known", type(repeat._known)())
    return calls


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"layout": "bhsd"}, {"causal": True, "window": (3, None), "softcap": 2.0},
                                     {"dropout_p": 0.5, "seed": 3}, {"engine": "cpu"}], ids=str)
def test_the_third_call_is_short(checked: list[str], options: dict[str, Any], dtype: str) -> None:
    for n in range(4):
        qkv = arrays(n, dtype)                              # other numbers and addresses each time
        if options.get("layout"):
            qkv = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in qkv]
        got = fastattn.attention(*qkv, **options)
        assert len(checked) == min(n + 1, 2) + n            # `full` below counts, too
        expected = full(*qkv, **options)
        if options.get("return_lse"):
            assert got[1].dtype == expected[1].dtype and np.array_equal(got[1], expected[1])
            got, expected = got[0], expected[0]
        assert type(got) is np.ndarray and got.dtype == dtype and got.flags.c_contiguous
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3 if dtype == "float16" else 1e-6)


@pytest.fixture
def checked_backward(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backwards that took the full way."""
    calls, backward = list[str](), dispatch.backward
    for module in (fastattn.api, dispatch):
        monkeypatch.setattr(module, "backward", lambda *a, **k: (calls.append("full"), backward(*a, **k))[1])
    monkeypatch.setattr(repeat, "_known", type(repeat._known)())
    return calls


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("options", [{}, {"dlse": True}, {"layout": "bhsd"}, {"causal": True, "window": (3, None), "softcap": 2.0},
                                     {"dropout_p": 0.5, "seed": 3}, {"engine": "cpu", "deterministic": True}], ids=str)
def test_the_third_backward_is_short(checked_backward: list[str], options: dict[str, Any], dtype: str) -> None:
    options = dict(options)
    with_dlse = options.pop("dlse", False)
    for n in range(4):
        q, k, v, dout = [*arrays(n, dtype), arrays(n + 10, dtype)[0]]
        if options.get("layout"):
            q, k, v, dout = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v, dout))
        out, lse = fastattn.attention(q, k, v, return_lse=True, **{name: x for name, x in options.items() if name != "deterministic"})
        more = {"dlse": arrays(n + 20, str(lse.dtype), q=lse.shape)[0]} if with_dlse else {}
        got = fastattn.attention_backward(dout, q, k, v, out, lse, **options, **more)
        assert len(checked_backward) == min(n + 1, 2) + n
        expected = fastattn.attention_backward(dout, q, k, v, out, lse, **options, **more, mask=np.ones((1, 1, 1, 1), bool))
        assert type(got) is fastattn.Grads and got[3:] == (None, None)
        for x, y, like in zip(got[:3], expected[:3], (q, k, v), strict=True):
            assert type(x) is np.ndarray and x.dtype == dtype and x.shape == like.shape and x.flags.c_contiguous
            np.testing.assert_allclose(x, y, rtol=0, atol=4e-3 if dtype == "float16" else 1e-6)


def test_packed_lengths_in_host_memory_are_checked_in_each_call(checked_backward: list[str]) -> None:
    """Also after calls that were right: an array may change in place."""
    q, k, v = (x[0] for x in arrays())
    lengths, lengths_k = np.array([0, 2, 5], np.int32), np.array([0, 3, 7], np.int32)
    for _ in range(4):
        out, lse = fastattn.attention_varlen(q, k, v, lengths, lengths_k, return_lse=True)
        fastattn.attention_varlen_backward(q, q, k, v, out, lse, lengths, lengths_k)
    assert len(checked_backward) == 4
    lengths[1] = 3
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(fastattn.attention_varlen(q, k, v, lengths, lengths_k), out)
    lengths[1] = 6
    for call in (lambda: fastattn.attention_varlen(q, k, v, lengths, lengths_k),
                 lambda: fastattn.attention_varlen_backward(q, q, k, v, out, lse, lengths, lengths_k)):
        with pytest.raises(ValueError, match="cu_seqlens_q starts"):
            call()


def test_what_differs_takes_the_full_way(checked: list[str]) -> None:
    q, k, v = arrays()
    first = [fastattn.attention(q, k, v) for _ in range(3)]
    assert len(checked) == 2 and all(np.array_equal(first[0], x) for x in first)

    def at(offset: int) -> Array:
        raw = np.zeros(q.nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 16
        x = raw[start + offset:start + offset + q.nbytes].view(np.float32).reshape(q.shape)
        x[...] = q
        return x

    strided = np.zeros((*q.shape[:3], 16), np.float32)[..., ::2]
    strided[...] = q
    for other in (at(4), strided, np.asfortranarray(q), q[:, ::-1][:, ::-1].view(type("Sub", (np.ndarray,), {}))):
        before = len(checked)
        for _ in range(3):
            assert np.array_equal(np.asarray(fastattn.attention(other, k, v)), first[0])
        assert len(checked) > before
    short = len(checked)
    assert np.array_equal(fastattn.attention(q, k, v), first[0]) and len(checked) == short
    for wrong in (k.astype(np.float64), k[:1], k[:, :, :1], at(2)):
        with pytest.raises((TypeError, ValueError)):
            fastattn.attention(q, wrong, v)
    fastattn.attention(q, k, v, out=np.empty_like(q))
    with fastattn.use_engine("reference"):
        fastattn.attention(q, k, v)
    assert len(checked) == short + 5        # three of the wrong calls are found after `forward` has begun


def test_bits_do_not_depend_on_threads(checked: list[str]) -> None:
    qkv, threads = arrays(q=(1, 300, 4, 64), k=(1, 300, 4, 64)), fastattn.get_num_threads()
    try:
        results = []
        for n in (1, 1, 1, 4, 2, 1):
            fastattn.set_num_threads(n)
            results.append(fastattn.attention(*qkv))
    finally:
        fastattn.set_num_threads(threads)
    assert len(checked) == 2 and all(np.array_equal(results[0], x) for x in results)


def test_keys_split_over_tasks(checked: list[str]) -> None:
    for seed in range(4):
        qkv = arrays(seed, q=(1, 1, 2, 64), k=(1, 9000, 2, 64))
        np.testing.assert_allclose(fastattn.attention(*qkv, causal=True), full(*qkv, causal=True), rtol=0, atol=1e-7)
    assert len(checked) == 2 + 4


def test_no_memory_is_kept() -> None:
    qkv = arrays(q=(3, 5, 4, 8), k=(3, 7, 2, 8))
    outs = [fastattn.attention(*qkv) for _ in range(4)]
    gone = [weakref.ref(x) for x in (*qkv, *outs)]
    del qkv, outs
    assert not any(x() is not None for x in gone)


def test_several_threads_repeat_one_call() -> None:
    qkv = [arrays(seed, q=(1, 64, 2, 32), k=(1, 64, 2, 32)) for seed in range(4)]
    expected = [fastattn.attention(*x) for x in qkv]
    wrong = []

    def work(n: int) -> None:
        for _ in range(200):
            if not np.array_equal(fastattn.attention(*qkv[n]), expected[n]):
                wrong.append(n)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_empty_arrays() -> None:
    for q, k in (((0, 5, 4, 8), (0, 7, 2, 8)), ((2, 0, 4, 8), (2, 7, 2, 8)), ((2, 5, 4, 8), (2, 0, 2, 8)), ((2, 5, 0, 8), (2, 7, 0, 8))):
        for _ in range(4):
            try:
                out = fastattn.attention(*arrays(q=q, k=k))
            except ValueError:
                continue
            assert out.shape == q and not out.any()


def test_address() -> None:
    for x in (np.zeros(3), np.zeros((3, 4))[1:, 2:], np.zeros(()), np.zeros(4, "V2"), np.frombuffer(b"abcd", np.uint8)):
        assert cpu.address(x) == x.__array_interface__["data"][0]


def test_forms() -> None:
    x, y = np.zeros((3, 4), np.float32), np.zeros((), np.float16)
    same = cpu.Forms([x, y])
    raw = np.zeros(64, np.uint8)
    misaligned = raw[2 - raw.ctypes.data % 4:][:48].view(np.float32).reshape(3, 4)
    assert same(x, y) and same(np.ones((6, 4), np.float32)[:3], y.copy())
    assert not same(x, np.float16(0)) and not misaligned.flags.aligned
    for other in (x.T, x.astype(np.float64), x.astype(">f4"), x[:2], x[:, :3], np.zeros((3, 8), np.float32)[:, ::2], x[None], x[0],
                  misaligned, x.view(type("Sub", (np.ndarray,), {})), x.tolist(), None):
        assert same(other, y) is False and cpu.Forms([y, x])(y, other) is False
    gone = weakref.ref(x)
    del x
    assert gone() is None


def test_torch_tensors(checked: list[str]) -> None:
    torch = pytest.importorskip("torch")
    fastattn.attention(*[torch.ones(1, 1, 1, 1)] * 3)       # from here on its type is known
    checked.clear()
    for n in range(4):
        qkv = [torch.from_numpy(x).to(torch.bfloat16) for x in arrays(n)]
        out, lse = fastattn.attention(*qkv, causal=True, return_lse=True)
        assert len(checked) == min(n + 1, 2) + n and out.dtype == torch.bfloat16 and lse.shape == (2, 4, 5)
        expected, expected_lse = full(*qkv, causal=True, return_lse=True)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(lse, expected_lse)
    before, trained = len(checked), qkv[0].clone().requires_grad_()
    for n in range(4):                                      # without a graph it is an array, but not one of those above
        with pytest.raises(TypeError, match="requires grad"):
            fastattn.attention(trained, *qkv[1:], causal=True, return_lse=True)
        with torch.no_grad():
            assert torch.equal(fastattn.attention(trained, *qkv[1:], causal=True, return_lse=True)[0], out)
        assert len(checked) == before + min(n + 1, 2)


def test_what_torch_compares_at_once(checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third call on one comparison stands for the forms of all tensors. It sees all that they see."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    fastattn.attention(*[torch.ones(1, 1, 1, 1)] * 3)
    checked.clear()
    q, k, v = map(torch.from_numpy, arrays())
    first = [fastattn.attention(q, k, v) for _ in range(3)].pop()
    read, form_of = list[type](), repeat._form_of
    monkeypatch.setattr(repeat, "_form_of", lambda kind: (read.append(kind), form_of(kind))[1])

    def forms_read(*qkv: Any, **options: Any) -> int:
        before = len(read)
        assert torch.equal(fastattn.attention(*qkv, **options), first)
        return len(read) - before
    assert forms_read(q, k, v) == forms_read(q.clone(), k.clone(), v.clone()) == 0 and len(checked) == 2
    strided = torch.empty(2, 4, 5, 8).transpose(1, 2).copy_(q)
    for other in (strided, torch.nn.Parameter(q, False)):
        assert forms_read(other, k, v) == 1
    with FlopCounterMode(display=False):
        assert forms_read(q, k, v) == 1
    with torch.inference_mode():
        assert forms_read(q.clone(), k, v) == 1
    assert forms_read(q, k, v) == 0
    for wrong in (k.double(), k[:1], k.to("meta"), k.clone().requires_grad_(), k.to_sparse(), torch._neg_view(k)):
        with pytest.raises((TypeError, ValueError)):
            fastattn.attention(q, wrong, v)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(TypeError, match="tangent"):
        fastattn.attention(q, torch.autograd.forward_ad.make_dual(k, k), v)
    other = fastattn.attention(q[:1], k[:1], v[:1])         # forms that alternate
    for _ in range(3):
        assert torch.equal(fastattn.attention(q, k, v), first) and torch.equal(fastattn.attention(q[:1], k[:1], v[:1]), other)


def test_what_is_kept_of_tensors() -> None:
    """No tensor, and no memory of results."""
    torch = pytest.importorskip("torch")
    qkv = [torch.ones(1, 3, 1, 7) for _ in range(3)]
    for _ in range(3):
        fastattn.attention(*qkv, softcap=3.5)
    [known] = {id(x): x for key, x in repeat._known.items() if x and "3.5" in str(key)}.values()
    gone = [weakref.ref(x) for x in qkv]
    del qkv
    assert not any(x() is not None for x in gone)
    assert [make.args[0].untyped_storage().nbytes() for make in known.makers] == [0]
    assert known.makers[0]().untyped_storage().nbytes() == 84
