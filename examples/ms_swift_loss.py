"""AdaKD in ms-swift: a loss under the name `adakd`, for `swift sft`.

    ADAKD_TEACHER=models/teacher swift sft --external_plugins examples/ms_swift_loss.py --loss_type adakd ...

`swift sft` has no options of a loss, so the environment has them: `ADAKD_TEACHER` (folder or name of the teacher, with
the student's tokenizer), `ADAKD_DIVERGENCE` (reverse_kl), `ADAKD_TEMPERATURE_SCALE` (0.5), `ADAKD_FOCUS_RATIO` (1.0).
The latter is the share of tokens that count; it is fixed, because a loss is not told about the steps.

Written against ms-swift 4: `swift.loss.loss_map` holds classes that are made with (args, trainer) and called with
(outputs, labels, num_items_in_batch=, loss_scale=, trainer=). A loss does not get the tokens that the teacher must
read, so this one remembers what the trainer's `_prepare_inputs` gives, on which the student was just run. Its test runs
the loss on transformers' `Trainer`, with stand-ins for ms-swift's two classes that make and call it as above; it has
not been run in ms-swift. The teacher is a whole copy on every device.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from swift.loss import BaseLoss, loss_map
from torch import Tensor
from transformers import AutoModelForCausalLM

from adakd_kernels import adakd_loss


class AdaKDSwiftLoss(BaseLoss):  # type: ignore[misc]
    """The AdaKD loss between the model that is trained and the teacher of `ADAKD_TEACHER`."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        environment = os.environ
        if not environment.get("ADAKD_TEACHER"):
            raise ValueError(
                "the loss 'adakd' needs the environment variable ADAKD_TEACHER: the teacher's folder or name"
            )
        self.options: dict[str, Any] = {
            "divergence": environment.get("ADAKD_DIVERGENCE", "reverse_kl"),
            "temperature_scale": float(environment.get("ADAKD_TEMPERATURE_SCALE", "0.5")),
            "focus_ratio": float(environment.get("ADAKD_FOCUS_RATIO", "1.0")),
        }
        teacher = AutoModelForCausalLM.from_pretrained(environment["ADAKD_TEACHER"], dtype="auto")
        self.teacher = teacher.requires_grad_(False).eval().to(args.device)
        self.inputs: dict[str, Any] = {}
        prepare = trainer._prepare_inputs

        def remember(inputs: Any) -> Any:
            self.inputs = prepare(inputs)
            return self.inputs

        trainer._prepare_inputs = remember

    def __call__(
        self, outputs: Any, labels: Tensor, *, num_items_in_batch: Any = None, loss_scale: Any = None, **others: Any
    ) -> Tensor:
        """The loss of a micro-batch; the trainer has taken out of its inputs what is not the model's."""
        if loss_scale is not None:
            raise ValueError("loss_scale must be left at its default: the loss 'adakd' weighs the tokens itself")
        inputs = {name: value for name, value in self.inputs.items() if name not in ("labels", "compute_loss_func")}
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        return adakd_loss(
            outputs.logits, teacher_logits, labels, num_items=num_items_in_batch, shift=True, **self.options
        ).loss


loss_map["adakd"] = AdaKDSwiftLoss
