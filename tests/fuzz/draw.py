"""Random problems. `draw(seed, index)` gives the same Spec on every machine; features meet in pairs, seldom all at once."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from . import functions, memory, values
from .spec import Shape, Spec

T = TypeVar("T")
PER_KERNEL = 32                                 # problems for each kernel on a GPU: compiling it takes a second or two
DTYPES = ("float32", "float32", "float64", "float16", "bfloat16")
AROUND = (15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129)            # the tiles' edges
FAR = (191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 513, 577)
WORK = {"cpu": 20_000_000, "cuda": 150_000_000}     # num_heads * rows * keys * (head_dim + head_dim_v): the formula's time


class Dice:
    def __init__(self, *seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def chance(self, p: float) -> bool:
        return bool(self.random.random() < p)

    def one(self, options: Sequence[T]) -> T:
        return options[int(self.random.integers(len(options)))]

    def upto(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(self.random.integers(low, high + 1))

    def maybe(self, p: float, make: Callable[[], T]) -> T | None:
        return make() if self.chance(p) else None


def draw(seed: int, index: int, device: str = "cpu") -> Spec:
    """Problem `index` of a run."""
    dice = Dice(seed, index)
    if device == "cuda":
        return _on_a_gpu(dice, kernel(seed, index // PER_KERNEL))
    features = _features(dice)
    dtype = features["dtype"] = dice.one(DTYPES)
    long = dice.chance(0.12)

    def head_dim() -> int:
        return dice.upto(1, 512) if long else dice.one((dice.upto(1, 40), dice.upto(1, 16), 16, 32, 48, 64, 80, 96, 128))
    features["head_dim"] = head_dim()
    features["head_dim_v"] = head_dim() if dice.chance(0.3) else features["head_dim"]
    features["packed"] = dice.chance(0.25)
    features["call"] = dice.one(["attention"] * 14 + ["parts", "merge"])
    spec = _sized(dice, features, long, _length(dice, long), WORK["cpu"])
    spec = _numbers(dice, spec, dtype)
    return _held(dice, spec)


def _features(dice: Dice) -> dict[str, Any]:
    """What decides a kernel besides dtype and head sizes; shapes of bias and mask come later."""
    return {"causal": dice.one([False, False, True, True, "top_left"]), "window": dice.chance(0.2), "softcap": dice.chance(0.15),
            "alibi": dice.maybe(0.15, lambda: dice.one(["heads", "batch"])), "bias": dice.chance(0.35), "mask": dice.chance(0.25),
            "sinks": dice.maybe(0.2, lambda: dice.one(["normal", "normal", "large"])), "dropout": dice.chance(0.15),
            "diagonal": dice.chance(0.15), "out_dtype": dice.chance(0.2), "place": dice.chance(0.4),
            "backward": dice.chance(0.6), "dlse": dice.chance(0.3), "need_dbias": dice.chance(0.6),
            "score_mod": dice.maybe(0.12, lambda: dice.one(tuple(functions.SCORES))),
            "mask_mod": dice.maybe(0.12, lambda: dice.one(tuple(functions.MASKS))),
            "block_mask": dice.maybe(0.04, lambda: "blocks") or dice.maybe(0.3, lambda: "function"),
            "need_dcaptured": dice.chance(0.7)}


def _length(dice: Dice, long: bool) -> Callable[[], int]:
    def length() -> int:
        if dice.chance(0.03):
            return 0
        if long and dice.chance(0.6):
            return dice.one((dice.upto(130, 700), dice.one(FAR)))
        return dice.one((dice.upto(1, 5), dice.upto(1, 24), dice.upto(1, 24), dice.one(AROUND)))
    return length


def _sized(dice: Dice, f: dict[str, Any], long: bool, length: Callable[[], int], work: int) -> Spec:
    """Lengths, heads and broadcast shapes for these features."""
    heads_k, group = dice.upto(1, 1 if long else 3), dice.one([1, 1, 2, 3, 4, 8])
    decode = dice.chance(0.15)
    heads = 0 if dice.chance(0.01) else heads_k * group

    def query() -> int:
        return dice.upto(1, 3) if decode else int(length())
    s: dict[str, Any] = {"num_heads": heads, "num_heads_k": heads_k}
    s |= {name: f[name] for name in ("dtype", "head_dim", "head_dim_v", "causal", "alibi", "sinks", "backward", "call")}
    packed = f["packed"] and f["call"] != "parts"
    batch, rows, keys = 0 if dice.chance(0.02) else dice.upto(1, 1 if long else 3), query(), int(length())
    while max(heads, 1) * max(batch, 1) * rows * keys * (f["head_dim"] + f["head_dim_v"]) > work:
        rows, keys = (rows // 2, keys) if rows > keys else (rows, keys // 2)
    if packed:
        count = 0 if dice.chance(0.03) else dice.upto(1, 2 if long else 5)
        lengths_q = tuple(0 if dice.chance(0.1) else min(query(), max(rows, 1)) for _ in range(count))
        lengths_k = tuple(0 if dice.chance(0.1) else min(int(length()), max(keys, 1)) for _ in range(count))
        if dice.chance(0.3):
            lengths_k = lengths_q
        if dice.chance(0.03):
            lengths_q = (0,) * count
        used = tuple(dice.upto(0, n) for n in lengths_k) if dice.chance(0.4) else None
        s |= {"lengths_q": lengths_q, "lengths_k": lengths_k, "used_k": used,
              "spare": (dice.one([0, 0, 3]), dice.one([0, 0, 5])), "beyond": (dice.one([0, 0, 7]), dice.one([0, 0, 9]))}
    else:
        s |= {"batch": batch, "seqlen_q": rows, "seqlen_k": keys, "layout": dice.one(["bshd", "bhsd"])}
    spec = Spec(seed=dice.upto(0, 2**31 - 1), **s)
    most = max(spec.full[2:]) + 5
    more: dict[str, Any] = {}
    if f["window"]:
        more["window"] = tuple(dice.maybe(0.7, lambda: dice.one((dice.upto(0, 4), dice.upto(0, most)))) for _ in range(2))
    if f["bias"]:
        more |= {"bias": _broadcast(dice, spec.full), "bias_dtype": f.get("bias_dtype") or dice.one([spec.dtype, "float32"])}
        more["need_dbias"] = bool(f["backward"] and f["need_dbias"])
    if f["mask"]:
        more |= {"mask": _broadcast(dice, spec.full), "mask_density": dice.one([0.0, 0.1, 0.5, 0.7, 0.95, 1.0])}
    if f["softcap"]:
        more["softcap"] = float(dice.one([0.5, 1.0, 2.0, 5.0, 30.0, 50.0, 0.01, 1000.0]))
    if f["dropout"]:
        more |= {"dropout_p": float(dice.one([0.05, 0.1, 0.3, 0.5, 0.9, 1.0, 1e-6, 0.99999])), "offset": dice.one([0, 3, 2**32 - 1]),
                 "dropout_seed": dice.one([dice.upto(0, 2**31), -1, 2**63 - 1, 2**64 - 1])}
    more |= _position(dice, spec, f, "dropout_p" in more)
    more["dlse"] = bool(f["backward"] and f["dlse"])
    if f["call"] == "attention":
        more |= _functions(f)
    if f["call"] == "parts":
        cuts = sorted(dice.upto(0, spec.seqlen_k) for _ in range(dice.upto(0, 3)))
        more |= {"parts": tuple(cuts), "causal": False, "window": None, "dropout_p": 0.0, "alibi": None, "diagonal": None,
                 "dropout_at": None, "dropout_heads": None}
    elif f["call"] == "merge":
        more["parts"] = (0,) * dice.upto(0, 3)
    return replace(spec, **more)


def _functions(f: dict[str, Any]) -> dict[str, Any]:
    """A block mask has a function, blocks, or both."""
    block_mask = None if f["mask_mod"] is None and f["block_mask"] == "function" else f["block_mask"]
    differentiable = f["score_mod"] is not None and functions.has_arrays(f["score_mod"])
    return {"score_mod": f["score_mod"], "mask_mod": f["mask_mod"], "block_mask": block_mask,
            "need_dcaptured": bool(f["backward"] and differentiable and f["need_dcaptured"])}


def _position(dice: Dice, spec: Spec, f: dict[str, Any], dropout: bool) -> dict[str, Any]:
    """diagonal, dropout_at, dropout_heads and out_dtype."""
    more: dict[str, Any] = {}
    rows, keys = spec.full[2:]

    def diagonal() -> int:
        return dice.one((0, keys - rows, dice.upto(-rows - 3, keys + 3), dice.upto(-rows - 3, keys + 3), dice.one((-2**30, 2**30))))
    if f["diagonal"]:
        each = spec.packed and f.get("diagonals", dice.chance(0.5))
        more["diagonal"] = tuple(diagonal() for _ in range(spec.sequences)) if each else diagonal()
        more["causal"] = bool(spec.causal)
    if f["place"] and dropout:
        head = dice.one((0, 1, 5, 2**31 - 2000))
        row, column = 16 * dice.one((0, 1, 3, 2**27 - 1)), 16 * dice.one((0, 2, 9, 2**27 - 1))
        more["dropout_at"] = (dice.one((0, 1, 7, 2**31 - 1)), head, row, column)
        more["dropout_heads"] = head + spec.num_heads + dice.upto(0, 3)
    if f["out_dtype"] and spec.dtype in HALVES:
        more["out_dtype"] = "float32"
    return more


def _broadcast(dice: Dice, full: Shape) -> Shape:
    """A shape that broadcasts to `full`."""
    axes = dice.upto(0, 4) if dice.chance(0.1) else dice.upto(2, 4)
    return tuple(n if dice.chance(0.65) else 1 for n in full[4 - axes:])


def _numbers(dice: Dice, spec: Spec, dtype: str, everywhere: bool = True) -> Spec:
    """What the arrays hold. `everywhere`: NaN in every hidden place, not in padding alone."""
    kind = "normal" if dice.chance(0.5) else dice.one(values.SCORES)
    scale = dice.maybe(0.35, lambda: dice.one([0.7, 0.01, 0.3, 1.0, 0.125, -0.2, 0.0, -1.0, 2.0]))
    if kind in ("huge_integers", "one_hot", "equal_keys", "integers"):         # scores that are exact need a power of two
        scale = float(dice.one([1.0, 0.5, 0.125, 2.0**-10, -1.0, 4.0]))
    if dice.chance(0.06):
        scale = float(dice.one([1e-46, 1e-30, 1e-38, 1e-20, 10.0**4.5, 10.0**8.5, 1e20, 1e30, -1e9]))
        kind = "large_k" if abs(scale) > 1e9 else kind
    size = 1.0 if dice.chance(0.8) else float(dice.one([1e-6, 1e-3, 30.0, 1e4 if spec.dropout_p == 0 and dtype != "float16" else 30.0]))
    if not dice.chance(0.8):
        spec = replace(spec, v_size=size)
    settings: dict[str, Any] = {"values": kind, "softmax_scale": scale, "hidden": dice.maybe(0.5, lambda: dice.one(["nan", "nan", "inf"]))}
    if spec.bias is not None:
        settings["bias_values"] = "normal" if dice.chance(0.4) else dice.one(values.BIAS)
        if spec.score_mod is not None and settings["bias_values"] == "inf":     # of -inf most functions make NaN
            settings["bias_values"] = "normal"
    return replace(spec, **settings)


def _held(dice: Dice, spec: Spec) -> Spec:
    """How a caller holds the arguments: memory, kinds of number, threads."""
    kind = "plain" if dice.chance(0.5) else dice.one(memory.KINDS)
    repeats: list[str] = []
    if dice.chance(0.12) and spec.call == "attention":
        names = [name for name in ("q", "k", "v", "dout") if not (name in ("q", "k") and spec.values == "equal_keys")]
        rank = 3 if spec.packed else 4
        repeats.append(f"{dice.one(names)}{dice.upto(0, rank - 1)}")
        if spec.bias is not None and len(spec.bias) and dice.chance(0.5):
            repeats.append(f"bias{dice.upto(0, len(spec.bias) - 1)}")
    settings: dict[str, Any] = {
        "memory": kind, "repeats": tuple(repeats), "readonly": dice.chance(0.3), "numbers": dice.one(values.NUMBERS),
        "give_out": dice.maybe(0.2, lambda: dice.one(memory.KINDS)), "return_lse": dice.chance(0.8), "threads": dice.one([1, 2, 2, 3, 7])}
    return replace(spec, **settings)


# ---------------------------------------------------------------- GPUs: a kernel, then many problems for it
HALVES = ("float16", "bfloat16")
FAMILIES = ("sm90", "sm90", "sm90", "sm80", "sm80", "simt", "decode")


def kernel(seed: int, number: int) -> dict[str, Any]:
    """Family, dtype, head sizes and features that are one kernel in each direction."""
    dice = Dice(seed, number, 1)
    family = dice.one(FAMILIES)
    f = _features(dice) | {"family": family, "call": "attention", "packed": dice.chance(0.35), "deterministic": dice.chance(0.2)}
    f["diagonals"] = dice.chance(0.5)           # one for each sequence
    f["bias"], f["mask"] = f["bias"] and dice.chance(0.7), f["mask"] and dice.chance(0.7)
    if family == "simt":
        f["dtype"] = dice.one(("float32", "float64", *HALVES))
        f["head_dim"] = dice.one((dice.upto(1, 64), 16, 32, 64, 128, dice.upto(1, 576)))
    else:
        f["dtype"] = dice.one((*HALVES, *HALVES, "float32"))
        f["head_dim"] = dice.one((16, 32, 64, 64, 80, 96, 128, 128, 160, 192, 256, 8 * dice.upto(1, 32)))
        if family == "sm80" and dice.chance(0.2):
            f["head_dim"] = dice.upto(1, 256)
        if f["dtype"] == "float32":
            f["head_dim"] = dice.one((32, 64, 64, 128, dice.upto(1, 128)))
        elif family == "sm90" and dice.chance(0.1):
            f["head_dim"] = 8 * dice.upto(33, 72)
        if family == "sm90" and dice.chance(0.2):
            f["head_dim"] = dice.one((320, 512, 576, 8 * dice.upto(33, 72)))
    f["head_dim_v"] = f["head_dim"]
    if dice.chance(0.15):
        f["head_dim_v"] = dice.one((64, 128, 32, 256 if family != "decode" else 64, *[8 * dice.upto(33, 72)] * (family == "sm90")))
    if family == "decode":
        f |= {"head_dim": dice.one((64, 128, 8 * dice.upto(1, 16 if f["dtype"] == "float32" else 32))), "packed": False, "dropout": False,
              "backward": False, "causal": dice.one([False, True]), "score_mod": None, "mask_mod": None, "block_mask": None}
        f["head_dim_v"] = dice.one((f["head_dim"], f["head_dim"], 64, 128))
    f["bias_dtype"] = dice.one((f["dtype"], "float32"))
    if dice.chance(0.03):
        f["call"] = dice.one(("merge", "parts"))
    return f


def _on_a_gpu(dice: Dice, f: dict[str, Any]) -> Spec:
    decode = f["family"] == "decode"

    def length() -> int:
        if dice.chance(0.03):
            return 0
        return dice.one((dice.upto(1, 40), dice.upto(1, 300), dice.one(AROUND), dice.one(FAR), dice.upto(100, 700)))
    spec = _sized(dice, f, False, length, WORK["cuda"])
    if decode:
        group = dice.one((1, 2, 3, 4, 8))
        rows = dice.one((16, 16, 64))
        spec = replace(spec, seqlen_q=dice.upto(1, max(1, rows // group)), seqlen_k=dice.one((dice.upto(200, 600), dice.upto(1, 3000))),
                       num_heads_k=dice.upto(1, 2), batch=dice.upto(1, 2))
        spec = replace(spec, num_heads=spec.num_heads_k * group)
        spec = replace(spec, **{name: _broadcast(dice, spec.full) for name in ("bias", "mask") if getattr(spec, name) is not None})
    spec = _numbers(dice, spec, f["dtype"])
    held = "plain" if dice.chance(0.75) else dice.one(memory.KINDS)
    library = dice.one(("torch", "torch", "cupy", "dlpack", "interface") if spec.call != "parts" else ("torch", "cupy"))
    return replace(
        spec, engine=None if decode else f["family"], library=library, memory=held,
        numbers=dice.one(values.NUMBERS), give_out=dice.maybe(0.25, lambda: "plain" if dice.chance(0.7) else "gaps"),
        return_lse=f["backward"] or dice.chance(0.9), deterministic=f["deterministic"] and f["backward"],
        # results of a captured call come from torch's pool, and torch has no negative strides
        stream=dice.maybe(0.15, lambda: dice.one(("side", "capture") if library == "torch" and held in ("plain", "gaps") else ("side",))))
