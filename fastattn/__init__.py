"""fastattn: exact attention, forward and backward, on arrays where they are.

    from fastattn import attention
    out = attention(q, k, v, causal=True)            # NumPy arrays or CPU tensors, (batch, seqlen, num_heads, head_dim)

How a call flows, file by file:

    attention(q, k, v, causal=True, ...)
        |
    api.py          the public functions: signatures and documentation (packed arrays: api_packed.py)
        |           (a repeated dense forward goes straight to its kernel: repeat.py)
    dispatch.py     the flow that they share
        |
    arrays/         each array -> View: pointer, shape, strides, dtype, device; no copy
        |           layout "bhsd" is a permutation of strides, so engines know one layout
    options.py      numbers of any kind -> Options, plain values
        |
    problem.py      every check of every argument, then the frozen Problem (what to compute)
        |           masks.py: row_bounds, the one definition of causal, window, padding and packed edges
    registry.py     which engine: by device, use_engine, engines of other packages (explanation.py reports why)
        |
        +-- cpu/            Cython engine, one source compiled per instruction set, chosen at import
        +-- gpu/            Numba engine, kernel families sm90, sm80 and simt
        +-- reference.py    float64 NumPy: the specification that decides what is right
        |
    arrays/         outputs, allocated in the caller's own library and layout, are handed over

flex/ makes programs of score_mod and mask_mod, which the engines run. philox.py defines dropout: a mask addressed
by position, the same for every engine, tile and split. errors.py has the one form of an error message, memo.py the
one bounded cache, types.py the types that a type checker sees. compat/ has other libraries' signatures over api.py,
serving/ the attention over key and value caches, torch/ and jax/ have the frameworks' own gradients and transforms.
cli/ is `python -m fastattn`; benchmark/ times calls for it and for bench/.

Three nouns: a Problem says what, an engine's private Config says how, a View says where. Nothing heavy is imported
before the first call that needs it.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import log as _log  # noqa: F401     (FASTATTN_LOG)
from .api import attention, attention_backward
from .api_packed import attention_varlen, attention_varlen_backward
from .errors import UnsupportedError
from .problem import Grads
from .registry import engines, register_engine, use_engine
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .cpu import get_num_threads, set_num_threads
    from .dropout import dropout_mask
    from .explanation import explain
    from .flex.blocks import BlockMask, and_masks, block_mask, or_masks
    from .merging import merge_states
    from .quantize import quantize_fp8
    from .report import show_config
    from .serving.api import attention_with_kvcache

__all__ = ["BlockMask", "Grads", "UnsupportedError", "and_masks", "attention", "attention_backward", "attention_varlen",
           "attention_varlen_backward", "attention_with_kvcache", "block_mask", "dropout_mask", "engines", "explain", "get_num_threads",
           "merge_states", "or_masks", "quantize_fp8", "register_engine", "set_num_threads", "show_config", "use_engine"]


# What a program may not need, by the module that is imported on first use: without them `import fastattn` adds a fifth to NumPy's import.
_LATE = {"set_num_threads": "cpu", "get_num_threads": "cpu", "dropout_mask": "dropout", "explain": "explanation", "merge_states": "merging",
         "quantize_fp8": "quantize", "show_config": "report", "attention_with_kvcache": "serving.api",
         **dict.fromkeys(("BlockMask", "and_masks", "block_mask", "or_masks"), "flex.blocks")}


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    """The public names; those that are loaded on first use are among them."""
    return sorted([*__all__, "__version__"])
