"""One run of the experiment: a supervised start, an arm's training, its evaluation, and the line of results."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from adakd_kernels.demo.models import cut_layers, load_model, save_model
from adakd_kernels.evaluation import Prompt, Settings, evaluate, load_prompts
from adakd_kernels.evaluation.distances import DISTANCES
from adakd_kernels.evaluation.prompts import set_names
from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer, load_records

from .arms import ARMS, ArmConfig, RecordingLoss

START, TEACHER = "start", "teacher"
"""Arms without training: the student that all arms of a seed begin with, and the teacher."""


@dataclass(frozen=True)
class Plan:
    """What all runs have in common; equal in all lines of a table.

    Attributes:
        first_cut, layers_cut: the layers that the student does not have.
        start_steps: of supervised training on the data, before the arms.
        steps: of each arm.
        batch_size: records of a step.
        learning_rate, start_learning_rate: peaks of AdamW; a tenth of the steps warms up, a cosine to 0 follows.
        max_length: tokens of a record, in training and evaluation; longer ones are left out.
        max_new_tokens: of an answer.
        prompts: of each held-out set, the first that fit.
        draws: seeds of the sampling.
    """

    first_cut: int = 10
    layers_cut: int = 10
    start_steps: int = 60
    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 3e-4
    start_learning_rate: float = 5e-4
    max_length: int = 192
    max_new_tokens: int = 64
    prompts: int = 64
    draws: tuple[int, ...] = (10, 20, 30, 40, 50)


class Experiment:
    """The runs over one teacher and data, in a folder that keeps what is done.

    Args:
        plan: see `Plan`.
        teacher: folder of the teacher.
        train: file to train on.
        held_out: files to evaluate on, each a set; NAME=FILE gives it a name.
        folder: for starts, students that are not evaluated yet, and evaluations that go on.
    """

    def __init__(self, plan: Plan, teacher: Path, train: str, held_out: list[str], folder: Path) -> None:
        files = set_names(held_out)
        self.inputs = {
            "teacher": _digest(*sorted(path for path in teacher.iterdir() if path.is_file())),
            "train": _digest(Path(train)),
            "held_out": {name: _digest(Path(path)) for name, path in files.items()},
        }
        # What another plan, teacher or file left there is not gone on with.
        mark = sha256(json.dumps([asdict(plan), self.inputs]).encode()).hexdigest()[:16]
        self.plan, self.train, self.folder = plan, train, folder / mark
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher, self.tokenizer = load_model(teacher, dtype=torch.bfloat16, device=self.device)
        self.sets = {name: self._prompts(path) for name, path in files.items()}

    def _prompts(self, path: str) -> list[Prompt]:
        fit = [
            prompt
            for prompt in load_prompts(path, self.tokenizer)
            if max(len(ids) for ids, _ in prompt.sequences) <= self.plan.max_length
            and 0 < len(prompt.prompt_ids) <= self.plan.max_length - self.plan.max_new_tokens
        ]
        if not fit:
            raise ValueError(
                f"{path}: no prompt with its reference is within max_length={self.plan.max_length}: raise it"
            )
        return fit[: self.plan.prompts]

    def run(self, arm: str, seed: int | None, before: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Train and evaluate an arm; what an earlier call of the same arm and seed has done is read.

        What is read stays until `forget`, which is called once the line is kept.

        Args:
            arm: of `ARMS`, or `START` or `TEACHER`.
            seed: of the order of the data and of the start; None for the teacher.
            before: the lines of this seed's earlier arms.

        Returns:
            The line of results.
        """
        folder = self._folder(arm, seed)
        student = self.teacher
        found: dict[str, Any] = {}
        if seed is not None:
            start = self._start(seed)
            place = start if arm == START else folder / "student"
            if arm != START and not (folder / "trained.json").is_file():
                self._train(arm, seed, start, before, folder)
            student, _ = load_model(place, dtype=torch.bfloat16, device=self.device)
            found = {} if arm == START else json.loads((folder / "trained.json").read_text())
        same = {"plan": asdict(self.plan), "inputs": self.inputs}
        return {"arm": arm, "seed": seed, **found, **self._evaluate(student, folder), **same}

    def forget(self, arm: str, seed: int | None) -> None:
        """Remove what `run` has left of an arm and seed, but the start."""
        shutil.rmtree(self._folder(arm, seed), ignore_errors=True)

    def _folder(self, arm: str, seed: int | None) -> Path:
        return self.folder / (arm if seed is None else f"{seed}-{arm}")

    def _start(self, seed: int) -> Path:
        """The student that a seed's arms begin with."""
        place = self.folder / f"{seed}-{START}-student"
        if not place.is_dir():
            student = cut_layers(self.teacher, self.plan.first_cut, self.plan.layers_cut).requires_grad_(True).float()
            options = self._options(seed, self.plan.start_steps, self.plan.start_learning_rate)
            trainer = Trainer(
                model=student,
                args=TrainingArguments(str(self.folder / "trainer"), **options),
                train_dataset=load_records(
                    self.train, self.tokenizer, self.plan.max_length, long_records="drop"
                ).records,
                data_collator=AdaKDDataCollator(logits_to_keep=False),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            save_model(student.to(torch.bfloat16), self.tokenizer, place)
        return place

    def _options(self, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
        return {
            "max_steps": steps,
            "per_device_train_batch_size": self.plan.batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 10),
            "optim": "adamw_torch_fused",
            "bf16": True,
            "use_cpu": self.device.type == "cpu",
            "dataloader_pin_memory": self.device.type == "cuda",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": seed,
        }

    def _train(self, arm: str, seed: int, start: Path, before: dict[str, dict[str, Any]], folder: Path) -> None:
        method, plan = ARMS[arm], self.plan
        options = dict(method.options)
        if method.temperature_of is not None:
            options["base_temperature"] = before[method.temperature_of]["mean_temperature"]
        shares = None if method.share_of is None else before[method.share_of]["shares"]
        # The optimizer adds steps that bfloat16 would round away.
        student, _ = load_model(start, dtype=torch.float32, device=self.device)
        args = ArmConfig(
            str(folder / "trainer"), **self._options(seed, plan.steps, plan.learning_rate), **options, shares=shares,
            max_length=plan.max_length, long_records="drop", token_records=0,
        )  # fmt: skip
        trainer = AdaKDTrainer(
            model=student, teacher=self.teacher, args=args, train_dataset=self.train, processing_class=self.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        clocks = time.perf_counter(), time.process_time()
        trainer.train()
        seconds = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        temperatures = cast(RecordingLoss, trainer.loss_fn).temperatures
        total, count = (sum(part) for part in zip(*temperatures, strict=True))
        logs = [log for log in trainer.state.log_history if "loss" in log]
        # A log has the share of the next step.
        found = {
            "options": options,
            "mean_temperature": total / count,
            "shares": shares or [1.0, *(log["focus_ratio"] for log in logs[:-1])],
            "losses": [log["loss"] for log in logs],
            "train_seconds": seconds[0],
            "train_cpu_seconds": seconds[1],
        }
        # Logits are linear in the last norm's weight; those of the head may be the embeddings too.
        student.model.norm.weight.data.div_(method.sharpen)
        save_model(student.to(torch.bfloat16), self.tokenizer, folder / "student")
        partial = folder / "trained.partial"
        partial.write_text(json.dumps(found))
        os.replace(partial, folder / "trained.json")

    def _evaluate(self, student: Any, folder: Path) -> dict[str, Any]:
        """What was found in each set: means with intervals, and of each prompt the numbers, rounded, for pairing."""
        clock = time.process_time()
        common: dict[str, Any] = {"max_new_tokens": self.plan.max_new_tokens, "max_length": self.plan.max_length}
        sampled = evaluate(
            student, self.tokenizer, self.sets, Settings(seeds=self.plan.draws, **common), folder=folder / "sampled",
            teacher=self.teacher,
        )  # fmt: skip
        greedy = evaluate(student, self.tokenizer, self.sets, Settings(greedy=True, **common), folder=folder / "greedy")
        sets = {}
        for name in self.sets:
            rows = [result["sets"][name]["per_prompt"] for result in (sampled, greedy)]
            prompts = {"key": [row["key"] for row in rows[0]], "tokens": [row["tokens"] for row in rows[0]]}
            for measure in DISTANCES:
                prompts[measure] = [_short(row[measure]) for row in rows[0]]
            prompts["rouge_l"] = [[_short(score) for score in row["rouge_l"].values()] for row in rows[0]]
            prompts["rouge_l_greedy"] = [_short(row["rouge_l"]["greedy"]) for row in rows[1]]
            sets[name] = prompts
        return {"sets": sets, "evaluation_cpu_seconds": time.process_time() - clock}


def _digest(*paths: Path) -> str:
    """Of the contents of files."""
    found = sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**24):
                found.update(block)
    return found.hexdigest()[:16]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
