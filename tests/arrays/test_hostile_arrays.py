"""Arrays with impossible metadata: lengths, DLPack capsules, interface
dictionaries, subclasses. Each is an error, never a crash."""
from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import fastattn
from fastattn.arrays import dlpack
from fastattn.arrays.convert import view
from fastattn.arrays.view import ITEMSIZE
from fastattn.options import Check, Options, read_eight_bit, read_position
from tests.tools.fake_cuda import Driver, installed

ROOT = Path(__file__).parents[2]

Q, K = np.ones((1, 4, 2, 16), np.float32), np.ones((1, 5, 2, 16), np.float32)
X = np.ones((6, 2, 16), np.float32)


class Forged:
    """A DLPack producer of the array `x` whose capsule is changed by `change(tensor, managed)` once it is made."""

    def __init__(self, x: np.ndarray[Any, Any], change: Callable[[Any, Any], None] = lambda t, m: None, device: Any = (1, 0),
                 old: bool = False) -> None:
        self.x, self.change, self.device, self.old = x, change, device, old

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **keywords: Any) -> Any:
        if self.old and "max_version" in keywords:
            raise TypeError("old")
        capsule: Any = self.x.__dlpack__() if self.old else self.x.__dlpack__(max_version=(1, 0))
        tensor, _ = dlpack.opened(capsule)
        managed = None
        if not self.old:
            managed = dlpack.ManagedVersioned.from_address(dlpack._capsule_pointer(capsule, b"dltensor_versioned"))
        self.change(tensor, managed)
        return capsule


def _put(**fields: Any) -> Callable[[Any, Any], None]:
    def change(tensor: Any, managed: Any) -> None:
        for name, value in fields.items():
            if name in ("shape", "strides"):
                pointer = getattr(tensor, name)
                for i, n in value.items():
                    pointer[i] = n
            else:
                setattr(managed if hasattr(dlpack.ManagedVersioned, name) and name != "tensor" else tensor, name, value)
    return change


def _null(name: str) -> Callable[[Any, Any], None]:
    def change(tensor: Any, managed: Any) -> None:
        setattr(tensor, name, ctypes.POINTER(ctypes.c_int64)())
    return change


CAPSULES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "negative_shape": (_put(shape={2: -2}), "has shape (1, 4, -2, 16); expected lengths of 0 or more"),
    "huge_shape": (_put(shape={1: 2**62}), "beyond any memory"),
    "product_overflows": (_put(shape={0: 2**31, 1: 2**31, 2: 2**31}, strides={0: 0, 1: 0, 2: 0}), "beyond any memory"),
    "null_data": (_put(data=None), "has elements, shape (1, 4, 2, 16), at address 0"),
    "null_shape": (_null("shape"), "has 4 axes, and a NULL pointer for their lengths"),
    "negative_ndim": (_put(ndim=-1), "says it has -1 axes"),
    "huge_ndim": (_put(ndim=2**31 - 1), "says it has 2147483647 axes"),
    "huge_stride": (_put(strides={1: 2**62}), "beyond any memory"),
    "negative_stride": (_put(strides={1: -(2**45)}), "has elements"),
    "byte_offset_overflows": (_put(byte_offset=2**64 - 1), "beyond any memory"),
    "byte_offset_misaligned": (_put(byte_offset=1), "is misaligned"),
    "other_device": (_put(device_type=2), "is on DLPack device (2, 0) by its capsule and (1, 0) by __dlpack_device__; expected one"),
    "unknown_device": (_put(device_type=99), "is on DLPack device (99, 0) by its capsule"),
    "lanes": (_put(lanes=4), "has dtype float32 in vectors of 4; expected "),
    "float8": (_put(code=8, bits=8), "has dtype float8_e4m3; expected "),
    "float4": (_put(code=17, bits=4), "has dtype float4_e2m1fn; expected "),
    "unknown_code": (_put(code=77), "has dtype of code 77, bits 32; expected "),
    "complex": (_put(code=5, bits=64), "has dtype complex64; expected "),
}


def _refused(x: Any, text: str) -> None:
    for call in (lambda: fastattn.attention(x, K, K), lambda: fastattn.attention(K, x, K), lambda: fastattn.attention(Q, K, K, out=x)):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert str(caught.value).startswith("attention(): ") and str(caught.value).endswith(".") and text in str(caught.value)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", CAPSULES)
