"""Ctrl-C during training: the first one saves a checkpoint at the end of the step, a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

__all__ = ["Interruption"]


class Interruption(TrainerCallback):
    """As a context, takes SIGINT; as a callback, stops the trainer with a checkpoint.

    With several processes each would stop at a step of its own, and the others would wait for it: there Ctrl-C raises
    `KeyboardInterrupt` at once.

    Attributes:
        started: whether a step has begun: an earlier error comes from the checkpoint, a later one from training.
        requested: whether Ctrl-C was pressed.
    """

    def __init__(self, processes: int) -> None:
        self.started = self.requested = False
        # Python lets only the main thread have handlers.
        self._takes_signals = processes == 1 and threading.current_thread() is threading.main_thread()
        self._former: Any = None
        self._process = os.getpid()

    def __enter__(self) -> None:
        if self._takes_signals:
            self._former = signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(self, *error: object) -> None:
        if self._takes_signals:
            signal.signal(signal.SIGINT, self._former)

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a worker of the data loader, which inherits the handler and goes on
            return
        self.requested = True
        signal.signal(signal.SIGINT, self._former)
        # Not `print`: the signal may come in the middle of another one.
        os.write(2, b"\nadakd train: saving a checkpoint at the end of this step; Ctrl-C again stops at once\n")

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember that training has begun."""
        self.started = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, without the evaluation that may be due."""
        if self.requested:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step's end has saved already."""
        if self.requested:
            control.should_save = control.should_evaluate = False
