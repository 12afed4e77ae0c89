"""`AdaKDDistillationTrainer`: TRL's `DistillationTrainer`, on the student's own completions, with AdaKD's loss."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from ...adaptive import LossAdaptiveFocus
from ...divergences import DIVERGENCES, Divergence, ForwardKL, JensenShannon, ReverseKL
from ...loss import AdaKDLoss
from ...trainer.checkpoints import last_checkpoint
from ...trainer.citation import CITATION, PAPER_ID, PAPER_TITLE
from ...trainer.config import AdaKDOptions
from ...trainer.costs import StepClock
from ...trainer.finite import BeforeStepCallback, NonFiniteLossError
from ...trainer.focus_callback import FocusCallback
from ...trainer.heads import HeadOptions
from ...trainer.histogram import TokenHistogram
from ...trainer.records import IGNORE_INDEX
from ...trainer.trainer import AdaKDTrainer
from .loss import Side, head_options, loss_and_entropy, make_loss
from .policies import PolicyCallback, ReplayBuffer, Source, choose_source, completion_of_data

__all__ = ["AdaKDDistillationConfig", "AdaKDDistillationTrainer", "divergence_of_beta"]

logger = logging.getLogger(__name__)

IMAGE_INPUTS = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
"""What a batch of a vision-language model has besides tokens."""


class PromptSampler(RepeatSampler):
    """TRL's order of prompts, for a run that begins in any epoch.

    TRL's sampler draws its n-th order when it is read for the n-th time, so that a resumed run would start with that of
    the first epoch. `set_epoch` would not mend it: behind accelerate's skipped batches and shards nobody calls it.

    Args:
        epoch: gives the number of epochs that are done.
        *args, **options: as `RepeatSampler` takes them.
    """

    def __init__(self, epoch: Callable[[], int], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Indices of prompts."""
        if self.shuffle:
            self.generator.manual_seed(self.generator.initial_seed())
            for _ in range(self.epoch()):
                torch.randperm(self.num_samples, generator=self.generator)
        indices: Iterator[int] = super().__iter__()  # type: ignore[no-untyped-call]
        return indices


def divergence_of_beta(beta: float) -> Divergence:
    """The divergence that TRL's β stands for: 0 forward KL, 1 reverse KL, else the generalised Jensen–Shannon."""
    return ForwardKL() if beta == 0.0 else ReverseKL() if beta == 1.0 else JensenShannon(beta=beta)


