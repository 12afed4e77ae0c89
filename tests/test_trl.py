"""On TRL: its own losses where AdaKD is off, the reference's where it is on, and the same run as without TRL."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")

from datasets import Dataset
from trl.trainer import distillation_trainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

import adakd_kernels
from adakd_kernels import reference
from adakd_kernels.integrations.transformers import AdaKDTrainer, NonFiniteLossError
from adakd_kernels.integrations.trl import (
    AdaKDDistillationConfig,
    AdaKDDistillationTrainer,
    AdaKDSFTConfig,
    AdaKDSFTTrainer,
    patch_distillation_loss,
)

from .tiny_models import INSTRUCTIONS, tiny_model, tiny_tokenizer, token_records
from .trainer_process import config as trainer_config
from .trainer_process import logged

pytestmark = pytest.mark.fast

QUIET = {
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "bf16": False,
    "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip
OFF = {"focus_ratio": 1.0, "temperature_scale": 0.0}
STEPS = {
    "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "max_completion_length": 6,
}  # fmt: skip
WORDS = ["cat", "dog", "sun", "day"] * 4
PROMPTS = Dataset.from_dict({"prompt": [f"Name a word that rhymes with {word}." for word in WORDS]})


def pair(architecture: str = "llama") -> tuple[Any, Any, Any]:
    """A student, a teacher with another hidden size, and their tokenizer."""
    tokenizer = tiny_tokenizer(chat_template=True)
    student = tiny_model(architecture, vocab_size=len(tokenizer), seed=1)
    return student, tiny_model(architecture, layers=2, vocab_size=len(tokenizer), hidden=24, seed=2), tokenizer


def on_policy(folder: Path, adakd: bool, models: tuple[Any, Any, Any] | None = None, **options: Any) -> Any:
    """A trainer on the student's own completions, TRL's or ours."""
    student, teacher, tokenizer = models or pair()
    config, trainer = (
        (AdaKDDistillationConfig, AdaKDDistillationTrainer) if adakd else (DistillationConfig, DistillationTrainer)
    )
    named = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "callbacks") if name in options}
    dataset = options.pop("train_dataset", PROMPTS)
    return trainer(
        model=student, teacher_model=teacher, args=config(output_dir=str(folder), **{**QUIET, **STEPS, **options}),
        train_dataset=dataset, processing_class=tokenizer, **named,
    )  # fmt: skip


def logs(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return logged(trainer)


@pytest.mark.parametrize(
    ("architecture", "beta"), [("llama", 0.0), ("llama", 0.5), ("llama", 1.0), ("gemma2", 0.3), ("granite", 1.0)]
)
def test_without_adakd_the_losses_are_those_of_trl(tmp_path: Path, architecture: str, beta: float) -> None:
    """Loss, entropy, gradient and completions of three steps: the second and third depend on the gradients before."""
    theirs = logs(on_policy(tmp_path, False, pair(architecture), beta=beta))
    ours = logs(on_policy(tmp_path, True, pair(architecture), beta=beta, **OFF))
    assert len(ours) == len(theirs) == 3
    for got, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "entropy", "grad_norm", "completions/mean_length"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5), name
    assert ours[0]["loss"] != pytest.approx(ours[-1]["loss"], rel=1e-2)


def test_what_is_overridden_is_as_it_was(tmp_path: Path) -> None:
    """A new TRL that calls these in another way fails here, not in the middle of a run."""
    names = {
        "__init__": "self model teacher_model args train_dataset eval_dataset processing_class callbacks optimizers "
        "quantization_config peft_config tools",
        "compute_loss": "self model inputs return_outputs num_items_in_batch",
        "_compute_loss": "self unwrapped_student inputs num_items_in_batch",
        "_get_last_hidden_state": "self unwrapped_model input_ids attention_mask logits_to_keep pixel_values "
        "image_grid_thw pixel_attention_mask spatial_shapes image_sizes token_type_ids mm_token_type_ids "
        "image_position_ids",
        "_generate_and_score_completions": "self inputs",
        "create_scheduler": "self num_training_steps optimizer",
        "log": "self logs start_time",
        "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
        "_get_train_sampler": "self dataset",
        "_save_rng_state": "self output_dir",
    }
    for name, expected in names.items():
        assert " ".join(inspect.signature(getattr(DistillationTrainer, name)).parameters) == expected, name
    redirect = distillation_trainer._ForwardRedirection.__call__
    assert [*inspect.signature(redirect).parameters][:4] == ["self", "wrapper_module", "original_module", "method"]
    calls = inspect.getsource(DistillationTrainer.compute_loss)
    assert "self._compute_loss, unwrapped_student, inputs, num_items_in_batch" in calls
    trainer = on_policy(tmp_path, False)
    assert trainer._metrics["train"] == {} and trainer.teacher_model is not None
    batch = trainer._generate_and_score_completions([PROMPTS[0], PROMPTS[1]])
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch"} == set(batch)


def recorded(trainer: Any) -> list[tuple[Any, dict[str, Tensor], Tensor]]:
    """The student, the batch and the loss of each micro-batch to come."""
    kept: list[Any] = []
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(model, inputs, *args, **kwargs)
        kept.append((copy.deepcopy(trainer.model), inputs, loss.detach()))
        return loss

    trainer.compute_loss = compute_loss
    return kept


@torch.no_grad()
def completion_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits (N, V) that predict the tokens of the completions, token i from position i − 1."""
    ids, mask = (torch.cat((batch[f"prompt_{x}"], batch[f"completion_{x}"]), 1) for x in ("ids", "mask"))
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, batch["prompt_ids"].shape[1] - 1 : -1].flatten(0, 1)


