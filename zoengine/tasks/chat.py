"""Instruction data: what is asked and what is to be answered, as text or as messages, and which tokens are trained.

Rows have the columns that TRL's supervised trainer reads (https://huggingface.co/docs/trl/dataset_formats)::

    {"prompt": "The sky is", "completion": " blue."}
    {"prompt": [{"role": "user", "content": "Sky?"}], "completion": [{"role": "assistant", "content": "Blue."}]}
    {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]}

Messages are written out by the tokenizer's chat template. Trained are the tokens of a completion in text, and the
assistant's turns of a completion in messages, whatever else is said in it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoengine.tasks.entry import Row
from zoengine.tasks.instance import TaskError
from zoengine.tasks.sequences import common

IGNORED = -100  # the label of a token that is not trained, as everywhere in transformers
ROLES = ("system", "developer", "user", "assistant", "tool")

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Exchange:
    """One row of instruction data.

    Attributes:
        prompt: what stands before the completion: text, or messages.
        completion: what is learned, of the prompt's kind. A row of ``messages`` is all completion.
        tools: JSON schemas of functions, for the chat template.
        template_options: further variables of the chat template (``enable_thinking``, say).
    """

    prompt: str | tuple[Message, ...]
    completion: str | tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)


def read(row: Row) -> Exchange:
    """The exchange in a row with ``prompt`` and ``completion``, or with ``messages``.

    Beside messages there may be ``tools`` (a list, or JSON text of one) and ``chat_template_kwargs``, as for TRL.

    Raises:
        TaskError: other columns, a message without a known role or without content, or nothing to learn.
    """
    paired, listed = {"prompt", "completion"} <= row.keys(), "messages" in row
    if paired == listed:
        there = ", ".join(row) or "none"
        wanted = "either prompt and completion, or messages"
        raise TaskError(f"the columns are {there}; expected {wanted}{', not both' if paired else ''}")
    if listed:
        return Exchange((), _messages(row["messages"], "messages", learned=True), *_extras(row))
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise TaskError("the completion is empty, so there is nothing to learn; remove the row")
        return Exchange(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise TaskError(f"prompt and completion are {kinds}; expected two texts or two lists of messages")
    return Exchange(_messages(prompt, "prompt"), _messages(completion, "completion", learned=True), *_extras(row))


def tokens(tokenizer: Any, exchange: Exchange) -> tuple[list[int], list[int]]:
    """(input ids, labels) of an exchange, of equal length; the label of a token that is not trained is -100.

    A token that holds the end of the prompt and the start of the completion belongs to the completion. Text gets the
    tokenizer's special tokens, and its EOS token after the completion. Of messages, the parts that the chat template
    marks as generated are trained; where it marks none, all that the template writes for an assistant's turn after the
    generation prompt, which is the difference of two renderings.

    Raises:
        TaskError: no EOS token or chat template, a template that refuses the messages or writes the start of a
            conversation differently once it goes on, or no token to train.
    """
    if isinstance(exchange.prompt, str):
        ids, trained = _text(tokenizer, exchange.prompt, exchange.completion)
    else:
        ids, trained = _conversation(_Template(tokenizer, exchange), exchange)
    # Nothing predicts the first token.
    labels = [IGNORED, *(token if on else IGNORED for token, on in zip(ids[1:], trained[1:], strict=True))]
    if not ids or not any(trained[1:]):
        raise TaskError(
            "no token of this row would be trained; the chat template must write the assistant's turns, and mark them "
            "if it has {% generation %} at all"
        )
    return ids, labels


def _text(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    if tokenizer.eos_token_id is None:
        raise TaskError("the tokenizer has no EOS token to end a completion with; set tokenizer.eos_token")
    ids = _ids(tokenizer, prompt + completion)
    start = common([_ids(tokenizer, prompt), ids])
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, [position >= start for position in range(len(ids))]


def _conversation(template: _Template, exchange: Exchange) -> tuple[list[int], list[bool]]:
    messages = [*exchange.prompt, *exchange.completion]
    whole = template.text(messages)
    if template.marks_generation:
        ids, trained = template.marked(messages)
        start = common([template.ids(template.before(whole, exchange.prompt)), ids]) if exchange.prompt else 0
        return ids, [bool(on) and position >= start for position, on in enumerate(trained)]
    ids = template.ids(whole)
    trained = [False] * len(ids)
    for k in range(len(exchange.prompt), len(messages)):
        if messages[k]["role"] == "assistant":
            before = template.before(whole, messages[:k])
            through = template.through(whole, messages[: k + 1], len(before))
            start, stop = (common([template.ids(text), ids]) for text in (before, through))
            trained[start:stop] = [True] * (stop - start)
    return ids, trained


class _Template:
    """The chat template of a tokenizer, with what one exchange hands to it."""

    def __init__(self, tokenizer: Any, exchange: Exchange) -> None:
        if not tokenizer.chat_template:
            raise TaskError(
                "the tokenizer has no chat template, which messages need; take the tokenizer of an instruction-tuned "
                "model, set tokenizer.chat_template, or give prompt and completion as text"
            )
        self._tokenizer = tokenizer
        self._given = {"tools": list(exchange.tools) or None, **exchange.template_options}
        source = self._given.get("chat_template") or tokenizer.get_chat_template(tools=self._given["tools"])
        # Without a fast tokenizer, transformers cannot tell which token a character is in.
        self.marks_generation = tokenizer.is_fast and _GENERATION_TAG.search(source) is not None

    def text(self, messages: Sequence[Message], *, answering: bool = False) -> str:
        return self._apply(messages, tokenize=False, add_generation_prompt=answering)

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

    def marked(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        found = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], found["assistant_masks"]

    def before(self, whole: str, messages: Sequence[Message]) -> str:
        """The start of the text ``whole`` after which the assistant answers ``messages``, the first of it."""
        if not messages:
            raise TaskError("the conversation starts with the assistant, answering nobody; put the user's turn first")
        text = self.text(messages, answering=True)
        if not whole.startswith(text):
            raise _rewritten(text, whole, len(messages))
        return text

    def through(self, whole: str, messages: Sequence[Message], start: int) -> str:
        """The start of the text ``whole`` that ends with the last of ``messages``, written from ``start`` on."""
        text = self.text(messages)
        same = text[: common([text, whole])]
        # Some templates end every text with a token of its own, which is missing once others follow.
        content = messages[-1].get("content")
        if same != text and not (isinstance(content, str) and content.strip() and content.strip() in same[start:]):
            raise _rewritten(text, whole, len(messages))
        return same

    def _apply(self, messages: Sequence[Message], **how: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(list(messages), **self._given, **how)
        except (TemplateError, TypeError, ValueError) as error:
            raise TaskError(f"the chat template refuses these messages: {error}") from error


def _rewritten(text: str, whole: str, count: int) -> TaskError:
    at = common([text, whole])
    return TaskError(
        f"the chat template writes the first {count} messages differently once others follow "
        f"({text[at : at + 40]!r} becomes {whole[at : at + 40]!r}), so what the assistant says cannot be told apart; "
        "use a template with {% generation %} around it, or a row for each answer, with prompt and completion"
    )


def _messages(value: Any, column: str, *, learned: bool = False) -> tuple[Message, ...]:
    """Checked messages; those that are ``learned`` must hold something that the assistant says."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        found = f"{type(value).__name__} {value!r:.60}"
        raise TaskError(f'{column} must be a list of messages like {{"role": "user", "content": "Hello"}}, not {found}')
    messages = tuple(_message(message, f"{column}[{k}]", learned) for k, message in enumerate(value))
    if learned and not any(message["role"] == "assistant" for message in messages):
        raise TaskError(f"{column} has no message of the role 'assistant', so there is nothing to learn")
    return messages


def _message(message: Any, place: str, learned: bool) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise TaskError(f'{place} is {message!r:.60}; expected an object like {{"role": "user", "content": "Hello"}}')
    # Columns of Arrow tables hold every key of any row, None where a row has it not.
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, n=1)
        raise TaskError(
            f"{place} has the role {role!r}{f' (is it {near[0]!r}?)' if near else ''}; roles are {', '.join(ROLES)}"
        )
    if role == "assistant" and message.get("tool_calls"):
        return message
    if not isinstance(content, str | Sequence):
        raise TaskError(f"{place} of the role {role!r} has no content; expected text")
    if learned and role == "assistant" and not (content.strip() if isinstance(content, str) else content):
        raise TaskError(f"{place}: the assistant says nothing, so there is nothing to learn; remove the row")
    return message


def _extras(row: Row) -> tuple[tuple[Mapping[str, Any], ...], Mapping[str, Any]]:
    tools = row.get("tools") or ()
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise TaskError(f"tools is not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise TaskError(f"tools must be a list of JSON schemas of functions, not {tools!r:.60}")
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise TaskError(f"chat_template_kwargs must be an object, not {options!r:.60}")
    return tuple(tools), options


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, truncation=False, verbose=False)["input_ids"]
