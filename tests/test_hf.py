"""The arena under transformers and PEFT models: saving and loading stay theirs, memory stays inference's."""

import pytest
import torch

import zoengine

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def tiny_llama(seed: int = 0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def train(model, **fields):
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    optimizer = zoengine.MeZO(model, lr=1e-2, **fields)
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    return ids, optimizer


@pytest.mark.parametrize("mode", ["inplace", "shadow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_pretrained_and_load(tmp_path, mode, dtype):
    model = tiny_llama(dtype=dtype)
    _, optimizer = train(model, mode=mode)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * optimizer.arena.numel * dtype.itemsize + 10_000
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    optimizer.arena.check()


def test_peft_adapter_saves_and_loads(tmp_path):
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    ids, optimizer = train(model)
    assert {s.name.split(".")[-3] for s in optimizer.arena.segments} == {"lora_A", "lora_B"}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not torch.equal(tiny_llama()(ids).logits, model(ids).logits)


def test_tied_weights_stand_once_and_stay_tied():
    model = tiny_llama()
    _, optimizer = train(model)
    names = [s.name for s in optimizer.arena.segments]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_memory_is_the_weights_and_in_shadow_one_copy_more():
    config = dict(vocab_size=1000, hidden_size=256, intermediate_size=700, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    weights = sum(p.nbytes for p in model.parameters())
    inplace = zoengine.MeZO(model, lr=1e-3, mode="inplace")
    assert inplace.arena.nbytes < 1.02 * weights
    assert not inplace.states
    shadow = zoengine.MeZO(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), lr=1e-3, mode="shadow")
    assert sum(c.nbytes for c in shadow._mode._copies) == shadow.arena.nbytes
