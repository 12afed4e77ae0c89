"""Models that the driver takes, follows while they change, or refuses, and their vocabularies and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from adakd_kernels import reference
from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer, DataError

from .tiny_models import save_pair, tiny_experts, tiny_model, tiny_tokenizer, token_records
from .trainer_process import config, experts_trainer, of_both_ranks

pytestmark = pytest.mark.fast

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64 throughout: only rounding


def expected_loss(logits: Tensor, teacher_logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The reference's loss of all logits (B, L, V) of a batch."""
    rows = [values[:, :-1].flatten(0, 1) for values in (logits, teacher_logits)]
    return reference.adakd_loss(*rows, batch["labels"][:, 1:].flatten())


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_virtual_tokens(tmp_path: Path, kind: str, keep: bool, route: str) -> None:
    """The loss and its gradient read the record's own positions, of a student and of a teacher with virtual tokens."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(3)
    options = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    student, teacher = (
        peft.get_peft_model(
            tiny_model("llama", layers=layers, seed=layers),
            getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=count, **options),
        ).double()
        for layers, count in ((1, 3), (2, 5))
    )
    batch = AdaKDDataCollator(logits_to_keep=keep)(token_records(4))
    trainer = AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path, logits_route=route))
    student.train()
    trainer.compute_loss(student, batch).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.requires_grad}
    student.zero_grad()
    length = batch["input_ids"].shape[1]
    logits, teacher_logits = (model(**plain(batch)).logits[:, -length:] for model in (student, teacher))
    loss = expected_loss(logits, teacher_logits, batch)
    loss.backward()
    torch.testing.assert_close(trainer.compute_loss(student, batch), loss, **CLOSE)
    assert gradients and any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, student.get_parameter(name).grad, **CLOSE)
    _, outputs = trainer.compute_loss(student, {**batch}, return_outputs=True)
    assert outputs.logits.shape[1] == (len(batch["logits_to_keep"]) if keep else length)
    with pytest.raises(ValueError, match="'position_ids' of the batch do not go with the virtual tokens"):
        trainer.compute_loss(student, {**batch, "position_ids": torch.arange(length).expand(4, -1)})


def test_the_model_of_each_run_is_judged(tmp_path: Path) -> None:
    """model_init gives a model whose logits are soft-capped, then one whose are not."""
    made: list[Any] = []

    def model_init() -> Any:
        made.append(tiny_model("llama" if len(made) % 2 else "gemma2", seed=1))
        return made[-1]

    teacher = tiny_model("llama", layers=2, seed=2)
    args = config(tmp_path, max_steps=1, save_strategy="no", logits_route="hidden", per_device_train_batch_size=4)
    trainer = AdaKDTrainer(model_init=model_init, teacher=teacher, args=args, train_dataset=token_records(4))
    batch = AdaKDDataCollator()(token_records(4))
    for architecture in ("llama", "gemma2", "llama"):
        found = trainer.train().training_loss
        assert architecture in type(trainer.model).__name__.lower()
        fresh = tiny_model(architecture, seed=1)
        expected = expected_loss(fresh(**plain(batch)).logits, teacher(**plain(batch)).logits, batch)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        with torch.no_grad():
            evaluated = trainer.compute_loss(trainer.model.eval(), batch)
            logits = trainer.model(**plain(batch)).logits
            expected = expected_loss(logits, teacher(**plain(batch)).logits, batch)
        assert evaluated.item() == pytest.approx(expected.item(), rel=1e-5)


class LoraOnTheHead(TrainerCallback):
    """Puts an adapter on the student's head at the first step, after the trainer was made."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            import peft

            model.add_adapter(peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, r=2))
            model.double()


