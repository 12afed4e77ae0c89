"""Students and teachers that FSDP2 splits over two processes, beside the same run in one process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import PartialState, cpu_offload, disk_offload
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed.configuration_utils import DistributedConfig

from adakd_kernels.integrations.transformers import AdaKDTrainer, NonFiniteLossError
from adakd_kernels.trainer.sharded import FSDP_NEEDS_AN_ACCELERATOR, adopt_fully_sharded, fsdp_plugin

from .tiny_models import tiny_model
from .trainer_process import MOVING, PLAIN, config, logged, of_both_ranks, uneven_records

pytestmark = pytest.mark.fast


class Split(NamedTuple):
    """What is split, and into which units: 'root' has the head in the model's own unit, 'own' in one of its own."""

    route: str
    tied: bool
    student: str = "none"  # or 'accelerate': its plugin splits the student
    teacher: str = "none"
    option: str = "none"  # teacher_parallel
    selection: str = "micro_batch"


SPLITS = [
    Split("hidden", False, "root", "own"), Split("hidden", False, "own", "root"),
    Split("hidden", True, "root", "none"), Split("hidden", True, "own", "own"),
    Split("logits", False, "own", "own"), Split("logits", True, "root", "none"),
    Split("hidden", False, "none", "none", "fsdp"), Split("logits", True, "own", "none", "fsdp"),
    Split("hidden", True, "accelerate", "none", "fsdp"), Split("logits", False, "accelerate", "own"),
    Split("hidden", False, "root", "own", selection="step"),
]  # fmt: skip


class WholeGradients(TrainerCallback):
    """The gradient that each optimizer step is about to use, put together."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = ((name, p.grad) for name, p in model.named_parameters())
        self.steps.append({name: whole(grad).clone() for name, grad in grads if grad is not None})


class SplitByAccelerate(AdaKDTrainer):
    """Has accelerate's plugin split the student on a CPU too, as it does on accelerators."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        adopt_fully_sharded(self.accelerator, fsdp_plugin(self.args))
        self.is_fsdp_enabled = True


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if is_part(tensor) else tensor


def is_part(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def shard(model: Any, units: str = "root", **options: Any) -> Any:
    if units not in ("root", "own"):
        return model
    for layer in (module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")):
        fully_shard(layer, **options)
    if units == "own":
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        fully_shard([embedding, head] if embedding.weight is head.weight else head, **options)
    return fully_shard(model, **options)


def pair(tied: bool = False) -> tuple[Any, Any]:
    """A student and a teacher in fp64."""
    architecture = "smollm2" if tied else "llama"
    student = tiny_model(architecture, layers=2, seed=1)
    return student.double(), tiny_model(architecture, layers=2, hidden=32, seed=2).double()


def options_of(folder: Path, accumulation: int = 2, **options: Any) -> dict[str, Any]:
    """The options of a run and its data: clipped, with a share that moves and a rank without a label in one step."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    return {
        "args": config(folder, **PLAIN | MOVING | sizes | {"ce_weight": 0.2, "max_grad_norm": 0.05} | options),
        "train_dataset": uneven_records(),
        "eval_dataset": uneven_records()[:7],
    }


def split_trainer(folder: Path, split: Split, accumulation: int = 2, **options: Any) -> AdaKDTrainer:
    by_accelerate = split.student == "accelerate"
    if by_accelerate:
        options["fsdp"] = True
    named = {"logits_route": split.route, "teacher_parallel": split.option, "selection": split.selection}
    student, teacher = pair(split.tied)
    return (SplitByAccelerate if by_accelerate else AdaKDTrainer)(
        model=shard(student, split.student),
        teacher=shard(teacher, split.teacher),
        **options_of(folder, accumulation, **named, **options),
    )


def results(trainer: AdaKDTrainer, **options: Any) -> dict[str, Any]:
    """What a run leaves: log lines, gradients, weights, an evaluation, and which models are split."""
    gradients = WholeGradients()
    trainer.add_callback(gradients)
    trainer.train(**options)
    return {
        "logs": logged(trainer),
        "gradients": gradients.steps,
        "weights": {name: whole(value) for name, value in trainer.model.state_dict().items()},
        "metrics": trainer.evaluate(),
        "hidden": trainer._head_options is not None,
        "split": [any(map(is_part, model.state_dict().values())) for model in (trainer.model, trainer.teacher)],
    }


def split_run(folder: Path, split: Split, accumulation: int = 2) -> dict[str, Any]:
    return results(split_trainer(folder, split, accumulation))


def evaluated_first_run(folder: Path) -> dict[str, Any]:
    trainer = split_trainer(folder, Split("hidden", False, "root", "own"))
    trainer.evaluate()
    return results(trainer)


def resumed_run(folder: Path) -> dict[str, Any]:
    """Of Adam: a run to its end, one that goes on from the checkpoint in its middle, and that checkpoint's model."""
    split = Split("hidden", True, "root", "own")
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1}
    one, other = (split_trainer(folder, split, **options) for _ in range(2))
    found = {"one": results(one), "resumed": results(other, resume_from_checkpoint=str(folder / "checkpoint-1"))}
    saved = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2", dtype="auto")
    return found | {"saved": saved.state_dict()}


def loaded_run(folder: Path) -> dict[str, Any]:
    """Models that transformers splits while it loads them, each process its part."""
    saved = folder / "student", folder / "teacher"
    options = options_of(folder, logits_route="hidden", teacher_parallel="fsdp")
    if options["args"].process_index == 0:
        for model, path in zip(pair(), saved, strict=True):
            model.save_pretrained(path)
    PartialState().wait_for_everyone()
    split = DistributedConfig(fsdp_size=2)
    student = AutoModelForCausalLM.from_pretrained(saved[0], distributed_config=split, dtype="auto")
    return results(AdaKDTrainer(model=student, teacher=saved[1], **options))


def ram_efficient_run(folder: Path) -> dict[str, Any]:
    """Accelerate's FSDP2 where the first rank alone has the weights of the student."""
    options = options_of(folder, logits_route="hidden", fsdp=True, fsdp_config={"cpu_ram_efficient_loading": True})
    student, teacher = pair()
    if options["args"].process_index > 0:
        for parameter in student.parameters():
            nn.init.zeros_(parameter)
    return results(SplitByAccelerate(model=student, teacher=teacher, **options))


def adapted_run(folder: Path, accumulation: int = 2, split: bool = True) -> dict[str, Any]:
    """A LoRA student."""
    import peft

    student, teacher = pair()
    student = peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights="gaussian"))
    student = shard(student.double()) if split else student.double()
    options = options_of(folder, accumulation, logits_route="hidden")
    return results(AdaKDTrainer(model=student, teacher=teacher, **options))


