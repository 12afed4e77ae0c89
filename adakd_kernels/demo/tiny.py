"""A tiny random model with a tokenizer: the whole demo in seconds, to check that it runs, not what it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .config import DemoConfig
from .models import save_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(directory: Path, **changes: Any) -> DemoConfig:
    """A demo of a few steps with a random teacher of 4 layers; models, cache and results all lie in `directory`.

    Args:
        directory: an empty or missing folder, or one that this function wrote to.
        **changes: fields of `DemoConfig` to replace.
    """
    teacher = directory / "tiny-teacher"
    if not teacher.is_dir():
        write_tiny_teacher(teacher)
    config = DemoConfig(
        teacher=str(teacher),
        first_cut=1,
        layers_cut=2,
        train_records=8,
        held_out_records=4,
        max_new_tokens=8,
        answer_batch=4,
        steps=4,
        batch_size=2,
        warmup_steps=1,
        probe_every=2,
        probe_records=2,
        device="cpu",
        dtype="float32",
        output_dir=directory / "output",
        cache_dir=directory / "cache",
    )
    return replace(config, **changes)


def write_tiny_teacher(directory: Path, *, layers: int = 4, seed: int = 0) -> None:
    """Save a Llama model with random weights and a byte-level tokenizer of 259 tokens; needs no download.

    Args:
        directory: the folder to write.
        layers: number of decoder layers.
        seed: seed of the weights; torch's global generator is left as it was.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(
        tokenizer_object=backend, unk_token=special[0], bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(special) + len(alphabet),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=False,
                initializer_range=0.5,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
    save_model(model, tokenizer, directory)
