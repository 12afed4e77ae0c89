"""One training record to token ids and labels, and the check that two models read the same tokens.

A record is an object in one of these shapes; other fields are left alone.

| fields                            | tokens with a label                                                        |
| --------------------------------- | -------------------------------------------------------------------------- |
| `messages`                        | all turns of the assistant                                                 |
| `conversations` (ShareGPT)        | likewise; `from` and `value` stand for role and content, `system` for one  |
| `prompt`, `completion`            | the completion: a string, or the assistant's turns of a list of messages   |
| `instruction`, `input`?, `output` | the output                                                                 |
| `text`                            | all                                                                        |

Messages are rendered by the tokenizer's chat template, which gets the record's `tools` and `chat_template_kwargs` too.
Without a template they get this format, the end-of-sequence token after each of the assistant's turns:

    ### User:
    {instruction}

    {input}

    ### Assistant:
    {output}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = [
    "SHAPES",
    "DataError",
    "check_same_tokenizer",
    "each_reference",
    "split_record",
    "tokenize_messages",
    "tokenize_record",
]

IGNORE_INDEX = -100
"""Label of a token that is not trained."""

SHAPES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
"""The fields that a record must have, by shape; a record with those of several shapes has the first of these."""

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""Roles by what `from` says."""

Message = dict[str, Any]


class DataError(ValueError):
    """Data or tokenizers that cannot be trained on; the message is one line and names file, line or row, and field."""


