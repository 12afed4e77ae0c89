"""Who computes a loss and its gradients: formulas that users write, peers that are installed, and this package.

A provider takes the inputs and returns the loss and the gradients that the workload wants. `needs` says why it cannot
run here. A formula of your own is a function of student, teacher and labels that returns a loss:
`python -m benchmarks --formula mine.py:my_loss`.
"""

from __future__ import annotations

import ast
import importlib.util
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adakd_kernels import adakd_loss, linear_adakd_loss, reference, token_divergence
from instruments.devices import ROOT, produced

from .workloads import DTYPES, Inputs, Workload

Run = Callable[[Inputs, Workload], tuple[Tensor, ...]]
Loss = Callable[[Inputs, Workload], Tensor]
RowGradient = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits of student and teacher (n, V), temperature and weight (n, 1) -> the weighted sum, its gradient."""


@dataclass(frozen=True)
class Provider:
    run: Run
    package: str | None = None  # that has to be installed
    gpu_only: bool = False

    def needs(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not installed: pip install --no-deps {self.package.replace('_', '-')}"
        return "its Triton kernels need a GPU" if self.gpu_only and device != "cuda" else None


def by_autograd(loss: Loss) -> Run:
    """An input that requires grad is an operator's result, as a model's are: its gradient may take its place."""

    def run(x: Inputs, w: Workload) -> tuple[Tensor, ...]:
        leaves = {name: x[name].detach().requires_grad_() for name in w.wanted}
        value = loss({**x, **{name: produced(leaf) for name, leaf in leaves.items()}}, w)
        return value.detach(), *torch.autograd.grad(value, list(leaves.values()))

    return run


def after_the_head(run: Run, dtype: torch.dtype | None = None) -> Run:
    """From hidden states: the logits, what `run` makes of them, and the two products of its gradient."""

    def from_hidden(x: Inputs, w: Workload) -> tuple[Tensor, ...]:
        x = {name: value.to(dtype) if dtype and name != "labels" else value for name, value in x.items()}
        logits = {
            "student": F.linear(x["hidden"], x["head"]),
            "teacher": F.linear(x["teacher_hidden"], x["teacher_head"]),
            "labels": x["labels"],
        }
        loss, dz = run(logits, w.but(route="logits"))
        return loss, dz @ x["head"], dz.T @ x["hidden"]

    return from_hidden


@cache
def readme_formula() -> Callable[..., Tensor]:
    """`eager_adakd`, from where users read it."""
    for block in (ROOT / "README.md").read_text().split("```python\n")[1:]:
        tree = ast.parse(block.split("\n```")[0])
        tree.body = [
            node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))
        ]  # without what it is tried on
        if any(isinstance(node, ast.FunctionDef) and node.name == "eager_adakd" for node in tree.body):
            names: dict[str, Any] = {}
            exec(compile(tree, "README.md", "exec"), names)
            function: Callable[..., Tensor] = names["eager_adakd"]
            return function
    raise LookupError("README.md no longer has a function eager_adakd, the formula that users write")


def formula(place: str) -> Run:
    """The function `FILE.py:NAME` of student, teacher and labels."""
    path, _, name = place.rpartition(":")
    try:
        function = runpy.run_path(path)[name]
    except (OSError, KeyError) as error:
        raise SystemExit(f"error: --formula takes FILE.py:FUNCTION, and {place!r} names none: {error}") from error
    return by_autograd(lambda x, w: function(x["student"], x["teacher"], x["labels"]))


def log_masses(s: Tensor, t: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    return (s.float() / tau).log_softmax(-1), (t.float() / tau).log_softmax(-1)


def summand(log_q: Tensor, log_p: Tensor, divergence: str) -> Tensor:
    if divergence == "reverse_kl":
        return log_q.exp() * (log_q - log_p)
    if divergence == "forward_kl":
        return log_p.exp() * (log_p - log_q)
    p, q = log_p.exp(), log_q.exp()
    log_m = (0.5 * (p + q)).log()
    return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m))


def eager_mean(x: Inputs, w: Workload) -> Tensor:
    return summand(*log_masses(x["student"], x["teacher"], 1.0), w.divergence).sum(-1).mean()


def difficulty_of_rows(s: Tensor, t: Tensor) -> Tensor:
    p, q = t.float().softmax(-1), s.float().softmax(-1)
    return 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)


def gradient_by_autograd(divergence: str) -> RowGradient:
    def of_rows(s: Tensor, t: Tensor, tau: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        leaf = s.detach().requires_grad_()
        loss = (weight * summand(*log_masses(leaf, t, tau), divergence).sum(-1, keepdim=True)).sum()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return of_rows


def gradient_written_out(divergence: str) -> RowGradient:
    """Equation (10) of docs/maths.md, as one who compiles it would write it: without autograd and without −inf."""

    def of_rows(s: Tensor, t: Tensor, tau: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        log_q, log_p = log_masses(s, t, tau)
        q = log_q.exp()
        if divergence == "reverse_kl":
            g = q * (log_q - log_p)
        elif divergence == "forward_kl":
            g = -log_p.exp()
        else:
            g = 0.5 * q * (log_q - (0.5 * (log_p.exp() + q)).log())
        loss = (weight * summand(log_q, log_p, divergence).sum(-1, keepdim=True)).sum()
        return loss, (weight / tau * (g - q * g.sum(-1, keepdim=True))).to(s.dtype)

    return of_rows


@cache  # one compilation for all workloads
def compiled_gradient(divergence: str) -> RowGradient:
    return torch.compile(gradient_written_out(divergence), dynamic=True)


@cache
def _compiled_difficulty() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(difficulty_of_rows, dynamic=True)


def compiled_difficulty(s: Tensor, t: Tensor) -> Tensor:
    """Compiled at its first call: `torch.compile` itself takes seconds to import what it needs."""
    return _compiled_difficulty()(s, t)


def exact_gradient(divergence: str) -> RowGradient:
    """The package's reference in fp64."""

    def of_rows(s: Tensor, t: Tensor, tau: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        leaf = s.double().requires_grad_()
        per_token = reference.token_divergence(leaf, t.double(), tau.squeeze(-1), divergence)
        loss = (weight.squeeze(-1) * per_token).sum()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    return of_rows


def exact_difficulty(s: Tensor, t: Tensor) -> Tensor:
    return reference.squared_hellinger(s.double(), t.double())


def in_chunks(
    difficulty: Callable[[Tensor, Tensor], Tensor], gradient: Callable[[str], RowGradient],
    rows: int, dtype: torch.dtype | None = None,
) -> Run:  # fmt: skip
    """The formula over `rows` rows at a time, which stay in the cache of a CPU; the gradient in `dtype`."""

    def run(x: Inputs, w: Workload) -> tuple[Tensor, ...]:
        student, teacher, of_rows = x["student"], x["teacher"], gradient(w.divergence)
        parts: list[Any] = [slice(i, i + rows) for i in range(0, w.tokens, rows)]
        out = torch.zeros_like(student, dtype=dtype)
        if w.loss == "adakd":
            hard = torch.cat([difficulty(student[part], teacher[part]) for part in parts])
            chosen = hard.topk(w.selected).indices
            median = hard[chosen].median()
            tau = torch.exp(-0.5 * (hard[chosen] - median) / (hard[chosen] + median)).unsqueeze(-1)
            parts = list(chosen.split(rows))
        else:
            tau = torch.ones(w.tokens, 1, device=student.device, dtype=dtype or torch.float32)
        loss = torch.zeros((), device=student.device, dtype=tau.dtype)
        for part, its_tau in zip(parts, tau.split(rows), strict=True):
            value, out[part] = of_rows(student[part], teacher[part], its_tau, its_tau**2 / w.selected)
            loss += value
        return loss, out

    return run


def exact(device: str) -> Run:
    """Loss and gradients in fp64, with 4 fp64 copies of the logits at most on the hidden route and 1 from logits."""
    run = in_chunks(exact_difficulty, exact_gradient, rows_at_once(device), torch.float64)
    return lambda x, w: (run if w.route == "logits" else after_the_head(run, torch.float64))(x, w)


def rows_at_once(device: str) -> int:
    return 8 if device == "cpu" else 256


def ours(x: Inputs, w: Workload, inplace: bool) -> Tensor:
    if w.loss == "mean":
        return token_divergence(x["student"], x["teacher"], 1.0, w.divergence, inplace=inplace).mean()
    return adakd_loss(
        x["student"], x["teacher"], x["labels"], divergence=w.divergence, focus_ratio=w.share, inplace=inplace
    ).loss


def ours_hidden(x: Inputs, w: Workload, keep: float = 0.0) -> Tensor:
    """`keep`: the share of the selected tokens whose logits of both models are kept between the phases."""
    whole = w.loss == "adakd"
    return linear_adakd_loss(
        x["hidden"], x["head"], x["teacher_hidden"], x["teacher_head"], x["labels"], divergence=w.divergence,
        focus_ratio=w.share if whole else 1.0, temperature_scale=0.5 if whole else 0.0,
        keep_bytes=int(keep * w.selected) * 2 * w.vocab * DTYPES[w.dtype].itemsize,
    ).loss  # fmt: skip


BETA = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}
"""The divergences as Liger and TRL name them."""


