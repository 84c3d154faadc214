"""Serving: attention over key and value caches that grow, in pages or contiguous.

api.py      `attention_with_kvcache`: signature, documentation, the flow of a call
problem.py  every check of its arguments, then the Problem with its Cache
append.py   host memory: new keys and values go into the caches, rotated; and the rotation of q
quantize.py `quantize_fp8`, and 8-bit rounding
paging.py   where a request's keys are
"""
