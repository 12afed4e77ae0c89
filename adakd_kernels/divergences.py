"""The divergences a student can be trained with: their names, parameters and checks (docs/maths.md, section 3).

An instance is immutable and holds no tensor. The formulas are in `reference.py` and in the kernels, which know a
divergence by its `name` and receive its parameters as `alpha` and `beta`; a parameter that it does not have is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

__all__ = [
    "DIVERGENCES",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "Hellinger",
    "Jeffreys",
    "JensenShannon",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "get_divergence",
]


def _check_number(owner: str, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")


def _check_open_unit(owner: str, name: str, value: float, cure: str) -> None:
    _check_number(owner, name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{owner}: {name} must lie strictly between 0 and 1, got {value!r}; {cure}")


@dataclass(frozen=True)
class Divergence:
    """Base of all divergences D(p, q) between a teacher distribution p and a student distribution q.

    Attributes:
        name: what users pass as `divergence`, and what the kernels select their formulas by.
        sweeps: how often the forward reads a row: 2 if the summand is not linear in the unnormalised masses.
    """

    name: ClassVar[str] = ""
    sweeps: ClassVar[int] = 1

    @property
    def parameters(self) -> tuple[float, float]:
        """(alpha, beta) as the kernels take them; 0 for a parameter that the divergence does not have."""
        return float(getattr(self, "alpha", 0.0)), float(getattr(self, "beta", 0.0))


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ p (log p − log q)."""

    name: ClassVar[str] = "forward_kl"


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q‖p) = Σ q (log q − log p)."""

    name: ClassVar[str] = "reverse_kl"


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """KL(p‖q) + KL(q‖p)."""

    name: ClassVar[str] = "jeffreys"


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q: the generalised form of GKD. 0 < β < 1."""

    name: ClassVar[str] = "jensen_shannon"
    sweeps: ClassVar[int] = 2
    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_open_unit("JensenShannon", "beta", self.beta, "beta -> 0 is 'forward_kl', beta -> 1 is 'reverse_kl'")


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p‖αp + (1−α)q), as in DistiLLM. 0 < α < 1."""

    name: ClassVar[str] = "skew_forward_kl"
    sweeps: ClassVar[int] = 2
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_open_unit("SkewForwardKL", "alpha", self.alpha, "alpha = 0 is 'forward_kl'")


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q‖αq + (1−α)p), as in DistiLLM. 0 < α < 1."""

    name: ClassVar[str] = "skew_reverse_kl"
    sweeps: ClassVar[int] = 2
    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_open_unit("SkewReverseKL", "alpha", self.alpha, "alpha = 0 is 'reverse_kl'")


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ|p − q|."""

    name: ClassVar[str] = "total_variation"
    sweeps: ClassVar[int] = 2


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """−1/(αβ) Σ[pᵅqᵝ − α/(α+β) pᵅ⁺ᵝ − β/(α+β) qᵅ⁺ᵝ], as in ABKD. α > 0, β > 0."""

    name: ClassVar[str] = "alpha_beta"
    sweeps: ClassVar[int] = 2
    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            _check_number("AlphaBeta", name, value)
            if not 0.0 < value < float("inf"):
                raise ValueError(
                    f"AlphaBeta: {name} must be positive and finite, got {value!r}; "
                    "alpha -> 0 at beta = 1 is 'reverse_kl', beta -> 0 at alpha = 1 is 'forward_kl'"
                )


@dataclass(frozen=True)
class Hellinger(Divergence):
    """Squared Hellinger distance, 1 − Σ√(pq)."""

    name: ClassVar[str] = "hellinger"


DIVERGENCES: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        ForwardKL,
        ReverseKL,
        Jeffreys,
        JensenShannon,
        SkewForwardKL,
        SkewReverseKL,
        TotalVariation,
        AlphaBeta,
        Hellinger,
    )
}


def get_divergence(divergence: str | Divergence) -> Divergence:
    """An instance as it is, or the divergence of this name with its default parameters.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor an instance, or an instance of a class that is not in `DIVERGENCES`, such as
            `Divergence` itself.
    """
    if isinstance(divergence, Divergence):
        if DIVERGENCES.get(divergence.name) is not type(divergence):
            raise TypeError(
                f"divergence must be an instance of a class in DIVERGENCES ({', '.join(DIVERGENCES)}): there are no "
                f"kernels for others; got {type(divergence).__name__}()"
            )
        return divergence
    if isinstance(divergence, str):
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
        return DIVERGENCES[divergence]()
    raise TypeError(
        f"divergence must be a name or an instance such as JensenShannon(beta=0.1), got {type(divergence).__name__}"
    )


def with_parameters(name: str, alpha: float, beta: float) -> Divergence:
    """The instance that the name and the parameters of an operator stand for."""
    cls = DIVERGENCES[name]
    given = {"alpha": alpha, "beta": beta}
    return cls(**{field.name: given[field.name] for field in fields(cls)})
