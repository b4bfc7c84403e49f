"""Tuning schemes on tiny random models of each architecture: what is trained, from where it starts, what is copied."""

import copy
import importlib.util

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers

from zoengine import config
from zoengine.arena import Arena
from zoengine.methods import create
from zoengine.models import ModelError, load, save
from zoengine.models.prefix import draw_tokens
from zoengine.models.tuning import pick_layers
from zoengine.trainer import ZOTrainer
from zoengine.trainer import run as runs
from zoengine.trainer.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

_IN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 40}
_GQA = {**_IN, "num_key_value_heads": 2, "tie_word_embeddings": True}
_ENCODER = {**_IN, "num_hidden_layers": 1, "max_position_embeddings": 40, "initializer_range": 0.3}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_GQA, initializer_range=0.3),
    "qwen2": lambda: transformers.Qwen2Config(**_GQA, initializer_range=0.3),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_attention_heads=4, num_hidden_layers=4, vocab_size=40, word_embed_proj_dim=32,
        max_position_embeddings=40, init_std=0.3, dropout=0.2,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_head=4, n_layer=4, vocab_size=40, n_positions=40, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    ),
    "bert": lambda: transformers.BertConfig(**_ENCODER),
    "roberta": lambda: transformers.RobertaConfig(**_ENCODER, pad_token_id=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, hidden_dim=48, n_heads=4, n_layers=2, vocab_size=40, max_position_embeddings=40
    ),
}  # fmt: skip
DECODERS = ("llama", "qwen2", "opt", "gpt2")
PREFIX = {"tuning": "prefix", "dtype": "float32", "seed": 7}
X = torch.randint(4, 40, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The architecture's model and a word tokenizer with special tokens 0 to 3, on disk; made when asked for."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    made = {}

    def folder(name):
        if name not in made:
            path = made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            config = CONFIGS[name]()
            kind = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModelForMaskedLM
            kind.from_config(config).save_pretrained(path)
            words = ["<pad>", "<one>", "<unk>", "<s>", *(f"w{k}" for k in range(4, 50))]
            vocabulary = Tokenizer(token_models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
            vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=vocabulary, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
                additional_special_tokens=["<one>"],
            ).save_pretrained(path)  # fmt: skip
        return made[name]

    return folder


@pytest.fixture
def llama(folders):
    return folders("llama")


def head_of(name):
    return "lm" if name in DECODERS else "masked-lm"


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model, **batch):
    return model(**(batch or {"input_ids": X})).logits


