"""Named problems as programs of JAX, on the host or a GPU."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fastattn
import fastattn.jax
from tests.tools.problems import Inputs

CASES = ("plain_float32", "causal_float64", "packed_float16", "gqa_bfloat16", "decode_gqa8", "empty_batch", "no_queries", "no_keys_sinks",
         "window_top_left", "mask_2x1x1x37", "scale_negative", "alibi_top_left_packed", "softcap_bfloat16", "bias_2x1x1", "bias_37x37",
         "bias_float32_bfloat16", "bias_inf_sinks", "sinks_bfloat16_gqa", "dropout_sinks_dlse", "packed_unequal_causal", "packed_seqused",
         "packed_spare", "packed_bias_mask", "packed_none", "bhsd_all", "everything_float32", "everything_float64", "everything_bfloat16",
         "everything_packed", "everything_strided")
ARRAYS = ("bias", "mask", "alibi_slopes", "sinks", "seqused_k")


def results(inputs: Inputs) -> tuple[Any, Any, fastattn.Grads]:
    """out, lse and gradients of one jitted program in which every array is traced."""
    arrays = {name: jnp.asarray(x) for name, x in inputs.kwargs.items() if name in ARRAYS}
    options = {name: x for name, x in inputs.kwargs.items() if name not in ARRAYS}
    q, k, v, *lengths = map(jnp.asarray, inputs.args)
    if inputs.packed:
        longest = [int(np.diff(x).max(initial=0)) for x in inputs.args[3:]]
        options |= {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    differentiated = [name for name in ("bias", "sinks") if name in arrays]

    @jax.jit
    def program(x: Any, arrays: Any, lengths: Any, dout: Any, dlse: Any) -> Any:
        def attend(x: Any) -> Any:
            function: Any = fastattn.jax.attention_varlen if inputs.packed else fastattn.jax.attention
            return function(x["q"], x["k"], x["v"], *lengths, **{**arrays, **{n: x[n] for n in differentiated}}, **options, return_lse=True)
        (out, lse), pull = jax.vjp(attend, x)
        return out, lse, pull((dout, jnp.zeros(lse.shape, lse.dtype) if dlse is None else dlse))[0]
    x = {"q": q, "k": k, "v": v, **{name: arrays[name] for name in differentiated}}
    out, lse, found = program(x, arrays, lengths, jnp.asarray(inputs.dout), None if inputs.dlse is None else jnp.asarray(inputs.dlse))
    names = "q", "k", "v", "bias", "sinks"
    return np.asarray(out), np.asarray(lse), fastattn.Grads(*[np.asarray(found[n]) if n in found else None for n in names])
