"""Boolean masks as bits: what the kernel packs, and what the attention kernels find in it. Both are run in Python."""
from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("numba.cuda", reason="the GPU engine's packages are not installed")

from fastattn.gpu import precompile
from fastattn.gpu.precompile import Want
from fastattn.gpu.rows import mask_words
from fastattn.gpu.spec import Call
from fastattn.problem import Operands
from tests.tools.gpu.calls import host_view
from tests.tools.gpu.emulator import Machine, Memory, emulated, replaced

Array = np.ndarray[Any, Any]
words = importlib.import_module("fastattn.gpu.tile.words")
LINES_APART = 8         # a thread's two lines


def signed(x: int) -> int:
    """An int32 of these 32 bits."""
    return (x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)


def instructions(machine: Machine) -> dict[str, Any]:
    """What the kernel needs besides the emulator's own, for blocks of one warp."""
    def of_lanes(x: int) -> list[int]:
        block = machine.block
        block.posted[block.current] = x
        block.barrier()
        found = [block.posted[n] for n in range(32)]
        block.barrier()
        return found

    def line_bits(at: int, stride: int, limit: int, count: int) -> int:
        columns = [8 * (k // 2) + k % 2 for k in range(count)]
        return signed(sum((machine.load_flag(at + c * stride, int(c < limit)) != 0) << k for k, c in enumerate(columns)))

    def lines_bits(at: int, *rest: int) -> tuple[int, ...]:
        assert at % 4 == 0
        return tuple(line_bits(at + m, *rest) for m in range(4))
    return {"ballot": lambda x: signed(sum((other != 0) << n for n, other in enumerate(of_lanes(x)))),
            "any_lane": lambda x: int(any(of_lanes(x))), "shift_left": lambda x, count: signed(x << count), "line_bits": line_bits,
            "lines_bits": lines_bits}


@contextmanager
def packed_words(mask: Array, width: int, by_keys: bool, packed: bool) -> Iterator[tuple[Any, str]]:
    """The words' View and the kernel that packed them: by one warp, because the emulator knows no other barrier than a block's."""
    memory, x = Memory(), host_view(mask)
    memory.allow(x)
    forget()
    problem = mock.Mock(packed=packed)
    call = Call(problem, Operands(x, x, x, mask=x), x, None)
    with (mock.patch.object(mask_words, "MASK_WARPS", (1, 1)), emulated(memory) as machine,
          replaced(("rows.pack_mask", "tile.words"), machine.names() | instructions(machine)),
          mask_words.mask_words(call, width, machine.launcher(), 0, by_keys) as found):
        yield found.operands.mask, machine.launched[0]
    forget()


def forget() -> None:
    """What was planned for another number of warps."""
    mask_words.pack_mask.cache_clear()
    mask_words.plan.cache_clear()


def check(mask: Array, width: int, by_keys: bool, packed: bool = False) -> str:
    """Words and bounds of a mask against the mask. Returns the kernel's key."""
    batch, heads, *_ = mask.shape
    by_line = mask.swapaxes(2, 3) if by_keys else mask
    lines, columns = by_line.shape[2:]
    with packed_words(mask, width, by_keys, packed) as (x, key):
        tile, needed = words.make_word_tile(width), {count: words.make_needed(count, by_keys) for count in (64, 128, 192)}
        of_lines, of_blocks = x.strides[:1:-1] if by_keys else x.strides[2:]
        a = mock.Mock(mask=x.ptr, mask_batch=x.strides[0], mask_head=x.strides[1], mask_row=x.strides[2], mask_col=x.strides[3])
        for b, h in np.ndindex(batch, heads):
            got = np.zeros((lines, -(-columns // width) * width), bool)
            for line, first, thread in ((line, first, thread) for line in range(lines) for first in range(0, columns, width)
                                        for thread in range(4)):
                own, other = tile(x.ptr, *x.strides[:2], of_lines, of_blocks, b, h, line, first + 2 * thread, lines, columns)
                for j in range(width // 8):
                    got[line, first + 8 * j + 2 * thread:][:2] = own >> 2 * j & 1, own >> 2 * j + 1 & 1
                if line + LINES_APART >= lines:
                    assert other == 0
            np.testing.assert_array_equal(got[:, :columns], by_line[b, h])
            for first, (count, bounds) in itertools.product(range(0, lines, 64), needed.items()):
                kept = by_line[b, h, first:first + count].any(axis=0)
                blocks = np.flatnonzero(np.add.reduceat(kept, np.arange(0, columns, width)))
                lo, end, ends = bounds(a, b, h, first, lines)
                assert len(ends) == count // 64 and max(ends) == end
                assert (lo, min(end, -(-columns // width))) == (blocks[0], blocks[-1] + 1) if len(blocks) else lo >= end
    return key


def make_mask(lines: int = 80, columns: int = 144) -> Array:
    """Whole blocks are hidden, and single pairs."""
    draw = np.random.default_rng(0)
    coarse = draw.random((1, 2, -(-lines // 40), -(-columns // 36))) < 0.5
    return coarse.repeat(40, 2).repeat(36, 3)[:, :, :lines, :columns] & (draw.random((1, 2, lines, columns)) < 0.7)


MASK = make_mask()


@pytest.mark.parametrize(("mask", "width", "by_keys", "key"), [
    pytest.param(MASK, 128, False, "pack_mask 128 warps 1 whole", id="whole"),
    pytest.param(MASK[..., :77, :141], 112, False, "pack_mask 112 warps 1", id="odd_lengths"),
    pytest.param(MASK[..., ::-1, ::-1], 80, False, "pack_mask 80 warps 1", id="reversed"),
    pytest.param(MASK, 64, True, "pack_mask 64 warps 1 across whole", id="by_keys"),
    pytest.param(MASK[..., :77, :141], 128, True, "pack_mask 128 warps 1 across", id="by_keys_odd_lengths"),
    pytest.param(MASK.swapaxes(2, 3), 16, True, "pack_mask 16 warps 1 whole", id="by_keys_of_a_transposed_mask"),
    pytest.param(np.broadcast_to(MASK[:, :1, :1], MASK.shape), 128, False, "pack_mask 128 warps 1 whole", id="padding"),
    pytest.param(np.broadcast_to(MASK[:, :1, :1], MASK.shape), 128, True, "pack_mask 128 warps 1 across whole", id="padding_by_keys"),
    pytest.param(np.broadcast_to(MASK[..., :1], MASK.shape), 96, False, "pack_mask 96 warps 1 across", id="rows"),
    pytest.param(np.broadcast_to(np.array(True), MASK.shape), 64, True, "pack_mask 64 warps 1 across", id="one_value"),
    pytest.param(MASK & False, 128, False, "pack_mask 128 warps 1 whole", id="nothing_seen"),
])
def test_words_and_bounds(mask: Array, width: int, by_keys: bool, key: str) -> None:
    assert check(mask, width, by_keys) == key


@pytest.mark.parametrize(("width", "narrower"), [(64, 1), (32, 2), (16, 4)])
def test_a_tile_of_keys_loops_over_the_queries_that_attend_it(width: int, narrower: int) -> None:
    """Blocks of queries may be as wide as those of the mask's words, or several times as wide. Two query heads share a key head."""
    hidden = MASK.swapaxes(2, 3)[..., :141, :77].copy()
    hidden[:, :, :, 64:] = False
    block, keys = width * narrower, hidden.shape[3]
    with packed_words(hidden, width, True, False) as (x, _):
        kept, alone = (words.make_kept_queries(mock.Mock(packed=False, mask=True), 64, narrower, one) for one in (False, True))
        given = {"mask": x.ptr, **dict(zip(("mask_batch", "mask_head", "mask_row", "mask_col"), x.strides, strict=True))}
        a, a_head = mock.Mock(**given, group=2), mock.Mock(**given, group=1)
        for first in range(0, keys, 64):
            blocks = np.flatnonzero(np.add.reduceat(hidden[0, :, :, first:first + 64].any(axis=(0, 2)), np.arange(0, 141, block)))
            lo, hi = kept(a, 0, 0, first, keys, 0, -(-141 // block))
            assert (lo, hi) == (blocks[0], blocks[-1] + 1) if len(blocks) else lo >= hi
            assert kept(a, 0, 0, first, keys, 1, 1) == (max(lo, 1), min(hi, 1))
            assert alone(a, 0, 0, first, keys, 0, 9) == (0, 9), "both heads' masks are not looked at"
            for head in range(2):
                blocks = np.flatnonzero(np.add.reduceat(hidden[0, head, :, first:first + 64].any(axis=1), np.arange(0, 141, block)))
                lo, hi = alone(a_head, 0, head, first, keys, 0, -(-141 // block))
                assert (lo, hi) == (blocks[0], blocks[-1] + 1) if len(blocks) else lo >= hi
    assert len(blocks) == 0


MODULES = ("sm80.forward", "sm80.backward", "sm90.forward", "sm90.backward", "sm90.backward_wide", "sm90.backward_dq",
           "sm90.backward_float", "sm90.forward_float")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("dtype", "dims"), [("float16", (64, 128, 192, 256, 512)), ("float32", (64, 128))])
def test_kernels_read_blocks_as_they_are_packed(arch: str, dtype: str, dims: tuple[int, ...]) -> None:
    """The columns of a block are those of a thread's fragment, in every kernel that scores: two for each of its registers."""
    wants = [Want(dtype, dim, mask=True, backward=way, deterministic=fixed) for dim in dims
             for way, fixed in ((False, False), (True, False), (True, True))]
    seen = set()
    for want in wants:
        read: list[int] = []

        def recorded(make: Any, read: list[int] = read) -> Any:
            def make_score(spec: Any, count: int, *rest: Any, **more: Any) -> Any:
                read.append(2 * count)
                return make(spec, count, *rest, **more)
            return make_score
        sources = precompile.sources(*want.call(), precompile.absent_device(arch))
        with contextlib.ExitStack() as stack:
            for module in (importlib.import_module(f"fastattn.gpu.{name}") for name in MODULES):
                stack.enter_context(mock.patch.object(module, "make_score", recorded(module.make_score)))
            for source in sources:
                if source.key.startswith(("forward_sm", "backward_sm")):
                    source.make()
        packed = [int(source.key.split()[1]) for source in sources if source.key.startswith("pack_mask")]
        wide = [source.key.split("|")[1].split()[1] for source in sources if "_wide" in source.key]
        if len(wide) == 2 and wide[0] == wide[1]:       # dV and dK in tiles of one size read the same words
            packed.append(int(wide[0].partition("x")[0]))
        assert sorted(packed) == sorted(read), f"{want}: {[source.key for source in sources]}"
        seen |= {want.backward} if packed else set()
    assert seen == {False, True} or (arch, dtype) == ("sm_80", "float32")


def test_an_axis_that_repeats_is_packed_once() -> None:
    """And of packed sequences whole: their lengths are known on the device alone, and keys behind the mask are hidden."""
    repeated = np.broadcast_to(MASK[:1, :1, :, :1], (3, 5, *MASK.shape[2:]))
    for packed, blocks in ((False, 0), (True, 16 * MASK.shape[2])):
        with packed_words(repeated, 64, False, packed) as (x, _):
            assert x.strides == (0, 0, 16, blocks)
    check(np.broadcast_to(MASK[..., :1], MASK.shape), 64, False, packed=True)


def test_nothing_is_packed_of_an_empty_mask() -> None:
    """And a call without a mask is passed on."""
    call = Call(mock.Mock(packed=False), Operands(*3 * [host_view(MASK)]), host_view(MASK), None)
    with mask_words.mask_words(call, 64, mock.Mock(), 0) as same:
        assert same is call
    launcher = mock.MagicMock()
    call.operands = Operands(*3 * [host_view(MASK)], mask=host_view(np.zeros((2, 1, 0, 9), bool)))
    launcher.temporary.return_value.__enter__.return_value = 4096
    with mask_words.mask_words(call, 64, launcher, 0):
        [(grid, *_), _] = launcher.load.return_value.launch.call_args
    assert grid == 0