def liger_logits(x: Inputs, w: Workload) -> Tensor:
    """It takes log-probabilities, which a user makes first; in 16 bits they would be too coarse."""
    from liger_kernel.transformers import LigerJSD

    log_q, log_p = (F.log_softmax(z, dim=-1, dtype=torch.float32) for z in (x["student"], x["teacher"]))
    return LigerJSD(beta=BETA[w.divergence])(log_q, log_p)


def liger_fused(x: Inputs, w: Workload) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETA[w.divergence])
    return loss(x["hidden"], x["head"], x["teacher_hidden"], x["teacher_head"], x["labels"])


def liger_chunked(x: Inputs, w: Workload) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[w.divergence])
    return loss(x["hidden"], x["head"], x["teacher_hidden"], x["teacher_head"], x["labels"])


def trl(x: Inputs, w: Workload) -> Tensor:
    """Its Triton kernels on a GPU, plain torch elsewhere; it gives the student's entropy too."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(
        x["hidden"], x["head"], None, x["teacher_hidden"], x["teacher_head"], None, BETA[w.divergence]
    )
    return per_token.mean()


def orda(x: Inputs, w: Workload) -> Tensor:
    """Its Triton kernels on a GPU; elsewhere its torch backend, which is its reference."""
    from orda_kernel import SeparateTeacher, distillation_loss

    return distillation_loss(
        x["hidden"], x["head"], x["labels"], SeparateTeacher(x["teacher_hidden"], x["teacher_head"]),
        student_ce_weight=0.0, teacher_ce_weight=0.0, kl_weight=1.0, kl_divergence=w.divergence.removesuffix("_kl"),
        backend="triton" if x["hidden"].is_cuda else "torch",
    ).loss  # fmt: skip


def providers(w: Workload, device: str, formulas: tuple[str, ...] = ()) -> dict[str, Provider]:
    """Those that compute this workload, by name."""
    rows = rows_at_once(device)
    if w.loss == "mean":
        eager = by_autograd(eager_mean)
    elif w.divergence == "reverse_kl":
        readme = readme_formula()
        eager = by_autograd(lambda x, w: readme(x["student"], x["teacher"], x["labels"], ratio=w.share))
    else:
        eager = in_chunks(difficulty_of_rows, gradient_by_autograd, w.tokens)
    found = {
        "eager": Provider(eager),
        "eager in chunks": Provider(in_chunks(difficulty_of_rows, gradient_by_autograd, rows)),
        "torch.compile in chunks": Provider(in_chunks(compiled_difficulty, compiled_gradient, rows)),
        **{place: Provider(formula(place)) for place in formulas},
        "ours": Provider(by_autograd(partial(ours, inplace=False))),
        "ours in place": Provider(by_autograd(partial(ours, inplace=True))),
    }
    if w.route == "logits":
        if w.loss == "mean":
            found["liger-kernel"] = Provider(by_autograd(liger_logits), "liger_kernel", gpu_only=True)
        return found
    found = {name: Provider(after_the_head(provider.run)) for name, provider in found.items() if name != "ours"}
    if w.loss == "mean":
        found["liger-kernel fused"] = Provider(by_autograd(liger_fused), "liger_kernel", gpu_only=True)
        found["liger-kernel chunked"] = Provider(by_autograd(liger_chunked), "liger_kernel")
        found["trl"] = Provider(by_autograd(trl), "trl")
        if w.divergence != "jensen_shannon":
            found["orda-kernel"] = Provider(by_autograd(orda), "orda_kernel")
    else:
        found["ours hidden, half kept"] = Provider(by_autograd(partial(ours_hidden, keep=0.5)))
    return {**found, "ours hidden": Provider(by_autograd(ours_hidden))}
