"""The two operators that torch knows: `fastattn::attention` and `fastattn::attention_backward`, with a rule for each of torch's machines.

    rule          what it is                                            who asks for it
    real          the call into fastattn                                every backend
    fake          shapes, dtypes and strides of the results             torch.compile, torch.export, FakeTensor, the meta device
    autograd      in autograd.py                                        backward
    autocast      q, k and v in the dtype of torch.autocast             torch.autocast on CPU and CUDA
    vmap          entries become a batch, else one call for each          torch.vmap

`Arguments` is the one list of what an operator takes. The schemas are made of it. Users call functions.py.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastattn

from ..arrays.view import View
from ..errors import message
from ..options import SEED, Check, read_options
from ..problem import Operands, problem_of


class Arguments(NamedTuple):
    """The arguments of `fastattn::attention`, in their order: first all tensors, then the options.

    Names and meanings are those of `fastattn.attention`, or of `fastattn.attention_varlen` where cu_seqlens_q is given.
    The differences: `causal` is a string, "" for False; `window` is two numbers; `seed` is a 0-d int64 tensor in host
    memory, so that a compiled function takes a new one in each step; `deterministic` is for the backward.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None
    alibi_slopes: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor | None
    seed: Tensor | None
    causal: str
    window_left: int | None
    window_right: int | None
    softmax_scale: float | None
    softcap: float | None
    dropout_p: float
    offset: int
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    layout: str
    deterministic: bool
    engine: str | None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def call(self) -> str:
        return "attention_varlen" if self.packed else "attention"

    def window(self) -> tuple[int | None, int | None] | None:
        return None if self.window_left is None and self.window_right is None else (self.window_left, self.window_right)

    def lengths(self) -> tuple[Tensor, ...]:
        """The positional arguments after q, k, v (out, lse) of the packed functions."""
        return () if self.cu_seqlens_q is None or self.cu_seqlens_k is None else (self.cu_seqlens_q, self.cu_seqlens_k)

    def keywords(self) -> dict[str, Any]:
        """What fastattn's forward and backward both take by keyword."""
        words: dict[str, Any] = {
            "bias": self.bias, "sinks": self.sinks, "mask": self.mask, "alibi_slopes": self.alibi_slopes, "causal": self.causal or False,
            "window": self.window(), "softmax_scale": self.softmax_scale, "softcap": self.softcap, "dropout_p": self.dropout_p,
            "seed": self.seed, "offset": self.offset, "layout": self.layout, "engine": self.engine
        }
        if self.packed:
            words |= {"max_seqlen_q": self.max_seqlen_q, "max_seqlen_k": self.max_seqlen_k, "seqused_k": self.seqused_k}
        return words


def causal_name(causal: bool | str) -> str:
    """`causal` as an operator takes it."""
    return "bottom_right" if causal is True else causal or ""


def seed_tensor(call: str, seed: Any) -> Tensor | None:
    """The seed as the operator takes it. Seeds of 2**63 and more become negative: the same 64 bits."""
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        if seed.device.type not in ("cpu", "meta") or seed.dim() or seed.dtype != torch.int64:
            raise TypeError(message(call, "seed", f"is a tensor of dtype {seed.dtype} and shape {tuple(seed.shape)} on {seed.device}",
                                    "an integer, or a 0-d int64 tensor on the CPU, because the host never waits for a device"))
        return seed
    if not torch.compiler.is_compiling() and not isinstance(seed, torch.SymInt):
        seed = Check(call).integer("seed", seed, *SEED)
    if seed >= 2**63:
        if torch.compiler.is_compiling():
            raise ValueError(message(call, "seed", "is 2**63 or more", "at most 2**63 - 1 where torch compiles",
                                     "seed - 2**64 is the same key"))
        seed = seed - 2**64
    return torch.full((), seed, dtype=torch.int64, device="cpu")


TENSORS = Arguments._fields.index("causal")                 # so many arguments are tensors
_SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "str": "str", "str | None": "str?", "int": "SymInt",
                 "int | None": "SymInt?", "float": "float", "float | None": "float?", "bool": "bool"}
_schema = ", ".join(f"{_SCHEMA_TYPES[kind.__forward_arg__]} {name}" for name, kind in Arguments.__annotations__.items())
FORWARD, BACKWARD = "fastattn::attention", "fastattn::attention_backward"
torch.library.define(FORWARD, f"({_schema}) -> (Tensor out, Tensor lse)", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(BACKWARD, f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool need_dbias, {_schema})"
                     " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)", tags=torch.Tag.pt2_compliant_tag)
BEFORE = 5                                                  # arguments of attention_backward before those of attention
forward, backward = torch.ops.fastattn.attention.default, torch.ops.fastattn.attention_backward.default


# ---------------------------------------------------------------- real tensors
def forward_now(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*arguments)
    call: Any = fastattn.attention_varlen if a.packed else fastattn.attention
    out, lse = call(a.q, a.k, a.v, *a.lengths(), return_lse=True, **a.keywords())
    return out, lse


