"""What `explain` says is what a call does, and it does nothing itself."""
from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import fastattn
import tests.tools.compare  # noqa: F401  which registers "naive"
from fastattn import attention, attention_backward, explain, registry, use_engine
from fastattn.arrays.convert import view
from fastattn.engine import Engine
from fastattn.problem import Operands, Problem, make_problem
from tests.tools.other_engines import Noter, torch_on_the_cpu
from tests.tools.problems import CASES, Case

pytestmark = pytest.mark.usefixtures("log")


def arrays(dtype: str = "float16", head_dim: int = 64) -> list[Any]:
    return [np.ones((2, 70, 4, head_dim), dtype) for _ in range(3)]


def test_explain_on_the_host() -> None:
    with torch_on_the_cpu() as engine:
        _on_the_host()
    assert engine.calls == []


def _on_the_host() -> None:
    found = explain(attention, *arrays(), causal=True)
    assert (found.call, found.engine, found.kernels) == ("attention", "cpu", ())
    assert found.reasons == (dict.fromkeys(("naive", "torch"), "it is registered, but not activated")
                             | dict.fromkeys(("sm90", "sm80", "simt"), "it reads CUDA memory")
                             | {"reference": "it runs only where it is named"})
    assert str(found).startswith("attention on the CPU: cpu (") and "\n  not torch: it is registered, but not activated\n" in str(found)
    with use_engine("torch", "cpu", "sm80"):
        found = explain(attention, *arrays(), softcap=2.0)
        assert found.engine == "cpu" and found.reasons["torch"] == "torch's kernel has no softcap"
        assert found.reasons["reference"] == "use_engine('torch', 'cpu', 'sm80') does not name it"
        assert explain(attention, *arrays()).engine == "torch" and explain(attention, *arrays()).reasons["cpu"] == "it comes after torch"
    found = explain(functools.partial(attention, engine="torch"), *arrays(), dropout_p=0.5, seed=1)
    assert found.engine is None and str(found).startswith("attention on the CPU: no engine takes it\n")


def test_explain_writes_nothing() -> None:
    out = np.full((2, 70, 4, 64), 7, np.float16)
    explain(attention, *arrays(), out=out)
    explain(attention, *arrays(), out=out, engine="reference")
    assert (out == 7).all()


def test_explain_raises_what_the_call_raises() -> None:
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"attention\(\): k has head_dim 32"):
        explain(attention, q, k[..., :32], v)
    with pytest.raises(ValueError, match="engine is 'sm80' but q is on device"):
        explain(attention, q, k, v, engine="sm80")
    with pytest.raises(TypeError, match=r"explain\(\): call is dropout_mask, which called no attention; expected fastattn\.attention"):
        explain(fastattn.dropout_mask, 1, 1, 2, 2, dropout_p=0.5, seed=1)
    problem, _ = make_problem("attention", Operands(*[view(x, "f", "x") for x in (q, k, v)]), packed=False)
    with pytest.raises(ValueError, match=r"explain\(\): device is None; expected 'cpu' or an architecture"):
        explain(problem)
    with pytest.raises(TypeError, match="a Problem has no arguments but device and engine"):
        explain(problem, q, device="cpu")
    assert explain(problem, device="cpu", engine="reference").config == "float64 NumPy"
    pytest.importorskip("numba.cuda")
    with pytest.raises(ValueError, match=r"explain\(\): device is 'sm_70'; expected 'cpu' or one of sm_80, "):
        explain(problem, device="sm_70")


