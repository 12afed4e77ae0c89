"""Plants faults of the kinds that occur, one at a time in a copy of the project, and says which ones the tests miss.

    python -m instruments.planted_faults                 # every fault, each in the whole tier that has to find it
    python -m instruments.planted_faults --narrow mask   # those with "mask" in their name, in the tests named beside it

A tier runs as `make test` runs it, up to its first failure; a fault whose tier passes is not found. It says that the
tests still find what they found, and nothing about a kind of fault that is not in the list. A fault whose text is no
longer in its file ends the run before any test.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .devices import ROOT
from .project_copy import copy_project, replace

# Environment and marker of a tier, as the Makefile has them.
TIERS = {
    "fast": ({"ADAKD_NATIVE": "0"}, "fast"),
    "avx512": ({"ADAKD_NATIVE": "1", "ADAKD_ISA": "avx512", "MALLOC_PERTURB_": "1"}, "native"),
    "avx2": ({"ADAKD_NATIVE": "1", "ADAKD_ISA": "avx2", "MALLOC_PERTURB_": "1"}, "native"),
    "portable": ({"ADAKD_NATIVE": "1", "ADAKD_ISA": "portable", "MALLOC_PERTURB_": "1"}, "native"),
    "interpret": ({"TRITON_INTERPRET": "1"}, "interpret"),
    "compile": ({}, "compile"),
}
TIMEOUT = 3600.0
"""Seconds after which a tier with a fault counts as hanging, as where the fault makes a loop endless."""
# What is built for a tier of the C++ kernels: `make test` leaves out more where there is a wider instruction set.
BUILT = {"avx512": "avx512", "avx2": "avx2 avx512", "portable": "portable avx2"}


class Fault(NamedTuple):
    """`old` becomes `new` in the one file that `path` (with `*` for any name or folder) fits."""

    name: str
    tier: str
    path: str
    old: str
    new: str
    tests: str  # the narrowest choice that finds it, for pytest: files and perhaps -k


FAULTS = [
    # The mathematics, the arguments and the training, in plain torch.
    Fault(
        "a wrong sign in the reference", "fast", "adakd_kernels/reference.py",
        'lambda p, q, lp, lq, a, b: q * (lq - lp),', 'lambda p, q, lp, lq, a, b: q * (lp - lq),',
        "tests/test_reference.py",
    ),
    Fault(
        "a label shift off by one", "fast", "adakd_kernels/functional.py",
        "labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)",
        "labels[..., :1], labels[..., :-1]",
        "tests/test_losses.py -k shift",
    ),
    Fault(
        "an unchecked argument", "fast", "adakd_kernels/checks.py",
        'check_range("ce_weight", ce_weight, 0.0, 1.0, "in [0, 1]")', "pass",
        "tests/test_errors.py",
    ),
    Fault(
        "a tensor on the wrong strides goes unchecked", "fast", "adakd_kernels/checks.py",
        "value.stride(-1) != 1 and value.shape[-1] > 1", "value.stride(-1) < 0",
        "tests/test_errors.py",
    ),
    Fault(
        "a focus step skipped", "fast", "adakd_kernels/adaptive.py",
        "steps = steps + finite", "steps = steps + 0",
        "tests/test_adaptive.py",
    ),
    Fault(
        "a share rounded in fp32", "fast", "adakd_kernels/adaptive.py",
        " * focus_ratio).floor()", " * focus_ratio).float().floor()",
        "tests/test_adaptive.py",
    ),
    Fault(
        "the wrong neighbour of the median", "fast", "adakd_kernels/adaptive.py",
        ".sum() // 2)", ".sum() // 2 + 1)",
        "tests/test_adaptive.py",
    ),
    Fault(
        "the gradient of the bias forgets all chunks but the last", "fast", "adakd_kernels/**/*.py",
        "total.addmv_(a, ones, beta=0 if first else 1)", "total.addmv_(a, ones, beta=0)",
        "tests/test_linear.py",
    ),
    Fault(
        "the first token keeps its label", "fast", "adakd_kernels/*/collator.py",
        'labels[:, 0] = IGNORE_INDEX', "pass",
        "tests/test_data.py",
    ),
    Fault(
        "the trainer never moves the share", "fast", "adakd_kernels/*/*.py",
        "            self.loss_fn.step()\n", "            pass\n",
        "tests/test_trainer.py",
    ),
    # The C++ kernels.
    Fault(
        "AVX-512 looks at half of a vector for a lane that holds", "avx512", "python_bindings/core/lanes.h",
        "_mm512_movepi32_mask((__m512i)mask) != 0", "(_mm512_movepi32_mask((__m512i)mask) & 0xff) != 0",
        "tests/test_contract.py tests/test_confident_rows.py",
    ),
    Fault(
        "AVX-512 takes -inf for a finite number", "avx512", "python_bindings/core/lanes.h",
        "0x01 | 0x08 | 0x10 | 0x80", "0x01 | 0x08 | 0x80",
        "tests/test_contract.py",
    ),
    Fault(
        "AVX2 swaps the halves of a vector of fp16", "avx2", "python_bindings/core/lanes.h",
        "_mm256_set_m128i(high, low)", "_mm256_set_m128i(low, high)",
        "tests/test_contract.py -k float16",
    ),
    Fault(
        "AVX2 takes a vector with one -inf for a finite one", "avx2", "python_bindings/core/lanes.h",
        "_mm256_movemask_ps((__m256)carried) == 0", "_mm256_movemask_ps((__m256)carried) != 0xff",
        "tests/test_contract.py",
    ),
    Fault(
        "portable code takes every vector for a finite one", "portable", "python_bindings/core/lanes.h",
        "return any < 0x80000000u;", "return true;",
        "tests/test_contract.py",
    ),
    Fault(
        "portable code rounds a multiply-add twice", "portable", "python_bindings/core/lanes.h",
        "  return fma(a, b, c);\n#else\n  typedef double Wide",
        "  return fma(a, b, c);\n#else\n  return a * b + c;\n  typedef double Wide",
        "tests/test_confident_rows.py tests/test_extreme_rows.py",
    ),
    Fault(
        "the last lane behind a row is not filled", "avx512", "python_bindings/core/rows.h",
        "for (int i = n; i < padded; ++i) out[i] = -kInfinity;",
        "for (int i = n; i < padded - 1; ++i) out[i] = -kInfinity;",
        "tests/test_contract.py",
    ),
    Fault(
        "an offset of 32 bits in C++", "avx512", "python_bindings/core/rows.h",
        " + entry * size_of(", " + static_cast<int32_t>(entry) * size_of(",
        "tests/test_contract.py -k offsets",
    ),
    Fault(
        "a lost -inf guard in C++", "avx512", "python_bindings/core/kl.h",
        "a_finite = select(finite, a, zero)", "a_finite = select(finite, a, a)",
        "tests/test_contract.py -k infinity",
    ),
    Fault(
        "the gradient behind the common vocabulary is not written", "avx512",
        "python_bindings/core/token_divergence_backward.h",
        ", 0, (call.student_vocab - ", ", 0, 0 * (call.student_vocab - ",
        "tests/test_contract.py -k vocabularies",
    ),
    Fault(
        "the cross-entropy of the wrong label where it is the peak", "avx512",
        "python_bindings/core/token_divergence_backward.h",
        "(i == label ? ce_weight : 0.0)", "(i == label + 1 ? ce_weight : 0.0)",
        "tests/test_losses.py tests/test_contract.py",
    ),
    Fault(
        "a peak behind the first chain is not found", "avx512", "python_bindings/core/kl.h",
        "if (any(max_s > limit)) return false;", "if (any(max_s > limit) && false) return false;",
        "tests/test_confident_rows.py",
    ),
    Fault(
        "entries before a new peak are left out", "avx512", "python_bindings/core/sweep.h",
        "start += next.added;", "start += next.added + kStep;",
        "tests/test_extreme_rows.py",
    ),
    Fault(
        "a peak at the first entry is not written", "avx512", "python_bindings/core/token_divergence_backward.h",
        "if (peak >= 0) narrow_block(&at_peak, 1,", "if (peak > 0) narrow_block(&at_peak, 1,",
        "tests/test_confident_rows.py",
    ),
    Fault(
        "the entry that a part leaves out is added in C++", "avx512", "python_bindings/core/token_terms.h",
        "range(0, rows.vocab, call.peak[n])", "range(0, rows.vocab)",
        "tests/test_token_terms.py",
    ),
    Fault(
        "c·q is lost where an entry is at -inf", "avx512", "python_bindings/core/two_sweeps.h",
        "constant<V>((kWithC ? c : 0.0) - ", "constant<V>(0.0 - ",
        "tests/test_token_terms.py tests/test_contract.py",
    ),
    Fault(
        "a small lost mass as a difference in C++", "avx512", "python_bindings/core/kl.h",
        "kLost ? lost_s : student.l - keep_s", "student.l - keep_s",
        "tests/test_token_kl.py -k small",
    ),
    # The Triton kernels, in the interpreter.
    Fault(
        "a missing mask", "interpret", "adakd_kernels/kernels/rows.py",
        "mask = offs_v < skew + V\n", "mask = offs_v <= skew + V\n",
        "tests/test_traffic.py",
    ),
    Fault(
        "a wrong block border", "interpret", "adakd_kernels/kernels/rows.py",
        "max(0, -(-(last - end) // STEP)) * STEP", "max(0, (last - end) // STEP) * STEP",
        "tests/test_contract.py",
    ),
    Fault(
        "a lost -inf guard in Triton", "interpret", "adakd_kernels/kernels/kl.py",
        'a_kept = tl.where(t != -float("inf"), a, 0.0)', "a_kept = a",
        "tests/test_contract.py -k infinity",
    ),
    Fault(
        "a wrong sign in Triton", "interpret", "adakd_kernels/kernels/divergence_terms.py",
        '"hellinger":\n        return 1.0, -0.5', '"hellinger":\n        return 1.0, 0.5',
        "tests/test_contract.py -k Hellinger",
    ),
    Fault(
        "a normaliser of the wrong temperature", "interpret", "adakd_kernels/kernels/gradient.py",
        "load_normalizers(Normalizers1, n)", "load_normalizers(NormalizersTau, n)",
        "tests/test_losses.py",
    ),
    Fault(
        "a tie too few in Triton", "interpret", "adakd_kernels/kernels/token_choice.py",
        "tl.cumsum(tied) <= room", "tl.cumsum(tied) < room",
        "tests/test_launches.py",
    ),
    Fault(
        "a loss without the upstream gradient of its tokens in Triton", "interpret",
        "adakd_kernels/kernels/loss_sums.py", "if GradTokenLoss is not None:", "if False:",
        "tests/test_launches.py",
    ),
    Fault(
        "another order of ties in C++", "avx512", "python_bindings/core/tokens.cpp",
        "lost_x : a < b", "lost_x : a > b",
        "tests/test_launches.py",
    ),
    Fault(
        "a lane that is not written", "interpret", "adakd_kernels/kernels/gradient_kernel.py",
        "Grad, skew, VS if PART is None", "Grad, skew, V if PART is None",
        "tests/test_traffic.py -k nothing_outside",
    ),
    Fault(
        "a token that reads more than it has to", "interpret", "adakd_kernels/kernels/peak.py",
        "nowhere))\n        start += rows.LANES * rows.LANES * rows.WIDTH",
        "nowhere))\n        start += rows.LANES * rows.WIDTH",
        "tests/test_traffic.py -k formula",
    ),
    Fault(
        "a part that is merged twice", "interpret", "adakd_kernels/kernels/split.py",
        "at, size, inside = part * N + n, parts * N, part < parts\n    exponent = tl.full",
        "at, size, inside = part // 2 * N + n, parts * N, part < parts\n    exponent = tl.full",
        "tests/test_split.py -k statistics",
    ),
    Fault(
        "a last part without the entries that the skew moves", "interpret", "adakd_kernels/kernels/rows.py",
        "skew + V - start, PART - own_skew)", "V - start, PART - own_skew)",
        "tests/test_split.py -k last_part",
    ),
    Fault(
        "a lost lane of the peak", "interpret", "adakd_kernels/kernels/peak.py",
        "(peak // rows.WIDTH) % rows.LANES", "(peak // rows.WIDTH + 1) % rows.LANES",
        "tests/test_confident_rows.py -k JensenShannon",
    ),
    Fault(
        "the peak of a part beside its place", "interpret", "adakd_kernels/kernels/token_terms.py",
        "(tl.load(Peak + n) + skew)", "tl.load(Peak + n)",
        "tests/test_alignment.py -k parts_of",
    ),
    Fault(
        "a scale that is rounded in the terms of a part", "interpret", "adakd_kernels/kernels/token_terms.py",
        "tl.fma(x, row.scale_rest, -log_l)", "-log_l",
        "tests/test_alignment.py -k free_of",
    ),
    Fault(
        "a small lost mass as a difference in Triton", "interpret", "adakd_kernels/kernels/kl.py",
        "tl.sum(sums.lost_s, 0) if LOST else tail_s - keep_s", "tail_s - keep_s",
        "tests/test_token_kl.py -k small",
    ),
    Fault(
        "arithmetic on bf16", "interpret", "adakd_kernels/kernels/rows.py",
        "    return z.to(rows.scale.dtype)\n", "    return z\n",
        "tests/test_contract.py -k bfloat16",
    ),
    # The compiled kernels.
    Fault(
        "consecutive entries of a lane that are loaded one by one", "compile", "adakd_kernels/kernels/launch.py",
        '"WIDTH": vec if is_skewed or aligned(student, teacher, *written) else 1,', '"WIDTH": vec,',
        "tests/test_compile.py -k start_alike",
    ),
    Fault(
        "a wide load of one row beside an unaligned one", "compile", "adakd_kernels/kernels/rows.py",
        "offs_v = tl.multiple_of(offs_v, [1, 1])", "offs_v = offs_v",
        "tests/test_compile.py -k read_together",
    ),
    Fault(
        "an offset of the tensors that the compiler does not see", "compile", "adakd_kernels/kernels/rows.py",
        "tl.multiple_of(Logits - lead, 16)", "Logits - lead",
        "tests/test_compile.py -k views_that_start",
    ),
    Fault(
        "an offset of 32 bits in Triton", "compile", "adakd_kernels/kernels/rows.py",
        "n = n.to(tl.int64)", "n = n.to(tl.int32)",
        "tests/test_ptx.py -k two_to_the_31",
    ),
    Fault(
        "a dropped bound of the registers", "compile", "adakd_kernels/kernels/launch.py",
        'config["maxnreg"] = 64', "pass",
        "tests/test_compile.py -k odd_vocabulary",
    ),
    Fault(
        "a dropped bound of the registers in fp64", "compile", "adakd_kernels/kernels/launch.py",
        'config["maxnreg"] = 128', "pass",
        "tests/test_compile.py -k 'compiles_clean and fp64'",
    ),
    Fault(
        "narrow access", "compile", "adakd_kernels/kernels/launch.py",
        "16 // itemsize", "8 // itemsize",
        "tests/test_compile.py -k compiles_clean",
    ),
    Fault(
        "a reduction across threads in a loop", "compile", "adakd_kernels/kernels/kl.py",
        "new_s = tl.maximum(m_s, tl.max(s, 1))", "new_s = tl.maximum(m_s, tl.max(tl.max(s, 1), 0))",
        "tests/test_compile.py -k compiles_clean",
    ),
    Fault(
        "a batch that recompiles", "compile", "adakd_kernels/kernels/token_divergence.py",
        'do_not_specialize=["L", "stride_sb", "stride_sl", "stride_tb", "stride_tl", "lead", "of_p", "of_q"]', "",
        "tests/test_compile.py -k recompile",
    ),
    Fault(
        "a promotion to fp64", "compile", "adakd_kernels/kernels/rows.py",
        "return z * UNIT - m * UNIT", "return (z.to(tl.float64) * UNIT - m * UNIT).to(z.dtype)",
        "tests/test_compile.py -k compiles_clean",
    ),
    Fault(
        "a dropped barrier goes unseen", "compile", "instruments/ptx_simulator.py",
        "return bool(((who != self.NOBODY) & (who != thread) & ~ordered).any())", "return False",
        "tests/test_ptx.py -k barrier",
    ),
    Fault(
        "a peak below another entry", "compile", "adakd_kernels/kernels/peak.py",
        "highest, lane = tl.max(", "highest, lane = tl.min(",
        "tests/test_ptx.py -k reference",
    ),
]  # fmt: skip


def place(folder: Path, fault: Fault) -> Path:
    """The file that has the fault's text."""
    found = [path for path in sorted(folder.glob(fault.path)) if fault.old in path.read_text()]
    if len(found) != 1:
        raise LookupError(f"{fault.name}: {len(found)} files of {fault.path} have {fault.old!r}")
    return found[0]