def test_losses_are_those_of_the_reference(tmp_path: Path) -> None:
    """With a share of ½, temperatures, cross-entropy and labels: one position too late would change all of them."""
    models = pair("gpt2")
    options = {"focus_ratio": 0.5, "temperature_scale": 0.7, "base_temperature": 1.5, "ce_weight": 0.3}
    trainer = on_policy(tmp_path, True, models, divergence="alpha_beta", gradient_accumulation_steps=1, **options)
    kept = recorded(trainer)
    trainer.train()
    assert len(kept) == 3
    for student, batch, loss in kept:
        labels = batch["completion_ids"].masked_fill(batch["completion_mask"] == 0, -100).flatten()
        items = int((labels != -100).sum())
        assert items == batch["num_items_in_batch"]
        assert items % 2 == 0  # so that the step's r·n of num_items is the reference's ⌊r·n⌋
        expected = reference.adakd_loss(
            completion_logits(student, batch), completion_logits(models[1], batch), labels,
            divergence=trainer.args.make_divergence(), **options,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_labels_are_the_completion_with_its_end_and_without_the_answers_of_tools() -> None:
    batch = {
        "completion_ids": torch.tensor([[7, 8, 9, 0], [5, 0, 1, 1]]),  # 0 ends a text, 1 is padding
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
    }
    expected = [[7, -100, 9, 0], [5, 0, -100, -100]]
    assert AdaKDDistillationTrainer._labels(batch).tolist() == expected


def test_share_entropy_and_log_lines(tmp_path: Path) -> None:
    moving = {"focus_beta": 0.2, "focus_epsilon": 1e-3, "focus_warmup_ratio": 0.2, "learning_rate": 0.1}
    trainer = on_policy(tmp_path, True, max_steps=6, eval_dataset=PROMPTS.select(range(3)), **moving)
    kept = recorded(trainer)
    lines = logs(trainer)
    assert lines[0]["focus_ratio"] == 1.0 and lines[-1]["focus_ratio"] != 1.0
    for step, line in enumerate(lines):
        entropies, difficulties = [], []
        for student, batch, _ in kept[2 * step : 2 * step + 2]:
            valid = batch["completion_mask"].flatten() == 1
            logits = completion_logits(student, batch)[valid]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy().mean())
            difficulties.append(
                reference.squared_hellinger(logits, completion_logits(trainer.teacher_model, batch)[valid])
            )
        assert line["entropy"] == pytest.approx(float(sum(entropies)) / 2, rel=1e-5)
        difficulty = torch.cat(difficulties).sort().values
        middle = difficulty[math.ceil(len(difficulty) / 2) - 1].item()
        assert line["difficulty_p50"] == pytest.approx(middle, rel=0.006)
        assert 0 < line["temperature_p10"] <= line["temperature_p50"] <= line["temperature_p90"]
    share = lines[-1]["focus_ratio"]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and metrics["eval_entropy"] > 0
    assert trainer.loss_fn.focus_ratio == share  # an evaluation leaves it alone


