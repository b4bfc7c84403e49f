"""Options of any number and length, and multiple choice, against one unpadded sequence at a time and all its logits."""

import logging

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import SENTENCES, byte_tokenizer, make_model, prefix_tuned, slow_log_probs

from zoengine.tasks import Instance, MultipleChoice, OptionLikelihood, TaskError, cached, decoder
from zoengine.tasks.sequences import Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [(" terrible", " great"), (" very bad", " no good at all", " fine"), ("\nYes", "\nNo, thanks", " é")]
# Unequal prompts and options, an empty text, unicode, outer spaces, a prompt that ends with a newline.
EXAMPLES = [
    *(Instance(f"{text} It was", OPTIONS[k % 3], (k % 2,), texts=(text,)) for k, text in enumerate(SENTENCES[:6])),
    Instance("", (" a", " bad film"), (1,)),
    Instance("  Ünïcode — 電影 \n", ("Yes", "No, it is not"), (0,)),
    Instance("Yes or No?\n", ("Yes", "No", "Maybe so"), (2,)),
]
# Long before short, so that a shared prompt pays.
LONG = [
    Instance(" ".join(SENTENCES[k : k + 3]) + "\n-", (" Yes", " No way at all", " Maybe a b c", " é!"), (k % 4, 1))
    for k in range(4)
]
MODELS = ["llama", "opt", "gpt2", "gemma2"]


@pytest.fixture(scope="module", params=["split", "merging", "no-bos"])
def tokenizer(request):
    return byte_tokenizer(bos=request.param != "no-bos", pre_split=request.param != "merging")


@pytest.fixture(scope="module")
def plain():
    return byte_tokenizer()


def slow_means(model, tokenizer, example):
    return torch.stack([slow_log_probs(model, tokenizer, example.prompt, o).mean() for o in example.options])


def slow_losses(model, tokenizer, examples):
    return torch.stack([-slow_means(model, tokenizer, e).log_softmax(0)[e.gold[0]] for e in examples])


def slow_tokens(model, tokenizer, examples):
    return torch.cat([-slow_log_probs(model, tokenizer, e.prompt, e.options[e.gold[0]]) for e in examples])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_losses_equal_the_slow_ones(tokenizer, name):
    model = make_model(name)
    options, choice = OptionLikelihood(tokenizer), MultipleChoice(tokenizer)
    for examples in (EXAMPLES, LONG):
        one = [Instance(e.prompt, e.options, e.gold[:1]) for e in examples]
        batch = options.collate(one)
        assert "shared" in batch or examples is EXAMPLES
        expected = slow_losses(model, tokenizer, one)
        for way in (batch, batch, {name: x for name, x in batch.items() if name != "shared"}):
            total, count = options.loss_sum(model, way)
            assert count == len(one)
            torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)
        total, count = choice.loss_sum(model, choice.collate(examples))
        expected = slow_tokens(model, tokenizer, examples)
        assert count == len(expected)
        torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-5)


