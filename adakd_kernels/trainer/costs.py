"""What training costs, for the log lines: tokens a second, and memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

__all__ = ["StepClock", "peak_memory"]


class StepClock(TrainerCallback):
    """Wall-clock time of the optimizer steps and of the wait for their data, without evaluations and checkpoints.

    Attributes:
        seconds: since `reset`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun: float | None = None

    def reset(self) -> None:
        """Begin to count at zero."""
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A new run."""
        self.reset()
        self._begun = None

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The first step, and one after something else, begins with its data there."""
        if self._begun is None:
            self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The next step begins here, with its data."""
        now = time.perf_counter()
        self.seconds += now - (now if self._begun is None else self._begun)
        self._begun = now

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the evaluation out."""
        self._begun = None

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the checkpoint out."""
        self._begun = None


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had at most: of the device in tensors, on a CPU in all; 0 where nobody counts."""
    if device.type != "cpu":
        count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return int(count(device)) if count is not None else 0
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
