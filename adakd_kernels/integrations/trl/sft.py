"""`AdaKDSFTTrainer`: AdaKD on data that TRL's `SFTTrainer` prepares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import create_model_from_path

from ...trainer.config import TrainerOptions
from ...trainer.trainer import AdaKDTrainer
from .distillation import AdaKDDistillationTrainer

__all__ = ["AdaKDSFTConfig", "AdaKDSFTTrainer"]


@dataclass
class AdaKDSFTConfig(TrainerOptions, SFTConfig):
    """TRL's `SFTConfig`, with its defaults, and the options of AdaKD (Xie et al., arXiv 2510.11615).

    Raises:
        ValueError, TypeError: an option that is unknown or outside its range; the message starts with its name.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type != "nll":
            raise ValueError(f"loss_type must be left at 'nll', got {self.loss_type!r}: divergence chooses the loss")


class AdaKDSFTTrainer(AdaKDTrainer, SFTTrainer):
    """`AdaKDTrainer` on TRL's `SFTTrainer`, which brings data formats, packing, assistant masks, PEFT and vision data.

    The losses equal those of `AdaKDTrainer` on the same records. The log lines are those of `AdaKDTrainer`; of the
    metrics of `SFTTrainer`, which come with its own loss, there are none.

    Args:
        model: the student, or the name of one, loaded with `args.model_init_kwargs` as `SFTTrainer` does it.
        teacher, peft_config: as `AdaKDTrainer` takes it.
        args: an `AdaKDSFTConfig`.
        **kwargs: everything else `SFTTrainer` takes: `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`,
            `optimizers`, `quantization_config`, `formatting_func`, `data_collator`, ….

    Raises:
        TypeError: `args` is no `AdaKDSFTConfig`, or what `AdaKDTrainer` refuses.
        ValueError: what `AdaKDTrainer` or `SFTTrainer` refuses, or a `compute_loss_func`.
    """

    _tag_names = ["trl", "sft", "adakd"]  # noqa: RUF012
    _name = AdaKDDistillationTrainer._name
    _paper = AdaKDDistillationTrainer._paper

    def __init__(
        self, model: Any = None, teacher: Any = None, args: AdaKDSFTConfig | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(args, AdaKDSFTConfig):
            raise TypeError(f"args must be an AdaKDSFTConfig, got {type(args).__name__}")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func must be None: the loss is AdaKD's")
        given: Any = args.model_init_kwargs
        quantization = kwargs.pop("quantization_config", None)
        if isinstance(model, str) and (given or quantization):
            how = {"trust_remote_code": args.trust_remote_code, **(given or {})}
            if quantization:
                how["quantization_config"] = quantization
            model = create_model_from_path(model, **how)
            args.model_init_kwargs = None  # TRL would say that it ignores them for a model that is loaded
        super().__init__(model, teacher, args, **kwargs)  # type: ignore[arg-type]

    def _loaded(self, args: Any, data: Any, tokenizer: Any, name: str) -> Any:
        """The data as they are: `SFTTrainer` prepares them."""
        return data

    def _default_collator(self, *args: Any) -> None:
        """None: `SFTTrainer` makes the collator that goes with its preparation of the data."""
