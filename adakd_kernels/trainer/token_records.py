"""What a few records' tokens are to the loss before and after training, for `adakd report`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..adaptive import descending, inverse_difficulty_temperature, select_tokens
from .records import IGNORE_INDEX
from .sharded import reshard
from .token_file import read_tokens, write_tokens

__all__ = ["TokenRecords", "token_texts"]

MOST_TOKENS = 512
"""Tokens with a label that are written of a record. The choice among them is made over all."""
MOST_PROMPT = 1000
"""Characters that are written of what stands between two tokens with a label, from its end."""
WINDOW = 4
"""Tokens that are decoded in front of a token: some tokenizers write a word's space only behind another word."""


class _Record(NamedTuple):
    name: str
    source: str  # "eval" or "train"
    batch: Any  # the record alone, as the collator makes it


class _Measured(NamedTuple):
    ids: list[int]  # (L,) those that are no padding
    labelled: list[bool]  # (L,)
    difficulty: Tensor  # (n,) fp32 on the CPU, n the number of labelled tokens
    valid: Tensor  # (n,) bool


class TokenRecords(TrainerCallback):
    """Measures the first `args.token_records` records at the beginning, at each evaluation in training and at its end.

    Records of the evaluation sets, in turn; where there is no such set with a length, of the training set. The lines of
    the beginning and of the last measurement are kept (`token_file`); a resumed run keeps those of its beginning.

    A line has `step`, `source` ("eval" or "train"), `record` (its id), `measure` (of difficulty), `focus_ratio`,
    `tokens`, `of` (tokens with a label of all these records) and `left_out` (tokens at the end that were not written).
    A token has `text` and, where it has a label, `difficulty`, `temperature`, `rank` (1: the hardest of `of`) and
    `selected`: over the tokens of all these records, at the share r of that step. Numbers that are not finite are null.

    Args:
        trainer: the `AdaKDTrainer`, whose callback this is.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._records: list[_Record] | None = None
        self._step: int | None = None  # of the last measurement

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure; of a run that is resumed, this is the last measurement until the next."""
        self._records = None
        self._measure_and_write(state.global_step)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, once for all sets of an evaluation."""
        if self.trainer.is_in_train and state.global_step != self._step:
            self._measure_and_write(state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the model that the run leaves, which may be that of its best checkpoint."""
        step = (state.best_global_step if args.load_best_model_at_end else None) or state.global_step
        if step != self._step:
            self._measure_and_write(step)

    def _written(self) -> list[dict[str, Any]]:
        try:
            return read_tokens(self.trainer.args.output_dir)
        except (OSError, ValueError):
            return []

    def _measure_and_write(self, step: int) -> None:
        if self._records is None:
            self._records = self._choose()
        self._step = step
        lines = self._lines(step)
        if self.trainer.is_world_process_zero() and lines:
            written = self._written()
            kept = [line for line in written if line["step"] == written[0]["step"] < step]  # none in a new run
            write_tokens(self.trainer.args.output_dir, kept + lines)

    def _choose(self) -> list[_Record]:
        """The records, alike on all processes."""
        trainer = self.trainer
        collate = trainer.collator_of_records()
        for source, data in (("eval", trainer.eval_dataset), ("train", trainer.train_dataset)):
            sets = list(data.values()) if isinstance(data, dict) else [data]
            # A stream is not read for this: it may give each record but once.
            sets = [s for s in sets if hasattr(s, "__len__") and not isinstance(s, IterableDataset)]
            in_turn = ((s, row) for row in range(max(map(len, sets), default=0)) for s in sets if row < len(s))
            records = [(row, s[row]) for s, row in islice(in_turn, trainer.args.token_records)]
            if records:
                return [_Record(str(record.get("id", row)), source, collate([record])) for row, record in records]
        return []

    def _lines(self, step: int) -> list[dict[str, Any]]:
        """Measure; on all processes, because they may share the models."""
        trainer, args = self.trainer, self.trainer.args
        # DeepSpeed gathers the parameters inside its engine's forward. A compiled one would compile each length anew.
        model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        was_training = model.training
        model.eval()
        try:
            found = [_measured(trainer, model, record.batch) for record in self._records or ()]
        finally:
            model.train(was_training)
        if not sum(len(each.valid) for each in found):
            return []
        reshard(trainer.model)
        difficulty, valid = torch.cat([each.difficulty for each in found]), torch.cat([each.valid for each in found])
        focus_ratio = float(trainer.loss_fn.focus_ratio)
        selected = select_tokens(difficulty, focus_ratio, valid)
        temperature = inverse_difficulty_temperature(
            difficulty, selected, args.temperature_scale, args.base_temperature
        )
        rank = torch.empty(len(difficulty), dtype=torch.long)
        rank[descending(difficulty, valid).indices] = torch.arange(1, len(difficulty) + 1)
        columns = zip(difficulty.tolist(), temperature.tolist(), rank.tolist(), selected.tolist(), strict=True)
        numbers = iter(columns)
        lines = []
        for record, each in zip(self._records or (), found, strict=True):
            own = list(islice(numbers, len(each.valid)))
            lines.append(
                {
                    "step": step,
                    "source": record.source,
                    "record": record.name,
                    "measure": args.difficulty,
                    "focus_ratio": focus_ratio,
                    "of": len(difficulty),
                    "left_out": max(0, len(own) - MOST_TOKENS),
                    "tokens": _tokens(getattr(trainer.processing_class, "decode", None), each, own),
                }
            )
        return lines


