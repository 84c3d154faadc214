"""attn_implementation="fastattn" in transformers: logits and gradients of small random models against eager attention.

On a CPU, and where torch sees a CUDA device, there too.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from fastattn.torch import transformers as ours  # noqa: E402

SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    assert ours.register() == "fastattn"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")])], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors and models of a test are."""
    with torch.device(request.param):
        yield request.param


def pair(kind: str, **config: Any) -> tuple[Any, Any]:
    """A model with eager attention, and one with the same weights on fastattn."""
    torch.manual_seed(0)
    settings = getattr(hf, f"{kind.removesuffix('ForCausalLM').removesuffix('Model')}Config")(**config)
    eager = getattr(hf, kind)._from_config(copy.deepcopy(settings), attn_implementation="eager")
    fast = getattr(hf, kind)._from_config(settings, attn_implementation="fastattn")
    fast.load_state_dict(eager.state_dict())
    assert (eager.config._attn_implementation, fast.config._attn_implementation) == ("eager", "fastattn")
    return eager.eval(), fast.eval()


def same(eager: Any, fast: Any, keep: Any = ..., theirs: dict[str, Any] | None = None, **inputs: Any) -> None:
    """Outputs at `keep` and all gradients. `theirs`: inputs of the eager model alone."""
    results = []
    for model, given in ((eager, inputs if theirs is None else theirs), (fast, inputs)):
        model.zero_grad()
        out = model(**given)[0][keep]
        out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
        results.append((out.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}))
    (want, grads), (got, fast_grads) = results
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)
    largest = max(float(g.abs().max()) for g in grads.values())
    assert grads.keys() == fast_grads.keys() and largest > 0
    for name, grad in grads.items():
        assert float((fast_grads[name] - grad).abs().max()) < 1e-5 * largest, name


def tokens(rows: int = 2) -> Any:
    drawn = torch.randint(0, 99, (rows, 12), generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return drawn.to(torch.get_default_device())


def padded(left: bool) -> Any:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return mask.flip(1) if left else mask


MODELS: dict[str, dict[str, Any]] = {"LlamaForCausalLM": GROUPED, "MistralForCausalLM": {**GROUPED, "sliding_window": 5},
                                     "Gemma2ForCausalLM": {**GROUPED, "head_dim": 16, "attn_logit_softcapping": 2.0, "sliding_window": 5},
                                     "BertModel": SIZES}


@pytest.mark.parametrize("kind", list(MODELS))
def test_language_models(kind: str) -> None:
    """Grouped heads, windows, softcap, bidirectional; whole and padded batches."""
    eager, fast = pair(kind, **MODELS[kind])
    same(eager, fast, input_ids=tokens())
    for left in (False, True):
        mask = padded(left)
        same(eager, fast, mask.bool(), input_ids=tokens(), attention_mask=mask)


def test_vit() -> None:
    eager, fast = pair("ViTModel", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                       patch_size=4)
    same(eager, fast, pixel_values=torch.randn(2, 3, 16, 16))


def test_sinks() -> None:
    if not hasattr(hf, "GptOssForCausalLM"):
        pytest.skip("a version without this model")
    eager, fast = pair("GptOssForCausalLM", **GROUPED, head_dim=16, sliding_window=5, num_local_experts=2, num_experts_per_tok=1)
    for model in (eager, fast):
        for name, x in model.named_parameters():
            if "sinks" in name:
                x.data = torch.linspace(-1, 1, 4)
    same(eager, fast, input_ids=tokens())


def test_relative_positions() -> None:
    """T5's learned bias, in self- and cross-attention, with padding."""
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    eager = hf.T5ForConditionalGeneration._from_config(copy.deepcopy(config), attn_implementation="eager")
    fast = hf.T5ForConditionalGeneration._from_config(config, attn_implementation="fastattn")
    fast.load_state_dict(eager.state_dict())
    same(eager.eval(), fast.eval(), input_ids=tokens(), decoder_input_ids=tokens()[:, :6], attention_mask=padded(False))


# ---------------------------------------------------------------- packed
def positions() -> Any:
    """position_ids of two sequences in one row."""
    return torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])


