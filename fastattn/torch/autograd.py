"""The derivative of attention, and the ways on which torch records it.

    way             when
    Plain           eager training without operands that change scores: the least that torch's graph costs
    Recorded        eager training with them
    the operator    torch.compile, export, fake tensors, modes, autocast
    Transformed     torch.func (grad, vjp, vmap, and nests of them)

All save the inputs, out and lse, and have first derivatives only.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch import backward_again, forward_again
from ..options import Options
from .operators import (
    BACKWARD,
    BEFORE,
    FORWARD,
    TENSORS,
    Arguments,
    backward,
    backward_now,
    causal_name,
    each,
    forward,
    forward_now,
    seed_tensor,
)

PLAIN = (Tensor, torch.nn.Parameter)                        # subclasses may stand for something else, as FakeTensor does
INPUTS = 5                                                  # q, k, v, bias and sinks, the first arguments, have gradients
# Whether torch looks at each operation: dispatch modes, and the level of torch.func. torch has no public names for them.
modes, level = torch._C._len_torch_dispatch_stack, torch._C._functorch.maybe_current_level
_is_batched, _is_wrapped = torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_functorch_wrapped_tensor


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that torch records: what functions.py calls."""
    if torch.compiler.is_compiling():
        return forward(*a)  # type: ignore[no-any-return]
    if forward_ad._current_level >= 0 and any(map(_has_tangent, a[:TENSORS])):
        _forward_mode()
    if level() is not None:
        return Transformed.apply(*a)  # type: ignore[no-any-return]
    if modes() or torch._C._is_any_autocast_enabled() or not _plain(*a[:TENSORS]):
        return forward(*a)  # type: ignore[no-any-return]
    return Recorded.apply(*a[:INPUTS], a[INPUTS:])  # type: ignore[no-any-return]


def _plain(*tensors: Any) -> bool:
    """Whether all are torch's own tensors, with memory. Those of torch.autograd.grad(is_grads_batched=True) have none."""
    return all(x is None or (type(x) in PLAIN and not x.is_meta and not _is_batched(x)) for x in tensors)


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


# ---------------------------------------------------------------- the derivative
def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a = Arguments(*inputs)
    if a.alibi_slopes is not None and a.alibi_slopes.requires_grad:
        raise TypeError(f"{a.call}(): alibi_slopes requires grad; expected slopes without grad, because they have no gradient here; "
                        "pass alibi_slopes.detach(), or a bias.")
    ctx.save_for_backward(*a[:TENSORS], *output)
    ctx.options = a[TENSORS:]
    ctx.set_materialize_grads(False)                        # None as the gradient of an unused result: most often lse


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    need_dbias, need_dsinks = ctx.needs_input_grad[INPUTS - 2:INPUTS]
    if dout is None:
        dout = torch.zeros_like(out)
    derivative = _operator(dout, dlse, out, lse, *tensors) or backward_now
    dq, dk, dv, dbias, dsinks = derivative(dout, dlse, out, lse, need_dbias, *tensors, *ctx.options)
    return dq, dk, dv, dbias if need_dbias else None, dsinks if need_dsinks else None, *[None] * (len(ctx.needs_input_grad) - INPUTS)


def _operator(*tensors: Any) -> Any:
    """What computes the gradients where torch looks at each operation; None where it does not."""
    if level() is not None:
        return TransformedBackward.apply
    # grad mode is on where the graph of the gradient is asked for
    watched = torch.is_grad_enabled() or modes() or torch.compiler.is_compiling() or not _plain(*tensors)
    return backward if watched else None


def _second(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("attention(): its gradient is differentiated once more; expected first derivatives only, because fastattn has no "
                       "second ones; torch.nn.functional.scaled_dot_product_attention with its math backend has them.")


def _forward_mode(*_: Any) -> None:
    raise NotImplementedError("attention(): a tensor carries a forward-mode tangent (torch.func.jvp, jacfwd, hessian, or forward_ad); "
                              "expected none, because fastattn differentiates in reverse only; torch.func.vjp and jacrev work.")


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_save)
torch.library.register_autograd(BACKWARD, _second)


