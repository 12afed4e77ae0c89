"""The adaptive share r over the optimizer steps of a run, in its checkpoints, and after resumption."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from ..adaptive import LossAdaptiveFocus
from ..loss import AdaKDLoss

__all__ = ["FocusCallback"]


class FocusCallback(TrainerCallback, ExportableState):
    """Steps the loss once per optimizer step; its state is part of trainer_state.json in a checkpoint.

    Attributes:
        loss_fn: the loss whose share r it steps. `AdaKDTrainer.create_scheduler` sets it: on resumption `Trainer` makes
            its callbacks anew, from what `state` returned, and a module has no place in JSON.
    """

    def __init__(self) -> None:
        self.loss_fn: AdaKDLoss | None = None

    def state(self) -> dict[str, Any]:
        """The buffers of `LossAdaptiveFocus` as numbers; JSON keeps every bit of an fp64."""
        focus = self._adaptive_focus()
        saved = {} if focus is None else {name: value.item() for name, value in focus.state_dict().items()}
        return {"args": {}, "attributes": {"focus": saved}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the share on resumption.

        Raises:
            ValueError: the checkpoint holds no share although this run adapts it.
        """
        focus = self._adaptive_focus()
        if state.global_step == 0 or focus is None:
            return
        callbacks: Any = state.stateful_callbacks
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {}).get("focus")
        if not saved:
            raise ValueError(
                "the checkpoint has no state of the adaptive share: another trainer or a run with a fixed focus_ratio "
                "wrote it; set focus_ratio, or start a new run with the checkpoint as the model"
            )
        dtypes = {name: value.dtype for name, value in focus.state_dict().items()}
        focus.load_state_dict({name: torch.tensor(value, dtype=dtypes[name]) for name, value in saved.items()})

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Equations (8) and (9)."""
        if self.loss_fn is not None:
            self.loss_fn.step()

    def _adaptive_focus(self) -> LossAdaptiveFocus | None:
        """The module that holds r, or None where r is fixed or no run has begun."""
        focus = None if self.loss_fn is None else self.loss_fn.focus
        return focus if isinstance(focus, LossAdaptiveFocus) else None
