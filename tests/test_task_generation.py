"""Generation: its loss and greedy answers against one unpadded sequence at a time, and metrics computed by hand.

Objectives without a gradient, of every kind of task.
"""

import json
import math
import re

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import SENTENCES, byte_tokenizer, make_model, prefix_tuned, slow_log_probs

from zoengine.methods import create
from zoengine.tasks import (
    Generation,
    Instance,
    MetricObjective,
    MultipleChoice,
    OptionLikelihood,
    RewardObjective,
    TaskError,
    generation,
    metrics,
    resolve,
)
from zoengine.trainer.task_loss import TaskLoss

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [
    Instance(f"{text}\nAnswer:", (f" {text.split()[-1]}\n",), answers=(text.split()[-1], "it"))
    for text in SENTENCES[:7]
] + [Instance("", (" é\n",), answers=("é",)), Instance("  電影\n", ("film\n",), answers=("film",))]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "answers", "f1", "exact"),
    [
        ("The cat.", ["cat"], 1.0, 1.0),
        ("cat  sat", ["the cat sat"], 1.0, 1.0),
        ("a cat sat", ["cat"], 2 / 3, 0.0),  # precision 1/2, recall 1
        ("red red car", ["red car blue"], 2 / 3, 0.0),  # two words shared, three each
        ("red red", ["red red car"], 0.8, 0.0),  # a word counts as often as both have it
        ("dog", ["cat", "big dog"], 2 / 3, 0.0),  # the best answer counts
        ("dog", ["cat"], 0.0, 0.0),
        ("The", [""], 1.0, 1.0),  # an article alone is nothing
        ("", ["cat"], 0.0, 0.0),
        ("U.S.", ["us"], 1.0, 1.0),
        ("another", ["other"], 0.0, 0.0),  # "an" is an article only as a word
        ("É", ["é"], 1.0, 1.0),
        ("x", [], 0.0, 0.0),
    ],
)
def test_metrics(found, answers, f1, exact):
    assert metrics.f1(found, answers) == pytest.approx(f1)
    assert metrics.exact_match(found, answers) == exact


# --- generation -------------------------------------------------------------------------------------------------------


def slow_answer(model, tokenizer, prompt, new_tokens):
    """One sequence, no cache: all of it through the model for every token. (answer, why it ended)"""
    ids = tokenizer(prompt.strip(" "))["input_ids"]
    text = ""
    for _ in range(new_tokens):
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, -1]
        token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            return text.strip(), "eos"
        ids.append(token)
        text = tokenizer.decode(ids[len(tokenizer(prompt.strip(" "))["input_ids"]) :])
        if "\n" in text:
            return text.partition("\n")[0].strip(), "newline"
    return text.strip(), "length"


def eager_to_end(model, tokenizer):
    """Make the model write newlines and EOS now and then."""
    with torch.no_grad():
        head = model.get_output_embeddings()
        newline = tokenizer("\n")["input_ids"][-1]
        head.weight[[newline, tokenizer.eos_token_id]] *= 2.5
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma2"])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_answers_and_loss_equal_the_slow_ones(tokenizer, name, with_prefix):
    model = eager_to_end(make_model(name, tie_word_embeddings=False), tokenizer)
    model = prefix_tuned(model) if with_prefix else model
    task = Generation(tokenizer, max_new_tokens=7)
    slow = [slow_answer(model, tokenizer, e.prompt, 7) for e in EXAMPLES]
    expected = {"llama": {"newline", "length"}, "gemma2": {"eos", "length"}}.get(name, set())
    assert with_prefix or {why for _, why in slow} >= expected, "choose other weights: all answers end alike"
    done = []
    found = task.predict(model, EXAMPLES, batch_size=4)
    assert found == [text for text, _ in slow]
    tokens = torch.cat([-slow_log_probs(model, tokenizer, e.prompt, e.options[0]) for e in EXAMPLES])
    total, count = task.loss_sum(model, task.collate(EXAMPLES))
    assert count == len(tokens)
    torch.testing.assert_close(total, tokens.sum(), rtol=1e-5, atol=1e-5)
    scores = task.evaluate(model, EXAMPLES, batch_size=4, progress=lambda *at: done.append(at))
    assert done[-1] == (9, 9) and scores["n"] == 9
    assert scores["loss"] == pytest.approx(tokens.mean().item(), rel=1e-5)
    pairs = list(zip(found, EXAMPLES, strict=True))
    assert scores["f1"] == pytest.approx(sum(metrics.f1(text, e.answers) for text, e in pairs) / 9)
    assert scores["exact_match"] == sum(metrics.exact_match(text, e.answers) for text, e in pairs) / 9


def test_where_an_answer_ends(monkeypatch):
    """At EOS and at any token with a newline in it, of which what stands before the newline is the answer's."""
    tokenizer = byte_tokenizer(pre_split=False)
    newline = next(k for k in range(len(tokenizer)) if re.fullmatch(r"[^\n]+\n[^\n]+", tokenizer.decode([k])))
    before = tokenizer.decode([newline]).partition("\n")[0]
    film, more = (tokenizer(text)["input_ids"][1:] for text in (" a film ", " more"))
    scripts = [[*film, tokenizer.eos_token_id, *more], [*film, newline, *more], [*film, *more]]
    ended = []

    def greedy(model, prompts, new_tokens, ends):
        for script in scripts:
            last = next((k for k, token in enumerate(script) if ends(token)), len(script) - 1)
            ended.append(last + 1)
            yield script[: last + 1]

    monkeypatch.setattr(generation, "greedy", greedy)
    task = Generation(tokenizer)
    example = Instance("x", (" a film\n",), answers=("film",))
    found = task.predict(make_model("llama"), [example] * 3)
    assert found == ["a film", f"a film {before}", "a film  more"]
    assert ended == [len(film) + 1, len(film) + 1, len(film + more)]


