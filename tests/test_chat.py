"""Rows of instruction data: the columns read, what a chat template makes of them, and the tokens trained."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers

from zoengine.tasks import TaskError, chat
from zoengine.tasks.chat import Exchange

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}<|end|>{%- endgeneration -%}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# A text ends with a token of its own, gone once more messages follow (as in Phi's templates).
TAILED = CHATML.replace("{% endif %}", "{% else %}</s>{% endif %}")
# The last answer alone keeps its thoughts (as in Qwen3's template).
RETHINKING = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
WITH_TOOLS = (
    "{% if tools %}{% for t in tools %}<|start|>tools {{ t.function.name }}<|end|>{% endfor %}{% endif %}"
    "{% if mood %}{{ mood }}{% endif %}"
) + CHATML.replace(
    "{{ m.content }}", "{% if m.tool_calls %}call {{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TALK = [user("Sky?"), assistant("Blue."), user("Sure?"), assistant("Yes, très 🙂.")]


@pytest.fixture
def tokenizer():
    """A byte-level BPE tokenizer with a BOS, an EOS and the control tokens of CHATML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["The sky is blue.", "user assistant system", "Yes, sure, very sure."] * 9, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHATML
    return made


def split(tokenizer, row):
    """(the whole text, the texts of its trained stretches)."""
    ids, labels = chat.tokens(tokenizer, chat.read(row))
    assert len(ids) == len(labels) and all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    stretches, before = [], -100
    for label in labels:
        if label != -100:
            stretches += [[]] if before == -100 else []
            stretches[-1].append(label)
        before = label
    return tokenizer.decode(ids), [tokenizer.decode(stretch) for stretch in stretches]


def test_text(tokenizer):
    row = {"prompt": "The sky is", "completion": " blue."}
    assert split(tokenizer, row) == ("<s>The sky is blue.</s>", [" blue.</s>"])
    ended = {"prompt": "The sky is", "completion": " blue.</s>"}
    assert split(tokenizer, ended) == split(tokenizer, row)
    assert split(tokenizer, {"prompt": "", "completion": "好 🙂"}) == ("<s>好 🙂</s>", ["好 🙂</s>"])


def test_text_that_merges_across_the_boundary_is_learned_from_the_merged_token_on(tokenizer):
    ids = tokenizer("The sky is")["input_ids"]
    assert tokenizer("The sky i")["input_ids"] != ids[: len(tokenizer("The sky i")["input_ids"])]
    whole, trained = split(tokenizer, {"prompt": "The sky i", "completion": "s blue."})
    assert whole == "<s>The sky is blue.</s>" and trained == [" is blue.</s>"]


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tokenizer):
    from tokenizers import processors

    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = both
    row = {"prompt": "The sky is", "completion": " blue."}
    assert split(tokenizer, row) == ("<s>The sky is blue.</s>", [" blue.</s>"])


WHOLE = (
    "<|start|>user\nSky?<|end|>\n<|start|>assistant\nBlue.<|end|>\n"
    "<|start|>user\nSure?<|end|>\n<|start|>assistant\nYes, très 🙂.<|end|>\n"
)


@pytest.mark.parametrize(
    ("template", "whole", "trained"),
    [
        (CHATML, WHOLE, ["Blue.<|end|>\n", "Yes, très 🙂.<|end|>\n"]),
        (TAGGED, WHOLE, ["Blue.<|end|>", "Yes, très 🙂.<|end|>"]),
        (TAILED, WHOLE + "</s>", ["Blue.<|end|>\n", "Yes, très 🙂.<|end|>\n</s>"]),
        ("<s>" + CHATML, "<s>" + WHOLE, ["Blue.<|end|>\n", "Yes, très 🙂.<|end|>\n"]),
    ],
)
def test_every_answer_of_a_conversation_is_learned(tokenizer, template, whole, trained):
    tokenizer.chat_template = template
    assert split(tokenizer, {"messages": TALK}) == (whole, trained)
    assert split(tokenizer, {"prompt": TALK[:3], "completion": TALK[3:]}) == (whole, trained[1:])
    assert split(tokenizer, {"prompt": TALK[:1], "completion": TALK[1:]}) == (whole, trained)


def test_the_system_speaks_first_and_is_not_learned(tokenizer):
    row = {"messages": [{"role": "system", "content": "Be brief."}, *TALK[:2]]}
    whole, trained = split(tokenizer, row)
    assert whole.startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user") and trained == ["Blue.<|end|>\n"]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_reach_the_template(tokenizer, as_text):
    tokenizer.chat_template = WITH_TOOLS
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    talk = [user("Sky?"), called, {"role": "tool", "content": "blue"}, assistant("Blue.")]
    tools = '[{"function": {"name": "look"}}]' if as_text else [{"function": {"name": "look"}}]
    whole, trained = split(tokenizer, {"messages": talk, "tools": tools, "chat_template_kwargs": {"mood": "glad"}})
    assert whole.startswith("<|start|>tools look<|end|>glad<|start|>user\nSky?")
    assert trained == ["call look<|end|>\n", "Blue.<|end|>\n"]


