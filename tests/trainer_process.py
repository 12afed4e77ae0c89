"""What the trainer tests run, in their own process or not: `python -m tests.trainer_process MODE FOLDER [ROUTE]`."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import IterableDataset

from adakd_kernels.integrations.transformers import AdaKDConfig, AdaKDTrainer, NonFiniteLossError

from .tiny_models import tiny_experts, tiny_model, token_records

ROOT = Path(__file__).parent.parent

RESUMED = {
    "max_steps": 10, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3, "focus_beta": 0.3, "focus_epsilon": 0.01, "focus_delta": 0.1,
}  # fmt: skip
"""Ten steps over two epochs and a half, in which the share keeps moving."""

RANKED = {
    "max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "temperature_scale": 0.0,
    "focus_warmup_ratio": 1.0, "focus_beta": 0.5,
}  # fmt: skip
"""Plain gradient steps with all tokens at one temperature, where a batch may be split in any way."""


def config(folder: Path, **options: Any) -> AdaKDConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return AdaKDConfig(**{"output_dir": str(folder), "logging_steps": 1, "save_strategy": "steps", **quiet, **options})


def resumed_trainer(folder: Path, cls: type[AdaKDTrainer] = AdaKDTrainer) -> AdaKDTrainer:
    """A run with dropout, so that the random state matters too."""
    return cls(
        model=tiny_model("gpt2", dropout=0.2, seed=1),
        teacher=tiny_model("gpt2", layers=2, seed=2),
        args=config(folder, **RESUMED),
        train_dataset=token_records(16),
    )


def ranked_trainer(folder: Path, batch_size: int, accumulation: int, route: str = "auto") -> AdaKDTrainer:
    """In fp64, so that only a wrong weight of a token makes a difference."""
    return AdaKDTrainer(
        model=tiny_model("llama", seed=1).double(),
        teacher=tiny_model("llama", layers=2, seed=2).double(),
        args=config(
            folder,
            **RANKED,
            save_strategy="no",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            logits_route=route,
        ),
        train_dataset=token_records(24),
        eval_dataset=token_records(16, seed=7),
    )


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Records without a known number."""

    def __init__(self, records: list[Any]) -> None:
        self.records = records

    def __iter__(self) -> Iterator[Any]:
        return iter(self.records)


def held_out_sets() -> dict[str, Any]:
    """For two ranks of batches of 4: 3 or 5 records are left for the last batches, or there is one record in all."""
    alike = [{"input_ids": [5, 6, token, 8], "labels": [-100, 6, token, 8]} for token in range(13)]
    sizes = {"three": 11, "five": 13, "one": 1}
    return {name: token_records(size, seed=size) for name, size in sizes.items()} | {"stream": Stream(alike)}


def evaluated_trainer(folder: Path, route: str) -> AdaKDTrainer:
    """At one temperature, so that `eval_loss` does not depend on the batches either."""
    return AdaKDTrainer(
        model=tiny_model("llama", seed=1).double(),
        teacher=tiny_model("llama", layers=2, seed=2).double(),
        args=config(folder, per_device_eval_batch_size=4, logits_route=route, temperature_scale=0.0),
    )


def nan_trainer(folder: Path, cls: type[AdaKDTrainer] = AdaKDTrainer, **options: Any) -> AdaKDTrainer:
    """Four steps of 2 × 2 records in order, in fp64, under a teacher that is NaN behind token 2 of record 'r9'."""
    named = {name: options.pop(name) for name in ("data_collator", "processing_class") if name in options}
    records = [
        {**record, "input_ids": [min(token, 49) for token in record["input_ids"]], "id": f"r{index}"}
        for index, record in enumerate(token_records(16, vocab_size=50))
    ]
    records[9].update(input_ids=[3, 4, 50, 7, 8], labels=[-100, -100, 50, 7, 8])
    teacher = tiny_model("llama", layers=2, seed=2).double()
    ids: list[torch.Tensor] = []
    teacher.model.embed_tokens.register_forward_hook(lambda module, args, out: ids.append(args[0]))
    teacher.model.norm.register_forward_hook(
        lambda module, args, out: out.masked_fill((ids.pop() == 50).unsqueeze(-1), float("nan"))
    )
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1, "max_steps": 4}
    order = {"train_sampling_strategy": "sequential"}
    return cls(
        model=tiny_model("llama", seed=1).double(),
        teacher=teacher,
        args=config(folder, **{**sizes, **order, "optim": "sgd", **options}),
        train_dataset=records,
        **named,
    )


