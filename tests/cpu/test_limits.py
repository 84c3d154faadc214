"""The CPU engine under bad conditions: no memory, no threads, signals, lengths
that change during a call, maxima that no sequence has."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from tests.tools.day import SEED
from tests.tools.processes import EXTRA, not_sanitized, printed

Array = np.ndarray[Any, Any]

# ---------------------------------------------------------------- memory and threads that cannot be had
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_memalign(size_t, size_t);
static long left = -1, failed, alive, limit = 1 << 30;
/* the n-th large allocation from now on fails, counted from 0; returns how many failed before */
long fail_allocation(long n) { left = n; return __atomic_exchange_n(&failed, 0, __ATOMIC_SEQ_CST); }
/* so many more threads can be made */
void limit_threads(long n) { limit = __atomic_load_n(&alive, __ATOMIC_SEQ_CST) + n; }
static int fails(size_t bytes) {
  if (bytes < (64 << 10) || left < 0) return 0;
  if (__atomic_fetch_sub(&left, 1, __ATOMIC_SEQ_CST) != 0) return 0;
  __atomic_fetch_add(&failed, 1, __ATOMIC_SEQ_CST);
  return 1;
}
void *malloc(size_t n) { return fails(n) ? 0 : __libc_malloc(n); }
void *calloc(size_t n, size_t size) { return fails(n * size) ? 0 : __libc_calloc(n, size); }
void *aligned_alloc(size_t to, size_t n) { return fails(1 << 20) ? 0 : __libc_memalign(to, n); }
typedef struct { void *(*run)(void *); void *with; } Start;
static void *started(void *x) {
  Start s = *(Start *)x;
  free(x);
  void *result = s.run(s.with);
  __atomic_fetch_sub(&alive, 1, __ATOMIC_SEQ_CST);
  return result;
}
int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*run)(void *), void *with) {
  static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
  if (!real) real = dlsym(RTLD_NEXT, "pthread_create");
  if (__atomic_add_fetch(&alive, 1, __ATOMIC_SEQ_CST) > limit) {
    __atomic_fetch_sub(&alive, 1, __ATOMIC_SEQ_CST);
    return EAGAIN;
  }
  Start *s = __libc_malloc(sizeof *s);
  s->run = run, s->with = with;
  return real(t, a, started, s);
}
"""

CALLS = """
import ctypes, resource, sys, threading, time, numpy as np, ml_dtypes, fastattn
def arrays(seqlen_q, seqlen_k, heads, heads_k, dtype="float32"):
    draw = np.random.default_rng(0)
    sizes = ((seqlen_q, heads), (seqlen_q, heads), (seqlen_k, heads_k), (seqlen_k, heads_k))
    some = [draw.standard_normal(min(s * n * 64, 1 << 20), np.float32) for s, n in sizes]      # of a long call they repeat
    return [np.resize(x, (1, s, n, 64)).astype(dtype, copy=False) for x, (s, n) in zip(some, sizes)]
def backward(seqlen, heads, heads_k, bias=None, **options):
    dout, q, k, v = arrays(seqlen, seqlen, heads, heads_k, options.pop("dtype", "float32"))
    if bias is not None:
        options["bias"] = np.ones(bias, q.dtype)
    out, lse = fastattn.attention(q, k, v, return_lse=True, **options)
    options["need_dbias"] = bias is not None
    return lambda: [x for x in fastattn.attention_backward(dout, q, k, v, out, lse, **options) if x is not None]
def forward(seqlen_q, seqlen_k, heads, heads_k, **options):
    _, q, k, v = arrays(seqlen_q, seqlen_k, heads, heads_k)
    return lambda: fastattn.attention(q, k, v, return_lse=True, **options)
def same(got, expected):
    return all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that, loaded first, lets chosen allocations and threads fail."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux") or "LD_PRELOAD" in os.environ:
        pytest.skip("needs gcc, glibc, and to be loaded first")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(done.stderr)
    return str(folder / "shim.so")


ALLOCATING = [
    "forward(600, 600, 8, 4)", "forward(1, 9000, 8, 2)", "forward(1, 9000, 8, 8)", "backward(600, 4, 2)",
    "backward(600, 4, 2, (1, 4, 600, 600))",
    "backward(600, 4, 2, (600, 1))",
    "backward(600, 4, 4, (600, 600), dtype='bfloat16')",
    "backward(3000, 2, 2, (3000, 3000), dtype='float16', causal=True)"]


@pytest.mark.parametrize(("call", "threads"), [(call, (1, 4)[(n + SEED) % 2]) for n, call in enumerate(ALLOCATING)])    # the other tomorrow
def test_every_allocation_may_fail(shim: str, threads: int, call: str) -> None:
    """Each large allocation of a call fails once: MemoryError, and the next call is right. A new Python thread has no kept memory."""
    code = f"""{CALLS}
