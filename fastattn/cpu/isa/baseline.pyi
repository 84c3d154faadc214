"""What every compiled level has; fastattn.cpu is the only caller. Arguments are a Problem, its Operands, Views and a Plan's parts."""
from collections.abc import Sequence
from typing import Any

from numpy import int64
from numpy.typing import NDArray

from ...arrays.view import View
from ...problem import Operands, Problem
from ..dbias import Way
from ..plan import Lengths, Wave

class Prepared:
    def __call__(self, q: int, k: int, v: int, out: int, lse: int) -> None: ...

def prepare(p: Problem, o: Operands, lengths: Lengths, out: View, lse: View | None, order: NDArray[int64], first_block: NDArray[int64],
            block_m: int, splits: int, split_keys: int, folded: bool, all_heads: bool, few: bool, direct: bool,
            threads: int) -> Prepared: ...
def backward(p: Problem, o: Operands, lengths: Lengths, dout: View, out: View, lse: View, dlse: View | None, dq: View, dk: View, dv: View,
             dbias: View | None, way: Way, delta: NDArray[Any], dbias_rows: NDArray[Any] | None, waves: Sequence[Wave], few: bool,
             threads: int) -> None: ...
def row_bounds(row: int, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None, top_left: bool) -> tuple[int, int]: ...
def address(array: NDArray[Any]) -> int: ...
def vector_length(dtype: str) -> tuple[int, bool]: ...
def transform(qkv: View, bias: View, cu_seqlens: NDArray[int64] | None, heads: tuple[View, View, View], scale: float, stream: bool,
              threads: int) -> None: ...
def transform_backward(heads: tuple[View, View, View], cu_seqlens: NDArray[int64] | None, dqkv: View, scale: float,
                       threads: int) -> NDArray[Any]: ...
