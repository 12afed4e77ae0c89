"""`selection="step"`: micro-batches and ranks of an optimizer step give the gradient of one big batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from adakd_kernels import AdaKDLoss, reference, select_tokens
from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer
from adakd_kernels.trainer.step_selection import Measured, check_step_selection, choose_over_step

from .tiny_models import tiny_model, token_records
from .trainer_process import (
    MOVING,
    PLAIN,
    Gradients,
    Stream,
    config,
    experts_trainer,
    logged,
    resumed_trainer,
    train_logs,
)

pytestmark = pytest.mark.fast

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding


def run(
    folder: Path,
    batch_size: int,
    accumulation: int,
    cls: type[AdaKDTrainer] = AdaKDTrainer,
    *,
    architecture: str = "llama",
    dropout: float = 0.0,
    records: Any = None,
    callback: TrainerCallback | None = None,
    **options: Any,
) -> tuple[AdaKDTrainer, Gradients]:
    """A run in fp64, and the gradient of each of its steps."""
    gradients = Gradients()
    sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trainer = cls(
        model=tiny_model(architecture, seed=1, dropout=dropout).double(),
        teacher=tiny_model(architecture, layers=2, seed=2).double(),
        args=config(folder, **{"selection": "step", **PLAIN, **sizes, **options}),
        train_dataset=token_records(8) if records is None else records,
        callbacks=[gradients] if callback is None else [gradients, callback],
    )
    trainer.train()
    return trainer, gradients


def logits_of(model: Any, records: list[Any]) -> tuple[Tensor, Tensor]:
    """All logits (N, V) and the token (N,) that each position predicts."""
    batch = AdaKDDataCollator()(records)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits.flatten(0, 1), batch["labels"][:, 1:].flatten()


def expected_gradient(trainer: AdaKDTrainer, student: Any, parts: list[list[Any]], **options: Any) -> dict[str, Tensor]:
    """The gradient of the reference's loss of all these micro-batches as one batch."""
    student.zero_grad()
    logits, labels = zip(*(logits_of(student, records) for records in parts), strict=True)
    with torch.no_grad():
        teacher_logits = torch.cat([logits_of(trainer.teacher, records)[0] for records in parts])
    reference.adakd_loss(torch.cat(logits), teacher_logits, torch.cat(labels), **options).backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference, norm = (
        torch.cat([x.flatten() for x in values]).norm()
        for values in ([found[name] - value for name, value in expected.items()], expected.values())
    )
    return float(difference / norm)


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.2])
def test_micro_batches_give_the_gradient_of_one_batch(tmp_path: Path, ce_weight: float, route: str) -> None:
    options = {"focus_ratio": 0.3, "ce_weight": ce_weight, "logits_route": route}
    records, loss = token_records(8), {"focus_ratio": 0.3, "ce_weight": ce_weight}
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer, gradients = run(tmp_path, batch_size, accumulation, **options)
        expected = expected_gradient(trainer, tiny_model("llama", seed=1).double(), [records], **loss)
        assert_equal(gradients.steps[0], expected)
    _, gradients = run(tmp_path, 1, 8, selection="micro_batch", **options)
    if not ce_weight:
        assert distance(gradients.steps[0], expected) == pytest.approx(0.36, abs=0.005)  # as docs/trainer.md says


@pytest.mark.parametrize("route", ["logits", "hidden"])
def test_share_and_logs_are_those_of_one_batch(tmp_path: Path, route: str) -> None:
    """Over steps in which the share moves; evaluation in between changes nothing, and its numbers are the usual."""
    options = {"max_steps": 5, "logits_route": route, "records": token_records(40), **MOVING}
    whole, _ = run(tmp_path, 8, 1, **options)
    parts = AdaKDTrainer(
        model=tiny_model("llama", seed=1).double(),
        teacher=whole.teacher,
        args=config(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, eval_strategy="steps", eval_steps=2,
            selection="step", max_steps=5, logits_route=route, **PLAIN, **MOVING,
        ),
        train_dataset=token_records(40),
        eval_dataset=token_records(8, seed=3),
    )  # fmt: skip
    logs, expected = train_logs(parts), logged(whole)
    assert len({log["focus_ratio"] for log in expected}) > 1 and min(log["focus_ratio"] for log in expected) < 1.0
    for found, log in zip(logs, expected, strict=True):
        for name in log:
            tolerance = 0.012 if name[-4:] in ("_p10", "_p50", "_p90") else 1e-6  # a bin of the histograms
            assert found[name] == pytest.approx(log[name], rel=tolerance), name
    assert_equal(parts.model.state_dict(), whole.model.state_dict())
    for name, value in whole.loss_fn.focus.state_dict().items():
        torch.testing.assert_close(parts.loss_fn.focus.state_dict()[name], value, **CLOSE)
    usual = AdaKDTrainer(
        model=whole.model,
        teacher=whole.teacher,
        args=config(tmp_path, logits_route=route),
        eval_dataset=token_records(8, seed=3),
    ).evaluate()
    metrics = parts.evaluate()
    for name in ("eval_loss", "eval_reverse_kl"):
        assert metrics[name] == pytest.approx(usual[name], rel=1e-9)


