"""Models and tokenizers of the commands: where they are, found out before anything is loaded, and how to try one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.utils.import_utils import is_bitsandbytes_available

from ..trainer.adapters import base_of_adapter
from . import CommandError
from .options import ADAPTERS, RunOptions, same_model

__all__ = ["RunModels", "lines_to_try", "load", "locate", "lora_config", "quantization"]

HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""


def locate(role: str, name: str) -> str:
    """Find a model: a folder, the hub, or the hub's cache on this machine.

    The hub is asked once. transformers would ask it for each file, and each time again for half a minute where there
    is no network.

    Returns:
        What `from_pretrained` takes: the name, or the model's folder in the cache where the hub does not answer.

    Raises:
        CommandError: it is in none of these places, or its terms have not been accepted.
    """
    if Path(name).is_dir():
        return name
    # "owner/name" may be on the hub. A name that looks like a path is a folder and nothing else.
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CommandError(f"{role} {name}: no such folder")
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError:
        raise CommandError(
            f"{role} {name}: the hub gives it to those who accepted its terms: accept them at "
            f"https://huggingface.co/{name} and log in with 'hf auth login'"
        ) from None
    except HFValidationError as error:
        raise CommandError(f"{role} {name}: no such folder, and no name of the hub: {error}") from None
    except RepositoryNotFoundError:
        raise CommandError(
            f"{role} {name}: no such folder, and no such model on the hub (a private one needs 'hf auth login')"
        ) from None
    except Exception as error:  # no network, a proxy, a hub that is down, HF_HUB_OFFLINE
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return str(Path(cached).parent)
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            reason = f"the hub answers {error.response.status_code}"
        else:
            reason = f"the hub cannot be reached ({error})"
        raise CommandError(
            f"{role} {name}: no such folder, not in the hub's cache on this machine, and {reason}"
        ) from None
    return name


@dataclass(frozen=True)
class RunModels:
    """What `from_pretrained` takes for the models of a run.

    Attributes:
        student: the student, or its adapter where there is one already.
        base: the model under this adapter, or None.
        teacher: the teacher; None where the student's own base teaches.
        adapted: whether an adapter is trained.
    """

    student: str
    base: str | None
    teacher: str | None
    adapted: bool

    @classmethod
    def find(cls, options: RunOptions) -> RunModels:
        """Locate the models of a run.

        Raises:
            CommandError: one of them is nowhere, or the options of adapters do not fit the student.
        """
        student = locate("student", str(options.student))
        base = base_of_adapter(student)
        if base is not None and options.lora_r is not None:
            raise CommandError(
                f"student {options.student} is an adapter already, and lora_r asks for another one: leave lora_r out "
                f"to train it further, or take {base} as the student"
            )
        adapted = base is not None or options.lora_r is not None
        useless = [name for name in ADAPTERS if getattr(options, name) and not adapted]
        if useless:
            raise CommandError(f"{useless[0]} needs an adapter: give lora_r too, or leave it out to train all weights")
        own = adapted and (not options.teacher or any(same_model(options.teacher, m) for m in (options.student, base)))
        teacher = None if own else locate("teacher", str(options.teacher))
        return cls(student, base if base is None else locate("student", base), teacher, adapted)


def lora_config(options: RunOptions) -> Any:
    """The configuration of a new adapter, or None.

    Raises:
        CommandError: peft is not installed.
    """
    if options.lora_r is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise CommandError(f"lora_r needs peft: pip install peft ({error})") from error
    modules = options.lora_target_modules
    sizes: dict[str, Any] = {name: getattr(options, name) for name in ("lora_alpha", "lora_dropout")}
    target = "all-linear" if modules == ["all-linear"] else modules
    return LoraConfig(task_type="CAUSAL_LM", r=options.lora_r, target_modules=target, **sizes)


def quantization(options: RunOptions, config: TrainingArguments) -> dict[str, Any]:
    """What `from_pretrained` of a student in 4 or 8 bits takes besides; nothing for another one.

    Raises:
        CommandError: bitsandbytes does not run here.
    """
    name = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(options, name)), None)
    if name is None:
        return {}
    if not is_bitsandbytes_available():
        raise CommandError(f"{name} needs bitsandbytes: pip install bitsandbytes")
    from transformers.integrations.bitsandbytes import validate_bnb_backend_availability

    try:
        validate_bnb_backend_availability(raise_exception=True)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise CommandError(f"{name}: bitsandbytes does not run on this machine: {error}") from error
    mixed = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    of_4_bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": mixed} if options.load_in_4bit else {}
    bits = BitsAndBytesConfig(**{name: True}, **of_4_bits)  # type: ignore[no-untyped-call]
    return {"quantization_config": bits, "device_map": {"": str(config.device)}}


def load(role: str, name: str, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """What `from_pretrained` makes of a folder or hub name.

    Raises:
        CommandError: whatever goes wrong, with the name in front.
    """
    try:
        return from_pretrained(name, **options)
    except Exception as error:
        raise CommandError(f"{role} {name}: cannot be loaded: {type(error).__name__}: {error}") from error


def lines_to_try(folder: str, tokenizer: Any) -> str:
    """Two lines of Python that load the model in `folder` and let it answer, in the format that it was trained on."""
    question = "Name a word that rhymes with cat."
    if getattr(tokenizer, "chat_template", None):
        asked, answer = repr([{"role": "user", "content": question}]), '[0]["generated_text"][-1]["content"]'
    else:
        asked, answer = repr(f"### User:\n{question}\n\n### Assistant:\n"), '[0]["generated_text"]'
    return (
        f'from transformers import pipeline; ask = pipeline("text-generation", model={folder!r})\n'
        f"print(ask({asked}, max_new_tokens=60, do_sample=False){answer})\n"
    )
