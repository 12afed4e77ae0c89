"""DeepSpeed: a student in an engine of ZeRO-3 or ZeRO-2 on two processes, beside the same run in one process.

`python -m tests.test_zero3` is a rank. Its processes are not those of the other tests: DeepSpeed would stay with them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adakd_kernels.integrations.transformers import AdaKDTrainer, NonFiniteLossError

from .test_sharded_models import options_of, with_nan
from .test_sharded_models import results as of_one_process
from .tiny_models import tiny_model
from .trainer_process import logged, run_two_ranks

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed, which `make setup` does not install"),
]


class InEngine(AdaKDTrainer):
    """Keeps the gradient, put together and not yet clipped, that each step of the engine is about to use."""

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        from deepspeed.utils import safe_get_full_grad

        prepared = super()._prepare_for_training(*args, **kwargs)
        self.gradients: list[dict[str, Tensor]] = []
        engine: Any = self.model_wrapped
        step = engine.step

        def watched() -> None:
            named = engine.module.named_parameters()
            self.gradients.append({name: safe_get_full_grad(parameter).clone() for name, parameter in named})
            step()

        engine.step = watched
        return prepared


def pair(tied: bool) -> tuple[Any, Any]:
    """In fp32, which DeepSpeed asks for."""
    architecture = "smollm2" if tied else "llama"
    return tiny_model(architecture, layers=2, seed=1), tiny_model(architecture, layers=2, hidden=32, seed=2)


def of_deepspeed(stage: int) -> dict[str, Any]:
    # A threshold of 0 splits small weights too.
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return {
        "zero_optimization": {**zero, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip


def results(trainer: Any, **options: Any) -> dict[str, Any]:
    """Log lines, metrics and whole weights after a run."""
    trainer.train(**options)
    logs = logged(trainer)
    metrics, model = trainer.evaluate(), trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "logs": logs,
        "metrics": metrics,
        "weights": {name: value.clone() for name, value in (model or {}).items()},  # of ZeRO-3, on the first rank
        "hidden": trainer._head_options is not None,
        "gradients": trainer.gradients,
        "split": [any(hasattr(p, "ds_id") for p in m.parameters()) for m in (trainer.model, trainer.teacher)],
    }


def split_run(folder: Path, route: str, tied: bool, option: str, stage: int) -> dict[str, Any]:
    options = options_of(folder, logits_route=route, teacher_parallel=option, deepspeed=of_deepspeed(stage))
    student, teacher = pair(tied)
    return results(InEngine(model=student, teacher=teacher, **options))


def loaded_run(folder: Path, option: str) -> dict[str, Any]:
    """Models in folders: transformers splits the student while it loads it, and the teacher if it is to be split."""
    options = options_of(folder, logits_route="hidden", teacher_parallel=option, deepspeed=of_deepspeed(3))
    paths = [folder.parent / name for name in ("student", "teacher")]
    return results(InEngine(model=paths[0], teacher=paths[1], **options))


def refused_run(folder: Path) -> str:
    """What is said of a teacher that the user has loaded while ZeRO-3 was on."""
    options = options_of(folder, deepspeed=of_deepspeed(3))
    teacher = AutoModelForCausalLM.from_pretrained(folder.parent / "teacher")
    with pytest.raises(ValueError, match="teacher") as raised:
        AdaKDTrainer(model=tiny_model("llama"), teacher=teacher, **options)
    return str(raised.value)


def resumed_run(folder: Path) -> list[dict[str, Any]]:
    steps = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1}
    found = []
    for resume in ({}, {"resume_from_checkpoint": str(folder / "checkpoint-1")}):
        student, teacher = pair(tied=False)
        options = options_of(folder, **steps, logits_route="hidden", deepspeed=of_deepspeed(3))
        found.append(results(InEngine(model=student, teacher=teacher, **options), **resume))
    return found


def nan_run(folder: Path, route: str, on_nan: str, of: str = "teacher") -> dict[str, Any]:
    """In the second step, the last micro-batch of rank 0 has a loss of NaN."""
    options = options_of(folder, logits_route=route, on_nan=on_nan, deepspeed=of_deepspeed(3))
    for record in options["train_dataset"]:
        record["input_ids"] = [min(token, 49) for token in record["input_ids"]]
    options["train_dataset"][13] = {"input_ids": [3, 4, 50, 7, 8], "labels": [-100, -100, 50, 7, 8], "id": "r13"}
    student, teacher = pair(tied=False)
    with_nan(student if of == "student" else teacher)
    try:
        return results(InEngine(model=student, teacher=teacher, **options)) | {"error": ""}
    except NonFiniteLossError as error:
        return {"error": str(error)}


SPLITS = [
    ("hidden", False, "zero3", 3), ("hidden", True, "none", 3), ("hidden", True, "none", 2),
    ("logits", True, "zero3", 3),
]  # fmt: skip

RUNS: dict[str, Callable[[Path], Any]] = {
    **{str(index): partial(split_run, route=split[0], tied=split[1], option=split[2], stage=split[3])
       for index, split in enumerate(SPLITS)},
    "loaded-none": partial(loaded_run, option="none"), "loaded-zero3": partial(loaded_run, option="zero3"),
    "refused": refused_run, "resumed": resumed_run,
    "nan-raise": partial(nan_run, route="hidden", on_nan="raise"),
    "nan-skip-hidden": partial(nan_run, route="hidden", on_nan="skip"),
    "nan-skip-logits": partial(nan_run, route="logits", on_nan="skip"),
    "nan-student": partial(nan_run, route="hidden", on_nan="skip", of="student"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found. Their cache of extensions is their own: a lock that one left behind would stop them."""
    folder = tmp_path_factory.mktemp("zero3")
    for model, name in zip(pair(tied=False), ("student", "teacher"), strict=True):
        model.save_pretrained(folder / name)
    command = ("-m", "tests.test_zero3", str(folder))
    run_two_ranks(folder, *command, TORCH_EXTENSIONS_DIR=str(folder / "extensions"), DS_ACCELERATOR="cpu")
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The run of one process on the micro-batches of both ranks."""
    done: dict[Any, dict[str, Any]] = {}

    def run(route: str, tied: bool) -> dict[str, Any]:
        if (route, tied) not in done:
            options = options_of(tmp_path_factory.mktemp("alone"), 4, logits_route=route)
            student, teacher = pair(tied)
            done[route, tied] = of_one_process(AdaKDTrainer(model=student, teacher=teacher, **options))
        return done[route, tied]

    return run


def assert_equal(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Gradients by their norm, clipped weights, losses and metrics; one share on both ranks."""
    torch.testing.assert_close(found[0]["weights"], expected["weights"], rtol=1e-6, atol=1e-6)
    for rank in found:
        for got, wanted in zip(rank["gradients"], expected["gradients"], strict=True):
            # That of one process is clipped already; the norms before are those of the log lines.
            got, wanted = ({name: value / norm(of) for name, value in of.items()} for of in (got, wanted))
            assert norm({name: got[name] - value for name, value in wanted.items()}) <= 1e-6
        for got, wanted in zip(rank["logs"], expected["logs"], strict=True):
            for name in ("loss", "grad_norm", "loss_ema"):
                assert got[name] == pytest.approx(wanted[name], rel=1e-6), name
            assert got["focus_ratio"] == wanted["focus_ratio"]
        for name in ("forward_kl", "reverse_kl", "cross_entropy", "agreement"):
            assert rank["metrics"][f"eval_{name}"] == pytest.approx(expected["metrics"][f"eval_{name}"], rel=1e-6)


