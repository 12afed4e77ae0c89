"""Whose completions a step learns from: the data's, the student's own, or own ones of earlier steps."""

from __future__ import annotations

import json
import random
from collections import deque
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

__all__ = ["PolicyCallback", "ReplayBuffer", "Source", "choose_source", "completion_of_data"]

LMBDA_STEP = 0.1
"""By how much λ rises at an evaluation whose loss has risen; of DistiLLM (Ko et al., arXiv 2402.03898), its code."""
LOSS_EPSILON = 0.1
"""By how much the loss must have risen; likewise."""


class Source(Enum):
    """Where the completions of a step come from."""

    STUDENT = "student"
    REPLAY = "replay"
    DATA = "data"


def choose_source(draw: float, lmbda: float, progress: float, replays: bool, buffer_full: bool) -> Source:
    """The source of a step's completions.

    Without a buffer GKD's rule (arXiv 2306.13649): the student's with probability λ, else the data's. With one,
    DistiLLM's: of the share λ of steps that learn from the student's completions, a part that grows with the run takes
    them from the buffer, once it is full.

    Args:
        draw: uniform in [0, 1).
        lmbda: λ in [0, 1].
        progress: the part of the optimizer steps that is done, in [0, 1].
        replays: whether there is a buffer.
        buffer_full: whether it has as many completions as it holds.
    """
    if draw >= lmbda:
        return Source.DATA
    if replays and buffer_full and draw >= lmbda * (1.0 - progress):
        return Source.REPLAY
    return Source.STUDENT


class ReplayBuffer:
    """The last `capacity` prompts with the completions that the student sampled, as token ids, of this process."""

    def __init__(self, capacity: int) -> None:
        self.records: deque[tuple[list[int], list[int]]] = deque(maxlen=capacity)

    @property
    def full(self) -> bool:
        """Whether a further one replaces the oldest."""
        return len(self.records) == self.records.maxlen

    def add(self, prompts: list[list[int]], completions: list[list[int]]) -> None:
        """Keep these."""
        self.records.extend(zip(prompts, completions, strict=True))

    def sample(self, count: int, rng: random.Random) -> list[tuple[list[int], list[int]]]:
        """`count` of them, without one twice where there are enough."""
        records = list(self.records)
        return rng.sample(records, count) if count <= len(records) else rng.choices(records, k=count)

    def save(self, file: Path) -> None:
        """Write them, the oldest first."""
        file.write_text(json.dumps([*self.records]), encoding="utf-8")

    def load(self, file: Path) -> None:
        """Add what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
        """
        self.records.extend((prompt, completion) for prompt, completion in json.loads(file.read_text(encoding="utf-8")))


class PolicyCallback(TrainerCallback, ExportableState):
    """λ over a run; part of trainer_state.json in a checkpoint.

    Attributes:
        lmbda: the λ of the next step.
        last_loss: the loss of evaluation that the next one is compared with, None before the first.
    """

    def __init__(self, lmbda: float = 1.0, adaptive: bool = False) -> None:
        self.lmbda, self.adaptive = lmbda, adaptive
        self.last_loss: float | None = None

    def state(self) -> dict[str, Any]:
        """λ and the loss it was last changed at."""
        return {
            "args": {"lmbda": self.lmbda, "adaptive": self.adaptive},
            "attributes": {"lmbda": self.lmbda, "last_loss": self.last_loss},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore λ on resumption."""
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        if self.adaptive and saved:
            self.lmbda, self.last_loss = saved["lmbda"], saved["last_loss"]

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Raise λ where the loss of evaluation has risen: the student then leaves what the data shows."""
        loss = (metrics or {}).get("eval_loss")
        if not self.adaptive or loss is None:
            return
        if self.last_loss is None:
            self.last_loss = loss
        elif loss >= self.last_loss + LOSS_EPSILON:
            self.lmbda, self.last_loss = min(1.0, self.lmbda + LMBDA_STEP), loss


def completion_of_data(
    row: dict[str, Any], prompt_ids: list[int], processing_class: Any, eos_token_ids: list[int], limit: int | None,
    **template: Any,
) -> list[int]:  # fmt: skip
    """Token ids of a row's `completion` after those of its prompt, with the end-of-text, at most `limit` of them.

    Args:
        row: `prompt` and `completion`, texts or lists of messages.
        prompt_ids: the prompt as the student gets it.
        processing_class: the tokenizer.
        eos_token_ids: what ends a completion; nothing is kept behind the first of them.
        limit: length limit; a longer completion loses its end.
        **template: options of the chat template.

    Raises:
        ValueError: there is no completion, or the chat template writes the prompt of an answered text in another way.
    """
    completion = row.get("completion")
    if not completion:
        raise ValueError(
            f"lmbda below 1 learns from data: each prompt needs a completion, got {sorted(row)}; set lmbda to 1"
        )
    if isinstance(completion, str):
        ids = list(processing_class(text=completion, add_special_tokens=False)["input_ids"])
        ids.append(processing_class.eos_token_id)
    else:
        answered = processing_class.apply_chat_template(
            [*row["prompt"], *completion], tokenize=True, return_dict=True, **template
        )["input_ids"]
        if answered[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "the chat template writes the prompt of an answered conversation in another way than the prompt alone, "
                "so that the completion cannot be told from it: give prompt and completion as texts"
            )
        ids = answered[len(prompt_ids) :]
    end = next((index for index, token in enumerate(ids) if token in eos_token_ids), len(ids))
    return ids[: end + 1][:limit]
