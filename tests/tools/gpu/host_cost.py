"""The host's time of repeated calls on small tensors, (1, 8, 64, 64) float16:

    python -m tests.tools.gpu.host_cost [--processes 5] [--profile forward]

On a GPU torch's backends stand beside it. Without one, CPU tensors pose as CUDA's, and cuda-bindings loads a driver whose functions do
nothing: what is left is Python. Microseconds, the median of processes; of each the lower tenth of many short rounds, because other
programs only ever add to them.
"""
from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROUNDS, CALLS = 400, 20
DRIVER = r"""
#include <stdint.h>
#include <string.h>
typedef int Function();
static int nothing() { return 0; }
static int handle(uint64_t *result) { *result = 0x7000; return 0; }
static int number(int *result) { *result = 0; return 0; }
static int capturing(uint64_t stream, int *result) { *result = 0; return 0; }
static int attribute(int *result, int which, int device) {
    *result = which == 75 ? 9 : which == 76 ? 0 : which == 16 ? 132 : 232448;       /* an H200's */
    return 0;
}
static int name(char *result, int size, int device) { strcpy(result, "none"); return 0; }
static int memory(uint64_t *result, uint64_t size) { static char bytes[1 << 20]; *result = (uint64_t)bytes; return 0; }
static const struct { const char *name; Function *function; } functions[] = {
    {"cuCtxGetCurrent", handle}, {"cuStreamIsCapturing", capturing}, {"cuDeviceGet", number}, {"cuDevicePrimaryCtxRetain", handle},
    {"cuDeviceGetAttribute", attribute}, {"cuDeviceGetName", name}, {"cuMemAlloc", memory}, {"cuMemAllocFromPoolAsync", memory},
    {"cuMemAllocHost", memory}, {"cuStreamCreate", handle}, {"cuLibraryLoadData", handle}, {"cuLibraryEnumerateKernels", handle},
    {"cuKernelGetFunction", handle}, {"cuMemPoolCreate", handle}};
int cuInit(int flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetProcAddress_v2(const char *wanted, void **function, int version, uint64_t flags, int *status) {
    *function = strcmp(wanted, "cuGetProcAddress") ? (void *)nothing : (void *)cuGetProcAddress_v2;
    for (unsigned n = 0; n < sizeof functions / sizeof *functions; n++)
        if (!strcmp(wanted, functions[n].name)) *function = (void *)functions[n].function;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char *wanted, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(wanted, function, version, flags, 0);
}
"""


# ---------------------------------------------------------------- one process
def pose(torch: Any) -> None:
    """CPU tensors say that they are on device 0, and kernels are not compiled. Only for calls that nothing computes."""
    from fastattn.gpu.runtime import cache
    from fastattn.gpu.runtime import compile as compiler

    torch._C._cuda_getCurrentRawStream = [0x60].__getitem__
    torch.Tensor.get_device, torch.Tensor.is_cuda, torch.Tensor.is_cpu = int, True, False
    compiler.binary = lambda source, arch, announce=True: cache.Binary(b"none", 1024, "")


class Timed(NamedTuple):
    """A call, and the only backend that torch's attention may take in it, None for its choice."""

    call: Callable[[], Any]
    backend: Any = None


