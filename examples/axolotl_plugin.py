"""AdaKD in axolotl: a plugin whose trainer lets a teacher judge every token of the data.

In axolotl's YAML file:

    plugins:
      - axolotl_plugin.AdaKDPlugin
    adakd_teacher: models/teacher
    adakd_divergence: reverse_kl       # the others are left out for the defaults of AdaKD
    sample_packing: false

and this file where Python finds it: `PYTHONPATH=examples axolotl train run.yaml`.

Written against axolotl's `BasePlugin` (`get_input_args`, `get_trainer_cls`) and `AxolotlTrainer`, a `Trainer` of
transformers, as their source stands in 2026. Its test runs this trainer on transformers' `Trainer` with stand-ins for
both classes; it has not been run in axolotl. The teacher is a whole copy on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from adakd_kernels import AdaKDLoss
from adakd_kernels.trainer.focus_callback import FocusCallback


class AdaKDArgs(BaseModel):
    """What axolotl's YAML file may hold for this plugin."""

    adakd_teacher: str | None = None
    adakd_divergence: str = "reverse_kl"
    adakd_temperature_scale: float = 0.5
    adakd_focus_ratio: float | None = None  # left out, the share of tokens follows the loss


class AdaKDPlugin(BasePlugin):  # type: ignore[misc]
    """Trains on a teacher where `adakd_teacher` is given."""

    def get_input_args(self) -> str:
        """Where axolotl finds the options."""
        return f"{__name__}.AdaKDArgs"

    def get_trainer_cls(self, cfg: Any) -> Any:
        """The trainer of these options, or None for axolotl's own."""
        if not cfg.adakd_teacher:
            return None
        if cfg.sample_packing:
            raise ValueError(
                "sample_packing must be false with adakd_teacher: the teacher would see packed texts as one"
            )
        from axolotl.core.trainers.base import AxolotlTrainer

        return trainer_class(AxolotlTrainer, cfg)


def trainer_class(base: Any, cfg: Any) -> Any:
    """A `Trainer` class with the loss of AdaKD in the place of its own."""

    class AdaKDAxolotlTrainer(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            teacher = AutoModelForCausalLM.from_pretrained(cfg.adakd_teacher, dtype="auto")
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
            self.model_accepts_loss_kwargs = True  # so that the tokens of a step are counted, and nothing divides again
            self.add_callback(FocusCallback)
            self.use_loss(self.make_loss(focus=1.0))
            self.eval_loss_fn = self.make_loss(focus=1.0)

        def make_loss(self, **focus: Any) -> AdaKDLoss:
            loss_fn = AdaKDLoss(
                cfg.adakd_divergence, temperature_scale=cfg.adakd_temperature_scale, shift=True, **focus
            )
            return loss_fn.to(self.args.device)

        def use_loss(self, loss_fn: AdaKDLoss) -> None:
            self.loss_fn = loss_fn
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FocusCallback):
                    callback.loss_fn = loss_fn  # it steps the share once an optimizer step

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            fixed = cfg.adakd_focus_ratio
            self.use_loss(
                self.make_loss(**({"total_steps": num_training_steps} if fixed is None else {"focus": fixed}))
            )
            return super().create_scheduler(num_training_steps, optimizer)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"]
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
            outputs = model(**inputs)
            with torch.no_grad():
                teacher_logits = self.teacher(**inputs).logits
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # Of all ranks, whose gradients are averaged.
                num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
            loss_fn = self.loss_fn if model.training else self.eval_loss_fn
            loss = loss_fn(outputs.logits, teacher_logits, labels, num_items_in_batch).loss
            return (loss, outputs) if return_outputs else loss

    return AdaKDAxolotlTrainer
