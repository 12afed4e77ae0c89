"""The parts of an evaluation: prompts, answers, distances, ROUGE-L and intervals, each beside a plain computation."""

from __future__ import annotations

import copy
import json
import math
import random
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from datasets import Dataset
from rouge_score import rouge_scorer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from adakd_kernels import reference
from adakd_kernels.evaluation import distances, intervals, load_prompts, sampling
from adakd_kernels.evaluation.distances import DISTANCES, sequence_sums
from adakd_kernels.evaluation.prompts import fingerprint, set_names
from adakd_kernels.evaluation.rouge import is_readable, rouge_l
from adakd_kernels.evaluation.sampling import Draws, answer_prompts, random_numbers
from adakd_kernels.evaluation.tables import fixed
from adakd_kernels.evaluation.weights import weights_fingerprint
from adakd_kernels.trainer.evaluation import MEASURES
from adakd_kernels.trainer.records import DataError, each_reference, tokenize_record

from .tiny_models import INSTRUCTIONS, tiny_model, tiny_tokenizer, token_records, write_jsonl

pytestmark = pytest.mark.fast

TOKENIZER = tiny_tokenizer(chat_template=True)
PROMPTS = [[7, 9, 11], [20], [30, 31, 32, 33, 34], [41, 42], [5, 6], [60, 61, 62], [12, 13, 14, 15]]
ASKED = {"max_new_tokens": 6, "batch_size": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    """In fp64, so that what a batch rounds together chooses no other token."""
    return tiny_model("llama", vocab_size=len(TOKENIZER), seed=1).double().eval()


def draws(seed: int, prompts: list[list[int]] = PROMPTS, **options: Any) -> Draws:
    return Draws(random_numbers(seed, [str(prompt) for prompt in prompts], 6), **options)


# Prompts.

USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SHAPES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "one output": ({"instruction": "a", "output": "b"}, [{"instruction": "a", "output": "b"}]),
    "outputs": (
        {"instruction": "a", "input": "c", "output": ["b", "d"]},
        [{"instruction": "a", "input": "c", "output": "b"}, {"instruction": "a", "input": "c", "output": "d"}],
    ),
    "references": ({"prompt": "a", "references": ["b"]}, [{"prompt": "a", "completion": "b"}]),
    "references win": ({"prompt": "a", "completion": "x", "references": ["b"]}, [{"prompt": "a", "completion": "b"}]),
    "completions": ({"prompt": "a", "completion": ["b"]}, [{"prompt": "a", "completion": "b"}]),
    "messages": ({"messages": [USER], "references": ["b"]}, [{"messages": [USER, {**SAID, "content": "b"}]}]),
    "messages with an answer": (
        {"messages": [USER, SAID], "references": ["b"]},
        [{"messages": [USER, {**SAID, "content": "b"}]}],
    ),
    "a conversation": (
        {"conversations": [{"from": "human", "value": "hi"}], "system": "be short", "references": ["b"]},
        [{"messages": [{"role": "system", "content": "be short"}, USER, {**SAID, "content": "b"}]}],
    ),
    "a prompt of messages": (
        {"prompt": [USER], "references": ["b"]},
        [{"prompt": [USER], "completion": [{**SAID, "content": "b"}]}],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_record_for_each_reference(shape: str) -> None:
    record, expected = SHAPES[shape]
    assert each_reference(record) == expected
    for each in expected:
        assert tokenize_record(TOKENIZER, each)[0]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"instruction": "a", "references": []}, "'references' must be a list of texts that are not empty, got"),
        ({"instruction": "a", "references": "b"}, "'references' must be a list of texts"),
        ({"instruction": "a", "output": ["b", ""]}, "'output' must be a list of texts that are not empty"),
        ({"text": "a", "references": ["b"]}, "'references' needs a prompt: give 'prompt' instead of 'text'"),
        ({"question": "a"}, "no field to train on"),
    ],
)
def test_references_that_cannot_be_read(record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        each_reference(record)


def test_prompts_of_every_shape(tmp_path: Path) -> None:
    turns = [USER, SAID, {"role": "user", "content": "again"}, {"role": "assistant", "content": "hello again"}]
    rows = [
        {"instruction": "Name it.", "output": ["one", "the other"], "id": "mine"},
        {"messages": turns},
        {"text": "only text"},
        {"messages": turns},
    ]
    first, talk, text, copy = load_prompts(write_jsonl(tmp_path / "a.jsonl", rows), TOKENIZER)
    assert first.id == "mine" and first.references == ["one", "the other"]
    assert TOKENIZER.decode(first.prompt_ids) == "<|user|>\nName it.<eos>\n<|assistant|>\n"
    for (ids, labels), record in zip(first.sequences, each_reference(rows[0]), strict=True):
        assert (ids, labels) == tokenize_record(TOKENIZER, record) and ids[: len(first.prompt_ids)] == first.prompt_ids
    assert talk.references == ["hello again"] and TOKENIZER.decode(talk.prompt_ids).endswith(
        "again<eos>\n<|assistant|>\n"
    )
    # Both answers of the conversation have labels, as in training.
    assert [talk.sequences[0]] == [tokenize_record(TOKENIZER, rows[1])]
    assert text.prompt_ids == [] and text.references == ["only text"] and text.id == f"{tmp_path / 'a.jsonl'}:3"
    assert talk.key.endswith("-1") and copy.key == talk.key.replace("-1", "-2")
    assert len(load_prompts(tmp_path / "a.jsonl", TOKENIZER, max_records=2)) == 2


def test_earlier_answers_are_read_once(tmp_path: Path) -> None:
    turns = [USER, SAID, {"role": "user", "content": "again"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns, "references": ["one", "two"]}])
    (prompt,) = load_prompts(path, TOKENIZER)
    labelled = [TOKENIZER.decode([label for label in labels if label != -100]) for _, labels in prompt.sequences]
    assert labelled == ["hello<eos>\none<eos>\n", "two<eos>\n"]