class StateAtStepBegin(TrainerCallback):
    """The random state when the first micro-batch of each step is about to be trained."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.states.append(torch.get_rng_state())


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_see_one_dropout(tmp_path: Path, checkpointing: bool, route: str) -> None:
    """The gradient is that of logits which the student gives, with a graph, from the random state of the step."""
    begin, records = StateAtStepBegin(), token_records(8)
    student = tiny_model("gpt2", seed=1, dropout=0.3).double().train()
    trainer, gradients = run(
        tmp_path, 2, 4, architecture="gpt2", dropout=0.3, max_steps=2, learning_rate=0.0, focus_ratio=0.3,
        callback=begin, gradient_checkpointing=checkpointing, logits_route=route, records=records * 2,
    )  # fmt: skip
    parts = [records[i : i + 2] for i in range(0, 8, 2)]
    expected = []
    for state in begin.states:
        torch.set_rng_state(state)
        expected.append(copy.deepcopy(expected_gradient(trainer, student, parts, focus_ratio=0.3)))
        student.zero_grad()
    for found, gradient in zip(gradients.steps, expected, strict=True):
        assert_equal(found, gradient)
    assert distance(gradients.steps[1], expected[0]) > 0.1  # the second step drew another dropout


@pytest.mark.parametrize(("make", "count"), [(list, 7), (Stream, 12)])
def test_every_step_of_an_epoch(tmp_path: Path, make: Callable[[Any], Any], count: int) -> None:
    """Of four micro-batches, three are a step; the last one has one record. Streams have no known length."""
    records, sizes = token_records(count), {"learning_rate": 0.0, "focus_ratio": 0.3}
    trainer, gradients = run(tmp_path, 2, 3, records=make(records), max_steps=2, **sizes)
    for found, part in zip(gradients.steps, (records[:6], records[6:]), strict=True):
        student = tiny_model("llama", seed=1).double()
        assert_equal(found, expected_gradient(trainer, student, [part], focus_ratio=0.3))


def test_without_a_number_of_items(tmp_path: Path) -> None:
    """`Trainer` gives none where it cannot count, and takes the mean of the micro-batches then."""

    class Uncounted(AdaKDTrainer):
        def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:
            return None

    expected, found = (run(tmp_path, 2, 4, cls, focus_ratio=0.3)[1] for cls in (AdaKDTrainer, Uncounted))
    assert_equal(found.steps[0], expected.steps[0])


def test_nothing_is_valid(tmp_path: Path) -> None:
    records = [{**record, "labels": [-100] * len(record["labels"])} for record in token_records(4)]
    trainer, gradients = run(tmp_path, 2, 2, records=records, focus_ratio=0.3)
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert all((gradient == 0.0).all() for gradient in gradients.steps[0].values())


def test_resumed_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Under dropout: the random state is restored after the micro-batches were read, and before they are measured."""
    whole = resumed_trainer(tmp_path, selection="step")
    logs = train_logs(whole)
    resumed = resumed_trainer(tmp_path, selection="step")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert logged(resumed) == logs
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_auxiliary_loss_of_experts(tmp_path: Path) -> None:
    whole, parts = experts_trainer(tmp_path, 4, 1), experts_trainer(tmp_path, 1, 4, selection="step")
    losses = [trainer.train().training_loss for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-6, atol=1e-8)  # computed in fp32


@pytest.mark.parametrize(("route", "teacher_runs"), [("logits", 2), ("hidden", 1)])
def test_what_runs_twice(tmp_path: Path, route: str, teacher_runs: int) -> None:
    """The student's forward, and on the logits route the teacher's; nothing where a step is one micro-batch."""
    for accumulation, again in ((4, True), (1, False)):
        ran: dict[str, int] = {"student": 0, "teacher": 0}

        class Counting(AdaKDTrainer):
            def create_scheduler(self, *args: Any, ran: dict[str, int] = ran, **kwargs: Any) -> Any:
                for name, model in (("student", self.model), ("teacher", self.teacher)):
                    model.register_forward_hook(lambda *_, name=name: ran.update({name: ran[name] + 1}))
                scheduler = super().create_scheduler(*args, **kwargs)
                ran.update(student=0, teacher=0)  # the hooks make the trainer try the models out again
                self._follow_models()
                ran.update(student=0, teacher=0)
                return scheduler

        run(tmp_path, 2, accumulation, Counting, logits_route=route, token_records=0)
        runs = (2, teacher_runs) if again else (1, 1)
        assert ran == {"student": accumulation * runs[0], "teacher": accumulation * runs[1]}


def test_a_subclass_that_hides_the_micro_batches_is_an_error(tmp_path: Path) -> None:
    class Hiding(AdaKDTrainer):
        def get_batch_samples(self, iterator: Any, count: int, device: Any) -> Any:
            return [next(iterator) for _ in range(count)], None

    with pytest.raises(RuntimeError, match=r"needs all micro-batches of a step.*get_batch_samples"):
        run(tmp_path, 2, 4, Hiding)


