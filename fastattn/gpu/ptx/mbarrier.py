"""mbarrier: barriers in shared memory that count arrivals and bytes in flight (PTX ISA 9.7.13.15). Addresses are shared, 32-bit."""
from __future__ import annotations

from ..dsl.asm import instruction

# init(address, arrivals); one thread, then fence_init before anyone uses it
init = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", "rr")
fence_init = instruction("fence.mbarrier_init.release.cluster;")
# arrive_expect(address, bytes): one arrival, and the phase also waits for that many bytes of TMA loads
arrive_expect = instruction("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "rr")
arrive = instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", "r")
# wait(address, parity): until the phase of that parity is complete
wait = instruction("{ .reg .pred done;\nWAIT_${:uid}:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n"
                   "@done bra DONE_${:uid};\nbra WAIT_${:uid};\nDONE_${:uid}:\n}", "rr")