def run_tests(folder: Path, tier: str, jobs: str, *chosen: str, timeout: float = TIMEOUT) -> tuple[int, str]:
    """(exit code of pytest, what it printed) of a tier in a copy, up to the first failure; below 0 after a crash.

    A run that is not at its end after `timeout` seconds is killed.
    """
    environment, marker = TIERS[tier]
    options = ("-p", "no:benchmark", "-p", "no:cacheprovider", "-q", "-x", "-n", jobs, "--dist", "worksteal")
    # That the faults have their places fails in a copy that has one.
    command = [sys.executable, "-m", "pytest", *options, "-m", marker, "--ignore=tests/test_planted_faults.py", *chosen]
    env = clean_environment() | {"OMP_NUM_THREADS": "1"} | environment
    # In a session of its own, so that workers in an endless loop can be ended with it.
    with subprocess.Popen(
        command, cwd=folder, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    code = process.returncode
    if code not in (0, 1, 2) and code >= 0:  # 1: a failure, 2: an error while collecting
        raise RuntimeError(f"pytest ended with {code}\n{output[-3000:]}")
    if code == 0 and " passed" not in output:
        raise RuntimeError(f"no test ran: {' '.join(command)}\n{output[-3000:]}")
    return code, output


def clean_environment() -> dict[str, str]:
    """This process's, without what another tier or another copy put there."""
    own = ("ADAKD_NATIVE", "ADAKD_ISA", "ADAKD_COMPILED_KERNELS", "TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in own and "XDIST" not in name}


def build(folder: Path, instruction_sets: str) -> None:
    """The C++ library of a copy."""
    environment = {"ADAKD_NATIVE": "1", "ADAKD_INSTRUCTION_SETS": instruction_sets}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=clean_environment() | environment, check=True, stdout=subprocess.DEVNULL)


def found(fault: Fault, narrow: bool, jobs: str) -> str | None:
    """The first test that fails with the fault and passes without it, or a crash; None if the tier passes."""
    chosen = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", fault.tests)] if narrow else []
    rebuilt = fault.path.startswith("python_bindings")
    with tempfile.TemporaryDirectory() as broken, tempfile.TemporaryDirectory() as sound:
        copy_project(Path(broken), with_library=not rebuilt)
        replace(place(Path(broken), fault), fault.old, fault.new)
        if rebuilt:
            build(Path(broken), BUILT[fault.tier])
        code, output = run_tests(Path(broken), fault.tier, jobs, *chosen, timeout=TIMEOUT / 20 if narrow else TIMEOUT)
        if code <= 0:
            return f"a crash or a hang, signal {-code}" if code else None
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        if failed is None:
            raise RuntimeError(f"{fault.name}: no name of a test in\n{output[-3000:]}")
        copy_project(Path(sound), with_library=True)
        code, output = run_tests(Path(sound), fault.tier, "0", failed[1])
        if code:
            raise RuntimeError(f"{fault.name}: {failed[1]} fails without the fault, too\n{output[-3000:]}")
        return failed[1]


def main(argv: list[str] | None = None) -> int:
    """Run the faults whose name has one of the words in it, all without words; 1 if one is not found."""
    parser = argparse.ArgumentParser(description="Plant faults and say which ones the tests miss.")
    parser.add_argument("words", nargs="*", help="parts of the names of the faults to plant; none: all")
    parser.add_argument("--tier", choices=TIERS, help="only those of one tier")
    parser.add_argument("--narrow", action="store_true", help="run the tests named beside a fault, not its whole tier")
    parser.add_argument("--jobs", default="2", help="test processes (%(default)s)")
    options = parser.parse_args(argv)
    for fault in FAULTS:
        place(ROOT, fault)
    chosen = [
        fault
        for fault in FAULTS
        if (not options.tier or fault.tier == options.tier)
        and (not options.words or any(word in fault.name for word in options.words))
    ]
    missed = 0
    for fault in chosen:
        test = found(fault, options.narrow, options.jobs)
        missed += test is None
        print(f"{'MISSED' if test is None else 'found':<7} {fault.tier:<10} {fault.name}: {test or '-'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
