"""The project's fuzzer: random problems over the whole space of the public functions, judged by a formula of its own.

    python -m tests.fuzz --seconds 60                   CPU, every instruction-set level of this machine
    python -m tests.fuzz --device cuda --seconds 300    kernels drawn as (family, dtype, head sizes, features), 32 problems each

spec.py      Spec: one problem as plain data, and `make`, its arguments
draw.py      `draw(seed, index)`: a random Spec
functions.py score_mod and mask_mod: a small family, with the formula and the error of each
values.py    numbers that are hard: ties of huge scores, powers of two at the edge of the range, denormals
memory.py    the same numbers with other strides, offsets and NaN between the rows
formula.py   attention in float64 and how far off a right result may be; shares no code with the package
judge.py     runs one Spec and says what is wrong
shrink.py    the smallest Spec that is wrong still
device.py    where arrays live: the host, or a GPU by torch, CuPy or DLPack
run.py       processes, crashes, hangs, the report
caches.py    calls of attention_with_kvcache, drawn and judged apart: python -m tests.fuzz.caches
found.py     problems that were wrong once: test_fuzz.py runs them every time
"""
