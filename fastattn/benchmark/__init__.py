"""`python -m fastattn bench`: one shape, measured beside the libraries that are installed. File by file:

    shape.py            what is measured: sizes, causal, direction; its scored pairs and flop
    measure.py          the parent: the exact result, then one child for each implementation -> results
        |               exact.py: parts of the result in float64, from fastattn's reference
    pair.py             the child: fastattn and one other implementation, in turns, and their errors
        |
    implementations.py  each implementation as a call on the same numbers
        |               torch_calls.py: torch's SDPA, flash_attn, xformers; arrays.py: arrays that share memory
    timing.py           turns and medians;  events.py: turns in device time
    machine.py          where it was measured;  text.py: tables of text

The repository's `bench`, which fills the README's tables, has more cases and rivals. What both need is here alone:
`bench` looks for its modules here too (bench/__init__.py). So timing, events, machine, arrays, shape, text and
torch_calls import nothing of fastattn but each other.
"""
