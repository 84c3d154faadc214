"""The text of a PTX module as basic blocks of instructions, for interpreter.py."""
from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class Instruction:
    op: str
    operands: list[Any]             # register names, numbers, lists of them, ("[]", register, offset)
    guard: str = ""                 # name of a predicate
    inverted: bool = False


@dataclass(slots=True)
class Body:
    """A kernel: basic blocks, and the index of each label's."""

    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    params: list[str] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)        # arrays of a fixed size in shared memory, their bytes


def _operand(text: str) -> Any:
    text = text.strip()
    if text.startswith("{"):
        return [_operand(x) for x in text[1:-1].split(",")]
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return ("[]", base.strip(), int(offset or 0))
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if re.fullmatch(r"0d[0-9A-Fa-f]{16}", text):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


def _split(text: str) -> list[str]:
    return [x for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text) if x.strip()]


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> Body:
    """The Body of the one kernel in a module."""
    body = Body()
    head, _, text = ptx.partition(".visible .entry")[2].partition("\n{\n")
    body.params = re.findall(r"\.param \.\w+ (\w+)", head)
    for line in text.splitlines():
        line = line.partition("//")[0].strip()
        array = re.match(r"\.shared .* (\w+)\[(\d+)\]", line)
        if array:
            body.shared[array[1]] = int(array[2])
        if array or not line or line in "{}" or line.startswith(("{ //", ".reg", ".pragma", ".loc")):
            continue
        if line.endswith(":"):
            body.labels[line[:-1]] = len(body.blocks)
            body.blocks.append([])
            continue
        if re.match(r"\{\s", line):
            line = line[1:].rstrip().removesuffix("}")
        for statement in line.split(";"):
            statement = statement.strip()
            if not statement or statement.startswith(".reg"):
                continue
            guard = re.match(r"@(!?)(\S+)\s+(.*)", statement)
            inverted, name, rest = (guard[1] == "!", guard[2], guard[3]) if guard else (False, "", statement)
            op, _, operands = rest.partition(" ") if " " in rest else rest.partition("\t")
            op, operands = op.strip(), operands.strip()
            if "\t" in op:
                op, _, more = op.partition("\t")
                operands = more + operands
            body.blocks[-1].append(Instruction(op, [_operand(x) for x in _split(operands)], name, inverted))
            if op.startswith(("bra", "bar.sync", "barrier.cluster.wait", "ret", "exit")):
                body.blocks.append([])
    return body
