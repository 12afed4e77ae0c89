"""Instructions, prompts and answers: what the teacher says once, and what a student says at the end."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..evaluation.progress import bar
from ..evaluation.sampling import Draws, answer_prompts, random_numbers
from ..trainer.records import IGNORE_INDEX
from .config import DemoConfig, DemoError


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

    def labelled(self) -> tuple[list[int], list[int]]:
        """The tokens of both, and as many labels, −100 in the prompt."""
        return self.prompt_ids + self.answer_ids, [IGNORE_INDEX] * len(self.prompt_ids) + self.answer_ids


def load_instructions(config: DemoConfig) -> tuple[list[Record], list[Record]]:
    """Read the instructions, `(train, held_out)`, at most as many as the configuration asks for.

    Raises:
        DemoError: the file is missing, a line is no record, or a split is empty.
    """
    shipped = importlib.resources.files("adakd_kernels") / "demo" / "instructions.jsonl"
    source = Path(config.instructions) if config.instructions is not None else shipped
    try:
        lines = source.read_bytes().splitlines()  # of bytes: a text's also ends a line at U+2028
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
    batch_size: int,
    repetition_penalty: float = 1.0,
    sampling_seed: int | None = None,
    cache: Path | None = None,
    label: str = "answers",
) -> list[Answer]:
    """Answer every record, with progress, and keep the answers in `cache` as they come.

    Small models repeat themselves in greedy answers; a mild repetition penalty ends that.

    Args:
        model, tokenizer, max_new_tokens, repetition_penalty, batch_size, cache: as in `answer_prompts`.
        records: what to answer.
        sampling_seed: of answers sampled at temperature 1; None takes the most likely token each time.
        label: what the progress bar says.

    Returns:
        One answer per record, in the order of `records`.
    """
    prompts = [prompt_ids(tokenizer, record) for record in records]
    draws = None
    if sampling_seed is not None:
        keys = [record.request() for record in records]
        draws = Draws(random_numbers(sampling_seed, keys, max_new_tokens), temperature=1.0, top_p=1.0)
    with bar(len(records), label, "answer") as progress:
        answers = answer_prompts(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            draws=draws,
            repetition_penalty=repetition_penalty,
            cache=cache,
            progress=progress.update,
        )
    texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers)
    return [Answer(*each) for each in zip(prompts, answers, texts, strict=True)]
