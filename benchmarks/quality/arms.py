"""The arms: a method each, as options of `AdaKDConfig`, and the loss that records what it chose."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from adakd_kernels import AdaKDLoss, AdaKDOutput, TokenChoice, select_tokens
from adakd_kernels.integrations.transformers import METHODS, AdaKDConfig


@dataclass(frozen=True)
class Arm:
    """A method.

    Attributes:
        title: in tables.
        options: of `AdaKDConfig`.
        against: the arms that it is compared with, in tables of differences.
        temperature_of: an arm whose mean temperature of the selected tokens is this one's only temperature.
        share_of: an arm whose share, step by step, is this one's, of tokens drawn at random.
        sharpen: by what the logits of the trained student are divided.
    """

    title: str
    options: dict[str, Any]
    against: tuple[str, ...] = ()
    temperature_of: str | None = None
    share_of: str | None = None
    sharpen: float = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        """The arms that have to be trained before."""
        return tuple(name for name in (self.temperature_of, self.share_of) if name is not None)


def _on(method: str, adakd: bool = False, **options: Any) -> dict[str, Any]:
    return METHODS[method].options(adakd=adakd) | options


SHARE_ALONE = _on("rkd", adakd=True, temperature_scale=0.0)
SOONER = {"focus_beta": 0.83}
"""The loss is averaged over the last 6 steps or so, a tenth of a run of 60, and not over the last 100."""
TEMPERATURES_ALONE = _on("rkd", adakd=True, focus_ratio=1.0)

ARMS: dict[str, Arm] = {
    "reverse_kl": Arm("reverse KL", _on("rkd")),
    "latf": Arm("+ share (LATF)", SHARE_ALONE, against=("reverse_kl",)),
    "idts": Arm("+ temperatures (IDTS)", TEMPERATURES_ALONE, against=("reverse_kl",)),
    "adakd": Arm(
        "+ both (AdaKD)",
        _on("rkd", adakd=True),
        against=("reverse_kl", "one_temperature", "low_temperature", "sharpened"),
    ),
    "one_temperature": Arm(
        "share, AdaKD's mean temperature for all", SHARE_ALONE, against=("latf",), temperature_of="adakd"
    ),
    "latf_sooner": Arm("+ share that follows sooner", SHARE_ALONE | SOONER, against=("latf",)),
    "adakd_sooner": Arm("AdaKD, share follows sooner", _on("rkd", adakd=True) | SOONER, against=("adakd",)),
    "random_tokens": Arm("random tokens at LATF's share", _on("rkd"), against=("latf",), share_of="latf"),
    "idts_reversed": Arm(
        "temperatures the other way round", TEMPERATURES_ALONE | {"temperature_scale": -0.5}, against=("idts",)
    ),
    "low_temperature": Arm(
        "temperature 0.61 for all", _on("rkd", base_temperature=math.exp(-0.5)), against=("reverse_kl",)
    ),
    "sharpened": Arm(
        "reverse KL, then the student's logits over 0.93", _on("rkd"), against=("reverse_kl",), sharpen=0.93
    ),
    "forward_kl": Arm("forward KL", _on("fkd"), against=("reverse_kl",)),
    "forward_kl_adakd": Arm("forward KL + AdaKD", _on("fkd", adakd=True), against=("forward_kl",)),
    "abkd": Arm("α-β (ABKD)", _on("abkd"), against=("reverse_kl",)),
    "abkd_adakd": Arm("α-β + AdaKD", _on("abkd", adakd=True), against=("abkd",)),
}
"""By the name that results have, in the order in which they run."""


class RecordingLoss(AdaKDLoss):
    """`AdaKDLoss` that keeps the mean temperature of each step's selected tokens, and that can draw tokens at random.

    Attributes:
        shares: None, or the share of each step, of tokens that are drawn at random.
        temperatures: Σ τ over the selected tokens, and their number, of each step.
    """

    shares: list[float] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.temperatures: list[tuple[float, int]] = []

    def forward(self, *args: Any, **options: Any) -> AdaKDOutput:
        return self._keep(super().forward(*self._chosen(args, options), **options))

    def from_hidden(self, *args: Any, **options: Any) -> AdaKDOutput:
        return self._keep(super().from_hidden(*self._chosen(args, options), **options))

    def _chosen(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call; where tokens are drawn, their choice takes the place of `num_items`, the last."""
        if self.shares is None or not self._in_optimizer_step():
            return args
        *args_of_rows, labels, num_items = args
        valid = labels != self.ignore_index
        score = torch.rand(labels.shape, device=labels.device) * valid
        ratio = torch.tensor(self.shares[len(self.temperatures)], device=labels.device)
        selected = select_tokens(score, ratio, valid)
        temperature = torch.full_like(score, self.base_temperature)
        n = torch.as_tensor(num_items, device=labels.device).float()
        options["choice"] = TokenChoice(score, valid, temperature, selected, n, selected.sum().float())
        return *args_of_rows, labels

    def _keep(self, out: AdaKDOutput) -> AdaKDOutput:
        if self._in_optimizer_step():
            chosen = out.temperature[out.selected]
            self.temperatures.append((chosen.double().sum().item(), len(chosen)))
        return out


@dataclass
class ArmConfig(AdaKDConfig):
    """`AdaKDConfig` with the loss of an arm.

    Attributes:
        shares: of each step, for random tokens.
    """

    shares: list[float] | None = field(default=None)

    def make_loss(self, focus: Any, **options: Any) -> RecordingLoss:
        loss = RecordingLoss(self.make_divergence(), focus=focus, **self._loss_options(), **options)
        loss.shares = self.shares
        return loss
