"""The output layers of the models: which positions and hidden states they get, and what follows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import is_available
from transformers import modeling_utils

FSDPModule: Any = None
if is_available():
    from torch.distributed.fsdp import FSDPModule

__all__ = [
    "HeadOptions",
    "NoPlainHeadError",
    "base_model",
    "carry",
    "configured_head",
    "evaluation_mode",
    "head_traits",
    "hidden_states",
    "input_device",
    "instead_of_head",
    "is_fully_sharded",
    "output_head",
    "own_class",
    "own_positions",
    "plain_head",
    "takes_positions",
    "takes_positions_per_record",
    "through_output",
    "untried_head",
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
    # Accelerate's hooks, which bring a weight to its device, are a `forward` that calls `_old_forward`.
    name = "_old_forward" if _is_hooked(head) else "forward"
    found = vars(head).get(name)
    setattr(head, name, function)
    try:
        yield
    finally:
        if found is None:
            delattr(head, name)
        else:
            setattr(head, name, found)


def _is_hooked(module: nn.Module) -> bool:
    """Whether accelerate moves the weights of a module for each of its calls, or its inputs."""
    return "_hf_hook" in vars(module) and "_old_forward" in vars(module)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` (FSDP2) has been called on the module."""
    return FSDPModule is not None and isinstance(module, FSDPModule)


def own_class(module: nn.Module) -> type:
    """The class of a module, without the one that `fully_shard` puts in front of it."""
    return type(module).__mro__[2] if is_fully_sharded(module) else type(module)


def input_device(model: Any) -> torch.device:
    """The device on which a model takes its inputs."""
    parameters = base_model(model).parameters()
    device = next((parameter.device for parameter in parameters if not parameter.is_meta), None)
    if device is None:  # streamed: accelerate's hooks know where to
        hooks = (getattr(module, "_hf_hook", None) for module in base_model(model).modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        device = next((torch.device(place) for place in places if place is not None), None)
    return torch.device("cpu") if device is None else device


def carry(loss: Tensor, hidden: Tensor) -> Tensor:
    """(B, K, 1) zeros that stand for the logits of `hidden` (B, K, H); their backward goes on to the loss.

    What wraps a model acts on what its forward returns: data parallelism looks for parameters that this does not
    reach, and FSDP2 and ZeRO-3 put weights together when a gradient comes to it. So the loss is carried through the
    rest of the forward, but not its value, as models scale and cap their logits.
    """
    return _Carry.apply(loss, (*hidden.shape[:-1], 1), hidden.dtype)  # type: ignore[no-untyped-call, no-any-return]


def through_output(loss: Tensor, logits: Tensor) -> Tensor:
    """The loss, whose backward begins at `logits`, what the forward returned in which `carry` was called."""
    return _ThroughOutput.apply(loss, logits)  # type: ignore[no-untyped-call, no-any-return]


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(torch.zeros_like(loss))
        return torch.zeros(shape, dtype=dtype, device=loss.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0], None, None


class _ThroughOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits.new_zeros(()))
        ctx.shape = logits.shape
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor]:
        (zero,) = ctx.saved_tensors
        return grad_loss, zero.expand(ctx.shape)


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


def plain_head(model: Any) -> HeadOptions:
    """What stands between the head and the logits of a model, tried out on two tokens.

    The head is replaced by one that gives known numbers, and the model's logits are compared with what its
    configuration says about them. So an unknown model is not taken for a plain one, however small its logits are.

    Raises:
        NoPlainHeadError: the head is no plain `nn.Linear`, or the logits are not the head's result, scaled by
            `logit_scale` or `logits_scaling` and capped by `final_logit_softcapping` of the configuration.
    """
    head = output_head(model)
    _check_linear(head)
    options, length = configured_head(model.config), 2 + virtual_tokens(model)[1]
    seen: list[tuple[torch.Size, Tensor]] = []

    def give(hidden: Tensor) -> Tensor:
        # Numbers as large as logits get, so that a soft-cap shows.
        probe = torch.linspace(-60.0, 60.0, length * head.out_features, dtype=hidden.dtype, device=hidden.device)
        probe = probe.view(head.out_features, length).T.unsqueeze(0)  # (1, L, V)
        seen.append((hidden.shape, probe))
        return probe.clone()  # a model may write over its logits

    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
        with evaluation_mode(model), instead_of_head(head, give):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**inputs, use_cache=False, return_dict=True).logits
    except Exception as error:
        raise NoPlainHeadError(f"it cannot be tried out on two tokens: {type(error).__name__}: {error}") from error
    if [shape for shape, _ in seen] != [(1, length, head.in_features)]:
        raise NoPlainHeadError("its head is not called once, on the hidden states of all positions")
    ((_, probe),) = seen
    expected = probe.to(logits.device).double() * options.scale
    if options.softcap is not None:
        expected = options.softcap * torch.tanh(expected / options.softcap)
    tolerance = 8 * torch.finfo(probe.dtype).eps * expected.abs().max()
    if logits.shape != probe.shape or not (logits.double() - expected).abs().max() <= tolerance:
        raise NoPlainHeadError(f"its logits are not its head's result with {options}")
    return options


def untried_head(model: Any) -> HeadOptions:
    """What the configuration says that stands between the head and the logits of a model that cannot be tried out now.

    Raises:
        NoPlainHeadError: the head is no plain `nn.Linear`.
    """
    _check_linear(output_head(model))
    return configured_head(model.config)


def _check_linear(head: Any) -> None:
    changed = head is not None and "forward" in vars(head) and not _is_hooked(head)
    if head is None or own_class(head) is not nn.Linear or changed:
        raise NoPlainHeadError(f"its head is no plain nn.Linear but {type(head).__name__}, perhaps wrapped")


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
    native = all(own_class(base_model(model)).__module__.startswith("transformers.models.") for model in models)
    return native and hasattr(modeling_utils, "slice_logits_to_keep")


def base_model(model: Any) -> Any:
    """The model, or the one that an adapter of peft wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
