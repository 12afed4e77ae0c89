"""What two ranks run for `test_tensor_parallel.py`, by `python -m tests.tensor_parallel_process FOLDER`.

Each rank leaves a file of each scenario.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from adakd_kernels.integrations.transformers import AdaKDTrainer
from adakd_kernels.trainer.heads import NoPlainHeadError
from adakd_kernels.trainer.tensor_parallel import HeadParts, check_split_head, split_over

from .tiny_models import token_records
from .trainer_process import MOVING, PLAIN, config, logged, uneven_records

RUNS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "unequal": ("llama-65", "llama-67", True, {"logits_route": "hidden"}),
    "biased-capped": (
        "phi-64", "gemma2-64", True, {"logits_route": "hidden", "divergence": "hellinger", "selection": "step"}
    ),
    "tied-scaled-whole": (
        "cohere-66", "granite-61", False,
        {"logits_route": "hidden", "divergence": "total_variation", "difficulty": "cross_entropy",
         "average_tokens_across_devices": False, "focus_ratio": 0.6},
    ),
    "logits": ("llama-65", "llama-67", True, {"logits_route": "logits"}),
}  # fmt: skip
"""Student, teacher, whether the teacher is split too, and options. The numbers are the sizes of the vocabularies."""
RESUMED = {
    "max_steps": 4, "save_steps": 2, "learning_rate": 3e-2, "per_device_train_batch_size": 4, "eval_strategy": "steps",
    "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "cross_entropy",
    "greater_is_better": True,
}  # fmt: skip
"""AdamW with clipping. The best model is that of step 2, because it is the worst one that counts."""


def whole(value: Any) -> Any:
    """A parameter or gradient as one process has it."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


class Gradients(TrainerCallback):
    """The gradient that each optimizer step is about to use, of all ranks together."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: whole(p.grad) for name, p in model.named_parameters()})


class Wire(TorchDispatchMode):
    """Numbers that the largest collective sends."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own collectives come here one by one
        if func.namespace in ("c10d", "_c10d_functional"):
            flat = torch.utils._pytree.tree_leaves((args, kwargs))
            self.largest = max(self.largest, *(x.numel() for x in flat if isinstance(x, Tensor)))
        return func(*args, **(kwargs or {}))


def load(folder: Path, name: str, ranks: int) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, **split_over(ranks))


def run(folder: Path, out: Path, name: str, ranks: int) -> dict[str, Any]:
    """One of `RUNS` in fp64 under a share that moves, and an evaluation."""
    student, teacher, split_teacher, options = RUNS[name]
    gradients = Gradients()
    given = {
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ce_weight": 0.2,
        **PLAIN, **MOVING, **options,
    }  # fmt: skip
    trainer = AdaKDTrainer(
        model=load(folder, student, ranks),
        teacher=load(folder, teacher, ranks if split_teacher else 1),
        args=config(out, **given),
        train_dataset=uneven_records(),
        eval_dataset=token_records(11, seed=7),
        callbacks=[gradients],
    )
    trainer.train()
    evaluation, predicted = trainer.evaluate(), trainer.predict(token_records(11, seed=9))
    return {
        "logs": logged(trainer),
        "evaluation": {key: value for key, value in evaluation.items() if "_runtime" not in key and "_per_" not in key},
        "predicted": {"logits": torch.tensor(predicted.predictions), "labels": torch.tensor(predicted.label_ids)},
        "gradients": gradients.steps,
        "weights": weights(trainer.model),
        "share": trainer.loss_fn.focus_ratio,
    }


def skipped_run(folder: Path, out: Path, ranks: int = 2) -> dict[str, Any]:
    """A run in which micro-batches are left out: the teacher is NaN behind the tokens 58 and 59."""
    teacher, ids = load(folder, "llama-67", ranks), []
    teacher.model.embed_tokens.register_forward_hook(lambda module, args, out: ids.append(args[0]))
    teacher.model.norm.register_forward_hook(
        lambda module, args, out: out.masked_fill((ids.pop() > 57).unsqueeze(-1), float("nan"))
    )
    trainer = AdaKDTrainer(
        model=load(folder, "llama-65", ranks),
        teacher=teacher,
        args=config(out, on_nan="skip", max_steps=4, per_device_train_batch_size=2, **PLAIN),
        train_dataset=uneven_records(),
    )
    trainer.train()
    logs = [log["skipped_micro_batches"] for log in trainer.state.log_history if "loss" in log]
    return {"skipped": logs, "weights": weights(trainer.model)}


def resumed_trainer(folder: Path, out: Path, ranks: int) -> AdaKDTrainer:
    return AdaKDTrainer(
        model=load(folder, "llama-65", ranks),
        teacher=folder / "llama-67",
        args=config(out, teacher_parallel="tp" if ranks > 1 else "none", **MOVING, **RESUMED),
        train_dataset=token_records(16),
        eval_dataset=token_records(8, seed=7),
    )