def test_the_prompt_leaves_room_for_the_answer(tokenizer):
    task = Generation(tokenizer, max_new_tokens=5, max_length=15)
    item = task.encode(EXAMPLES[2])
    assert task.truncated == 1
    assert len(item["ids"]) - 1 == 10 and len(item["input_ids"]) == 10
    assert item["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.decode(item["input_ids"]).endswith("Answer:")
    model = make_model("gpt2", n_positions=15)
    task.predict(model, [EXAMPLES[2]])
    with pytest.raises(TaskError, match="reads 14 at most"):
        task.predict(make_model("gpt2", n_positions=14), [EXAMPLES[2]])


def test_what_generation_refuses(tokenizer):
    with pytest.raises(TaskError, match="'accuracy' does not fit generation, which has f1, exact_match"):
        Generation(tokenizer, metric="accuracy")
    with pytest.raises(TaskError, match="max_new_tokens is 9; expected 1 to"):
        Generation(tokenizer, max_new_tokens=9, max_length=10)
    with pytest.raises(TaskError, match="no accepted answer"):
        Generation(tokenizer).encode(Instance("x", ("y\n",)))
    with pytest.raises(TaskError, match="no option"):
        Generation(tokenizer).encode(Instance("x", answers=("y",)))


# --- objectives -------------------------------------------------------------------------------------------------------


def shout(prompts, completions):
    """A reward: how long the completion is, less the length of the prompt."""
    return [len(c) - len(p) for p, c in zip(prompts, completions, strict=True)]


@torch.no_grad()
def test_metric_objectives(tokenizer):
    model = make_model("opt")
    choices = [Instance(e.prompt, (" terrible", " great", " so so"), (k % 3,)) for k, e in enumerate(EXAMPLES)]
    for task, examples in (
        (OptionLikelihood(tokenizer), choices),
        (MultipleChoice(tokenizer), choices),
        (Generation(tokenizer, max_new_tokens=4), EXAMPLES),
    ):
        objective = MetricObjective(task)
        data = objective.dataset(examples)
        scores = task.evaluate(model, examples)
        total, count = objective.loss_sum(model, objective.collate(data))
        assert count == 9 and total.item() / 9 == pytest.approx(-scores[task.metric], abs=1e-6)
        parts = [objective.loss_sum(model, objective.collate(data[k : k + 4]))[0] for k in (0, 4, 8)]
        assert sum(parts).item() == pytest.approx(total.item(), abs=1e-6)
        found = objective.evaluate(model, data)
        assert found == {**scores, "loss": -scores[task.metric]} and objective.metric == task.metric
        assert objective.predict(model, data) == task.predict(model, examples)
        assert TaskLoss(objective, model, [objective.collate(data)]).halves[0]() <= 0
        assert json.dumps(data[0]["item"]) == "0" and len(data[3]["input_ids"]) > 0


@torch.no_grad()
def test_a_reward_of_prompts_and_completions(tokenizer):
    model, task = make_model("llama"), Generation(tokenizer, max_new_tokens=4)
    seen = []
    objective = RewardObjective(task, lambda *pair: seen.append(pair) or shout(*pair))
    data = objective.dataset(EXAMPLES)
    completions = task.predict(model, EXAMPLES)
    expected = shout([e.prompt for e in EXAMPLES], completions)
    total, count = objective.loss_sum(model, objective.collate(data))
    assert total.item() == -sum(expected) and count == 9
    assert seen == [([e.prompt for e in EXAMPLES], completions)]
    assert objective.evaluate(model, data) == {"reward": sum(expected) / 9, "loss": -sum(expected) / 9, "n": 9}


def test_a_zeroth_order_step_on_an_objective(tokenizer):
    model, task = make_model("llama"), OptionLikelihood(tokenizer)
    examples = [Instance(e.prompt, (" terrible", " great"), (k % 2,)) for k, e in enumerate(EXAMPLES)]
    objective = MetricObjective(task)
    batch = objective.collate(objective.dataset(examples))
    before = model.lm_head.weight.detach().clone()
    loss = create("mezo", model, lr=1e-2, zo_eps=0.3).step(TaskLoss(objective, model, [batch]))
    assert -1 <= loss <= 0 and not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, c: [1.0], "returned 1 scores for 9 completions"),
        (lambda p, c: [math.nan] * 9, "gave nan to"),
        (lambda p, c: [math.inf] * 9, "gave inf to"),
        (lambda p, c: None, "must return a list of numbers, not None"),
        (lambda p, c: ["good"] * 9, "must return a list of numbers"),
    ],
)
def test_bad_rewards(tokenizer, reward, message):
    objective = RewardObjective(Generation(tokenizer, max_new_tokens=2), reward)
    with pytest.raises(TaskError, match=message):
        objective.loss_sum(make_model("llama"), objective.collate(EXAMPLES))


def test_resolve():
    assert resolve("json:dumps") is json.dumps
    assert resolve("json.decoder:JSONDecoder.decode") is json.JSONDecoder.decode
    for name, message in (
        ("json.dumps", "not of the form package.module:function"),
        (":dumps", "not of the form"),
        ("no_such_module_here:f", "cannot import no_such_module_here .*PYTHONPATH"),
        ("json:dump5", "json has no dump5; it has .*dumps"),
        ("math:pi", "not callable but float"),
    ):
        with pytest.raises(TaskError, match=message):
            resolve(name)
