"""ROUGE-L as the package rouge-score has it, on stemmed words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

__all__ = ["is_readable", "rouge_l"]


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The F-measure of an answer against the reference that it is closest to, in [0, 1]."""
    return float(_scorer().score_multi(references, answer)["rougeL"].fmeasure)


def is_readable(text: str) -> bool:
    """Whether a text has a word for rouge-score, which lower-cases it and reads the letters a to z and digits alone."""
    return re.search("[a-z0-9]", text.lower()) is not None
