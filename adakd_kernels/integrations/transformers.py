"""AdaKD on transformers' `Trainer`: `AdaKDTrainer` and `AdaKDConfig`, and what feeds them.

    trainer = AdaKDTrainer(
        model=student,
        teacher=teacher,
        args=AdaKDConfig(output_dir="out", divergence="reverse_kl"),
        train_dataset=load_records("train.jsonl", tokenizer).records,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint("out"))

One process or `torchrun` / `accelerate launch` with one device a process (DistributedDataParallel).
"""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import accelerate  # noqa: F401
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        modeling_utils,
    )
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        f"AdaKDTrainer needs transformers and accelerate: pip install 'adakd-kernels[train]' ({error})"
    ) from error

from ..adaptive import LossAdaptiveFocus
from ..functional import AdaKDOutput
from ..loss import AdaKDLoss, LinearAdaKDLoss
from .collator import AdaKDDataCollator
from .heads import HeadOptions, NoPlainHeadError, instead_of_head, output_head, plain_head
from .records import DataError, LoadedRecords, check_same_tokenizer, load_records, tokenize_messages
from .token_histogram import TokenHistogram
from .training_config import AdaKDConfig

__all__ = [
    "AdaKDConfig",
    "AdaKDDataCollator",
    "AdaKDTrainer",
    "DataError",
    "LoadedRecords",
    "check_same_tokenizer",
    "last_checkpoint",
    "load_records",
    "tokenize_messages",
]

QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
KEEP_BYTES = 2**28
"""Bytes for logits kept between the two phases of the hidden route; small batches are not computed twice."""

logger = logging.getLogger(__name__)


