"""Instruction data on tiny models: loss, scores and answers against a slow, obvious implementation."""

import logging
import math

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

import transformers

from zoengine.tasks import RewardObjective, TaskError, chat
from zoengine.tasks.chat import Exchange
from zoengine.tasks.completions import Completions
from zoengine.trainer.task_loss import TaskLoss

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
ROWS = [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "The sky i", "completion": "s blue, or grey, or black at night, or pink at dusk."},
    {"prompt": "", "completion": "好 🙂"},
    {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Sky?"},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "And at night? And at dusk, or in a storm?"},
            {"role": "assistant", "content": "Black, pink, grey."},
        ]
    },
    {"prompt": "A long prompt. " * 9, "completion": "Yes."},
    {"prompt": "No?", "completion": "No"},
]
EXCHANGES = [chat.read(row) for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["The sky is blue, black or pink at dusk."] * 9, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def make_model(name="llama"):
    """A tiny model whose logits differ enough for its choices to be clear."""
    torch.manual_seed(0)
    common = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "opt":
        config = transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=24, max_position_embeddings=256)
    elif name == "gemma2":  # caps its logits, so the decoder alone will not do
        sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
        config = transformers.Gemma2Config(**common, **sizes)
    else:
        sizes = {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True}
        config = transformers.LlamaConfig(**common, **sizes, max_position_embeddings=256)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model