def timed(torch: Any) -> dict[str, Timed]:
    """What is timed, by name."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    import fastattn.torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        pose(torch)
    q, k, v, dout = torch.randn(4, 1, 8, 64, 64, device="cuda" if on_gpu else "cpu").half().unbind()
    trained = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = fastattn.attention(q, k, v, layout="bhsd", return_lse=True)
    found = {
        "an empty tensor": Timed(lambda: torch.empty_like(q)),
        "fastattn forward": Timed(lambda: fastattn.attention(q, k, v, layout="bhsd")),
        "fastattn forward, lse": Timed(lambda: fastattn.attention(q, k, v, layout="bhsd", return_lse=True)),
        "fastattn backward": Timed(lambda: fastattn.attention_backward(dout, q, k, v, out, lse, layout="bhsd")),
    }

    k_pages, v_pages = torch.zeros(2, 64, 16, 8, 64, device=q.device).half().unbind()
    rows, heads = torch.zeros(4, 1, 32, 64, device=q.device).half(), torch.zeros(2, 4, 1, 8, 64, device=q.device).half()
    small: dict[str, Any] = {"cache_seqlens": torch.full((4,), 100, device=q.device, dtype=torch.int32),
                             "block_table": torch.arange(32, device=q.device, dtype=torch.int32).reshape(4, 8)}
    cos, sin = torch.zeros(2, 128, 32, device=q.device).unbind()       # two tensors, as models have them
    new = heads.unbind()
    k_rows, v_rows = (x.reshape(4, 128, 8, 64) for x in (k_pages[:32], v_pages[:32]))
    lengths = small["cache_seqlens"]
    found |= {
        "a step over caches": Timed(lambda: fastattn.attention_with_kvcache(rows, k_pages, v_pages, **small)),
        "a step over rows": Timed(lambda: fastattn.attention_with_kvcache(rows, k_rows, v_rows, cache_seqlens=lengths)),
        "a step that appends": Timed(lambda: fastattn.attention_with_kvcache(rows, k_pages, v_pages, *new, **small)),
        "a step that rotates": Timed(lambda: fastattn.attention_with_kvcache(rows, k_pages, v_pages, *new, rotary_cos=cos, rotary_sin=sin,
                                                                             **small))}

    def add(name: str, attend: Callable[..., Any], backend: Any = None) -> None:
        kept: list[Any] = []

        def backward() -> Any:
            kept[:] = kept or [attend(*trained)]
            return torch.autograd.grad(kept[0], trained, dout, retain_graph=True)
        found[f"{name} forward"] = Timed(lambda: attend(q, k, v), backend)
        found[f"{name} forward, graph"] = Timed(lambda: attend(*trained), backend)
        found[f"{name} backward"] = Timed(backward, backend)
        found[f"{name} step"] = Timed(lambda: torch.autograd.grad(attend(*trained), trained, dout), backend)

    add("fastattn.torch", lambda q, k, v: fastattn.torch.attention(q, k, v, layout="bhsd"))
    if on_gpu:
        backend = torch.nn.attention.SDPBackend
        add("SDPA", sdpa)
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            add(f"SDPA {name.partition('_')[0].lower()}", sdpa, getattr(backend, name))
    return found


def microseconds(call: Callable[[], Any], wait: Callable[[], None]) -> float:
    for _ in range(5):
        call()
    rounds = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append(time.perf_counter() - start)
    return sorted(rounds)[ROUNDS // 10] / CALLS * 1e6


def measure(profile: str) -> None:
    """Print the times of this process as JSON, or the profile of one call."""
    import torch

    found, wait, times = timed(torch), torch.cuda.synchronize if torch.cuda.is_available() else lambda: None, {}
    gc.disable()
    for name, (call, backend) in found.items():
        if profile in ("", name):
            with torch.nn.attention.sdpa_kernel(backend) if backend else contextlib.nullcontext():
                times[name] = microseconds(call, wait)
    print(json.dumps(times))
    if profile:
        with cProfile.Profile() as profiler:
            for _ in range(5000):
                found[profile].call()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


# ---------------------------------------------------------------- all processes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--profile", default="", help="a name of the table, of which a profile is printed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        measure(given.profile)
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            source = Path(folder, "driver.c")
            source.write_text(DRIVER, encoding="utf-8")
            subprocess.run(["cc", "-O2", "-w", "-shared", "-fPIC", "-o", f"{folder}/libcuda.so.1", str(source)], check=True)
            environment["LD_LIBRARY_PATH"] = folder
        command = [sys.executable, "-m", "tests.tools.gpu.host_cost", "--child", "--profile", given.profile]
        texts = [subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
                 for _ in range(1 if given.profile else given.processes)]
    if given.profile:
        print(texts[0])
        return
    answers = [json.loads(text) for text in texts]
    for name in answers[0]:
        times = [answer[name] for answer in answers]
        print(f"{name:32} {statistics.median(times):7.1f}   {min(times):.1f} to {max(times):.1f}")


if __name__ == "__main__":
    main()
