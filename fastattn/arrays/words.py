"""Other libraries' arrays in error texts: how a caller writes a cast there, and what frameworks pass while they
transform a function.

No library is imported here: one whose array came in is loaded already.
"""
from __future__ import annotations

import sys
from typing import Any

import numpy as np


def root(x: Any) -> str:
    """The top package of x's type: "numpy", "torch", "jaxlib"."""
    return type(x).__module__.partition(".")[0]


def kind(x: Any) -> str:
    """`a list`, `a dask array`, `an xarray DataArray`."""
    name = type(x).__name__
    if root(x) not in ("builtins", "numpy", "__main__"):
        name = f"{root(x)} {'array' if name == 'Array' else name}"
    return f"{'an' if name.lower().startswith(('a', 'e', 'i', 'o', 'x', 'nd')) else 'a'} {name}"


_GIVES = {"dask": ".compute()", "xarray": ".data", "pandas": ".to_numpy()", "polars": ".to_numpy()", "h5py": "[...]", "zarr": "[...]",
          "tensorflow": ".value()"}                         # of a Variable; tensors speak DLPack


def held(argument: str, x: Any) -> str:
    """How an array comes out of an object that holds one: `q.data gives one`."""
    gives = _GIVES.get(root(x))
    return f"{argument}{gives} gives one" if gives else f"np.asarray({argument}) makes one of numbers"


def shown(x: Any) -> str:
    """repr of a value in one short line."""
    if isinstance(x, int) and abs(x) > 10**40:
        return f"an integer of {x.bit_length()} bits"
    text = " ".join(repr(x.item() if isinstance(x, np.generic) else x).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def dtype_of(dtype: Any) -> str:
    """The plain name, such as "float16", of a dtype in torch's, NumPy's, ml_dtypes' or JAX's spelling; "" for what is none."""
    try:
        return str(np.dtype(dtype) if isinstance(dtype, type) else dtype).rpartition(".")[2]
    except TypeError:
        return ""


# ---------------------------------------------------------------- casts
def cast(argument: str, x: Any, dtype: str) -> str:
    """`k.to(torch.float16) works`, as x's library writes it; "" for a library that is not known."""
    library = {"torch": "torch", "numpy": "np", "ml_dtypes": "np", "cupy": "cupy", "jax": "jnp", "jaxlib": "jnp"}.get(root(x), "")
    if library == "torch":
        return f"{argument}.bool() works" if dtype == "bool" else f"{argument}.to(torch.{dtype}) works"
    if not library:
        return ""
    if dtype == "bfloat16" and library != "jnp":
        library = "ml_dtypes"
    return f"{argument}.astype({dtype if dtype == 'bool' else f'{library}.{dtype}'}) works"


def like(argument: str, x: Any, other: str) -> str:
    """`k.to(q.dtype) works`; "" for a library that is not known."""
    words = cast(argument, x, "float32")
    torch: Any = sys.modules.get("torch")
    casts = ", and fastattn.torch.attention casts as torch.autocast does" if torch is not None and root(x) == "torch" \
        and torch._C._is_any_autocast_enabled() else ""
    return f"{words.partition('(')[0]}({other}.dtype) works{casts}" if words else ""


# ---------------------------------------------------------------- graphs and stand-ins
def in_graph(x: Any) -> bool:
    """Whether torch records what is done with x, because it requires grad.

    Under no_grad and in inference_mode nothing is recorded.
    """
    if getattr(x, "requires_grad", False) is not True:
        return False
    torch: Any = sys.modules.get("torch")
    return torch is None or not isinstance(x, torch.Tensor) or bool(torch.is_grad_enabled())


def is_tracer(kind: type) -> bool:
    """Whether a type is of what stands for an array in a JAX program."""
    return any(base.__name__ == "Tracer" and base.__module__.partition(".")[0] == "jax" for base in kind.__mro__)


def transformed(x: Any) -> tuple[str, str] | None:
    """(what x is, what would work) where a framework transforms or records the call; None for an array.

    There x is no array, or the framework would miss what happens to x's memory.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _transformed_by_torch(torch, x)
    if is_tracer(type(x)):
        return ("is a JAX tracer, which stands for an array inside jit, grad, vmap or scan",
                "attention and attention_varlen of fastattn.jax take tracers")
    if root(x) in ("tensorflow", "keras") and type(x).__name__ in ("SymbolicTensor", "KerasTensor"):
        return (f"is a {type(x).__name__}, which stands for a tensor inside tf.function or a Keras model",
                "tf.numpy_function calls fastattn from a graph, on NumPy arrays")
    return None


DIFFERENTIABLE = ("attention", "attention_varlen")          # the public functions that fastattn.torch has too
_OPERATOR = "fastattn.torch.attention is an operator that torch records"
_FUNCTION = "fastattn.torch.attention works in grad, vjp and vmap"


def _transformed_by_torch(torch: Any, x: Any) -> tuple[str, str] | None:
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(x):
        return "is a tensor inside torch.vmap", "fastattn.torch.attention works there, and a call outside takes the batch as an axis"
    if functorch.is_functorch_wrapped_tensor(x):
        return "is a tensor inside torch.func (grad, vjp, jvp or functionalize)", _FUNCTION
    if any(base.__name__ == "FakeTensor" for base in type(x).__mro__):
        return "is a FakeTensor, a shape without memory", f"{_OPERATOR}, with a rule for these"
    if x.is_meta:
        return "is on torch's meta device, where arrays have no memory", "fastattn.torch.attention gives shapes there"
    if torch.autograd.forward_ad._current_level >= 0 and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        return ("carries a forward-mode tangent (torch.autograd.forward_ad), which fastattn would drop",
                "unpack_dual(...).primal is without it")
    if torch._C._get_tracing_state() is not None:
        return "is recorded by torch.jit.trace, which cannot record what fastattn does", "torch.export records fastattn.torch.attention"
    if torch._C._len_torch_dispatch_stack():
        for mode in map(type, torch.utils._python_dispatch._get_current_dispatch_mode_stack()):
            if mode.__name__ in ("ProxyTorchDispatchMode", "FakeTensorMode", "FunctionalTensorMode"):
                return f"is used under {mode.__name__} (make_fx, torch.export), which cannot record what fastattn does", _OPERATOR
    return None