@dataclass
class AdaKDDistillationConfig(AdaKDOptions, DistillationConfig):
    """TRL's `DistillationConfig` and the options of AdaKD (Xie et al., arXiv 2510.11615).

    TRL's `beta` chooses the divergence, unless `divergence` names one. TRL's `temperature` samples the completions and
    does not scale the loss: `base_temperature` does, with the factor τ² that TRL's loss leaves out.

    `lmbda`, `replay_capacity` and `adaptive_lmbda` mix the student's completions with those of the data: GKD
    (arXiv 2306.13649) has `lmbda=0.5`; DistiLLM (arXiv 2402.03898) has `lmbda=0.0, replay_capacity=1000,
    adaptive_lmbda=True`.

    Raises:
        ValueError, TypeError: an option that is unknown or outside its range; the message starts with its name.
    """

    divergence: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": f"Divergence instead of the one that beta stands for: {', '.join(DIVERGENCES)}."},
    )
    lmbda: float = field(
        default=1.0,
        metadata={"help": "Probability that a step learns from the student's completions and not from the data's."},
    )
    replay_capacity: int = field(
        default=0,
        metadata={
            "help": "Completions of the student that each process keeps, from which more and more of the steps that "
            "learn from the student take theirs; 0: none."
        },
    )
    adaptive_lmbda: bool = field(
        default=False,
        metadata={"help": "Raise lmbda by 0.1 at each evaluation whose loss has risen by 0.1 or more."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.lmbda <= 1.0:
            raise ValueError(f"lmbda must be in [0, 1], got {self.lmbda!r}")
        if self.replay_capacity < 0:
            raise ValueError(f"replay_capacity must be 0 or more, got {self.replay_capacity!r}")
        if self.adaptive_lmbda and self.eval_strategy == "no":
            raise ValueError("adaptive_lmbda follows the loss of evaluations, but there are none: set eval_strategy")
        if self.adaptive_lmbda and self.lmbda == 1.0:
            raise ValueError("adaptive_lmbda raises lmbda, which is 1 already: set lmbda to where it begins, such as 0")

    def make_divergence(self) -> Divergence:
        """The divergence that `divergence` and `divergence_kwargs` name, or that `beta` stands for.

        Raises:
            ValueError: unknown name or parameter, or a parameter outside its range.
        """
        if self.divergence is not None:
            return super().make_divergence()
        if self.divergence_kwargs:
            raise ValueError(f"divergence_kwargs {self.divergence_kwargs!r} need a divergence; without one beta counts")
        return divergence_of_beta(self.beta)


class AdaKDDistillationTrainer(DistillationTrainer):
    """TRL's `DistillationTrainer` with AdaKD's loss on the completions that the student samples.

    Generation, data, PEFT, vLLM and the distributed modes are TRL's. A token is valid where the student made it: not in
    the prompt, not padding, not the answer of a tool; the end-of-text that ends a completion is valid. The loss comes
    from the hidden states of both models; no logits of a batch exist. Difficulties, selection and temperatures are
    those of each micro-batch.

    A resumed run has the numbers of one that was never stopped: prompts, completions and losses, the share, λ, and the
    replay buffer.

    Logged besides what TRL logs (`entropy` of the student too): `focus_ratio` (the share r after the step),
    `loss_ema`, `loss_reference`, p10, p50 and p90 of `difficulty` (valid tokens) and `temperature` (selected tokens),
    `tokens_per_second` and `peak_memory_gib`, as `AdaKDTrainer` has them. `eval_loss` is the loss with every valid
    token selected (r = 1).

    Args:
        model, train_dataset, eval_dataset, processing_class: as `DistillationTrainer` takes them.
        callbacks, optimizers, quantization_config, peft_config, tools: as `DistillationTrainer` takes them.
        args: an `AdaKDDistillationConfig`.
        teacher_model: a model or the name of one, with the student's vocabulary.

    Attributes:
        loss_fn: the loss of the training micro-batches; each `train` makes a new one, with the share of its run.
        eval_loss_fn: the loss of the evaluation batches, r = 1.

    Raises:
        TypeError: `args` is no `AdaKDDistillationConfig`, or there is no teacher.
        ValueError: what TRL refuses, or a model whose logits are not those of a plain output layer.
        NonFiniteLossError: in `train`, a loss that is NaN or infinite, before its step.
    """

    args: AdaKDDistillationConfig
    model: nn.Module

    _tag_names = ["trl", "distillation", "adakd"]  # noqa: RUF012
    _name = "AdaKD"
    _paper = {"title": PAPER_TITLE, "id": PAPER_ID, "citation": CITATION}  # noqa: RUF012

    # What AdaKDTrainer does with its loss and with its numbers is done here too; the two share no base of their own.
    _use_loss: Any = AdaKDTrainer._use_loss
    _adakd_logs: Any = AdaKDTrainer._adakd_logs

    def __init__(
        self, model: Any, teacher_model: Any = None, args: AdaKDDistillationConfig | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(args, AdaKDDistillationConfig):
            raise TypeError(f"args must be an AdaKDDistillationConfig, got {type(args).__name__}")
        if teacher_model is None:
            raise TypeError("teacher_model must be a causal language model or the name of one, got None")
        super().__init__(model, teacher_model, args, **kwargs)
        # A model that is split over processes, or that wants an image, is not tried out.
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1 or self._is_vlm)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        self._head_options: tuple[HeadOptions, HeadOptions] = (
            head_options("model", self.model, try_out=whole),
            head_options("teacher_model", teacher, try_out=whole),
        )
        # r = 1 until `create_scheduler` knows how many steps the run has.
        self.loss_fn, self.eval_loss_fn = self._make_loss(focus=1.0), self._make_loss(focus=1.0)
        self._difficulty, self._temperature = TokenHistogram(args.device), TokenHistogram(args.device)
        self._losses: list[Tensor] = []
        self.add_callback(FocusCallback)
        self.add_callback(BeforeStepCallback(self._check_step))
        self._clock = StepClock()
        self.add_callback(self._clock)
        self._mixes = args.lmbda < 1.0 or args.replay_capacity > 0
        self._buffer = ReplayBuffer(args.replay_capacity)
        self._source = Source.STUDENT
        self._rows: list[dict[str, Any]] = []
        self._replayed: list[tuple[list[int], list[int]]] = []
        if self._mixes and (self.tools or self._is_vlm):
            raise ValueError("lmbda must be 1 and replay_capacity 0 with tools and with vision-language models")
        if self._mixes:
            self.add_callback(PolicyCallback(args.lmbda, args.adaptive_lmbda))

    def _make_loss(self, focus: LossAdaptiveFocus | float) -> AdaKDLoss:
        """The loss of the options with the given share, and with what follows the heads."""
        student, teacher = self._head_options
        return make_loss(self.args.make_loss, student, teacher, focus=focus).to(self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; True resumes from the last checkpoint that was written to its end.

        Raises:
            ValueError: True, and there is no checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir!r} to resume from")
        # An interrupted run of this trainer may have left completions in the middle of a step.
        self._step, self._buffered_inputs = 0, None
        self._buffer = ReplayBuffer(self.args.replay_capacity)
        if resume_from_checkpoint and self.args.replay_capacity:
            file = self._buffer_file(resume_from_checkpoint)
            try:
                self._buffer.load(file)
            except FileNotFoundError:
                logger.warning("AdaKDDistillationTrainer: no %s: the replay buffer begins empty", file)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _buffer_file(self, checkpoint: str) -> Path:
        """Where a checkpoint has the replay buffer of this process."""
        return Path(checkpoint) / f"replay_buffer_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        """As `Trainer` has it: what each process needs to go on sampling, so its replay buffer too."""
        super()._save_rng_state(output_dir)
        if self.args.replay_capacity:
            self._buffer.save(self._buffer_file(output_dir))

    def _get_train_sampler(self, dataset: Any = None) -> PromptSampler:
        """As `DistillationTrainer` has it, in the order of the epoch that the run is in."""
        theirs: Any = super()._get_train_sampler(dataset)
        return PromptSampler(
            lambda: int(self.state.epoch or 0), theirs.data_source, theirs.mini_repeat_count, theirs.batch_size,
            theirs.repeat_count, theirs.shuffle, theirs.seed,
        )  # fmt: skip

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`; the number of steps of the run also sets up the adaptive share."""
        self._use_loss(self._make_loss(self.args.make_focus(max(1, num_training_steps))))
        self._difficulty.reset()
        self._temperature.reset()
        self._losses.clear()
        return super().create_scheduler(num_training_steps, optimizer)

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of one micro-batch, the sum of the student's entropies, and the number of valid tokens.

        Runs inside the forward of what wraps the student, as `DistillationTrainer._compute_loss` does.
        """
        labels = self._labels(inputs)
        tokens = [torch.cat((inputs[f"prompt_{x}"], inputs[f"completion_{x}"]), dim=1) for x in ("ids", "mask")]
        images = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
        hidden = self._get_last_hidden_state(unwrapped_student, *tokens, labels.shape[1], **images)
        self.teacher_model.eval()
        unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model, unwrapped_teacher, self._get_last_hidden_state, unwrapped_teacher, *tokens,
                labels.shape[1], **images,
            )  # fmt: skip
        head, teacher_head = unwrapped_student.get_output_embeddings(), unwrapped_teacher.get_output_embeddings()
        # Split over devices, a model may end on another one than its head.
        hidden, labels = hidden.to(head.weight.device), labels.to(head.weight.device)
        teacher_hidden = teacher_hidden.to(head.weight.device)
        loss_fn = self.loss_fn if self.model.training else self.eval_loss_fn
        of_student, of_teacher = self._head_options
        out, entropy = loss_and_entropy(
            loss_fn,
            Side(hidden, head.weight, head.bias, of_student),
            Side(teacher_hidden, teacher_head.weight, teacher_head.bias, of_teacher),
            labels,
            num_items_in_batch,
        )
        valid = labels != IGNORE_INDEX
        if self.model.training:
            self._losses.append(out.loss.detach())
            self._difficulty.add(out.difficulty, valid)
            self._temperature.add(out.temperature, out.selected)
        return out.loss, entropy, valid.sum()

    def _check_step(self) -> None:
        """Stop, on all ranks alike, before an optimizer step on a loss that is not finite.

        Raises:
            NonFiniteLossError: with the step and the losses of its micro-batches.
        """
        losses, self._losses = torch.stack(self._losses), []
        if self.accelerator.reduce((~losses.isfinite()).sum()).item():
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1}: the losses of its micro-batches are {losses.tolist()} on rank "
                f"{self.args.process_index}"
            )

    @staticmethod
    def _labels(inputs: dict[str, Any]) -> Tensor:
        """The token that each position of a completion predicts, (B, C); −100 on padding and on answers of tools.

        Position i of the hidden states is the one in front of token i of the completion, so the labels are the
        completion itself, its end-of-text too.
        """
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        labels: Tensor = inputs["completion_ids"].masked_fill(mask == 0, IGNORE_INDEX)
        return labels

    def _set_signature_columns_if_needed(self) -> None:
        """As `DistillationTrainer` has it; a completion that the data has is kept."""
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]
        columns: Any = self._signature_columns
        columns += [] if "completion" in columns else ["completion"]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As `DistillationTrainer` has it, with completions from where this step takes them."""
        self._rows, self._source = inputs, self._choose_source(inputs)
        if self._source is Source.REPLAY:
            rng = random.Random(f"{self.args.seed} {self.state.global_step} {self.args.process_index}")
            self._replayed = self._buffer.sample(len(inputs), rng)
        return super()._generate_and_score_completions(inputs)

    def _choose_source(self, rows: list[dict[str, Any]]) -> Source:
        """The source of this step, the same on all ranks: to sample together, they must all sample."""
        if not self._mixes:
            return Source.STUDENT
        if not self.model.training:
            # A loss that compares evaluations, and does not depend on what is sampled.
            return Source.DATA if "completion" in rows[0] else Source.STUDENT
        step = self.state.global_step
        (policy,) = [c for c in self.callback_handler.callbacks if isinstance(c, PolicyCallback)]
        # A generator of its own, so that the sampling of the student does not depend on it; by the step, so that a
        # resumed run goes on with the same draws.
        draw = random.Random(f"{self.args.seed} {step}").random()
        source = choose_source(
            draw, policy.lmbda, step / max(1, self.state.max_steps), self.args.replay_capacity > 0, self._buffer.full
        )
        drawn = [source]
        broadcast_object_list(drawn)
        (source,) = drawn
        metrics = self._metrics["train"]
        for each in Source:
            metrics[f"source/{each.value}"].append(float(each is source))
        metrics["lmbda"].append(policy.lmbda)
        return source

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        """As `DistillationTrainer` has it, or the prompts of the completions that are taken from the buffer."""
        if self._source is Source.REPLAY:
            return [prompt for prompt, _ in self._replayed], None, {}
        tokenized: tuple[list[list[int]], Any, dict[str, Any]] = super()._tokenize_prompts(prompts)
        return tokenized

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        """As `DistillationTrainer` has it, or completions that nobody has to sample."""
        if self._source is Source.REPLAY:
            return [completion for _, completion in self._replayed]
        if self._source is Source.DATA:
            template: Any = self.chat_template_kwargs
            return [
                completion_of_data(
                    row, ids, self.processing_class, self.eos_token_ids, self.max_completion_length,
                    chat_template=self.chat_template, **template,
                )
                for row, ids in zip(self._rows, prompt_ids, strict=True)
            ]  # fmt: skip
        completions: list[list[int]] = super()._generate_single_turn(  # type: ignore[no-untyped-call]
            prompt_ids, *args, **kwargs
        )
        if self.args.replay_capacity and self.model.training:
            self._buffer.add(prompt_ids, completions)
        return completions

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `DistillationTrainer.log`, with the share and the quantiles added to a training log line."""
        if self.is_in_train and "loss" in logs:
            logs.update(self._adakd_logs())
        super().log(logs, start_time)
