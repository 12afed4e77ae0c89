"""Inputs and the tolerance rules that the tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakd_kernels import reference, token_divergence
from adakd_kernels.divergences import DIVERGENCES as REGISTRY
from adakd_kernels.divergences import Divergence, JensenShannon

# From the registry, so that every tier tests a new divergence without a change here.
ONE_OF_EACH: list[Divergence] = [cls() for cls in REGISTRY.values()]
TWO_SWEEPS = [divergence for divergence in ONE_OF_EACH if divergence.sweeps == 2]
DIVERGENCES: list[Divergence] = [*ONE_OF_EACH, JensenShannon(beta=0.1)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
VOCABULARIES = [7, 1003, 4097, 50257]


def name_of(value: object) -> str:
    """A readable test id."""
    if isinstance(value, Divergence):
        return repr(value).replace(" ", "")
    return str(value).replace("torch.", "")


def logits(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0, grad: bool = False
) -> Tensor:
    """Random logits, the same numbers in every type and on every device."""
    numbers = torch.randn(*shape, generator=_generator(seed), dtype=torch.float64, device="cpu") * scale
    return numbers.to(torch.get_default_device(), dtype).requires_grad_(grad)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Random fp64 numbers in [0, 1)."""
    numbers = torch.rand(*shape, generator=_generator(seed), dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


def tokens(vocab: int, *shape: int, seed: int = 0) -> Tensor:
    """Random token ids below `vocab`."""
    ids = torch.randint(vocab, shape, generator=_generator(seed), device="cpu")
    return ids.to(torch.get_default_device())


def temperatures(*shape: int, seed: int = 0) -> Tensor:
    """Random temperatures in [0.5, 2)."""
    return uniform(*shape, seed=seed) * 1.5 + 0.5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def gradient(function: Callable[[Tensor], Tensor], student: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Gradient of Σ weight·function(student) in the student."""
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf)
    (value * torch.as_tensor(weight).to(value.dtype)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def assert_close_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, ulps: float = 4.0) -> None:
    """At most twice the error of eager torch in the same type plus a floor of a few units in the last place.

    Both errors are the largest over the tensor, against fp64. The unit is that of the accumulation type at the largest
    exact value, so a result of 16 bits has to be rounded as eager rounds it. For fp64 the yardstick itself rounds, so
    the floor is higher.
    """
    ulps = 64.0 if ours.dtype == torch.float64 else ulps
    assert ours.shape == exact.shape
    assert not ours.isnan().any(), "NaN, or a lane that was never written"
    scale = exact.abs().max().item()
    unit = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps * max(scale, torch.finfo(ours.dtype).tiny)
    error = (ours.double() - exact).abs().max().item()
    allowed = 2.0 * (eager.double() - exact).abs().max().item() + ulps * unit
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} at scale {scale:.3e}"


# Rows as a trained model has them, and rows that only a broken one has. Every case is one row pair, a function of the
# vocabulary and the type, and every tier takes its own share of them.

# Where a peak stands: at the ends, in the middle, and on both sides of the borders of the kernels' blocks.
BLOCK = 4096
PLACES = (BLOCK, 0, 2 * BLOCK - 1, -1, BLOCK - 1, 2 * BLOCK, 5000, BLOCK + 1, 2 * BLOCK + 1)


class Row(NamedTuple):
    """One row of student and teacher logits, (V,) each, and their temperature."""

    student: Tensor
    teacher: Tensor
    tau: float = 1.0


RowCase = Callable[[int, torch.dtype], Row]


def stack(cases: dict[str, RowCase], vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V) student, (N, V) teacher and (N,) temperature of all of them."""
    rows = [case(vocab, dtype) for case in cases.values()]
    tau = torch.tensor([row.tau for row in rows], dtype=torch.promote_types(dtype, torch.float32))
    return torch.stack([row.student for row in rows]), torch.stack([row.teacher for row in rows]), tau


def some(cases: dict[str, RowCase], *words: str) -> dict[str, RowCase]:
    """Those whose name holds one of the words."""
    return {name: case for name, case in cases.items() if any(word in name for word in words)}


def _at(place: int, vocab: int) -> int:
    """A place that exists in a vocabulary of any length."""
    return place % vocab


def level(value: float, dtype: torch.dtype) -> float:
    """The level itself, or in a type that cannot hold it the type's largest number of that sign."""
    return math.copysign(min(abs(value), torch.finfo(dtype).max), value)


def confident_row(rest: float, place: int, vocab: int, seed: int) -> Tensor:
    """fp64 logits of scale 2 with a mass of 1 − rest at the place."""
    z = logits(vocab, dtype=torch.float64, seed=seed, scale=2.0)
    peak = _at(place, vocab)
    z[peak] = -torch.inf
    z[peak] = z.logsumexp(-1) + math.log1p(-rest) - math.log(rest)
    return z


def _confident(rest: float, place: int, teacher_rest: float, teacher_place: int, seed: int) -> RowCase:
    def case(vocab: int, dtype: torch.dtype) -> Row:
        student = confident_row(rest, place, vocab, seed)
        return Row(student.to(dtype), confident_row(teacher_rest, teacher_place, vocab, seed + 1).to(dtype))

    return case


RESTS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
CONFIDENT: dict[str, RowCase] = {}
for _n, _rest in enumerate(RESTS):
    _place, _other = PLACES[_n], PLACES[_n - 4]
    CONFIDENT[f"agree {_rest:.0e}"] = _confident(_rest, _place, 1.5 * _rest, _place, 100 + 10 * _n)
    CONFIDENT[f"disagree {_rest:.0e}"] = _confident(_rest, _place, _rest, _other, 102 + 10 * _n)
    CONFIDENT[f"teacher surer {_rest:.0e}"] = _confident(_rest, _place, 0.01 * _rest, _place, 104 + 10 * _n)


def _ordinary(vocab: int, dtype: torch.dtype, seed: int = 200) -> Row:
    return Row(logits(vocab, dtype=dtype, seed=seed), logits(vocab, dtype=dtype, seed=seed + 1))


def _margins(student: float, teacher: float, tau: float = 1.0, place: int = 5000) -> RowCase:
    """Flat rows but for one entry, the same in both."""

    def case(vocab: int, dtype: torch.dtype) -> Row:
        s, t = torch.zeros(vocab, dtype=dtype), torch.zeros(vocab, dtype=dtype)
        s[_at(place, vocab)], t[_at(place, vocab)] = level(student, dtype), level(teacher, dtype)
        return Row(s, t, tau)

    return case


def _one_hot(height: float, place: int, side: str) -> RowCase:
    """A peak in one of the rows, or at different places in both; the other row is ordinary."""

    def case(vocab: int, dtype: torch.dtype) -> Row:
        row = _ordinary(vocab, dtype)
        peak = torch.zeros(vocab, dtype=dtype)
        peak[_at(place, vocab)] = level(height, dtype)
        if side == "student":
            return Row(peak, row.teacher)
        return Row(row.student if side == "teacher" else peak.roll(vocab // 3), peak)

    return case


FAR: dict[str, RowCase] = {
    "margins 20 and 100": _margins(20.0, 100.0),
    "margins 100 and 20": _margins(100.0, 20.0),
    "margins 30 and 10 at tau 0.3": _margins(30.0, 10.0, 0.3),
    "margins 10 and 30 at tau 0.3": _margins(10.0, 30.0, 0.3),
    "margins 20 and 100 in the first block": _margins(20.0, 100.0, place=17),
    "margins 1e4 and 1e4 at the end": _margins(1e4, 1e4, place=-1),
    **{f"margins 20 and 100 at {place}": _margins(20.0, 100.0, place=place) for place in PLACES},
    **{f"one-hot {side} of 200": _one_hot(200.0, 9000, side) for side in ("student", "teacher", "both")},
    **{f"one-hot {side} of the largest": _one_hot(math.inf, BLOCK, side) for side in ("student", "teacher", "both")},
}


def _drifting(shift: float, student: bool, teacher: bool, width: int = BLOCK) -> RowCase:
    """Every `width` entries are shifted against those before, in one row or both: the maxima move at every border."""

    def case(vocab: int, dtype: torch.dtype) -> Row:
        row = _ordinary(vocab, dtype, seed=210)
        steps = shift * torch.arange(vocab).div(width, rounding_mode="floor").to(dtype)
        return Row(row.student + steps if student else row.student, row.teacher - steps if teacher else row.teacher)

    return case


DRIFTING: dict[str, RowCase] = {
    f"{who} {'up' if shift > 0 else 'down'} by {abs(shift):g}": _drifting(
        sign * shift, who != "teacher", who != "student"
    )
    for who, sign in (("student", 1.0), ("teacher", -1.0), ("both", 1.0))
    for shift in (0.5, -0.5, 3.0, -3.0, 40.0, -40.0, 1000.0, -1000.0)
} | {
    # Several times within a block, and within the 256 to 512 entries that the C++ kernels add up at once.
    f"{who} up by 3 every {width} entries": _drifting(sign * 3.0, who != "teacher", who != "student", width)
    for who, sign in (("student", 1.0), ("teacher", -1.0), ("both", 1.0))
    for width in (100, 600)
}


def _at_level(height: float, tau: float = 1.0) -> RowCase:
    """Rows of a level and the next number of the type below it, over parts that do not meet."""

    def case(vocab: int, dtype: torch.dtype) -> Row:
        base = torch.tensor(level(height, dtype), dtype=dtype)
        below = torch.nextafter(base, torch.tensor(-torch.inf, dtype=dtype)).clamp_min(torch.finfo(dtype).min)
        s, t = base.repeat(vocab), base.repeat(vocab)
        s[: vocab // 2], t[vocab // 3 :] = below, below
        return Row(s, t, tau)

    return case


def _uniform_at(height: float, tau: float = 1.0) -> RowCase:
    def case(vocab: int, dtype: torch.dtype) -> Row:
        row = torch.full((vocab,), level(height, dtype), dtype=dtype)
        return Row(row, row.clone(), tau)

    return case


def _with_lowest(side: str) -> RowCase:
    """Entries at the type's lowest number beside ordinary ones: as good as −inf, but they count."""

    def case(vocab: int, dtype: torch.dtype) -> Row:
        row = _ordinary(vocab, dtype, seed=220)
        for name, z, start in (("student", row.student, 1), ("teacher", row.teacher, 2)):
            if side in (name, "both"):
                z[start::3] = torch.finfo(dtype).min
        return row

    return case


def _one_block_lowest(vocab: int, dtype: torch.dtype) -> Row:
    """A first block of nothing but the lowest number, in both rows."""
    row = _ordinary(vocab, dtype, seed=222)
    for z in (row.student, row.teacher):
        z[: min(BLOCK, vocab // 2)] = torch.finfo(dtype).min
    return row


def _opposite(height: float) -> RowCase:
    """Margins beyond the type's range: one end of the row is high, the other low, and the teacher's the other way."""

    def case(vocab: int, dtype: torch.dtype) -> Row:
        s, t = torch.zeros(vocab, dtype=dtype), torch.zeros(vocab, dtype=dtype)
        s[0], s[-1], t[0], t[-1] = (level(sign * height, dtype) for sign in (1.0, -1.0, -1.0, 1.0))
        return Row(s, t)

    return case


def _ordinary_at(height: float, tau: float) -> RowCase:
    def case(vocab: int, dtype: torch.dtype) -> Row:
        row = _ordinary(vocab, dtype, seed=230)
        return Row(row.student + level(height, dtype), row.teacher + level(height, dtype), tau)

    return case


EXTREME: dict[str, RowCase] = {
    "all lowest": _uniform_at(-math.inf),
    "all largest": _uniform_at(math.inf),
    "all 1e20": _uniform_at(1e20),
    "all -1e31": _uniform_at(-1e31),
    "about 1e20": _at_level(1e20),
    "about -1e20": _at_level(-1e20),
    "about -1e31": _at_level(-1e31),
    "about 3e38": _at_level(3e38),
    "about -3e38": _at_level(-3e38),
    "-1e7 at tau 1e-3": _ordinary_at(-1e7, 1e-3),
    "1e7 at tau 1e-3": _ordinary_at(1e7, 1e-3),
    "-1e7 at tau 1e3": _ordinary_at(-1e7, 1e3),
    "lowest in the student": _with_lowest("student"),
    "lowest in the teacher": _with_lowest("teacher"),
    "lowest in both": _with_lowest("both"),
    "a first block of the lowest": _one_block_lowest,
    "opposite 1e20": _opposite(1e20),
    "opposite 3e38": _opposite(3e38),
    "opposite largest": _opposite(math.inf),
}


def _unit(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of the type at a scale, down to its smallest numbers."""
    kind = torch.finfo(dtype)
    return kind.eps * scale.clamp_min(kind.smallest_normal)


def _failures(error: Tensor, allowed: Tensor, what: str, names: Sequence[str]) -> list[str]:
    """A line for each row that is over, NaN included."""
    rows = (~(error <= allowed)).nonzero().flatten().tolist()
    return [f"{names[row]}: {what} {error[row]:.3e}, allowed {allowed[row]:.3e}" for row in rows]


def assert_gradient_rows(
    ours: Tensor,
    eager: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    names: Sequence[str] = (),
    floor: Tensor | float = 0.0,
    share: float = 1e-3,
    beyond: Tensor | None = None,
) -> None:
    """The rule for a gradient, row by row, by the norm and by the largest entry.

    The error against fp64 is at most twice the smaller of two yardsticks in the same type, autograd through the eager
    divergence and the plain-torch gradient, plus 8 ulp of the row's largest entry in fp32 or 2 in 16 bits, and it is
    never above a thousandth of the norm plus what rounding the exact gradient costs. In fp64 the truth itself rounds,
    so the floor is higher.

    Args:
        ours, eager, plain, exact: (..., V); all but the exact one in the student's type.
        names: what to call each row.
        floor: added to what is allowed, of the shape of the gradient.
        share: of the norm, the bound that no yardstick lifts.
        beyond: rows whose logarithms leave the type's range; they are looked at for NaN only.
    """
    dtype, vocab = ours.dtype, exact.shape[-1]
    ours, eager, plain, exact = (x.detach().reshape(-1, vocab) for x in (ours, eager, plain, exact))
    names = list(names) or [f"row {row}" for row in range(len(exact))]
    ulps = {torch.float64: 2.0**14, torch.float32: 8.0}.get(dtype, 2.0)
    largest = exact.abs().amax(-1)
    rounding = exact.to(dtype).double() - exact
    fits = rounding.isfinite().all(-1)
    assert not ours.isnan().any(), [names[row] for row in ours.isnan().any(-1).nonzero().flatten()]
    unit = ulps * _unit(largest, dtype)
    floor = torch.as_tensor(floor, dtype=exact.dtype).expand_as(exact)
    compared = fits if beyond is None else fits & ~beyond
    infinite = compared & ~ours.isfinite().all(-1)
    assert not infinite.any(), [names[row] for row in infinite.nonzero().flatten()]
    held = compared.nonzero().flatten().tolist()
    failures = []
    for what, measure in (("norm of the error", _norm), ("largest error", _largest)):
        yardsticks = [measure(x.double() - exact).nan_to_num(torch.inf, torch.inf) for x in (eager, plain)]
        allowed = 2.0 * torch.minimum(*yardsticks) + unit + measure(floor)
        bound = (share * measure(exact)).nan_to_num(torch.inf) + measure(rounding) + unit + measure(floor)
        error = measure(ours.double() - exact)
        failures += _failures(error[held], torch.minimum(allowed, bound)[held], what, [names[row] for row in held])
    assert not failures, "\n".join(failures)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(-1)


def assert_value_rows(
    ours: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    names: Sequence[str] = (),
    ulps: float = 16.0,
    lost: Tensor | float = 0.0,
    beyond: Tensor | None = None,
) -> None:
    """The rule for D, row by row: twice eager's error, plus some ulp of D or of 1, whichever is larger.

    A mass is 2 to the power of some −16, so half a unit of rounding in the exponent is some 16 units of the mass, and
    over one row eager's error is a matter of luck. In fp64 the truth rounds as well, as in `assert_close_as_eager`.

    Args:
        ours, eager, exact: one number a row; all but the exact one in the accumulation type.
        names: what to call each row.
        ulps: of the accumulation type.
        lost: what the masses below the type's smallest number can add.
        beyond: rows whose logarithms leave the type's range: a D from them is any finite number.
    """
    names = list(names) or [f"row {row}" for row in range(exact.numel())]
    ours, eager, exact = (x.detach().flatten() for x in (ours, eager, exact))
    assert ours.isfinite().all(), [names[row] for row in (~ours.isfinite()).nonzero().flatten()]
    ulps = 64.0 if ours.dtype == torch.float64 else ulps
    allowed = 2.0 * (eager.double() - exact).abs().nan_to_num(torch.inf, torch.inf)
    allowed = allowed + ulps * torch.finfo(ours.dtype).eps * exact.abs().clamp_min(1.0) + lost
    error = (ours.double() - exact).abs()
    if beyond is not None:
        error = error.masked_fill(beyond.flatten(), 0.0)
    failures = _failures(error, allowed, "error of D", names)
    assert not failures, "\n".join(failures)


def assert_hellinger_rows(ours: Tensor, exact: Tensor, *, names: Sequence[str] = ()) -> None:
    """The rule for s = √(squared Hellinger distance): a relative error of 1e-3 for s ≥ 1e-4, and that much below."""
    names = list(names) or [f"row {row}" for row in range(exact.numel())]
    found, s = ours.detach().double().flatten().sqrt(), exact.flatten().clamp_min(0.0).sqrt()
    failures = _failures((found - s).abs(), 1e-3 * s.clamp_min(1e-4), "error of s", names)
    assert not failures, "\n".join(failures)


# Their logarithms stand in D as they are, so D grows with the margin between the logits.
UNBOUNDED = ("forward_kl", "reverse_kl", "jeffreys")


def _margin(z: Tensor, tau: Tensor) -> Tensor:
    """How far the lowest finite logit of every row lies below the highest, over τ."""
    lowest = z.masked_fill(z == -torch.inf, torch.inf).amin(-1)
    return ((z.amax(-1) - lowest) / tau).nan_to_num(0.0, torch.inf).clamp_min(0.0)


# The logarithm of a mass that is below the smallest number, and so counts as 0, is at most about as large.
FLUSHED = 128.0
# Of the larger mass: agreeing rows with 1 − q below 1e-4 are nearer than that.
SIGN_ULPS = 128.0


def _log_masses(z: Tensor, tau: Tensor) -> Tensor:
    """log softmax(z/τ); NaN in a row of nothing but −inf."""
    return ((z - z.amax(-1, keepdim=True)) / tau.unsqueeze(-1)).log_softmax(-1)


def _beside(q: Tensor) -> Tensor:
    """1 − q of every entry; at the largest as the sum of the others, for there the difference has no digits."""
    top = q.argmax(-1, keepdim=True)
    return (1.0 - q).scatter(-1, top, q.scatter(-1, top, 0.0).sum(-1, keepdim=True))


def check_divergence(
    student: Tensor,
    teacher: Tensor,
    tau: Tensor,
    divergence: Divergence,
    *,
    names: Sequence[str] = (),
    ulps: float = 0.0,
    share: float = 1e-3,
    function: Callable[..., Tensor] = token_divergence,
) -> None:
    """D and its gradient of every row of the backend at work, by the rules above.

    Args:
        student, teacher, tau: (N, V), (N, V) and (N,).
        divergence: which.
        names, share: as in `assert_gradient_rows`.
        ulps: what the gradient may be off, in units of the accumulation type at the masses q·(1 − q), times the
            logarithms that D multiplies them with. That is how well rounded masses and logarithms define a gradient
            whose entries are far smaller than they are. Where it is above the bound of D, it is that bound, too.
        function: what is tested.
    """
    z_s, z_t, wide = student.double(), teacher.double(), tau.double()
    acc = torch.finfo(tau.dtype)
    margin = torch.maximum(_margin(z_s, wide), _margin(z_t, wide)).flatten()
    unbounded = torch.tensor(divergence.name in UNBOUNDED)
    # The C++ kernels cut logarithms of fp64 logits off at 1e290, so that sums of them stay in the type.
    beyond = unbounded & (margin > min(0.25 * acc.max, 1e289))

    def eager(s: Tensor) -> Tensor:
        return reference.token_divergence(s, teacher, tau, divergence)

    leaf = student.detach().clone().requires_grad_()
    value = function(leaf, teacher, tau, divergence)
    value.sum().backward()
    assert leaf.grad is not None
    exact = reference.token_divergence(z_s, z_t, wide, divergence)
    lost = (acc.smallest_normal * margin.clamp_max(acc.max)).where(unbounded, 0.0)
    log_q, log_p = (_log_masses(z, wide) for z in (z_s, z_t))
    q, p = (log.exp().nan_to_num(0.0) for log in (log_q, log_p))
    # Of an entry that is −inf on a side, and of a row of nothing else, there is no logarithm.
    logs = 1.0 + (log_p - log_q).nan_to_num(0.0, 0.0, 0.0).abs().where(unbounded, 0.0)
    beside = _beside(q)
    own = ulps * acc.eps * beside * logs
    if divergence.name == "total_variation":
        # Where p and q nearly meet, rounding decides on the sign of q − p, and at a peak the sign on all of the row.
        own = own + beside * ((p - q).abs() <= SIGN_ULPS * acc.eps * torch.maximum(p, q))
    vague = q * (own + (q * own).sum(-1, keepdim=True))
    assert_value_rows(value, eager(student), exact, names=names, ulps=max(16.0, ulps), lost=lost, beyond=beyond)
    if divergence.name == "hellinger":
        assert_hellinger_rows(value, exact, names=names)
    assert_gradient_rows(
        leaf.grad,
        gradient(eager, student),
        reference.token_divergence_grad(student, teacher, tau, divergence),
        reference.token_divergence_grad(z_s, z_t, wide, divergence),
        names=names,
        floor=(vague + (FLUSHED * acc.smallest_normal + lost).unsqueeze(-1)) / wide.unsqueeze(-1),
        share=share,
        beyond=beyond if divergence.name != "forward_kl" else None,
    )