def test_tokenised_records_and_a_folder(tmp_path: Path) -> None:
    rows = token_records(3)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "saved"):
        for prompt, row in zip(load_prompts(path, TOKENIZER), rows, strict=True):
            assert prompt.sequences == [(row["input_ids"], row["labels"])]
            start = row["labels"].count(-100)
            assert prompt.prompt_ids == row["input_ids"][:start]
            assert prompt.references == [TOKENIZER.decode(row["input_ids"][start:], skip_special_tokens=True).strip()]
    bad = write_jsonl(tmp_path / "b.jsonl", [{"input_ids": [1, 2], "labels": [-100, -100]}])
    with pytest.raises(DataError, match=r"b.jsonl, row 1: no token has a label"):
        load_prompts(bad, TOKENIZER)


def test_a_fingerprint_follows_the_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    marks = {fingerprint(load_prompts(path, tiny_tokenizer(chat_template=chat), n)) for chat in (0, 1) for n in (7, 8)}
    assert len(marks) == 4


def test_names_of_sets(tmp_path: Path) -> None:
    assert set_names(["x/dolly/valid.jsonl", "y/self-inst/valid.jsonl", "z/dev.csv"]) == {
        "dolly-valid": "x/dolly/valid.jsonl", "self-inst-valid": "y/self-inst/valid.jsonl", "dev": "z/dev.csv",
    }  # fmt: skip
    assert set_names(["dolly=x/valid.jsonl", "x/other"]) == {"dolly": "x/valid.jsonl", "other": "x/other"}
    for paths, message in (
        (["a.jsonl", "./a.jsonl"], "two sets are called a: give"),
        (["x=a.jsonl", "x=b.jsonl"], "two sets are called x: give one of them another name, as NAME=b.jsonl"),
        (["x/y=a.jsonl"], "a set cannot be called 'x/y'"),
    ):
        with pytest.raises(ValueError, match=message):
            set_names(paths)


# Answers.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_is_drawn_as_often_as_it_is_likely(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([[1.0, -math.inf, 0.0, 3.0, 2.0, -20.0, -math.inf]])
    count = 20000
    numbers = random_numbers(5, [str(key) for key in range(count)], 2)
    chosen = sampling._Drawn(numbers, 4)(torch.zeros(count, 5, dtype=torch.long), scores.expand(count, -1))
    assert ((chosen == 0).sum(-1) == 1).all() and (chosen.isneginf().sum(-1) == 6).all()
    found = (chosen == 0).double().mean(0)
    expected = scores[0].double().softmax(-1)
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-3 / count).all()
    # The largest of the numbers is 1 in fp32, in which a device without fp64 computes.
    monkeypatch.setattr(sampling, "exact_dtype", lambda device: dtype)
    ends = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)
    first, last = sampling._Drawn(ends, 4)(torch.zeros(2, 4, dtype=torch.long), scores.flip(-1).expand(2, -1)).argmax(
        -1
    )
    assert (int(first), int(last)) == (1, 6)  # of those that are possible


