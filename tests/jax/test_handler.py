"""XLA's side of the border: its structures against its own header, frames made by hand, errors, streams, threads."""
from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import fastattn  # noqa: E402
import fastattn.jax  # noqa: E402
from fastattn.jax import ffi, handler, record  # noqa: E402
from fastattn.jax.record import Record  # noqa: E402
from fastattn.options import Options  # noqa: E402
from tests.jax.frames import Xla  # noqa: E402
from tests.tools.fake_cuda import Driver  # noqa: E402

Q = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 2, 8)
QKV = "q", "k", "v"
PLAIN = Record("attention", QKV, ("out", "lse"), Options(), "bshd")


# ---------------------------------------------------------------- the structures
def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    """Sizes and offsets by a C compiler, from the header that jaxlib installs."""
    include, compiler = Path(jax.ffi.include_dir()), shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not (include / "xla/ffi/api/c_api.h").is_file():
        pytest.skip("needs a C compiler and jaxlib's headers")
    names: dict[str, tuple[Any, dict[str, str]]] = {
        "XLA_FFI_CallFrame": (ffi.Frame, {"operands": "args", "results": "rets", "attributes": "attrs", "context": "ctx"}),
        "XLA_FFI_Args": (ffi.Buffers, {"count": "size", "kinds": "types", "items": "args"}),
        "XLA_FFI_Rets": (ffi.Buffers, {"count": "size", "kinds": "types", "items": "rets"}),
        "XLA_FFI_Attrs": (ffi.Attributes, {"count": "size", "kinds": "types", "items": "attrs"}),
        "XLA_FFI_Buffer": (ffi.Buffer, {}), "XLA_FFI_ByteSpan": (ffi.Text, {"length": "len"}),
        "XLA_FFI_Api_Version": (ffi.Version, {"major": "major_version", "minor": "minor_version"}),
        "XLA_FFI_Extension_Base": (ffi.Extension, {"kind": "type"}),
        "XLA_FFI_Metadata": (ffi.Metadata, {"version": "api_version"}),
        "XLA_FFI_Metadata_Extension": (ffi.MetadataExtension, {"base": "extension_base"}),
        "XLA_FFI_Error_Create_Args": (ffi.ErrorCreate, {"code": "errc"}), "XLA_FFI_Error_GetMessage_Args": (ffi.ErrorMessage, {}),
        "XLA_FFI_Error_Destroy_Args": (ffi.ErrorDestroy, {}), "XLA_FFI_Stream_Get_Args": (ffi.StreamGet, {"context": "ctx"}),
        "XLA_FFI_Api": (ffi.Api, {"version": "api_version", "internal": "internal_api", "error_create": "XLA_FFI_Error_Create",
                                  "error_message": "XLA_FFI_Error_GetMessage", "error_destroy": "XLA_FFI_Error_Destroy",
                                  "register": "XLA_FFI_Handler_Register", "stream_get": "XLA_FFI_Stream_Get"}),
    }
    lines, ours = [], []
    for kind, (structure, renamed) in names.items():
        headed = structure._fields_[0][0] == "size" and structure is not ffi.Text
        for field, _ in structure._fields_:
            head = {"size": "struct_size", "extension": "extension_start"} if headed else {}
            theirs = renamed.get(field) or head.get(field) or field
            lines.append(f"offsetof({kind}, {theirs})")
            ours.append((f"{kind}.{field}", getattr(structure, field).offset))
        if kind not in ("XLA_FFI_Api", "XLA_FFI_CallFrame", "XLA_FFI_Metadata"):       # these have more fields behind
            lines.append(f"sizeof({kind})")
            ours.append((kind, ctypes.sizeof(structure)))
    errors = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "INTERNAL", "CANCELLED"
    constants = {"XLA_FFI_ExecutionStage_EXECUTE": ffi.EXECUTE, "XLA_FFI_AttrType_STRING": ffi.STRING,
                 "XLA_FFI_Extension_Metadata": ffi.METADATA, **{f"XLA_FFI_Error_Code_{name}": getattr(ffi, name) for name in errors}}
    short = {"bool": "PRED", "bfloat16": "BF16"}
    constants |= {f"XLA_FFI_DataType_{short.get(name) or name.replace('uint', 'U').replace('int', 'S').replace('float', 'F')}": code
                  for code, name in ffi.DTYPES.items()}
    lines, ours = lines + list(constants), ours + list(constants.items())
    source = tmp_path / "sizes.c"
    source.write_text('#include <stdio.h>\n#include "xla/ffi/api/c_api.h"\nint main(void) {\n' +
                      "".join(f'printf("%d\\n", (int)({line}));\n' for line in lines) + "return 0; }\n")
    subprocess.run([compiler, "-I", str(include), str(source), "-o", str(tmp_path / "sizes")], check=True, capture_output=True)
    theirs = [int(x) for x in subprocess.run([str(tmp_path / "sizes")], check=True, capture_output=True, text=True).stdout.split()]
    assert [(name, n) for (name, _), n in zip(ours, theirs, strict=True)] == ours


