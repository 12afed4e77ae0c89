"""The options of a distillation run, on top of transformers' `TrainingArguments`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..adaptive import LossAdaptiveFocus, ScheduledFocus
from ..divergences import DIVERGENCES, Divergence
from ..functional import DIFFICULTIES, adakd_loss
from ..loss import AdaKDLoss
from .loading import LONG_RECORDS

__all__ = ["DATA_OPTIONS", "AdaKDConfig", "AdaKDOptions", "TrainerOptions"]

ROUTES = ("auto", "logits", "hidden")
ON_NAN = ("raise", "skip")
SELECTIONS = ("micro_batch", "step")
FOCUS_SCHEDULES = {"loss": LossAdaptiveFocus, "linear": ScheduledFocus}
TEACHER_PARALLEL = ("none", "fsdp", "zero3", "tp")
DATA_OPTIONS = ("max_length", "long_records", "packing", "padding_free", "dataset_num_proc")
"""Options of `AdaKDConfig` that say how data become records and batches."""
LEAST = {
    "max_length": 2, "dataset_num_proc": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
"""Options of `AdaKDConfig` that must be so much at the least."""
LOWER_IS_BETTER = ("forward_kl", "reverse_kl", "cross_entropy")
"""How names of an evaluation's metrics end that fall as the student gets better, beside those of a loss."""


@dataclass
class AdaKDOptions:
    """The options of the method, to stand in front of a class of `TrainingArguments`; equations in docs/maths.md.

    Raises:
        ValueError, TypeError: an option that is unknown or outside its range; the message starts with its name.
    """

    divergence: str = field(
        default="reverse_kl", metadata={"help": f"Divergence between teacher and student: {', '.join(DIVERGENCES)}."}
    )
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Parameters of the divergence, such as {"beta": 0.1} for jensen_shannon.'}
    )
    temperature_scale: float = field(
        default=0.5, metadata={"help": "c of equation (6); 0: the base temperature for all; below 0: reversed."}
    )
    base_temperature: float = field(default=1.0, metadata={"help": "Base temperature of equation (6)."})
    difficulty: str = field(
        default="hellinger", metadata={"help": f"Measure of a token's difficulty: {', '.join(DIFFICULTIES)}."}
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight a in (1-a)*distillation + a*cross-entropy with the labels."}
    )
    focus_ratio: float | None = field(
        default=None,
        metadata={"help": "Fixed share r of the valid tokens to select; left out, it follows the loss (LATF)."},
    )
    focus_schedule: str = field(
        default="loss", metadata={"help": "The share follows the 'loss', or a 'linear' fall to focus_min_ratio."}
    )
    focus_warmup_ratio: float = field(default=0.05, metadata={"help": "Part of the steps during which r = 1."})
    focus_beta: float = field(default=0.99, metadata={"help": "Decay of the loss's moving average."})
    focus_epsilon: float = field(
        default=0.05, metadata={"help": "Relative change of the average loss beyond which r changes."}
    )
    focus_delta: float = field(default=0.05, metadata={"help": "Relative change of r."})
    focus_min_ratio: float = field(default=0.1, metadata={"help": "Lower bound of r."})

    def __post_init__(self) -> None:
        if isinstance(self.divergence_kwargs, str):
            try:
                self.divergence_kwargs = json.loads(self.divergence_kwargs)
            except ValueError as error:
                raise ValueError(f"divergence_kwargs must be JSON, got {self.divergence_kwargs!r}: {error}") from None
        super().__post_init__()  # type: ignore[misc]
        # The functions check their own arguments, so a call on one token with two entries refuses every wrong option.
        token = torch.zeros(1, 1, 2)
        focus_ratio = 1.0 if self.focus_ratio is None else self.focus_ratio
        adakd_loss(
            token,
            token,
            torch.zeros(1, 1, dtype=torch.long),
            divergence=self.make_divergence(),
            focus_ratio=focus_ratio,
            **self._loss_options(),
        )
        self.make_focus(total_steps=1)

    def make_divergence(self) -> Divergence:
        """The divergence that `divergence` and `divergence_kwargs` name.

        Raises:
            ValueError: unknown name or parameter, or a parameter outside its range.
        """
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        kwargs = self.divergence_kwargs or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f'divergence_kwargs must be a mapping such as {{"beta": 0.1}}, got {kwargs!r}')
        try:
            return DIVERGENCES[self.divergence](**kwargs)
        except TypeError as error:
            raise ValueError(f"divergence_kwargs {kwargs!r} do not fit {self.divergence!r}: {error}") from None

    def make_focus(self, total_steps: int) -> LossAdaptiveFocus | float:
        """The share r of a run of `total_steps` optimizer steps, adaptive or fixed by `focus_ratio`.

        Raises:
            ValueError: an option outside its range.
        """
        if self.focus_schedule not in FOCUS_SCHEDULES:
            raise ValueError(f"focus_schedule must be one of {', '.join(FOCUS_SCHEDULES)}, got {self.focus_schedule!r}")
        if self.focus_ratio is not None:
            if self.focus_schedule != "loss":
                raise ValueError(
                    f"focus_schedule {self.focus_schedule!r} needs a share that changes, but focus_ratio is "
                    f"{self.focus_ratio}: leave one of the two out"
                )
            return self.focus_ratio
        try:
            return FOCUS_SCHEDULES[self.focus_schedule](
                total_steps,
                warmup_ratio=self.focus_warmup_ratio,
                beta=self.focus_beta,
                epsilon=self.focus_epsilon,
                delta=self.focus_delta,
                min_ratio=self.focus_min_ratio,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"focus_{error}") from None

    def make_loss(self, focus: LossAdaptiveFocus | float, **options: Any) -> AdaKDLoss:
        """The loss of these options with the given share; `options` are further ones of `AdaKDLoss`."""
        return AdaKDLoss(self.make_divergence(), focus=focus, **self._loss_options(), **options)

    def _loss_options(self) -> dict[str, Any]:
        """The options that `adakd_loss` and `AdaKDLoss` both take, without the divergence."""
        names = ("temperature_scale", "base_temperature", "difficulty", "ce_weight")
        return {name: getattr(self, name) for name in names}


