"""Any row of finite logits and −inf: difficulty, D and gradient against fp64, on the reference (fast), the C++
kernels (native), in the interpreter (interpret), on a GPU (gpu).

The examples are the same ones every time; `make fuzz` draws others.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adakd_kernels import reference, token_difficulty

from .cases import BLOCK, DIVERGENCES, DTYPES, assert_hellinger_rows, check_divergence, logits

pytestmark = [pytest.mark.fast, pytest.mark.native, pytest.mark.interpret, pytest.mark.gpu]
# A mass is 2 to the power of down to −126, with half a unit of rounding in the exponent.
MASS_ULPS = 128.0
CHAINS = (255, 256, 257, 511, 512, 513)  # the C++ kernels add up so many entries before they look at the maximum
BORDERS = (*CHAINS, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1)


def sizes(dtype):
    """Zero, a usual number, or one of any size that the type holds, in either sign."""
    decades = st.floats(-3.0, math.log10(torch.finfo(dtype).max) - 1e-9)
    usual = st.sampled_from([0.0, 1.0, 3.0, 20.0, 200.0])
    return st.tuples(st.sampled_from([1.0, -1.0]), usual | decades.map(lambda x: 10.0**x)).map(math.prod)


@st.composite
def rows(draw, vocab, count):
    """(count, vocab) logits of one type: a level, noise, a step at a border of a block, some entries of their own."""
    dtype = draw(st.sampled_from(DTYPES))
    kind, size = torch.finfo(dtype), sizes(dtype)
    z = logits(count, vocab, dtype=torch.float64, seed=draw(st.integers(0, 9999)), scale=1.0)
    for row in z:
        row *= abs(draw(st.sampled_from([0.0, 1.0, 3.0]) | size))
        row += draw(st.just(0.0) | size)
        row[draw(st.sampled_from((*BORDERS, vocab // 2))) :] += draw(st.just(0.0) | size)
        for _ in range(draw(st.integers(0, 3))):
            place = draw(st.sampled_from((0, *BORDERS, vocab - 1)) | st.integers(0, vocab - 1)) % vocab
            row[place] = draw(size | st.sampled_from([kind.max, kind.min, -math.inf]))
        # An overflow is no finite logit.
        row.copy_(row.clamp(kind.min, kind.max).where(row != -math.inf, -math.inf))
        if draw(st.integers(0, 9)) == 0:
            row[draw(st.integers(0, vocab - 1)) :] = -math.inf
    return z.to(dtype)


@st.composite
def problems(draw):
    vocab = draw(st.integers(1, 70) | st.sampled_from(BORDERS))
    student = draw(rows(vocab, 2))
    teacher = draw(st.just(student) | rows(vocab, 2)) if draw(st.booleans()) else draw(rows(vocab, 2))
    acc = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    tau = [10.0 ** draw(st.sampled_from([0.0, -3.0, 3.0]) | st.floats(-3.0, 3.0)) for _ in range(2)]
    return student, teacher, torch.tensor(tau, dtype=acc), draw(st.sampled_from(DIVERGENCES))


@given(problems())
def test_any_row_gives_what_fp64_gives(problem):
    student, teacher, tau, divergence = problem
    exact = reference.squared_hellinger(student.double(), teacher.double())
    assert_hellinger_rows(token_difficulty(student, teacher), exact)
    # Rows that no one trains on may lose their gradient to rounding, as eager's does: no bound but the yardsticks.
    check_divergence(student, teacher, tau, divergence, ulps=MASS_ULPS, share=math.inf)
