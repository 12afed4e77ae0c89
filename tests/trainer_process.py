"""What the trainer tests run, in their own process or not: `python -m tests.trainer_process killed|ranks FOLDER`."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from adakd_kernels.integrations.transformers import AdaKDConfig, AdaKDTrainer, NonFiniteLossError
from adakd_kernels.trainer import loading
from adakd_kernels.trainer.packing import pack_records

from .tiny_models import INSTRUCTIONS, tiny_experts, tiny_model, tiny_tokenizer, token_records, write_jsonl

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


class Gradients(TrainerCallback):
    """The gradient that each optimizer step is about to use."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


PLAIN = {
    "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, "save_strategy": "no",
    "train_sampling_strategy": "sequential",
}  # fmt: skip
"""Plain gradient steps on records in order."""

MOVING = {"focus_warmup_ratio": 0.2, "focus_beta": 0.0, "focus_epsilon": 0.01, "focus_delta": 0.3}
"""An adaptive share that moves after a few steps."""


def config(folder: Path, **options: Any) -> AdaKDConfig:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return AdaKDConfig(**{"output_dir": str(folder), "logging_steps": 1, "save_strategy": "steps", **quiet, **options})


def resumed_trainer(folder: Path, cls: type[AdaKDTrainer] = AdaKDTrainer, **options: Any) -> AdaKDTrainer:
    """A run with dropout, so that the random state matters too."""
    return cls(
        model=tiny_model("gpt2", dropout=0.2, seed=1),
        teacher=tiny_model("gpt2", layers=2, seed=2),
        args=config(folder, **RESUMED, **options),
        train_dataset=token_records(16),
    )


def ranked_trainer(folder: Path, batch_size: int, accumulation: int) -> AdaKDTrainer:
    """In fp64, so that only a wrong weight of a token makes a difference."""
    return AdaKDTrainer(
        model=tiny_model("llama", seed=1).double(),
        teacher=tiny_model("llama", layers=2, seed=2).double(),
        args=config(
            folder,
            **RANKED,
            save_strategy="no",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        ),
        train_dataset=token_records(24),
    )


def uneven_records() -> list[dict[str, list[int]]]:
    """Five steps of eight. In the second, two ranks of two micro-batches of two leave rank 1 without a label."""
    records = token_records(40)
    for index in (10, 11, 14, 15):
        records[index]["labels"] = [-100] * len(records[index]["labels"])
    return records


def uneven_run(folder: Path, route: str, selection: str, batch_size: int = 2, accumulation: int = 2) -> dict[str, Any]:
    """A run in fp64 under a share that moves; weights, log lines, and the gradient of each step."""
    gradients = Gradients()
    trainer = AdaKDTrainer(
        model=tiny_model("llama", seed=1).double(),
        teacher=tiny_model("llama", layers=2, seed=2).double(),
        args=config(
            folder, max_steps=5, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            logits_route=route, selection=selection, ce_weight=0.2, **PLAIN, **MOVING,
        ),
        train_dataset=uneven_records(),
        callbacks=[gradients],
    )  # fmt: skip
    logs = train_logs(trainer)
    return {"weights": trainer.model.state_dict(), "logs": logs, "gradients": gradients.steps}


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


