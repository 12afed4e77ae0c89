"""ROUGE-L as the package rouge-score has it, on stemmed words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["rouge_l"]


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The F-measure of an answer against the reference that it is closest to, in [0, 1]."""
    return float(_scorer().score_multi(references, answer)["rougeL"].fmeasure)