def test_a_loss_of_nan_ends_the_run_before_its_step(tmp_path: Path) -> None:
    student, teacher, tokenizer = pair()
    with torch.no_grad():
        teacher.lm_head.weight[7, 0] = float("nan")
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(NonFiniteLossError, match=r"step 1: the losses of its micro-batches are \[nan, nan\] on rank 0"):
        on_policy(tmp_path, True, (student, teacher, tokenizer)).train()
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())


def test_adapters_and_autocast(tmp_path: Path) -> None:
    """LoRA on the attention trains, the head and the teacher stay; bf16 autocast is close to fp32."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    student, teacher, tokenizer = pair()
    head, of_teacher = student.lm_head.weight.clone(), copy.deepcopy(teacher.state_dict())
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = on_policy(tmp_path, True, (student, teacher, tokenizer), peft_config=lora, focus_ratio=0.5)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    exact = logs(trainer)
    assert before and all(not torch.equal(trainer.model.get_parameter(name), value) for name, value in before.items())
    assert torch.equal(student.lm_head.weight, head)
    assert all(torch.equal(value, of_teacher[name]) for name, value in teacher.state_dict().items())
    half = logs(on_policy(tmp_path, True, bf16=True, focus_ratio=0.5, gradient_checkpointing=True))
    whole = logs(on_policy(tmp_path, True, focus_ratio=0.5))
    assert half[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.1) and half[0]["loss"] != whole[0]["loss"]
    assert all(math.isfinite(line["loss"]) for line in exact)


def test_a_head_that_is_split_over_processes_is_put_together(tmp_path: Path) -> None:
    """A weight that is a DTensor, as FSDP2 leaves it, gets the gradient of the whole one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from adakd_kernels.integrations.trl.loss import Side, loss_and_entropy
    from adakd_kernels.loss import AdaKDLoss
    from adakd_kernels.trainer.heads import HeadOptions

    def weights(split: bool) -> tuple[Any, Any]:
        whole = [torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1)]
        mesh = init_device_mesh("cpu", (1,))
        parts = [distribute_tensor(weight, mesh, [Shard(0)]) if split else weight for weight in whole]
        return torch.nn.Parameter(parts[0]), parts[1]

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        hidden, labels, results = torch.randn(1, 3, 4), torch.tensor([[1, 2, -100]]), []
        for split in (False, True):
            student, teacher = weights(split)
            sides = [Side(hidden, weight, None, HeadOptions()) for weight in (student, teacher)]
            out, entropy = loss_and_entropy(AdaKDLoss(focus=1.0), *sides, labels, None)
            out.loss.backward()
            gradient = student.grad.full_tensor() if split else student.grad
            results.append((out.loss.detach(), entropy, gradient))
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
        assert results[0][2].abs().max() > 0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [OFF, {"focus_ratio": 0.5, "temperature_scale": 0.5}])
def test_a_patched_trainer_of_trl_has_the_losses_of_ours(tmp_path: Path, options: dict[str, float]) -> None:
    ours = logs(on_policy(tmp_path, True, pair("gemma2"), beta=0.3, **options))
    stock = distillation_trainer._chunked_divergence_loss
    with patch_distillation_loss(**options):
        assert distillation_trainer._chunked_divergence_loss is not stock
        patched = logs(on_policy(tmp_path, False, pair("gemma2"), beta=0.3))
    assert distillation_trainer._chunked_divergence_loss is stock
    for got, expected in zip(patched, ours, strict=True):
        for name in ("loss", "entropy", "grad_norm"):
            assert got[name] == pytest.approx(expected[name], rel=1e-6), name