def lengths() -> dict[str, Any]:
    """The same by cu_seq_lens."""
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    return {"cu_seq_lens_q": starts, "max_length_q": 7, "max_length_k": 7, "cu_seq_lens_k": starts.clone()}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MistralForCausalLM"])
@pytest.mark.parametrize("given", ["positions", "lengths", "both"])
def test_packed_sequences(kind: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences in one row: by position_ids, by cu_seq_lens, by both. Packed attention runs where transformers makes no
    mask; Mistral's window is one."""
    eager, fast = pair(kind, **MODELS[kind])
    packed: list[int] = []
    own = ours.attention_varlen
    monkeypatch.setattr(ours, "attention_varlen", lambda *a, **k: packed.append(1) or own(*a, **k))
    theirs = {"input_ids": tokens(1), "position_ids": positions(), "use_cache": False}
    mine = {"input_ids": tokens(1), "use_cache": False}
    if given != "lengths":
        mine["position_ids"] = positions()
    if given != "positions":
        mine |= lengths()
    same(eager, fast, theirs=theirs, **mine)
    assert bool(packed) == (given == "lengths" and kind == "LlamaForCausalLM")


def test_packed_sequences_beside_a_mask() -> None:
    """cu_seq_lens count beside a mask of padding, which does not know them."""
    eager, fast = pair("LlamaForCausalLM", **GROUPED)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 10:] = 0
    whole = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    whole[..., :5, :5] = whole[..., 5:, 5:] = True
    whole = whole & torch.ones(12, 12, dtype=torch.bool).tril() & mask.bool()
    additive = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    same(eager, fast, (slice(None), slice(10)), theirs={"input_ids": tokens(1), "attention_mask": additive, "use_cache": False},
         input_ids=tokens(1), attention_mask=mask, use_cache=False, **lengths())


# ---------------------------------------------------------------- decoding, compile, training
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache: str | None) -> None:
    eager, fast = pair("LlamaForCausalLM", **GROUPED)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": padded(True)}
    want = eager.generate(tokens(), **options)
    assert torch.equal(fast.generate(tokens(), **options, **({"cache_implementation": cache} if cache else {})), want)


def test_compile() -> None:
    eager, fast = pair("LlamaForCausalLM", **GROUPED)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(), use_cache=False)[0], eager(tokens(), use_cache=False)[0], atol=3e-6, rtol=1e-5)


def test_training_with_dropout_and_checkpointing() -> None:
    """The checkpointed model repeats its masks: gradients are those without checkpointing."""
    _, model = pair("LlamaForCausalLM", **GROUPED, attention_dropout=0.5)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.zero_grad()
        torch.manual_seed(5)
        model(tokens(), use_cache=False, labels=tokens()).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*grads)
    torch.manual_seed(6)
    model.zero_grad()
    model(tokens(), use_cache=False, labels=tokens()).loss.backward()
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight.grad, grads[0])


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 5), (3, 5), (5, 5)])
@pytest.mark.parametrize("causal", [None, True, False])
def test_a_layer_without_a_mask_is_aligned_as_transformers_aligns_it(seqlen_q: int, seqlen_k: int, causal: bool | None) -> None:
    """A decoding step attends all keys; a first step over a longer cache is top-left."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = torch.nn.Module()
    q, (k, v) = torch.randn(2, 4, seqlen_q, 8), torch.randn(2, 2, 4, seqlen_k, 8)
    want, _ = sdpa_attention_forward(layer, q, k, v, None, is_causal=causal, scaling=0.3)
    torch.testing.assert_close(ours.attention_forward(layer, q, k, v, None, is_causal=causal, scaling=0.3)[0], want)


def test_what_fastattn_has_not_is_refused() -> None:
    layer, q = torch.nn.Module(), torch.randn(1, 2, 3, 8)
    for name in ("indices", "block_indices", "head_mask"):
        with pytest.raises(NotImplementedError, match=rf"attention_forward\(\): {name} is given; expected none"):
            ours.attention_forward(layer, q, q, q, **{name: torch.zeros(1)})
    with pytest.raises(NotImplementedError, match="output_attentions is True; expected False"):
        ours.attention_forward(layer, q, q, q, output_attentions=True)
    with pytest.raises(ValueError, match="query has batch 2; expected 1, because cu_seq_lens_q packs"):
        ours.attention_forward(layer, *[q.expand(2, 2, 3, 8)] * 3, **lengths())
    assert ours.attention_forward(layer, q, q, q, position_ids=positions(), use_cache=True)[0].shape == (1, 3, 2, 8)
