"""Beside PyTorch in one process: its threads and ours, and the mode of the processor that its libraries set."""
from __future__ import annotations

import pytest

from tests.tools.processes import not_sanitized, printed

pytest.importorskip("torch")

BOTH = """
import os, threading, numpy as np
q = np.random.default_rng(0).standard_normal((1, 300, 4, 64), np.float32)
{imports}
fastattn.set_num_threads(2)
torch.set_num_threads(2)
def ours():
    return fastattn.attention(q, q, q, causal=True)
def theirs():
    x = torch.from_numpy(q).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).numpy()
def agree():
    return bool(np.abs(ours() - theirs()).max() < 1e-5)
{body}
"""


@not_sanitized
@pytest.mark.parametrize("imports", ["import fastattn.cpu, torch", "import torch, fastattn"], ids=["fastattn_first", "torch_first"])
def test_both_work_in_one_process(imports: str) -> None:
    """After each other; then both pools, used by two threads at once; then fastattn in a forked child, with the same bits.

    torch is not called in the child: MKL's allocator can hang there if a thread that used MKL ended just before the fork.
    """
    body = """
expected, wrong = ours().tobytes(), []
after_each_other = all(agree() for _ in range(5))
def work(call):
    start = call()
    wrong.extend(1 for _ in range(5) if np.abs(call() - start).max() > 1e-5)
threads = [threading.Thread(target=work, args=(call,)) for call in (ours, theirs)]
for thread in threads: thread.start()
for thread in threads: thread.join()
child = os.fork()
if child == 0:
    os._exit(0 if ours().tobytes() == expected else 3)
print(after_each_other, wrong, os.waitpid(child, 0)[1], agree(), ours().tobytes() == expected)
"""
    assert printed(BOTH.format(imports=imports, body=body)) == "True [] 0 True True"


@not_sanitized
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ["baseline", ""])
def test_flushed_denormals_change_no_bit(isa: str, threads: int) -> None:
    """Libraries built with -ffast-math set the mode of the thread that loads them. The baseline converts float16 through
    numbers that it flushes."""
    printed(f"""
import numpy as np, torch, fastattn
from fastattn.compat.transform import transform_bias_rescale_qkv
fastattn.set_num_threads({threads})
draw = np.random.default_rng(0)
x, bias = (draw.standard_normal((2, 500, 192)) * 1e-5).astype(np.float16), np.zeros(192, np.float16)
q = (draw.standard_normal((1, 600, 4, 32)) * 1e-6).astype(np.float16)
def results():
    out, lse = fastattn.attention(q, q, q, return_lse=True)
    return [*transform_bias_rescale_qkv(x, bias, 4), out, lse, *fastattn.attention_backward(q, q, q, q, out, lse)[:3]]
expected = results()
assert all(np.any((a != 0) & (np.abs(a) < 6e-5)) for a in expected[:4])
if torch.set_flush_denormal(True):
    assert all(np.array_equal(a, b) for a, b in zip(results(), expected, strict=True))
""", **({"FASTATTN_ISA": isa} if isa else {}))