def test_capsules(name: str, old: bool) -> None:
    change, text = CAPSULES[name]
    _refused(Forged(Q, change, old=old), text)


def test_capsules_of_other_versions_and_names() -> None:
    _refused(Forged(Q, _put(major=2)), "speaks DLPack 2.")
    used: Any = Q.__dlpack__(max_version=(1, 0))
    np.from_dlpack(type("Once", (), {"__dlpack__": lambda self, **_: used, "__dlpack_device__": lambda self: (1, 0)})())
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    for gives in (used, capsule(1, b"something", None), capsule(1, None, None), None, 7, b"dltensor", Q):
        other = type("Other", (), {"__dlpack__": lambda self, gives=gives, **_: gives, "__dlpack_device__": lambda self: (1, 0)})()
        _refused(other, "which is no DLPack capsule, or one that was used")
    for device in (None, (1,), (1, 0, 0), ("cpu", 0), "xy", (1.5, None), (10**400, 0)):
        _refused(Forged(Q, device=device), "is on DLPack device" if device == (10**400, 0) else "(Forged) cannot be exported")

    class Raises(Forged):
        def __dlpack_device__(self) -> Any:
            raise KeyError("what")
    _refused(Raises(Q), "(Raises) cannot be exported: 'what'")


def test_good_capsules_are_read_and_given_back() -> None:
    """No part of a capsule is kept, whether it was refused or read."""
    x = np.arange(128, dtype=np.float32).reshape(Q.shape)
    before = sys.getrefcount(x)
    for change, _ in [*CAPSULES.values(), (lambda t, m: None, "")]:
        for old in (False, True):
            try:
                fastattn.attention(Forged(x, change, old=old), K, K)
            except (TypeError, ValueError):
                continue
    gc.collect()
    assert sys.getrefcount(x) == before
    np.testing.assert_array_equal(np.asarray(fastattn.attention(Forged(x), K, K)), fastattn.attention(x, K, K))
    scalar: Any = Forged(np.array(1, np.float32), _null("shape"))
    assert view(scalar, "f", "x").shape == ()               # no axes need no lengths
    empty = Forged(Q[:, :0], _put(data=None))
    assert np.asarray(fastattn.attention(empty, K, K)).shape == (1, 0, 2, 16)


# ---------------------------------------------------------------- interface dictionaries
GOOD = {"shape": (1, 4, 2, 16), "typestr": "<f4", "data": (0x1000, False), "version": 3, "strides": None}


class Interface:
    def __init__(self, said: Any) -> None:
        self.__cuda_array_interface__ = said


INTERFACES: dict[str, tuple[dict[str, Any], str]] = {
    "typestr_none": ({"typestr": None}, "whose typestr is None; expected a string"),
    "typestr_what": ({"typestr": "what"}, "cannot be exported"),
    "typestr_object": ({"typestr": "|O"}, "has dtype |O"),
    "typestr_structure": ({"typestr": "f4,f4"}, "has dtype "),
    "pointer_string": ({"data": ("4096", False)}, "whose data is ('4096', False); expected an integer"),
    "pointer_float": ({"data": (4096.0, False)}, "whose data is (4096.0, False)"),
    "pointer_negative": ({"data": (-4096, False)}, "whose data is (-4096, False); expected at least 0"),
    "pointer_huge": ({"data": (2**64, False)}, "expected at most 18446744073709551615"),
    "pointer_at_the_end": ({"data": (2**64 - 4, False)}, "beyond any memory"),
    "pointer_null": ({"data": (0, False)}, "has elements, shape (1, 4, 2, 16), at address 0"),
    "pointer_none": ({"data": (None, False)}, "has elements"),
    "pointer_misaligned": ({"data": (4097, False)}, "is misaligned"),
    "data_none": ({"data": None}, "whose data is None; expected a pair (pointer, read-only)"),
    "data_number": ({"data": 4096}, "whose data is 4096; expected a pair"),
    "shape_negative": ({"shape": (1, 4, -2, 16)}, "has shape (1, 4, -2, 16); expected lengths of 0 or more"),
    "shape_huge": ({"shape": (1, 2**62, 2, 16)}, "beyond any memory"),
    "shape_beyond_int64": ({"shape": (1, 2**70, 2, 16)}, "whose shape is"),
    "shape_float": ({"shape": (1, 4.0, 2, 16)}, "whose shape is (1, 4.0, 2, 16); expected integers"),
    "shape_number": ({"shape": 128}, "whose shape is 128; expected a tuple of integers"),
    "shape_string": ({"shape": "1234"}, "whose shape is '1234'; expected a tuple of integers"),
    "strides_short": ({"strides": (4,)}, "has strides (4,) for shape (1, 4, 2, 16); expected one for each axis"),
    "strides_string": ({"strides": ("a",) * 4}, "whose strides is"),
    "strides_misaligned": ({"strides": (512, 127, 64, 4)}, "is misaligned"),
    "version": ({"version": 9}, "whose version is 9; expected at most 3"),
    "version_string": ({"version": "3"}, "whose version is '3'; expected an integer"),
    "mask": ({"mask": object()}, "has a mask; expected a plain array"),
    "stream": ({"stream": "main"}, "whose stream is 'main'"),
    "stream_negative": ({"stream": -1}, "whose stream is -1"),
}


