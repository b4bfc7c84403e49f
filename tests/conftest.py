"""Shared fixtures: poisoned allocations and the automatic backend after every test."""

import signal

import pytest
import torch

from zoengine import ops


@pytest.fixture(autouse=True)
def automatic_backend():
    """A test that forces a backend does not leak it into the next."""
    yield
    ops.use(None)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, as it does in a terminal; a process started in the background ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison(monkeypatch):
    """``torch.empty`` filled with NaN, so that reading memory nobody wrote shows."""
    original = torch.empty

    def poisoned(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Configuration values of a run that takes a second: a tiny random Llama, its tokenizer and sentences, on disk."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<unk>", "it", "was", "good", "bad", "a", "film", "fine", "long", "dull", "."]
    vocabulary = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, attention_dropout=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [("a " + "long " * (k % 5) + ("fine" if k % 2 else "dull") + " film", k % 2) for k in range(22)]
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    (folder / "data.tsv").write_text("\n".join(lines) + "\n")
    data = str(folder / "data.tsv")
    return {
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": data, "eval": data, "test": data, "num_eval": 6},
        "task": {
            "name": "custom",
            "kind": "classification",
            "prompt": "{text} it was",
            "options": [" bad", " good"],
        },
        "method": {"name": "mezo", "lr": 1e-2},
        "run": {"output_dir": str(folder / "run"), "steps": 9, "batch_size": 4, "seed": 3},
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """From an architecture's name to the folder of its tiny model and tokenizer, made when asked for."""
    from architectures import save_model

    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_model(name, made[name])
        return made[name]

    return folder


@pytest.fixture
def llama(folders):
    """The folder of a tiny Llama."""
    return folders("llama")