def test_a_patch_can_be_undone_without_a_block_and_refuses_another_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = distillation_trainer._chunked_divergence_loss
    patch = patch_distillation_loss()
    assert distillation_trainer._chunked_divergence_loss == patch._loss
    patch.undo()
    patch.undo()
    assert distillation_trainer._chunked_divergence_loss is stock
    with pytest.raises(ValueError, match=r"focus_ratio must be in \(0, 1\], got 2.0"):
        patch_distillation_loss(focus_ratio=2.0)
    assert distillation_trainer._chunked_divergence_loss is stock
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", lambda hidden: hidden)
    with pytest.raises(RuntimeError, match=r"install trl>=1\.16,<1\.17"):
        patch_distillation_loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, .*, got 'kl'"),
        ({"divergence_kwargs": {"beta": 0.1}}, "divergence_kwargs .* need a divergence"),
        ({"beta": 1.5}, "beta must be in"),
        ({"focus_ratio": 0.0}, r"focus_ratio must be in \(0, 1\], got 0.0"),
        ({"focus_min_ratio": 0.0}, "focus_min_ratio must lie in"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaKDDistillationConfig(output_dir=str(tmp_path), **{**QUIET, **options})


def test_wrong_arguments(tmp_path: Path) -> None:
    student, teacher, tokenizer = pair()
    args = AdaKDDistillationConfig(output_dir=str(tmp_path), **QUIET)
    with pytest.raises(TypeError, match="args must be an AdaKDDistillationConfig, got DistillationConfig"):
        AdaKDDistillationTrainer(student, teacher, DistillationConfig(output_dir=str(tmp_path), **QUIET))
    with pytest.raises(TypeError, match="teacher_model must be a causal language model"):
        AdaKDDistillationTrainer(student, args=args, train_dataset=PROMPTS, processing_class=tokenizer)
    teacher.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="needs a teacher_model whose logits are those of a plain output layer"):
        AdaKDDistillationTrainer(student, teacher, args, train_dataset=PROMPTS, processing_class=tokenizer)
    with pytest.raises(TypeError, match="args must be an AdaKDSFTConfig, got AdaKDDistillationConfig"):
        AdaKDSFTTrainer(student, teacher, args)
    with pytest.raises(ValueError, match="loss_type must be left at 'nll', got 'dft'"):
        AdaKDSFTConfig(output_dir=str(tmp_path), loss_type="dft", **QUIET)
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        AdaKDSFTTrainer(student, teacher, AdaKDSFTConfig(output_dir=str(tmp_path), **QUIET), compute_loss_func=max)


