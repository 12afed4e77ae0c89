"""A tenth divergence, place by place: what CONTRIBUTING.md asks of whoever adds one, as edits of a copy of the project.

It is Le Cam's: D = ½ Σ (p − q)²/(p + q). With d = (q − p)/(p + q), f = ½ (q − p)·d and ∂f/∂q = ½ d·(2 − d). It takes
two sweeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from instruments.project_copy import copy_project, replace

NAME, CLASS = "le_cam", "LeCam"


class Edit(NamedTuple):
    """`text` before the first `anchor` in a file of the project."""

    path: str
    anchor: str
    text: str


CPP_TERMS = """\
  ADAKD_INLINE Summands<V> terms(const Entry<V>& at) const {
    const Ratios<V> r(at);
    const V apart = r.r_q - r.r_p, d = apart / (r.r_p + r.r_q), half_top = constant<V>(0.5) * r.top;
    return {half_top * apart * d, half_top * r.r_q * d * (constant<V>(2.0) - d), V{}};
  }
"""
CPP_GRADIENT = """\
  ADAKD_INLINE V gradient(const Entry<V>& at, V w, V w_sum_g) const {
    const Ratios<V> r(at);
    const V d = (r.r_q - r.r_p) / (r.r_p + r.r_q);
    return mass_of(at.log_q) * fma(constant<V>(0.5) * w * d, constant<V>(2.0) - d, -w_sum_g);
  }
"""
CPP_SWEEPS = "  static constexpr bool kTwoSweeps = true;\n"
CPP_CLASS = f"""\
template <class V> struct {CLASS} : Terms<V> {{
{CPP_SWEEPS}  using Terms<V>::Terms;
{CPP_TERMS}{CPP_GRADIENT}}};

"""
CPP_LIST = f'  X({CLASS}, "{NAME}")                   \\\n'

# In the order of CONTRIBUTING.md.
EDITS = {
    "equation": Edit(
        "docs/maths.md",
        "| `hellinger` | 1",
        f"| `{NAME}` | ½ Σ (p − q)²/(p + q) | ½·q·d·(2 − d), d = (q − p)/(p + q) |\n",
    ),
    "class": Edit(
        "adakd_kernels/divergences.py",
        "@dataclass(frozen=True)\nclass Hellinger(",
        f'''\
@dataclass(frozen=True)
class {CLASS}(Divergence):
    """½ Σ (p − q)²/(p + q)."""

    name: ClassVar[str] = "{NAME}"
    sweeps: ClassVar[int] = 2


''',
    ),
    "registry": Edit("adakd_kernels/divergences.py", "        Hellinger,\n    )", f"        {CLASS},\n"),
    "names of the module": Edit("adakd_kernels/divergences.py", '    "ReverseKL",\n', f'    "{CLASS}",\n'),
    "export": Edit("adakd_kernels/__init__.py", "    ReverseKL,\n", f"    {CLASS},\n"),
    "public names": Edit("adakd_kernels/__init__.py", '    "LinearAdaKDLoss",\n', f'    "{CLASS}",\n'),
    "summand": Edit(
        "adakd_kernels/reference.py",
        '    "hellinger": lambda p, q, lp, lq, a, b: 0.5',
        f'    "{NAME}": lambda p, q, lp, lq, a, b: 0.5 * (p - q).square() / (p + q).clamp(min=1e-38),\n',
    ),
    "gradient": Edit(
        "adakd_kernels/reference.py",
        '    "hellinger": lambda p, q, lp, lq, a, b: -0.5',
        f'''\
    "{NAME}": lambda p, q, lp, lq, a, b: (
        0.5 * q * ((q - p) / (p + q).clamp(min=1e-38)) * (2 - (q - p) / (p + q).clamp(min=1e-38))
    ),
''',
    ),
    "Triton terms": Edit(
        "adakd_kernels/kernels/divergence_terms.py",
        'if DIVERGENCE == "forward_kl":\n',
        f"""\
if DIVERGENCE == "{NAME}":
        low = tl.exp2(-tl.abs(gap))
        top = tl.exp2(tl.where(gap > 0.0, log_q, log_p))
        apart = tl.where(gap > 0.0, 1.0 - low, low - 1.0)
        d = apart / (1.0 + low)
        q = top * tl.where(gap > 0.0, 1.0, low)
        return 0.5 * top * apart * d, 0.5 * q * d * (2.0 - d), q
    el""",
    ),
    "C++ class": Edit("python_bindings/core/divergence_terms.h", "// For a token that the loss selects", CPP_CLASS),
    "C++ list": Edit("python_bindings/core/divergences.h", '  X(Hellinger, "hellinger")', CPP_LIST),
    "closed form": Edit(
        "tests/test_reference.py",
        '    ("hellinger", 1',
        f'    ("{NAME}", sum((p - q) ** 2 / (p + q) for p, q in zip(P, Q, strict=True)) / 2),\n',
    ),
    "list of the README": Edit("README.md", "`hellinger`. Equations", f"`{NAME}`, "),
    "tables of the kernels": Edit(
        "docs/kernel-tables.md",
        "| forward | `hellinger` |",
        "".join(
            f"| {kernel} | `{NAME}` | …\n" for kernel in ("forward", "backward", "backward with CE", "`token_terms`")
        ),
    ),
    "line of the changelog": Edit("CHANGELOG.md", "- Losses: ", f"- The divergence `{NAME}`.\n"),
}


def write_project(folder: Path, *left_out: str) -> Path:
    """A copy of the project with the tenth divergence in every place but those left out."""
    copy_project(folder)
    for name, edit in EDITS.items():
        if name not in left_out:
            insert(folder, edit)
    return folder


def insert(folder: Path, edit: Edit) -> None:
    replace(folder / edit.path, edit.anchor, edit.text + edit.anchor)
