"""One record of each shape: which tokens have labels, in a chat template or without one, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from adakd_kernels.trainer.records import DataError, tokenize_messages, tokenize_record

from .tiny_models import CHAT_TEMPLATE, tiny_tokenizer

pytestmark = pytest.mark.fast

MARKED = (
    "{% if tools %}<|tools|>{{ tools | map(attribute='name') | join(',') }}\n{% endif %}{% if mood %}<|{{ mood }}|>\n"
    "{% endif %}{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ message['tool_calls'] or '' }}<eos>\n{% endgeneration %}"
    "{% else %}{{ message['content'] }}<eos>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
FORGETFUL = (  # writes out the reasoning of the last turn only, as those of Qwen3 and others do
    "{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['role'] == 'assistant' and loop.last %}"
    "<think></think>{% endif %}{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


CONVERSATION = [
    turn("system", "Be brief."), turn("user", "Hello"), turn("assistant", "Hello."), turn("user", "A word?"),
    turn("assistant", "Word."),
]  # fmt: skip


def learnt(record: dict[str, Any], template: str | None = None) -> tuple[str, list[str]]:
    """The whole text of a record, and the parts of it that have labels."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    ids, labels = tokenize_record(tokenizer, record)
    parts: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (-100, token)
        if label != -100:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return tokenizer.decode(ids), [tokenizer.decode(part) for part in parts if part]


def test_shapes_without_a_template() -> None:
    assert learnt({"text": "A cat."}) == ("A cat.<eos>", ["A cat.<eos>"])
    assert learnt({"prompt": "A cat", "completion": " sat."}) == ("A cat sat.<eos>", [" sat.<eos>"])
    text = "### User:\nSay\n\nit\n\n### Assistant:\nIt.<eos>"
    assert learnt({"instruction": "Say", "input": "it", "output": "It."}) == (text, ["It.<eos>"])
    assert learnt({"instruction": "Say\n\nit", "input": None, "output": "It.", "text": "all"}) == (text, ["It.<eos>"])
    assert learnt({"messages": CONVERSATION}) == (
        "### System:\nBe brief.\n\n### User:\nHello\n\n### Assistant:\nHello.<eos>\n\n### User:\nA word?\n\n"
        "### Assistant:\nWord.<eos>",
        ["Hello.<eos>", "Word.<eos>"],
    )
    prompted = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    assert learnt(prompted) == (learnt({"messages": CONVERSATION})[0], ["Word.<eos>"])


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_all_turns_of_the_assistant_are_learnt(template: str) -> None:
    text, parts = learnt({"messages": CONVERSATION, "prompt": "not this", "text": "nor this"}, template)
    assert parts == ["Hello.<eos>\n", "Word.<eos>\n"]
    assert text.startswith("<|system|>\nBe brief.<eos>\n<|user|>\nHello<eos>\n<|assistant|>\nHello.<eos>\n<|user|>")
    share_gpt = [
        {"from": speaker, "value": message["content"]}
        for speaker, message in zip(("human", "gpt", "human", "gpt"), CONVERSATION[1:], strict=True)
    ]
    assert learnt({"conversations": share_gpt, "system": "Be brief."}, template) == (text, parts)
    assert learnt({"conversations": [{"from": "system", "value": "Be brief."}, *share_gpt]}, template) == (text, parts)
    assert learnt({"conversations": CONVERSATION}, template) == (text, parts)
    prompted = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    assert learnt(prompted, template) == (text, parts[1:])
    assert learnt({"instruction": "Hello", "output": "Hi."}, template)[1] == ["Hi.<eos>\n"]
    assert learnt({"prompt": "A cat", "completion": " sat."}, template) == ("A cat sat.<eos>", [" sat.<eos>"])
    first = [turn("assistant", "Hello."), *CONVERSATION[3:]]
    assert learnt({"messages": first}, template)[1] == ["Hello.<eos>\n", "Word.<eos>\n"]


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_tools_and_variables_reach_the_template(template: str) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    record = {
        "messages": [*CONVERSATION[:2], {**call, "content": ""}, turn("tool", "a cat"), CONVERSATION[4]],
        "tools": [{"name": "look"}, {"name": "ask"}],
        "chat_template_kwargs": {"mood": "glad"},
    }
    text, parts = learnt(record, template)
    assert text.startswith("<|tools|>look,ask\n<|glad|>\n<|system|>")
    assert parts == ["[{'name': 'look'}]<eos>\n", "Word.<eos>\n"]
    assert learnt({**record, "tools": '[{"name": "look"}, {"name": "ask"}]'}, template) == (text, parts)
    record["messages"][2] = call
    assert "name" in learnt(record, template)[1][0]