def taught(task, model, steps):
    """The model after some steps of Adam on all rows, so that it has some of their tokens right."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = Completions(task.tokenizer)
    batch = learner.collate(EXCHANGES)
    for _ in range(steps):
        optimizer.zero_grad()
        total, count = learner.loss_sum(model, batch)
        (total / count).backward()
        optimizer.step()
    return model


def slow(task, model, exchange):
    """(losses, right) of the trained tokens: one unpadded row through the whole model, one token after the other."""
    ids, labels = chat.tokens(task.tokenizer, exchange)
    logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    losses, right = [], []
    for k in range(1, min(len(ids), task.max_length)):
        if labels[k] != -100:
            losses.append(-torch.log_softmax(logits[k - 1], 0)[ids[k]])
            right.append(int(logits[k - 1].argmax()) == ids[k])
    return losses, right


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_loss_and_scores_equal_the_slow_ones(tokenizer, name):
    task = Completions(tokenizer)
    model = taught(task, make_model(name), 6)
    with torch.no_grad():
        parts = [slow(task, model, e) for e in EXCHANGES]
        losses = torch.stack([loss for losses, _ in parts for loss in losses])
        for _ in range(2):  # the first call compares ways, the second takes the one chosen
            total, count = task.loss_sum(model, task.collate(EXCHANGES))
            assert count == len(losses) and total.dtype == torch.float32
            torch.testing.assert_close(total / count, losses.mean(), rtol=1e-5, atol=1e-5)
    right = [hit for _, hits in parts for hit in hits]
    assert 5 < sum(right) < len(right) - 5
    for batch_size in (1, 3, 32):
        seen = []
        found = task.evaluate(model, EXCHANGES, batch_size, lambda done, total, seen=seen: seen.append((done, total)))
        assert found["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
        assert found["token_accuracy"] == pytest.approx(sum(right) / len(right)) and found["n"] == len(ROWS)
        assert task.metric in found and seen[-1] == (len(ROWS), len(ROWS))


def test_token_accuracy_counts_what_is_the_models_first_choice(tokenizer):
    """A model taught its row says it: nearly every token right, where a random one has none."""
    task, model = Completions(tokenizer), make_model()
    before = task.evaluate(model, EXCHANGES)
    after = task.evaluate(taught(task, model, 40), EXCHANGES)
    assert before["token_accuracy"] < 0.2 and after["token_accuracy"] > 0.95 and after["loss"] < 0.3
    found = task.predict(model, EXCHANGES)
    assert sum(said in task.expected(item) for said, item in zip(found, task.dataset(EXCHANGES), strict=True)) >= 5


def test_gradients_are_those_of_the_slow_loss(tokenizer):
    task, model = Completions(tokenizer), make_model()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        if not gradients:
            torch.stack([loss for e in EXCHANGES for loss in slow(task, model, e)[0]]).mean().backward()
        else:
            total, count = task.loss_sum(model, task.collate(EXCHANGES))
            (total / count).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_unequal_batches_and_accumulation_give_the_same_number(tokenizer):
    task, model = Completions(tokenizer), make_model()
    items = task.dataset(EXCHANGES)
    with torch.no_grad():
        whole = TaskLoss(task, model, [task.collate(items)])()
        for sizes in ((1, 6), (2, 3, 2), (1,) * 7):
            parts, start = [], 0
            for size in sizes:
                parts.append(task.collate(items[start : start + size]))
                start += size
            torch.testing.assert_close(TaskLoss(task, model, parts)(), whole, rtol=1e-6, atol=1e-6)


def test_only_trained_positions_go_through_the_head(tokenizer):
    """And their logits are taken in fp32, also where the model rounds its own."""
    task, model = Completions(tokenizer), make_model().to(torch.bfloat16)
    batch = task.collate(EXCHANGES)
    with torch.no_grad():
        expected, count = task.loss_sum(model, batch)
        model.lm_head.forward = None  # calling the module now fails
        again, _ = task.loss_sum(model, batch)
        assert torch.equal(expected, again) and count < batch["input_ids"].numel() / 2
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state.float()
        logits = hidden @ model.lm_head.weight.float().T
        exact = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="sum")
    torch.testing.assert_close(again, exact, rtol=1e-6, atol=1e-4)


def test_collate(tokenizer):
    task = Completions(tokenizer)
    short, long = task.dataset(EXCHANGES[:2])
    assert short["input_ids"][0] == 0 and short["input_ids"][-1] == 1 and short["labels"][-1] == 1
    batch = task.collate([short, long])
    width, length = len(long["input_ids"]) - 1, len(short["input_ids"]) - 1
    assert batch["input_ids"].shape == batch["targets"].shape == (2, width) and batch["targets"].dtype == torch.int64
    assert batch["input_ids"][0, :length].tolist() == short["input_ids"][:-1]
    assert batch["targets"][0].tolist() == short["labels"][1:] + [-100] * (width - length)


def test_long_rows_are_cut_on_the_right_and_those_with_nothing_left_are_counted(tokenizer, caplog):
    task, model = Completions(tokenizer, max_length=28), make_model()
    lengths = [len(chat.tokens(tokenizer, e)[0]) for e in EXCHANGES]
    with caplog.at_level(logging.WARNING):
        items = task.dataset(EXCHANGES)
    assert task.truncated == sum(length > 28 for length in lengths) == 3
    assert task.skipped == 1 and len(items) == len(EXCHANGES) - 1, "one prompt alone has more than 28 tokens"
    assert all(item["input_ids"][0] == 0 for item in items[:3]), "the BOS stays"
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and "cut on the right" in messages[0] and "1 of 7 rows are left out" in messages[1]
    with torch.no_grad():
        expected = [loss for e in EXCHANGES for loss in slow(task, model, e)[0]]
        total, count = task.loss_sum(model, task.collate(items))
    assert count == len(expected)
    torch.testing.assert_close(total / count, torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)
    with pytest.raises(TaskError, match="every prompt fills max_length=28, so nothing is left to learn"):
        task.dataset(EXCHANGES[5:6])


def test_what_is_expected(tokenizer):
    task = Completions(tokenizer)
    found = [task.expected(item) for item in task.dataset(EXCHANGES)]
    merged = "is blue, or grey, or black at night, or pink at dusk."
    assert found == [("blue.",), (merged,), ("好 🙂",), ("Blue.",), ("Blue.",), ("Yes.",), ("No",)]


def generated(model, prompt, count):
    mask = torch.ones_like(prompt)  # else transformers takes the BOS, whose id is 0, for padding
    how = {"do_sample": False, "max_new_tokens": count, "eos_token_id": 1, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=mask, **how)[0, prompt.shape[1] :].tolist()


def test_answers_equal_generation_by_transformers(tokenizer):
    task, model = Completions(tokenizer, max_new_tokens=7), make_model()
    found = task.predict(model, EXCHANGES, batch_size=3)
    for exchange, answer in zip(EXCHANGES, found, strict=True):
        ids, labels = chat.tokens(tokenizer, exchange)
        prompt = torch.tensor([ids[: next(k for k, label in enumerate(labels) if label != -100)]])
        assert answer == tokenizer.decode(generated(model, prompt, 7), skip_special_tokens=True).strip()


def test_an_answer_ends_with_any_of_the_models_own_ends(tokenizer):
    task, model = Completions(tokenizer, max_new_tokens=7), make_model()
    first, second = generated(model, tokenizer("The sky is", return_tensors="pt")["input_ids"], 2)
    assert first != second
    for ends in (second, [1, second]):
        model.generation_config.eos_token_id = ends
        expected = tokenizer.decode([first, second], skip_special_tokens=True).strip()
        assert task.predict(model, EXCHANGES[:1]) == [expected]


def test_a_reward_is_given_prompts_and_answers(tokenizer):
    task, model = Completions(tokenizer, max_length=100, max_new_tokens=4), make_model()
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return [len(completion) for completion in completions]

    objective = RewardObjective(task, reward)
    items = objective.dataset(EXCHANGES)
    with torch.no_grad():
        loss = TaskLoss(objective, model, [objective.collate(items[:3]), objective.collate(items[3:])])()
    asked = [prompt for prompts, _ in seen for prompt in prompts]
    assert asked[:3] == ["The sky is", "The sky i", ""] and asked[3] == ROWS[3]["messages"][:1]
    assert asked[4] == ROWS[4]["messages"][:2] and len(asked) == 7, "also the row whose prompt is cut"
    answers = [answer for _, completions in seen for answer in completions]
    assert answers == task.predict(model, EXCHANGES, 3)
    assert float(loss) == pytest.approx(-sum(map(len, answers)) / 7)


def test_bad_input(tokenizer):
    with pytest.raises(TaskError, match="max_length is 1"):
        Completions(tokenizer, max_length=1)
    task, model = Completions(tokenizer), make_model()
    with pytest.raises(TaskError, match="given no examples"):
        task.dataset([])
    endless = Exchange("word " * 200, " end")
    with torch.no_grad(), pytest.raises(TaskError, match=r"reads 256 at most; set task\.max_length"):
        task.loss_sum(model, task.collate([endless]))
    with pytest.raises(TaskError, match="no room for an answer in the 256 tokens"):
        task.predict(model, [endless])
