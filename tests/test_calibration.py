"""Calibrated scores of options on a tiny model against a slow, obvious implementation."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from zoengine.tasks import Instance, TaskError
from zoengine.tasks.calibration import Calibrated

pytestmark = pytest.mark.usefixtures("one_thread")

SENTIMENT = (" terrible", " great")
INSTANCES = [
    Instance("A joy to watch. It was", SENTIMENT, (1,)),
    Instance("Two hours of nothing, and then two more of it. It was", SENTIMENT, (0,)),
    Instance("The glass fell so", (" it broke", " the very long table was wet"), (0,)),
    Instance("The glass broke because", (" it fell", " it rained", " 好 🙂"), (0, 2)),
]
NULLS = [" It was", " It was", " so", " because"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["It was great", "It was terrible", "The glass fell so it broke"] * 9, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def slow(tokenizer, model, prompt, option):
    """Sum of log p of the option's tokens after the prompt: one unpadded sequence."""
    before, ids = tokenizer(prompt.strip(" "))["input_ids"], tokenizer(prompt.strip(" ") + option)["input_ids"]
    assert ids[: len(before)] == before
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    return sum(float(logits[k - 1, ids[k]]) for k in range(len(before), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_equal_the_slow_ones(tokenizer, model, batch_size):
    seen = []
    found = Calibrated(tokenizer).scores(model, INSTANCES, NULLS, batch_size, lambda *at: seen.append(at))
    with torch.no_grad():
        expected = [
            [slow(tokenizer, model, i.prompt, o) - slow(tokenizer, model, null, o) for o in i.options]
            for i, null in zip(INSTANCES, NULLS, strict=True)
        ]
    assert [len(row) for row in found] == [2, 2, 2, 3]
    for row, right in zip(found, expected, strict=True):
        assert row == pytest.approx(right, abs=1e-4)
    assert seen[-1] == (7, 7), "the null prompt that two instances share is run once"
    scores = Calibrated(tokenizer).evaluate(model, INSTANCES, NULLS, batch_size)
    right = [row.index(max(row)) in i.gold for row, i in zip(expected, INSTANCES, strict=True)]
    assert scores == {"accuracy": sum(right) / 4, "n": 4}


def test_a_prompt_that_says_nothing_decides_nothing(tokenizer, model):
    same = [Instance(" It was", SENTIMENT, (1,))]
    assert Calibrated(tokenizer).scores(model, same, " It was")[0] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_bad_input(tokenizer, model):
    task = Calibrated(tokenizer)
    with pytest.raises(TaskError, match="4 instances are given, and 2 null prompts"):
        task.evaluate(model, INSTANCES, NULLS[:2])
    with pytest.raises(TaskError, match="0 instances"):
        task.evaluate(model, [], " It was")
    with pytest.raises(TaskError, match="reads 64 at most"):
        task.evaluate(model, [Instance("word " * 90, SENTIMENT, (1,))], " It was")