@dataclass
class TrainerOptions(AdaKDOptions):
    """The options of the method and those of `AdaKDTrainer`, likewise."""

    selection: str = field(
        default="micro_batch",
        metadata={
            "help": "Among which tokens the hardest are selected: those of each 'micro_batch'; or those of the whole "
            "optimizer 'step', all micro-batches and ranks, for one more forward of the student."
        },
    )
    logits_route: str = field(
        default="auto",
        metadata={
            "help": "Where the loss comes from: 'logits'; 'hidden' states, without the logits of a batch; or 'auto', "
            "hidden states where both models have a plain output layer."
        },
    )
    tp_size: int = field(
        default=1,
        metadata={
            "help": "Tensor parallelism: over how many processes a model given by name is split; 1 or all of them."
        },
    )
    on_nan: str = field(
        default="raise",
        metadata={
            "help": "What a loss that is NaN or infinite does: 'raise' stops the run before the step; 'skip' leaves "
            "the gradient of its micro-batch out and counts it, and waits for the device each time."
        },
    )

    teacher_parallel: str = field(
        default="none",
        metadata={"help": "How the teacher is split over processes: 'none', 'fsdp', 'zero3' or 'tp'."},
    )
    token_records: int = field(
        default=4,
        metadata={
            "help": "Records of the evaluation set, or without one of the training set, whose tokens are written into "
            "output_dir before and after training, for 'adakd report'; 0: none."
        },
    )

    def __post_init__(self) -> None:
        args: Any = self
        if args.greater_is_better is None and str(args.metric_for_best_model).endswith(LOWER_IS_BETTER):
            args.greater_is_better = False
        super().__post_init__()
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {args.label_smoothing_factor!r}: the distillation loss does "
                "not use it; ce_weight adds the plain cross-entropy"
            )
        if self.logits_route not in ROUTES:
            raise ValueError(f"logits_route must be one of {', '.join(ROUTES)}, got {self.logits_route!r}")
        if self.on_nan not in ON_NAN:
            raise ValueError(f"on_nan must be one of {', '.join(ON_NAN)}, got {self.on_nan!r}")
        if self.teacher_parallel not in TEACHER_PARALLEL:
            raise ValueError(
                f"teacher_parallel must be one of {', '.join(TEACHER_PARALLEL)}, got {self.teacher_parallel!r}"
            )
        if not isinstance(self.token_records, int) or self.token_records < 0:
            raise ValueError(f"token_records must be a number of records, 0 or more, got {self.token_records!r}")
        if self.tp_size not in (1, args.world_size):
            raise ValueError(
                f"tp_size must be 1 or the number of processes, which is {args.world_size}, got {self.tp_size!r}: "
                "start one process for each part, with 'torchrun --nproc-per-node'"
            )
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}")


@dataclass
class AdaKDConfig(TrainerOptions, TrainingArguments):
    """`TrainingArguments` and the options of AdaKD (Xie et al., arXiv 2510.11615); the equations are in docs/maths.md.

    Three defaults differ from `TrainingArguments`: `logging_nan_inf_filter` is off, because it would wait for the
    device on every micro-batch and hide a loss that is NaN; `logging_steps` is 10; and `greater_is_better` is off where
    `metric_for_best_model` is a KL divergence or the cross-entropy, as it is for a loss.

    Raises:
        ValueError, TypeError: an option that is unknown or outside its range; the message starts with its name.
    """

    max_length: int = field(default=1024, metadata={"help": "Tokens of a record, and of a packed row, at most."})
    long_records: str = field(
        default="truncate",
        metadata={
            "help": "What happens to a record of more tokens: 'truncate' cuts its end off and leaves out what then has "
            "nothing to learn; 'drop' leaves it out; 'refuse' ends the run. What is cut and left out is counted."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Put training records together in rows of max_length tokens; they do not see each other."},
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Put a training batch into one row without padding; its records do not see each other."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise; left out, the main one."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Checkpoint that 'adakd train' resumes from: a folder, or 'last' in output_dir."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace a loss that is not finite in the logs; waits for the device."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Optimizer steps between two log lines; below 1, a part of all steps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long_records not in LONG_RECORDS:
            raise ValueError(f"long_records must be one of {', '.join(LONG_RECORDS)}, got {self.long_records!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