def test_the_tokenizers_differ_as_the_tests_need_it(plain):
    def boundary(tokenizer, prompt, option):
        found = Sequences(tokenizer, 100).encode(prompt, [option])[0]
        return len(tokenizer(prompt)["input_ids"]) - found.start

    merging = byte_tokenizer(pre_split=False)
    assert boundary(plain, "It was", " great") == 0
    assert boundary(merging, "It was great", "\ngreat") > 0, "this one must merge across the end of a prompt"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_left_padding_gives_the_same(plain, name):
    model, task = make_model(name), MultipleChoice(plain)
    rows = [task.reader.encode(e.prompt, e.options)[e.gold[0]] for e in EXAMPLES]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[5] * (width - len(row)) + row for row, _ in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row, _ in rows])
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    found = logits.log_softmax(2)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    options = torch.tensor([[0] * (width - len(row) + start) + [1] * (len(row) - start) for row, start in rows])
    expected = -(found * options[:, 1:]).sum()
    torch.testing.assert_close(task.loss_sum(model, task.collate(EXAMPLES))[0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_shared_prompts_give_what_whole_sequences_give(plain, name, with_prefix, monkeypatch):
    model = prefix_tuned(make_model(name)) if with_prefix else make_model(name)
    task, examples = MultipleChoice(plain), [*LONG, *EXAMPLES]
    passes = []
    monkeypatch.setattr(cached, "BATCH_TOKENS", 150)  # several chunks of an example's rows
    monkeypatch.setattr(cached, "_shared", lambda *a, way=cached._shared: passes.append(1) or way(*a))
    batch = cached_batch(task, examples)
    found = task._options.log_probs(model, batch)
    found = task._options.log_probs(model, batch)
    assert len(passes) == 3, "checked, then used"
    whole = task._decoder.log_probs(model, *(batch[name] for name in ("input_ids", "start", "targets", "places")))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=2e-5)


def cached_batch(task, examples):
    """All options, their prompts shared whether that pays or not."""
    from zoengine.tasks.options import every_option, shared

    encoded = task.dataset(examples)
    batch = every_option(encoded)
    return {**batch, **shared(encoded)}


@torch.no_grad()
def test_a_sliding_window_runs_whole_sequences(plain):
    """The window would count the padding between a short prompt and its options."""
    model, task = make_model("mistral"), OptionLikelihood(plain)
    one = [Instance(e.prompt, e.options, e.gold[:1]) for e in [*LONG, EXAMPLES[0]]]
    batch = cached_batch(task, one)
    means = torch.cat([slow_means(model, plain, e) for e in one])
    task._options.log_probs(model, cached_batch(task, one[:1]))  # alone, there is no padding that would show it
    for _ in range(2):
        found = task._options.log_probs(model, batch).sum(1) / (batch["targets"] != -100).sum(1)
        torch.testing.assert_close(found, means, rtol=1e-5, atol=2e-5)
    assert list(task._options._works.values()) == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_read_in_parts(monkeypatch, dtype):
    """In fp32 whatever the dtype, so the result is finer than a 16-bit model's own logits."""
    monkeypatch.setattr(decoder, "_LOGITS", 1)  # 1,024 tokens at a time
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 3000).to(dtype), torch.randn(5, 8).to(dtype)
    ids = torch.tensor([0, 1023, 1024, 2047, 2999])
    expected = head.float()(hidden.float()).log_softmax(1)[torch.arange(5), ids]
    head.to(dtype)
    found = decoder.Targets(ids).short(hidden, head)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_prefix_goes_before_every_sequence(plain, name):
    """The slow way calls PEFT's own forward; the prefix changes every loss."""
    bare, model = make_model(name), prefix_tuned(make_model(name))
    options, choice = OptionLikelihood(plain), MultipleChoice(plain)
    single = [Instance(e.prompt, (" terrible", " great"), (e.gold[0] % 2,)) for e in EXAMPLES]
    for examples in (single, EXAMPLES):
        batch = options.collate(examples)
        assert ("last" in batch) == (examples is single)
        expected = slow_losses(model, plain, examples).mean()
        torch.testing.assert_close(options.loss(model, batch), expected, rtol=1e-5, atol=1e-5)
        assert (options.loss(bare, batch) - expected).abs() > 1e-3
    expected = slow_tokens(model, plain, EXAMPLES).mean()
    torch.testing.assert_close(choice.loss(model, choice.collate(EXAMPLES)), expected, rtol=1e-5, atol=1e-5)
    assert options._decoder.is_short(model) and choice._decoder.is_short(model)