def test_an_answer_follows_from_seed_and_prompt_alone(model: Any) -> None:
    numbers = {tuple(row.tolist()) for seed in (1, 2) for row in draws(seed).numbers}
    assert len(numbers) == 2 * len(PROMPTS) and all(0.0 <= number < 1.0 for row in numbers for number in row)
    expected = answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED)
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    for size in (1, 7):
        assert answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), max_new_tokens=6, batch_size=size) == expected
    order = random.Random(0).sample(range(len(PROMPTS)), 5)
    some = [PROMPTS[index] for index in order]
    assert answer_prompts(model, TOKENIZER, some, draws=draws(1, some), **ASKED) == [expected[i] for i in order]
    assert answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(2), **ASKED) != expected


def test_sampled_answers_are_those_of_a_plain_loop(model: Any) -> None:
    numbers = draws(3).numbers
    expected = []
    for prompt, row in zip(PROMPTS, numbers, strict=True):
        ids = list(prompt)
        for number in row.tolist():
            mass = (model(torch.tensor([ids])).logits[0, -1] / 0.7).softmax(-1).cumsum(-1)
            ids.append(int((mass <= number * mass[-1]).sum()))
            if ids[-1] == TOKENIZER.eos_token_id:
                break
        expected.append(ids[len(prompt) :])
    found = answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(3, temperature=0.7), **ASKED)
    assert found == expected


def test_greedy_is_the_limit_of_top_p_and_temperature(model: Any) -> None:
    greedy = answer_prompts(model, TOKENIZER, PROMPTS, **ASKED)
    for options in ({"top_p": 1e-6}, {"temperature": 1e-4}):
        assert answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1, **options), **ASKED) == greedy
    assert answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED) != greedy


def test_the_models_own_generation_config_is_not_read(model: Any) -> None:
    expected = answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED)
    before = model.generation_config.to_dict()
    own = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 6, "top_k": 1, "do_sample": True}
    model.generation_config.update(**own)
    try:
        assert answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED) == expected
        assert {name: getattr(model.generation_config, name) for name in own} == own
    finally:
        model.generation_config.update(**before)


def test_every_end_token_of_the_model_ends_an_answer(model: Any) -> None:
    whole = answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED)
    end = Counter(token for answer in whole for token in answer[:3]).most_common(1)[0][0]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [0, end]
    try:
        cut = answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED)
    finally:
        model.generation_config.eos_token_id = before
    assert cut == [answer[: answer.index(end) + 1] if end in answer else answer for answer in whole] != whole


def test_answers_go_on_after_a_kill_in_the_middle_of_a_line(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED)
    cache, asked, counted = tmp_path / "a.partial", list[Any](), list[int]()
    generate = sampling.generate

    def killed_at_the_second(model: Any, tokenizer: Any, prompts: Any, *args: Any) -> Any:
        asked.append(prompts)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(model, tokenizer, prompts, *args)

    monkeypatch.setattr(sampling, "generate", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), cache=cache, **ASKED)
    cache.write_text(cache.read_text() + '{"index": 4, "id')
    options = {"draws": draws(1), "cache": cache, "progress": counted.append, **ASKED}
    assert answer_prompts(model, TOKENIZER, PROMPTS, **options) == whole
    assert len(asked) == 4 and counted == [3, 3, 1] and len(cache.read_text().splitlines()) == len(PROMPTS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [None, {}, {"temperature": 0.5, "top_p": 0.5}], ids=["greedy", "sampled", "top_p"])