@pytest.mark.parametrize("when", ["before the run", "in the run"])
def test_lora_that_is_put_on_the_head_later(tmp_path: Path, when: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    student = tiny_model("llama", seed=1).double()
    teacher = tiny_model("llama", layers=2, seed=2).double()
    callback = LoraOnTheHead()
    args = config(tmp_path, max_steps=1, save_strategy="no", per_device_train_batch_size=4, focus_beta=0.5)
    trainer = AdaKDTrainer(
        model=student, teacher=teacher, args=args, train_dataset=token_records(4),
        callbacks=[callback] if when == "in the run" else [],
    )  # fmt: skip
    assert trainer._head_options is not None
    torch.manual_seed(5)
    if when == "before the run":
        callback.on_step_begin(args, trainer.state, None, model=student)
    batch = AdaKDDataCollator()(token_records(4))
    losses: list[float] = []
    step = trainer.training_step
    trainer.training_step = lambda model, *rest: (
        losses.append(  # type: ignore[method-assign]
            expected_loss(model(**plain(batch)).logits, teacher(**plain(batch)).logits, batch).item()
        )
        or step(model, *rest)
    )
    found = trainer.train().training_loss
    assert found == pytest.approx(losses[0], rel=1e-6)
    assert trainer._head_options is None
    assert trainer.loss_fn.focus.steps.item() == 1
    assert trainer.loss_fn.focus.loss_ema.item() == pytest.approx(found, rel=1e-6)
    trainer.compute_loss(student.train(), batch).backward()
    assert student.lm_head.lora_A["default"].weight.grad.any()


def test_a_hook_on_the_head_is_seen(tmp_path: Path) -> None:
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", layers=2, seed=2)
    trainer = AdaKDTrainer(model=student, teacher=teacher, args=config(tmp_path))
    batch = AdaKDDataCollator()(token_records(4))
    before = trainer.compute_loss(student, batch)
    handle = student.lm_head.register_forward_hook(lambda module, args, out: 0.5 * out)
    expected = expected_loss(student(**plain(batch)).logits, teacher(**plain(batch)).logits, batch)
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected)
    assert trainer._head_options is None
    handle.remove()
    assert torch.equal(trainer.compute_loss(student, batch), before)
    assert trainer._head_options is not None


