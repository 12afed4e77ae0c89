"""Students with adapters of peft: made, resumed and saved by the driver, and taught by their own base."""

from __future__ import annotations

import copy
import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer

from .tiny_models import tiny_model, token_records
from .trainer_process import RESUMED, adapted_trainer, config, logged, of_both_ranks, train_logs

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.fast

METRICS = ("eval_loss", "eval_forward_kl", "eval_reverse_kl", "eval_cross_entropy", "eval_agreement")
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding


def lora(**options: Any) -> Any:
    """An adapter that is not the identity, so that student and teacher differ from the start."""
    given = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **given)


def adapter_weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}


def loss_and_gradients(trainer: AdaKDTrainer, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one micro-batch in training mode, with the same dropout each time."""
    trainer.model.zero_grad()
    torch.manual_seed(11)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


ADAPTERS = {
    "lora": lora(),
    "whole layers": lora(target_modules=["c_attn"], modules_to_save=["lm_head", "wte"]),
    "trained tokens": lora(target_modules=["c_attn"], trainable_token_indices={"wte": [5, 6]}),
    "lora on the head": lora(target_modules=["c_attn", "lm_head"]),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], init_ia3_weights=False
    ),
}


@pytest.mark.parametrize(
    ("kind", "route"), [*((kind, "auto") for kind in ADAPTERS), ("lora", "logits"), ("prompt tuning", "logits")]
)
def test_own_base_teaches_as_a_copy_would(tmp_path: Path, kind: str, route: str) -> None:
    """Loss and gradients are bit for bit those under a frozen copy of the base, before and after training."""
    base = tiny_model("gpt2", layers=2, dropout=0.3, seed=1).double()
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    original, records = copy.deepcopy(base), token_records(4)
    batch = AdaKDDataCollator()(records)
    options = {"max_steps": 2, "save_strategy": "no", "learning_rate": 0.05, "logits_route": route}
    trainer = AdaKDTrainer(
        model=base, args=config(tmp_path, **options), peft_config=ADAPTERS[kind], train_dataset=records
    )
    student = trainer.model
    assert isinstance(student, peft.PeftModel) and not list(trainer.teacher.parameters())
    whole_head = kind in ("whole layers", "lora on the head")
    assert (trainer._head_options is None) == (route == "logits" or whole_head)
    for _ in ("before", "after"):
        modes = [module.training for module in student.train().modules()]
        trained = [p.requires_grad for p in student.parameters()]
        loss, gradients = loss_and_gradients(trainer, batch)
        assert [module.training for module in student.modules()] == modes
        assert [p.requires_grad for p in student.parameters()] == trained
        plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = original.eval()(**plain).logits
        given = trainer.teacher(**plain).logits
        assert torch.equal(given, expected) and not given.requires_grad
        assert torch.equal(trainer.teacher.get_output_embeddings().weight, original.lm_head.weight)
        assert torch.equal(trainer.teacher.get_input_embeddings().weight, original.transformer.wte.weight)

        copied = AdaKDTrainer(model=student, teacher=copy.deepcopy(original), args=config(tmp_path, **options))
        expected_loss, expected_gradients = loss_and_gradients(copied, batch)
        assert torch.equal(loss, expected_loss) and loss > 1e-3
        assert gradients.keys() == expected_gradients.keys() and gradients
        assert any(gradient.any() for gradient in gradients.values())
        for name, gradient in gradients.items():
            assert torch.equal(gradient, expected_gradients[name]), name
        trainer.train()
    evaluated, expected_metrics = (each.evaluate(records) for each in (trainer, copied))
    for name in METRICS:
        assert evaluated[name] == expected_metrics[name]


def bytes_of_tensors() -> int:
    """Of all tensors that are alive, memory that several of them share once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def test_the_weights_exist_once(tmp_path: Path) -> None:
    base = tiny_model("llama", layers=2, vocab_size=512, hidden=64, seed=1)
    weights = sum(p.nbytes for p in base.parameters())
    before = bytes_of_tensors()
    trainer = AdaKDTrainer(model=base, teacher=base, args=config(tmp_path), peft_config=lora())
    trainer.compute_loss(trainer.model.train(), AdaKDDataCollator()(token_records(2))).backward()
    trainer.model.zero_grad()
    assert bytes_of_tensors() - before < 0.2 * weights  # the adapter and what is logged; a second head is more
    assert {id(p) for p in base.parameters()} <= {id(p) for p in trainer.model.parameters()}


def test_a_student_of_peft_and_its_base(tmp_path: Path) -> None:
    """What the user has made, with one part of the adapter kept as it is: the base teaches, and the part stays."""
    base = tiny_model("llama", seed=1)
    student = peft.get_peft_model(base, lora())
    frozen = {name: p for name, p in student.named_parameters() if "lora_A" in name}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    args = config(tmp_path, max_steps=1, save_strategy="no")
    trainer = AdaKDTrainer(model=student, teacher=base, args=args, train_dataset=token_records(8))
    trainer.train()
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_B" not in name), name
    with student.disable_adapter():
        assert trainer.evaluate(token_records(4))["eval_forward_kl"] < 1e-7
    assert trainer.evaluate(token_records(4))["eval_forward_kl"] > 1e-3
    with pytest.raises(ValueError, match="model and teacher share parameters"):
        AdaKDTrainer(model=student, teacher=student, args=args)
    with pytest.raises(ValueError, match="model and teacher share parameters"):
        AdaKDTrainer(model=student, teacher=base.model, args=args)


def test_checkpointing_of_activations(tmp_path: Path) -> None:
    found = []
    for reentrant in (None, False, True):
        on = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = adapted_trainer(tmp_path, dropout=0.3, **({} if reentrant is None else on))
        trainer.train()
        found.append((adapter_weights(trainer.model), trainer.evaluate()["eval_loss"]))
    for weights, loss in found[1:]:
        assert loss == found[0][1]
        for name, value in found[0][0].items():
            torch.testing.assert_close(weights[name], value, **CLOSE)
            assert value.any()


def test_two_ranks_equal_one(tmp_path: Path, two_ranks: Path) -> None:
    trainer = adapted_trainer(tmp_path)
    logs, evaluated = train_logs(trainer), trainer.evaluate()
    for found in (*of_both_ranks(two_ranks, "adapters-logits"), *of_both_ranks(two_ranks, "adapters-hidden")):
        for name, value in found["weights"].items():
            torch.testing.assert_close(trainer.model.state_dict()[name], value, **CLOSE)
            assert value.any()
        assert [log["loss"] for log in found["logs"] if "loss" in log] == pytest.approx([log["loss"] for log in logs])
        for name in METRICS:
            assert found["logs"][-1][name] == pytest.approx(evaluated[name])


def test_mixed_precision_is_the_students(tmp_path: Path) -> None:
    """A new adapter changes nothing, so that the student is its teacher to the last bit, in bf16 as well."""
    student = tiny_model("llama", layers=2, seed=1)
    args = config(tmp_path, max_steps=1, save_strategy="no", bf16=True, learning_rate=0.1, ce_weight=0.5)
    trainer = AdaKDTrainer(
        model=student, args=args, peft_config=lora(init_lora_weights=True), train_dataset=token_records(8)
    )
    first, *_ = train_logs(trainer)
    assert first["loss"] > 0 and first["loss_ema"] == 0.0 and first["difficulty_p90"] == 0.0
    assert trainer.evaluate(token_records(4))["eval_forward_kl"] > 1e-6


def test_a_run_is_resumed_to_the_same_numbers(tmp_path: Path) -> None:
    options = {
        **RESUMED, "save_strategy": "steps", "save_steps": 4, "dropout": 0.2, "optim": "adamw_torch",
        "focus_warmup_ratio": 0.2, "temperature_scale": 0.5,
    }  # fmt: skip
    whole = adapted_trainer(tmp_path / "whole", batch_size=2, **options)
    logs = train_logs(whole)
    assert len(logs) == 10 and whole.loss_fn.focus.focus_ratio.item() < 1.0
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert saved.keys() == adapter_weights(whole.model).keys() and all("lora" in name for name in saved)
    assert not list(checkpoint.glob("model*")) and not list(checkpoint.glob("pytorch_model*"))
    shutil.copytree(checkpoint, tmp_path / "again" / "checkpoint-4")
    resumed = adapted_trainer(tmp_path / "again", batch_size=2, **options)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed) == logs
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert any(not torch.equal(value, saved[name]) for name, value in adapter_weights(whole.model).items())


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    def trainer(folder: str, **options: Any) -> AdaKDTrainer:
        args = config(tmp_path / folder, max_steps=1)
        teacher = tiny_model("llama", layers=2, seed=2)
        return AdaKDTrainer(
            model=tiny_model("llama"), teacher=teacher, args=args, train_dataset=token_records(8), **options
        )

    trainer("adapter", peft_config=lora()).train()
    trainer("whole").train()
    adapter, whole = (str(tmp_path / name / "checkpoint-1") for name in ("adapter", "whole"))
    with pytest.raises(ValueError, match="holds a whole model, but this run trains an adapter: leave out peft_config"):
        trainer("a", peft_config=lora()).train(resume_from_checkpoint=whole)
    with pytest.raises(ValueError, match="holds an adapter alone, but this run trains a whole model: give the peft_"):
        trainer("b").train(resume_from_checkpoint=adapter)
    for options, message in (
        ({"lora_alpha": 3}, r"with lora_alpha=8, but this run has 3"),
        ({"target_modules": ["q_proj"]}, r"with target_modules=\[.*v_proj'\], but this run has \['q_proj'\]"),
        ({"lora_dropout": 0.5}, "with lora_dropout=0.0, but this run has 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer("c", peft_config=lora(**options)).train(resume_from_checkpoint=adapter)
    trainer("adapter", peft_config=lora()).train(resume_from_checkpoint=adapter)


def test_the_best_adapter_comes_back(tmp_path: Path) -> None:
    trainer = adapted_trainer(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_forward_kl", max_steps=2, ce_weight=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-1"
    for name, value in load_file(best / "adapter_model.safetensors").items():
        assert torch.equal(adapter_weights(trainer.model)[name], value)
    assert trainer.evaluate()["eval_forward_kl"] == pytest.approx(trainer.state.best_metric, rel=1e-12)


def test_models_by_name(tmp_path: Path) -> None:
    """A folder of a model is loaded in fp32, and one of an adapter is trained further, on one copy of its base."""
    tiny_model("llama", layers=2, seed=1).bfloat16().save_pretrained(tmp_path / "base")
    args = config(tmp_path, max_steps=1, save_strategy="no", learning_rate=0.1)
    records = token_records(8)
    trainer = AdaKDTrainer(
        model=tmp_path / "base", args=args, peft_config=lora(init_lora_weights=True), train_dataset=records
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    trainer.save_model(str(tmp_path / "adapter"))
    saved = adapter_weights(trainer.model)
    again = AdaKDTrainer(model=str(tmp_path / "adapter"), args=args, train_dataset=records)
    for name, value in adapter_weights(again.model).items():
        assert torch.equal(value, saved[name])
    again.train()
    assert all(not torch.equal(value, saved[name]) for name, value in adapter_weights(again.model).items())
    whole = AdaKDTrainer(model=str(tmp_path / "base"), teacher=str(tmp_path / "base"), args=args)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32} and all(
        p.dtype == torch.bfloat16 for p in whole.teacher.parameters()
    )


def test_the_seed_makes_the_adapter(tmp_path: Path) -> None:
    made = []
    for state, seed in ((1, 5), (2, 5), (2, 6)):
        model = tiny_model("llama")
        torch.manual_seed(state)
        trainer = AdaKDTrainer(model=model, args=config(tmp_path, seed=seed), peft_config=lora())
        made.append(torch.cat([value.flatten() for value in adapter_weights(trainer.model).values()]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


def test_model_init_with_an_adapter(tmp_path: Path) -> None:
    """Each run gets a new model and a new adapter, whose base teaches, though it is another one each time."""
    made: list[Any] = []

    def model_init() -> Any:
        made.append(tiny_model("llama", seed=len(made)))
        return made[-1]

    args = config(tmp_path, max_steps=1, save_strategy="no", learning_rate=0.1)
    trainer = AdaKDTrainer(model_init=model_init, args=args, peft_config=lora(), train_dataset=token_records(8))
    for _ in range(2):
        trainer.train()
        assert trainer.model.get_base_model() is made[-1] is trainer.teacher.get_base_model()
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert optimized == {id(p) for name, p in trainer.model.named_parameters() if "lora" in name}


def test_the_warning_of_a_student_that_begins_as_its_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zero = lora(init_lora_weights=True)
    for options, peft_config in (({"ce_weight": 0.5}, zero), ({}, lora())):
        AdaKDTrainer(model=tiny_model("llama"), args=config(tmp_path, **options), peft_config=peft_config)
    assert "begins as its own teacher" not in caplog.text
    AdaKDTrainer(model=tiny_model("llama"), args=config(tmp_path), peft_config=zero)
    assert "the student begins as its own teacher, from which it has nothing to learn" in caplog.text


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(tmp_path)
    with pytest.raises(TypeError, match=r"got None; without a teacher, .* give peft_config, or make the student with"):
        AdaKDTrainer(model=tiny_model("llama"), args=args)
    with pytest.raises(TypeError, match=r"peft_config must be a configuration of peft, such as .*, got dict"):
        AdaKDTrainer(model=tiny_model("llama"), args=args, peft_config={"r": 4})
    with pytest.raises(ValueError, match="model has an adapter already, and peft_config asks for another one"):
        AdaKDTrainer(model=peft.get_peft_model(tiny_model("llama"), lora()), args=args, peft_config=lora())

    # What would change the teacher while the student learns, or has changed it already.
    for options in ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}):
        with pytest.raises(ValueError, match=r"own base cannot teach: init_lora_weights='.*' has changed its weights"):
            AdaKDTrainer(model=tiny_model("llama"), args=args, peft_config=lora(**options))
    with (
        pytest.warns(UserWarning, match="bias"),
        pytest.raises(ValueError, match=r"training changes .*bias: freeze it"),
    ):
        AdaKDTrainer(model=tiny_model("gpt2"), args=args, peft_config=lora(bias="all"))
    student = peft.get_peft_model(tiny_model("llama"), lora())
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"own base cannot teach: the training changes model.norm.weight: freeze it"):
        AdaKDTrainer(model=student, args=args)
    AdaKDTrainer(model=student, teacher=tiny_model("llama"), args=args)

    monkeypatch.setattr(AdaKDTrainer, "get_tp_size", lambda self: 2)
    with pytest.raises(ValueError, match="own base cannot teach where the student is split over processes"):
        AdaKDTrainer(model=tiny_model("llama"), args=args, peft_config=lora())


def test_a_missing_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adakd_kernels.trainer.adapters.peft", None)
    with pytest.raises(ImportError, match="peft_config needs peft: pip install peft"):
        AdaKDTrainer(model=tiny_model("llama"), args=config(tmp_path), peft_config=lora())
    teacher = tiny_model("llama", layers=2)
    AdaKDTrainer(model=tiny_model("llama"), teacher=teacher, args=config(tmp_path))


def test_a_model_of_few_bits_is_prepared(tmp_path: Path) -> None:
    """bitsandbytes marks the models that it loads; what is not of few bits is cast to fp32, as QLoRA needs it."""
    model = tiny_model("llama").bfloat16()
    model.is_loaded_in_4bit = True
    trainer = AdaKDTrainer(model=model, args=config(tmp_path), peft_config=lora())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(("lora" in name) == p.requires_grad for name, p in trainer.model.named_parameters())


def test_a_merged_model_is_a_plain_one(tmp_path: Path) -> None:
    from adakd_kernels.trainer.adapters import save_merged

    student = peft.get_peft_model(tiny_model("llama", seed=1), lora(modules_to_save=["lm_head"]))
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(2.0)
    student.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    expected = student(input_ids=ids).logits
    save_merged(student, tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, expected)