lib = ctypes.CDLL(None)
fastattn.set_num_threads({threads})
call = {call}
expected = call()
def attempt(n, seen):
    lib.fail_allocation(n)
    try:
        got = call()
    except MemoryError:
        got = None
    failed = lib.fail_allocation(-1)
    assert (got is None) == (failed > 0), (n, failed)
    assert got is None or same(got, expected), n
    assert same(call(), expected), n
    seen.append(failed)
n = 0
while True:
    seen = []
    thread = threading.Thread(target=attempt, args=(n, seen))
    thread.start()
    thread.join()
    if seen[0] == 0:
        break
    n += 1
print(n)
"""
    assert int(printed(code, LD_PRELOAD=shim)) >= 1


@not_sanitized
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
@pytest.mark.parametrize("call", ["forward(1000, 1000, 16, 16)", "backward(1000, 16, 16, causal=True)"])
def test_a_limit_of_the_address_space(call: str) -> None:
    """The limit is so low that some threads get a workspace and others do not."""
    code = f"""{CALLS}
call = {call}
expected = call()
pages = int(open("/proc/self/statm").read().split()[0])
results = []
def attempt(extra):
    resource.setrlimit(resource.RLIMIT_AS, ((pages << 12) + extra, resource.RLIM_INFINITY))
    try:
        results.append(same(call(), expected))
    except MemoryError:
        results.append("MemoryError")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert same(call(), expected)
for extra in range(0, 96 << 20, 8 << 20):
    attempt(extra)
assert False not in results
"""
    printed(code)


@pytest.mark.parametrize(("room", "wanted"), [(0, 2), (0, 64), (3, 64), (200, 64)])
def test_threads_that_cannot_be_made(shim: str, room: int, wanted: int) -> None:
    """A call runs on the threads that can be created."""
    printed(f"""{CALLS}
lib = ctypes.CDLL(None)
call, other = forward(500, 500, 64, 64), backward(300, 8, 8)
fastattn.set_num_threads(1)
expected, other_expected = call(), other()
fastattn.set_num_threads({wanted})
lib.limit_threads({room})
for _ in range(3):
    assert same(call(), expected) and same(other(), other_expected)
lib.limit_threads(1000)
assert same(call(), expected) and same(other(), other_expected)
""", LD_PRELOAD=shim)


def test_the_most_threads() -> None:
    """As many threads as set_num_threads accepts, with fewer tasks than threads and with more."""
    printed(f"""{CALLS}
few, many = forward(200, 200, 4, 4), forward(40, 40, 2048, 2048)
fastattn.set_num_threads(1)
expected, more = few(), many()
fastattn.set_num_threads(1024)
assert same(few(), expected) and same(many(), more) and same(few(), expected)
""")


# ---------------------------------------------------------------- signals
INTERRUPT = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)       # jobs in the background of a script ignore it
def interrupted(call, after):
    # seconds from SIGINT to KeyboardInterrupt
    sent = []
    def send():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    timer = threading.Timer(after, send)
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        return time.perf_counter() - sent[0]
    raise AssertionError("the call ended first")
"""


LONG = {
    "forward": "_, q, k, v = arrays(24000, 24000, 32, 32); call = lambda: fastattn.attention(q, k, v)",
    "short queries": "_, q, k, v = arrays(8, 600000, 32, 2); call = lambda: [fastattn.attention(q, k, v) for _ in range(20)]",
    "backward": "dout, q, k, v = arrays(12000, 12000, 32, 2); lse = np.zeros((1, 32, 12000), np.float32); "
                "call = lambda: fastattn.attention_backward(dout, q, k, v, dout, lse)",
    "dbias": "dout, q, k, v = arrays(6000, 6000, 32, 32, 'float16'); lse = np.full((1, 32, 6000), 9, np.float32); "
             "bias = np.ones((6000, 6000), np.float16); "
             "call = lambda: fastattn.attention_backward(dout, q, k, v, dout, lse, bias=bias, need_dbias=True)",
}


@not_sanitized
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LONG)
def test_ctrl_c(threads: int, name: str) -> None:
    """A call of many seconds stops within one, and the next call is right."""
    printed(f"""{CALLS}{INTERRUPT}
small, grads = forward(500, 500, 8, 8), backward(500, 8, 8)
expected, expected_grads = small(), grads()
fastattn.set_num_threads({threads})
{LONG[name]}
for after in (0.2, 0.5):
    assert interrupted(call, after) < 1
    assert same(small(), expected) and same(grads(), expected_grads)
""")