# ---------------------------------------------------------------- eager training
class Settings(NamedTuple):
    """What a plain call has besides its tensors. `lengths` are tensors: cu_seqlens_q, cu_seqlens_k and seqused_k or None; None for dense
    tensors."""

    call: str
    options: Options
    layout: str
    return_lse: bool
    deterministic: bool
    engine: str | None
    lengths: tuple[Any, Any, Any] | None

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Any = None, cu_k: Any = None, used: Any = None) -> Arguments:
        """The call as the operators take it."""
        o = self.options
        left, right = o.window or (None, None)
        return Arguments(q, k, v, None, None, None, None, cu_q, cu_k, used, seed_tensor(self.call, o.seed), causal_name(o.causal), left,
                         right, o.softmax_scale, o.softcap, o.dropout_p, o.offset, o.max_seqlen_q, o.max_seqlen_k, self.layout,
                         self.deterministic, self.engine)


def attend_plain(q: Any, k: Any, v: Any, settings: Settings) -> Any:
    """The call, recorded in torch's graph; None where another way is to be taken. Nothing but the graph sees it: the caller has looked."""
    tensors = (q, k, v) if settings.lengths is None else (q, k, v, *settings.lengths)
    if forward_ad._current_level >= 0 or _is_wrapped(q) or _is_wrapped(k) or _is_wrapped(v) or not _plain(*tensors):
        return None
    return _apply(q, k, v, settings)


class Plain(torch.autograd.Function):  # type: ignore[misc]
    """(q, k, v, Settings) -> out, or (out, lse) where lse is returned.

    Few arguments, no setup_context and no result that the caller does not see: torch looks at each one, which takes as long as a small
    attention.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Any:
        call, options, layout, return_lse, _, engine, lengths = settings
        out, lse = forward_again(call, engine, options, layout, True, (q, k, v), lengths=None if lengths is None else (*lengths, None))
        ctx.save_for_backward(q, k, v, out, lse, *(lengths or ()))
        ctx.settings = settings
        ctx.set_materialize_grads(False)                    # None as the gradient of an unused result: most often lse
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> Any:
        saved, settings = ctx.saved_tensors, ctx.settings
        q, k, v, out, lse, *lengths = saved
        if dout is None:
            dout = torch.zeros_like(out)
        operator = _operator(dout, dlse, *saved)
        if operator is None:
            call, options, layout, _, deterministic, engine, _ = settings
            dq, dk, dv, *_ = backward_again(f"{call}_backward", engine, options, layout, deterministic, (q, k, v), (dout, out, lse, dlse),
                                            lengths=(*lengths, None) if lengths else None)
        else:
            dq, dk, dv, *_ = operator(dout, dlse, out, lse, False, *settings.arguments(q, k, v, *lengths))
        return dq, dk, dv, None

    jvp = staticmethod(_forward_mode)


# Without what Function.apply does for torch.func: its tensors do not come here.
_apply: Any = super(torch.autograd.Function, Plain).apply


class Recorded(torch.autograd.Function):  # type: ignore[misc]
    """(q, k, v, bias, sinks, the other arguments) -> (out, lse).

    One tuple and no setup_context: torch looks at each argument of a Function, and at the signature of one with a
    setup_context, which takes as long as a small attention.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        a = (*arguments[:INPUTS], *arguments[INPUTS])
        output = forward_now(*a)
        _save(ctx, a, output)
        return output

    backward, jvp = staticmethod(_differentiate), staticmethod(_forward_mode)


# ---------------------------------------------------------------- torch.func
class Transformed(torch.autograd.Function):  # type: ignore[misc]
    """Attention inside torch.func, which takes no autograd rule of an operator. The work is the operators': they have a rule for vmap."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return forward(*arguments)

    setup_context, backward, jvp = staticmethod(_save), staticmethod(_differentiate), staticmethod(_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return each(Transformed.apply)(info, in_dims, *arguments)


class TransformedBackward(torch.autograd.Function):  # type: ignore[misc]
    """attention_backward inside torch.func."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved, because there is no second derivative."""

    backward, jvp = staticmethod(_second), staticmethod(_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return each(TransformedBackward.apply, BEFORE)(info, in_dims, *arguments)
