"""Random models, a tokenizer and records small enough for a test, made without a download."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

INSTRUCTIONS = [
    {
        "instruction": f"Name a word that rhymes with {word}.",
        "input": extra,
        "output": f"A word is {answer}, of course.",
    }
    for word, extra, answer in (
        ("cat", "", "hat"),
        ("light", "Take a short one.", "night"),
        ("tree", "", "bee"),
        ("stone", "It should be a thing.", "bone"),
        ("rain", "", "a train that is late again"),
        ("door", "", "floor"),
        ("bell", "It lives by the sea.", "shell"),
        ("moon", "", "spoon"),
    )
]


def tiny_model(
    architecture: str,
    *,
    layers: int = 1,
    vocab_size: int = 64,
    hidden: int = 16,
    seed: int = 0,
    dropout: float = 0.0,
    kv_heads: int = 1,
) -> PreTrainedModel:
    """A random causal language model in fp32; its weights follow from the arguments.

    'gpt2', 'llama', 'qwen2', 'smollm2' (a llama with a tied head), 'gemma2' (soft-capped), 'cohere' or 'granite'
    (scaled), 'phi' (a head with a bias).
    """
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size, n_positions=256, n_embd=hidden, n_layer=layers, n_head=2, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.5, **ids,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": kv_heads, "max_position_embeddings": 256,
        "initializer_range": 0.5,
    }  # fmt: skip
    if architecture in ("llama", "smollm2"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **ids, tie_word_embeddings=architecture == "smollm2"))
    if architecture == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, **ids, head_dim=8, final_logit_softcapping=2.0))
    if architecture == "cohere":
        return CohereForCausalLM(CohereConfig(**sizes, **ids, logit_scale=0.25))
    if architecture == "granite":
        return GraniteForCausalLM(GraniteConfig(**sizes, **ids, logits_scaling=3.0))
    if architecture == "phi":
        model = PhiForCausalLM(PhiConfig(**sizes, **ids))
        torch.nn.init.normal_(model.lm_head.bias)
        return model
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **ids))


def tiny_experts(kind: str, **options: Any) -> PreTrainedModel:
    """A random mixture of experts in fp64: 'mixtral' or 'qwen2_moe'."""
    torch.manual_seed(7)
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.5, "num_experts_per_tok": 1,
        "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0,
        "experts_implementation": "eager",  # the others do not know fp64
        **options,
    }  # fmt: skip
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).double()
    sizes.update(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)).double()


def tiny_tokenizer(*, chat_template: bool = False, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of up to `vocab_size` tokens, <eos> and <pad> the first two of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for record in INSTRUCTIONS for text in record.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def token_records(count: int, *, vocab_size: int = 60, seed: int = 0) -> list[dict[str, list[int]]]:
    """Records of 6 to 14 random tokens, of which the first 1 to 4 are the prompt."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        prompt, length = rng.randint(1, 4), rng.randint(6, 14)
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        records.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return records


def write_jsonl(path: Path, records: list[Any] | None = None) -> Path:
    """A JSONL file of `records`, by default of `INSTRUCTIONS`."""
    lines = [json.dumps(record) for record in (INSTRUCTIONS if records is None else records)]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def save_pair(
    folder: Path, architecture: str = "gpt2", *, chat_template: bool = False, kv_heads: int = 1
) -> tuple[Path, Path]:
    """A student of one layer and a teacher of two, saved with one tokenizer; their folders."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    for name, layers in (("student", 1), ("teacher", 2)):
        model = tiny_model(architecture, layers=layers, vocab_size=len(tokenizer), seed=layers, kv_heads=kv_heads)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "student", folder / "teacher"