def test_trl_is_asked_for_by_name_and_nothing_else_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "adakd_kernels.integrations.trl"
    for name in [name for name in sys.modules if name.startswith((ours, "trl."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs trl 1\.16 and transformers: pip install 'adakd-kernels\[trl\]'"):
        importlib.import_module(ours)
    package = Path(adakd_kernels.__file__).parent
    users = {path for path in package.rglob("*.py") if re.search(r"^ *(from|import) trl\b", path.read_text(), re.M)}
    assert users and {path.parent for path in users} == {package / "integrations" / "trl"}


def sft(folder: Path, dataset: Dataset, models: tuple[Any, Any, Any] | None = None, **options: Any) -> Any:
    """A trainer on TRL's preparation of the data."""
    student, teacher, tokenizer = models or pair()
    named = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    args = AdaKDSFTConfig(
        output_dir=str(folder),
        **{**QUIET, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **options},
    )
    return AdaKDSFTTrainer(student, teacher, args, train_dataset=dataset, processing_class=tokenizer, **named)


@pytest.mark.parametrize("route", ["hidden", "logits"])
def test_sft_losses_are_those_of_the_trainer(tmp_path: Path, route: str) -> None:
    records = token_records(16)
    student, teacher, tokenizer = pair()
    options = {"focus_ratio": 0.5, "logits_route": route, "gradient_accumulation_steps": 2, "ce_weight": 0.2}
    sizes = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    expected = logs(
        AdaKDTrainer(
            student, teacher, trainer_config(tmp_path, **sizes, **options), train_dataset=records,
            eval_dataset=records[:5], processing_class=tokenizer,
        )
    )  # fmt: skip
    ours = logs(sft(tmp_path, Dataset.from_list(records), eval_dataset=Dataset.from_list(records[:5]), **options))
    assert len(ours) == 3
    for got, wanted in zip(ours, expected, strict=True):
        assert got == pytest.approx({**wanted}, rel=1e-5)


def test_sft_takes_messages_packs_them_and_masks_what_the_assistant_did_not_say(tmp_path: Path) -> None:
    """At one temperature, packed texts have the loss of texts in rows of their own, on the answers alone."""
    student, teacher, tokenizer = pair()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "<eos>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    said = [(record["instruction"], record["output"]) for record in INSTRUCTIONS]
    dataset = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
            for user, answer in said
        ]
    )
    options = {**OFF, "max_steps": 1, "per_device_train_batch_size": 8, "assistant_only_loss": True}
    losses, labelled = [], []
    for packing in (False, True):
        models = (copy.deepcopy(student), teacher, tokenizer)
        trainer = sft(tmp_path, dataset, models, packing=packing, max_length=128, **options)
        (batch,) = trainer.get_train_dataloader()
        labels = batch["labels"][batch["labels"] != -100]
        labelled.append(sorted(text for text in tokenizer.decode(labels).split("<eos>") if text))
        assert batch["input_ids"].shape[0] == (1 if packing else 8)
        losses.append(logs(trainer)[0]["loss"])
    answers = sorted(answer for _, answer in said)
    assert labelled == [answers, answers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(("strategy", "checked"), [("bfd", 2), ("wrapped", 0)])
def test_sft_texts_may_see_each_other_where_they_are_wrapped_only(tmp_path, monkeypatch, strategy, checked) -> None:
    roles: list[str] = []
    monkeypatch.setattr("adakd_kernels.trainer.trainer.check_borders", lambda role, model: roles.append(role))
    sft(tmp_path, Dataset.from_list(token_records(4)), packing=True, packing_strategy=strategy, max_length=64)
    assert len(roles) == checked


def test_sft_loads_a_student_by_name_as_trl_does(tmp_path: Path) -> None:
    student, teacher, tokenizer = pair()
    student.save_pretrained(tmp_path / "student")
    name, records = str(tmp_path / "student"), Dataset.from_list(token_records(4))
    for options, dtype in (({}, torch.float32), ({"model_init_kwargs": {"dtype": torch.bfloat16}}, torch.bfloat16)):
        trainer = sft(tmp_path, records, (name, teacher, tokenizer), **options)
        assert trainer.model.dtype == dtype
        torch.testing.assert_close(trainer.model.lm_head.weight, student.lm_head.weight.to(dtype))


def test_sft_trains_adapters_and_evaluates(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    pairs = Dataset.from_list([{"prompt": r["instruction"], "completion": r["output"]} for r in INSTRUCTIONS])
    student, teacher, tokenizer = pair()
    kept = copy.deepcopy(student.state_dict())
    trainer = sft(tmp_path, pairs, (student, teacher, tokenizer), peft_config=lora, eval_dataset=pairs)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert {"eval_loss", "eval_forward_kl", "eval_reverse_kl", "eval_cross_entropy", "eval_agreement"} <= set(after)
    assert after["eval_reverse_kl"] < before["eval_reverse_kl"]
    base = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(base[name.replace("q_proj", "q_proj.base_layer")], value) for name, value in kept.items())
