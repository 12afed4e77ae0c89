"""The methods of distillation by name: what each sets, and where that is published. docs/methods.md shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["METHODS", "WITHOUT_ADAKD", "Method", "Setting"]

CODE = "AdaKD's code"
TRL = "TRL 1.16"
OURS = "ours"
"""A value that is not published."""

WITHOUT_ADAKD: dict[str, Any] = {"focus_ratio": 1.0, "temperature_scale": 0.0}
"""Every valid token is selected, at the base temperature."""


class Setting(NamedTuple):
    """The value of an option, and where it is published."""

    value: Any
    source: str


@dataclass(frozen=True)
class Method:
    """A method that AdaKD is put on.

    Attributes:
        title: what it does, in a line.
        on_policy: whether the student samples completions, so that it runs on TRL's trainer.
        settings: its own options.
        temperature_scale: c of equation (6) with AdaKD on.
    """

    title: str
    on_policy: bool
    settings: dict[str, Setting]
    temperature_scale: Setting

    def options(self, adakd: bool = False) -> dict[str, Any]:
        """What the method sets, with AdaKD or without, as options of `AdaKDConfig` or `AdaKDDistillationConfig`."""
        own = {name: setting.value for name, setting in self.settings.items()}
        return own | ({"temperature_scale": self.temperature_scale.value} if adakd else WITHOUT_ADAKD)


METHODS: dict[str, Method] = {
    "fkd": Method(
        "forward KL on the data",
        on_policy=False,
        settings={"divergence": Setting("forward_kl", f"{CODE}, baseline/fkd.sh")},
        temperature_scale=Setting(0.5, f"{CODE}, AdaKD/AdaKD.sh"),
    ),
    "rkd": Method(
        "reverse KL on the data",
        on_policy=False,
        settings={"divergence": Setting("reverse_kl", f"{CODE}, baseline/rkd.sh")},
        temperature_scale=Setting(0.5, f"{CODE}, AdaKD/AdaKD.sh"),
    ),
    "abkd": Method(
        "α-β divergence on the data",
        on_policy=False,
        settings={
            "divergence": Setting("alpha_beta", f"{CODE}, baseline/abkd.sh"),
            "divergence_kwargs": Setting({"alpha": 0.2, "beta": 0.7}, f"{CODE}, distillation.py"),
        },
        temperature_scale=Setting(0.5, f"{CODE}, AdaKD/AdaKD.sh"),
    ),
    "gkd": Method(
        "Jensen–Shannon on the data and on the student's completions",
        on_policy=True,
        settings={
            "beta": Setting(0.1, f"{CODE}, loss/losses.py"),
            "lmbda": Setting(0.5, f"{CODE}, baseline/gkd.sh"),
        },
        temperature_scale=Setting(0.3, f"{CODE}, AdaKD/AdaKD_gkd.sh"),
    ),
    "distillm": Method(
        "skewed reverse KL on the data and, as the student stops improving on it, on completions old and new",
        on_policy=True,
        settings={
            "divergence": Setting("skew_reverse_kl", f"{CODE}, baseline/distillm.sh"),
            "divergence_kwargs": Setting({"alpha": 0.1}, f"{CODE}, arguments.py"),
            "lmbda": Setting(0.0, f"{CODE}, baseline/distillm.sh"),
            "adaptive_lmbda": Setting(True, f"{CODE}, baseline/distillm.sh"),
            "replay_capacity": Setting(1000, f"{CODE}, baseline/distillm.sh"),
            "eval_strategy": Setting("epoch", f"{CODE}, baseline/distillm.sh"),
        },
        temperature_scale=Setting(0.3, f"{CODE}, AdaKD/AdaKD_distillm.sh"),
    ),
    "on_policy": Method(
        "reverse KL on the student's completions",
        on_policy=True,
        settings={
            "beta": Setting(1.0, f"{TRL}, DistillationConfig"),
            "lmbda": Setting(1.0, f"{TRL}, DistillationTrainer"),
        },
        temperature_scale=Setting(0.5, OURS),
    ),
}
"""By the name that `adakd train --method` takes."""