@pytest.fixture
def driver(driver: Driver) -> Driver:
    driver.devices = _Anything()
    return driver


class _Anything(dict[int, int]):
    """All memory is device 0's."""

    def __contains__(self, pointer: object) -> bool:
        return True

    def __missing__(self, pointer: int) -> int:
        return 0


def _interface_refused(said: Any, text: str) -> None:
    good = Interface(dict(GOOD))
    for call in (lambda: fastattn.attention(Interface(said), good, good), lambda: fastattn.attention(good, good, Interface(said)),
                 lambda: view(Interface(said), "attention", "k")):
        with pytest.raises((TypeError, ValueError), match=re.escape(text)) as caught:
            call()
        assert str(caught.value).startswith("attention(): ") and str(caught.value).endswith(".")


@pytest.mark.parametrize("name", INTERFACES)
def test_interfaces(driver: Driver, name: str) -> None:
    change, text = INTERFACES[name]
    _interface_refused(GOOD | change, text)


def test_interfaces_that_are_none(driver: Driver) -> None:
    for said in (None, [], "text", 7):
        _interface_refused(said, "has a __cuda_array_interface__ that is a")
    for name in ("shape", "typestr", "data", "version"):
        _interface_refused({key: x for key, x in GOOD.items() if key != name}, f"whose {name} is missing; expected shape, typestr, data")

    class Raises:
        @property
        def __cuda_array_interface__(self) -> Any:
            raise KeyError("what")
    with pytest.raises(TypeError, match=r"k \(Raises\) cannot be exported: 'what'"):
        view(Raises(), "f", "k")
    found = view(Interface(GOOD | {"shape": [np.int64(2), 3], "data": [0x2000, 1], "stream": 1, "version": 2}), "f", "k")
    assert (found.ptr, found.shape, found.strides, found.readonly) == (0x2000, (2, 3), (12, 4), True)


# ---------------------------------------------------------------- NumPy
def test_subclasses_are_read_as_what_they_are() -> None:
    class Liar(np.ndarray[Any, Any]):
        shape = (1, 4000, 2, 16)  # type: ignore[assignment]
        strides = (7, 7, 7, 7)
        dtype = np.dtype(np.float64)
        __array_interface__: ClassVar = {"data": (8, False), "shape": (10**9,), "typestr": "<f8", "version": 3}  # type: ignore[assignment]
    x = np.arange(128, dtype=np.float32).reshape(Q.shape)
    np.testing.assert_array_equal(fastattn.attention(x.view(Liar), K, K), fastattn.attention(x, K, K))
    only = type("Only", (), {"__array_interface__": x.__array_interface__})()
    with pytest.raises(TypeError, match=r"k is a \w+ Only; expected a NumPy array or an array that speaks DLPack"):
        fastattn.attention(x, only, K)


# ---------------------------------------------------------------- lengths
@pytest.mark.parametrize("lengths", [[0, 2**63 - 1, -2], [0, -(2**63), 6], [0, 2**63 - 1, 2**63 - 1], [-(2**63), 2**63 - 1, 6], [0, 7, 6]])
def test_lengths_whose_differences_overflow(lengths: list[int]) -> None:
    good, bad = np.array([0, 2, 4]), np.array(lengths)
    for cu_q, cu_k, name in ((bad, good, "cu_seqlens_q"), (good, bad, "cu_seqlens_k")):
        with pytest.raises(ValueError, match=rf"attention_varlen\(\): {name} (starts|ends) "):
            fastattn.attention_varlen(X, X, X, cu_q, cu_k)
    with pytest.raises(ValueError, match=r"seqused_k has -?\d+ for sequence 0; expected a count from 0 to its length, 2"):
        fastattn.attention_varlen(X, X, X, good, good, seqused_k=np.array([lengths[1], 1]))


