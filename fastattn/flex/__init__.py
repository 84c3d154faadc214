"""score_mod and mask_mod: plain Python functions of a score and its place, as programs that every engine runs.

    a function -> trace.py -> Program -> lower.py -> an engine's code
                                 |
                                 +-> derivative.py -> the gradients, by the same way

| file | |
|---|---|
| ops.py | the operations, and what they are in NumPy |
| program.py | `Program`, its lines, where each can be computed; `Builder` |
| values.py, functions.py | what the function gets while it is traced; what of NumPy and torch it may call |
| capture.py | the arrays and numbers that a function holds; the function again, around stand-ins |
| trace.py | `trace` and `traced`; refusal.py has their errors |
| derivative.py, lower.py, evaluate.py | what is made of a program |
"""
