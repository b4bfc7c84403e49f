"""Tuning schemes on tiny random models of each architecture: what is trained, what is saved, what is copied."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from architectures import CONFIGS, PREFIX, X, change, logits, trained

from zoengine.methods import create
from zoengine.models import ModelError, load, save
from zoengine.models.tuning import Tuning, pick_layers
from zoengine.trainer import ZOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tuning": "subset", "parameters": "("}, "not a regular expression"),
        ({"tuning": "lora", "layers": "all"}, "not of the form"),
        ({"tuning": "prefix", "prefix_tokens": 0}, "prefix_tokens=0"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(fields, message):
    with pytest.raises(ModelError, match=message):
        load("/no/such/model", **fields)


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


def test_a_checkpoint_keeps_the_dtype_of_adapters(llama, tmp_path):
    base, tokenizer = load(llama, dtype="bfloat16")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    save(model, tokenizer, tmp_path / "checkpoint")
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = ZOTrainer(model=model, args=args, train_dataset=[{"input_ids": [1]}], zo_fields={"lr": 0.0})
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
