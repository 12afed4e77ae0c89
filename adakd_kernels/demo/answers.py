"""Instructions, prompts and answers: what the teacher says once, and what a student says at the end."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .config import DemoConfig, DemoError
from .progress import bar


@dataclass(frozen=True)
class Record:
    """One instruction, with an input that may be empty; `split` is "train" or "held_out"."""

    category: str
    instruction: str
    input: str
    split: str

    def request(self) -> str:
        """What the user says: the instruction, and the input below it."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Answer:
    """One answered prompt: token ids of both, without padding; the answer's end token included where it ended."""

    prompt_ids: list[int]
    answer_ids: list[int]
    text: str


def load_instructions(config: DemoConfig) -> tuple[list[Record], list[Record]]:
    """Read the instructions, `(train, held_out)`, at most as many as the configuration asks for.

    Raises:
        DemoError: the file is missing, a line is no record, or a split is empty.
    """
    shipped = importlib.resources.files("adakd_kernels") / "demo" / "instructions.jsonl"
    source = Path(config.instructions) if config.instructions is not None else shipped
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
        records = [Record(**json.loads(line)) for line in lines if line.strip()]
    except FileNotFoundError:
        raise DemoError(f"no instructions at {source}: install the package again, or give a JSONL file") from None
    except (TypeError, ValueError) as error:
        raise DemoError(
            f'{source}: each line must be {{"category", "instruction", "input", "split"}}: {error}'
        ) from error
    train = [record for record in records if record.split == "train"][: config.train_records]
    held_out = [record for record in records if record.split == "held_out"][: config.held_out_records]
    if not train or not held_out:
        raise DemoError(f'{source}: expected records of both splits, "train" and "held_out"')
    return train, held_out


def prompt_ids(tokenizer: Any, record: Record) -> list[int]:
    """Token ids of the request in the model's chat template, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": record.request()}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_fingerprint(teacher: str, records: Sequence[Record], settings: dict[str, Any]) -> str:
    """16 hex digits that change when the teacher, the instructions or the settings of the generation change."""
    content = json.dumps([teacher, [asdict(record) for record in records], settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def answer_records(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    repetition_penalty: float,
    batch_size: int,
    cache: Path | None = None,
    label: str = "answers",
) -> list[Answer]:
    """Answer every record greedily, with progress, and keep the answers in `cache` as they come.

    Greedy answers need no seed, and a student's greedy answers are compared with them. Small models repeat themselves
    in greedy answers; a mild repetition penalty ends that. Prompts of similar length share a batch. The batches depend
    on the records alone, so that a run that was stopped goes on with the next batch and ends with the answers that an
    unbroken run has.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, padding on the left.
        records: what to answer.
        max_new_tokens: length limit of an answer.
        repetition_penalty: divides the scores of the tokens already there, in prompt and answer; 1 is none.
        batch_size: prompts answered together.
        cache: a JSONL file to continue and to write; its name must change when the answers would. None keeps nothing.
        label: what the progress bar says.

    Returns:
        One answer per record, in the order of `records`.
    """
    prompts = [prompt_ids(tokenizer, record) for record in records]
    answers = _read_cache(cache) if cache is not None else {}
    order = sorted(range(len(records)), key=lambda index: (len(prompts[index]), index))
    with bar(len(records), label, "answer", done=len(answers)) as progress:
        for batch in _chunks(order, batch_size):
            if all(index in answers for index in batch):
                continue
            generated = generate_greedy(
                model, tokenizer, [prompts[index] for index in batch], max_new_tokens, repetition_penalty
            )
            for index, ids in zip(batch, generated, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                answers[index] = Answer(prompts[index], ids, text)
            if cache is not None:
                _write_cache(cache, answers)
            progress.update(len(batch))
    return [answers[index] for index in range(len(records))]


@torch.inference_mode()
def generate_greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, repetition_penalty: float = 1.0
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token, as ids up to and with the end token."""
    width = max(len(prompt) for prompt in prompts)
    device, pad = model.device, tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        do_sample=False,
        pad_token_id=pad,
    )
    return [_until_end(row, tokenizer.eos_token_id) for row in output[:, width:].tolist()]


def _until_end(ids: list[int], end: int) -> list[int]:
    # The padding token may be the end token, so the first one ends the answer.
    return ids[: ids.index(end) + 1] if end in ids else ids


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _read_cache(path: Path) -> dict[int, Answer]:
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row.pop("index"): Answer(**row) for row in rows}


def _write_cache(path: Path, answers: dict[int, Answer]) -> None:
    # Written whole beside the file and moved over it: a reader, or a run that was killed, never sees half a line.
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    rows = (json.dumps({"index": index, **asdict(answers[index])}, ensure_ascii=False) for index in sorted(answers))
    partial.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)