def test_another_layout_is_refused() -> None:
    """Sizes and versions that are not those of ffi.py: an error, and nothing is read behind them."""
    xla, out, lse = Xla(), np.full_like(Q, 7), np.zeros((1, 2, 4), np.float32)

    def refused(change: Any) -> str:
        frame = xla.frame(PLAIN, [Q] * 3, [out, lse])
        change(frame)
        assert xla.send(frame) == 0xE1 and xla.error is not None and xla.error[0] == ffi.INTERNAL and (out == 7).all()
        return xla.error[1].splitlines()[-1]

    def size(of: str, n: int) -> Any:
        return lambda frame: setattr(getattr(frame, of) if of else frame, "size", n)
    assert "XLA's call frame has 8 bytes; expected at least" in refused(size("", 8))
    assert "XLA's operands have 48 bytes; expected 40" in refused(size("operands", 48))
    assert "XLA's attributes have 56 bytes; expected 48" in refused(size("attributes", 56))
    assert "XLA's buffer 0 has 8 bytes" in refused(lambda frame: setattr(frame.operands.items[0].contents, "size", 8))
    assert "dtype 15" in refused(lambda frame: setattr(frame.results.items[0].contents, "dtype", 15))
    xla.api.version.major = 1
    assert "XLA's foreign function interface has version 1.3; expected 0.x" in refused(lambda frame: None)


def ask(xla: Xla) -> Any:
    """XLA's question about the handler."""
    asked = ffi.Metadata(64, ffi.Version(ctypes.sizeof(ffi.Version), None, 0, 0), 99)
    other = ffi.Extension(24, 77, None)
    extension = ffi.MetadataExtension(ffi.Extension(32, ffi.METADATA, None), ctypes.pointer(asked))
    other.next = ctypes.cast(ctypes.pointer(extension), ctypes.POINTER(ffi.Extension))
    frame = ffi.Frame(ctypes.sizeof(ffi.Frame), ctypes.pointer(other), ctypes.pointer(xla.api))
    assert xla.send(frame) is None
    return asked


def test_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    xla = Xla()
    asked = ask(xla)
    assert (asked.version.major, asked.version.minor, asked.traits) == (0, 3, 0)
    xla.api.version.minor = 1
    assert ask(xla).version.minor == 1                      # an older XLA hears its own
    xla.api.version.minor = 9
    assert ask(xla).version.minor == 3                      # a newer one the version that this was written for
    xla.api.version.major = 1
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: ask(xla))
    with pytest.raises(ImportError, match=r"does not know this jaxlib: XLA's foreign function interface has version 1\.9; expected 0\.x\."):
        handler.register()


# ---------------------------------------------------------------- calls
def test_a_call_by_hand() -> None:
    xla, out, lse = Xla(), np.zeros_like(Q), np.zeros((1, 2, 4), np.float32)
    assert xla.call(PLAIN, [Q] * 3, [out, lse], stage=0) is None and not out.any()      # other stages compute nothing
    assert xla.call(PLAIN, [Q] * 3, [out, lse]) is None and xla.error is None
    want = fastattn.attention(Q, Q, Q, return_lse=True)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want[1])
    seeded = Record("attention", (*QKV, "seed", "offset"), ("out",), Options(dropout_p=0.5, seed=0), "bshd")
    for dtype, seed in (("uint32", 2**32 - 1), ("int32", -5), ("uint64", 2**64 - 1), ("int64", -(2**63))):
        assert xla.call(seeded, [Q, Q, Q, np.array(seed, dtype), np.array(3, "int64")], [out]) is None
        np.testing.assert_array_equal(out, fastattn.attention(Q, Q, Q, dropout_p=0.5, seed=seed, offset=3))


