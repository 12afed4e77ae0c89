"""How far a student is from its teacher, on answers that neither run has trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.distances import DISTANCES, head_options, labelled_states, measures_of_states, pad_batch
from ..evaluation.rouge import rouge_l as best_rouge_l
from ..trainer.heads import output_head
from .answers import Answer


@dataclass(frozen=True)
class Distance:
    """Means over the answer tokens of a set of answers, at temperature 1, in nats per token."""

    forward_kl: float
    reverse_kl: float
    cross_entropy: float
    tokens: int


def answer_states(model: Any, answers: Sequence[Answer], *, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states that predict the answers' tokens, and these tokens.

    Only these positions go through the head later: the prompts make up half of the tokens, and the head a third of the
    work of a small model.

    Args:
        model: a causal language model of transformers.
        answers: prompts with the answers to read after them; an empty answer contributes nothing.
        batch_size: sequences in one forward pass.

    Returns:
        `(N, H)` hidden states in the model's type and `(N,)` token ids, in an order that depends on the answers alone.
    """
    # Similar lengths share a batch.
    sequences = sorted((answer.labelled() for answer in answers), key=lambda sequence: len(sequence[0]))
    batches = (sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size))
    states, tokens = zip(*(labelled_states(model, *pad_batch(batch)) for batch in batches), strict=True)
    return torch.cat(states), torch.cat(tokens)


@torch.inference_mode()
def distance(
    student: Any,
    teacher: Any,
    answers: Sequence[Answer],
    *,
    batch_size: int,
    teacher_states: torch.Tensor | None = None,
) -> Distance:
    """Mean divergences of the student from the teacher, and the student's cross-entropy, over the answers' tokens.

    forward KL = Σ p (log p − log q), reverse KL = Σ q (log q − log p) and cross-entropy = −log q of the answer's token,
    where p is the teacher and q the student, both reading the same prompt and the same beginning of the answer.

    Args:
        student: the model to measure.
        teacher: the model to measure against, with the same vocabulary.
        answers: prompts and answers, usually the teacher's.
        batch_size: sequences in one forward pass.
        teacher_states: what `answer_states(teacher, answers)` returned earlier, `(N, H)`; None computes it.

    Raises:
        ValueError: no answer has a token.
    """
    states, tokens = answer_states(student, answers, batch_size=batch_size)
    if teacher_states is None:
        teacher_states, _ = answer_states(teacher, answers, batch_size=batch_size)
    if len(tokens) == 0:
        raise ValueError("no answer has a token: expected at least one, so give answers that are not all empty")
    after = head_options(student, teacher)
    sums = measures_of_states(
        (states, output_head(student), after[0]), (teacher_states, output_head(teacher), after[1]), tokens
    ).sum(0)
    means = dict(zip(DISTANCES, (sums[:-1] / sums[-1]).tolist(), strict=True))
    return Distance(means["forward_kl"], means["reverse_kl"], means["cross_entropy"], len(tokens))


def rouge_l(answers: Sequence[Answer], references: Sequence[Answer]) -> float:
    """Mean ROUGE-L F-measure of the answers against the references, in [0, 1], on stemmed words.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"expected as many answers as references, got {len(answers)} and {len(references)}")
    scores = [
        best_rouge_l(answer.text, [reference.text]) for answer, reference in zip(answers, references, strict=True)
    ]
    return sum(scores) / len(scores)
