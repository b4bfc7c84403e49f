"""Embedded data, data files, and prompt classification against a slow, obvious implementation."""

import csv
import json
import logging
from collections import Counter

import pytest
import torch

from zoengine import data
from zoengine.data import DataError, Example, movie_reviews, read_examples, split_hash
from zoengine.data import select as selection

SPLITS = {"train": 1500, "dev": 300, "test": 500}


# --- data ---------------------------------------------------------------------------------------------------------


def test_movie_reviews_keep_their_rule():
    seen = set()
    for split, count in SPLITS.items():
        examples = movie_reviews(split)
        assert Counter(e.label for e in examples) == {0: count // 2, 1: count // 2}
        assert all(4 <= len(e.text.split()) <= 12 and e.text.isascii() for e in examples)
        seen.update(selection.normalised(e.text) for e in examples)
    assert len(seen) == sum(SPLITS.values()), "a sentence stands twice"


def test_movie_reviews_label_is_the_ratings_sign():
    path = data.resources.files("zoengine.data") / "movie_reviews.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            rating = float(row["mean_rating"])
            assert abs(rating) > 0.5 and int(row["label"]) == (rating > 0), row


def test_movie_reviews_hashes_are_the_published_ones():
    notice = (data.resources.files("zoengine.data") / "NOTICE.md").read_text(encoding="utf-8")
    for split in SPLITS:
        row = next(line for line in notice.splitlines() if line.startswith(f"| {split} |"))
        assert split_hash(movie_reviews(split)) in row


def test_split_hash_sees_text_label_and_order():
    examples = [Example("a b", 0), Example("c", 1)]
    changed = [[Example("a b", 1), Example("c", 1)], [Example("a  b", 0), Example("c", 1)], examples[::-1]]
    assert len({split_hash(e) for e in [examples, *changed]}) == 4


def test_select_drops_repeats_neutral_long_and_broken_sentences(monkeypatch):
    monkeypatch.setattr(selection, "PER_LABEL", {"test": 1})
    rows = [
        "id\tmean\ttext",
        "1\t2.0\tA Very good film.",
        "2\t3.0\ta very good FILM",
        "3\t0.5\tIt is a film",
        "4\t1\tToo short",
    ]
    rows += ["5\t-1.0\tIt is quite bad", "6\t-2.0\tBad " + "word " * 12, "7\t-2.0\tA na\u00efve bad film"]
    assert selection.select(rows) == [
        ("5", "test", 0, "-1.0", "It is quite bad"), ("1", "test", 1, "2.0", "A Very good film.")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_own_file_in_every_format(tmp_path, kind):
    path = tmp_path / f"own.{kind}"
    if kind == "jsonl":
        rows = [{"text": '"No", he said', "label": "bad"}, {"text": "fine", "label": "good"}]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    elif kind == "csv":
        path.write_text('\ufefflabel,text\nbad,"""No"", he said"\ngood,fine\n', encoding="utf-8")
    else:
        path.write_text('text\tlabel\n"No", he said\tbad\nfine\tgood\n', encoding="utf-8")
    assert read_examples(path, options=("bad", "good")) == [Example('"No", he said', 0), Example("fine", 1)]


@pytest.mark.parametrize(
    ("name", "content", "split", "message"),
    [
        ("a.tsv", None, None, "no data file at .*a.tsv"),
        ("a.txt", "text\tlabel\nx\t1\n", None, "unknown kind '.txt'"),
        ("a.tsv", "text\tsentiment\nx\t1\n", None, "a.tsv, line 2: no column 'label'; .*'text', 'sentiment'"),
        ("a.tsv", "text\tlabel\nx\t1\ny\t2\n", None, "a.tsv, line 3: label '2' is not one of the options 0, 1"),
        ("a.tsv", "text\tlabel\nx\t1\ty\n", None, "line 2: more fields than the header"),
        ("a.csv", "text,label\n  ,1\n", None, "a.csv, line 2: the column 'text' is empty"),
        ("a.csv", 'text,label\n"x"y,1\n', None, "a.csv, line 2: not valid CSV"),
        ("a.csv", "text,label\n", None, "a.csv: no rows"),
        ("a.csv", "text,label\nx,1\n", "dev", "no column 'split'"),
        ("a.csv", "text,label,split\nx,1,train\n", "dev", "no row of split 'dev'; splits there: train"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', None, "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", None, "line 1: expected a JSON object, found list"),
        ("a.csv", b"text,label\n\xff,1\n", None, "not UTF-8 text"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, split, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_examples(tmp_path / name, split=split)


def test_movie_reviews_unknown_split():
    with pytest.raises(DataError, match="'validation'; splits there: dev, test, train"):
        movie_reviews("validation")


# --- task -----------------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
tasks = pytest.importorskip("zoengine.tasks")
PromptClassification, TaskError = tasks.PromptClassification, tasks.TaskError

EXAMPLES = movie_reviews("dev")[:11]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level BPE tokenizer with a BOS, in which " great" and " terrible" are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["It was great", "It was terrible"] * 50 + [e.text for e in EXAMPLES], trainer)
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
    elif name == "phi":  # its output embedding has a bias
        config = transformers.PhiConfig(**common, intermediate_size=48)
    config.update(fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


MODELS = ["llama", "opt", "gpt2", "gemma2", "phi"]


def slow_logits(task, model, example):
    """One unpadded prompt through the whole model; the label words' columns of the last row."""
    text = task.template.format(text=example.text).strip()
    ids = task.tokenizer(text, return_tensors="pt")["input_ids"]
    words = [task.tokenizer(text + word)["input_ids"][-1] for word in task.label_words]
    return model(input_ids=ids).logits[0, -1, words]


def slow_loss(task, model, examples):
    losses = [-torch.log_softmax(slow_logits(task, model, e), 0)[e.label] for e in examples]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", MODELS)
def test_loss_equals_the_slow_one(tokenizer, name):
    task, model = PromptClassification(tokenizer), make_model(name)
    batch = task.collate(EXAMPLES)
    assert len(set(batch["last"].tolist())) > 3, "lengths must differ for this test to mean anything"
    with torch.no_grad():
        expected = slow_loss(task, model, EXAMPLES)
        for _ in range(2):  # the first call compares ways, the second takes the one chosen
            torch.testing.assert_close(task.loss(model, batch), expected, rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(task.loss(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_right_padding_without_mask_equals_left_padding_with_mask(tokenizer, name):
    task, model = PromptClassification(tokenizer), make_model(name)
    encoded = [task.encode(e)["input_ids"] for e in EXAMPLES]
    width = max(map(len, encoded))
    ids = torch.tensor([[7] * (width - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        left = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1, list(task.label_ids)]
        right = task.logits(model, task.collate(EXAMPLES))
    torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)


def test_collate_pads_to_the_longest_only(tokenizer):
    task = PromptClassification(tokenizer)
    batch = task.collate(EXAMPLES[:3])
    lengths = [len(task.encode(e)["input_ids"]) for e in EXAMPLES[:3]]
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["last"].tolist() == [n - 1 for n in lengths]
    assert batch["labels"].tolist() == [e.label for e in EXAMPLES[:3]]
    loader = torch.utils.data.DataLoader(task.dataset(EXAMPLES), batch_size=3, collate_fn=task.collate)
    assert torch.equal(next(iter(loader))["input_ids"], batch["input_ids"])


def test_short_way_is_taken_and_never_computes_the_vocabulary(tokenizer):
    task, model = PromptClassification(tokenizer), make_model("llama")
    batch = task.collate(EXAMPLES)
    with torch.no_grad():
        task.loss(model, batch)
        model.lm_head.forward = None  # calling the module now fails
        task.loss(model, batch)


def test_hooked_head_is_run_as_a_module(tokenizer):
    """Perturbing weights while modules run needs every owner of a weight to be called."""
    task, model = PromptClassification(tokenizer), make_model("opt")
    batch = task.collate(EXAMPLES)
    calls = []
    with torch.no_grad():
        expected = task.loss(model, batch)
        model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
        torch.testing.assert_close(task.loss(model, batch), expected, rtol=1e-5, atol=1e-6)
    assert calls == [(len(EXAMPLES), 24)]


@pytest.mark.parametrize("how", ["config", "unknown"])
def test_processed_logits_fall_back_with_a_warning(tokenizer, caplog, how):
    task = PromptClassification(tokenizer)
    if how == "config":
        model = make_model("gemma2")
    else:
        model = make_model("llama")
        own = model.forward

        def forward(*args, **kwargs):
            output = own(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

        model.forward = forward
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(
                task.loss(model, task.collate(EXAMPLES)), slow_loss(task, model, EXAMPLES), rtol=1e-5, atol=1e-5
            )
    warnings = [r.message for r in caplog.records if "full logits" in r.message]
    assert len(warnings) == 1 and ("final_logit_softcapping" in warnings[0]) == (how == "config")


@pytest.mark.parametrize("name", MODELS)
def test_plain_models_give_no_warning(tokenizer, caplog, name):
    model = make_model(name, **({"final_logit_softcapping": None} if name == "gemma2" else {}))
    task = PromptClassification(tokenizer)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        task.loss(model, task.collate(EXAMPLES))
    assert not [r for r in caplog.records if r.name.startswith("zoengine")]


def test_weights_are_read_at_each_call(tokenizer):
    """In-place changes and swapped storage of every parameter, the head's among them, reach the next loss."""
    task, model = PromptClassification(tokenizer), make_model("opt", tie_word_embeddings=False)
    batch = task.collate(EXAMPLES)
    with torch.inference_mode():
        task.loss(model, batch)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.1
        torch.testing.assert_close(task.loss(model, batch), slow_loss(task, model, EXAMPLES), rtol=1e-5, atol=1e-5)
        for parameter in model.parameters():
            parameter.data.mul_(0.8)
        torch.testing.assert_close(task.loss(model, batch), slow_loss(task, model, EXAMPLES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_loss_goes_through_lora_layers(tokenizer, targets):
    peft = pytest.importorskip("peft")
    task, model = PromptClassification(tokenizer), make_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        plain = task.loss(model, task.collate(EXAMPLES))
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, target_modules=targets)
        model = peft.get_peft_model(model, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        adapted = task.loss(model, task.collate(EXAMPLES))
        torch.testing.assert_close(adapted, slow_loss(task, model, EXAMPLES), rtol=1e-5, atol=1e-5)
    assert abs(adapted - plain) > 1e-3


def test_prompt_tuning_adapters_are_refused(tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make_model("llama"), config)
    task = PromptClassification(tokenizer)
    with pytest.raises(ValueError, match="extra prompt tokens"):
        task.loss(model, task.collate(EXAMPLES))


def test_bf16_logits_are_finer_than_bf16(tokenizer):
    task, model = PromptClassification(tokenizer), make_model("llama").bfloat16()
    with torch.no_grad():
        logits = task.logits(model, task.collate(EXAMPLES))
        close = torch.stack([slow_logits(task, model, e) for e in EXAMPLES]).float()
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, close, rtol=0.05, atol=0.1)


def test_loss_sum_adds_up_over_unequal_batches(tokenizer):
    task, model = PromptClassification(tokenizer), make_model("llama")
    with torch.no_grad():
        parts = [task.loss_sum(model, task.collate(part)) for part in (EXAMPLES[:2], EXAMPLES[2:])]
        whole = task.loss(model, task.collate(EXAMPLES))
    assert [count for _, count in parts] == [2, 9]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 11, whole, rtol=1e-5, atol=1e-6)


def test_evaluate(tokenizer):
    task, model = PromptClassification(tokenizer), make_model("llama", attention_dropout=0.5)
    model.train()
    logits, lasts = task.logits, []
    task.logits = lambda model, batch: lasts.extend(batch["last"].tolist()) or logits(model, batch)
    seen = []
    result = task.evaluate(model, EXAMPLES, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert model.training and seen == [(4, 11), (8, 11), (11, 11)]
    assert lasts == sorted(lasts), "examples of like length must share a batch"
    model.eval()
    with torch.no_grad():
        right = sum(int(slow_logits(task, model, e).argmax()) == e.label for e in EXAMPLES)
        assert 0 < right < 11, "choose other random weights: every answer is right, or none"
        assert result["accuracy"] == right / 11 and result["n"] == 11
        assert result["loss"] == pytest.approx(float(slow_loss(task, model, EXAMPLES)), rel=1e-5)


def test_long_prompts_lose_tokens_on_the_left_but_keep_bos(tokenizer, caplog):
    whole = PromptClassification(tokenizer).encode(EXAMPLES[0])["input_ids"]
    task = PromptClassification(tokenizer, max_length=6)
    with caplog.at_level(logging.WARNING):
        cut = [item["input_ids"] for item in task.dataset(EXAMPLES)]
    assert cut[0] == [tokenizer.bos_token_id, *whole[-5:]]
    assert task.truncated == len(EXAMPLES)
    assert len(caplog.records) == 1 and "max_length=6" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "It was"}, r"must contain \{text\}"),
        ({"label_words": (" great", " wonderful")}, r"' wonderful' adds to the prompt not one token but \['\u0120w'"),
        ({"label_words": (" great",)}, "at least two different words"),
        ({"max_length": 1}, "at least 2 tokens"),
    ],
)
def test_tasks_that_do_not_fit(tokenizer, fields, message):
    with pytest.raises(TaskError, match=message):
        PromptClassification(tokenizer, **fields)


def test_bad_examples(tokenizer):
    task = PromptClassification(tokenizer)
    with pytest.raises(TaskError, match="label 2 of 'x'"):
        task.collate([Example("x", 2)])
    with pytest.raises(TaskError, match="no examples"):
        task.collate([])


def test_braces_in_a_text_are_text(tokenizer):
    task = PromptClassification(tokenizer)
    ids = task.encode(Example("a {text} {0} b", 0))["input_ids"]
    assert tokenizer.decode(ids[1:]) == "a {text} {0} b It was"