def test_a_template_that_writes_earlier_turns_otherwise() -> None:
    text, parts = learnt({"messages": CONVERSATION}, FORGETFUL)
    assert text.count("<think>") == 1
    assert parts == ["Hello.<eos>\n", "</think>Word.<eos>\n"]
    hidden = FORGETFUL.replace("{{ message['content'] }}", "{{ 'x' if not loop.last else message['content'] }}")
    with pytest.raises(DataError, match=r"message 2 cannot be found .* mark the answers .*{% generation %}"):
        learnt({"messages": CONVERSATION}, hidden)
    counting = "{{ messages | length }}" + CHAT_TEMPLATE  # what stands before an answer depends on it
    with pytest.raises(DataError, match="message 1 cannot be found"):
        learnt({"messages": CONVERSATION[1:]}, counting)
    unmarked = MARKED.replace("message['role'] == 'assistant'", "message['role'] == 'nobody'")
    with pytest.raises(DataError, match="marks no token of the answers"):
        learnt({"messages": CONVERSATION}, unmarked)


def test_tokens_and_where_the_answer_begins() -> None:
    tokenizer = tiny_tokenizer(chat_template=True)
    ids, start = tokenize_messages(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids[start:]) == "Word.<eos>\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "field 'completion' is missing: expected 'prompt' and 'completion', got 'prompt'"),
        ({"prompt": "a", "completion": ""}, "field 'completion', which is to be learnt, is empty"),
        ({"text": ""}, "field 'text', which is to be learnt, is empty"),
        ({"text": ["a"]}, "field 'text' must be a string, got [\"a\"]"),
        ({"prompt": [turn("user", "a")], "completion": "b"}, "'completion' must be a list of messages, got \"b\""),
        ({"prompt": "a", "completion": [turn("assistant", "b")]}, "field 'completion' must be a string, got [{"),
        ({"conversations": [{"from": "bee", "value": "a"}] * 2}, "field 'conversations[0].from' must be one of human,"),
        ({"conversations": [{"from": "gpt"}] * 2}, "field 'conversations[0].value' is missing: expected role and"),
        ({"messages": CONVERSATION, "tools": {}}, "field 'tools' must be a list, got {}"),
        ({"messages": CONVERSATION, "tools": "["}, "field 'tools' is not JSON: "),
        ({"messages": CONVERSATION, "tools": ["\ud83d"]}, "field 'tools' has half of a surrogate pair, '\\ud83d'"),
        ({"messages": CONVERSATION, "chat_template_kwargs": "a"}, "field 'chat_template_kwargs' must be an object"),
        ({"a": 1}, "no field to train on: expected 'messages', or 'conversations', or 'prompt' and 'completion', or"),
    ],
)
def test_records_that_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        learnt(record, MARKED)
    assert str(raised.value).startswith(message)


def test_tools_need_a_template() -> None:
    for more in ({"tools": [{}]}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
            learnt({"messages": CONVERSATION, **more})
    calls = [*CONVERSATION[:2], {"role": "assistant", "content": "", "tool_calls": [{}]}]
    with pytest.raises(DataError, match="the tool_calls of message 2 need a tokenizer with a chat template"):
        learnt({"messages": calls})
