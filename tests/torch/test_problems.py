"""The named problems through fastattn.torch: eager, and as torch's operators. Both give the bits of fastattn's own functions."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from fastattn.torch import attention, attention_varlen  # noqa: E402
from tests.tools.problems import CASES, NUMPY, Case  # noqa: E402


class Watched(TorchDispatchMode):
    """A mode that changes nothing: under it a call is an operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def tensor(x: Any) -> Any:
    """A tensor over the array's memory; torch has no negative strides."""
    x = np.copy(x) if any(s < 0 for s in x.strides) or not x.flags.writeable else x
    return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if x.dtype == NUMPY["bfloat16"] else torch.from_numpy(x)


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if not case.placed], ids=lambda case: case.name)
def test_the_bits_are_those_of_fastattn(case: Case, operator: bool) -> None:
    inputs = case.make().map(tensor)
    out, lse = inputs.forward()
    grads = inputs.backward(out, lse)
    leaves = dict(zip("qkv", inputs.args[:3], strict=True))
    leaves |= {name: inputs.kwargs[name] for name in ("bias", "sinks") if name in inputs.kwargs}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}

    def gradients() -> Any:
        function = attention_varlen if inputs.packed else attention
        q, k, v, *features = leaves.values()
        keywords = {**inputs.kwargs, **dict(zip(list(leaves)[3:], features, strict=True))}
        got = function(q, k, v, *inputs.args[3:], **keywords, return_lse=True)
        results, given = (got, (inputs.dout, inputs.dlse)) if inputs.dlse is not None else (got[:1], (inputs.dout,))
        return got, torch.autograd.grad(results, list(leaves.values()), given)
    if operator:
        with Watched():
            got, ours = gradients()
    else:
        got, ours = gradients()
    want = {"q": grads.dq, "k": grads.dk, "v": grads.dv, "bias": grads.dbias, "sinks": grads.dsinks}
    for a, b in [(got[0], out), (got[1], lse), *[(g, want[name]) for g, name in zip(ours, leaves, strict=True)]]:
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-3.0), b.nan_to_num(nan=-3.0))