# --- prefix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, "bert", "roberta"])
def test_a_prefix_from_activations_is_its_tokens(folders, name):
    """Logits of x behind the prefix of tokens t are those of x in t + x: with and without a mask, and padded left.

    The encoders here have one layer: see the module's text.
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


def change(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


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


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((0, 3), [0, 1, 2, 3]),
        ([-2, -1], [2, 3]),
        ("1-2", [1, 2]),
        (" -3--2 ", [1, 2]),
        ((3, 3), [3]),
        ((1, -1), [1, 2, 3]),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_layers(folders, name, layers, expected):
    place = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(name))
    assert pick_layers(model, layers) == (place, expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_layers_of_an_encoder(folders, name):
    model, _ = load(folders(name), head="masked-lm", dtype="float32", layers=(0, 0))
    place = "transformer.layer" if name == "distilbert" else "encoder.layer"
    assert trained(model) == {n for n, _ in model.named_parameters() if f".{place}.0." in n} != set()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0, 4), "out of range; this model has 4 layers, 0 to 3"), ((-5, 1), "out of range"), ((2, 1), "out of range"),
        ("all", "not of the form"), ("1-2-3", "not of the form"), ((1,), "not of the form"), ((0, 1.0), "of the form"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tuning", ["full", "subset", "lora"])
def test_layers_that_are_not_there(llama, tuning, layers, message):
    with pytest.raises(ModelError, match=message):
        load(llama, dtype="float32", tuning=tuning, layers=layers, parameters="norm")


def test_a_model_without_one_list_of_layers(llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"not one list of its 5 layers \(found: none\).*tuning=subset"):
        pick_layers(model, (0, 1))


def test_schemes_confined_to_layers(llama, tmp_path):
    full, _ = load(llama, dtype="float32", layers="2-3")
    everything = {name for name, _ in full.named_parameters()}
    assert trained(full) == {n for n in everything if n.startswith(("model.layers.2.", "model.layers.3."))}
    subset, _ = load(llama, dtype="float32", tuning="subset", parameters="norm", layers=(-1, -1))
    assert trained(subset) == {n for n in everything if n.startswith("model.layers.3.") and "norm" in n}
    with pytest.raises(ModelError, match=r"'embed' names no parameter; there are model.layers.N.input_layernorm"):
        load(llama, dtype="float32", tuning="subset", parameters="embed", layers=(0, 1))
    for targets, kinds in ((("q_proj", "v_proj"), 2), ("all-linear", 7)):
        lora, tokenizer = load(llama, dtype="float32", tuning="lora", lora_target_modules=targets, layers=(1, 2))
        names = trained(lora)
        assert len(names) == 2 * 2 * kinds and all(".layers.1." in n or ".layers.2." in n for n in names)
    change(lora)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, save(lora, tokenizer, tmp_path / "run")).eval()
    assert torch.equal(logits(again), logits(lora))


def test_a_new_head_is_trained_besides_the_layers(llama):
    model, _ = load(llama, head=2, dtype="float32", layers=(3, 3))
    assert trained(model) == {n for n, _ in model.named_parameters() if ".layers.3." in n or n == "score.weight"}


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("tuning", ["full", "lora", "prefix"])
def test_masked_language_models_round_trip(folders, name, tuning, tmp_path):
    """Saved, and loaded by plain transformers and PEFT."""
    if (name, tuning) == ("distilbert", "prefix"):
        return
    how = {"tuning": tuning, "lora_target_modules": "all-linear"}
    model, tokenizer = load(folders(name), head="masked-lm", dtype="float32", **how)
    before = logits(model)
    change(model)
    out = save(model, tokenizer, tmp_path / "run")
    plain = transformers.AutoModelForMaskedLM.from_pretrained(folders(name) if tuning != "full" else out)
    again = plain if tuning == "full" else peft.PeftModel.from_pretrained(plain, out)
    torch.testing.assert_close(logits(again.eval()), logits(model))
    assert (logits(model) - before).abs().max() > 0.01


@pytest.mark.parametrize(("name", "head"), [("bert", "lm"), ("llama", "masked-lm")])
def test_a_model_without_the_head_asked_for(folders, name, head):
    with pytest.raises(ModelError):
        load(folders(name), head=head, dtype="float32")


def test_a_headless_encoder_is_no_masked_language_model(folders, tmp_path):
    """It would start from a random head, silently."""
    torch.manual_seed(0)
    transformers.BertModel(CONFIGS["bert"]()).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders("bert")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no masked language model: its weights lack .*cls\.predictions"):
        load(tmp_path, head="masked-lm", dtype="float32")
    with pytest.raises(ModelError, match="nor a masked one"):
        load("minilm-l6", head="masked-lm")


@pytest.mark.parametrize("head", ["mlm", 0, -1, True, None])
def test_unknown_heads(llama, head):
    with pytest.raises(ModelError, match=r"head is .*; expected lm, masked-lm, none or a number of classes"):
        load(llama, head=head, dtype="float32")


@pytest.mark.parametrize("tuning", ["subset", "lora"])
def test_a_pooler_that_the_weights_lack_is_trained_with_the_head(folders, tuning, tmp_path):
    """A masked language model has no pooler: a random one that stayed frozen would be saved nowhere."""
    fields = {"tuning": tuning, "parameters": "LayerNorm", "lora_target_modules": ["query"]}
    model, tokenizer = load(folders("bert"), head=2, dtype="float32", **fields)
    names = trained(model)
    assert any("pooler" in n for n in names) and any("classifier" in n for n in names)
    if tuning == "lora":
        change(model)
        out = save(model, tokenizer, tmp_path / "run")
        again, _ = load(folders("bert"), head=2, adapter=out, dtype="float32", seed=9)
        torch.testing.assert_close(logits(again), logits(model))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("scheme", ["lora", "prefix", "layers"])
def test_the_base_is_never_copied(folders, name, scheme):
    """From loading to the optimizer's steps, every frozen weight keeps its storage; the arena has the trained alone."""
    from zoengine.models.tuning import Tuning

    plain, tokenizer = load(folders(name), dtype="float32")
    storages = {p.untyped_storage().data_ptr() for p in plain.parameters()}
    size = sum(p.numel() for p in plain.parameters())
    tuning = Tuning(
        kind="full" if scheme == "layers" else scheme, layers=(3, 3) if scheme == "layers" else None, parameters="",
        lora_r=2, lora_alpha=4, lora_target_modules="all-linear", prefix_tokens=5, prefix_init="activations", seed=0,
    )  # fmt: skip
    model = tuning(plain, tokenizer, head="lm", top=[])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.untyped_storage().data_ptr() for p in frozen} <= storages
    assert sum(p.numel() for p in model.parameters()) == size + sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n or "prompt_encoder" in n
    )
    before = [p.data_ptr() for p in frozen]
    copies = [p.clone() for p in frozen]
    optimizer = create("mezo", model, lr=1e-2, zo_eps=1e-2)
    for _ in range(2):
        optimizer.step(lambda: model(input_ids=X, labels=X).loss)
    assert [p.data_ptr() for p in frozen] == before and all(map(torch.equal, copies, frozen))
    assert optimizer.arena.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {s.name for s in optimizer.arena.segments} == trained(model)


# --- a quantised base -------------------------------------------------------------------------------------------------

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(params=list(LIBRARIES))
def quantization(request):
    library = LIBRARIES[request.param]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install {library}")
    return request.param