class FocusCallback(TrainerCallback, ExportableState):
    """Advances the share of tokens once per optimizer step; its state is part of trainer_state.json in a checkpoint."""

    def __init__(self) -> None:
        self.loss_fn: AdaKDLoss | None = None

    def state(self) -> dict[str, Any]:
        """The numbers of `LossAdaptiveFocus`; JSON keeps every bit of an fp64."""
        focus = self.loss_fn.focus if self.loss_fn is not None else None
        saved = {}
        if isinstance(focus, LossAdaptiveFocus):
            saved = {name: value.item() for name, value in focus.state_dict().items()}
        return {"args": {}, "attributes": {"focus": saved}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the share on resumption.

        Raises:
            ValueError: the checkpoint holds no share although this run adapts it.
        """
        focus = self.loss_fn.focus if self.loss_fn is not None else None
        if state.global_step == 0 or not isinstance(focus, LossAdaptiveFocus):
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


class AdaKDTrainer(Trainer):
    """A `Trainer` that distils a frozen teacher into `model` with AdaKD's loss.

    The teacher is put on the training device in evaluation mode with `requires_grad` off. It keeps its type, is not
    wrapped for distributed training, and is not part of a checkpoint. Positions count whose label is not −100.
    `num_items_in_batch` of `Trainer` makes k micro-batches, and k ranks, add up to one big batch; difficulties,
    selection and temperatures are those of each micro-batch.

    Logged besides `loss`: `focus_ratio` (the share after the step), `loss_ema`, `loss_reference`, and p10, p50 and p90
    of `difficulty` (valid tokens) and `temperature` (selected tokens) since the last log line, over all ranks.
    `eval_loss` is the same loss with all tokens counted (share 1), its medians taken over each evaluation batch;
    evaluation leaves the adaptive share alone.

    The loss comes from the hidden states (`linear_adakd_loss`), so that no logits of a batch exist, where
    `logits_route` allows it and the logits of both models are their output layer's result, scaled and soft-capped as
    their configurations say; this is tried out here on two tokens, and the route is said once. Otherwise, and for
    `compute_loss(return_outputs=True)`, it comes from the logits. On that route, the gradient takes the place of the
    student's logits in training, which nothing reads afterwards; with `return_outputs=True` and under `torch_compile`
    it gets memory of its own.

    Args:
        model: the student, a causal language model.
        teacher: a causal language model with the same tokenizer, or the folder or name that `from_pretrained` loads one
            from, in the type it was saved in.
        args: the options.
        data_collator: `AdaKDDataCollator` by default. Batches need `labels` aligned with `input_ids`; `logits_to_keep`
            is used where both models take it.
        processing_class: the tokenizer; saved with the model.
        **kwargs: everything else `Trainer` takes, such as `train_dataset`, `eval_dataset`, `callbacks`, `optimizers`.

    Raises:
        TypeError: `args` is no `AdaKDConfig`.
        ValueError: shared parameters, several GPUs in one process, sequences split over processes, or
            `logits_route="hidden"` where it cannot be taken.
    """

    args: AdaKDConfig

    def __init__(
        self,
        model: nn.Module | None = None,
        teacher: nn.Module | str | Path | None = None,
        args: AdaKDConfig | None = None,
        *,
        data_collator: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, AdaKDConfig):
            raise TypeError(f"args must be an AdaKDConfig, got {type(args).__name__}")
        if teacher is None:
            raise TypeError("teacher must be a causal language model or the folder of one, got None")
        if isinstance(teacher, (str, Path)):
            teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
        if model is not None and not set(map(id, model.parameters())).isdisjoint(map(id, teacher.parameters())):
            raise ValueError(
                "model and teacher share parameters, which would be frozen with the teacher: copy the model"
            )
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            # The backward of this form is a scatter-add, which torch may refuse under full_determinism.
            per_record = _takes_positions_per_record(model, teacher) and not args.full_determinism
            data_collator = AdaKDDataCollator(pad_token_id=0 if pad is None else pad, per_record=per_record)
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"AdaKDTrainer runs one GPU a process, but this process sees {args.n_gpu}: start it with "
                f"'torchrun --nproc-per-node {args.n_gpu}' or 'accelerate launch', or set CUDA_VISIBLE_DEVICES to one"
            )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("AdaKDTrainer needs whole sequences: set cp_size and sp_size of parallelism_config to 1")
        # The loss is divided by num_items_in_batch here, so Trainer must count it and not divide again.
        self.model_accepts_loss_kwargs = True
        teacher = teacher.requires_grad_(False).eval()
        if getattr(teacher, "hf_device_map", None) is None and not getattr(teacher, "is_quantized", False):
            teacher = teacher.to(args.device)
        self.teacher: nn.Module = teacher
        self._heads = self._plain_heads()
        self._outputs_unread = False
        self.eval_loss_fn = self._make_loss(focus=1.0)
        self.loss_fn = self.eval_loss_fn
        self._difficulty = TokenHistogram(args.device)
        self._temperature = TokenHistogram(args.device)
        self.add_callback(FocusCallback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True resumes from the last checkpoint that was written to its end.

        Raises:
            ValueError: True, and there is no checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir!r} to resume from")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; the number of steps of the run also sets up the adaptive share."""
        self.loss_fn = self._make_loss(self.args.make_focus(max(1, num_training_steps))).to(self.args.device)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FocusCallback):
                callback.loss_fn = self.loss_fn
        self._difficulty.reset()
        self._temperature.reset()
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """The distillation loss of one micro-batch.

        Args:
            model: the student, wrapped or not.
            inputs: what the models take, with `labels` (B, L) and optionally `logits_to_keep` (K,) or (B, K).
            return_outputs: also return the student's outputs, with logits (B, L, V), or (B, K, V) at `logits_to_keep`.
            num_items_in_batch: number of labels in the optimizer step; None takes the mean over this micro-batch.

        Returns:
            The 0-d loss, or (loss, outputs).

        Raises:
            ValueError: `inputs` has no labels.
        """
        inputs = dict(inputs)
        labels, keep = inputs.pop("labels", None), inputs.pop("logits_to_keep", None)
        if labels is None:
            raise ValueError(f"a batch must have labels, got {sorted(inputs)}")
        targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
        if keep is not None and _takes_positions(keep, self.model, self.teacher):
            inputs["logits_to_keep"] = keep
            targets = targets[:, keep] if keep.dim() == 1 else targets.gather(1, keep)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is global, and gradients, logged losses and the adaptive share are means over the ranks.
            num_items_in_batch = num_items_in_batch / (self.accelerator.num_processes // self.get_tp_size())
        loss_fn = self.loss_fn if model.training else self.eval_loss_fn
        if self._heads is not None and (self._outputs_unread or not return_outputs):
            out, outputs = self._from_hidden(loss_fn, model, inputs, targets, num_items_in_batch)
        else:
            # The teacher first: its activations are gone before the student's are kept for the backward.
            with torch.no_grad():
                teacher_logits = self.teacher(**inputs, use_cache=False, return_dict=True).logits
            outputs = model(**inputs, return_dict=True)
            loss_fn.inplace = not (return_outputs or self.args.torch_compile)
            from_logits = loss_fn.from_logits if isinstance(loss_fn, LinearAdaKDLoss) else loss_fn
            out = from_logits(outputs.logits, teacher_logits, targets, num_items_in_batch)
        if model.training:
            self._difficulty.add(out.difficulty, targets != -100)
            self._temperature.add(out.temperature, out.selected)
        return (out.loss, outputs) if return_outputs else out.loss

    def _from_hidden(
        self, loss_fn: nn.Module, model: nn.Module, inputs: dict[str, Any], targets: Tensor, num_items: Any
    ) -> tuple[AdaKDOutput, Any]:
        """The loss, computed where the student's forward calls its head; the outputs have no logits worth reading.

        Inside the forward, because what wraps a model (data parallelism, autocast) acts there, and the model itself
        chooses the positions that its head gets.
        """
        student_head, teacher_head = output_head(self.model), output_head(self.teacher)
        seen: list[Any] = []

        def keep_hidden(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden[..., :1]

        def loss_of_hidden(hidden: Tensor) -> Tensor:
            (teacher_hidden,) = seen
            out: AdaKDOutput = loss_fn(
                hidden,
                student_head.weight,
                teacher_hidden.to(hidden.device),
                teacher_head.weight,
                targets,
                num_items,
                student_bias=student_head.bias,
                teacher_bias=teacher_head.bias,
            )
            seen.append(out)
            # A graph that reaches every parameter, in which data parallelism looks for those without a gradient.
            return out.loss.to(hidden.dtype).expand(*hidden.shape[:-1], 1)

        with torch.no_grad(), instead_of_head(teacher_head, keep_hidden):
            self.teacher(**inputs, use_cache=False, return_dict=True)
        with instead_of_head(student_head, loss_of_hidden):
            outputs = model(**inputs, return_dict=True)
        return seen[1], outputs

    def _plain_heads(self) -> tuple[HeadOptions, HeadOptions] | None:
        """What follows the heads of student and teacher on the hidden route, or None for the logits route.

        Raises:
            ValueError: the hidden route is asked for and cannot be taken.
        """
        if self.args.logits_route == "logits":
            return None
        try:
            if self.args.torch_compile:
                raise NoPlainHeadError("torch_compile is on, and this route waits for the device")
            if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1:
                raise NoPlainHeadError("the head is split over processes (FSDP, DeepSpeed or tensor parallelism)")
            found = []
            for role, model in (("student", self.model), ("teacher", self.teacher)):
                try:
                    found.append(plain_head(model))
                except NoPlainHeadError as error:
                    raise NoPlainHeadError(f"{role}: {error}") from error
        except NoPlainHeadError as error:
            if self.args.logits_route == "hidden":
                raise ValueError(
                    f"logits_route='hidden' cannot be taken: {error}; set it to 'auto' or 'logits'"
                ) from error
            if self.args.should_log:
                logger.warning("AdaKDTrainer: loss from the logits; from hidden states it is not possible: %s", error)
            return None
        if self.args.should_log:
            logger.warning("AdaKDTrainer: loss from hidden states; no logits of a whole batch are computed")
        return found[0], found[1]

    def _make_loss(self, focus: LossAdaptiveFocus | float) -> AdaKDLoss:
        if self._heads is None:
            return self.args.make_loss(focus)
        student, teacher = self._heads
        return self.args.make_loss(
            focus,
            LinearAdaKDLoss,
            student_scale=student.scale,
            student_softcap=student.softcap,
            teacher_scale=teacher.scale,
            teacher_softcap=teacher.softcap,
            keep_bytes=KEEP_BYTES,
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As `Trainer.prediction_step`; logits that are returned cover all positions, as the labels do."""
        if not prediction_loss_only:
            inputs = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
        self._outputs_unread = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._outputs_unread = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the share and the quantiles added to a training log line."""
        if self.is_in_train and "loss" in logs:
            logs.update(self._adakd_logs())
        super().log(logs, start_time)

    def _adakd_logs(self) -> dict[str, float]:
        """What AdaKD adds to a log line; waits for the device and the other ranks."""
        focus, logs = self.loss_fn.focus, {}
        if isinstance(focus, LossAdaptiveFocus):
            names = ("focus_ratio", "loss_ema", "loss_reference")
            values = torch.stack([getattr(focus, name) for name in names]).tolist()
            logs = dict(zip(names, values, strict=True))
        else:
            logs["focus_ratio"] = float(self.loss_fn.focus_ratio)
        for name, histogram in (("difficulty", self._difficulty), ("temperature", self._temperature)):
            histogram.counts = self.accelerator.reduce(histogram.counts)
            for (suffix, _), value in zip(QUANTILES.items(), histogram.quantiles(*QUANTILES.values()), strict=True):
                logs[f"{name}_{suffix}"] = value
            histogram.reset()
        return logs


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, or None.

    trainer_state.json is what `Trainer` writes last, so a folder without a whole one belongs to a run that was killed
    while saving.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    for folder in sorted((path for path in steps if steps[path].isdigit()), key=lambda path: -int(steps[path])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def _base(model: Any) -> Any:
    """The model, or the one that an adapter of peft wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _takes_positions(keep: Tensor, *models: Any) -> bool:
    """Whether all models take `logits_to_keep` in the form of `keep`, (K,) or (B, K)."""
    named = all("logits_to_keep" in inspect.signature(_base(model).forward).parameters for model in models)
    return named and (keep.dim() == 1 or _takes_positions_per_record(*models))


def _takes_positions_per_record(*models: Any) -> bool:
    """Whether `logits_to_keep` may be (B, K): in transformers' own models, where it has the function for it."""
    native = all(type(_base(model)).__module__.startswith("transformers.models.") for model in models)
    return native and hasattr(modeling_utils, "slice_logits_to_keep")
