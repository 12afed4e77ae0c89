"""One training run of the demo: the package's own trainer, with a progress bar and a probe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from ..evaluation.progress import bar
from ..integrations.transformers import AdaKDConfig, AdaKDTrainer
from .answers import Answer
from .config import DemoConfig
from .report import Run

PLAIN: dict[str, Any] = {"temperature_scale": 0.0, "focus_ratio": 1.0}
"""Reverse KL of all tokens at temperature 1: AdaKD with both of its parts switched off."""

ADAKD: dict[str, Any] = {}
"""The method with the paper's settings, the defaults of `AdaKDConfig`; nothing is tuned for this run."""


def train_run(
    name: str,
    options: dict[str, Any],
    student: Any,
    teacher: Any,
    tokenizer: Any,
    answers: Sequence[Answer],
    config: DemoConfig,
    *,
    probe: Callable[[Any], float],
) -> Run:
    """Train `student` in place on the teacher's answers.

    Two calls with the same configuration and the same initial weights see the same records in the same order.

    Args:
        name: the run's name.
        options: fields of `AdaKDConfig` that make the method.
        student: the model to train.
        teacher: the frozen model to learn from.
        tokenizer: the tokenizer of both.
        answers: what to train on; the prompt has no labels.
        config: the demo's settings.
        probe: measures a student; called before the first step, every `config.probe_every` steps and after the last.
    """
    device, dtype = config.torch_device(), config.torch_dtype()
    args = AdaKDConfig(
        output_dir=str(config.output_dir / "trainer"),
        divergence="reverse_kl",
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        optim="adamw_torch_fused",
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        **options,
    )
    run = Run(name)
    trainer = AdaKDTrainer(
        model=student,
        teacher=teacher,
        args=args,
        train_dataset=[dict(zip(("input_ids", "labels"), answer.labelled(), strict=True)) for answer in answers],
        processing_class=tokenizer,
        callbacks=[_Progress(run, config.probe_every, probe)],
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    run.seconds = time.perf_counter() - start
    return run


class _Progress(TrainerCallback):
    """Fills a `Run` and shows a bar with the loss and the time that is left."""

    def __init__(self, run: Run, probe_every: int, probe: Callable[[Any], float]) -> None:
        self.run, self.probe_every, self.probe = run, probe_every, probe
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = bar(state.max_steps, self.run.name, "step")
        self.run.probe.append((0, self.probe(kwargs["model"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)
        if state.global_step % self.probe_every == 0 or state.global_step == state.max_steps:
            self.run.probe.append((state.global_step, self.probe(kwargs["model"])))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.run.logs.append({"step": state.global_step, **logs})
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", share=f"{logs['focus_ratio']:.2f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