def _measured(trainer: Any, model: Any, batch: Any) -> _Measured:
    """The ids and difficulties of a record."""
    batch = trainer._prepare_inputs(batch)
    _, targets, _ = trainer._taken_apart(batch)
    found = trainer.measure_micro_batch(model, batch)
    labelled = batch["labels"].flatten() != IGNORE_INDEX
    labelled[0] = False
    shown = labelled.clone()
    shown[: int(labelled.nonzero().max()) + 1 if labelled.any() else 0] = True  # behind it, there is padding at most
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == batch["labels"].shape:
        shown &= labelled | (mask.flatten() != 0)
    of_label = targets != IGNORE_INDEX
    return _Measured(
        batch["input_ids"].flatten()[shown].tolist(),
        labelled[shown].tolist(),
        found.difficulty[of_label.to(found.difficulty.device)].float().cpu(),
        found.valid[of_label.to(found.valid.device)].cpu(),
    )


def _tokens(
    decode: Callable[[list[int]], str] | None, measured: _Measured, numbers: list[tuple[float, float, int, bool]]
) -> list[dict[str, Any]]:
    """A record's tokens; what has no label between two that have one is one text."""
    tokens: list[dict[str, Any]] = []
    remaining = iter(numbers[:MOST_TOKENS])
    for text, labelled in zip(token_texts(decode, measured.ids), measured.labelled, strict=True):
        if labelled:
            values = next(remaining, None)
            if values is None:
                break
            difficulty, temperature, rank, selected = values
            tokens.append(
                {
                    "text": text,
                    "difficulty": difficulty if math.isfinite(difficulty) else None,
                    "temperature": temperature if math.isfinite(temperature) else None,
                    "rank": rank,
                    "selected": selected,
                }
            )
        elif tokens and "rank" not in tokens[-1]:
            tokens[-1]["text"] += text
        else:
            tokens.append({"text": text})
    for token in tokens:
        if "rank" not in token and len(token["text"]) > MOST_PROMPT:
            token["text"] = "… " + token["text"][-MOST_PROMPT:]
    return tokens


def token_texts(decode: Callable[[list[int]], str] | None, ids: list[int]) -> list[str]:
    """The text of each token; put together, they are the text of all.

    A character of several tokens belongs to the last of them, and the others are empty. Without `decode`, the text of a
    token is its id.
    """
    if decode is None:
        return [f"{token} " for token in ids]
    texts, start, before = [], 0, ""
    for end, token in enumerate(ids, start=1):
        now = decode(ids[start:end])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :] if now.startswith(before) else decode([token]))
        start = max(start, end - WINDOW)
        before = decode(ids[start:end])
    return texts
