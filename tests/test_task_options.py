"""Classification by the likelihood of options, against a slow, obvious implementation."""

import logging

import pytest
import torch
from tiny_models import SENTENCES, byte_tokenizer, make_model, slow_log_probs

from zoengine.tasks import Instance, OptionLikelihood, TaskError

WORDS = (" terrible", " great")
EXAMPLES = [Instance(f"{text} It was", WORDS, (k % 2,), texts=(text,)) for k, text in enumerate(SENTENCES)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    """One with a BOS, in which " great" and " terrible" are single tokens."""
    return byte_tokenizer()


MODELS = ["llama", "opt", "gpt2", "gemma2", "phi"]


def slow_scores(task, model, example):
    """The mean log-probability of each option, one unpadded sequence at a time."""
    tokenizer = task.reader.tokenizer
    return torch.stack([slow_log_probs(model, tokenizer, example.prompt, option).mean() for option in example.options])


def slow_losses(task, model, examples):
    return torch.stack([-torch.log_softmax(slow_scores(task, model, e), 0)[e.label] for e in examples])


def slow_loss(task, model, examples):
    return slow_losses(task, model, examples).mean()


@pytest.mark.parametrize("name", MODELS)
def test_loss_equals_the_slow_one(tokenizer, name):
    task, model = OptionLikelihood(tokenizer), make_model(name)
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
    task, model = OptionLikelihood(tokenizer), make_model(name)
    batch = task.collate(EXAMPLES)
    encoded = [task.encode(e)["input_ids"] for e in EXAMPLES]
    width = max(map(len, encoded))
    ids = torch.tensor([[7] * (width - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        left = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1, batch["options"][0]]
        right = task.logits(model, batch)
    torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)


def test_collate_pads_to_the_longest_only(tokenizer):
    task = OptionLikelihood(tokenizer)
    batch = task.collate(EXAMPLES[:3])
    lengths = [len(task.encode(e)["input_ids"]) for e in EXAMPLES[:3]]
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["last"].tolist() == [n - 1 for n in lengths]
    assert batch["labels"].tolist() == [e.label for e in EXAMPLES[:3]]
    assert [tokenizer.decode(token) for token in batch["options"][2]] == list(WORDS)
    loader = torch.utils.data.DataLoader(task.dataset(EXAMPLES), batch_size=3, collate_fn=task.collate)
    assert torch.equal(next(iter(loader))["input_ids"], batch["input_ids"])


def test_short_way_is_taken_and_never_computes_the_vocabulary(tokenizer):
    task, model = OptionLikelihood(tokenizer), make_model("llama")
    batch = task.collate(EXAMPLES)
    with torch.no_grad():
        task.loss(model, batch)
        model.lm_head.forward = None  # calling the module now fails
        task.loss(model, batch)


def test_hooked_head_is_run_as_a_module(tokenizer):
    """Perturbing weights while modules run needs every owner of a weight to be called."""
    task, model = OptionLikelihood(tokenizer), make_model("opt")
    batch = task.collate(EXAMPLES)
    calls = []
    with torch.no_grad():
        expected = task.loss(model, batch)
        model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
        torch.testing.assert_close(task.loss(model, batch), expected, rtol=1e-5, atol=1e-6)
    assert calls == [(len(EXAMPLES), 24)]


@pytest.mark.parametrize("how", ["config", "unknown"])
def test_processed_logits_fall_back_with_a_warning(tokenizer, caplog, how):
    task = OptionLikelihood(tokenizer)
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
    task = OptionLikelihood(tokenizer)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        task.loss(model, task.collate(EXAMPLES))
    assert not [r for r in caplog.records if r.name.startswith("zoengine")]


def test_weights_are_read_at_each_call(tokenizer):
    """In-place changes and swapped storage of every parameter, the head's among them, reach the next loss."""
    task, model = OptionLikelihood(tokenizer), make_model("opt", tie_word_embeddings=False)
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
    task, model = OptionLikelihood(tokenizer), make_model("llama", tie_word_embeddings=False)
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
    task = OptionLikelihood(tokenizer)
    with pytest.raises(ValueError, match="extra prompt tokens"):
        task.loss(model, task.collate(EXAMPLES))


def test_bf16_logits_are_finer_than_bf16(tokenizer):
    task, model = OptionLikelihood(tokenizer), make_model("llama").bfloat16()
    with torch.no_grad():
        logits = task.logits(model, task.collate(EXAMPLES))
        close = torch.stack([slow_scores(task, model, e) for e in EXAMPLES]).float()
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits.log_softmax(1), close.log_softmax(1), rtol=0.05, atol=0.1)


def test_loss_sum_adds_up_over_unequal_batches(tokenizer):
    task, model = OptionLikelihood(tokenizer), make_model("llama")
    with torch.no_grad():
        parts = [task.loss_sum(model, task.collate(part)) for part in (EXAMPLES[:2], EXAMPLES[2:])]
        whole = task.loss(model, task.collate(EXAMPLES))
    assert [count for _, count in parts] == [2, 9]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 11, whole, rtol=1e-5, atol=1e-6)


def test_evaluate(tokenizer):
    task, model = OptionLikelihood(tokenizer), make_model("llama", attention_dropout=0.5)
    model.train()
    logits, lasts = task.logits, []
    task.logits = lambda model, batch: lasts.extend(batch["last"].tolist()) or logits(model, batch)
    seen = []
    result = task.evaluate(model, EXAMPLES, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert model.training and seen == [(4, 11), (8, 11), (11, 11)]
    assert lasts == sorted(lasts), "examples of like length must share a batch"
    model.eval()
    with torch.no_grad():
        right = sum(int(slow_scores(task, model, e).argmax()) == e.label for e in EXAMPLES)
        assert 0 < right < 11, "choose other random weights: every answer is right, or none"
        assert result["accuracy"] == right / 11 and result["n"] == 11
        assert result["loss"] == pytest.approx(float(slow_loss(task, model, EXAMPLES)), rel=1e-5)


def test_long_prompts_lose_tokens_on_the_left_but_keep_bos(tokenizer, caplog):
    whole = [item["input_ids"] for item in OptionLikelihood(tokenizer).dataset(EXAMPLES)]
    task = OptionLikelihood(tokenizer, max_length=6)
    with caplog.at_level(logging.WARNING):
        cut = [item["input_ids"] for item in task.dataset(EXAMPLES)]
    assert cut[0] == [tokenizer.bos_token_id, *whole[0][-5:]]
    assert task.truncated == sum(len(ids) > 6 for ids in whole) == 9
    assert len(caplog.records) == 1 and "max_length=6" in caplog.text


def test_bad_examples(tokenizer):
    task = OptionLikelihood(tokenizer)
    for instance, message in (
        (Instance("x", WORDS, (2,)), "label 2 of 'x' has no option among"),
        (Instance("x", WORDS, (0, 1)), r"labels \(0, 1\) of 'x'"),
        (Instance("x", ("", " great"), (1,)), "option '' tokenises to nothing after the prompt 'x'"),
    ):
        with pytest.raises(TaskError, match=message):
            task.collate([instance])
    with pytest.raises(TaskError, match="no examples"):
        task.collate([])
    with pytest.raises(TaskError, match="at least 2 tokens"):
        OptionLikelihood(tokenizer, max_length=1)