@not_sanitized
def test_ctrl_c_in_a_forked_child() -> None:
    printed(f"""{CALLS}{INTERRUPT}
small = forward(500, 500, 8, 8)
expected = small()
{LONG["forward"]}
child = os.fork()
if child == 0:
    os._exit(0 if interrupted(call, 0.2) < 1 and same(small(), expected) else 3)
assert os.waitpid(child, 0)[1] == 0
""")


@not_sanitized
def test_a_handler_may_call_the_engine() -> None:
    """The handler runs in the middle of a call, on the thread whose memory the call uses."""
    printed(f"""{CALLS}
import signal
small, grads, call, back = forward(700, 700, 8, 8), backward(500, 8, 8), forward(5000, 5000, 8, 8), backward(3000, 8, 8)
expected, expected_grads, expected_call, expected_back = small(), grads(), call(), back()
met = []
def handler(number, frame):
    met.append(same(small(), expected) and same(grads(), expected_grads))
    signal.setitimer(signal.ITIMER_REAL, 0.15)                  # from its end on: a slow machine comes forward too
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.1)
for threads in (1, 2):
    fastattn.set_num_threads(threads)
    assert same(call(), expected_call) and same(back(), expected_back)
signal.setitimer(signal.ITIMER_REAL, 0)
assert met and all(met), met
""")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_looks_for_signals_change_nothing(dtype: str) -> None:
    """A call of one thread looks for signals between two tiles every 50 ms; AMX's tile registers are set up anew behind each look. The
    same sequence repeated many times is one long call, whose results are those of the short call."""
    printed(f"""{CALLS}
fastattn.set_num_threads(1)
q, k, v, dout = (x[0, :600].reshape(1, 600, 4, 64) for x in arrays(600, 600, 4, 4, {dtype!r}))
def results(q, k, v, dout):
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    grads = fastattn.attention_backward(dout, q, k, v, out, lse, causal=True)
    return [out, lse, *grads[:3]]
want, repeats, slowest = results(q, k, v, dout), 16, 0
while slowest < 0.4:                                                # seconds: eight looks at least
    repeats *= 2
    begin = time.perf_counter()
    got = results(*(np.repeat(x, repeats, 0) for x in (q, k, v, dout)))
    slowest = time.perf_counter() - begin
    assert all(np.array_equal(x, np.broadcast_to(y, x.shape)) for x, y in zip(got, want, strict=True))
""")


@not_sanitized
@pytest.mark.parametrize("call", ["transform_bias_rescale_qkv(x, bias, 16)", "transform_bias_rescale_qkv_backward(heads, heads, heads)"])
def test_transform_stops_at_a_signal(call: str) -> None:
    """The traceback says that the exception left the engine's own call. Strided arrays take longer, and more rows do: the
    engine looks for signals every 50 ms, and a call that ends before does not look."""
    printed(f"""{CALLS}
import signal, traceback
from fastattn.compat.transform import transform_bias_rescale_qkv, transform_bias_rescale_qkv_backward
def handler(number, frame):
    raise TimeoutError
signal.signal(signal.SIGALRM, handler)
fastattn.set_num_threads(1)
def stops_inside():
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        {call}
        signal.pause()
    except TimeoutError as error:
        return "end_call" in "".join(traceback.format_exception(error))
for rows in (8000, 16000, 32000, 64000):
    heads = np.zeros((1, 64, 16, rows), np.float32).transpose(0, 2, 3, 1)
    x, bias = np.zeros((3072, rows), np.float32).T[None], np.zeros(3072, np.float32)
    if any(stops_inside() for attempt in range(4)):
        break
else:
    raise AssertionError("it never stopped inside")
""")


# ---------------------------------------------------------------- lengths
def test_lengths_that_change_during_a_call() -> None:
    """Another thread writes cu_seqlens while calls run. The engine reads them once,
    so it writes all of the results and nothing else."""
    printed(f"""{CALLS}
from fastattn import cpu
from fastattn.arrays.convert import view
from fastattn.problem import Grads
from fastattn.problem import Operands, make_problem
import sys
sys.setswitchinterval(1e-5)
q = np.ones((4000, 2, 64), np.float32)
choices = [np.array(x) for x in ([0, 0, 0, 4000], [0, 4000, 4000, 4000], [0, 1, 2, 3], [0, 1300, 2600, 4000])]
cu, going = choices[0].copy(), [True]
def flip():
    n = 0
    while going:
        n += 1
        cu[:] = choices[n % 4]
thread = threading.Thread(target=flip)
thread.start()
try:
    lse, out, dq, dk, dv = (np.empty((2, 4000), np.float32), *(np.empty_like(q) for _ in range(4)))
    views = {{name: view(x, "call", name) for name, x in dict(q=q, lse=lse, out=out, dq=dq, dk=dk, dv=dv, cu=cu).items()}}
    begin = time.perf_counter()
    while time.perf_counter() - begin < 3:
        o = Operands(views["q"], views["q"], views["q"], cu_seqlens_q=views["cu"], cu_seqlens_k=views["cu"])
        try:
            p, o = make_problem("attention_varlen", o, packed=True)
        except ValueError:
            continue
        for x in (lse, out, dq, dk, dv):
            x[...] = np.nan
        cpu.forward(p, o, views["out"], views["lse"])
        assert not np.isnan(out).any() and not np.isnan(lse).any()
        cpu.backward(p, o, views["q"], views["out"], views["lse"], None, Grads(views["dq"], views["dk"], views["dv"]))
        assert not np.isnan(dv).any()
finally:
    going.clear()
    thread.join()
""")