def test_records_are_read_as_they_were_written() -> None:
    options = Options("top_left", (None, 3), 0.1 + 0.2, 1e-300, 0.25, 2**64 - 1, 2**32 - 1, 7, 9)
    r = Record("attention_varlen_backward", ("q", "dout"), ("dq",), options, "thd", "cpu", ("a", "b"), True)
    assert record.read(r.text().encode()) == r and hash(record.read(r.text().encode())) == hash(r)
    assert record.read(PLAIN.text().encode()) == PLAIN
    xla = Xla()
    assert xla.call(PLAIN.text().replace('"format": 1', '"format": 2'), [Q] * 3, [Q]) == 0xE1
    assert xla.error is not None and "compiled for another version of fastattn.jax (format 2; expected 1); compile it again" in xla.error[1]


def raising(error: BaseException) -> Any:
    def forward(*_: Any) -> None:
        raise error
    return forward


@pytest.mark.parametrize(("error", "code", "text"), [
    (ValueError("v"), ffi.INVALID_ARGUMENT, "v"), (TypeError("t"), ffi.INVALID_ARGUMENT, "t"),
    (MemoryError(), ffi.RESOURCE_EXHAUSTED, "fastattn: no memory"),
    (MemoryError("8 GB"), ffi.RESOURCE_EXHAUSTED, "fastattn: no memory (8 GB)"),
    (fastattn.UnsupportedError("u."), ffi.UNIMPLEMENTED,
     "attention(): no engine takes this call: raising: u (engine='raising' allows no other)."),
    (ZeroDivisionError("z"), ffi.INTERNAL, "ZeroDivisionError: z"), (SystemExit(3), ffi.INTERNAL, "SystemExit: 3"),
])
def test_exceptions_become_errors(error: BaseException, code: int, text: str) -> None:
    xla = Xla()
    with fastattn.register_engine("raising", raising(error), None, lambda problem: None, "cpu"):
        assert xla.call(Record("attention", QKV, ("out",), Options(), "bshd", "raising"), [Q] * 3, [np.zeros_like(Q)]) == 0xE1
    assert xla.error is not None and xla.error[0] == code and xla.error[1].splitlines()[-1] == text
    assert ("Traceback" in xla.error[1]) == (code == ffi.INTERNAL)


def test_an_interrupt_reaches_the_main_thread() -> None:
    xla = Xla()
    with fastattn.register_engine("raising", raising(KeyboardInterrupt()), None, lambda problem: None, "cpu"):
        r = Record("attention", QKV, ("out",), Options(), "bshd", "raising")
        with pytest.raises(KeyboardInterrupt):
            assert xla.call(r, [Q] * 3, [np.zeros_like(Q)]) == 0xE1
            for _ in range(3000):                           # a sleep is not ended by it
                time.sleep(0.01)
    assert xla.error == (ffi.CANCELLED, "fastattn: interrupted")


def test_errors_while_a_program_runs() -> None:
    q = jax.numpy.ones((5, 2, 8))
    packed = jax.jit(lambda lengths: fastattn.jax.attention_varlen(q, q, q, lengths, lengths))
    jax.block_until_ready(packed(jax.numpy.array([0, 3, 5])))       # lengths are checked in every call, not in the first alone
    text = r"INVALID_ARGUMENT: attention_varlen\(\): cu_seqlens_q starts \[0, 5, 3\], entry 2 is 3; expected cumulative lengths: 0 first"
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=text):       # of the second call JAX makes a ValueError
        jax.block_until_ready(packed(jax.numpy.array([0, 5, 3])))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT: attention\(\): offset is -1; expected an integer in"):
        jax.block_until_ready(fastattn.jax.attention(Q, Q, Q, dropout_p=0.5, seed=1, offset=jax.numpy.int32(-1)))
    jax.block_until_ready(fastattn.jax.attention(Q, Q, Q))          # and the next call works


