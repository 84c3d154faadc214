"""Rows whose out has passed 65504, by dropout's factor: their delta is infinite, and so are their gradients. Those of other rows and of
keys that such a row does not attend are as right as ever.

A key that the row does not attend has P = 0, in tiles that the row has a part in, and 0 times infinity is NaN.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")
pytest.importorskip("cuda.core")

from fastattn import gpu
from tests.fuzz import formula, judge
from tests.fuzz.device import make_device
from tests.fuzz.found import FOUND
from tests.fuzz.inputs import make
from tests.fuzz.spec import Spec
from tests.tools.devices import requires_gpu
from tests.tools.gpu.drawn import interpreted_backward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
OVERFLOWED = [spec for spec in FOUND if spec.dtype == "float16" and spec.dropout_p > 0 and spec.v_size > 1]
PLAIN = replace(OVERFLOWED[0], engine="sm80", library="torch")
# as the fuzzer drew it: keys of two tiles
DRAWN = Spec(seed=1455434138, dtype="float16", batch=2, num_heads=3, num_heads_k=3, seqlen_q=255, seqlen_k=292, head_dim=160,
             head_dim_v=160, causal=True, window=(3, 4), softmax_scale=-1.0, dropout_p=0.99999, dropout_seed=774284048, offset=3,
             dropout_at=(0, 0, 16, 144), dropout_heads=6, diagonal=37, layout="bhsd", backward=True, dlse=True)


@pytest.mark.parametrize(("kernel", "spec"), [("backward_sm80", replace(PLAIN, sinks="normal")), ("backward_short", PLAIN)])
def test_interpreted(kernel: str, spec: Spec) -> None:
    x = make(spec)
    found, out, lse, kernels = interpreted_backward(x, "sm80")
    assert kernel in kernels
    overflowed = ~np.isfinite(out).all(axis=(0, 2, 3))
    assert 0 < overflowed.sum() < len(overflowed)
    assert judge._judged(x, found, formula.backward(x, out, lse), None) == []
    assert not np.isfinite(found["dq"][:, overflowed]).any()           # infinite or NaN, never just a wrong number
    assert spec.sinks is None or not np.isfinite(found["dsinks"]).any()
    assert not np.isfinite(found["dk"]).all() and np.isfinite(found["dv"]).all()


@requires_gpu
@pytest.mark.parametrize("family", gpu.FAMILIES)
@pytest.mark.parametrize("spec", [*OVERFLOWED, DRAWN], ids=str)
def test_on_a_gpu(spec: Spec, family: str) -> None:
    pytest.importorskip("torch")
    try:
        assert judge.complaints(replace(spec, engine=family, library="torch"), make_device("cuda")) == []
    except judge.Refused as error:
        pytest.skip(str(error))
