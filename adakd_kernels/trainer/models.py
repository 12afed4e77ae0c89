"""What the trainer asks of student and teacher: which models it takes, and what these take of a batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from .heads import base_model, evaluation_mode, input_device, output_head, own_class, virtual_tokens

__all__ = [
    "ALWAYS_KEPT",
    "auxiliary_loss",
    "check_causal",
    "check_inputs",
    "check_special_tokens",
    "class_name",
    "position_limit",
    "vocabulary_size",
]

ALWAYS_KEPT = {"attention_mask", "position_ids"}
"""Fields of a record on which the loss depends, so that they are refused, not removed, where a model lacks them."""
PADDING_FREE = {*FlashAttentionKwargs.__annotations__, "seq_idx"}
"""Inputs of transformers' own models that their forward does not name but hands to the attention."""


def check_causal(role: str, model: nn.Module, try_out: bool = True) -> None:
    """Refuse a model whose logits do not predict each next token from the ones before.

    Two runs on two tokens show it. Without `try_out`, for a model that cannot run now, its configuration is asked.

    Raises:
        ValueError: an encoder–decoder, a model without logits of its vocabulary, or one that looks ahead.
    """
    name, cure = (
        f"{role} {class_name(model)}",
        "load a causal language model with AutoModelForCausalLM",
    )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder–decoder, whose logits are not those of its input's next tokens: {cure}")
    device, outputs = input_device(model), list[Any]()
    if not try_out:
        return
    try:
        for last in (1, 2):
            ids = torch.tensor([[0, last]], device=device)
            with evaluation_mode(model):
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                outputs.append(model(**inputs, use_cache=False, return_dict=True))
    except Exception:
        return  # it takes something else than tokens; the first batch will show
    first, second = (getattr(out, "logits", None) for out in outputs)
    shape = (1, 2 + virtual_tokens(model)[1])
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.shape[:-1] != shape:
        raise ValueError(f"{name} has no output layer that gives logits for each token: {cure}")
    vocabulary = getattr(_text_config(model), "vocab_size", None)
    if isinstance(base_model(model), PreTrainedModel) and output_head(model) is None and first.shape[-1] != vocabulary:
        raise ValueError(f"{name} gives {first.shape[-1]} logits for each token, none of its vocabulary: {cure}")
    # What stands before the last token must not depend on it; rounding may, where experts share a matrix product.
    change = (first[:, :-1].double() - second[:, :-1].double()).abs().max()
    if change > 4 * torch.finfo(first.dtype).eps * first.abs().max():
        raise ValueError(
            f"{name} is bidirectional: its logits of a token change with the token after it, which they predict: "
            f"{cure}, or set is_decoder=True in its configuration"
        )


def class_name(model: Any) -> str:
    """What messages call a model."""
    return own_class(base_model(model)).__name__


def check_inputs(role: str, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuse a batch of which a model would leave something unread.

    Raises:
        ValueError: an input that the model does not take, or borders of packed records that it does not see.
    """
    name = f"{role} {class_name(model)}"
    unread = [key for key in inputs if key not in _read(model)] if _read(model) else []
    if unread:
        removable = role == "student" and unread[0] not in ALWAYS_KEPT
        raise ValueError(
            f"{unread[0]!r} of the batch is not read by the {name}: leave this field out of the records"
            + (", or set remove_unused_columns=True" if removable else "")
        )
    if "position_ids" not in inputs:
        return
    if virtual_tokens(model)[0]:
        raise ValueError(
            f"'position_ids' of the batch do not go with the virtual tokens of the {name}: leave them out of the "
            "records"
        )
    attention = str(getattr(_text_config(model), "_attn_implementation", ""))
    if "flash" in attention and "attention_mask" not in inputs and len(inputs["position_ids"]) > 1:
        raise ValueError(
            f"with {attention} the {name} sees the borders of packed records in a batch of one row only: set "
            "per_device_train_batch_size and per_device_eval_batch_size to 1, or use DataCollatorWithFlattening"
        )


def _read(model: Any) -> set[str]:
    """Names of the inputs that a model reads; nothing where its forward does not say."""
    names: set[str] = set()
    for module in {id(m): m for m in (model, base_model(model))}.values():
        parameters = inspect.signature(module.forward).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if own_class(module).__module__.startswith("transformers.models.") and any(
            p.kind == p.VAR_KEYWORD for p in parameters
        ):
            names |= PADDING_FREE
    return names if "input_ids" in names else set()


def auxiliary_loss(model: Any, outputs: Any) -> Tensor | None:
    """What a mixture-of-experts model adds to its own loss to balance the experts, or None.

    Transformers computes it where `output_router_logits` of the configuration asks for it.
    """
    loss = getattr(outputs, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    for owner in (base_model(model), _text_config(model)):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            coefficient = getattr(owner, name, None)
            if coefficient is not None:
                return float(coefficient) * loss
    raise ValueError(
        f"{class_name(model)} returns an auxiliary loss, but names no router_aux_loss_coef: set it in "
        "the configuration, or set output_router_logits=False"
    )


def check_special_tokens(student: Any, teacher: Any, tokenizer: Any) -> list[str]:
    """What the user should know about the special ids of both models.

    Raises:
        ValueError: a special token of the tokenizer is beyond the vocabulary of one of the models.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    for role, model in (("student", student), ("teacher", teacher)):
        size = vocabulary_size(model)
        for name in ("bos", "eos", "pad"):
            index = getattr(tokenizer, f"{name}_token_id", None)
            if isinstance(index, int) and size is not None and index >= size:
                raise ValueError(
                    f"the {name}_token {getattr(tokenizer, f'{name}_token', None)!r} of processing_class is {index}, "
                    f"which is none of the {size} ids of the {role}: choose another token, or give this model more "
                    "rows with resize_token_embeddings"
                )
    texts = []
    for name, reason in (("bos", "begin"), ("eos", "end")):
        own, other = (_special_ids(model, f"{name}_token_id") for model in (student, teacher))
        if own and other and own.isdisjoint(other):
            texts.append(
                f"{name}_token_id is {_listed(own)} for the student and {_listed(other)} for the teacher: the teacher "
                f"saw texts {reason} in another way than the student's records"
            )
    return texts


def _special_ids(model: Any, name: str) -> set[int]:
    """What the configurations of a model name as one of its special tokens: one id, several, or none."""
    ids: set[int] = set()
    for config in (_text_config(model), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        ids |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return ids


def _listed(ids: set[int]) -> str:
    return " or ".join(map(str, sorted(ids)))


def vocabulary_size(model: Any) -> int | None:
    """How many ids a model takes: the rows of its input embedding."""
    config = getattr(_text_config(model), "vocab_size", None)
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return config
    rows = getattr(embedding, "num_embeddings", None) or len(getattr(embedding, "weight", ()))
    return rows or config  # a weight that is split over processes may be empty here


def position_limit(model: Any) -> int | None:
    """How many tokens a model takes; None where its configuration sets no limit, or scales positions beyond it."""
    config = _text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind for part in (rope, *rope.values()) if isinstance(part, dict) for kind in [part.get("rope_type")]}
    if not isinstance(limit, int) or limit <= 0 or kinds - {None, "default"} or getattr(config, "alibi", False):
        return None
    return limit - virtual_tokens(model)[0]


def _text_config(model: Any) -> Any:
    """The configuration of a model's text part."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
