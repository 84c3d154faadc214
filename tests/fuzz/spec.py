"""One problem as plain data: everything that decides the arguments of a call, so that a failure is one line and can be made smaller."""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A problem of the public functions. Shapes as in the README; lengths_q makes it packed. `seed` decides every number."""

    seed: int = 0
    call: str = "attention"                     # "parts": over parts of the keys, then merge_states; "merge": merge_states alone
    dtype: str = "float32"
    batch: int = 1
    num_heads: int = 1
    num_heads_k: int = 1
    seqlen_q: int = 1
    seqlen_k: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    lengths_q: Shape | None = None
    lengths_k: Shape = ()
    used_k: Shape | None = None
    spare: tuple[int, int] = (0, 0)             # rows of q and of k after the last sequence
    beyond: tuple[int, int] = (0, 0)            # max_seqlen_q and max_seqlen_k beyond the longest sequence
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None                    # "heads", "batch"
    bias: Shape | None = None
    bias_dtype: str = "float32"
    bias_values: str = "normal"                 # values.BIAS
    mask: Shape | None = None
    mask_density: float = 0.7
    sinks: str | None = None                    # "normal", "large"
    score_mod: str | None = None                # functions.SCORES
    mask_mod: str | None = None                 # functions.MASKS
    block_mask: str | None = None               # "function": of mask_mod alone; "blocks": of an array of blocks too
    dropout_p: float = 0.0
    dropout_seed: int = 0
    offset: int = 0
    dropout_at: tuple[int, int, int, int] | None = None
    dropout_heads: int | None = None
    diagonal: int | Shape | None = None         # a tuple: of each sequence
    out_dtype: str | None = None
    values: str = "normal"                      # values.SCORES: of q and k
    v_size: float = 1.0
    hidden: str | None = None                   # what hidden places hold: "nan", "inf"; None: ordinary numbers
    layout: str = "bshd"
    memory: str = "plain"                       # memory.KINDS
    repeats: tuple[str, ...] = ()               # "k1": axis 1 of k has stride 0, all its entries are one
    readonly: bool = False
    give_out: str | None = None                 # memory of the out= that is given
    numbers: str = "float"                      # values.NUMBERS: what options are
    return_lse: bool = True
    backward: bool = False
    dlse: bool = False
    need_dbias: bool = False
    need_dcaptured: bool = False
    deterministic: bool = False
    threads: int = 2
    parts: Shape = ()                           # where the keys are cut
    engine: str | None = None
    library: str = "numpy"                      # whose arrays: "torch", "cupy", "dlpack"
    stream: str | None = None                   # "side": another than the current one; "capture": a graph, replayed

    @property
    def result(self) -> str:
        """The dtype of out, dq, dk and dv."""
        return self.out_dtype or self.dtype

    @property
    def packed(self) -> bool:
        return self.lengths_q is not None

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths_q is None else len(self.lengths_q)

    @property
    def full(self) -> tuple[int, int, int, int]:
        """What bias and mask broadcast to."""
        if self.lengths_q is None:
            return self.batch, self.num_heads, self.seqlen_q, self.seqlen_k
        return (len(self.lengths_q), self.num_heads, max(self.lengths_q, default=0) + self.beyond[0],
                max(self.lengths_k, default=0) + self.beyond[1])

    @property
    def used(self) -> Shape:
        """Keys of each sequence that exist."""
        if self.lengths_q is None:
            return (self.seqlen_k,) * self.batch
        return self.lengths_k if self.used_k is None else self.used_k

    def __str__(self) -> str:
        """What differs from the defaults, as Python."""
        settings = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Spec({', '.join(settings)})"

    def json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of(text: str) -> Spec:
        """What `json` wrote."""
        settings: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(text).items()}
        return Spec(**settings)