def test_logits_that_are_not_finite_are_refused(value: float, options: dict[str, float] | None) -> None:
    """Of one prompt alone, at its third token."""
    broken = tiny_model("llama", vocab_size=len(TOKENIZER), seed=1).eval()
    calls = list[int]()

    def spoil(module: Any, inputs: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            output[1, -1, 5] = value

    broken.lm_head.register_forward_hook(spoil)
    sampled = None if options is None else draws(1, **options)
    with pytest.raises(FloatingPointError, match="logits of the model are not finite"):
        answer_prompts(broken, TOKENIZER, PROMPTS, draws=sampled, **ASKED)


def test_a_padding_token_that_the_model_has_no_row_for(model: Any) -> None:
    """As where a tokenizer was given one, and the model no row: it means nothing, so the answers are the same."""
    expected = answer_prompts(model, TOKENIZER, PROMPTS, draws=draws(1), **ASKED)
    other = copy.deepcopy(TOKENIZER)
    other.add_special_tokens({"pad_token": "<more>"})
    assert other.pad_token_id == len(TOKENIZER) == model.get_input_embeddings().num_embeddings
    assert answer_prompts(model, other, PROMPTS, draws=draws(1), **ASKED) == expected


# Distances.


def plain_sums(student: Any, teacher: Any, sequences: list[Any]) -> Tensor:
    """The same sums from whole logits, each sequence in a forward of its own."""
    rows = []
    for ids, labels in sequences:
        targets = torch.tensor(labels[1:])
        s, t = (model(torch.tensor([ids])).logits[0, :-1].double()[targets != -100] for model in (student, teacher))
        s, t = reference.common_vocabulary(s, t)
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        q, p, targets = log_q.exp(), log_p.exp(), targets[targets != -100]
        values = {
            "forward_kl": (p * (log_p - log_q)).sum(),
            "reverse_kl": (q * (log_q - log_p)).sum(),
            "cross_entropy": -log_q.gather(-1, targets.unsqueeze(-1)).sum(),
            "agreement": (s.argmax(-1) == t.argmax(-1)).sum(),
            "entropy": -(q * log_q).sum(),
        }
        rows.append([*(values[name].item() for name in DISTANCES), float(len(targets))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2", "phi"])
@torch.no_grad()
def test_distances_equal_the_plain_formulas(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both routes: with a head that cannot be taken by itself, one sequence at a time."""
    other = 70 if architecture == "qwen2" else 64
    student = tiny_model(architecture, seed=1).double().eval()
    teacher = tiny_model(architecture, layers=2, vocab_size=other, hidden=32, seed=2).double().eval()
    sequences = [(row["input_ids"], row["labels"]) for row in token_records(11, seed=3)]
    sequences.insert(2, (sequences[0][0], [-100] * len(sequences[0][0])))  # nothing labelled
    expected = plain_sums(student, teacher, sequences)
    read: list[int] = []
    for size in (1, 3):
        found = sequence_sums(student, teacher, sequences, batch_size=size, progress=read.append)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert sum(read) == 24 and expected[2].abs().sum() == 0 and expected[:, MEASURES.index("agreement")].sum() > 0

    def none_is_plain(model: Any) -> Any:
        raise distances.NoPlainHeadError("not plain")

    monkeypatch.setattr(distances, "plain_head", none_is_plain)
    read.clear()
    found = sequence_sums(student, teacher, sequences, batch_size=3, progress=read.append)
    assert set(read) == {1}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_logits_of_few_tokens_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither model computes the logits of a batch, and none of them becomes wider than the models are."""
    student, teacher = (tiny_model("llama", layers=n, seed=n).bfloat16().eval() for n in (1, 2))
    sequences = [([5] * 200, [-100] + [5] * 199) for _ in range(4)]
    monkeypatch.setitem(distances.logits_in_chunks.__globals__, "CHUNK_BYTES", {"cpu": 1})
    seen: set[tuple[torch.Size, torch.dtype]] = set()
    measure = distances.token_measures

    def noted(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Any:
        seen.update({(logits.shape, logits.dtype) for logits in (student_logits, teacher_logits)})
        return measure(student_logits, teacher_logits, targets)

    monkeypatch.setattr(distances, "token_measures", noted)
    assert sequence_sums(student, teacher, sequences, batch_size=4)[:, -1].tolist() == [199.0] * 4
    assert max(shape[1] for shape, _ in seen) == 64 and {dtype for _, dtype in seen} == {torch.bfloat16}


@pytest.mark.parametrize("text", ["Привет, мир!", "你好", "É?", "", "…"])
def test_what_rouge_does_not_read_scores_0_against_itself(text: str) -> None:
    assert not is_readable(text) and rouge_l(text, [text]) == 0.0
    for other in (f"{text} A", f"{text}1"):
        assert is_readable(other) and rouge_l(other, [other]) == 1.0


def test_a_number_has_no_minus_in_front_of_zeros() -> None:
    numbers = (-1e-9, -0.0004, -0.0006, 0.0006, 0.0)
    assert [fixed(number, 3) for number in numbers] == ["0.000", "0.000", "-0.001", "0.001", "0.000"]
    assert [fixed(number, 3, "+") for number in numbers] == ["+0.000", "+0.000", "-0.001", "+0.001", "+0.000"]


# Models.


def test_a_model_is_known_by_its_weights(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=300, seed=1)
    mark = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == mark
    model(torch.tensor([[5, 6, 7]]))
    assert weights_fingerprint(model.train()) == mark
    marks = {mark, weights_fingerprint(tiny_model("llama", vocab_size=300, seed=2)), weights_fingerprint(model.half())}
    assert len(marks) == 3
    for name, tensor in tiny_model("llama", vocab_size=300, seed=1).state_dict().items():
        changed = tiny_model("llama", vocab_size=300, seed=1)
        changed.load_state_dict({**changed.state_dict(), name: tensor * 1.001})  # as a step of training would
        marks.add(weights_fingerprint(changed))
    assert len(marks) == 3 + len(model.state_dict())


def test_positions_that_grow_are_no_other_model() -> None:
    """With dynamic NTK, a long text changes the frequencies that the model holds."""
    model = tiny_model("llama")
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 8
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = type(model)(config).eval()
    mark, before = weights_fingerprint(model), model.model.rotary_emb.inv_freq.clone()
    model(torch.arange(5, 25).unsqueeze(0))
    assert not torch.equal(model.model.rotary_emb.inv_freq, before) and weights_fingerprint(model) == mark


def test_weights_of_every_kind_are_read() -> None:
    def mark(tensor: Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer("weight", tensor)
        return weights_fingerprint(module)

    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool):
        assert mark(torch.ones(3, 5).to(dtype)) != mark(torch.zeros(3, 5).to(dtype)), dtype
    assert mark(torch.ones(2, 3)) != mark(torch.ones(3, 2)) and mark(torch.ones(0, 3)) != mark(torch.ones(0, 2))
    assert mark(torch.arange(6.0).view(2, 3).t()) == mark(torch.arange(6.0).view(2, 3).t().contiguous())
    assert mark(torch.tensor(1.0)) != mark(torch.tensor(2.0))
    # 1,024 entries of a large one, and not all of one column.
    large = torch.zeros(4096, 512)
    seen = torch.zeros(large.shape)
    seen.view(-1)[:: (large.numel() // 1024) | 1] = 1.0
    assert mark(large) == mark(1.0 - seen) != mark(seen) and seen.sum() < 1025 and (seen.sum(0) > 0).all()
    with torch.device("meta"):
        assert mark(torch.empty(3)) == mark(torch.empty(3)) != mark(torch.empty(4))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        parts = [DTensor.from_local(torch.full((2, 3), value), mesh, [Shard(0)]) for value in (1.0, 1.0, 2.0)]
        assert mark(parts[0]) == mark(parts[1]) != mark(parts[2])
    finally:
        torch.distributed.destroy_process_group()


# Scores and intervals.


def test_rouge_is_that_of_the_package_stemmed_and_best_over_references() -> None:
    assert rouge_l("the cats ran", ["cat runs", "the cat ran"]) == 1.0
    assert rouge_l("", ["a"]) == rouge_l("b", ["a"]) == 0.0
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    words = ["the", "a", "cat", "cats", "running", "run", "of", "house", "houses,", "in", "1999"]
    rng = random.Random(0)
    for _ in range(20):
        answer, *references = (" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(4))
        best = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
        assert rouge_l(answer, references) == best > 0


def test_an_interval_is_that_of_the_normal_law_where_it_holds() -> None:
    torch.manual_seed(0)
    values = (3.0 + 2.0 * torch.randn(400, dtype=torch.float64)).tolist()
    found = intervals.estimate(values)
    assert found.mean == pytest.approx(mean(values))
    error = 1.96 * torch.tensor(values).std().item() / 20
    assert found.low is not None and found.high is not None
    assert found.mean - found.low == pytest.approx(error, rel=0.1) == found.high - found.mean
    assert intervals.estimate(values) == found
    assert intervals.estimate([2.0] * 5) == (2.0, 2.0, 2.0) and intervals.estimate([2.0]) == (2.0, None, None)
    with pytest.raises(ValueError, match="a prompt at least"):
        intervals.estimate([])


def test_a_mean_over_tokens_draws_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    totals, tokens = [3.0, 40.0, 5.0, 1.0], [1, 20, 4, 1]
    monkeypatch.setattr(intervals, "DRAWS", 300)
    found = intervals.estimate(totals, tokens)
    drawn = torch.randint(4, (300, 4), generator=torch.Generator().manual_seed(0)).tolist()
    ratios = sorted(sum(totals[i] for i in row) / sum(tokens[i] for i in row) for row in drawn)
    low, high = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    assert found == pytest.approx((49 / 26, low, high))
    monkeypatch.setattr(intervals, "NUMBERS", 50)  # a few draws at a time
    assert intervals.estimate(totals, tokens) == found


def test_shipped_shapes_of_the_module_are_read(tmp_path: Path) -> None:
    """What `adakd train` takes as it is."""
    path = write_jsonl(tmp_path / "a.jsonl")
    for prompt, row in zip(load_prompts(path, TOKENIZER), INSTRUCTIONS, strict=True):
        assert prompt.references == [row["output"]] and prompt.sequences == [tokenize_record(TOKENIZER, row)]
        assert json.loads(json.dumps(prompt.id)) == prompt.id
