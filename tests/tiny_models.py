"""A small tokenizer and tiny causal language models with random weights, for the tests of tasks."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

# Seen often while its tokenizer was trained: each of these is one token, and so are their words with a space before.
WORDS = ("terrible", "great", "Yes", "No", "Maybe")
SENTENCES = (
    "a joy to watch", "it drags", "the cast is better than the film deserves", "long , dull and far too long",
    "fine", "an odd , lovely little film", "no plot , no point", "I laughed twice", "a film of two halves",
    "the ending ruins it", "see it twice",
)  # fmt: skip


def byte_tokenizer(bos=True, pre_split=True):
    """Byte-level BPE. Without pre_split it merges across spaces and newlines, and so across the end of a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_split)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    lines = [f"It was {word}\n{word}" for word in WORDS] * 50 + list(SENTENCES)
    bpe.train_from_iterator(lines, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def make_model(name, **fields):
    """A tiny causal language model with random weights large enough for its logits to differ."""
    torch.manual_seed(0)
    common = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "llama":
        sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}
        config = transformers.LlamaConfig(**common, **sizes)
    elif name == "opt":
        config = transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=24, max_position_embeddings=256)
    elif name == "gpt2":
        config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)
    elif name == "gemma2":
        sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
        config = transformers.Gemma2Config(**common, **sizes)
    elif name == "mistral":
        config = transformers.MistralConfig(**common, intermediate_size=48, num_key_value_heads=2, sliding_window=5)
    elif name == "phi":  # its output embedding has a bias
        config = transformers.PhiConfig(**common, intermediate_size=48)
    config.update(fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def prefix_tuned(model, tokens=3, seed=1):
    """`model` with a PEFT prefix of random keys and values."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def slow_log_probs(model, tokenizer, prompt, option):
    """log p of each token of the option: one unpadded sequence through the whole model, all logits."""
    before, ids = tokenizer(prompt.strip(" "))["input_ids"], tokenizer(prompt.strip(" ") + option)["input_ids"]
    start = 0
    while start < len(before) and before[start] == ids[start]:
        start += 1
    if start == 0:
        ids, start = [tokenizer.bos_token_id, *ids], 1
    logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
    found = torch.log_softmax(logits.float(), 1)
    return torch.stack([found[t - 1, ids[t]] for t in range(start, len(ids))])