def half_precision_run(folder: Path) -> list[float]:
    """The first loss from hidden states and from logits where FSDP2 computes in bf16, and the one in fp64."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    losses = []
    for route in ("hidden", "logits"):
        student, teacher = (shard(model.float(), "own", mp_policy=policy) for model in pair())
        options = options_of(folder, logits_route=route, max_steps=1)
        losses.append(results(AdaKDTrainer(model=student, teacher=teacher, **options))["logs"][0]["loss"])
    return losses


def with_nan(model: nn.Module, token: int = 50) -> None:
    """Have the last hidden state of a token, and what goes back through it, be NaN."""
    ids: list[Tensor] = []
    inner: Any = model.model
    inner.embed_tokens.register_forward_hook(lambda module, args, out: ids.append(args[0]))
    inner.norm.register_forward_hook(
        lambda module, args, out: out * torch.where(ids.pop() == token, torch.nan, 1.0).unsqueeze(-1)
    )


def nan_run(
    folder: Path, route: str, on_nan: str = "skip", of: str = "teacher", accumulation: int = 2, split: bool = True
) -> dict[str, Any]:
    """In the second step, the last micro-batch of rank 0 has a loss of NaN, because of one of the models."""
    options = options_of(folder, accumulation, logits_route=route, on_nan=on_nan)
    for record in options["train_dataset"]:
        record["input_ids"] = [min(token, 49) for token in record["input_ids"]]
    options["train_dataset"][13] = {"input_ids": [3, 4, 50, 7, 8], "labels": [-100, -100, 50, 7, 8], "id": "r13"}
    student, teacher = pair()
    with_nan(student if of == "student" else teacher)
    trainer, error = AdaKDTrainer(model=shard(student) if split else student, teacher=teacher, **options), ""
    try:
        found = results(trainer)
    except NonFiniteLossError as raised:
        found, error = {"weights": {n: whole(value) for n, value in trainer.model.state_dict().items()}}, str(raised)
    return found | {"error": error}


def refused_run(folder: Path) -> dict[str, str]:
    """What is said of students and teachers that do not go together."""
    import peft

    found = {}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    adapted, split = (peft.get_peft_model(pair()[0], lora) for _ in range(2))
    streamed = cpu_offload(pair()[1], execution_device=torch.device("cpu"))
    for name, models, option in (
        ("own base, option", (adapted, None), "fsdp"),
        ("own base, student", (shard(split), None), "none"),
        ("streamed", (pair()[0], streamed), "fsdp"),
    ):
        with pytest.raises(ValueError, match="teach") as raised:
            AdaKDTrainer(model=models[0], teacher=models[1], **options_of(folder, teacher_parallel=option))
        found[name] = str(raised.value)
    return found


def said_run(folder: Path) -> list[str]:
    """What the trainer says where FSDP is asked for on a CPU."""
    said: list[str] = []
    logger, handler = logging.getLogger("adakd_kernels.trainer.trainer"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    AdaKDTrainer(model=tiny_model("llama"), teacher=tiny_model("llama", seed=1), args=config(folder, fsdp=True))
    logger.removeHandler(handler)
    return said


RUNS: dict[str, Callable[[Path], Any]] = {
    **{str(index): partial(split_run, split=split) for index, split in enumerate(SPLITS)},
    "evaluated first": evaluated_first_run, "resumed": resumed_run, "loaded": loaded_run,
    "ram efficient": ram_efficient_run, "said": said_run,
    "half precision": half_precision_run, "nan-raise": partial(nan_run, route="hidden", on_nan="raise"),
    **{f"nan-{route}-{of}": partial(nan_run, route=route, of=of)
       for route, of in (("hidden", "student"), ("hidden", "teacher"), ("logits", "teacher"))},
    **({"adapted": adapted_run, "refused": refused_run} if find_spec("peft") else {}),
}  # fmt: skip


def one_of_two_ranks(folder: Path) -> dict[str, Any]:
    """What the tests below ask of a rank."""
    return {name: run(folder / name) for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def ranks(two_ranks: Path) -> list[dict[str, Any]]:
    """What the two ranks found."""
    return of_both_ranks(two_ranks, "sharded")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The run of one process on the micro-batches of both ranks, by route, head and selection."""
    done: dict[Split, dict[str, Any]] = {}

    def run(route: str, tied: bool, selection: str = "micro_batch") -> dict[str, Any]:
        split = Split(route, tied, selection=selection)
        if split not in done:
            done[split] = split_run(tmp_path_factory.mktemp("alone"), split, accumulation=4)
        return done[split]

    return run


