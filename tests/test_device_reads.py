"""A step's loss asks the device for nothing, and gives it nothing that came without the batch.

On a GPU either makes the host wait for all the work that it has queued, so the next forward starts late. Here the
device is the CPU, and what would make a GPU's host wait is counted as it is called.
"""

import sys
from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tiny_models import SENTENCES, byte_tokenizer, make_model, prefix_tuned
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from zoengine.tasks import (
    Classification,
    Completions,
    Generation,
    Instance,
    LabelSimilarity,
    MaskedPrompt,
    MultipleChoice,
    OptionLikelihood,
    chat,
)
from zoengine.tasks.entry import Masked
from zoengine.trainer import ZOTrainer
from zoengine.trainer.task_loss import TaskLoss

pytestmark = pytest.mark.usefixtures("one_thread")

# Reads a number, or has a result whose size is a matter of values.
READING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "is_nonzero", "repeat_interleave", "bincount", "histc",
}  # fmt: skip
COPYING = {"tolist", "numpy", "cpu", "__array__"}  # to the host; where a tensor is there already, no op is called


class Reads(ExitStack):
    """Counts, as "file:line", where Python that is not torch's own asks for what a device would have to answer."""

    def __enter__(self):
        super().__enter__()
        self.found = []
        self.enter_context(_Copies(self.found))
        self.enter_context(_Ops(self.found))
        return self.found


class _Copies(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in COPYING:
            self.found.append(caller())
        return function(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        reads = name in READING and kwargs.get("output_size") is None
        masks = name.startswith("index") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in (args[1] if type(args[1]) is list else [])
        )
        if reads or masks or name == "lift_fresh":  # the last is what torch.tensor and an index of a list end with
            self.found.append(caller())
        return function(*args, **kwargs)


def caller():
    frame = sys._getframe(1)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_name.startswith("__torch_"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: bool(x.any()),
        lambda x: int(x.sum()), lambda x: x.nonzero(), lambda x: x[x > 1], lambda x: x.unique(),
        lambda x: x.masked_select(x > 1), lambda x: torch.repeat_interleave(x, x), lambda x: x.numpy(),
        lambda x: torch.tensor([1.0]), lambda x: x[[0, 1]], lambda x: x.index_put((x > 1,), x[:1]),
        lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_what_is_counted(ask):
    x = torch.tensor([1, 2, 3])
    with Reads() as found:
        ask(x)
    assert found and all(place.startswith(__file__) for place in found)


def test_what_is_not():
    x = torch.tensor([1, 2, 3])
    with Reads() as found:
        torch.nonzero_static(x > 1, size=2)
        torch.repeat_interleave(x, x, output_size=6)
        torch.zeros(3).index_put((x - 1,), torch.ones(3))[x - 1]
        torch.arange(3) + x.new_full((), 2) * 3
    assert not found


def prompts(*options, beginning=""):
    return [
        Instance(f"{beginning}{text}. It was", options, (k % len(options),), answers=("fine",))
        for k, text in enumerate(SENTENCES[:5])
    ]


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<pad>", "<unk>", "<mask>", "it", "was", "good", "bad", "a", "film", "."]
    whole = Tokenizer(models.WordLevel({word: k for k, word in enumerate(known)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>"
    )


def encoder(kind):
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40,
    )  # fmt: skip
    return getattr(transformers, kind).from_config(config).eval()


EXCHANGES = [chat.read({"prompt": text, "completion": " Well." * (k + 1)}) for k, text in enumerate(SENTENCES[:5])]
TEXTS = [Instance(texts=(text,), gold=(k % 2,)) for k, text in enumerate(["a good film", "bad", "it was a film ."])]
LONG = "all of these have this long beginning, and so it is run once, " * 2
FORMS = {
    "option-likelihood, a token each": lambda: (
        OptionLikelihood(byte_tokenizer()), make_model("llama"), prompts(" terrible", " great")
    ),
    "option-likelihood, whole sequences": lambda: (
        OptionLikelihood(byte_tokenizer()), make_model("mistral"), prompts(" terrible", " not so great")
    ),
    "option-likelihood, shared prompts": lambda: (
        OptionLikelihood(byte_tokenizer()), make_model("llama"), prompts(" bad", " not so great", beginning=LONG)
    ),
    "multiple-choice": lambda: (MultipleChoice(byte_tokenizer()), make_model("opt"), prompts(" terrible", " not bad")),
    "generation": lambda: (Generation(byte_tokenizer()), make_model("gpt2"), prompts(" a fine film\n")),
    "completions": lambda: (Completions(byte_tokenizer()), make_model("llama"), EXCHANGES),
    "completions, own logits": lambda: (Completions(byte_tokenizer()), make_model("gemma2"), EXCHANGES),
    "completions, prefix": lambda: (Completions(byte_tokenizer()), prefix_tuned(make_model("llama")), EXCHANGES),
    "masked": lambda: (
        MaskedPrompt(words(), Masked("{0} it was{mask} .", (" bad", " good"))),
        encoder("AutoModelForMaskedLM"), TEXTS,
    ),
    "head": lambda: (Classification(words()), encoder("AutoModelForSequenceClassification"), TEXTS),
    "similarity": lambda: (LabelSimilarity(words(), descriptions=("bad", "good")), encoder("AutoModel"), TEXTS),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_and_its_halves(form):
    task, model, examples = FORMS[form]()
    batch = task.collate(examples)
    loss = TaskLoss(task, model, [batch])
    before = loss()  # on a model's first batch ways of reading it are compared
    if form.startswith("option-likelihood,"):
        works = {"each": [], "sequences": [False], "prompts": [True]}[form.split()[-1]]
        assert list(task._options._works.values()) == works, "another way than the one meant"
    with Reads() as found:
        total = task.loss_sum(model, batch)
        halves = [half() for half in loss.halves]
        again = loss()
    ours = [place for place in found if "/transformers/" not in place and "/peft/" not in place]
    assert ours == []
    assert again == before and type(total[1]) is int and all(half.isfinite() for half in halves)


def test_the_loss_of_a_model_of_the_callers(tmp_path):
    """Its mean is over tokens, whose number is not the same in all micro-batches."""
    model = torch.nn.Linear(1, 1)
    args = transformers.TrainingArguments(output_dir=tmp_path, max_steps=1, report_to="none", use_cpu=True)
    trainer = ZOTrainer(model=model, args=args, train_dataset=[])
    trainer.loss_is_scaled_for_ga = False
    values = iter([torch.tensor(2.0), torch.tensor(5.0)])
    trainer.compute_loss = lambda *args, **kwargs: next(values)
    batches = [{"labels": torch.tensor([1, -100, -100])}, {"labels": torch.tensor([1, 2])}]
    with Reads() as found:
        loss = trainer._closure(model, batches, None)()
    assert found == [] and loss == 4