def experts_trainer(folder: Path, batch_size: int, accumulation: int, **options: Any) -> AdaKDTrainer:
    """One step of four times the same record, under a large auxiliary loss, equal for all parts of the batch."""
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return AdaKDTrainer(
        model=tiny_experts("mixtral", output_router_logits=True, router_aux_loss_coef=5.0),
        teacher=tiny_model("llama", layers=2, seed=2).double(),
        args=config(folder, **RANKED | {"max_steps": 1, "save_strategy": "no"}, **sizes, **options),
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


def once_for_all_workers(tmp_path_factory: Any, name: str, function: Callable[[Path], None]) -> Path:
    """The folder in which `function` was called, by the first worker that needs it; its failure is that of all."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder: Path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    outcome = folder / "outcome.txt"
    with FileLock(folder.with_suffix(".lock")):
        if not outcome.exists():
            folder.mkdir()
            try:
                function(folder)
                outcome.write_text("")
            except (AssertionError, subprocess.TimeoutExpired) as error:
                outcome.write_text(repr(error))
    failure = outcome.read_text()
    assert not failure, failure
    return folder


def run_two_ranks(folder: Path, *command: str, **environment: str) -> None:
    """Run `SCENARIOS`, or another command, in two processes that find each other and leave their results in files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        **environment,
    }  # fmt: skip
    command = command or ("-m", "tests.trainer_process", "ranks", str(folder))
    ranks = [
        subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    outputs = [process.communicate(timeout=480) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs


def of_both_ranks(folder: Path, scenario: str) -> list[Any]:
    """What the two ranks left of a scenario."""
    return [torch.load(folder / f"{scenario}.rank{rank}.pt") for rank in (0, 1)]


def logged(trainer: AdaKDTrainer) -> list[dict[str, float]]:
    """The log lines of the training, without what differs from one run of it to the next."""
    costs = ("tokens_per_second", "peak_memory_gib")
    lines = [log for log in trainer.state.log_history if "loss" in log]
    return [{name: value for name, value in log.items() if name not in costs} for log in lines]


def train_logs(trainer: AdaKDTrainer) -> list[dict[str, float]]:
    """Train, and return the log lines of the training."""
    trainer.train()
    return logged(trainer)


class KilledWhileSaving(AdaKDTrainer):
    """Ends with SIGKILL in the middle of its third checkpoint."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def evaluation_run(folder: Path, route: str) -> dict[str, float]:
    """The metrics of `held_out_sets`."""
    metrics: dict[str, float] = evaluated_trainer(folder, route).evaluate(held_out_sets())
    return metrics


def nan_run(folder: Path, on_nan: str, selection: str) -> dict[str, Any]:
    """A run with a loss of NaN on one of two ranks: what was raised, weights and logs."""
    options = {"on_nan": on_nan, "selection": selection, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    trainer, error = nan_trainer(folder, **options), ""
    try:
        trainer.train()
    except NonFiniteLossError as raised:
        error = str(raised)
    logs = logged(trainer)
    return {"weights": trainer.model.state_dict(), "logs": logs, "error": error}


def experts_run(folder: Path) -> dict[str, Any]:
    """The weights that a mixture of experts has after its step."""
    trainer = experts_trainer(folder, batch_size=1, accumulation=2)
    trainer.train()
    return trainer.model.state_dict()


def adapters_run(folder: Path, route: str) -> dict[str, Any]:
    """A student that is its own teacher: its adapter after the training, and the logs, with an evaluation's."""
    trainer = adapted_trainer(folder, batch_size=4, route=route)
    trainer.train()
    trainer.evaluate()
    weights = {name: value for name, value in trainer.model.state_dict().items() if "lora" in name}
    return {"weights": weights, "logs": trainer.state.log_history}


def data_run(folder: Path) -> dict[str, Any]:
    """Records of a file and of a list, the file's packed, and how many records this rank tokenised."""
    args, tokenizer = config(folder, packing=True, max_length=200), tiny_tokenizer()
    file, texts = folder / "train.jsonl", [{**record, "output": "b"} for record in INSTRUCTIONS]
    if args.process_index == 0:
        folder.mkdir(exist_ok=True)
        write_jsonl(file)
    PartialState().wait_for_everyone()
    with patch.object(loading, "tokenize_record", wraps=loading.tokenize_record) as tokenize:
        loaded = [loading.load_for(args, data, tokenizer, "train_dataset").records for data in (file, texts)]
        found = [list(records) for records in (*loaded, pack_records(args, loaded[0]))]
    return {"records": found, "calls": tokenize.call_count}


def policies_run(folder: Path) -> dict[str, Any]:
    """What `test_trl_policies.py` asks of a rank."""
    from .test_trl_policies import one_of_two_ranks

    return one_of_two_ranks(folder)


def sharded_run(folder: Path) -> dict[str, Any]:
    """What `test_sharded_models.py` asks of a rank."""
    from .test_sharded_models import one_of_two_ranks

    return one_of_two_ranks(folder)


SCENARIOS: dict[str, Callable[[Path], Any]] = {"experts": experts_run, "data": data_run, "sharded": sharded_run}
if find_spec("trl"):
    SCENARIOS["policies"] = policies_run
for _route in ("logits", "hidden"):
    SCENARIOS[f"evaluation-{_route}"] = partial(evaluation_run, route=_route)
    if find_spec("peft"):
        SCENARIOS[f"adapters-{_route}"] = partial(adapters_run, route=_route)
    for _selection in ("micro_batch", "step"):
        SCENARIOS[f"uneven-{_route}-{_selection}"] = partial(uneven_run, route=_route, selection=_selection)
for _on_nan in ("raise", "skip"):
    for _selection in ("micro_batch", "step"):
        SCENARIOS[f"nan-{_on_nan}-{_selection}"] = partial(nan_run, on_nan=_on_nan, selection=_selection)
"""What two ranks run, one after the other: two processes for all of it, because each takes seconds to start."""


def main(mode: str, folder: Path) -> None:
    if mode == "killed":
        resumed_trainer(folder, KilledWhileSaving).train()
        return
    for name, scenario in SCENARIOS.items():
        torch.save(scenario(folder / name), folder / f"{name}.rank{os.environ['RANK']}.pt")
        gc.collect()  # as in `adakd train`: the process group goes after the trainer
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