@pytest.mark.parametrize("task_class", [OptionLikelihood, MultipleChoice])
def test_gradients_flow(plain, task_class):
    """First-order baselines train on the same loss, shared prompts and all."""
    model, task = make_model("llama"), task_class(plain)
    one = [Instance(e.prompt, e.options, e.gold[:1]) for e in LONG]
    slow = (
        slow_losses(model, plain, one).sum() if task_class is OptionLikelihood else slow_tokens(model, plain, one).sum()
    )
    weight = model.model.layers[0].self_attn.q_proj.weight
    expected = torch.autograd.grad(slow, weight)[0]
    found = torch.autograd.grad(task.loss_sum(model, task.collate(one))[0], weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_unequal_batches_add_up_and_halves_are_halves(plain):
    model = make_model("opt")
    for task in (OptionLikelihood(plain), MultipleChoice(plain)):
        one = [Instance(e.prompt, e.options, e.gold[:1]) for e in [*EXAMPLES, *LONG]]
        whole, count = task.loss_sum(model, task.collate(one))
        parts = [task.loss_sum(model, task.collate(part)) for part in (one[:2], one[2:3], one[3:])]
        assert sum(n for _, n in parts) == count
        torch.testing.assert_close(sum(total for total, _ in parts), whole, rtol=1e-5, atol=1e-5)
        first, second = task.split(task.collate(one))
        middle = len(one) // 2
        for half, examples in ((first, one[:middle]), (second, one[middle:])):
            expected, n = task.loss_sum(model, task.collate(examples))
            found, m = task.loss_sum(model, half)
            assert n == m
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert task.split(task.collate(one[:1])) is None


@pytest.mark.parametrize("task_class", [OptionLikelihood, MultipleChoice])
def test_evaluate_and_predict(plain, task_class):
    model, task = make_model("gpt2"), task_class(plain)
    examples = [Instance(e.prompt, e.options, e.gold[:1]) for e in [*LONG, *EXAMPLES]]
    done = []
    found = task.evaluate(model, examples, batch_size=5, progress=lambda n, of: done.append((n, of)))
    with torch.no_grad():
        best = [int(slow_means(model, plain, e).argmax()) for e in examples]
        per_example = task_class is OptionLikelihood
        loss = slow_losses(model, plain, examples) if per_example else slow_tokens(model, plain, examples)
    right = sum(k in e.gold for k, e in zip(best, examples, strict=True))
    assert 0 < right < len(examples), "choose other weights"
    assert found == pytest.approx({"accuracy": right / len(examples), "loss": loss.mean().item(), "n": 13}, rel=1e-5)
    assert task.predict(model, examples) == [e.options[k].strip() for k, e in zip(best, examples, strict=True)]
    assert sum(task.scores(model, task.dataset(examples))) == right
    assert done == sorted(done) and done[-1] == (13, 13) and len(done) > 3


def test_any_right_option_counts(plain):
    model, task = make_model("llama"), MultipleChoice(plain)
    with torch.no_grad():
        best = [int(slow_means(model, plain, e).argmax()) for e in EXAMPLES]
    both = [Instance(e.prompt, e.options, ((k + 1) % len(e.options), k)) for k, e in zip(best, EXAMPLES, strict=True)]
    assert task.evaluate(model, both)["accuracy"] == 1
    other = [Instance(e.prompt, e.options, e.gold[:1]) for e in both]
    assert task.evaluate(model, other)["accuracy"] == 0


@torch.no_grad()
def test_an_option_listed_twice_ties(plain):
    model = make_model("llama")
    example = Instance(LONG[0].prompt, (" No way", " Yes or no", " No way"), (0,))
    logits = (task := OptionLikelihood(plain)).logits(model, task.collate([example]))
    torch.testing.assert_close(logits[0, 0], logits[0, 2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bos", [True, False])
def test_what_is_too_long_loses_its_left(bos, caplog):
    tokenizer = byte_tokenizer(bos=bos)
    task = MultipleChoice(tokenizer, max_length=12)
    free = MultipleChoice(tokenizer)
    long, short = Instance("a b c d e f g h i j k l m n", (" great", " no good at all"), (0,)), EXAMPLES[-1]
    with caplog.at_level(logging.WARNING):
        cut, whole = task.encode(long), free.encode(long)
        task.encode(long)
    assert task.encode(short) == free.encode(short)
    assert task.truncated == 2 and len(caplog.records) == 1 and "max_length=12" in caplog.text
    tokenizer.model_max_length = 12
    assert MultipleChoice(tokenizer).encode(long) == cut, "the tokenizer knows how much its model reads"
    assert cut["endings"] == whole["endings"], "an option is never cut"
    for k in range(2):
        assert len(cut["input_ids"] + cut["endings"][k]) - 1 <= 12
    longest = max(map(len, cut["endings"]))
    assert len(cut["input_ids"]) + longest - 1 == 12
    kept = len(cut["input_ids"]) - bos
    assert cut["input_ids"] == [0] * bos + whole["input_ids"][-kept:]
    with torch.no_grad():
        model = make_model("gpt2", n_positions=16)
        assert task.loss(model, task.collate([long])) > 0
        with pytest.raises(TaskError, match=r"reads 16 at most; set task\.max_length to 16 or less"):
            free.loss(model, free.collate([long]))
        with pytest.raises(TaskError, match="reads 13 at most"):
            free.loss(prefix_tuned(model), free.collate([long]))


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        (Instance("x", (" a", ""), (0,)), "option '' tokenises to nothing after the prompt 'x'"),
        (Instance("x", (" a" * 20,), (0,)), "leaves no room for its prompt in max_length=12"),
        (Instance("x", (), (0,)), "is not among"),
        (Instance("x", (" a",), (1,)), r"gold \(1,\) of 'x' is not among"),
        (Instance("x", (" a",), ()), "is not among"),
    ],
)
def test_bad_examples(plain, instance, message):
    with pytest.raises(TaskError, match=message):
        MultipleChoice(plain, max_length=12).encode(instance)


def test_a_tokenizer_that_ends_every_text(plain):
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    ending = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = ending
    with pytest.raises(TaskError, match="ends every text with its EOS"):
        MultipleChoice(tokenizer)