def norm(values: dict[str, Tensor]) -> float:
    return float(torch.stack([value.double().norm() for value in values.values()]).norm())


@pytest.mark.parametrize(("index", "split"), list(enumerate(SPLITS)), ids=["-".join(map(str, s)) for s in SPLITS])
def test_two_ranks_equal_one(
    ranks: list[dict[str, Any]], alone: Callable[..., dict[str, Any]], index: int, split: Any
) -> None:
    route, tied, option, stage = split
    found = [rank[str(index)] for rank in ranks]
    assert_equal(found, alone(route, tied))
    assert all(rank["hidden"] == (route == "hidden") for rank in found)
    assert all(rank["split"] == [stage == 3, option == "zero3"] for rank in found)


@pytest.mark.parametrize("option", ["none", "zero3"])
def test_models_are_loaded(ranks: list[dict[str, Any]], alone: Callable[..., dict[str, Any]], option: str) -> None:
    found = [rank[f"loaded-{option}"] for rank in ranks]
    assert_equal(found, alone("hidden", False))
    assert all(rank["split"] == [True, option == "zero3"] and rank["hidden"] for rank in found)


def test_a_teacher_that_was_split_while_loading_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"].startswith("the teacher was loaded while ZeRO-3 was on")
        assert "set teacher_parallel='zero3'" in rank["refused"]


def test_a_run_is_resumed_to_the_same_numbers(ranks: list[dict[str, Any]]) -> None:
    one, resumed = ranks[0]["resumed"]
    assert all(torch.equal(resumed["weights"][name], value) for name, value in one["weights"].items())
    assert [log["focus_ratio"] for log in resumed["logs"]] == [log["focus_ratio"] for log in one["logs"]]


def test_nan(ranks: list[dict[str, Any]]) -> None:
    """DeepSpeed takes a step at the end of a backward, so the loss is looked at before. It leaves out steps itself."""
    (first, second) = (rank["nan-raise"]["error"] for rank in ranks)
    assert first == second and first.startswith("step 2, ") and "rank 0: the loss is nan on " in first
    for route in ("hidden", "logits"):
        for rank in (rank[f"nan-skip-{route}"] for rank in ranks):
            assert [log["skipped_micro_batches"] for log in rank["logs"]] == [0, 1]
            assert all(value.isfinite().all() for value in rank["weights"].values())
    for rank in (rank["nan-student"] for rank in ranks):
        assert [log["skipped_micro_batches"] for log in rank["logs"]] == [0, 2]
        assert all(value.isfinite().all() for value in rank["weights"].values())


def main(folder: Path) -> None:
    import deepspeed

    # An extension for messages in shared memory, which takes a minute to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.save({name: run(folder / name) for name, run in RUNS.items()}, folder / f"rank{os.environ['RANK']}.pt")
    sys.stdout.flush()
    os._exit(0)  # gloo and DeepSpeed's own exit handlers now and then abort


if __name__ == "__main__":
    main(Path(sys.argv[1]))