class TwoRanks:
    """An accelerator of rank 1, beside a rank whose packed difficulties are known."""

    num_processes, process_index = 2, 1

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def pad_across_processes(self, packed: Tensor, dim: int, pad_index: float) -> Tensor:
        return torch.nn.functional.pad(packed, (0, self.other.shape[dim] - packed.shape[dim]), value=pad_index)

    def gather(self, packed: Tensor) -> Tensor:
        return torch.cat((self.other, packed))


def measured(*values: float) -> Measured:
    """Tokens of one row; those below 0 are not valid."""
    difficulty = torch.tensor([values])
    return Measured(torch.zeros(()), difficulty.clamp_min(0.0), difficulty >= 0, None)


def test_ties_go_as_in_one_big_batch() -> None:
    """Micro-batch by micro-batch, in each of them rank by rank: of five equal difficulties the first two are taken."""
    invalid = -torch.inf
    other = torch.tensor([[[0.5, 0.1, invalid], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]]])
    loss_fn = AdaKDLoss(focus=0.2, temperature_scale=0.5)
    choices = choose_over_step([measured(0.5, -1.0), measured(0.2), measured(0.5)], loss_fn, TwoRanks(other))
    assert [choice.selected.tolist() for choice in choices] == [[[True, False]], [[False]], [[False]]]
    in_order = torch.tensor([0.5, 0.1, 0.5, 0.5, 0.5, 0.5, 0.2, 0.1, 0.1, 0.1, 0.5])
    assert select_tokens(in_order, 0.2).nonzero().flatten().tolist() == [0, 2]  # of this rank, the first token
    # The median is 0.5. Data parallelism takes the mean over the ranks.
    for choice, difficulty in zip(choices, (0.5, 0.2, 0.5), strict=True):
        assert (float(choice.n), float(choice.k)) == (5.5, 1.0)
        expected = torch.exp(torch.tensor(-0.5 * (difficulty - 0.5) / (difficulty + 0.5)))
        torch.testing.assert_close(choice.temperature[0, 0], expected)


def test_a_micro_batch_of_nan_is_left_out_of_the_choice() -> None:
    alone = SimpleNamespace(num_processes=1, process_index=0, pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    loss_fn = AdaKDLoss(focus=0.5)
    good = [measured(0.1, 0.4, 0.2), measured(0.3)]
    bad = measured(0.9, 0.9)._replace(difficulty=torch.tensor([[torch.nan, 0.9]]))
    first, lost, last = choose_over_step([good[0], bad, good[1]], loss_fn, alone)
    for found, expected in zip((first, last), choose_over_step(good, loss_fn, alone), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert float(first.n) == 4 and lost.selected.all() and lost.temperature.isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DeepSpeed", {"is_deepspeed_enabled": True}),
        ("FSDP 1", {"is_fsdp_enabled": True}),
        ("torch_compile", {"torch_compile": True}),
        ("average_tokens_across_devices=False", {"world_size": 2, "average_tokens_across_devices": False}),
    ],
)
def test_what_it_does_not_go_with(name: str, change: dict[str, Any]) -> None:
    args = {"torch_compile": False, "world_size": 1, "average_tokens_across_devices": False}
    parts: dict[str, Any] = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False}
    parts["accelerator"] = SimpleNamespace(is_fsdp2=False)
    check_step_selection(SimpleNamespace(args=SimpleNamespace(**args), **parts))
    args, parts = ({key: change.get(key, value) for key, value in of.items()} for of in (args, parts))
    with pytest.raises(ValueError, match=f"selection='step' does not go with {name}: .*selection='micro_batch'"):
        check_step_selection(SimpleNamespace(args=SimpleNamespace(**args), **parts))


def test_it_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    args = config(tmp_path, selection="step")
    args.torch_compile = True
    with pytest.raises(ValueError, match="selection='step' does not go with torch_compile"):
        AdaKDTrainer(model=tiny_model("llama"), teacher=tiny_model("llama", seed=1), args=args)


@pytest.mark.parametrize("selection", ["step", "micro_batch"])
def test_a_step_goes_on_with_the_next_pass_of_a_stream(tmp_path: Path, selection: str) -> None:
    """10 records, 8 a step: the second step has the last two and six of the next pass."""
    records = token_records(10)
    options = {"max_steps": 2, "selection": selection, "focus_ratio": 0.3 if selection == "step" else 1.0}
    options |= {} if selection == "step" else {"temperature_scale": 0.0}
    _, whole = run(tmp_path, 8, 1, records=[*records, *records[:6]], **options)
    _, parts = run(tmp_path, 2, 4, records=Stream(records), **options)
    assert len(parts.steps) == 2
    for found, expected in zip(parts.steps, whole.steps, strict=True):
        assert_equal(found, expected)
    with pytest.raises(ValueError, match="train_dataset gives 2 micro-batches, fewer than the 4 of an optimizer step"):
        run(tmp_path, 2, 4, records=Stream(records[:4]), **options)