@pytest.mark.parametrize("most", ["max_seqlen_q", "max_seqlen_k"])
def test_a_maximum_that_no_sequence_has(most: str) -> None:
    """Neither time nor memory grows with it, and results have the same bits."""
    draw = np.random.default_rng(0)
    q, k, v, dout = (draw.standard_normal((700, 2, 32), np.float32) for _ in range(4))
    cu = np.array([0, 3, 700], np.int32)

    def call(**options: Any) -> list[Any]:
        out, lse = fastattn.attention_varlen(q, k, v, cu, cu, return_lse=True, **options)
        return [out, lse, *fastattn.attention_varlen_backward(dout, q, k, v, out, lse, cu, cu, **options)[:3]]

    expected, begin = call(), time.perf_counter()
    got = call(**{most: 2**31 - 1})
    assert time.perf_counter() - begin < 1
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@not_sanitized
def test_one_long_sequence_among_many() -> None:
    """Work grows with the number of keys, not with the longest sequence times the number of sequences."""
    many = 50_000
    cu = np.concatenate([[0], np.cumsum(np.ones(many, np.int64)), [many + 30_000]])
    x = np.ones((many + 30_000, 1, 8), np.float32)
    lse = np.zeros((1, len(x)), np.float32)
    begin = time.perf_counter()
    grads = fastattn.attention_varlen_backward(x, x, x, x, x, lse, cu, cu, window=(20, 0))
    assert time.perf_counter() - begin < 5 and np.isfinite(grads.dq).all()


# ---------------------------------------------------------------- memory that a call takes and keeps
@not_sanitized
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("options", [
    "'float32', bias=np.ones((N, N), np.float32)", "'float16', bias=np.ones((N, N), np.float16)",
    "'float16', bias=np.ones((1, 2, N, N), np.float16)", "'bfloat16', bias=np.ones((N, N), np.float32)",
    "'bfloat16', bias=np.ones((N, N), ml_dtypes.bfloat16)", "'float16', bias=np.ones((1, 2, N, 1), np.float16)",
    "'float16', bias=np.ones((1, N), np.float16)", "'float32', bias=np.ones((N, 1), np.float32)"])
def test_dbias_needs_little_extra_memory(options: str) -> None:
    """Less than 64 MB beyond inputs and results, where float32 sums of dbias's shape would take 144 MB a head."""
    forward, backward = map(int, printed(f"{EXTRA}N = 6000\nprint(*both(N, 2, 2, {options}, need_dbias=True, window=(300, 0)))").split())
    print(f"extra: forward {forward / 1e6:.1f} MB, backward {backward / 1e6:.1f} MB")
    assert forward < 64e6 and backward < 64e6


@not_sanitized
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_kept_for_the_next_call() -> None:
    """At most 36 MB a call and 8 MB a thread stay, though the sums of dQ took
    100 MB; nothing stays of a thread that ended."""
    kept, ended = map(int, printed(f"""{EXTRA}
import threading
def call():
    x = np.ones((1, 400_000, 1, 64), np.float16)
    fastattn.attention_backward(x, x, x, x, x, np.zeros((1, 1, 400_000), np.float32), window=(8, 0))
both(2048, 8, 8, "float32")
before = status("VmRSS")
call()
kept = status("VmRSS") - before
def ended(count):
    for _ in range(count):
        thread = threading.Thread(target=both, args=(1024, 4, 4, "float32"))
        thread.start()
        thread.join()
    return status("VmRSS")
print(kept, -ended(8) + ended(16))                              # what malloc keeps of freed memory it has after a few
""").split())
    print(f"kept {kept / 1e6:.1f} MB, of threads that ended {ended / 1e6:.1f} MB")
    assert kept < 48e6 and ended < 48e6
