"""`attend` of flex.py for torch's compiler, which leaves the call outside of its graph.

A module of its own, because torch.compiler.disable imports the compiler, which takes seconds: calls of a process without it do without.
"""
from __future__ import annotations

import torch

from . import flex

attend = torch.compiler.disable(flex.attend, reason="fastattn traces score_mod and mask_mod itself, outside of the graph")