def tokenize_record(tokenizer: Any, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of a record, and as many labels, −100 where nothing is to be learnt.

    Each text is tokenised whole. A trained part of it begins where its tokens part from those of what stands before.

    Raises:
        DataError: the record has none of the shapes, a field of the wrong type or empty, or a chat template refuses it.
    """
    given = {name: value for name, value in record.items() if value is not None}
    shape = _shape(given)
    if shape == ("text",):
        return _plain(tokenizer, "", _text(given, "text", empty=False))
    if shape == ("instruction", "output"):
        return _conversation(tokenizer, _instruction(given), given)
    if shape != ("prompt", "completion"):
        return _conversation(tokenizer, _messages(given, shape[0], least=2), given)
    if isinstance(given.get("prompt"), list):
        prompt = _messages(given, "prompt", least=1, ends_with=None)
        return _conversation(tokenizer, prompt + _messages(given, "completion", least=1), given, first=len(prompt))
    return _plain(tokenizer, _text(given, "prompt"), _text(given, "completion", empty=False))


def split_record(tokenizer: Any, record: Mapping[str, Any]) -> tuple[Any, Any]:
    """The prompt of a record and its completion, two texts or two lists of messages, for a student that samples.

    Of a conversation, the last answer is the completion. Without a chat template, messages become text in the format
    above, in which a completion carries no end of sequence.

    Raises:
        DataError: as `tokenize_record`, and for a record without a prompt or whose prompt takes more than messages.
    """
    given = {name: value for name, value in record.items() if value is not None}
    shape = _shape(given)
    if shape == ("text",):
        raise DataError("field 'text' has no prompt that the student could complete: give 'prompt' and 'completion'")
    for name in ("tools", "chat_template_kwargs"):
        if given.get(name):
            raise DataError(f"field {name!r} goes with methods that learn from the data alone")
    if shape == ("instruction", "output"):
        messages = _instruction(given)
    elif shape != ("prompt", "completion"):
        messages = _messages(given, shape[0], least=2)
    elif isinstance(given.get("prompt"), list):
        messages = _messages(given, "prompt", least=1, ends_with=None) + _messages(given, "completion", least=1)
    else:
        prompt, completion = _text(given, "prompt"), _text(given, "completion", empty=False)
        if not prompt:
            raise DataError("field 'prompt' is empty: a student that samples needs something to complete")
        return prompt, completion
    if getattr(tokenizer, "chat_template", None):
        return messages[:-1], messages[-1:]
    if any("tool_calls" in message for message in messages):
        raise DataError("tool_calls need a tokenizer with a chat template")
    end = getattr(tokenizer, "eos_token", None) or ""
    turns = (
        f"### {m['role'].capitalize()}:\n{m['content']}{end * (m['role'] == 'assistant')}\n\n" for m in messages[:-1]
    )
    return "".join(turns) + "### Assistant:\n", messages[-1]["content"]


def each_reference(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record for each of the answers that a prompt may have, as `tokenize_record` takes them.

    Several answers are a list of strings in the place of `output` or `completion`, or in `references`, which goes
    before the answer of every shape but `text`.

    Raises:
        DataError: as `tokenize_record`, and for references that are no list of texts.
    """
    given = {name: value for name, value in record.items() if value is not None}
    shape = _shape(given)
    place = shape[1] if len(shape) == 2 else None
    name, answers = "references", given.pop("references", None)
    if answers is None and place is not None and _texts(given.get(place)):
        name, answers = place, given[place]
    if answers is None:
        return [given]
    if shape == ("text",):
        raise DataError("field 'references' needs a prompt: give 'prompt' instead of 'text'")
    if not _texts(answers) or not all(answers):
        raise DataError(f"field {name!r} must be a list of texts that are not empty, got {_short(answers)}")
    if place is None:
        (turns,) = shape
        messages = _messages(given, turns, least=1, ends_with=None)
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        given = {key: value for key, value in given.items() if key not in (turns, "system")}
        return [{**given, "messages": [*messages, _message("assistant", text)]} for text in answers]
    if isinstance(given.get("prompt"), list):
        return [{**given, place: [_message("assistant", text)]} for text in answers]
    return [{**given, place: text} for text in answers]


def tokenize_messages(tokenizer: Any, messages: list[Message]) -> tuple[list[int], int]:
    """Token ids of a conversation, and the index at which its last message, the answer, begins.

    Raises:
        DataError: the chat template refuses the messages, such as a system prompt.
    """
    ids, labels = _conversation(tokenizer, messages, {}, first=len(messages) - 1)
    return ids, next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Check that an id stands for the same token in both vocabularies wherever both have it.

    A vocabulary may be longer than the other, and so may a model's padded one: the loss reads the common entries.

    Raises:
        DataError: a token with two ids, or an id with two tokens.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    tokens = {index: token for token, index in theirs.items()}
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token, index) != index or tokens.get(index, token) != token:
            raise DataError(
                f"student and teacher must share one tokenizer, but token {token!r} is {index} in the student's "
                f"({len(ours)} tokens) and {theirs.get(token, 'missing')} in the teacher's ({len(theirs)} tokens), "
                f"where {index} is {tokens.get(index)!r}"
            )