@pytest.mark.parametrize("route", ["logits", "hidden"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_auxiliary_loss_of_experts(tmp_path: Path, kind: str, route: str) -> None:
    """It adds to loss and gradient of the routers what it adds to transformers' own."""
    batch = AdaKDDataCollator()(token_records(4))
    teacher = tiny_model("llama", layers=2, seed=2).double()
    gradients, losses = [], []
    for options in ({"output_router_logits": True, "router_aux_loss_coef": 0.7}, {}):
        for own in (False, True):
            model = tiny_experts(kind, **options).train()
            if own:
                loss = model(**plain(batch), labels=batch["labels"]).loss
            else:
                trainer = AdaKDTrainer(model=model, teacher=teacher, args=config(tmp_path, logits_route=route))
                loss = trainer.compute_loss(model, batch)
                held_out = trainer.compute_loss(model.eval(), batch)
                torch.testing.assert_close(held_out, loss, rtol=1e-6, atol=0)
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[1] - losses[3] > 0.1
    assert losses[0] - losses[2] == pytest.approx(losses[1] - losses[3], rel=1e-6)
    for name in gradients[0]:
        if ".gate." in name:
            own = gradients[1][name] - gradients[3][name]
            atol = 1e-5 * own.abs().max().item()  # transformers computes this loss in fp32
            torch.testing.assert_close(gradients[0][name] - gradients[2][name], own, rtol=0, atol=atol)
            assert own.any()


def test_auxiliary_loss_is_the_mean_of_micro_batches_and_ranks(tmp_path: Path, two_ranks: Path) -> None:
    whole, parts = (experts_trainer(tmp_path, *sizes) for sizes in ((4, 1), (1, 4)))
    losses = [trainer.train().training_loss for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for found in (parts.model.state_dict(), *of_both_ranks(two_ranks, "experts")):
        for name, value in whole.model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)  # this loss is computed in fp32


def bert(cls: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return cls(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=32, max_position_embeddings=64, **options))  # fmt: skip


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bert(BertForMaskedLM), "BertForMaskedLM is bidirectional"),
        (lambda: bert(BertLMHeadModel), "BertLMHeadModel is bidirectional"),
        (t5, "T5ForConditionalGeneration is an encoder–decoder"),
        (lambda: tiny_model("llama").model, "LlamaModel has no output layer"),
        (lambda: LlamaForTokenClassification(tiny_model("llama").config), "TokenClassification gives 2 logits"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    cure = ".*AutoModelForCausalLM"
    with pytest.raises(ValueError, match=f"^student .*{message}{cure}"):
        AdaKDTrainer(model=make(), teacher=tiny_model("llama"), args=config(tmp_path))
    with pytest.raises(ValueError, match=f"^teacher .*{message}{cure}"):
        AdaKDTrainer(model=tiny_model("llama"), teacher=make(), args=config(tmp_path))


def test_a_decoder_of_bert_is_taken(tmp_path: Path) -> None:
    AdaKDTrainer(model=bert(BertLMHeadModel, is_decoder=True), teacher=tiny_model("llama"), args=config(tmp_path))


def trainer_of(folder: Path, records: list[Any], student: Any, teacher: Any, **options: Any) -> AdaKDTrainer:
    args = config(folder, max_steps=1, save_strategy="no", per_device_train_batch_size=len(records))
    return AdaKDTrainer(model=student, teacher=teacher, args=args, train_dataset=records, **options)


@pytest.mark.parametrize(("sizes", "role"), [((64, 70), "student"), ((70, 64), "teacher")])
def test_ids_beyond_a_vocabulary(tmp_path: Path, sizes: tuple[int, int], role: str) -> None:
    student, teacher = (tiny_model("llama", vocab_size=size) for size in sizes)
    record = {"input_ids": [5, 66, 7], "labels": [-100, -100, 7], "id": "doc/7"}
    message = rf"input_ids\[1\] of record 'doc/7' is 66, which is none of the 64 ids of the {role}"
    for collator in (None, lambda records: {k: torch.tensor([v]) for k, v in records[0].items() if k != "id"}):
        match = message if collator is None else message.replace("'doc/7'", "0 of the batch")
        with pytest.raises(ValueError, match=match):
            trainer_of(tmp_path, [record], student, teacher, data_collator=collator).train()
    record = {"input_ids": [5, 6, 7], "labels": [-100, -100, 66]}
    with pytest.raises(ValueError, match=r"labels\[2\] of record 0 of the batch is 66"):
        trainer_of(tmp_path, [record], student, teacher).train()
    with pytest.raises(ValueError, match=r"input_ids\[0\] of record 0 of the batch is -1"):
        trainer_of(tmp_path, [{**record, "input_ids": [-1, 6, 7]}], student, teacher).evaluate([
            {**record, "input_ids": [-1, 6, 7]}
        ])  # fmt: skip
    trainer_of(tmp_path, [{"input_ids": [5, 63], "labels": [-100, 63]}], student, teacher).train()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_records_longer_than_a_model_takes(tmp_path: Path, architecture: str) -> None:
    teacher = tiny_model(architecture)  # 256 positions
    student = tiny_model("llama")
    student.config.max_position_embeddings = 1000
    long = {"input_ids": [5] * 257, "labels": [5] * 257}
    with pytest.raises(ValueError, match="takes 257 tokens with its padding, but the teacher takes 256"):
        trainer_of(tmp_path, [long], student, teacher).train()
    trainer_of(tmp_path, [{**long, "position_ids": [*range(200), *range(57)]}], student, teacher).train()
    if architecture == "llama":
        teacher.config.rope_parameters = {**teacher.config.rope_parameters, "rope_type": "linear", "factor": 2.0}
        trainer_of(tmp_path, [long], student, teacher).train()


def test_special_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    models = [tiny_model("llama", vocab_size=len(tokenizer), seed=seed) for seed in (1, 2)]
    small = tiny_model("llama", vocab_size=64)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(100)
    with pytest.raises(ValueError, match=r"the pad_token .* of processing_class is 100, .* the 64 ids of the teacher"):
        AdaKDTrainer(model=models[0], teacher=small, args=config(tmp_path), processing_class=tokenizer)
    AdaKDTrainer(model=models[0], teacher=models[1], args=config(tmp_path), processing_class=tokenizer)
    assert "token_id" not in caplog.text
    models[1].config.eos_token_id = models[1].generation_config.eos_token_id = [3, 4]
    AdaKDTrainer(model=models[0], teacher=models[1], args=config(tmp_path), processing_class=tokenizer)
    assert "eos_token_id is 0 for the student and 3 or 4 for the teacher" in caplog.text


def test_the_tokenizer_in_the_folder_of_a_teacher(tmp_path: Path) -> None:
    tokenizer, other = tiny_tokenizer(), tiny_tokenizer(vocab_size=280)
    _, folder = save_pair(tmp_path)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    AdaKDTrainer(model=model, teacher=folder, args=config(tmp_path), processing_class=tokenizer)
    other.add_tokens(["another"])
    with pytest.raises(DataError, match="student and teacher must share one tokenizer, but token"):
        AdaKDTrainer(model=model, teacher=str(folder), args=config(tmp_path), processing_class=other)