def test_lists_of_lengths_beyond_int64() -> None:
    for lengths in ([0, 2**63], [0, 2**64], [0, 10**400], [0, None], [0, "a"], [0, [1, 2]]):
        with pytest.raises((TypeError, ValueError), match=r"attention_varlen\(\): cu_seqlens_q (is|has) "):
            fastattn.attention_varlen(X, X, X, lengths, [0, 2])


def test_lengths_are_copied_once() -> None:
    """The engine reads a copy, so what another thread writes meanwhile has no effect."""
    cu_q, cu_k, used = np.array([0, 2, 4]), np.array([0, 3, 6], np.int32), np.array([3, 2])
    seen: list[Any] = []

    def forward(problem: Any, o: Any, out: Any, lse: Any, stream: None) -> None:
        cu_q[:], cu_k[:], used[:] = 2**60, 2**30, -1
        seen.extend(x.numpy().tolist() for x in (o.cu_seqlens_q, o.cu_seqlens_k, o.seqused_k))
    with fastattn.register_engine("noting", forward, None, lambda problem: None, device="cpu").activate():
        fastattn.attention_varlen(X, X, X, cu_q, cu_k, seqused_k=used)
    assert seen == [[0, 2, 4], [0, 3, 6], [3, 2]]


def test_lengths_written_by_another_thread() -> None:
    """For one second of calls, while a thread overwrites the lengths, each call gives right results or an error."""
    cu, stop = np.array([0, 3, 6]), threading.Event()

    def write() -> None:
        while not stop.is_set():
            cu[1] = 2**62
            cu[1] = 3
    thread = threading.Thread(target=write)
    thread.start()
    try:
        expected, right = fastattn.attention_varlen(X, X, X, [0, 3, 6], [0, 3, 6]), 0
        for _ in range(1500):
            try:
                np.testing.assert_array_equal(fastattn.attention_varlen(X, X, X, cu, cu), expected)
                right += 1
            except ValueError as error:
                assert "cu_seqlens" in str(error)
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------- at random, in a process of its own
@pytest.mark.parametrize("what", ["capsules", "interfaces", "lengths"])
def test_random_wrong_metadata(what: str) -> None:
    """Random wrong metadata in another process. A crash fails the test, as does
    any error that is not one of wrong arguments."""
    command = [sys.executable, "-m", __name__, what, "400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert re.search(r"[1-9]\d* right, [1-9]\d* refused", done.stdout), done.stdout


NUMBERS = [-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 4, 5, 8, 16, 17, 64, 2**15, 2**31 - 1, 2**31, 2**40, 2**61, 2**62, 2**63 - 1]
THINGS: list[Any] = [*NUMBERS, None, "", "x", b"4", 1.5, float("nan"), (), (1,), [], {}, object(), True, 2**64, 10**30, np.int64(4),
                     np.ones(2)]


def _random_capsule(draw: np.random.Generator) -> tuple[Any, Any]:
    """A producer whose capsule has up to three wrong fields, and the array in it."""
    x = np.ones(Q.shape, np.float32)
    fields: dict[str, Any] = {}
    for _ in range(draw.integers(0, 4)):
        name = str(draw.choice(["ndim", "shape", "strides", "data", "byte_offset", "device_type", "device_id", "code", "bits", "lanes",
                                "major", "flags", "null_shape", "null_strides"]))
        number = NUMBERS[draw.integers(len(NUMBERS))]
        if name in ("shape", "strides"):
            fields.setdefault(name, {})[int(draw.integers(4))] = number
        elif name == "data":
            fields[name] = None
        elif name.startswith("null"):
            fields[name] = True
        else:
            bits = {"ndim": 32, "device_type": 32, "device_id": 32, "code": 8, "bits": 8, "lanes": 16, "major": 32}.get(name, 63)
            fields[name] = int(number) % 2**(bits - 1)

    def change(tensor: Any, managed: Any) -> None:
        for name in ("null_shape", "null_strides"):
            if fields.get(name):
                _null(name.removeprefix("null_"))(tensor, managed)
                fields.pop(name.removeprefix("null_"), None)
        known = {name: n for name, n in fields.items() if not name.startswith("null") and (managed or name not in ("major", "flags"))}
        _put(**known)(tensor, managed)
    return Forged(x, change, old=bool(draw.integers(2))), x


def _inside(found: Any, x: np.ndarray[Any, Any]) -> bool:
    low, high = found.bytes_range()
    return low >= x.ctypes.data and high <= x.ctypes.data + x.nbytes


def _try_capsule(draw: np.random.Generator) -> str:
    producer, x = _random_capsule(draw)
    found = view(producer, "attention", "q")                # that memory outside the array is not the array's cannot be known
    if not _inside(found, x) and 0 not in found.shape:
        return "elsewhere"
    k = np.ones((*found.shape[:1], 5, *found.shape[2:]), np.float32) if len(found.shape) == 4 else K
    out = fastattn.attention(producer, k, k)
    assert np.asarray(out).shape == found.shape and (np.asarray(out) == 1).all()
    return "right"


def _try_interface(draw: np.random.Generator) -> str:
    said: dict[Any, Any] = dict(GOOD)
    for _ in range(draw.integers(0, 3)):
        name = str(draw.choice([*GOOD, "mask", "stream"]))
        thing: Any = THINGS[draw.integers(len(THINGS))]
        kind = draw.integers(4)
        if kind == 0:
            said.pop(name, None)
        elif kind == 1 and isinstance(said.get(name), tuple):
            changed = list(said[name])
            changed[draw.integers(len(changed))] = thing
            said[name] = tuple(changed)
        else:
            said[name] = thing
    found = view(Interface(said), "attention", "q")
    low, high = found.bytes_range()
    assert 0 <= low <= high < 2**64 and all(type(n) is int and n >= 0 for n in found.shape) and len(found.strides) == len(found.shape)
    assert 0 in found.shape or found.ptr > 0
    assert type(found.ptr) is int and found.dtype in ITEMSIZE
    return "right"


def _try_lengths(draw: np.random.Generator) -> str:
    def lengths(n: int) -> Any:
        if draw.integers(3) == 0:
            return [THINGS[draw.integers(len(THINGS))] for _ in range(n)]
        own = np.array([NUMBERS[draw.integers(len(NUMBERS))] for _ in range(n)])
        return np.sort(own % 7) if draw.integers(2) else own
    n = int(draw.integers(1, 5))
    cu_q, cu_k = lengths(n), lengths(n)
    if isinstance(cu_q, np.ndarray) and draw.integers(2):
        cu_q[0] = cu_k[0] = 0
    used = lengths(n - 1) if draw.integers(3) == 0 else None
    out = np.asarray(fastattn.attention_varlen(X, X, X, cu_q, cu_k, seqused_k=used))
    assert ((out == 1) | (out == 0)).all()
    return "right"


def main(what: str, count: int) -> None:
    one = {"capsules": _try_capsule, "interfaces": _try_interface, "lengths": _try_lengths}[what]
    counts = dict.fromkeys(("right", "refused", "elsewhere"), 0)
    with pytest.MonkeyPatch.context() as monkeypatch, installed(monkeypatch) as fake:
        fake.devices = _Anything()
        for seed in range(count):
            print("seed", seed, flush=True)
            try:
                counts[one(np.random.default_rng(seed))] += 1
            except (TypeError, ValueError, BufferError) as error:
                assert str(error).startswith("attention"), error
                counts["refused"] += 1
    print(", ".join(f"{n} {name}" for name, n in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))


def test_numbers_known_by_an_interface_alone() -> None:
    """An object without a shape of its own: an array where arrays are taken, and in device memory where a number is wanted."""
    class Known:
        def __init__(self, *shape: int) -> None:
            self.__cuda_array_interface__ = {"version": 3, "shape": shape, "strides": None, "typestr": "<f4", "data": (4096, False)}

    one = Known()
    _, arrays = read_eight_bit("f", Options(), (one, None, None, None), None)
    assert arrays is not None and arrays[0] is one
    with pytest.raises(TypeError, match="softcap is in device memory; expected"):
        Check("f").number("softcap", one, "a number")
    with pytest.raises(TypeError, match="diagonal is in device memory; expected"):
        read_position("f", Options(), one, None, None, packed=True)
    many = Known(3)
    assert read_position("f", Options(), many, None, None, packed=True)[1] is many