def _shape(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The shape of a record's fields: the first that it has wholly, or else in part."""
    shape = next((shape for shape in SHAPES if all(name in given for name in shape)), None)
    shape = shape or next((shape for shape in SHAPES if any(name in given for name in shape)), None)
    if shape is None:
        expected = ", or ".join(" and ".join(map(repr, names)) for names in SHAPES)
        raise DataError(f"no field to train on: expected {expected}, got {_listed(given)}")
    return shape


def _instruction(given: Mapping[str, Any]) -> list[Message]:
    """An instruction and its output as messages."""
    instruction, answer = _text(given, "instruction"), _text(given, "output", empty=False)
    context = _text(given, "input") if "input" in given else ""
    request = f"{instruction}\n\n{context}" if context else instruction
    return [_message("user", request), _message("assistant", answer)]


def _plain(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a text of which the answer is trained, with the tokenizer's own special tokens around it."""
    return _labelled(tokenizer, prompt + answer, [(len(prompt), len(prompt) + len(answer))], special=True)


def _conversation(
    tokenizer: Any, messages: list[Message], record: Mapping[str, Any], first: int = 0
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation whose assistant's turns are trained, those from message `first` on."""
    if getattr(tokenizer, "chat_template", None):
        return _templated(tokenizer, messages, record, first)
    if record.get("tools") or record.get("chat_template_kwargs"):
        raise DataError("field 'tools' or 'chat_template_kwargs' needs a tokenizer with a chat template")
    text, spans, end = "", [], getattr(tokenizer, "eos_token", None) or ""
    for index, message in enumerate(messages):
        if "tool_calls" in message:
            raise DataError(f"the tool_calls of message {index} need a tokenizer with a chat template")
        text += f"### {message['role'].capitalize()}:\n"
        content, last = message["content"], index == len(messages) - 1
        if message["role"] == "assistant":
            content += "" if last else end  # behind the last one stands the end of the text
            if index >= first:
                spans.append((len(text), len(text) + len(content)))
        text += content + ("" if last else "\n\n")
    return _labelled(tokenizer, text, spans, special=True)


def _templated(
    tokenizer: Any, messages: list[Message], record: Mapping[str, Any], first: int
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation in the tokenizer's chat template."""
    options = {"tools": _tools(record.get("tools")), **_template_options(record.get("chat_template_kwargs"))}

    def render(end: int, **more: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(messages[:end], **{"tokenize": False, **options, **more})
        except Exception as error:  # a template raises what it likes, and Jinja what a field of the wrong type causes
            raise DataError(f"the tokenizer's chat template refuses the messages: {error}") from None

    template = tokenizer.get_chat_template(None, options["tools"])
    if getattr(tokenizer, "is_fast", False) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        marked = render(len(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(marked["input_ids"]), list(marked["assistant_masks"])
        start = _index(tokenizer, render(first, add_generation_prompt=True), ids, special=False) if first else 0
        labels = [
            token if m and i >= start else IGNORE_INDEX for i, (token, m) in enumerate(zip(ids, mask, strict=True))
        ]
        if all(label == IGNORE_INDEX for label in labels):
            raise DataError("the {% generation %} of the tokenizer's chat template marks no token of the answers")
        return ids, labels
    text = render(len(messages))
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    return _labelled(tokenizer, text, [_turn(messages, index, text, render) for index in turns], special=False)


def _turn(messages: list[Message], index: int, text: str, render: Any) -> tuple[int, int]:
    """Where a turn of the assistant begins and ends in the rendered text of all messages."""
    content = _content(messages[index])
    until = text if index == len(messages) - 1 else render(index + 1)
    if index:
        prompt = render(index, add_generation_prompt=True)
        start = _common(prompt, text)
        # What opens an answer may be written otherwise than what asks for one, but not what stands before.
        known = start == len(prompt) or _content(messages[index - 1]) in text[:start]
    else:
        start, known = max(0, text.find(content)), True
    if known and text.startswith(until) and start < len(until):
        return start, len(until)
    # The template writes a turn otherwise where more follows, such as without its reasoning.
    _, found, after = until.rpartition(content) if content else ("", "", "")
    place = text.find(content, start)
    end = place + len(content)
    if known and found and place >= 0 and text.startswith(after, end):
        return start, end + len(after)
    raise DataError(
        f"message {index} cannot be found in the text of the conversation, because the tokenizer's chat template "
        "writes it otherwise where more follows: mark the answers in the template with {% generation %}, or give a "
        "record for each answer"
    )


def _content(message: Message) -> str:
    return str(message.get("content") or "").strip()


def _labelled(tokenizer: Any, text: str, spans: list[tuple[int, int]], special: bool) -> tuple[list[int], list[int]]:
    """Ids of a text and the labels of the characters in `spans`; `special`: with the tokenizer's special tokens."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if special and tokenizer.eos_token_id is not None and ids[-1:] != [int(tokenizer.eos_token_id)]:
        ids.append(int(tokenizer.eos_token_id))
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        first = _index(tokenizer, text[:start], ids, special)
        last = len(ids) if end == len(text) else _index(tokenizer, text[:end], ids, special)
        labels[first:last] = ids[first:last]
    return ids, labels


def _index(tokenizer: Any, text: str, ids: list[int], special: bool) -> int:
    """The index in `ids` of the first token that is not of `text`, with which theirs begins."""
    return _common(list(tokenizer(text, add_special_tokens=special)["input_ids"]), ids) if text else 0


def _common(first: Any, second: Any) -> int:
    """How many entries two sequences begin with alike."""
    if second[: len(first)] == first:
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _messages(record: Mapping[str, Any], name: str, least: int, ends_with: str | None = "assistant") -> list[Message]:
    """The messages in a field, checked."""
    messages = record.get(name)
    if not isinstance(messages, list) or len(messages) < least:
        expected = "a list, a prompt and an answer at least" if least > 1 else "a list of messages"
        raise DataError(f"{name!r} must be {expected}, got {_short(messages)}")
    found = [_checked(message, f"{name}[{index}]") for index, message in enumerate(messages)]
    if name == "conversations" and "system" in record:
        found.insert(0, _message("system", _text(record, "system")))
    if ends_with and found[-1]["role"] != ends_with:
        raise DataError(f"the last of {name!r} must be the {ends_with}'s, got role {found[-1]['role']!r}")
    return found


def _checked(message: Any, label: str) -> Message:
    """A message with role and content, checked. Its other fields, such as `tool_calls`, are the template's business."""
    if not isinstance(message, dict):
        raise DataError(f"{label} must have role and content, got {_short(message)}")
    role, content = ("from", "value") if "from" in message else ("role", "content")
    role_said = _text(message, role, label)
    if role == "from":
        if role_said not in SPEAKERS:
            raise DataError(f"field '{label}.from' must be one of {', '.join(SPEAKERS)}, got {role_said!r}")
        role_said = SPEAKERS[role_said]
    more = {name: value for name, value in message.items() if name not in (role, content) and value is not None}
    _check_text(more, label)
    if "tool_calls" in more and message.get(content) is None:
        return {"role": role_said, **more}
    text = _text(message, content, label, empty=role_said != "assistant" or "tool_calls" in more)
    return {"role": role_said, "content": text, **more}


def _tools(tools: Any) -> list[Any] | None:
    """The field `tools`: a list, or one written as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"field 'tools' is not JSON: {error}") from None
    if not isinstance(tools, list | None):
        raise DataError(f"field 'tools' must be a list, got {_short(tools)}")
    _check_text(tools, "tools")
    return tools or None


def _template_options(options: Any) -> dict[str, Any]:
    """The field `chat_template_kwargs`: variables of the template."""
    if not isinstance(options, dict | None):
        raise DataError(f"field 'chat_template_kwargs' must be an object, got {_short(options)}")
    _check_text(options, "chat_template_kwargs")
    return options or {}


def _text(record: Mapping[str, Any], name: str, of: str = "", empty: bool = True) -> str:
    """A field that is a string, of a record or of the message `of`; `empty`: it may be."""
    label = f"{of}.{name}" if of else name
    if record.get(name) is None:
        if of:
            expected = "role and content"
        else:
            expected = next(" and ".join(map(repr, shape)) for shape in SHAPES if name in shape)
        raise DataError(f"field '{label}' is missing: expected {expected}, got {_listed(record)}")
    if not isinstance(record[name], str):
        raise DataError(f"field '{label}' must be a string, got {_short(record[name])}")
    if not record[name] and not empty:
        raise DataError(f"field '{label}', which is to be learnt, is empty")
    _check_text(record[name], label)
    return str(record[name])


def _check_text(value: Any, label: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold and no tokenizer takes, anywhere in a value."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f", as character {error.start + 1}" if isinstance(value, str) else ""
        raise DataError(f"field '{label}' has half of a surrogate pair, {text[error.start]!r}{where}") from None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "no field"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
