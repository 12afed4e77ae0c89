"""Adapters of peft: put on a student, loaded, resumed, merged; and the student's own base as its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from .heads import evaluation_mode

peft: Any
try:
    import peft
except ImportError:
    peft = None

__all__ = [
    "OwnBase",
    "base_of_adapter",
    "check_checkpoint",
    "is_adapted",
    "is_adapter_folder",
    "load_student",
    "save_merged",
    "teacher_of",
    "with_adapter",
]

INITS_BESIDE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the weights of the base as they are; pissa, for one, subtracts from them."""
COMPARED = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
            "modules_to_save", "num_virtual_tokens")  # fmt: skip
"""Options of an adapter with which a run must go on as it began."""


def is_adapted(model: Any) -> bool:
    """Whether a model is one of peft's, with an adapter of its own."""
    return peft is not None and isinstance(model, peft.PeftModel)


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether an adapter lies in a folder."""
    return (Path(folder) / ADAPTER_CONFIG_NAME).is_file()


def base_of_adapter(name: str | Path) -> str | None:
    """The folder or name of the model under the adapter in a folder or on the hub; None if no adapter is there."""
    file = find_adapter_config_file(str(name))
    return None if file is None else str(json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"])


def with_adapter(model: Any, peft_config: Any) -> Any:
    """A model with a new adapter, or the model itself where `peft_config` is None.

    Raises:
        ImportError: peft is not installed.
        TypeError: `peft_config` is none of peft's configurations.
        ValueError: the model has an adapter already, or the configuration does not fit it.
    """
    if peft_config is None:
        return model
    _check_peft("peft_config")
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            "peft_config must be a configuration of peft, such as LoraConfig(task_type='CAUSAL_LM'), got "
            f"{type(peft_config).__name__}"
        )
    if is_adapted(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model has an adapter already, and peft_config asks for another one: leave peft_config out to train the "
            "one that is there, or merge it first, with model.merge_and_unload()"
        )
    return peft.get_peft_model(_prepared(model), deepcopy(peft_config))


def load_student(name: str | Path, base: str | Path | None, **options: Any) -> Any:
    """A student to train.

    Args:
        name: its folder or name on the hub, or those of an adapter.
        base: the model under this adapter; None if there is none.
        **options: for `from_pretrained` of the model.
    """
    if base is None:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    _check_peft(f"the adapter {name}")
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return peft.PeftModel.from_pretrained(_prepared(model), str(name), is_trainable=True)


def _check_peft(what: str) -> None:
    if peft is None:
        raise ImportError(f"{what} needs peft: pip install peft")


def _prepared(model: Any) -> Any:
    """A model of 4 or 8 bits ready for an adapter. `Trainer` itself sets up checkpointing of activations."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def check_checkpoint(checkpoint: str | Path, model: Any) -> None:
    """Refuse to go on with an adapter where the run began with a whole model, the other way round, or with another one.

    Args:
        checkpoint: a folder that `Trainer` saved.
        model: the student; or whether it has an adapter, where it is not loaded yet.

    Raises:
        ValueError: the checkpoint is of another kind.
    """
    adapted = model if isinstance(model, bool) else is_adapted(model)
    # Without weights in the folder itself, there are several adapters, in folders of their own.
    if adapted != is_adapter_folder(checkpoint) and any(Path(checkpoint).glob("*.safetensors*")):
        held, asked = ("a whole model", "an adapter") if adapted else ("an adapter alone", "a whole model")
        raise ValueError(
            f"checkpoint {checkpoint} holds {held}, but this run trains {asked}: "
            + ("leave out peft_config, or lora_r" if adapted else "give the peft_config, or lora_r, of that run")
            + ", or start anew in another output_dir"
        )
    if not is_adapted(model) or not is_adapter_folder(checkpoint):
        return
    saved, own = peft.PeftConfig.from_pretrained(str(checkpoint)), model.active_peft_config
    for name in COMPARED:
        before, now = (_comparable(getattr(config, name, None)) for config in (saved, own))
        if before != now:
            raise ValueError(
                f"checkpoint {checkpoint} holds an adapter with {name}={before!r}, but this run has {now!r}: go on "
                "with the options of that run, or start anew in another output_dir"
            )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value


def save_merged(model: Any, folder: str | Path) -> None:
    """Save an adapted model as a plain one, in place of its adapter, which lies in `folder`.

    The adapter is gone from `model` afterwards.
    """
    model.merge_and_unload().save_pretrained(folder)
    for name in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
        (Path(folder) / name).unlink(missing_ok=True)