def backward_now(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, need_dbias: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients. Where one does not exist, an empty tensor stands: an operator cannot return None."""
    a = Arguments(*arguments)
    call: Any = fastattn.attention_varlen_backward if a.packed else fastattn.attention_backward
    grads = call(dout, a.q, a.k, a.v, out, lse, *a.lengths(), dlse=dlse, need_dbias=need_dbias, deterministic=a.deterministic,
                 **a.keywords())
    return tuple([a.q.new_empty(0) if grad is None else grad for grad in grads])


# ---------------------------------------------------------------- fake tensors
def _fake_view(x: Tensor | None, heads_first: bool = False) -> View | None:
    """x without memory, on a device whose values nobody reads."""
    if x is None:
        return None
    view = View(0, tuple(x.shape), (0,) * x.dim(), str(x.dtype).removeprefix("torch."), (f"fake {x.device.type}", x.device.index or 0), x)
    return view.bshd() if heads_first else view


def _check(a: Arguments) -> None:
    """The argument checks of a real call, as far as shapes are numbers. What is left is checked when the call runs."""
    options = (a.window_left, a.window_right, a.offset, a.max_seqlen_q, a.max_seqlen_k)
    for name, x, axes in (("q", a.q, 3 if a.packed else 4), ("k", a.k, 3 if a.packed else 4), ("v", a.v, 3 if a.packed else 4)):
        torch._check(x.dim() == axes, lambda name=name, x=x, axes=axes: f"{a.call}(): {name} has {x.dim()} axes; expected {axes}.")
    tensors: list[Any] = [x for x in a[:TENSORS] if x is not None]
    if any(type(n) is not int for x in tensors for n in x.shape) or any(type(n) not in (int, type(None)) for n in options):
        return
    layout = a.layout == "bhsd"
    operands: tuple[Any, ...] = a[:TENSORS - 1]
    views = [_fake_view(x, layout and n < 3) for n, x in enumerate(operands)]
    q, k, v, bias, sinks, mask, alibi_slopes, cu_q, cu_k, used = views
    assert q is not None and k is not None and v is not None
    seed = None if a.seed is None else 0
    problem_of(a.call, Operands(q, k, v, bias, mask, alibi_slopes, sinks, cu_q, cu_k, used),
               read_options(a.call, a.causal or False, a.window(), a.softmax_scale, a.softcap, a.dropout_p, seed, a.offset, a.max_seqlen_q,
                            a.max_seqlen_k))


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*arguments)
    _check(a)
    q, exact = a.q, torch.float64 if a.q.dtype == torch.float64 else torch.float32
    if a.packed:
        lse = (q.shape[1], q.shape[0])
    else:
        lse = (q.shape[0], *q.shape[1:3]) if a.layout == "bhsd" else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], a.v.shape[-1])), q.new_empty(lse, dtype=exact)


def _fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, need_dbias: bool, *arguments: Any) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    return tuple([a.q.new_empty(0) if x is None else x.new_empty(x.shape)
                  for x in (a.q, a.k, a.v, a.bias if need_dbias else None, a.sinks)])


# ---------------------------------------------------------------- autocast
def cast(a: Arguments, dtype: torch.dtype) -> Arguments:
    """q, k and v in `dtype`, as torch's own attention under autocast: tensors of float64 stay.

    A bias stays float32 if it is that, because the scores are too; one of another type becomes `dtype`.
    """
    half = [x.to(dtype) if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x for x in (a.q, a.k, a.v)]
    bias = a.bias if a.bias is None or a.bias.dtype not in (torch.float16, torch.bfloat16) else a.bias.to(dtype)
    return a._replace(q=half[0], k=half[1], v=half[2], bias=bias)


def _autocast(device_type: str) -> Any:
    def rule(*arguments: Any) -> Any:
        cast_arguments = cast(Arguments(*arguments), torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return forward(*cast_arguments)
    return rule


# ---------------------------------------------------------------- vmap
def each(operator: Any, before: int = 0) -> Any:
    """The operator on a batch of arguments, as torch.vmap asks for it. `before`: so many arguments stand before those of `Arguments`."""
    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        n, a = info.batch_size, Arguments(*arguments[before:])
        need_dbias = before > 0 and arguments[before - 1]
        if not need_dbias and _places_are_free(a) and all(axis is None for axis in in_dims[before + 3:]):
            one = operator(*[_merged(x, axis, n) if at < before + 3 else x
                             for at, (x, axis) in enumerate(zip(arguments, in_dims, strict=True))])
            results = tuple([x.unflatten(0, (n, x.shape[0] // n)) for x in one])
        else:
            calls = [operator(*[x if axis is None else x.select(axis, at) for x, axis in zip(arguments, in_dims, strict=True)])
                     for at in range(n)]
            results = tuple([torch.stack(column) for column in zip(*calls, strict=True)])
        return results, (0,) * len(results)
    return rule


def _places_are_free(a: Arguments) -> bool:
    """Whether a result is the same wherever its entry stands in the batch: then entries of vmap become entries of one call."""
    spread = all(x is None or x.dim() < 4 or x.shape[0] == 1 for x in (a.bias, a.mask))
    return not a.packed and not a.dropout_p and a.sinks is None and spread and (a.alibi_slopes is None or a.alibi_slopes.dim() == 1)


def _merged(x: Any, axis: int | None, n: int) -> Any:
    """A tensor of all n entries, with vmap's axis merged into the batch."""
    if not isinstance(x, Tensor):
        return x
    return (x.movedim(axis, 0) if axis is not None else x.expand(n, *x.shape)).flatten(0, 1)


for _name, _operator, _real, _fake, _before in ((FORWARD, forward, forward_now, _fake_forward, 0),
                                                (BACKWARD, backward, backward_now, _fake_backward, BEFORE)):
    torch.library.impl(_name, "CompositeExplicitAutograd")(_real)
    torch.library.register_fake(_name, _fake)
    torch.library.register_vmap(_name, each(_operator, _before))
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    torch.library.impl(FORWARD, _key)(_autocast(_device_type))
