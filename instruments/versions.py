"""Runs a part of the tests with other versions of torch and Triton: `python -m instruments.versions`.

Each environment is a folder of `.venv-versions/` with its torch and its Triton, which Python finds before those of the
environment that runs this; everything else is shared. Delete a folder to have its newest versions.

Where pip offers torch for GPUs only, torch is installed without the several GB of CUDA beside it. Its libraries ask for
those when they are loaded, and get stand-ins in which each function returns an error: to torch, that is a machine
without a GPU. So this finds what a version of torch does on the CPU and what a version of Triton makes of the kernels,
and nothing that takes a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-versions"

COMPILE = ["tests/test_compile.py", "-k", "(kernel_compiles_clean and bf16-) or start_alike or recompile or fuses"]
FAST = ["tests/test_losses.py", "tests/test_ops.py", "tests/test_launches.py", "tests/test_errors.py"]
NATIVE = ["tests/test_losses.py", "tests/test_ops.py", "tests/test_doctor.py"]
INTERPRET = ["tests/test_doctor.py", "tests/test_alignment.py::test_labels_are_found_wherever_rows_start"]


class Environment(NamedTuple):
    """What pip installs, and the tests to run by tier; `make test` covers the versions of constraints.txt."""

    packages: list[str]
    tiers: dict[str, list[str]]


# Each torch beside the Triton that belongs to it. The C++ kernels begin with torch 2.10, and one binary serves all. The
# interpreter of Triton 3.5 and 3.6 fails with NumPy 2.4.
ENVIRONMENTS = {
    "torch-2.9-triton-3.5": Environment(
        ["torch==2.9.*", "triton==3.5.*", "numpy<2.4"], {"fast": FAST, "interpret": INTERPRET, "compile": COMPILE}
    ),
    "torch-2.10-triton-3.6": Environment(
        ["torch==2.10.*", "triton==3.6.*", "numpy<2.4"],
        {"fast": FAST, "native": NATIVE, "interpret": INTERPRET, "compile": COMPILE},
    ),
    "torch-newest-triton-3.8": Environment(
        ["torch>=2.14", "triton==3.8.*"],
        {"fast": FAST, "native": NATIVE, "interpret": INTERPRET, "compile": COMPILE},
    ),
    "triton-newest": Environment(["triton>=3.9"], {"interpret": INTERPRET, "compile": COMPILE}),
}


def install(packages: list[str], folder: Path) -> None:
    """Put the packages alone into the folder, and stand-ins beside them where torch needs some."""
    if (folder / "complete").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(pip, check=True)
    if (folder / "torch" / "lib").exists():
        stand_in(folder / "torch" / "lib", folder / "stand_ins")
    (folder / "complete").touch()


def stand_in(libraries: Path, out: Path) -> None:
    """Make the CUDA libraries that those of torch ask for and that are not here; each function returns an error.

    Versions of symbols carry the name of their library, and only the libraries without versions need to be guessed: a
    symbol is found in whichever library defines it.
    """
    out.mkdir()
    here = {path.name for path in libraries.iterdir()}
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    needed: set[str] = set()
    symbols: dict[str, set[str]] = defaultdict(set)
    for path in libraries.glob("*.so*"):
        command = ["readelf", "-dW", "--dyn-syms", str(path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", listed))
        for name, version in re.findall(r" UND (\w+)(?:@(\S+))?", listed):
            symbols[version].add(name)
    for library in sorted(needed - here):
        if f"\t{library} " in known:
            continue
        version = "NVSHMEM" if library.startswith("libnvshmem") else library
        names = symbols[version] or {name for name in symbols[""] if re.match("nccl|cusparseLt|cuFile", name)}
        script = out / f"{library}.map"
        script.write_text(f"{version} {{ global: *; }};\n" if symbols[version] else "{ global: *; };\n")
        subprocess.run(
            ["cc", "-w", "-fno-builtin", "-shared", "-fPIC", "-x", "c", "-", "-o", str(out / library),
             f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"],
            input="".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(names)), text=True, check=True,
        )  # fmt: skip


def run_tests(folder: Path, tier: str, paths: list[str], jobs: int) -> tuple[bool, str]:
    """(whether all passed, the last line of pytest)."""
    own = {"ADAKD_NATIVE": "1" if tier == "native" else "0", "OMP_NUM_THREADS": "1"}
    if tier == "interpret":
        own["TRITON_INTERPRET"] = "1"
    environment = {**os.environ, **own, **paths_of(folder)}
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-n", str(jobs), "--dist", "worksteal"]
    done = subprocess.run(
        [*pytest, "-m", tier, *paths], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout)
    return done.returncode == 0, (done.stdout.strip() or "no output").splitlines()[-1]


def paths_of(folder: Path) -> dict[str, str]:
    """The environment variables that put a folder's packages first."""

    def before(name: str, *first: Path) -> str:
        return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get(name)])])

    return {
        "PYTHONPATH": before("PYTHONPATH", folder, ROOT),
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", folder / "stand_ins"),
    }


def main() -> int:
    """1 if a test failed with some version."""
    parser = argparse.ArgumentParser(prog="python -m instruments.versions", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="test processes")
    parser.add_argument("environments", nargs="*", help=f"by default all of {', '.join(ENVIRONMENTS)}")
    args = parser.parse_args()
    if unknown := set(args.environments) - set(ENVIRONMENTS):
        parser.error(f"environments are {', '.join(ENVIRONMENTS)}, got {', '.join(sorted(unknown))}")
    lines, failed = [], False
    tell = "import torch, triton; print(f'torch {torch.__version__}, Triton {triton.__version__}')"
    for name in args.environments or ENVIRONMENTS:
        folder = FOLDER / name
        install(ENVIRONMENTS[name].packages, folder)
        told = subprocess.run(
            [sys.executable, "-c", tell], env={**os.environ, **paths_of(folder)}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        for tier, paths in ENVIRONMENTS[name].tiers.items():
            begin = time.monotonic()
            passed, last = run_tests(folder, tier, paths, args.jobs)
            failed |= not passed
            lines.append(f"{told.stdout.strip():<38} {tier:<10} {time.monotonic() - begin:4.0f} s  {last}")
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