def assert_equal(found: list[dict[str, Any]], expected: dict[str, Any], close: float = 1e-6) -> None:
    """Gradients by their norm, clipped weights, losses, metrics; the share is the same on both ranks to the bit."""
    for rank in found:
        for got, wanted in zip(rank["gradients"], expected["gradients"], strict=True):
            assert norm({name: got[name] - value for name, value in wanted.items()}) <= close * norm(wanted)
        for name, value in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=close, atol=close)
        for got, wanted in zip(rank["logs"], expected["logs"], strict=True):
            for name in ("loss", "grad_norm", "loss_ema", "difficulty_p50", "temperature_p90"):
                assert got[name] == pytest.approx(wanted[name], rel=close), name
        for name in ("forward_kl", "reverse_kl", "cross_entropy", "agreement"):
            assert rank["metrics"][f"eval_{name}"] == pytest.approx(expected["metrics"][f"eval_{name}"], rel=close)
    first, second = ([log["focus_ratio"] for log in rank["logs"]] for rank in found)
    assert first == second == [log["focus_ratio"] for log in expected["logs"]] and len(set(first)) == len(first)


def norm(gradient: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in gradient.values()]).norm())


@pytest.mark.parametrize(("index", "split"), list(enumerate(SPLITS)), ids=["-".join(map(str, s)) for s in SPLITS])
def test_two_ranks_equal_one(
    ranks: list[dict[str, Any]], alone: Callable[..., dict[str, Any]], index: int, split: Split
) -> None:
    found = [rank[str(index)] for rank in ranks]
    assert_equal(found, alone(split.route, split.tied, split.selection))
    for rank in found:
        assert rank["hidden"] == (split.route == "hidden")
        assert rank["split"] == [split.student != "none", split.teacher != "none" or split.option != "none"]


@pytest.mark.parametrize("name", ["evaluated first", "loaded", "ram efficient"])
def test_other_ways_to_split(ranks: list[dict[str, Any]], alone: Callable[..., dict[str, Any]], name: str) -> None:
    assert_equal([rank[name] for rank in ranks], alone("hidden", False))
    assert all(rank[name]["hidden"] and rank[name]["split"] == [True, name != "ram efficient"] for rank in ranks)


