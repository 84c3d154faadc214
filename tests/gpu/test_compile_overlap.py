"""What happens while the linker runs in another thread: garbage is collected, and the other kernels of a call are compiled."""
from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import gpu
from fastattn.gpu import precompile
from fastattn.gpu.flex import ladder
from fastattn.gpu.runtime import compile as compiler
from fastattn.gpu.runtime.cache import Binary
from tests.tools.gpu.flex import MASKS, SCORES, call_of

ARCH = "sm_80"


def source(key: str) -> compiler.Source:
    return compiler.Source(key, lambda: (None, 48), (("n", "i"),), 32)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What compilers that only note their work have done, in order; the linker waits up to 5 s for the work overlapped with it."""
    found, overlapped = list[str](), threading.Event()

    def intermediate(source: compiler.Source, arch: str) -> bytes:
        assert not gc.isenabled() and threading.current_thread() is threading.main_thread()
        found.append(f"{source.key} for {arch}")
        if source.key != "first":
            overlapped.set()
        return source.key.encode()

    def link(ltoir: bytes, arch: str, output: str = "cubin") -> tuple[bytes, str]:
        if ltoir == b"first":
            found.append("overlapped" if overlapped.wait(5) else "alone")
        return b"\x7fELF " + ltoir, f"Used 10 registers, {output}"
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "intermediate", intermediate)
    monkeypatch.setattr(compiler, "link", link)
    return found


def test_other_kernels_are_compiled_while_the_linker_runs(events: list[str]) -> None:
    assert compiler.binary(source("first"), ARCH, overlapped=[source("second")]) == Binary(b"\x7fELF first", 48, "sm_80 first")
    assert events == ["first for sm_80", "second for sm_80", "overlapped"]
    assert compiler.known(source("second"), ARCH) == Binary(b"\x7fELF second", 48, "sm_80 second")
    compiler.binary(source("first"), ARCH, overlapped=[source("third")])
    assert len(events) == 3 and compiler.known(source("third"), ARCH) is None, "nothing is overlapped with a kernel of the cache"


def test_garbage_is_collected_once(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    collected = list[int]()
    monkeypatch.setattr(compiler.gc, "collect", collected.append)
    compiler.binary(source("first"), ARCH, overlapped=[source("second"), source("third")])
    assert collected == [0] and gc.isenabled()
    gc.disable()
    try:
        compiler.build(source("second"), ARCH)
        assert collected == [0] and not gc.isenabled(), "a process that does not want it is left alone"
    finally:
        gc.enable()


def test_without_a_thread_to_be_had(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*_: Any) -> Any:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    assert compiler.build(source("second"), ARCH, "ptx") == (b"\x7fELF second", "Used 10 registers, ptx")


def test_an_error_of_the_linker_arrives(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> Any:
        raise ValueError("no such architecture")
    monkeypatch.setattr(compiler, "link", link)
    with pytest.raises(ValueError, match="no such architecture"):
        compiler.build(source("first"), ARCH)
    assert gc.isenabled()


@pytest.mark.parametrize(("family", "arch"), [("sm90", "sm_90a"), ("sm80", "sm_80")])
@pytest.mark.parametrize("backward", [False, True])
def test_kernels_of_a_call_with_functions_are_compiled_while_it_is_linked(family: str, arch: str, backward: bool,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    tried, overlapped = list[str](), list[str]()

    def binary(source: compiler.Source, arch: str, **options: Any) -> Binary:
        tried.append(source.key)
        overlapped.extend(other.key for other in options["overlapped"])
        return Binary(b"", 0)
    monkeypatch.setattr(ladder, "binary", binary)
    monkeypatch.setattr(ladder, "frame_bytes", lambda code: 0)
    # a size of no other test, as tilings are remembered
    call, spec = call_of(SCORES["relative"], MASKS["document"], backward=backward, head_dim=56)
    with gpu.use(family):
        launched = [source.key for source in precompile.sources(call, spec, precompile.absent_device(arch))]
    assert len(tried) == 1 and tried[0] in launched and len(overlapped) == len({*overlapped})
    if family == "sm90" and backward:
        assert overlapped == [key for key in launched if key != tried[0]]
        assert {key.split()[0] for key in overlapped} == {"preprocess", "bitmap", "round_dq", "captured"}
    else:
        [key] = overlapped
        assert key in launched and key.startswith("bitmap")
