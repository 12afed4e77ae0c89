"""Training records: JSON lines in, token ids and labels out, and the check that two models read the same tokens.

A line is an object with `instruction`, `output` and optionally `input`, or with `messages`, a list of
`{"role", "content"}` whose last one, the assistant's, is the answer. Other fields are left alone. Only the answer has
labels. A tokenizer with a chat template renders the messages with it. One without gets this format, its end-of-sequence
token after the answer:

    ### User:
    {instruction}

    {input}

    ### Assistant:
    {output}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["DataError", "LoadedRecords", "check_same_tokenizer", "load_records", "tokenize_messages"]

IGNORE_INDEX = -100
"""Label of a token that is not part of the answer."""

Message = dict[str, str]


class DataError(ValueError):
    """Data or tokenizers that cannot be trained on; the message is one line and names the file and line."""


class LoadedRecords(NamedTuple):
    """What `load_records` returns.

    Attributes:
        records: of each record `input_ids` and `labels`, −100 on the prompt.
        truncated: how many of them lost the end of their answer.
        dropped: how many records more the file has, whose prompt leaves no room for an answer.
    """

    records: list[dict[str, list[int]]]
    truncated: int
    dropped: int


def load_records(path: str | Path, tokenizer: Any, max_length: int = 1024) -> LoadedRecords:
    """Read a JSONL file into tokenised records of at most `max_length` tokens.

    An answer that does not fit loses its end. A prompt is never cut: a record whose prompt leaves no room for one token
    of the answer is dropped and counted.

    Raises:
        DataError: the file is missing or cannot be read, a line is no such object, a field is missing or of the wrong
            type, or no record is left.
    """
    records: list[dict[str, list[int]]] = []
    truncated = dropped = 0
    for line, record in _json_lines(Path(path)):
        messages = _messages(f"{path}:{line}", record)
        try:
            ids, answer_start = tokenize_messages(tokenizer, messages)
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None
        if answer_start >= min(max_length, len(ids)):
            dropped += 1
            continue
        truncated += len(ids) > max_length
        ids = ids[:max_length]
        records.append({"input_ids": ids, "labels": [IGNORE_INDEX] * answer_start + ids[answer_start:]})
    if not records:
        reason = (
            f"the prompts of all {dropped} records leave no room for an answer within max_length={max_length}; raise it"
            if dropped
            else "it has no records; expected one JSON object a line"
        )
        raise DataError(f"{path}: nothing to train on: {reason}")
    return LoadedRecords(records, truncated, dropped)


def tokenize_messages(tokenizer: Any, messages: list[Message]) -> tuple[list[int], int]:
    """Token ids of a conversation, and the index at which its last message, the answer, begins.

    The whole text is tokenised at once; the answer begins where its tokens part from those of the prompt alone.

    Raises:
        DataError: the chat template refuses the messages, such as a system prompt.
    """
    if getattr(tokenizer, "chat_template", None):
        from jinja2 import TemplateError  # transformers needs it for templates, and only for them

        try:
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise DataError(f"the tokenizer's chat template refuses the messages: {error}") from None
        special, end = False, []
    else:
        turns = [f"### {message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages[:-1]]
        prompt = "".join(turns) + "### Assistant:\n"
        text = prompt + messages[-1]["content"]
        special, end = True, [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    prompt_ids = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if ids[-1:] != end:
        ids += end
    start = 0
    while start < min(len(prompt_ids), len(ids)) and prompt_ids[start] == ids[start]:
        start += 1
    return ids, start


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


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers; blank lines are skipped."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
                yield number, record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _messages(where: str, record: dict[str, Any]) -> list[Message]:
    """The conversation of a record, checked; `where` is its file and line."""
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise DataError(
                f"{where}: 'messages' must be a list, a prompt and an answer at least, got {_short(messages)}"
            )
        for index, message in enumerate(messages):
            if not isinstance(message, dict):
                raise DataError(f"{where}: messages[{index}] must have role and content, got {_short(message)}")
            for name in ("role", "content"):
                _text(where, message, name, f"messages[{index}].{name}")
        if messages[-1]["role"] != "assistant":
            role = messages[-1]["role"]
            raise DataError(f"{where}: the last of 'messages' must be the assistant's, got role {role!r}")
        if not messages[-1]["content"]:
            raise DataError(f"{where}: the answer, the last of 'messages', is empty")
        return messages
    instruction, answer = (_text(where, record, name, name) for name in ("instruction", "output"))
    context = _text(where, record, "input", "input") if record.get("input") is not None else ""
    if not answer:
        raise DataError(f"{where}: the answer, field 'output', is empty")
    request = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]


def _text(where: str, record: dict[str, Any], name: str, label: str) -> str:
    if name not in record:
        expected = "'instruction' and 'output', or 'messages'" if label == name else "role and content"
        given = ", ".join(map(repr, record)) or "no field"
        raise DataError(f"{where}: field '{label}' is missing: expected {expected}, got {given}")
    if not isinstance(record[name], str):
        raise DataError(f"{where}: field '{label}' must be a string, got {_short(record[name])}")
    try:
        record[name].encode()
    except UnicodeEncodeError as error:
        surrogate = record[name][error.start]
        raise DataError(
            f"{where}: field '{label}' has half of a surrogate pair, {surrogate!r}, as character {error.start + 1}"
        ) from None
    return str(record[name])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