def test_explain_on_an_absent_gpu() -> None:
    pytest.importorskip("numba.cuda")
    found = explain(attention, *arrays(), causal=True, device="sm_90a")
    assert found.engine == "sm90" and found.config.startswith("forward_sm90 ") and found.kernels[0].startswith("forward_sm90 float16 ")
    assert found.reasons["simt"] == "it comes after sm90" and found.reasons["cpu"] == "it reads host memory"
    found = explain(attention, *arrays(), device="8.0")
    assert found.engine == "sm80" and found.reasons["sm90"] == "it needs sm_90a, this is sm_80"
    found = explain(attention, *arrays("float32"), device="sm_90a")
    assert found.engine == "simt" and found.reasons["sm90"] == "so few float32 products take less time on plain threads"
    floats = [np.ones((2, 300, 4, 64), np.float32)] * 3
    found = explain(attention, *floats, device="sm_90a")
    assert found.engine == "sm90" and [key.split()[0] for key in found.kernels] == ["forward_sm90_float"]
    found = explain(attention, *[x[..., ::2] for x in floats], device="sm_90a")
    assert found.engine == "sm90" and [key.split()[0] for key in found.kernels] == ["forward_sm90_float", "split"]
    lse = np.ones((2, 4, 300), np.float32)
    found = explain(attention_backward, *floats, *floats[:2], lse, device="sm_90a")
    assert found.engine == "sm90" and "backward_sm90_float float32 head_dim 64" in found.kernels
    found = explain(attention_backward, *floats, *floats[:2], lse, deterministic=True, device="sm_90a")
    assert found.engine == "simt" and found.reasons["sm90"] == "the sums of its float32 dq come in any order"
    found = explain(attention, *[np.ones((1, 400, 2, 160), np.float32)] * 3, device="sm_90a")
    assert found.engine == "sm90" and found.reasons["sm80"] == "head_dim is 160, over 128 in float32"
    assert [key.split()[0] for key in found.kernels] == ["forward_sm90_float", "split"]
    found = explain(attention, *[np.ones((1, 4096, 1, 512), np.float32)] * 3, device="sm_90a")
    assert [key.split()[0] for key in found.kernels] == ["forward_sm90_float", "merge_sm90_float", "split"]
    found = explain(attention, *[np.ones((1, 400, 2, 560), np.float32)] * 3, device="sm_90a")
    assert [key.split()[0] for key in found.kernels] == ["forward_sm90_float", "split"]
    found = explain(attention, *arrays("float64"), device="sm_90a")
    assert found.engine == "simt" and found.reasons["sm80"] == "it has no float64 products"
    found = explain(attention, *arrays(), engine="sm90", device="sm_80")
    assert found.engine is None and found.kernels == () and found.reasons["simt"] == "engine='sm90' does not name it"
    lse = np.ones((2, 4, 70), np.float32)
    found = explain(attention_backward, *arrays(), *arrays()[:2], lse, deterministic=True, device="sm_80")
    assert found.engine == "simt" and found.reasons["sm80"] == "its sums of dq come in any order" and len(found.kernels) > 2
    packed = [np.ones((140, 4, 64), np.float16)] * 3
    found = explain(fastattn.attention_varlen, *packed, [0, 70, 140], [0, 70, 140], device="sm_90a")
    assert any(key.startswith("plan_packed") for key in found.kernels)
    assert explain(attention, *[x[:, :0] for x in arrays()], device="sm_90a").kernels == ()
    from fastattn.compat.sdpa import scaled_dot_product_attention

    assert explain(scaled_dot_product_attention, *arrays(), device="sm_90a").engine == "sm90"
    with Noter("one").registered("cuda").activate():
        assert explain(attention, *arrays(), device="sm_90a").engine == "one"


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("everything_float32", "everything_packed", "causal_float16")],
                         ids=lambda case: case.name)
def test_a_problem_is_explained_like_its_call(case: Case) -> None:
    pytest.importorskip("numba.cuda")
    inputs = case.make()
    function = fastattn.attention_varlen if inputs.packed else attention
    for device in ("sm_90a", "sm_80", "cpu"):
        by_call = explain(function, *inputs.args, **inputs.kwargs, device=device)
        problems: list[Problem] = []
        noting = Engine("note", "cpu", lambda problem, *_, to=problems: to.append(problem), None, lambda problem: None)
        with registry.scope(lambda engine, noting=noting: noting):
            function(*inputs.args, **inputs.kwargs)
        by_problem = explain(problems[0], device=device)
        assert (by_problem.engine, by_problem.config) == (by_call.engine, by_call.config)


def test_a_backward_is_explained_from_its_inputs() -> None:
    pytest.importorskip("numba.cuda")
    q, k, v = arrays()
    lse, bias = np.ones((q.shape[0], q.shape[2], q.shape[1]), np.float32), np.ones((1, q.shape[1], k.shape[1]), q.dtype)
    for device in ("sm_90a", "sm_80", "cpu"):
        for keywords in ({"causal": True}, {"bias": bias, "need_dbias": True},
                         {"deterministic": True, "sinks": np.ones(q.shape[2], np.float32)}):
            short = explain(attention_backward, q, k, v, **keywords, device=device)
            assert short == explain(attention_backward, q, q, k, v, q, lse, **keywords, device=device)
    packed, cu, lse = [np.ones((140, 4, 64), np.float16)] * 3, [0, 70, 140], np.ones((4, 140), np.float32)
    short = explain(fastattn.attention_varlen_backward, *packed, cu, cu_seqlens_k=cu, device="sm_90a")
    assert short == explain(fastattn.attention_varlen_backward, packed[0], *packed, packed[0], lse, cu, cu, device="sm_90a")
    with pytest.raises(TypeError, match="missing"):
        explain(attention_backward, q, k)


def test_explain_without_the_gpu_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.engine._loaded", {})
    monkeypatch.setattr("fastattn.engine._MODULES", {"gpu": ".no_such_module", "cpu": ".no_such_module"})
    found = explain(attention, *arrays(), device="sm_90a")
    assert found.engine is None and "pip install 'fastattn[gpu]'" in found.reasons["sm80"]
    assert "builds it and needs gcc" in explain(attention, *arrays()).reasons["cpu"]


@pytest.mark.parametrize("call", [attention, attention_backward])
def test_nothing_is_loaded_for_an_explanation(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of an explained call are listed: no kernel is loaded and no memory allocated, whatever other threads launch."""
    pytest.importorskip("numba.cuda")
    from fastattn.gpu.runtime import compile as compiler
    from fastattn.gpu.runtime import tensormap, workspace

    monkeypatch.setattr(compiler, "Kernel", None)
    monkeypatch.setattr(workspace, "driver", None)
    monkeypatch.setattr(tensormap, "driver", None)
    for arch in ("sm_80", "sm_90a"):
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(explain, call, *arrays(), device=arch) for _ in range(8)]
            found = [each.result() for each in waiting]
        assert len(found[0].kernels) == (1 if call is attention else 2 + (arch == "sm_80")) and all(one == found[0] for one in found)
