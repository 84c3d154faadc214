"""Named barriers, proxy fences, register reallocation and warp shuffles (PTX ISA 9.7.13.1, 9.7.13.4, 9.7.20.5, 9.7.9.6)."""
from __future__ import annotations

from typing import Any

from ..dsl.asm import F32, I32, emit, instruction

# barrier(number, threads): arrive and wait for all; barrier_arrive(number, threads): arrive, do not wait
barrier = instruction("bar.sync $0, $1;", "rr")
barrier_arrive = instruction("bar.arrive $0, $1;", "rr")
# any_thread(number, threads, x): a barrier that also votes: 1 if any of its threads has a nonzero x, else 0
any_thread = instruction("{ .reg .pred p, q; setp.ne.b32 q, $3, 0; barrier.cta.red.or.pred p, $1, $2, q; selp.b32 $0, 1, 0, p; }",
                         "rrr", "r")
# wait for all lanes of the warp
warp = instruction("bar.warp.sync -1;")
# wgmma and TMA after it read what ordinary stores wrote to shared memory before it
fence_async = instruction("fence.proxy.async.shared::cta;")
# the value of lane 0: tells the compiler that the value is warp-uniform
uniform = instruction("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "r", "r")
# the same value, but the compiler knows nothing about it: a loop over it is not unrolled, nothing is hoisted above it
opaque = instruction("mov.b32 $0, $1;", "r", "r")
# threadIdx.x, read again each time, so that what is computed from it is not kept in registers across a loop
thread_index = instruction("mov.u32 $0, %tid.x;", "", "r")
# bit n is 1 if lane n of the warp has a nonzero value
ballot = instruction("{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, -1; }", "r", "r")
# 1 if any lane of the warp has a nonzero value, else 0; warp-uniform
any_lane = instruction("{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }", "r", "r")

# The two halves of programmatic dependent launch (PTX ISA 9.7.13.13), since sm_90. A kernel that may start early waits here until
# the kernel before it has ended and its writes are visible; nothing before this may read or write global memory.
wait_for_previous = instruction("griddepcontrol.wait;")
# Once all blocks have come here, or ended, the next kernel may start if it waits itself. Its blocks run where this kernel's have left room.
let_next_start = instruction("griddepcontrol.launch_dependents;")
take_turn = instruction("griddepcontrol.wait; griddepcontrol.launch_dependents;")     # both


def increase_registers(count: int) -> Any:
    """setmaxnreg.inc for the calling warpgroup; `count` a multiple of 8 in [24, 256]."""
    return instruction(f"setmaxnreg.inc.sync.aligned.u32 {count};")


def decrease_registers(count: int) -> Any:
    return instruction(f"setmaxnreg.dec.sync.aligned.u32 {count};")


def emit_opaque(builder: Any, value: Any) -> Any:
    """The same 32-bit value, computed here: the compiler cannot sink the computation to where the value is used."""
    return emit(builder, I32, "mov.b32 $0, $1;", "=r,r", [value])


def emit_shuffle_xor(builder: Any, value: Any, distance: int) -> Any:
    """The float32 or int32 of the lane whose number differs in the bit `distance`."""
    letter = "f" if value.type == F32 else "r"
    return emit(builder, value.type, f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", f"={letter},{letter}", [value])
