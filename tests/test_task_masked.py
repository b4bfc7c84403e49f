"""Masked prompts and pairs of texts for encoders, against one unpadded text at a time with all its logits."""

import logging

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers

from zoengine.tasks import Classification, Instance, LabelSimilarity, MaskedPrompt, TaskError
from zoengine.tasks.entry import Masked

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["it", "was", "good", "bad", "a", "film", "fine", "long", "dull", "is", "?", ",", ".", "yes", "no", ":", "été"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SST2 = Masked("{0} It was{mask}.", (" bad", " good"))
PAIR = Masked("{0}?{mask}, {1}", (" no", " yes"), first_limit=4, max_length=14, pair=True)

SINGLE = [
    Instance(texts=(text,), gold=(k % 2,))
    for k, text in enumerate(["a fine film", "", "long long dull", "été {0} {mask}", "a <mask> film", "good"])
]
PAIRS = [
    Instance(texts=(first, second), gold=(k % 2,))
    for k, (first, second) in enumerate([
        ("it was good.", "It is fine"), ("", ""), ("a long long long film", "A good film"), ("bad", "IT was"),
        ("a film", "a " + "long " * 20 + "film"),
    ])
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """Whole words; <s> and </s> around a text, </s></s> between two, and types that tell the two apart."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as token_models

    vocabulary = {word: k for k, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s>:1 $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>", cls_token="<s>", sep_token="</s>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def make_model(name, head="MaskedLM", **fields):
    torch.manual_seed(0)
    common = {
        "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 40, "initializer_range": 0.3, "pad_token_id": 1,
    }  # fmt: skip
    if name == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=24, initializer_range=0.3, pad_token_id=1
        )
    else:
        types = {"bert": (transformers.BertConfig, 2), "roberta": (transformers.RobertaConfig, 1)}
        make, count = types[name]
        config = make(**common, type_vocab_size=count)
    config.update(fields)
    return getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()


def slow_logits(model, tokenizer, masked, texts):
    """Without a limit in the way: the filled template alone, all logits, of which the words' at the mask."""
    text = masked.template.format(*texts, mask="<mask>")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in masked.words]
    (at,) = (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, at, words]


@torch.no_grad()
@pytest.mark.parametrize("name", ["roberta", "bert", "distilbert"])
def test_loss_is_that_of_the_words_at_the_mask(tokenizer, name):
    model, task = make_model(name), MaskedPrompt(tokenizer, SST2)
    filled = [(e.texts[0].replace("<mask>", " "),) for e in SINGLE]
    expected = torch.stack([slow_logits(model, tokenizer, SST2, texts) for texts in filled])
    batch, labels = task.collate(SINGLE), torch.tensor([e.label for e in SINGLE])
    assert len(set(batch["mask"].tolist())) > 2
    head_rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, given, out: head_rows.append(out.shape[1]))
    for _ in range(2):
        torch.testing.assert_close(task.logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert head_rows == [batch["input_ids"].shape[1], 1, 1, 1], "one position a row goes through the head, once checked"
    total, count = task.loss_sum(model, batch)
    assert count == 6
    torch.testing.assert_close(total, F.cross_entropy(expected, labels, reduction="sum"), rtol=1e-4, atol=1e-5)
    first, second = task.split(batch)
    torch.testing.assert_close(task.loss_sum(model, first)[0] + task.loss_sum(model, second)[0], total)
    scores = task.evaluate(model, SINGLE, batch_size=4)
    assert scores["accuracy"] == (expected.argmax(1) == labels).double().mean().item() and task.metric == "accuracy"
    assert task.predict(model, SINGLE) == [("bad", "good")[k] for k in expected.argmax(1)]


@torch.no_grad()
def test_pairs_lose_a_character_a_capital_and_what_does_not_fit(tokenizer, caplog):
    task, model = MaskedPrompt(tokenizer, PAIR), make_model("roberta")
    fitted = [
        ("it was good", "it is fine"), ("", ""), ("a long long long", "a good film"), ("ba", "iT was"),
        ("a fil", "a long long long long long long"),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        batch = task.collate(PAIRS)
    words = [tokenizer.decode(ids[ids != 1]) for ids in batch["input_ids"]]
    expected = [tokenizer(f"{a}?<mask>, {b}")["input_ids"] for a, b in fitted]
    assert words == [tokenizer.decode(ids) for ids in expected]
    assert max(map(len, expected)) == 14 and batch["input_ids"].shape[1] == 14
    assert task.truncated == 2 and len(caplog.records) == 1
    slow = torch.stack([slow_logits(model, tokenizer, PAIR, texts) for texts in fitted])
    torch.testing.assert_close(task.logits(model, batch), slow, rtol=1e-4, atol=1e-5)


def test_a_head_that_needs_all_positions(tokenizer, caplog):
    """One whose logits depend on the other positions: its own logits are used, with a warning."""
    model, task = make_model("bert"), MaskedPrompt(tokenizer, SST2)
    transform = model.cls.predictions.transform
    own = transform.forward
    transform.forward = lambda hidden: own(hidden - hidden.mean(1, keepdim=True))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = torch.stack(
            [slow_logits(model, tokenizer, SST2, (e.texts[0].replace("<mask>", " "),)) for e in SINGLE[:1]]
        )
        for _ in range(2):
            found = task.logits(model, task.collate(SINGLE[:1]))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(caplog.records) == 1 and "logits of all positions" in caplog.text


def test_a_prefix_and_lora_go_through(tokenizer):
    peft = pytest.importorskip("peft")
    for config in (
        peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
        peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query"]),
    ):
        bare, task = make_model("roberta"), MaskedPrompt(tokenizer, SST2)
        model = peft.get_peft_model(make_model("roberta"), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "prompt_encoder" in name or "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
            examples = [e for e in SINGLE if "<mask>" not in e.texts[0]]
            expected = torch.stack([slow_logits(model, tokenizer, SST2, e.texts) for e in examples])
            found = task.logits(model, task.collate(examples))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert (task.logits(bare, task.collate(examples)) - found).abs().max() > 1e-3
    with pytest.raises(TaskError, match="reads 35 at most"):  # 40 positions, those before padding's, and a prefix
        prefix = peft.get_peft_model(
            make_model("roberta"), peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
        )
        long = MaskedPrompt(tokenizer, SST2)
        long.logits(prefix, long.collate([Instance(texts=("long " * 40,), gold=(0,))]))


def test_what_a_masked_prompt_refuses(tokenizer):
    def masked(**fields):
        return Masked(**{"template": "{0}{mask}", "words": (" bad", " good"), **fields})

    for wrong, message in (
        (masked(words=(" bad", " very good")), "word ' very good' is not one token but"),
        (masked(words=(" bad", " marvellous")), "' marvellous' is not one token"),
        (masked(words=(" bad", " bad")), "at least two different"),
        (masked(template="{0}"), "must contain {mask} exactly once"),
    ):
        with pytest.raises(TaskError, match=message):
            MaskedPrompt(tokenizer, wrong)
    with pytest.raises(TaskError, match="needs 2 texts"):
        MaskedPrompt(tokenizer, PAIR).encode(SINGLE[0])
    with pytest.raises(TaskError, match="label 2 of 'good' has no word among"):
        MaskedPrompt(tokenizer, SST2).encode(Instance(texts=("good",), gold=(2,)))
    with pytest.raises(TaskError, match="max_length=5 has no room"):
        MaskedPrompt(tokenizer, SST2, max_length=5).encode(SINGLE[0])
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(TaskError, match="no mask token"):
        MaskedPrompt(plain, SST2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_pairs_for_a_head(tokenizer, name):
    """Types of tokens reach the models that have them; the longer text of a pair is cut first."""
    model = make_model(name, head="SequenceClassification", num_labels=2)
    task = Classification(tokenizer, max_length=15)
    examples = [*PAIRS, *(Instance(texts=e.texts, gold=e.gold) for e in SINGLE[:4])]
    with_types = name == "bert"

    def slow(texts):
        given = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=15)
        types = {"token_type_ids": given["token_type_ids"]} if with_types else {}
        return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], **types).logits[0]

    expected = torch.stack([slow(e.texts) for e in examples])
    batch = task.collate(examples)
    assert batch["token_type_ids"].any() and task.truncated == 1
    torch.testing.assert_close(task.logits(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert not with_types or (task.logits(model, {**batch, "token_type_ids": batch["token_type_ids"] * 0}) - expected
                              ).abs().max() > 1e-3  # fmt: skip
    with pytest.raises(TaskError, match="an example has 3 texts"):
        task.encode(Instance(texts=("a", "b", "c"), gold=(0,)))


@torch.no_grad()
def test_halves_of_a_similarity_keep_the_descriptions(tokenizer):
    model, task = make_model("bert", head="MaskedLM").bert, LabelSimilarity(tokenizer, descriptions=("bad", "good"))
    batch = task.collate(SINGLE[:5])
    total, _ = task.loss_sum(model, batch)
    parts = [task.loss_sum(model, half) for half in task.split(batch)]
    assert [count for _, count in parts] == [2, 3]
    torch.testing.assert_close(parts[0][0] + parts[1][0], total, rtol=1e-4, atol=1e-5)
    assert task.split(task.collate(SINGLE[:1])) is None
