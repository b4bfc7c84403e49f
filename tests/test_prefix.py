"""Prefix tuning on tiny random models of each architecture: where it starts, what is saved, what is refused."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from architectures import CONFIGS, DECODERS, PREFIX, X, change, head_of, logits, trained

from zoengine.arena import Arena
from zoengine.models import ModelError, load, save
from zoengine.models.prefix import draw_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [*DECODERS, "bert", "roberta"])
def test_a_prefix_from_activations_is_its_tokens(folders, name):
    """Logits of x behind the prefix of tokens t are those of x in t + x: with and without a mask, and padded left.

    The encoders here have one layer: see zoengine.models.prefix.
    """
    plain, tokenizer = load(folders(name), head=head_of(name), dtype="float32")
    model, _ = load(folders(name), head=head_of(name), prefix_tokens=3, **PREFIX)
    t = draw_tokens(tokenizer, plain, 3, seed=7)
    tx = torch.cat([t.expand(2, -1), X], dim=1)
    expected = logits(plain, input_ids=tx)[:, 3:]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model, input_ids=X, attention_mask=torch.ones_like(X)), expected)
    assert (logits(model) - logits(plain)).abs().max() > 0.05, "the prefix does something"
    pad = plain.config.pad_token_id or 0
    x, mask = X.clone(), torch.ones_like(X)
    x[1, :2], mask[1, :2] = pad, 0
    whole = torch.cat([torch.ones_like(t).expand(2, -1), mask], dim=1)
    expected = logits(plain, input_ids=torch.cat([t.expand(2, -1), x], dim=1), attention_mask=whole)[:, 3:]
    found = logits(model, input_ids=x, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_generation_goes_on_behind_the_prefix(folders, name):
    plain, tokenizer = load(folders(name), dtype="float32")
    model, _ = load(folders(name), **PREFIX)
    t = draw_tokens(tokenizer, plain, 5, seed=7)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
    found = model.generate(input_ids=X, attention_mask=torch.ones_like(X), **how)[:, 7:]
    tx = torch.cat([t.expand(2, -1), X], dim=1)
    expected = plain.generate(input_ids=tx, attention_mask=torch.ones_like(tx), **how)[:, 12:]
    assert torch.equal(found, expected)


def test_a_prefix_of_a_deep_encoder(folders, tmp_path):
    """Several layers: the prefix is what t looks like alone, the model's own keys and values of t, layer by layer."""
    config = CONFIGS["roberta"]()
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders("roberta")).save_pretrained(tmp_path)
    plain, tokenizer = load(tmp_path, head="masked-lm", dtype="float32")
    model, _ = load(tmp_path, head="masked-lm", **PREFIX)
    t = draw_tokens(tokenizer, plain, 5, seed=7)
    states = plain.roberta(input_ids=t, output_hidden_states=True).hidden_states
    for layer, given in enumerate(model.get_prompt(2).layers):
        attention = plain.roberta.encoder.layer[layer].attention.self
        for linear, part in ((attention.key, given.keys), (attention.value, given.values)):
            expected = linear(states[layer]).view(1, 5, 4, 8).transpose(1, 2).expand(2, -1, -1, -1)
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_a_prefix_with_a_head(folders, name, tmp_path):
    """The head is trained and saved beside the prefix; with the prefix of t it gives the logits of t + x."""
    plain, tokenizer = load(folders(name), head=3, dtype="float32", seed=7)
    model, _ = load(folders(name), head=3, **PREFIX)
    t = draw_tokens(tokenizer, plain, 5, seed=7)
    if name != "roberta" and name != "bert":  # these two read the first token, which t + x has in t
        expected = logits(plain, input_ids=torch.cat([t.expand(2, -1), X], dim=1))
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    heads = {n for n in trained(model) if "prompt_encoder" not in n}
    assert heads and all("modules_to_save" in n for n in heads)
    before = logits(model)
    change(model)
    assert (logits(model) - before).abs().max() > 0.01
    out = save(model, tokenizer, tmp_path / "run")
    again, _ = load(folders(name), head=3, adapter=out, dtype="float32", seed=99)
    torch.testing.assert_close(logits(again), logits(model))


def test_the_prefix_is_drawn_from_its_seed(llama):
    def start(**fields):
        return load(llama, **{**PREFIX, **fields})[0].prompt_encoder["default"].embedding.weight

    state = torch.get_rng_state()
    first = start()
    assert first.shape == (5, 4 * 2 * 2 * 8) and first.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were used up"
    assert torch.equal(start(), first) and not torch.equal(start(seed=8), first)
    noise = start(prefix_init="random")
    assert torch.equal(start(prefix_init="random"), noise) and not torch.equal(
        start(prefix_init="random", seed=8), noise
    )
    assert noise.mean().abs() < 0.1 and 0.9 < noise.std() < 1.1


def test_prefix_tokens_are_ordinary_ones(llama):
    """Neither special tokens (0 to 3), nor words of the tokenizer that the model does not have (from 40)."""
    model, tokenizer = load(llama, dtype="float32")
    drawn = draw_tokens(tokenizer, model, 2000, seed=0)
    assert drawn.shape == (1, 2000) and set(drawn.flatten().tolist()) == set(range(4, 40))


def test_half_precision_prefixes_start_exactly(llama):
    plain, tokenizer = load(llama, dtype="bfloat16")
    model, _ = load(llama, **{**PREFIX, "dtype": "bfloat16"})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    cache = transformers.DynamicCache()
    with torch.no_grad():
        plain(input_ids=draw_tokens(tokenizer, plain, 5, seed=7), past_key_values=cache)
    for layer, given in zip(cache.layers, model.get_prompt(1).layers, strict=True):
        assert torch.equal(layer.keys, given.keys) and torch.equal(layer.values, given.values)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("distilbert", {}, "DistilBertForMaskedLM takes no keys and values .* in its 2 layers"),
        ("llama", {"prefix_tokens": 0}, "prefix_tokens=0; expected at least 1"),
        ("llama", {"prefix_init": "zero"}, "prefix_init is 'zero'; expected one of activations, random"),
        ("llama", {"layers": (0, 1)}, "layers=.* does not go with tuning=prefix"),
    ],
)
def test_what_a_prefix_refuses(folders, name, fields, message):
    with pytest.raises(ModelError, match=message):
        load(folders(name), head=head_of(name), **PREFIX, **fields)


def test_the_arena_takes_a_prefix_as_one_matrix(llama):
    arena = Arena.from_module(load(llama, **PREFIX)[0])
    assert [s.shape for s in arena.segments] == [(5, 128)]
