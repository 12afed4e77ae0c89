"""AdaKD on transformers' `Trainer`: whole weights or LoRA, on one device or several.

    python examples/trainer.py --student S --teacher T --train data/train.jsonl --lora
    torchrun --nproc-per-node 2 examples/trainer.py --student S --teacher T --train data/train.jsonl

The second line trains with data parallelism, one process for each GPU; without a GPU the processes share the CPU. A run
that is killed goes on from its last checkpoint when it is started again. Needs `pip install '.[train]'`, and peft for
LoRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from adakd_kernels.integrations.transformers import AdaKDConfig, AdaKDTrainer, last_checkpoint


def main(argv: Sequence[str] | None = None) -> AdaKDTrainer:
    """Train, evaluate and save; returns the trainer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", required=True, help="folder or hub name of the model to train")
    parser.add_argument("--teacher", required=True, help="folder or hub name of the model to learn from")
    parser.add_argument("--train", required=True, help="records, in any form that docs/trainer.md lists")
    parser.add_argument("--eval", help="records to measure KL, cross-entropy and agreement on")
    parser.add_argument("--output_dir", default="runs/example", help="folder for checkpoints and student (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (%(default)s)")
    parser.add_argument("--lora", action="store_true", help="train an adapter of rank 16 instead of all weights")
    options = parser.parse_args(argv)

    args = AdaKDConfig(
        options.output_dir,
        divergence="reverse_kl",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-4 if options.lora else 5e-5,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        max_length=512,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if options.eval else "no",
        eval_steps=max(1, options.steps // 5),
        save_steps=max(1, options.steps // 5),
        save_total_limit=2,
        report_to="none",
    )
    adapter = None
    if options.lora:
        from peft import LoraConfig

        adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    trainer = AdaKDTrainer(
        model=options.student,
        teacher=options.teacher,
        args=args,
        peft_config=adapter,
        train_dataset=options.train,
        eval_dataset=options.eval,
        processing_class=AutoTokenizer.from_pretrained(options.student),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(options.output_dir))
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
