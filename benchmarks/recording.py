"""What a run's records for `adakd report` cost: seconds beside those of an optimizer step and of an evaluation.

Prints one JSON line: medians of a step of 8 records, of an evaluation of 64, of a measurement of `token_records`, of
what a log line gets from it (`tokens_per_second`, `peak_memory_gib`), and of the clock, once a step. Two random Llama
models are trained by `AdaKDTrainer`. On a CPU the seconds are those of the processor with one thread, which other
processes on the machine hardly lengthen.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from transformers import PrinterCallback

from adakd_kernels.integrations.transformers import AdaKDConfig, AdaKDTrainer
from adakd_kernels.trainer import trainer as trainer_module
from adakd_kernels.trainer.costs import StepClock
from adakd_kernels.trainer.token_records import TokenRecords
from instruments.devices import circumstances, device_of

from .step_selection import CUDA, StepTimes, model, now, records

STEPS, EVERY = 8, 2


def main() -> None:
    if not CUDA:
        torch.set_num_threads(1)
    spent: dict[str, list[float]] = {"evaluation": [], "measurement": [], "log_line": [], "clock": []}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name].append(now() - begin)

        return measured

    places: list[tuple[Any, str, str]] = [
        (AdaKDTrainer, "evaluation_loop", "evaluation"),
        (TokenRecords, "_measure_and_write", "measurement"),
        (StepClock, "on_step_end", "clock"),
        (trainer_module, "peak_memory", "log_line"),
    ]
    steps = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = AdaKDConfig(
            output_dir=folder, max_steps=STEPS, eval_strategy="steps", eval_steps=EVERY, logging_steps=1,
            per_device_train_batch_size=8, per_device_eval_batch_size=8, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=not CUDA,
        )  # fmt: skip
        trainer = AdaKDTrainer(
            model=model("student"),
            teacher=model("teacher"),
            args=args,
            train_dataset=records(8 * STEPS),
            eval_dataset=records(64),
            callbacks=[steps],
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for the results
        patches = [patch.object(owner, name, timed(title, getattr(owner, name))) for owner, name, title in places]
        patches.append(patch.object(trainer.accelerator, "gather", timed("log_line", trainer.accelerator.gather)))
        for each in patches:
            each.start()
        try:
            trainer.train()
        finally:
            for each in patches:
                each.stop()
    medians = {"step": statistics.median(steps.seconds[1:])}
    medians |= {name: statistics.median(found) for name, found in spent.items()}
    line = {name: float(f"{value:.3g}") for name, value in medians.items()}
    print(json.dumps({**line, **circumstances(device_of("cuda" if CUDA else "cpu"))}), flush=True)


if __name__ == "__main__":
    main()
