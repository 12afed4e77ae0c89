"""`AdaKDTrainer`: transformers' `Trainer` with a frozen teacher and AdaKD's loss."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, set_seed

from ..adaptive import LossAdaptiveFocus
from ..checks import is_dtensor
from ..loss import AdaKDLoss
from .adapters import OwnBase, base_of_adapter, check_checkpoint, is_adapted, load_student, teacher_of, with_adapter
from .checkpoints import last_checkpoint
from .collator import ID, AdaKDDataCollator, CheckedCollator
from .config import AdaKDConfig, TrainerOptions
from .costs import StepClock, peak_memory
from .evaluation import HeldOutSums, without_repeats
from .finite import BeforeStepCallback, FiniteCheck, MicroBatch, loss_without_gradient
from .focus_callback import FocusCallback
from .heads import (
    HeadOptions,
    NoPlainHeadError,
    carry,
    head_traits,
    hidden_states,
    instead_of_head,
    is_fully_sharded,
    output_head,
    own_positions,
    plain_head,
    takes_positions,
    takes_positions_per_record,
    through_output,
    untried_head,
    with_virtual_tokens,
)
from .histogram import TokenHistogram
from .loading import LoadedRecords, load_for
from .models import (
    ALWAYS_KEPT,
    auxiliary_loss,
    check_causal,
    check_inputs,
    check_special_tokens,
    position_limit,
    vocabulary_size,
)
from .packing import check_borders, pack_records
from .records import IGNORE_INDEX, check_same_tokenizer
from .sharded import (
    FSDP_NEEDS_AN_ACCELERATOR,
    adopt_fully_sharded,
    asks_for_fsdp,
    can_run,
    check_teacher_parallel,
    fsdp_plugin,
    is_placed,
    is_split,
    load_teacher,
    reshard,
    shard_teacher,
    whole_head,
)
from .step_selection import CHOSEN, Chosen, Measure, Measured, StepSelection, check_step_selection
from .tensor_parallel import (
    HeadParts,
    check_adapters,
    check_gathers,
    check_ranks,
    check_split_head,
    load_optimizer,
    load_weights,
    save_optimizer,
    split_as,
    split_over,
    tensor_parallel_size,
)
from .token_records import TokenRecords

__all__ = ["AdaKDTrainer"]

SCHEDULER = "scheduler.pt"
"""File of a checkpoint, as `Trainer` names it."""
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
KEEP_BYTES = 2**28
"""Bytes for logits kept between the two phases of the hidden route: those of a small batch are computed once."""

logger = logging.getLogger(__name__)


class AdaKDTrainer(Trainer):
    """A `Trainer` that distils a frozen teacher into `model` with AdaKD's loss.

    The teacher is put on the training device in evaluation mode with `requires_grad` off, unless it is split over
    devices, streamed or quantised already. It keeps its type, is not part of a checkpoint, and is not wrapped for
    distributed training, but `teacher_parallel` may split it. The student may be split by FSDP2 or DeepSpeed. A token
    is valid where its label is not −100. `num_items_in_batch` of `Trainer` makes k micro-batches, and k ranks, add up
    to one big batch; difficulties, selection and temperatures are those of each micro-batch or, with
    `selection="step"`, of the whole optimizer step.

    Logged besides `loss`: `focus_ratio` (the share r after the step), `loss_ema`, `loss_reference`, and p10, p50 and
    p90 of `difficulty` (valid tokens) and `temperature` (selected tokens) since the last log line, over all ranks;
    `tokens_per_second` (valid tokens of all ranks, without evaluations and checkpoints) and `peak_memory_gib` (of the
    rank that has had most). For `adakd report`, `TokenRecords` writes a few records' tokens into `args.output_dir`.
    An evaluation gives `eval_forward_kl`, `eval_reverse_kl`, `eval_cross_entropy` and `eval_agreement`: means over all
    valid tokens at temperature 1, which depend on models and records alone. `eval_loss` is the mean over the tokens of
    the training loss with every valid token selected (r = 1), its medians taken over each evaluation batch;
    evaluation leaves the adaptive share alone. A student that is a mixture of experts with `output_router_logits` adds
    its auxiliary loss times `router_aux_loss_coef`: the mean over the micro-batches and ranks of a step.

    The loss comes from the hidden states (`linear_adakd_loss`), so that no logits of a batch exist, where
    `logits_route` allows it and the logits of both models are their output layer's result, scaled and soft-capped as
    their configurations say. This is tried out on two tokens, here and whenever another model, head or hook on them has
    come in, and the choice is logged once. Otherwise, and for `compute_loss(return_outputs=True)`, the loss comes from
    the logits. On that route the gradient takes the place of
    the student's logits in training, where nothing reads them afterwards; with `return_outputs=True` and under
    `torch_compile` it gets memory of its own.

    Args:
        model: the student, a causal language model, or the folder or name that `from_pretrained` loads one from, in
            fp32, split over `args.tp_size` processes. An adapter that lies there is trained further.
        teacher: a causal language model with the same tokenizer, or the folder or name that `from_pretrained` loads one
            from, in the type it was saved in, split as `args.teacher_parallel` says. None, or the very model that the
            student's adapter is on: that model teaches with the adapter off, and no second copy of its weights is made.
        args: the options.
        peft_config: a configuration of peft; the student gets a new adapter, and nothing else is trained.
        data_collator: `AdaKDDataCollator` by default. Batches need `labels` aligned with `input_ids`; `logits_to_keep`
            is used where both models take it, and `id` in messages. Everything else goes to both models, and what one
            of them does not read is refused, as are ids and positions beyond the embeddings of one of them.
        train_dataset: what `load_records` takes: a path, a data set, a list or a stream, of texts or token ids.
        eval_dataset: likewise, or a dict of several by name. It is not packed, and its batches are padded.
        processing_class: the tokenizer; saved with the model.
        **kwargs: everything else `Trainer` takes, such as `callbacks` and `optimizers`.

    Attributes:
        teacher: the frozen teacher; an `OwnBase` without weights where the student's own base teaches.
        loss_fn: the loss of the training micro-batches; each `train` makes a new one, with the share of its run.
        eval_loss_fn: the loss of the evaluation batches, r = 1.

    Raises:
        ImportError: `peft_config`, and peft is not installed; `teacher_parallel="zero3"`, and DeepSpeed is not.
        TypeError: `args` is no `AdaKDConfig`, `peft_config` is none of peft's, there is no teacher, or the data are
            none that `load_records` takes.
        OSError: a model given by name that is not found.
        DataError: data that cannot be read or trained on; of a stream, when it is read.
        ValueError: a model that is bidirectional, an encoder–decoder or without an output layer, special tokens beyond
            a vocabulary, shared parameters, several GPUs in one process, sequences split over processes, models that
            tensor parallelism splits in different ways or not as `args` says, a second adapter, a base that is to teach
            but would not stay as it is or is split over processes, a teacher that cannot be split as `teacher_parallel`
            says, `logits_route="hidden"` where it cannot be taken, or `selection="step"` with what it does not go with.
        NonFiniteLossError: in `train`, a loss or a gradient that is NaN or infinite, before its step; see `on_nan`.
    """

    args: AdaKDConfig
    model: nn.Module

    def __init__(
        self,
        model: nn.Module | str | Path | None = None,
        teacher: nn.Module | str | Path | None = None,
        args: AdaKDConfig | None = None,
        *,
        peft_config: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, TrainerOptions):
            raise TypeError(f"args must be an AdaKDConfig, got {type(args).__name__}")
        if data_collator is not None and args.padding_free:
            raise ValueError("padding_free is an option of the default data_collator, but another one is given")
        self._streams: list[LoadedRecords] = []
        self._said: set[str] = set()
        train_dataset = self._loaded(args, train_dataset, processing_class, "train_dataset")
        eval_dataset = self._loaded(args, eval_dataset, processing_class, "eval_dataset")
        if isinstance(model, (str, Path)):
            with _named("model", model):
                model = load_student(model, base_of_adapter(model), dtype=torch.float32, **split_over(args.tp_size))
        if isinstance(teacher, (str, Path)):
            _check_tokenizer_of(teacher, processing_class)
            with _named("teacher", teacher):
                split = split_as(model, args.teacher_parallel)
                teacher = load_teacher(teacher, args.teacher_parallel, **split)
        self._peft_config = peft_config
        student: Any = model
        if model is not None:
            set_seed(args.seed)  # as `Trainer` does next, but the adapter comes before
            student = with_adapter(model, peft_config)
            teacher = self._teacher_of(student, teacher)
        if data_collator is None:
            data_collator = self._default_collator(student, teacher, args, processing_class)
        # `Trainer` refuses to save the optimizer of a model that is split. This class does it itself.
        model_alone = args.save_only_model
        args.save_only_model |= tensor_parallel_size(student) > 1
        try:
            super().__init__(
                model=student,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        finally:
            args.save_only_model = model_alone
        if args.n_gpu > 1:
            raise ValueError(
                f"AdaKDTrainer runs one GPU a process, but this process sees {args.n_gpu}: start it with "
                f"'torchrun --nproc-per-node {args.n_gpu}' or 'accelerate launch', or set CUDA_VISIBLE_DEVICES to one"
            )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("AdaKDTrainer needs whole sequences: set cp_size and sp_size of parallelism_config to 1")
        if args.selection == "step":
            check_step_selection(self)
        # The loss is divided by num_items_in_batch here, so Trainer must count the items and not divide again.
        self.model_accepts_loss_kwargs = True
        if asks_for_fsdp(args) and not self.is_fsdp_enabled and args.device.type == "cpu":
            self._say(logging.WARNING, FSDP_NEEDS_AN_ACCELERATOR)
        self.teacher: Any = teacher
        self._teacher_engine: Any = None
        self._traits: Any = None
        self._head_options: tuple[HeadOptions, HeadOptions] | None = None
        self._head_parts = HeadParts()
        self._checked_inputs: tuple[Any, ...] = ()
        self._follow_models()
        starts_at_zero = getattr(peft_config, "init_lora_weights", None) is True
        if isinstance(self.teacher, OwnBase) and starts_at_zero and not args.ce_weight:
            self._say(
                logging.WARNING,
                "the student begins as its own teacher, from which it has nothing to learn: give another teacher, or a "
                "ce_weight above 0 to learn the labels and stay near the teacher",
            )
        # r = 1 until `create_scheduler` knows how many steps the run has.
        self.loss_fn = self._training_loss(focus=1.0)
        self.eval_loss_fn = self._make_loss(focus=1.0)
        self._difficulty = TokenHistogram(args.device)
        self._temperature = TokenHistogram(args.device)
        self._finite = FiniteCheck(self)
        self._step_selection = StepSelection(self, [])
        self._begun_step: list[Any] = []
        self._held_out: HeldOutSums | None = None
        self.add_callback(FocusCallback)
        self.add_callback(BeforeStepCallback(self._finite.before_step))
        if args.token_records:
            self.add_callback(TokenRecords(self))
        self._clock = StepClock()
        self.add_callback(self._clock)

    def _default_collator(self, student: Any, teacher: Any, args: Any, processing_class: Any) -> Any:
        """What makes the batches where no `data_collator` is given."""
        pad = getattr(processing_class, "pad_token_id", None)
        # The backward of this form is a scatter-add, which torch may refuse under full_determinism.
        per_record = takes_positions_per_record(student, teacher) and not args.full_determinism
        return AdaKDDataCollator(
            pad_token_id=0 if pad is None else pad, per_record=per_record, padding_free=args.padding_free
        )

    def _build_accelerator_args(self, **kwargs: Any) -> Any:
        """As `Trainer` has it; accelerate's FSDP2 trains a student that `fully_shard` has wrapped."""
        if self._comes_fully_sharded and self.args.device.type != "cpu":
            kwargs["fsdp_plugin"] = kwargs.get("fsdp_plugin") or fsdp_plugin(self.args)
        options = super()._build_accelerator_args(**kwargs)
        if self.args.device.type == "cpu":
            self._cpu_parallelism: Any = options.pop("parallelism_config", None)
        return options

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer` has it; FSDP2 and tensor parallelism run on a CPU too.

        accelerate's check of a parallelism has a list of device types, in which a CPU is missing. What accelerate does
        with tensor parallelism later, namely to give its ranks the same records, is the same on every device.
        """
        self._cpu_parallelism = None
        super().create_accelerator_and_postprocess()
        if self._cpu_parallelism is not None:
            state: Any = self.accelerator.state
            state.parallelism_config = self._cpu_parallelism
            state.device_mesh = self._cpu_parallelism.get_device_mesh("cpu")
        if self._comes_fully_sharded and not self.is_fsdp_enabled:
            adopt_fully_sharded(self.accelerator, fsdp_plugin(self.args))
            self.is_fsdp_enabled = True

    @property
    def _comes_fully_sharded(self) -> bool:
        """Whether the user has called `fully_shard` on the student. Transformers trains what it has split itself."""
        loaded_so = getattr(self.model, "is_distributed_loading_by_transformers", False)
        return is_fully_sharded(self.model) and not loaded_so

    def _follow_models(self) -> bool:
        """Judge models and heads where they, or hooks on them, are others than at the last time; whether they were.

        Raises:
            ValueError: models that do not fit, or the hidden route is asked for and cannot be taken.
        """
        self.teacher = self._teacher_of(self.model, self.teacher)
        traits = [head_traits(model) for model in (self.model, self.teacher)]
        if traits == self._traits:
            return False
        if not set(map(id, self.model.parameters())).isdisjoint(map(id, self.teacher.parameters())):
            raise ValueError(
                "model and teacher share parameters, which would be frozen with the teacher: copy the model"
            )
        check_ranks(self.model, self.teacher, self.args)
        check_adapters(self.model)
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1 or is_split(self.model)
        if isinstance(self.teacher, OwnBase) and split:
            raise ValueError(
                "the student's own base cannot teach where the student is split over processes (FSDP, DeepSpeed or "
                "tensor parallelism): give a teacher of its own, such as the folder of the base"
            )
        self.teacher = self._frozen(self.teacher)
        traits = [head_traits(model) for model in (self.model, self.teacher)]
        # TRL's strategy "wrapped" lets texts see each other on purpose.
        separate = getattr(self.args, "packing_strategy", None) != "wrapped"
        for role, model in (("student", self.model), ("teacher", self.teacher)):
            check_gathers(role, model)
            check_causal(role, model, try_out=self._can_try_out(model))
            if separate and (self.args.packing or self.args.padding_free) and self._can_try_out(model):
                check_borders(role, model)
        for text in check_special_tokens(self.model, self.teacher, self.processing_class):
            self._say(logging.WARNING, text)
        self._head_options = self._choose_route()
        for model in (self.model, self.teacher):
            reshard(model)  # after the tries; an optimizer takes the parts
        self._traits, self._checked_inputs = traits, ()
        return True

    def _follow_heads(self) -> None:
        """Go on with the losses that fit the heads, where another model or head has come in."""
        if not self._follow_models():
            return
        before = self.loss_fn
        self._use_loss(self._training_loss(before.focus))
        for name, buffer in before.named_buffers(recurse=False):  # the losses of the optimizer step so far
            self.loss_fn.get_buffer(name).copy_(buffer)
        self.eval_loss_fn = self._make_loss(focus=1.0)

    def _teacher_of(self, student: Any, teacher: Any) -> Any:
        """`teacher`, or the student's own base where this is meant."""
        return teacher_of(student, teacher, lambda: self.accelerator.autocast())

    def call_model_init(self, trial: Any = None) -> Any:
        """As `Trainer` has it, with the adapter of `peft_config`."""
        return with_adapter(super().call_model_init(trial), self._peft_config)

    def _frozen(self, teacher: Any) -> Any:
        """The teacher in evaluation mode, without gradients, split as the options say.

        A whole one is on the training device, unless it is placed already.
        """
        teacher = teacher.requires_grad_(False).eval()
        kind = self.args.teacher_parallel
        if kind != "tp":
            check_teacher_parallel(kind, teacher, self.get_tp_size() > 1)
        if kind in ("fsdp", "zero3"):
            self._teacher_engine = shard_teacher(kind, teacher, self.model, self.accelerator) or self._teacher_engine
            return teacher
        placed = is_placed(teacher) or tensor_parallel_size(teacher) > 1
        return teacher if placed else teacher.to(self.args.device)

    def _can_try_out(self, model: nn.Module) -> bool:
        """Whether a few tokens can go through a model now, on all processes that share it."""
        by_others = self._split_by_deepspeed or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2)
        return can_run(model) and not by_others

    @property
    def _split_by_deepspeed(self) -> bool:
        """Whether the ranks of tensor parallelism are those of DeepSpeed, and not those of `from_pretrained`."""
        return bool(self.get_tp_size() > tensor_parallel_size(self.model))

    def _choose_route(self) -> tuple[HeadOptions, HeadOptions] | None:
        """What follows the heads of student and teacher on the hidden route, or None for the logits route.

        Raises:
            ValueError: the hidden route is asked for and cannot be taken.
        """
        if self.args.logits_route == "logits":
            return None
        try:
            options = self._plain_heads()
        except NoPlainHeadError as error:
            if self.args.logits_route == "hidden":
                raise ValueError(
                    f"logits_route='hidden' cannot be taken: {error}; set it to 'auto' or 'logits'"
                ) from error
            self._say(logging.INFO, f"loss from the logits; from hidden states it is not possible: {error}")
            return None
        self._say(logging.INFO, "loss from hidden states; no logits of a whole batch are computed")
        return options

    def _say(self, level: int, text: str) -> None:
        """Log what has not been said yet."""
        if self.args.should_log and text not in self._said:
            logger.log(level, "AdaKDTrainer: %s", text)
        self._said.add(text)

    def _plain_heads(self) -> tuple[HeadOptions, HeadOptions]:
        """What follows the heads of student and teacher.

        Raises:
            NoPlainHeadError: the hidden route cannot be taken.
        """
        if self.args.torch_compile:
            raise NoPlainHeadError("torch_compile is on, and this route waits for the device")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise NoPlainHeadError(
                "FSDP 1 keeps the parameters of a unit in one flat tensor; set version 2 in fsdp_config"
            )
        if self._split_by_deepspeed:
            raise NoPlainHeadError("the head is split over processes by DeepSpeed's tensor parallelism")
        found = []
        for role, model in (("student", self.model), ("teacher", self.teacher)):
            split = tensor_parallel_size(model) > 1
            try:
                found.append(plain_head(model, split) if self._can_try_out(model) else untried_head(model))
                if split:
                    check_split_head(model)
            except NoPlainHeadError as error:
                raise NoPlainHeadError(f"{role}: {error}") from error
        if tensor_parallel_size(self.model) > 1:
            self._head_parts = HeadParts.of(output_head(self.model), output_head(self.teacher), self.args.difficulty)
        return found[0], found[1]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As `Trainer` has it; of a model that is split, each rank saves its part."""
        if tensor_parallel_size(self.model) == 1:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer(self.model, self.optimizer, output_dir)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As `Trainer` has it, also of a model that was or is split."""
        if checkpoint is None or not load_optimizer(self.model, self.optimizer, checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As `Trainer` has it; each rank of a model that is split reads its part."""
        if tensor_parallel_size(self.model) == 1 or is_adapted(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """As `Trainer` has it; each rank of a model that is split reads its part."""
        if tensor_parallel_size(self.model) == 1 or is_adapted(self.model):
            return super()._load_best_model()
        load_weights(self.model, str(self.state.best_model_checkpoint))

    def _training_loss(self, focus: LossAdaptiveFocus | float) -> AdaKDLoss:
        """The loss of training micro-batches, on the training device."""
        # The gradient may take the logits' place on the logits route only: on the hidden route, logits are computed for
        # someone who reads them. A compiled model may have saved its logits for its own backward.
        inplace = self._head_options is None and not self.args.torch_compile
        return self._make_loss(focus, inplace=inplace).to(self.args.device)

    def _make_loss(self, focus: LossAdaptiveFocus | float, inplace: bool = False) -> AdaKDLoss:
        """The loss of the options with the given share, and on the hidden route with what follows the heads."""
        if self._head_options is None:
            return self.args.make_loss(focus, inplace=inplace)
        student, teacher = self._head_options
        return self.args.make_loss(
            focus,
            inplace=inplace,
            student_scale=student.scale,
            student_softcap=student.softcap,
            teacher_scale=teacher.scale,
            teacher_softcap=teacher.softcap,
            keep_bytes=KEEP_BYTES,
        )

    def _loaded(self, args: Any, data: Any, tokenizer: Any, name: str) -> Any:
        """Data as records of token ids, those of the training packed if the options say so.

        Says how many there are, or remembers a stream, whose number is known later.
        """
        if data is None:
            return None
        if isinstance(data, dict) and name != "train_dataset":
            return {key: self._loaded(args, each, tokenizer, f"{name}[{key!r}]") for key, each in data.items()}
        loaded = load_for(args, data, tokenizer, name)
        if loaded.counts.shape[0] > 1:
            self._streams.append(loaded)
        elif args.should_log and loaded.records is not data:
            _report(loaded)
        return pack_records(args, loaded.records) if args.packing and name == "train_dataset" else loaded.records

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` has it; whatever collator makes the batches, both models have all their ids and positions.

        Data that come to an evaluation are tokenised, and its batches are padded, so that each row is one record.
        """
        collator = self.data_collator
        if not kwargs.get("is_training"):
            dataset = self._loaded(self.args, dataset, self.processing_class, f"{description.lower()} data")
        self.data_collator = self._checked_collator(bool(kwargs.get("is_training")))
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collator

    def _checked_collator(self, is_training: bool) -> CheckedCollator:
        """The collator with its checks; in an evaluation, each record has a row of its own."""
        own: Any = self.data_collator
        if not is_training and isinstance(own, AdaKDDataCollator):
            own = replace(own, padding_free=False)
        pair = {"student": self.model, "teacher": self.teacher}
        return CheckedCollator(
            own,
            {role: vocabulary_size(model) for role, model in pair.items()},
            {role: position_limit(model) for role, model in pair.items()},
            self._decode,
        )

    def collator_of_records(self) -> Any:
        """What makes a batch of records of the evaluation set, outside a data loader."""
        return self._get_collator_with_removed_columns(self._checked_collator(False), "token record")

    def _set_signature_columns_if_needed(self) -> None:
        """As `Trainer` has it; also kept are what the loss depends on, read by the models or not, and the id."""
        super()._set_signature_columns_if_needed()
        ours = isinstance(getattr(self.data_collator, "collate", self.data_collator), AdaKDDataCollator)
        columns: Any = self._signature_columns
        columns += sorted(ALWAYS_KEPT.union([ID] if ours else []).difference(columns))

    def create_optimizer(self, model: Any = None) -> Any:
        """As `Trainer.create_optimizer`, of the parts that this process holds, also after an evaluation."""
        reshard(self.model)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; the number of steps of the run also sets up the adaptive share."""
        if self._follow_models():
            self.eval_loss_fn = self._make_loss(focus=1.0)
        self._use_loss(self._training_loss(self.args.make_focus(max(1, num_training_steps))))
        self._difficulty.reset()
        self._temperature.reset()
        self._finite.reset()
        self._begun_step = []
        return super().create_scheduler(num_training_steps, optimizer)

    def _use_loss(self, loss_fn: AdaKDLoss) -> None:
        """Train with this loss from now on."""
        self.loss_fn = loss_fn
        # Looked up here, because `Trainer` may have replaced the callback by one from a checkpoint.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, FocusCallback):
                callback.loss_fn = loss_fn

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True resumes from the last checkpoint that was written to its end.

        Raises:
            ValueError: True, and there is no checkpoint; or one of a whole model where an adapter is trained, the other
                way round, or one of another adapter.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir!r} to resume from")
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.model)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        for stream in self._streams:
            if self.args.should_log:
                _report(stream)
        return output

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As `Trainer` has it; with `selection="step"`, these are the micro-batches that are chosen from.

        A step that the end of a stream cuts short goes on with the stream's next pass. `Trainer` would train its
        micro-batches without an optimizer step, and add their gradient to that of the next step.

        Raises:
            ValueError: a whole pass has fewer micro-batches than a step.
        """
        batches, num_items = super().get_batch_samples(chain(self._begun_step, epoch_iterator), num_batches, device)
        self._begun_step = []
        if 0 < len(batches) < num_batches:
            if self.state.global_step == 0:
                raise ValueError(
                    f"train_dataset gives {len(batches)} micro-batches, fewer than the {num_batches} of an optimizer "
                    "step: lower gradient_accumulation_steps or per_device_train_batch_size"
                )
            self._begun_step, batches, num_items = batches, [], None
        self._step_selection = StepSelection(self, batches)
        return batches, num_items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        """As `Trainer` has it; with `selection="step"`, with what was chosen over the whole step."""
        if self.args.selection == "step" and self.is_in_train:
            inputs, num_items_in_batch = self._step_selection.next(model, inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def measure_micro_batch(self, model: nn.Module, batch: dict[str, Any]) -> Measured:
        """The difficulties of a micro-batch, by the forward that its training will do again."""
        inputs, targets, _ids = self._taken_apart(self._prepare_inputs(batch))
        measure = Measure(self.loss_fn)
        found: Measured
        with self.compute_loss_context_manager():
            if self._head_options is None:
                found, _ = self._from_logits(measure, model, inputs, targets, None, False)
            else:
                found, _ = self._from_hidden(measure, model, inputs, targets, None)
        return found

    def _taken_apart(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor | None]:
        """What the models take of a batch, the token that each position predicts, and the records' ids."""
        inputs = dict(inputs)
        ids = inputs.pop(ID, None)
        self._follow_heads()
        targets = self._pop_targets(inputs)
        self._check_inputs(inputs)
        return inputs, targets, ids

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
            inputs: what the models take, with `labels` (B, L) and optionally `logits_to_keep` (K,) or (B, K). With
                `skip_logits` true, nobody reads the logits of outputs that are returned.
            return_outputs: also return the student's outputs, with logits (B, L, V), or (B, K, V) at `logits_to_keep`.
            num_items_in_batch: number of labels in the optimizer step; None takes the mean over this micro-batch.

        Returns:
            The 0-d loss, or (loss, outputs).

        Raises:
            ValueError: `inputs` has no labels.
        """
        inputs = dict(inputs)
        skip_logits, chosen = inputs.pop("skip_logits", False), inputs.pop(CHOSEN, None)
        logits_are_read = return_outputs and not skip_logits
        inputs, targets, ids = self._taken_apart(inputs)
        if num_items_in_batch is not None:
            if self.args.average_tokens_across_devices:
                # The number is global, and gradients, logged losses and the adaptive share are means over the ranks.
                num_items_in_batch = num_items_in_batch / (self.accelerator.num_processes // self.get_tp_size())
            else:
                # `Trainer` divides a number of one rank, too, by the ranks that have the same batch.
                num_items_in_batch = num_items_in_batch * self.get_tp_size()
        loss_fn = self.loss_fn if model.training else self.eval_loss_fn
        if self._head_options is None or logits_are_read:
            out, outputs = self._from_logits(
                loss_fn, model, inputs, targets, num_items_in_batch, logits_are_read, chosen
            )
        else:
            out, outputs = self._from_hidden(loss_fn, model, inputs, targets, num_items_in_batch, chosen)
        loss, balance = out.loss, auxiliary_loss(self.model, outputs)
        if balance is not None:
            # The mean over the micro-batches of a step; without a number of items `Trainer` takes it. The mean over the
            # ranks is data parallelism's.
            if model.training and num_items_in_batch is not None:
                balance = balance / getattr(
                    self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
                )
            loss = loss + balance.to(loss.device)
        if self._held_out is not None:
            labelled = (targets != IGNORE_INDEX).sum()
            self._held_out.add_loss(loss, labelled if num_items_in_batch is None else num_items_in_batch)
        if model.training and self.is_in_train:
            keep = inputs.get("logits_to_keep")
            micro_batch = MicroBatch(loss.detach(), out.difficulty, out.token_loss.detach(), targets, keep, ids)
            if not self._finite.takes(micro_batch):
                loss = loss_without_gradient(outputs.logits if is_split(self.model) else model)
                return (loss, outputs) if return_outputs else loss
        if model.training:
            self._difficulty.add(out.difficulty, targets != IGNORE_INDEX)
            self._temperature.add(out.temperature, out.selected)
        return (loss, outputs) if return_outputs else loss

    @property
    def _decode(self) -> Any:
        """The tokenizer's way from ids to text, or None."""
        return getattr(self.processing_class, "decode", None)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` has it; the norm is kept for the check of the step."""
        norm: Any = super()._get_grad_norm(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._finite.grad_norm = norm.full_tensor() if is_dtensor(norm) else norm
        return self._finite.grad_norm

    def _check_inputs(self, inputs: dict[str, Any]) -> None:
        """Refuse what one of the models would leave unread; looks only where a batch differs in kind from the last."""
        kind = tuple((name, getattr(value, "shape", ())[:1]) for name, value in inputs.items())
        if kind == self._checked_inputs:
            return
        for role, model in (("student", self.model), ("teacher", self.teacher)):
            check_inputs(role, model, inputs)
        self._checked_inputs = kind

    def _pop_targets(self, inputs: dict[str, Any]) -> Tensor:
        """The token that each position predicts, (B, L) or (B, K); `labels` leave `inputs`, as does an unused keep."""
        labels, keep = inputs.pop("labels", None), inputs.pop("logits_to_keep", None)
        if labels is None:
            raise ValueError(f"a batch must have labels, got {sorted(inputs)}")
        targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)), dim=1)  # (B, L)
        if keep is None or not takes_positions(keep, self.model, self.teacher):
            return targets
        inputs["logits_to_keep"] = keep
        return targets[:, keep] if keep.dim() == 1 else targets.gather(1, keep)  # (B, K)

    def _from_logits(
        self,
        loss_fn: AdaKDLoss | Measure,
        model: nn.Module,
        inputs: dict[str, Any],
        targets: Tensor,
        num_items: int | Tensor | None,
        logits_are_read: bool,
        chosen: Chosen | None = None,
    ) -> tuple[Any, Any]:
        """What `loss_fn` gives from the logits of both models, and the student's outputs."""
        # The teacher first: its activations are gone before the student's are kept for the backward.
        with torch.no_grad():
            teacher_inputs = with_virtual_tokens(self.teacher, inputs)
            teacher_logits = self.teacher(**teacher_inputs, use_cache=False, return_dict=True).logits
        outputs = model(**with_virtual_tokens(self.model, inputs), return_dict=True)
        logits = outputs.logits = own_positions(outputs.logits, targets.shape[1])
        teacher_logits = own_positions(teacher_logits, targets.shape[1])
        if self._held_out is not None:
            self._held_out.add_logits(logits, teacher_logits, targets)
        if logits_are_read and loss_fn.inplace:
            logits = logits.clone()  # the gradient takes the place of the copy
        choice = None if chosen is None else chosen.choice
        return loss_fn(logits, teacher_logits, targets, num_items, choice=choice), outputs

    def _from_hidden(
        self,
        loss_fn: AdaKDLoss | Measure,
        model: nn.Module,
        inputs: dict[str, Any],
        targets: Tensor,
        num_items: int | Tensor | None,
        chosen: Chosen | None = None,
    ) -> tuple[Any, Any]:
        """What `loss_fn` gives where the student's forward calls its head; the outputs have no logits worth reading.

        Inside the forward, because what wraps a model (data parallelism, autocast) acts there, and the model itself
        chooses the positions that its head gets.
        """
        student_head, parts = output_head(self.model), self._head_parts
        if chosen is not None and chosen.teacher_hidden is not None:
            teacher_hidden = chosen.teacher_hidden
        else:
            with torch.no_grad():
                teacher_hidden = hidden_states(self.teacher, with_virtual_tokens(self.teacher, inputs))
                teacher_hidden = own_positions(teacher_hidden, targets.shape[1])  # (B, K, H)
        results: list[Any] = []

        def loss_of_hidden(hidden: Tensor) -> Tensor:
            # Here the student's head is whole in this process, or the part that tensor parallelism gives it: what puts
            # it together acts on calls of modules.
            of_teacher, own = teacher_hidden.to(hidden.device), own_positions(hidden, targets.shape[1])
            split = tensor_parallel_size(self.teacher) > 1
            student = parts.student(student_head)
            teacher = parts.teacher(output_head(self.teacher) if split else whole_head(self.teacher, of_teacher))
            out = loss_fn.from_hidden(
                own,
                student.weight,
                of_teacher,
                teacher.weight,
                targets,
                num_items,
                student_bias=student.bias,
                teacher_bias=teacher.bias,
                choice=None if chosen is None else chosen.choice,
                **parts.options,
            )
            results.append(out)
            if self._held_out is not None and self._head_options is not None:
                self._held_out.add_hidden(
                    own, student, of_teacher, teacher, self._head_options, targets, parts.vocab_parallel
                )
            # A loss that is left out leaves no trace of NaN in the gradients, as zero times NaN would.
            if self.args.on_nan == "skip" and is_split(self.model) and not out.loss.isfinite():
                reached = (hidden, student_head.weight, student_head.bias)
                return carry(sum(part.sum() for part in reached if part is not None), hidden)  # type: ignore[arg-type]
            return carry(out.loss, hidden)

        with instead_of_head(student_head, loss_of_hidden):
            outputs = model(**with_virtual_tokens(self.model, inputs), return_dict=True)
        (out,) = results
        return out._replace(loss=through_output(out.loss, outputs.logits)), outputs

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As `Trainer.evaluation_loop`; where there is a loss, the metrics have the means of `HeldOutSums`."""
        held_out = self._held_out = HeldOutSums(self.args.device)
        if self.get_tp_size() == self.args.world_size > 1:
            self.gather_function = _as_it_is  # every rank has all of it
        if self._comes_fully_sharded and not self.accelerator._models:
            # Accelerate has nothing to do to this student, but would ask for an optimizer.
            self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._held_out = None
        metrics: Any = output.metrics
        if f"{metric_key_prefix}_loss" in metrics:
            means = held_out.means(self.accelerator)
            metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As `Trainer.prediction_step`; logits that are returned cover all positions, as the labels do.

        Records that are repeated to give all ranks one batch size have no labels in an evaluation.
        """
        inputs = dict(inputs)
        if self._held_out is not None and isinstance(inputs.get("labels"), Tensor):
            # The ranks that share one copy of the model read the same records.
            rank, ranks = (n // self.get_tp_size() for n in (self.args.process_index, self.args.world_size))
            inputs["labels"] = without_repeats(inputs["labels"], self.callback_handler.eval_dataloader, rank, ranks)
        if prediction_loss_only:
            # `Trainer` asks for outputs here too, but drops them.
            inputs["skip_logits"] = True
        else:
            inputs.pop("logits_to_keep", None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

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
            logs["focus_ratio"] = float(focus)
        if getattr(self.args, "on_nan", None) == "skip":
            skipped = torch.tensor(self._finite.skipped, device=self.args.device)
            logs["skipped_micro_batches"] = self.accelerator.reduce(skipped).item() // self.get_tp_size()
        for name, histogram in (("difficulty", self._difficulty), ("temperature", self._temperature)):
            histogram.counts = self.accelerator.reduce(histogram.counts)
            for suffix, value in zip(QUANTILES, histogram.quantiles(*QUANTILES.values()), strict=True):
                logs[f"{name}_{suffix}"] = value
        if self._clock.seconds:
            tokens = self._difficulty.counts.sum().item() // self.get_tp_size()
            logs["tokens_per_second"] = tokens / self._clock.seconds
        peaks = self.accelerator.gather(torch.tensor([peak_memory(self.args.device) / 2**30], device=self.args.device))
        if peak := peaks.max().item():
            logs["peak_memory_gib"] = peak
        for part in (self._difficulty, self._temperature, self._clock):
            part.reset()
        return logs


def _report(loaded: LoadedRecords) -> None:
    """Log how many records there are; what is cut or left out, so that it is seen."""
    logger.log(logging.WARNING if loaded.truncated or loaded.dropped else logging.INFO, "AdaKDTrainer: %s", loaded)


def _as_it_is(values: Any) -> Any:
    return values


@contextmanager
def _named(role: str, name: str | Path) -> Iterator[None]:
    """Errors of a model that is not found say which of the two it is."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{role} {str(name)!r} cannot be loaded: {error}") from error


def _check_tokenizer_of(teacher: str | Path, tokenizer: Any) -> None:
    """Compare the tokenizer that lies beside a teacher's weights, if there is one, with the student's."""
    if not hasattr(tokenizer, "get_vocab"):
        return
    try:
        other = AutoTokenizer.from_pretrained(teacher)
    except Exception:
        return
    check_same_tokenizer(tokenizer, other)
