"""The examples for axolotl and ms-swift, on transformers' `Trainer` with stand-ins for the classes that they extend.

Neither package is installed with the tests. What is shown is that the files import, register what they say, and train
as `AdaKDTrainer` does on the same records where the framework calls them as its source does. Nothing more.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from adakd_kernels.integrations.transformers import AdaKDDataCollator, AdaKDTrainer

from .tiny_models import save_pair, token_records
from .trainer_process import config

pytestmark = pytest.mark.fast

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}


def load(name: str, monkeypatch: pytest.MonkeyPatch, **stand_ins: dict[str, Any]) -> ModuleType:
    """An example as a module, with the modules that it imports from a framework."""
    for module, names in stand_ins.items():
        parts = module.split("__")
        for end in range(1, len(parts) + 1):
            found = ModuleType(".".join(parts[:end]))
            monkeypatch.setitem(sys.modules, found.__name__, sys.modules.get(found.__name__, found))
        vars(sys.modules[".".join(parts)]).update(names)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("frameworks"), "llama")


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1,
        save_strategy="no", dataloader_pin_memory=False, **{**STEPS, **options},
    )  # fmt: skip


def padded(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as the frameworks' collators make it: labels under the tokens that they are of."""
    fields = {"input_ids": 1, "labels": -100, "attention_mask": 0}
    rows = [{**record, "attention_mask": [1] * len(record["input_ids"])} for record in records]
    width = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in fields.items()
    }


def parts(pair: tuple[Path, Path], collator: Any = padded) -> dict[str, Any]:
    """What a trainer is made of besides its arguments."""
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    return {"model": model, "train_dataset": token_records(16), "data_collator": collator}


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def ours(folder: Path, pair: tuple[Path, Path], **options: Any) -> list[float]:
    args = config(folder, logging_steps=1, save_strategy="no", **{**STEPS, **options})
    teacher = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    return losses_of(AdaKDTrainer(**parts(pair, AdaKDDataCollator(pad_token_id=1)), teacher=teacher, args=args))


class AxolotlTrainer(Trainer):
    """The stand-in: axolotl's is a `Trainer` too, here of a model that takes no number of tokens."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.model_accepts_loss_kwargs = False


def test_the_plugin_of_axolotl_trains_as_ours(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydantic", reason="pydantic, which axolotl brings along, is not installed")
    module = load(
        "axolotl_plugin", monkeypatch, axolotl__integrations__base={"BasePlugin": object},
        axolotl__core__trainers__base={"AxolotlTrainer": AxolotlTrainer},
    )  # fmt: skip
    plugin = module.AdaKDPlugin()
    where, _, name = plugin.get_input_args().rpartition(".")
    arguments_class = getattr(sys.modules[where], name)
    assert plugin.get_trainer_cls(SimpleNamespace(**arguments_class().model_dump())) is None
    given = arguments_class(adakd_teacher=str(pair[1]), adakd_divergence="forward_kl").model_dump()
    with pytest.raises(ValueError, match="sample_packing must be false with adakd_teacher"):
        plugin.get_trainer_cls(SimpleNamespace(**given, sample_packing=True))
    trainer_class = plugin.get_trainer_cls(SimpleNamespace(**given, sample_packing=False))
    assert issubclass(trainer_class, AxolotlTrainer)
    # So many steps that the share, which follows the loss, has moved.
    more = {"max_steps": 30}
    trainer = trainer_class(args=arguments(tmp_path / "axolotl", **more), **parts(pair))
    found = losses_of(trainer)
    assert found == pytest.approx(ours(tmp_path / "ours", pair, divergence="forward_kl", **more), rel=1e-4)
    assert float(trainer.loss_fn.focus_ratio) < 1.0


def test_the_loss_of_ms_swift_trains_as_ours(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class BaseLoss:
        def __init__(self, args: Any, trainer: Any) -> None:
            self.args, self.trainer = args, trainer

    class SwiftTrainer(Trainer):
        """Makes the loss before `Trainer` is made, passes it along in the inputs, and calls it, as ms-swift does."""

        def __init__(self, **given: Any) -> None:
            made = loss_map["adakd"](given["args"], self)
            super().__init__(**given, compute_loss_func=made)
            self.model_accepts_loss_kwargs = True

        def _prepare_inputs(self, inputs: Any) -> Any:
            return {**super()._prepare_inputs(inputs), "compute_loss_func": self.compute_loss_func}

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
        ) -> Any:
            function, labels = inputs.pop("compute_loss_func"), inputs.pop("labels")
            return function(
                model(**inputs), labels, num_items_in_batch=num_items_in_batch, loss_scale=None, trainer=self
            )

    loss_map: dict[str, Any] = {}
    load("ms_swift_loss", monkeypatch, swift__loss={"BaseLoss": BaseLoss, "loss_map": loss_map})
    assert list(loss_map) == ["adakd"]
    with pytest.raises(ValueError, match="needs the environment variable ADAKD_TEACHER"):
        SwiftTrainer(args=arguments(tmp_path), **parts(pair))
    options = {"temperature_scale": 0.3, "focus_ratio": 0.75}
    for name, value in {"teacher": pair[1], **options}.items():
        monkeypatch.setenv(f"ADAKD_{name.upper()}", str(value))
    trainer = SwiftTrainer(args=arguments(tmp_path / "swift"), **parts(pair))
    assert losses_of(trainer) == pytest.approx(ours(tmp_path / "ours", pair, **options), rel=1e-4)
    with pytest.raises(ValueError, match="loss_scale must be left at its default"):
        trainer.compute_loss_func(None, torch.zeros(1), loss_scale=torch.ones(1))
