"""AdaKD in a training loop of one's own: two models of transformers, gradient accumulation, mixed precision.

    python examples/own_loop.py --student models/student --teacher models/teacher --train data/train.jsonl

Four lines are AdaKD's: the loss is made, it is called on the logits of each micro-batch with the number of tokens of
the whole optimizer step, and it is told that the step is over. Needs `pip install '.[train]'`, which reads the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from adakd_kernels import AdaKDLoss
from adakd_kernels.integrations.transformers import AdaKDDataCollator, load_records


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train, save the student, and return the loss and the share of each step, which are printed too."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", required=True, help="folder or hub name of the model to train")
    parser.add_argument("--teacher", required=True, help="folder or hub name of the model to learn from")
    parser.add_argument("--train", required=True, help="records, in any form that docs/trainer.md lists")
    parser.add_argument("--output_dir", help="folder for the trained student; left out, it is not saved")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="records of a micro-batch (%(default)s)")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step (%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate (%(default)s)")
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    # The weights that the optimizer updates are fp32; autocast multiplies in bf16. The teacher is only read.
    student: Any = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).to(device).train()
    teacher: Any = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.bfloat16).to(device).eval()
    records = load_records(options.train, tokenizer, max_length=512).records
    collate = AdaKDDataCollator(pad_token_id=tokenizer.pad_token_id or 0, logits_to_keep=False)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(records, options.batch_size, shuffle=True, collate_fn=collate, generator=order)  # type: ignore[arg-type]

    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)
    # `shift` lets each position predict the next label; `inplace` writes the gradient over the student's logits.
    loss_fn = AdaKDLoss("reverse_kl", total_steps=options.steps, shift=True, inplace=True)

    batches, logs = iter(loader), []
    for step in range(1, options.steps + 1):
        micro_batches = []
        for _ in range(options.accumulation):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            micro_batches.append({name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")})
        # All micro-batches of a step are divided by one number, so that each token counts the same.
        num_items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
        total, ratio = 0.0, float(loss_fn.focus_ratio)
        for batch in micro_batches:
            labels = batch.pop("labels")
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    teacher_logits = teacher(**batch).logits
                student_logits = student(**batch).logits
            loss = loss_fn(student_logits, teacher_logits, labels, num_items=num_items).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss_fn.step()
        logs.append({"step": step, "loss": total, "focus_ratio": ratio})
        print(f"step {step}: loss {total:.4f}, share {ratio:.2f}", flush=True)
    if options.output_dir:
        student.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
    return logs


if __name__ == "__main__":
    main()