def test_calls_from_many_threads() -> None:
    step = jax.jit(jax.grad(lambda q: (fastattn.jax.attention(q, q, q, causal=True) ** 2).sum()))
    want, wrong = np.asarray(step(Q)), []

    def work() -> None:
        for _ in range(20):
            if not np.array_equal(step(Q), want):
                wrong.append(1)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# ---------------------------------------------------------------- CUDA, without a GPU
@pytest.fixture
def cuda_engine() -> Iterator[list[tuple[Any, ...]]]:
    """An engine for CUDA memory that notes what it is called with."""
    calls: list[tuple[Any, ...]] = []
    with fastattn.register_engine("noter", lambda *x: calls.append(x), lambda *x: calls.append(x), lambda problem: None).activate():
        yield calls


def test_cuda_frames(driver: Driver, cuda_engine: list[tuple[Any, ...]]) -> None:
    """The stream is XLA's, the device that of the memory; a NULL stream is the legacy one."""
    x = (0x1000, (1, 4, 2, 8), "float16")
    driver.devices |= {0x1000: 3, 0x9000: 3}
    for stream, handle in ((0xABC, 0xABC), (0, 1)):
        xla = Xla(stream)
        out, lse = (0x9000, (1, 4, 2, 8), "float16"), (0x9500, (1, 2, 4), "float32")
        assert xla.call(PLAIN, [x] * 3, [out, lse], cuda=True) is None, xla.error
        problem, operands, out_view, lse_view, given = cuda_engine.pop()
        assert given == handle and operands.q.device == out_view.device == ("cuda", 3) and problem.dtype == "float16"
        assert (operands.q.ptr, out_view.ptr, lse_view.ptr) == (0x1000, 0x9000, 0x9500)
    operands = *QKV, "bias", "dout", "out", "lse"
    r = Record("attention_backward", operands, ("dq", "dk", "dv", "dbias"), Options(), "bhsd", deterministic=True)
    x, bias = (0x1000, (1, 2, 4, 8), "float16"), (0x7000, (4, 4), "float16")
    assert Xla(5).call(r, [x, x, x, bias, x, x, (0x9500, (1, 2, 4), "float32")], [x, x, x, bias], cuda=True) is None
    *_, dlse, grads, stream, deterministic = cuda_engine.pop()
    assert stream == 5 and deterministic is True and dlse is None and grads.dsinks is None
    assert grads.dq.shape == (1, 4, 2, 8) and grads.dq.strides == (128, 16, 64, 2) and grads.dbias.shape == (1, 1, 4, 4)


def test_cuda_memory_without_elements(driver: Driver, cuda_engine: list[tuple[Any, ...]]) -> None:
    """Empty buffers have no address: the device is then the current one."""
    driver.contexts = [2]
    x, lse = (0, (0, 4, 2, 8), "float16"), (0, (0, 2, 4), "float32")
    assert Xla(5).call(PLAIN, [x] * 3, [x, lse], cuda=True) is None
    assert cuda_engine.pop()[1].q.device == ("cuda", 2)


def test_cuda_refusals(driver: Driver, cuda_engine: list[tuple[Any, ...]]) -> None:
    x, xla = (0x1000, (1, 4, 2, 8), "float16"), Xla(5)
    driver.devices |= {0x1000: 0, 0x5000: 0}
    seeded = Record("attention", (*QKV, "seed"), ("out",), Options(dropout_p=0.5, seed=0), "bshd")
    assert xla.call(seeded, [x, x, x, (0x5000, (), "uint32")], [x], cuda=True) == 0xE1
    assert xla.error == (ffi.UNIMPLEMENTED, "attention(): seed is an array in device memory; expected an int, because the host never "
                                            "waits for a device; an int is part of the compiled program, so a new one compiles again.")
    xla = Xla(None)
    assert xla.call(PLAIN, [x] * 3, [x, (0x9500, (1, 2, 4), "float32")], cuda=True) == 0xE1
    assert xla.error is not None and xla.error[0] == ffi.INTERNAL and "XLA gives no stream: there is none" in xla.error[1]
    assert xla.destroyed == [0xE2] and not cuda_engine


