"""Tiny models of many architectures with random weights, on disk, for the tests of loading and tuning."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

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


def save_model(name, folder):
    """Write the architecture's model and a word tokenizer with special tokens 0 to 3."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModelForMaskedLM
    kind.from_config(CONFIGS[name]()).save_pretrained(folder)
    words = ["<pad>", "<one>", "<unk>", "<s>", *(f"w{k}" for k in range(4, 50))]
    vocabulary = Tokenizer(token_models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        additional_special_tokens=["<one>"],
    ).save_pretrained(folder)  # fmt: skip


def head_of(name):
    """The head of a language model of that architecture, as `zoengine.models.load` takes it."""
    return "lm" if name in DECODERS else "masked-lm"


def trained(model):
    """The names of the parameters that are trained."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model, **batch):
    return model(**(batch or {"input_ids": X})).logits


def change(model):
    """Move what is trained by some noise."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
