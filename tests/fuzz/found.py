"""Problems that were wrong once, as the fuzzer printed them. test_fuzz.py runs each, on every level through cpu/test_levels.py."""
from __future__ import annotations

from .spec import Spec

FOUND: list[Spec] = [
    # the product of a huge score and log2(e) rounded by itself, beside the exact one of a fused multiply-add: the difference overflowed
    Spec(seed=158413035, head_dim=1, head_dim_v=6, bias=(1, 1, 1), bias_values="large_all"),
    Spec(seed=1396832328, dtype="float16", head_dim=1, head_dim_v=1, bias=(1, 1), bias_values="large_rows"),
    Spec(seed=146922689, seqlen_k=2, head_dim=6, head_dim_v=1, bias=(1, 1, 1, 1), values="one_hot"),
    Spec(seed=1577934732, batch=2, seqlen_q=2, head_dim=1, head_dim_v=1, values="huge_integers"),
    Spec(seed=112873203, seqlen_k=13, head_dim=32, head_dim_v=1, values="equal_keys"),
    Spec(seed=1915593308, dtype="bfloat16", head_dim=1, head_dim_v=1, softmax_scale=1e30),
    # the backward packed rows of K that no row of the tile attends: infinities there reached dq
    Spec(seed=1831805870, dtype="bfloat16", head_dim=1, head_dim_v=1, lengths_q=(2,), lengths_k=(3,), beyond=(7, 0), causal="top_left",
         hidden="inf", backward=True),
    Spec(seed=1803267757, dtype="bfloat16", seqlen_q=9, seqlen_k=10, head_dim=1, head_dim_v=1, window=(0, 4), hidden="inf", backward=True),
    # dout of a row that attends nothing but a sink reached dsinks
    Spec(seed=1220257255, seqlen_q=2, head_dim=1, head_dim_v=1, causal=True, sinks="normal", hidden="nan", backward=True),
    Spec(seed=1362768413, dtype="float64", head_dim=1, head_dim_v=1, mask=(1, 1, 1), sinks="normal", hidden="nan", backward=True),
    # a scale that is 0 in float32
    Spec(seed=292696776, dtype="float16", head_dim=1, head_dim_v=1, softmax_scale=1e-46),
    # no heads
    Spec(seed=557392864, num_heads=0, head_dim=1, head_dim_v=1, backward=True),
    # the slope of a saturated softcap, times a large key
    Spec(seed=1901049279, dtype="float16", seqlen_k=5, head_dim=1, head_dim_v=1, softmax_scale=1e20, softcap=1000.0, backward=True),
    Spec(seed=1904368287, seqlen_k=2, head_dim=1, head_dim_v=1, softcap=50.0, values="one_hot", backward=True),
    # merge_states of a part whose lse is +inf
    Spec(seed=1168789432, call="merge", head_dim=1, head_dim_v=1),
    # ALiBi counts from the mask's diagonal
    Spec(seed=1952853668, dtype="float16", seqlen_q=3, head_dim=1, head_dim_v=1, causal="top_left", alibi="batch"),
    # lse of a huge score, rounded to float32, in the reference's backward
    Spec(seed=1717381308, dtype="bfloat16", head_dim=5, head_dim_v=1, values="huge", backward=True, engine="reference"),
    Spec(seed=1887327925, seqlen_q=2, head_dim=2, head_dim_v=1, values="equal_keys", backward=True, engine="reference"),
    Spec(seed=1842653505, dtype="bfloat16", head_dim=4, head_dim_v=1, softmax_scale=316227766.01683795, backward=True, engine="reference"),
    # a share of dq overflowed where the sum of all did not: nothing to complain about
    Spec(seed=1395501358, call="parts", dtype="float16", batch=2, seqlen_q=4, seqlen_k=4, softmax_scale=4.0, values="equal_keys",
         backward=True, parts=(2,)),
    # on a GPU: three parts whose lse has no room for the log of a sum
    Spec(seed=1718754155, call="merge", dtype="float16", seqlen_q=4, head_dim=1, parts=(0, 0, 0)),
    Spec(seed=1474269275, call="merge", dtype="float64", head_dim=1, head_dim_v=2, parts=(0, 0, 0)),
    # on a GPU: tanh of a small number was rounded as one of 1 is
    Spec(seed=249404535, dtype="bfloat16", seqlen_q=2, softcap=1000.0, backward=True),
    Spec(seed=1268589393, dtype="float16", seqlen_q=3, head_dim=1, head_dim_v=1, softcap=1000.0, backward=True),
    # on a GPU: a negative scale beside full blocks of keys
    Spec(seed=1725007743, dtype="bfloat16", seqlen_k=66, softmax_scale=-1.0),
    # on a GPU: a window that begins at an odd key, from which a step of the split-key kernel read two columns of the bias at once
    Spec(seed=1617226385, dtype="float16", num_heads=2, seqlen_q=17, seqlen_k=542, head_dim=32, head_dim_v=32, window=(76, 4),
         bias=(17, 542), bias_dtype="float16", bias_values="integers", layout="bhsd", backward=True, dlse=True, need_dbias=True),
    # on a GPU: dV of a packed problem at head_dim 360 waited for ever, because a last block that is not whole waited for a slot of dO which
    # is released behind it; the block may be the first of the second query head of a group
    Spec(seed=211841087, dtype="float16", num_heads=6, num_heads_k=3, head_dim=360, head_dim_v=360, lengths_q=(16,), lengths_k=(29,),
         beyond=(0, 9), causal=True, bias=(1, 1, 1, 38), bias_dtype="float16", bias_values="lowest_rows", numbers="array", backward=True,
         dlse=True, need_dbias=True),
    Spec(seed=1853233650, dtype="float16", num_heads=12, num_heads_k=3, head_dim=360, head_dim_v=360, lengths_q=(2, 2), lengths_k=(0, 63),
         used_k=(0, 8), spare=(3, 0), beyond=(7, 0), causal=True, softmax_scale=0.5, bias=(1, 9, 1), bias_dtype="float16", values="one_hot",
         numbers="np.float32", backward=True, dlse=True, need_dbias=True),
    # no keys, no rows, no sequences, beside a mask
    Spec(seed=877861375, dtype="float16", seqlen_k=0, head_dim=1, head_dim_v=1, mask=(1, 0)),
    Spec(seed=1475551734, dtype="bfloat16", seqlen_q=0, head_dim=1, head_dim_v=1, mask=(1, 1, 0, 1)),
    Spec(seed=1722862434, head_dim=1, head_dim_v=1, lengths_q=(), used_k=()),
    # on a GPU: blocks of no pair, of which rows of no sequence asked for one
    Spec(seed=465175139, dtype="float16", num_heads=6, num_heads_k=3, head_dim=96, head_dim_v=96, lengths_q=(), used_k=(), spare=(3, 5),
         causal=True, bias=(1, 0), bias_dtype="float16", bias_values="large_parts", score_mod="positive", block_mask="blocks",
         dropout_p=0.05, dropout_seed=-1, offset=2**32 - 1, hidden="nan", numbers="np.float64"),
    # no fault of the engine: shares of dq beyond float16 whose sum is inside it
    Spec(seed=416483255, call="parts", dtype="float16", batch=2, seqlen_q=63, seqlen_k=2, head_dim=48, head_dim_v=30, softmax_scale=-1.0,
         values="equal_keys", backward=True, dlse=True, parts=(0, 1)),
    Spec(seed=1268190880, call="parts", dtype="float16", batch=2, num_heads=24, num_heads_k=3, seqlen_q=97, seqlen_k=15, head_dim=128,
         head_dim_v=128, softmax_scale=-1.0, mask_density=0.5, sinks="normal", values="equal_keys", backward=True, parts=(7,)),
    # nor here: the allowance had no underflow of dS q and dS k before a large scale, one pair's rounding, or a small softcap
    Spec(seed=1257924516, seqlen_k=2, head_dim=3, head_dim_v=1, softmax_scale=-1000000000.0, values="denormal", backward=True),
    Spec(seed=202490786, seqlen_k=2, head_dim=1, head_dim_v=1, softmax_scale=316227766.01683795, values="denormal", backward=True),
    Spec(seed=71873934, seqlen_k=3, head_dim=1, head_dim_v=1, softmax_scale=-1000000000.0, values="denormal", backward=True),
    Spec(seed=1608797626, batch=3, num_heads=6, num_heads_k=2, seqlen_q=2, seqlen_k=127, head_dim=64, head_dim_v=64,
         softmax_scale=-1000000000.0, alibi="heads", sinks="normal", values="denormal", hidden="nan", backward=True),
    Spec(seed=2067544246, seqlen_q=24, head_dim=416, head_dim_v=416, causal=True, backward=True),
    Spec(seed=492113561, num_heads=3, num_heads_k=3, seqlen_q=12, seqlen_k=2, head_dim=84, head_dim_v=1, softcap=0.01, backward=True),
    Spec(seed=834313362, dtype="float64", num_heads=9, num_heads_k=3, head_dim=32, head_dim_v=32, lengths_q=(9,), lengths_k=(9,),
         beyond=(0, 9), causal="top_left", softmax_scale=0.3, softcap=0.01, hidden="inf", repeats=("q1",), backward=True),
    # functions, which no fault has needed yet: each kind beside what is computed next to it
    Spec(seed=1, batch=2, num_heads=4, num_heads_k=2, seqlen_q=33, seqlen_k=70, head_dim=16, head_dim_v=16, score_mod="relative",
         mask_mod="document", block_mask="blocks", hidden="nan", memory="strange", backward=True, need_dcaptured=True, dlse=True),
    Spec(seed=2, dtype="bfloat16", num_heads=6, num_heads_k=2, seqlen_q=70, seqlen_k=129, head_dim=32, head_dim_v=24, softcap=5.0,
         bias=(6, 70, 129), bias_dtype="bfloat16", sinks="normal", score_mod="rated", mask_mod="prefix", hidden="inf", backward=True,
         need_dbias=True, need_dcaptured=True),
    Spec(seed=3, dtype="float64", num_heads=2, num_heads_k=1, lengths_q=(9, 0, 40), lengths_k=(20, 7, 65), used_k=(20, 3, 60),
         spare=(3, 5), causal=True, alibi="batch", score_mod="capped", mask_mod="heads", hidden="nan", backward=True, need_dcaptured=True),
    Spec(seed=4, dtype="float16", batch=2, num_heads=3, num_heads_k=3, seqlen_q=24, seqlen_k=97, head_dim=40, head_dim_v=40,
         window=(50, None), score_mod="slopes", mask_mod="rows", dropout_p=0.3, dropout_seed=5, backward=True, need_dcaptured=True),
    Spec(seed=5, num_heads=4, num_heads_k=4, seqlen_q=50, seqlen_k=66, score_mod="holes", mask_mod="dilated", block_mask="function",
         hidden="nan", backward=True),
    Spec(seed=6, batch=2, num_heads=2, num_heads_k=2, seqlen_q=17, seqlen_k=40, score_mod="constant", mask_mod="nothing", sinks="normal",
         backward=True, need_dcaptured=True),
    # a saturated tanh was 1 - 2**-24 where multiply-adds are not fused, and its slope 2**-23 instead of 0
    Spec(seed=922807138, dtype="bfloat16", seqlen_k=2, head_dim=1, head_dim_v=1, bias=(1, 1, 1, 2), bias_values="lowest_parts",
         score_mod="capped", backward=True),
    Spec(seed=1278585696, seqlen_k=3, head_dim=24, head_dim_v=1, softmax_scale=-1.0, score_mod="capped", values="integers", backward=True),
    # on a GPU the reciprocal of a score beyond 2**126 was 0
    Spec(seed=1254547754, dtype="bfloat16", head_dim=1, head_dim_v=1, bias=(1, 1, 1, 1), bias_values="lowest_rows", score_mod="bounded",
         backward=True),
    # few rows, whose keys are split in two: the halves were merged by lse, which beside a score of 1e8 has no bits for the log of a sum
    Spec(seed=912551636, num_heads=8, seqlen_q=2, seqlen_k=1900, head_dim=64, head_dim_v=128, softmax_scale=0.125, values="one_hot",
         memory="gaps", numbers="np.float32", library="cupy"),
    # an out beyond float16 by dropout's factor made delta infinite, and P (dP - delta) of masked keys of its rows NaN
    Spec(seed=1, dtype="float16", seqlen_q=20, seqlen_k=40, head_dim=16, head_dim_v=16, window=(3, 4), dropout_p=0.9, dropout_seed=8,
         diagonal=9, v_size=1e4, backward=True, dlse=True),
    Spec(seed=5, dtype="float16", num_heads=2, num_heads_k=1, seqlen_q=20, seqlen_k=40, head_dim=16, head_dim_v=16, causal=True,
         window=(3, 4), dropout_p=0.9, dropout_seed=7, diagonal=9, sinks="normal", bias=(20, 40), need_dbias=True, score_mod="rated",
         v_size=1e4, backward=True, need_dcaptured=True),
]