def test_read():
    assert chat.read({"prompt": "a", "completion": "b", "id": 7}) == Exchange("a", "b")
    assert chat.read({"messages": TALK[:2], "prompt": "a"}) == Exchange((), tuple(TALK[:2]))
    with_none = {"messages": [{**message, "tool_calls": None} for message in TALK]}
    assert chat.read(with_none) == Exchange((), tuple(TALK)), "Arrow tables hold every key of any row"
    tools = [{"function": {"name": "look"}}]
    found = chat.read({"prompt": TALK[:1], "completion": TALK[1:2], "tools": tools})
    assert found == Exchange((TALK[0],), (TALK[1],), (tools[0],))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 1}, "columns are text, label; expected either prompt and completion, or messages"),
        ({"prompt": "x"}, "columns are prompt; expected"),
        ({}, "columns are none"),
        ({"prompt": "x", "completion": "y", "messages": TALK}, "not both"),
        ({"prompt": "x", "completion": " \n"}, "the completion is empty"),
        ({"prompt": "x", "completion": TALK[1:2]}, "are str and list"),
        ({"prompt": "x", "completion": 3}, "are str and int"),
        ({"prompt": [], "completion": TALK[1:2]}, "prompt must be a list of messages .* not list"),
        ({"messages": "[]"}, "messages must be a list of messages .* not str"),
        ({"messages": None}, "not NoneType None"),
        ({"messages": ["Sky?"]}, r"messages\[0\] is 'Sky\?'; expected an object"),
        ({"messages": [{"from": "human", "value": "Sky?"}]}, r"messages\[0\] is \{'from'"),
        ({"messages": [user("Sky?"), {"role": "asistant", "content": "x"}]}, r"\[1\].*'asistant' \(is it 'assistant'"),
        ({"messages": [{"role": "human", "content": "x"}]}, "role 'human'; roles are system, developer, user"),
        ({"messages": [user(None), assistant("x")]}, r"messages\[0\] of the role 'user' has no content"),
        ({"messages": [user("x")]}, "no message of the role 'assistant', so there is nothing to learn"),
        ({"messages": [user("x"), assistant(" ")]}, r"messages\[1\]: the assistant says nothing"),
        ({"prompt": [user("x")], "completion": [assistant(None)]}, r"completion\[0\] .* has no content"),
        ({"messages": TALK, "tools": "[{"}, "tools is not valid JSON: .* column"),
        ({"messages": TALK, "tools": {"name": "look"}}, "tools must be a list"),
        ({"messages": TALK, "chat_template_kwargs": "mood"}, "chat_template_kwargs must be an object, not 'mood'"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(TaskError, match=message):
        chat.read(row)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": TALK}, "no chat template, which messages need; .*prompt and completion as text"),
        (ALTERNATING, {"messages": TALK[1:]}, "refuses these messages: begin with the user"),
        (CHATML, {"messages": TALK[1:]}, "starts with the assistant, answering nobody"),
        (
            RETHINKING,
            {"messages": TALK},
            r"first 2 messages differently .*'<think></think>.* becomes 'Blue\..*a row for",
        ),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"), {"messages": TALK}, "first 1 messages"),
        (TAGGED.replace("{{ m.content }}<|end|>{%-", "{%-"), {"messages": TALK}, "no token of this row would be"),
        ("{{ nothing.at.all }}", {"messages": TALK}, "refuses these messages: .*undefined"),
    ],
)
def test_templates_that_do_not_fit(tokenizer, template, row, message):
    tokenizer.chat_template = template
    with pytest.raises(TaskError, match=re.compile(message, re.DOTALL)):
        chat.tokens(tokenizer, chat.read(row))


def test_what_a_template_that_forgets_thoughts_can_do(tokenizer):
    tokenizer.chat_template = RETHINKING
    whole, trained = split(tokenizer, {"prompt": TALK[:3], "completion": TALK[3:]})
    assert trained == ["<think></think>Yes, très 🙂.<|end|>\n"] and "Blue.<|end|>" in whole


def test_no_eos_token(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(TaskError, match="no EOS token to end a completion with"):
        chat.tokens(tokenizer, Exchange("a", "b"))


ROWS = [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "The sky i", "completion": "s blue."},
    {"prompt": "Frage: 好?\n", "completion": "Réponse 🙂"},
    {"prompt": TALK[:1], "completion": TALK[1:2]},
    {"prompt": TALK[:3], "completion": TALK[3:]},
    {"prompt": [{"role": "system", "content": "Be brief."}, *TALK[:1]], "completion": TALK[1:2]},
]


def smollm2():
    """The tokenizer of SmolLM2-135M-Instruct, where it has been unpacked before."""
    from zoengine.models import ModelError, smollm2

    try:
        packed = smollm2._gguf_file()
    except ModelError as error:
        pytest.skip(str(error))
    found = sorted(Path.home().glob(f".cache/zoengine/{smollm2.NAME}-*/tokenizer.json"))
    if not found:
        pytest.skip(f"{packed.name} has not been unpacked")
    return transformers.AutoTokenizer.from_pretrained(found[0].parent)


def test_smollm2():
    found = smollm2()
    whole, trained = split(found, {"messages": TALK})
    assert whole.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert trained == ["Blue.<|im_end|>\n", "Yes, très 🙂.<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["own", "tagged", "smollm2"])
def test_the_same_tokens_are_trained_as_by_trl(kind, tokenizer, tmp_path):
    """Where TRL is installed: its trainer's data set, row for row."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    used = smollm2() if kind == "smollm2" else tokenizer
    rows, how = ROWS, {"completion_only_loss": True}
    if kind == "tagged":
        used.chat_template = TAGGED
        rows, how = [{"messages": TALK}, {"messages": TALK[:2]}], {"assistant_only_loss": True}
    config = transformers.LlamaConfig(
        vocab_size=len(used), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **how)
    for row in rows:
        trainer = trl.SFTTrainer(
            transformers.LlamaForCausalLM(config), args, train_dataset=Dataset.from_list([row]), processing_class=used
        )
        ids, labels = chat.tokens(used, chat.read(row))
        theirs = trainer.train_dataset[0]
        assert theirs["input_ids"] == ids
        assert [token for token in theirs["labels"][1:]] == labels[1:]
