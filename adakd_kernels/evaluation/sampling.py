"""Answers of a model: greedy, or sampled so that each depends on the seed and its prompt, and not on the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..adaptive import exact_dtype
from ..trainer.models import vocabulary_size

__all__ = ["Draws", "answer_prompts", "generate", "random_numbers"]


@dataclass(frozen=True)
class Draws:
    """How answers are sampled.

    Attributes:
        numbers: for each prompt a number in [0, 1) for each token of its answer, (N, T) fp64.
        temperature: divides the logits.
        top_p: the most likely tokens of this mass are left; 1: all.
    """

    numbers: Tensor
    temperature: float = 1.0
    top_p: float = 1.0


def random_numbers(seed: int, keys: Sequence[str], length: int) -> Tensor:
    """Numbers in [0, 1), (N, length) fp64; a row depends on the seed and its key alone."""
    rows = []
    for key in keys:
        digest = sha256(f"{seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows.append(torch.rand(length, dtype=torch.float64, generator=generator))
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.float64)


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    draws: Draws | None = None,
    repetition_penalty: float = 1.0,
    cache: Path | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[list[int]]:
    """Answer every prompt, and keep the answers in `cache` as they come.

    Prompts of similar length share a batch. The batches depend on the prompts alone, so that a run that was stopped
    goes on with the next batch and ends with the answers of an unbroken one.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: length limit of an answer.
        batch_size: prompts answered together.
        draws: None takes the most likely token each time.
        repetition_penalty: divides the scores of the tokens already there, in prompt and answer; 1 is none.
        cache: a JSONL file to continue and to write; its name must change when the answers would. None keeps nothing.
        progress: called with how many answers there are more.

    Returns:
        Of each prompt, the ids of its answer up to and with the end token.

    Raises:
        FloatingPointError: logits that are not finite where a token is to be chosen.
    """
    answers = {} if cache is None else _read_cache(cache)
    progress(len(answers))
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    for start in range(0, len(order), batch_size):
        batch = [index for index in order[start : start + batch_size]]
        if all(index in answers for index in batch):
            continue
        own = None if draws is None else Draws(draws.numbers[batch], draws.temperature, draws.top_p)
        generated = generate(
            model, tokenizer, [prompts[index] for index in batch], max_new_tokens, own, repetition_penalty
        )
        new = {index: ids for index, ids in zip(batch, generated, strict=True) if index not in answers}
        answers.update(new)
        if cache is not None:
            _add_to_cache(cache, new)
        progress(len(new))
    return [answers[index] for index in range(len(prompts))]


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draws: Draws | None = None,
    repetition_penalty: float = 1.0,
) -> list[list[int]]:
    """A continuation of each prompt as ids up to and with the end token; see `answer_prompts`.

    What the model's own generation configuration says about sampling is not read: two models are asked alike.
    """
    width = max(len(prompt) for prompt in prompts)
    ends = _end_tokens(model, tokenizer)
    pad, rows = tokenizer.pad_token_id, vocabulary_size(model)
    if pad is None or (rows is not None and pad >= rows):
        pad = 0  # any id that the model has: padding is masked
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    finite = _Finite()
    processors: list[Any] = [finite]
    if draws is not None:
        if draws.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(draws.temperature))
        if draws.top_p < 1.0:
            processors.append(TopPLogitsWarper(draws.top_p))
        processors.append(_Drawn(draws.numbers, width))
    options = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=repetition_penalty,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    with _own_generation_config(model, options):
        output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList(processors))
    if not finite.so_far:
        raise FloatingPointError("the logits of the model are not finite: no token can be chosen by them")
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


class _Finite(LogitsProcessor):
    """Notes on the device whether each token could be chosen, so that nobody waits for it until the end."""

    so_far: Tensor | bool = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.so_far = scores.amax(-1).isfinite().all() & self.so_far  # NaN or inf; all -inf
        return scores


class _Drawn(LogitsProcessor):
    """Leaves of each row the one token that the row's own random number picks from the distribution."""

    def __init__(self, numbers: Tensor, width: int) -> None:
        self.numbers, self.width = numbers, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        dtype = exact_dtype(scores.device)
        mass = scores.softmax(-1, dtype=dtype).cumsum(-1)
        total = mass[:, -1:]
        number = self.numbers[:, input_ids.shape[1] - self.width, None].to(scores.device, dtype)
        # Below the total, so that the token found has a mass.
        point = torch.minimum(number * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(mass, point, right=True).clamp_max(scores.shape[-1] - 1)  # V where there is a NaN
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


@contextmanager
def _own_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`config` in the place of the model's, which fills in what a caller leaves out."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = owner.generation_config
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = before


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: those of the model and that of the tokenizer."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = named if isinstance(named, (list, tuple)) else [named]
    return sorted({index for index in (*ids, tokenizer.eos_token_id) if index is not None})


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    # The padding token may be an end token, so the first one ends the answer.
    first = next((place for place, index in enumerate(ids) if index in ends), len(ids))
    return ids[: first + 1]


def _read_cache(path: Path) -> dict[int, list[int]]:
    """What a cache holds; a last line that a killed run left unfinished is taken off."""
    if not path.is_file():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["index"]: row["ids"] for row in rows}


def _add_to_cache(path: Path, answers: dict[int, list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"index": index, "ids": ids}) + "\n" for index, ids in answers.items())
