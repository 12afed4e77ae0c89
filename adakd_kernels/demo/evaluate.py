"""How far a student is from its teacher, on answers that neither run has trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..functional import token_divergence
from ..trainer.records import IGNORE_INDEX
from .answers import Answer

TOKENS_PER_CHUNK = 1024
"""Answer tokens whose logits exist at the same time."""


@dataclass(frozen=True)
class Distance:
    """Means over the answer tokens of a set of answers, at temperature 1, in nats per token."""

    forward_kl: float
    reverse_kl: float
    cross_entropy: float
    tokens: int


@torch.inference_mode()
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
    states, tokens = [], []
    for batch in _batches(answers, batch_size):
        ids, attention, targets = (tensor.to(model.device) for tensor in pad_batch(batch))
        hidden = model.get_decoder()(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        labelled = targets >= 0
        states.append(hidden[labelled])
        tokens.append(targets[labelled])
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
    student_head, teacher_head = student.get_output_embeddings(), teacher.get_output_embeddings()
    forward = reverse = entropy = 0.0
    for start in range(0, len(tokens), TOKENS_PER_CHUNK):
        rows = slice(start, start + TOKENS_PER_CHUNK)
        logits, teacher_logits = student_head(states[rows]), teacher_head(teacher_states[rows])
        forward += token_divergence(logits, teacher_logits, 1.0, divergence="forward_kl").double().sum().item()
        reverse += token_divergence(logits, teacher_logits, 1.0, divergence="reverse_kl").double().sum().item()
        entropy += F.cross_entropy(logits.float(), tokens[rows], reduction="sum").item()
    return Distance(forward / len(tokens), reverse / len(tokens), entropy / len(tokens), len(tokens))


def rouge_l(answers: Sequence[Answer], references: Sequence[Answer]) -> float:
    """Mean ROUGE-L F-measure of the answers against the references, in [0, 1], on stemmed words.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    from rouge_score import rouge_scorer

    if not answers or len(answers) != len(references):
        raise ValueError(f"expected as many answers as references, got {len(answers)} and {len(references)}")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(reference.text, answer.text) for answer, reference in zip(answers, references, strict=True)]
    return sum(float(score["rougeL"].fmeasure) for score in scores) / len(scores)


def pad_batch(answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts with their answers, padded on the right to one length L.

    Returns:
        `(B, L)` token ids, `(B, L)` attention mask and `(B, L)` targets: the answer's token that a position predicts,
        −100 elsewhere. Padding is masked, so its id (0) means nothing.
    """
    length = max(len(answer.prompt_ids) + len(answer.answer_ids) for answer in answers)
    ids = torch.zeros(len(answers), length, dtype=torch.long)
    attention = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORE_INDEX)
    for row, answer in enumerate(answers):
        sequence = answer.prompt_ids + answer.answer_ids
        ids[row, : len(sequence)] = torch.tensor(sequence)
        attention[row, : len(sequence)] = 1
        first = len(answer.prompt_ids) - 1
        targets[row, first : first + len(answer.answer_ids)] = torch.tensor(answer.answer_ids)
    return ids, attention, targets


def _batches(answers: Sequence[Answer], size: int) -> Iterator[list[Answer]]:
    # Similar lengths share a batch; the stable sort makes the order a matter of the answers alone.
    ordered = sorted(answers, key=lambda answer: len(answer.prompt_ids) + len(answer.answer_ids))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