def teacher_of(student: Any, teacher: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> Any:
    """`teacher`, or the student's own base where this is meant: by None, or by the very model under the adapter.

    Raises:
        TypeError: None, and the student has no adapter.
        ValueError: the base would not stay as it is.
    """
    if isinstance(teacher, OwnBase) and teacher.student is student:
        return teacher
    if teacher is None or isinstance(teacher, OwnBase) or (is_adapted(student) and teacher is student.get_base_model()):
        return OwnBase(student, autocast)
    return teacher


class OwnBase(nn.Module):
    """The base of an adapted student as its teacher: the student's weights with its adapter off, so none of its own.

    Its forward is that of a frozen teacher, in evaluation mode and without gradients, in the student's mixed
    precision. Layers that are trained as a whole (`modules_to_save`, `trainable_token_indices`) give what they gave
    before the training. The student is afterwards as it was.

    Args:
        student: a model of peft.
        autocast: gives the context of the student's mixed precision.
    """

    def __init__(self, student: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        if not is_adapted(student):
            raise TypeError(
                "teacher must be a causal language model or the folder of one, got None; without a teacher, the "
                "student's own base teaches, for which the student needs an adapter: give peft_config, or make the "
                "student with peft.get_peft_model"
            )
        _check_base_is_kept(student)
        # In a tuple, or it would be a part of this module, and be frozen and moved with it.
        self._student = (student,)
        self._autocast = autocast

    @property
    def student(self) -> Any:
        """The model of peft."""
        return self._student[0]

    def get_base_model(self) -> Any:
        """The model under the adapter."""
        return self.student.get_base_model()

    @property
    def config(self) -> Any:
        """The configuration of the base."""
        return self.get_base_model().config

    @property
    def generation_config(self) -> Any:
        """How the base generates, or None."""
        return getattr(self.get_base_model(), "generation_config", None)

    def get_input_embeddings(self) -> Any:
        """The embedding that the base calls while the adapter is off."""
        return _original(self.get_base_model().get_input_embeddings())

    def get_output_embeddings(self) -> Any:
        """The head that the base calls while the adapter is off."""
        return _original(self.get_base_model().get_output_embeddings())

    def forward(self, **inputs: Any) -> Any:
        """As the base's forward was before there was an adapter."""
        with evaluation_mode(self.student), _adapters_off(self.student), self._autocast():
            return self.get_base_model()(**inputs)


@contextmanager
def _adapters_off(student: Any) -> Iterator[None]:
    """The base of the student without its adapter; afterwards the student is as it was."""
    if student.active_peft_config.is_prompt_learning:
        yield  # the adapter is not in the base
        return
    # `student.disable_adapter()` does the same, but takes twice as long, for the state of each layer's adapters.
    # Both freeze all weights of adapters, and train all of them afterwards.
    trained = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    off = [module for module in student.modules() if isinstance(module, _layers()) and module.disable_adapters]
    student.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        student.base_model.enable_adapter_layers()
        for module in off:
            module.enable_adapters(False)
        for parameter, before in trained:
            if parameter.requires_grad != before:
                parameter.requires_grad_(before)


def _layers() -> tuple[Any, Any]:
    """What peft wraps layers in: to adapt them, or to train them as a whole."""
    return peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper


def _original(module: Any) -> Any:
    """The layer of the base that peft has wrapped, or `module`."""
    adapted, whole = _layers()
    while isinstance(module, (adapted, whole)):
        module = module.get_base_layer() if isinstance(module, adapted) else module.original_module
    return module


def _check_base_is_kept(student: Any) -> None:
    """Refuse a student whose training, or whose adapter by being put on, changes what the base gives without it."""
    cure = "give a teacher of its own, such as the folder of the base"
    for config in student.peft_config.values():
        init = getattr(config, "init_lora_weights", True)
        if init not in INITS_BESIDE_THE_BASE or getattr(config, "kasa_config", None) is not None:
            name = "kasa_config" if init in INITS_BESIDE_THE_BASE else f"init_lora_weights={init!r}"
            raise ValueError(
                f"the student's own base cannot teach: {name} has changed its weights when the adapter was made: {cure}"
            )
    with _adapters_off(student):
        base = student.get_base_model().named_parameters()
        trained = [name for name, parameter in base if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"the student's own base cannot teach: the training changes {trained[0]}: freeze it, or {cure}"
        )
