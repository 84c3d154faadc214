"""Thread-block clusters, since sm_90: a barrier, and stores to the shared memory of another block (PTX ISA 9.7.13.4, 9.7.9.24)."""
from __future__ import annotations

from ..dsl.asm import instruction

# Both by all threads of all blocks, in turns. What is stored before `arrive` is seen behind `wait`. A thread that has ended has arrived.
arrive = instruction("barrier.cluster.arrive.release;")
wait = instruction("barrier.cluster.wait.acquire;")
# address_in(address, rank): where block `rank` of the cluster has what this one has at a shared address. That block must have begun
address_in = instruction("mapa.shared::cluster.u32 $0, $1, $2;", "rr", "r")
rank = instruction("mov.u32 $0, %cluster_ctarank;", "", "r", pure=True)         # which block of the cluster this one is
store_four = instruction("st.shared::cluster.v4.f32 [$0], {$1, $2, $3, $4};", "rffff")      # at a multiple of 16
store_two = instruction("st.shared::cluster.v2.f32 [$0], {$1, $2};", "rff")                 # at a multiple of 8