def resumed_run(folder: Path, out: Path, ranks: int = 2) -> dict[str, Any]:
    """A run with two checkpoints; and one that goes on from the first of them."""
    first = resumed_trainer(folder, out, ranks)
    first.train()
    first.args.load_best_model_at_end = False
    last = load(folder, str(out / "checkpoint-4"), 1)
    again = resumed_trainer(folder, out / "again", ranks)
    again.args.load_best_model_at_end = False
    again.train(str(out / "checkpoint-2"))
    return {"best": weights(first.model), "last": weights(last), "resumed": weights(again.model)}


def wire_run(folder: Path, out: Path) -> dict[str, int]:
    """Numbers in the largest collective of a forward and backward of 8 records, by the route; and numbers of tokens."""
    found = {}
    for route in ("hidden", "logits"):
        trainer = AdaKDTrainer(
            model=load(folder, "llama-65", 2),
            teacher=load(folder, "llama-67", 2),
            args=config(out, logits_route=route),
            train_dataset=token_records(8),
        )
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
        batch.pop("logits_to_keep", None)
        with Wire() as wire:
            trainer.compute_loss(trainer.model, batch).backward()
        found[route] = wire.largest
    return {**found, "tokens": batch["input_ids"].numel()}


def head(rows: int, mesh: Any, placement: Any = None) -> nn.Linear:
    """A head whose row i has the numbers 2i and 2i+1, split by rows or as `placement` says."""
    placement = placement or Shard(0)
    made = nn.Linear(2, rows, bias=False)
    weight = torch.arange(2.0 * rows).view(rows, 2)
    made.weight = nn.Parameter(distribute_tensor(weight, mesh, [placement] * mesh.ndim))
    return made


def rows_run(folder: Path, out: Path) -> list[tuple[Any, ...]]:
    """Which rows of the teacher's head a rank takes, for pairs of sizes: (sizes, first, rows), from split and whole."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    for sizes in ((65, 67), (67, 65), (64, 63), (5, 9), (9, 5), (1, 4)):
        for of_teacher in (head(sizes[1], mesh), nn.Linear(2, sizes[1], bias=False)):
            if not isinstance(of_teacher.weight, DTensor):
                of_teacher.weight.data = torch.arange(2.0 * sizes[1]).view(sizes[1], 2)
            parts = HeadParts.of(head(sizes[0], mesh), of_teacher)
            rows = parts.teacher(of_teacher).weight.detach()
            common = min(len(rows), max(0, min(sizes) - parts.vocab_parallel.first))  # the loss takes these
            found.append((sizes, parts.vocab_parallel.first, (rows[:common, 0] / 2).int().tolist()))
    return found


def judgements_run(folder: Path, out: Path) -> dict[str, str]:
    """What is said of models and heads that cannot be taken as they are."""
    from transformers.distributed import DistributedConfig

    def said(
        model: Any, teacher: Any = "llama-67", route: str = "hidden", peft_config: Any = None, **options: Any
    ) -> str:
        args = config(out, logits_route=route, **options)
        try:
            AdaKDTrainer(model=model, teacher=folder / teacher, args=args, peft_config=peft_config)
        except ValueError as error:
            return str(error)
        return "taken"

    def planned(style: str) -> Any:
        plan = DistributedConfig(tp_size=2, tp_plan={"lm_head": style})
        return AutoModelForCausalLM.from_pretrained(folder / "llama-65", distributed_config=plan)

    def of_head(made: nn.Linear) -> str:
        try:
            check_split_head(SimpleNamespace(get_output_embeddings=lambda: made))
        except NoPlainHeadError as error:
            return str(error)
        return "taken"

    doubled = load(folder, "llama-65", 2)
    inner = doubled.lm_head.forward
    doubled.lm_head.forward = lambda states: 2 * inner(states)
    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
    return {
        "local logits": said(planned("colwise"), route="auto"),
        "head kept whole": said(planned("replicate")),
        "teacher's head split, student's whole": said(planned("replicate"), teacher_parallel="tp"),
        "head that doubles": said(doubled),
        "adapter on all layers": said(load(folder, "llama-65", 2), peft_config=LoraConfig(target_modules="all-linear")),
        "adapter on the head": said(load(folder, "llama-65", 2), peft_config=LoraConfig(target_modules=["lm_head"])),
        "split over 2 dimensions": of_head(head(8, plane)),
        "split along the inputs": of_head(head(8, init_device_mesh("cpu", (2,)), Shard(1))),
        "copied": of_head(head(8, init_device_mesh("cpu", (2,)), Replicate())),
    }


SCENARIOS: dict[str, Callable[[Path, Path], Any]] = {
    **{name: partial(run, name=name, ranks=2) for name in RUNS},
    "skipped": skipped_run, "resumed": resumed_run, "wire": wire_run, "rows": rows_run, "judgements": judgements_run,
}  # fmt: skip


def main(folder: Path) -> None:
    # A copy of this process is the second rank, so that the libraries are imported once.
    other = os.fork()
    rank = "0" if other else "1"
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    failed = True
    try:
        config(folder)  # makes the process group
        for name, scenario in SCENARIOS.items():
            torch.save(scenario(folder, folder / name), folder / f"{name}.rank{rank}.pt")
            gc.collect()  # the process group goes after the trainer
        PartialState().destroy_process_group()
        failed = False
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    if other and not failed:
        os.waitpid(other, 0)
    os._exit(failed)  # gloo's threads may abort or wait while the interpreter shuts down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
