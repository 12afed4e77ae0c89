"""What `selection="step"` costs: seconds of an optimizer step beside `selection="micro_batch"`.

Prints one JSON line a setting. Two random Llama models are trained by `AdaKDTrainer`, a few steps of one selection
after a few of the other. On a CPU the seconds are those of the processor with one thread, which other processes on the
machine hardly lengthen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from adakd_kernels.integrations.transformers import AdaKDConfig, AdaKDTrainer
from instruments.devices import circumstances, device_of

CUDA = torch.cuda.is_available()
HIDDEN, VOCAB = 256, 16_384
LAYERS = {"student": 4, "teacher": 8}
RECORDS, TOKENS = 2, 128
"""Of a micro-batch; half of the tokens have a label."""


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, from before its first forward."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.begin)


def now() -> float:
    """Seconds, of the processor where there is no GPU to wait for."""
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def model(role: str) -> LlamaForCausalLM:
    """A random model of 4 (student) or 8 layers."""
    torch.manual_seed(LAYERS[role])
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, num_hidden_layers=LAYERS[role], max_position_embeddings=TOKENS, **sizes)
    )


def records(count: int) -> list[dict[str, list[int]]]:
    """Random tokens, of which the second half are the answer."""
    ids = torch.randint(VOCAB, (count, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    half = TOKENS // 2
    return [{"input_ids": row, "labels": [-100] * half + row[half:]} for row in ids]


def step_times(selection: str, route: str, share: float, accumulation: int, steps: int) -> list[float]:
    """Seconds of each step of a run but the first."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = AdaKDConfig(
            output_dir=folder, selection=selection, logits_route=route, focus_ratio=share, max_steps=steps + 1,
            per_device_train_batch_size=RECORDS, gradient_accumulation_steps=accumulation, save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not CUDA,
        )  # fmt: skip
        trainer = AdaKDTrainer(
            model=model("student"),
            teacher=model("teacher"),
            args=args,
            train_dataset=records(RECORDS * accumulation),
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for the results
        trainer.train()
    return times.seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what selection=step costs.")
    parser.add_argument("--rounds", type=int, default=3, help="how often the two selections take turns")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each turn")
    options = parser.parse_args()
    if not CUDA:
        torch.set_num_threads(1)
    for route in ("logits", "hidden"):
        for share in (1.0, 0.3):
            seconds: dict[str, list[float]] = {"micro_batch": [], "step": []}
            for _ in range(options.rounds):
                for selection, found in seconds.items():
                    found += step_times(selection, route, share, accumulation=4, steps=options.steps)
            medians = {selection: statistics.median(found) for selection, found in seconds.items()}
            line = {"route": route, "share": share, **{name: round(value, 3) for name, value in medians.items()}}
            line["ratio"] = round(medians["step"] / medians["micro_batch"], 2)
            print(json.dumps({**line, **circumstances(device_of("cuda" if CUDA else "cpu"))}), flush=True)


if __name__ == "__main__":
    main()