def experts_trainer(folder: Path, batch_size: int, accumulation: int) -> AdaKDTrainer:
    """One step of four times the same record, under a large auxiliary loss, equal for all parts of the batch."""
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return AdaKDTrainer(
        model=tiny_experts("mixtral", output_router_logits=True, router_aux_loss_coef=5.0),
        teacher=tiny_model("llama", layers=2, seed=2).double(),
        args=config(folder, **RANKED | {"max_steps": 1, "save_strategy": "no"}, **sizes),
        train_dataset=token_records(1) * 4,
    )


def adapted_trainer(folder: Path, batch_size: int = 8, route: str = "auto", **options: Any) -> AdaKDTrainer:
    """A new adapter, with dropout in front of it or not, on a student that has dropout and teaches itself."""
    import peft

    dropout = options.pop("dropout", 0.0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=dropout, target_modules=["c_attn", "c_fc"])
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    given = {"save_strategy": "no", "ce_weight": 0.5, "logits_route": route, **sizes, **options}
    return AdaKDTrainer(
        model=tiny_model("gpt2", layers=2, dropout=dropout, seed=1).double(),
        args=config(folder, **RANKED | given),
        peft_config=lora,
        train_dataset=token_records(24),
        eval_dataset=token_records(16, seed=7),
    )  # fmt: skip


def run_two_ranks(*arguments: str, module: str = "tests.trainer_process") -> None:
    """Run this module, or another one, in two processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs


def train_logs(trainer: AdaKDTrainer) -> list[dict[str, float]]:
    """Train, and return the log lines of the training."""
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


class KilledWhileSaving(AdaKDTrainer):
    """Ends with SIGKILL in the middle of its third checkpoint."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def main(mode: str, folder: Path, route: str = "auto") -> None:
    if mode == "killed":
        resumed_trainer(folder, KilledWhileSaving).train()
    else:
        modes = {
            "rank": run_rank, "evaluation": run_evaluation_rank, "nan": run_nan_rank, "experts": run_experts_rank,
            "adapters": run_adapters_rank,
        }  # fmt: skip
        modes[mode](folder, route)
        gc.collect()  # as in `adakd train`: the process group goes after the trainer
        PartialState().destroy_process_group()


def run_rank(folder: Path, route: str) -> None:
    """One of two ranks: train, evaluate, save weights and logs."""
    trainer = ranked_trainer(folder, batch_size=4, accumulation=1, route=route)
    trainer.train()
    trainer.evaluate()
    result = {"weights": trainer.model.state_dict(), "logs": trainer.state.log_history}
    torch.save(result, folder / f"rank{os.environ['RANK']}.pt")


def run_evaluation_rank(folder: Path, route: str) -> None:
    """One of two ranks: evaluate, save the metrics."""
    metrics = evaluated_trainer(folder, route).evaluate(held_out_sets())
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(metrics))


def run_nan_rank(folder: Path, on_nan: str) -> None:
    """One of two ranks of a run with a loss of NaN on one of them: save what was raised, weights and logs."""
    trainer = nan_trainer(folder, on_nan=on_nan, gradient_accumulation_steps=1, save_strategy="no")
    error = ""
    try:
        trainer.train()
    except NonFiniteLossError as raised:
        error = str(raised)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result = {"weights": trainer.model.state_dict(), "logs": logs, "error": error}
    torch.save(result, folder / f"rank{os.environ['RANK']}.pt")


def run_experts_rank(folder: Path, _: str) -> None:
    """One of two ranks of a run of a mixture of experts: save its weights."""
    trainer = experts_trainer(folder, batch_size=1, accumulation=2)
    trainer.train()
    torch.save(trainer.model.state_dict(), folder / f"rank{os.environ['RANK']}.pt")


def run_adapters_rank(folder: Path, _: str) -> None:
    """One of two ranks of a student that is its own teacher, on each route: train, evaluate, save adapter and logs."""
    for route in ("logits", "hidden"):
        trainer = adapted_trainer(folder, batch_size=4, route=route)
        trainer.train()
        trainer.evaluate()
        weights = {name: value for name, value in trainer.model.state_dict().items() if "lora" in name}
        torch.save({"weights": weights, "logs": trainer.state.log_history}, folder / f"{route}{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
