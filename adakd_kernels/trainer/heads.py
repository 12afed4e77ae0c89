"""The output layers of the models: which positions and hidden states they get, and what follows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

__all__ = [
    "HeadOptions",
    "NoPlainHeadError",
    "base_model",
    "configured_head",
    "evaluation_mode",
    "head_traits",
    "hidden_states",
    "instead_of_head",
    "output_head",
    "own_positions",
    "plain_head",
    "takes_positions",
    "takes_positions_per_record",
    "virtual_tokens",
    "with_virtual_tokens",
]


class NoPlainHeadError(ValueError):
    """The model's logits are something else than its head's result, scaled and soft-capped."""


@dataclass(frozen=True)
class HeadOptions:
    """What a model does to its head's result x: cap·tanh(scale·x/cap), or scale·x without a cap."""

    scale: float = 1.0
    softcap: float | None = None


def output_head(model: Any) -> Any:
    """The module that makes logits of hidden states, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@contextmanager
def instead_of_head(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Calls of `head` go to `function`, so that the forward of its model runs but computes no logits."""
    # This changes the head, but nothing beside it, and only while its model's forward runs in this context. Ways that
    # leave the head alone cost more: a forward pre-hook that passes on no rows still has autocast copy the weight,
    # and a TorchFunctionMode puts Python before every operation of the forward. A second module around the same
    # parameters is not the one that autocast and data parallelism have wrapped. Contexts may nest on one head, and
    # each gives back what it found, after an error too.
    found = vars(head).get("forward")
    head.forward = function
    try:
        yield
    finally:
        if found is None:
            del head.forward
        else:
            head.forward = found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, without gradients; afterwards each of its modules is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def head_traits(model: Any) -> tuple[Any, ...]:
    """What a judgement of a model and its head rests on. It holds as long as this compares equal."""
    head = output_head(model)
    modules = [model] if head is None else [model, head]
    hooks = [tuple(hooks) for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    own = None if head is None else vars(head).get("forward")
    return (
        *modules,
        *map(type, modules),
        own,
        hooks,
        configured_head(getattr(model, "config", None)),
        virtual_tokens(model),
    )


def virtual_tokens(model: Any) -> tuple[int, int]:
    """How many trained tokens peft puts in front of the batch's own, and of how many of them there are hidden states.

    Those of prompt tuning go through the model. Those of prefix tuning are keys and values of its attention.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0, 0
    count = int(config.num_virtual_tokens)
    cached = str(getattr(config.peft_type, "value", config.peft_type)) in ("PREFIX_TUNING", "CARTRIDGE")
    return count, 0 if cached else count


def with_virtual_tokens(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of `model`, their positions counted from its first virtual token."""
    _, before = virtual_tokens(model)
    if not before or "logits_to_keep" not in inputs:
        return inputs
    return {**inputs, "logits_to_keep": inputs["logits_to_keep"] + before}


def own_positions(values: Tensor, count: int) -> Tensor:
    """`values` (B, K, …) without those of virtual tokens, which stand before the last `count` positions."""
    return values if values.shape[1] == count else values[:, -count:]


def hidden_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What the head of `model` gets in a forward on `inputs`: (B, K, H). The head itself does not run."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]  # the rest of the forward needs a result, which nobody reads

    with instead_of_head(output_head(model), keep):
        model(**inputs, use_cache=False, return_dict=True)
    (hidden,) = seen
    return hidden


def plain_head(model: Any, split: bool = False) -> HeadOptions:
    """What stands between the head and the logits of a model, tried out on two tokens.

    The head is replaced by one that gives known numbers, and the model's logits are compared with what its
    configuration says about them. So an unknown model is not taken for a plain one, however small its logits are.

    Args:
        model: a causal language model.
        split: its head is split by tensor parallelism, which gives it a forward of its own.

    Raises:
        NoPlainHeadError: the head is no plain `nn.Linear`, or the logits are not the head's result, scaled by
            `logit_scale` or `logits_scaling` and capped by `final_logit_softcapping` of the configuration.
    """
    head = output_head(model)
    if type(head) is not nn.Linear or ("forward" in vars(head) and not split):
        raise NoPlainHeadError(f"its head is no plain nn.Linear but {type(head).__name__}, perhaps wrapped")
    options, length = configured_head(model.config), 2 + virtual_tokens(model)[1]
    # Numbers as large as logits get, so that a soft-cap shows.
    probe = torch.linspace(-60.0, 60.0, length * head.out_features, dtype=head.weight.dtype, device=head.weight.device)
    probe = probe.view(head.out_features, length).T.unsqueeze(0)  # (1, L, V)
    seen: list[Tensor] = []

    def give(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return probe.clone()  # a model may write over its logits

    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        with evaluation_mode(model), instead_of_head(head, give):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**inputs, use_cache=False, return_dict=True).logits
    except Exception as error:
        raise NoPlainHeadError(f"it cannot be tried out on two tokens: {type(error).__name__}: {error}") from error
    if len(seen) != 1 or seen[0].shape != (1, length, head.in_features):
        raise NoPlainHeadError("its head is not called once, on the hidden states of all positions")
    expected = probe.double() * options.scale
    if options.softcap is not None:
        expected = options.softcap * torch.tanh(expected / options.softcap)
    tolerance = 8 * torch.finfo(probe.dtype).eps * expected.abs().max()
    if logits.shape != probe.shape or not (logits.double() - expected).abs().max() <= tolerance:
        raise NoPlainHeadError(f"its logits are not its head's result with {options}")
    return options


def configured_head(config: Any) -> HeadOptions:
    """What a configuration says of the head, under the names of transformers' models.

    Cohere, Falcon-H1 and Muse Glimmer multiply, Granite and MiniCPM3 divide, HyperCLOVA X multiplies under the same
    name, Gemma caps.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((factor for factor in factors if factor), None)
    if scale is None and getattr(config, "logits_scaling", None):
        divides = getattr(config, "model_type", None) != "hyperclovax"
        scale = 1.0 / config.logits_scaling if divides else config.logits_scaling
    return HeadOptions(
        scale=1.0 if scale is None else float(scale), softcap=getattr(config, "final_logit_softcapping", None)
    )


def takes_positions(keep: Tensor, *models: Any) -> bool:
    """Whether all models take `logits_to_keep` in the form of `keep`, (K,) or (B, K)."""
    named = all("logits_to_keep" in inspect.signature(base_model(model).forward).parameters for model in models)
    return named and (keep.dim() == 1 or takes_positions_per_record(*models))


def takes_positions_per_record(*models: Any) -> bool:
    """Whether `logits_to_keep` may be (B, K): in transformers' own models, where it has the function for it."""
    native = all(type(base_model(model)).__module__.startswith("transformers.models.") for model in models)
    return native and hasattr(modeling_utils, "slice_logits_to_keep")


def base_model(model: Any) -> Any:
    """The model, or the one that an adapter of peft wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
