"""TMA, the bulk copy engine (PTX ISA 9.7.9.25 to 27): tiles between global and shared memory by tensor map, and flat bulk sums.

Tensor maps have four axes here: (head_dim, row, head, batch), or two: (row, line), see runtime/tensormap.py.
"""
from __future__ import annotations

from ..dsl.asm import instruction

# load(shared, map, barrier, dim, row, head, batch)
load = instruction("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                   " [$0], [$1, {$3, $4, $5, $6}], [$2];", "rlrrrrr")
# the same with an L2 eviction policy (9.7.9.18) as the last operand
load_hinted = instruction("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                          " [$0], [$1, {$3, $4, $5, $6}], [$2], $7;", "rlrrrrrl")
# load_rows(shared, map, barrier, row, line): a box of a map with two axes
load_rows = instruction("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1, {$3, $4}], [$2];", "rlrrr")
# store(map, shared, dim, row, head, batch); elements outside the tensor are not written
store = instruction("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [$0, {$2, $3, $4, $5}], [$1];", "lrrrrr")
store_hinted = instruction("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [$0, {$2, $3, $4, $5}], [$1], $6;",
                           "lrrrrrl")
# prefetch(map, dim, row, head, batch): load a box into the L2 cache
prefetch = instruction("cp.async.bulk.prefetch.tensor.4d.L2.global [$0, {$1, $2, $3, $4}];", "lrrrr")
prefetch_hinted = instruction("cp.async.bulk.prefetch.tensor.4d.L2.global.L2::cache_hint [$0, {$1, $2, $3, $4}], $5;", "lrrrrl")
evict_first = instruction("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", "", "l", pure=True)
evict_last = instruction("createpolicy.fractional.L2::evict_last.b64 $0, 1.0;", "", "l", pure=True)
prefetch_map = instruction("prefetch.tensormap [$0];", "l")
commit = instruction("cp.async.bulk.commit_group;")
wait_read = instruction("cp.async.bulk.wait_group.read 0;")     # until all committed stores have read shared memory
wait_read_but_one = instruction("cp.async.bulk.wait_group.read 1;")     # the same, but for the group committed last
wait_all = instruction("cp.async.bulk.wait_group 0;")           # until all committed stores are in global memory
# reduce_add_f32_if(flag, global, shared, bytes): add if the flag is not 0, without a branch; addresses and sizes are 16-byte aligned
reduce_add_f32_if = instruction("{ .reg .pred p; setp.ne.b32 p, $0, 0; "
                                "@p cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [$1], [$2], $3; }", "rlrr")