@pytest.mark.parametrize("tuning", ["lora", "prefix"])
@pytest.mark.parametrize("head", ["lm", 2])
def test_a_quantised_base(llama, quantization, tuning, head, tmp_path):
    """Close to the plain model; adapters in 16 bit; only they are in the arena, move and are saved."""
    how = {"dtype": "bfloat16", "head": head, "tuning": tuning, "lora_target_modules": "all-linear"}
    plain, _ = load(llama, dtype="bfloat16", head=head)
    model, tokenizer = load(llama, quantization=quantization, **how)
    if tuning == "lora":
        distance = (logits(model) - logits(plain)).norm() / logits(plain).norm()
        assert 1e-3 < distance < {"int8": 0.1, "nf4": 0.8}[quantization], distance
    base = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    stored = [p for n, p in base.items() if n.endswith("q_proj.base_layer.weight") or n.endswith("q_proj.weight")]
    assert stored and all(type(p) is not torch.nn.Parameter for p in stored)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    optimizer = create("mezo", model, lr=1e-2, zo_eps=1e-2)
    assert {s.name for s in optimizer.arena.segments} == trained(model)
    assert optimizer.arena.numel == sum(p.numel() for n, p in model.named_parameters() if n not in base)
    before = logits(model)
    labels = X if head == "lm" else torch.tensor([0, 1])
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=X, labels=labels).loss)
    found = logits(model)
    assert not torch.equal(found, before)
    out = save(model, tokenizer, tmp_path / "run")
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert (out / "adapter_model.safetensors").stat().st_size < 3 * optimizer.arena.numel + 10_000
    again, _ = load(llama, quantization=quantization, adapter=out, **how)
    torch.testing.assert_close(logits(again), found)
    assert {p.dtype for n, p in again.named_parameters() if "lora_" in n or "prompt_encoder" in n} == {torch.bfloat16}
    measured, _ = load(llama, quantization=quantization, **{**how, "tuning": "none"})
    assert not trained(measured) and (logits(measured) - logits(plain)).norm() < 0.8 * logits(plain).norm()


@pytest.mark.parametrize("tuning", ["full", "subset"])
def test_a_quantised_base_is_not_trained_itself(llama, tuning):
    with pytest.raises(ModelError, match=f"tuning={tuning} would perturb the weights .* int8 stores as integer codes"):
        load(llama, quantization="int8", tuning=tuning, parameters="norm")


@pytest.mark.parametrize(("name", "library"), LIBRARIES.items())
def test_a_missing_library_is_named(llama, name, library, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *a: None if module == library else find(module, *a))
    with pytest.raises(ModelError, match=f"quantization={name} needs {library}: pip install {library}"):
        load(llama, quantization=name, tuning="lora")
    with pytest.raises(ModelError, match="quantization is 'int3'; expected int8, nf4"):
        load(llama, quantization="int3", tuning="lora")


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_that_do_not_fit(folders, llama, tmp_path):
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        load(llama, adapter=llama, dtype="float32")
    model, tokenizer = load(llama, **PREFIX)
    out = save(model, tokenizer, tmp_path / "run")
    with pytest.raises(ModelError, match="does not fit this model"):
        load(folders("gpt2"), adapter=out, dtype="float32")
    lora, tokenizer = load(llama, tuning="lora", dtype="float32")
    out = save(lora, tokenizer, tmp_path / "lora")
    with pytest.raises(ModelError, match="does not fit this model"):
        load(folders("gpt2"), adapter=out, dtype="float32")


def test_the_arena_takes_a_prefix_as_one_matrix(llama):
    arena = Arena.from_module(load(llama, **PREFIX)[0])
    assert [s.shape for s in arena.segments] == [(5, 128)]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tuning",
    [
        {"kind": "prefix", "prefix_tokens": 3},
        {"kind": "prefix", "quantization": "int8"},
        {"kind": "lora", "quantization": "nf4"},
    ],
    ids=lambda tuning: "-".join(map(str, tuning.values())),
)
def test_a_resumed_run_ends_in_the_same_bits(tiny_run, tuning, tmp_path):
    """Adapters in 16 bit, too, which PEFT would read back in fp32. `zoengine eval` finds the scores of the run."""
    library = LIBRARIES.get(tuning.get("quantization"))
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install {library}")
    values = copy.deepcopy(tiny_run)
    values["tuning"] = tuning
    values["model"]["dtype"] = "bfloat16" if library else "float32"
    values["run"] |= {"steps": 4, "save_every": 2}

    def run(name, resume=False, **fields):
        values["run"] |= {"output_dir": str(tmp_path / name), **fields}
        return runs.train(config.check(values), resume=resume)

    whole = run("whole")
    run("parts", steps=2)
    run("parts", resume=True, steps=4)
    first, second = ((tmp_path / n / "model/adapter_model.safetensors").read_bytes() for n in ("whole", "parts"))
    assert first == second
    scores = evaluate(str(tmp_path / "whole"), [], "test")
    assert scores["loss"] == pytest.approx(whole.after["loss"], rel=1e-6)


def test_a_checkpoint_keeps_the_dtype_of_adapters(llama, tmp_path):
    base, tokenizer = load(llama, dtype="bfloat16")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    save(model, tokenizer, tmp_path / "checkpoint")
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = ZOTrainer(model=model, args=args, train_dataset=[{"input_ids": [1]}], zo_fields={"lr": 0.0})
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
