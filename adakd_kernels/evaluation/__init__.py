"""How good a student is: its own answers against references, and how far it is from its teacher on them.

sets = {"dolly": load_prompts("valid.jsonl", tokenizer)}
results = evaluate(student, tokenizer, sets, Settings(seeds=(10, 20)), teacher=teacher, folder="runs/first/dolly")
"""

from __future__ import annotations

from .compare import Difference, compare
from .evaluate import FOUND, Settings, evaluate
from .prompts import Prompt, load_prompts

__all__ = ["FOUND", "Difference", "Prompt", "Settings", "compare", "evaluate", "load_prompts"]
