"""Serving: attention over key and value caches that grow, in pages or contiguous.

api.py      `attention_with_kvcache`: signature, documentation, the flow of a call
problem.py  every check of its arguments, then the Problem with its Cache

In host memory caches.py of the package writes the new keys and values into the caches; gpu/rows/append.py does on a device.
"""