def test_a_run_is_resumed_to_the_same_numbers(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["resumed"] for rank in ranks):
        one, resumed = found["one"], found["resumed"]
        for got, wanted in zip(resumed["gradients"], one["gradients"][1:], strict=True):
            assert all(torch.equal(got[name], value) for name, value in wanted.items())
        for name, value in one["weights"].items():
            assert torch.equal(resumed["weights"][name], value) and torch.equal(found["saved"][name], value)
        assert [log["focus_ratio"] for log in resumed["logs"]] == [log["focus_ratio"] for log in one["logs"]]


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_an_adapter_is_trained(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    assert_equal([rank["adapted"] for rank in ranks], adapted_run(tmp_path, accumulation=4, split=False))


def test_half_precision_of_fsdp(ranks: list[dict[str, Any]], alone: Callable[..., dict[str, Any]]) -> None:
    """The routes differ by rounding: not more than either does from fp64."""
    exact = alone("hidden", False)["logs"][0]["loss"]
    for hidden, logits in (rank["half precision"] for rank in ranks):
        assert abs(hidden - logits) <= 2 * abs(logits - exact) + 1e-3 * abs(exact)


@pytest.mark.parametrize("route", ["hidden", "logits"])
def test_a_loss_of_nan_is_left_out(ranks: list[dict[str, Any]], tmp_path: Path, route: str) -> None:
    """Its micro-batch alone where the teacher is at fault, as in one process."""
    found = [rank[f"nan-{route}-teacher"] for rank in ranks]
    expected = nan_run(tmp_path, route, accumulation=4, split=False)
    for rank in found:
        for got, wanted in zip(rank["gradients"], expected["gradients"], strict=True):
            assert norm({name: got[name] - value for name, value in wanted.items()}) <= 1e-6 * norm(wanted)
        assert [log["skipped_micro_batches"] for log in rank["logs"]] == [0, 1]


def test_a_gradient_of_nan_is_left_out(ranks: list[dict[str, Any]]) -> None:
    """The whole step on both ranks, where the student's own numbers are NaN: they reach the sum of the gradients."""
    for rank in (rank["nan-hidden-student"] for rank in ranks):
        assert [log["skipped_micro_batches"] for log in rank["logs"]] == [0, 2]
        assert all(value.isfinite().all() for value in rank["weights"].values())
        assert [bool(step) for step in rank["gradients"]] == [True, False]


def test_a_loss_of_nan_stops_both_ranks(ranks: list[dict[str, Any]]) -> None:
    (first, second) = (rank["nan-raise"]["error"] for rank in ranks)
    assert first == second
    assert first.startswith("step 2, micro-batch 2 of 2, rank 0: the loss is nan on ") and "input_ids[3] of r" in first


def test_who_asks_for_fsdp_on_a_cpu_is_told(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["said"] == [f"AdaKDTrainer: {FSDP_NEEDS_AN_ACCELERATOR}"]


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")
def test_what_does_not_go_together(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["refused"] for rank in ranks):
        assert "the student's base teaches: give a teacher, or set 'none'" in found["own base, option"]
        assert found["own base, student"].startswith("the student's own base cannot teach where the student is split")
        assert found["streamed"].startswith("teacher_parallel='fsdp' splits the teacher, but its weights are placed")


def test_teachers_that_cannot_be_split(tmp_path: Path) -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match="the teacher has no weights on this process"):
        AdaKDTrainer(model=student, teacher=pair()[1].to("meta"), args=config(tmp_path))
    with pytest.raises(ValueError, match="teacher_parallel='fsdp' splits the teacher over processes, but there is one"):
        AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path, teacher_parallel="fsdp"))
    with pytest.raises(ValueError, match="teacher_parallel must be one of none, fsdp, zero3, tp, got 'ddp'"):
        config(tmp_path, teacher_parallel="ddp")


@pytest.mark.parametrize(
    ("memory", "route", "tied", "selection"),
    [("cpu", "hidden", True, "micro_batch"), ("disk", "hidden", False, "step"), ("cpu", "logits", True, "micro_batch")],
)
def test_a_teacher_is_streamed(
    tmp_path: Path, alone: Callable[..., dict[str, Any]], memory: str, route: str, tied: bool, selection: str
) -> None:
    """Its weights are empty but in the forward of the module that has them."""
    student, teacher = pair(tied)
    if memory == "cpu":
        cpu_offload(teacher, execution_device=torch.device("cpu"))
    else:
        disk_offload(teacher, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    assert teacher.lm_head.weight.is_meta
    options = options_of(tmp_path, 4, logits_route=route, selection=selection)
    trainer = AdaKDTrainer(model=student, teacher=teacher, **options)
    found = results(trainer)
    expected = alone(route, tied, selection)
    for got, wanted in zip(found["gradients"], expected["gradients"], strict=True):
        assert norm({name: got[name] - value for name, value in wanted.items()}) <= 1e-12 * norm(wanted)
    assert found["metrics"]["eval_forward_kl"] == pytest.approx(expected["metrics"]["eval_forward_kl"], rel=1e-12)
    assert found["hidden"] == (route == "hidden") and teacher.lm_head.weight.is_meta
