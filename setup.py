"""Builds the C++ kernels for the CPU where that is possible; pyproject.toml holds everything that is data.

They need a C++17 compiler (GCC or clang) and an importable torch of at least 2.10, so `pip install` takes
--no-build-isolation. Without either the package installs all the same, and one line says so. ADAKD_NATIVE=0 leaves them
out; ADAKD_NATIVE=1 makes what stands in the way an error. ADAKD_INSTRUCTION_SETS="portable avx2"
builds these instruction sets only (portable is always built), and CXXFLAGS come after all other flags.

A wheel with the library belongs to a platform, one without it to none, and neither to a Python version.
"""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Neither is news to who installs: torch without numpy, and what `pip install -e` is.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
warnings.filterwarnings("ignore", message=r"\s*Editable installation")

SOURCES = Path("python_bindings")
WANTED = os.environ.get("ADAKD_NATIVE", "")
# torch 2.10: older ones lack parallel_for and strings.
OLDEST_TORCH = (2, 10)
STABLE_ABI = OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48

# A switch over an enum without a default has to name every enumerator: a kernel that nobody chooses writes nothing.
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=switch", "-Werror=return-type"]
# `make sanitize` runs the tests on a library that watches its own memory and arithmetic.
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZERS = SANITIZE if os.environ.get("ADAKD_SANITIZE") else []
CXXFLAGS = os.environ.get("CXXFLAGS", "").split()
# Multiply-adds are fused where the source says `fma`, and nowhere else: otherwise equal rows would not give exactly 0.
# GCC warns of its own intrinsics' headers.
CORE = ["-O3", "-fno-math-errno", "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [*INSTRUCTION_SETS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
if chosen := os.environ.get("ADAKD_INSTRUCTION_SETS", "").split():
    if unknown := set(chosen) - set(INSTRUCTION_SETS):
        raise SystemExit(f"ADAKD_INSTRUCTION_SETS must be of {' '.join(INSTRUCTION_SETS)}, got {' '.join(unknown)}")
    INSTRUCTION_SETS = {name: flags for name, flags in INSTRUCTION_SETS.items() if name in {"portable", *chosen}}


def obstacle() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if WANTED == "0":
        return "ADAKD_NATIVE=0"
    if os.name != "posix":
        return f"they are written for GCC and clang, and this is {platform.system()}"
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler ({compiler()})"
    try:
        import torch
    except ImportError:
        return "torch cannot be imported here: install it first, then this package with --no-build-isolation"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        return f"they need torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, and this is {torch.__version__}"
    return None


def compiler() -> str:
    """The program that CXX names."""
    return os.environ.get("CXX", "c++").split()[0]


class BuildNative(build_ext):
    """One object for each instruction set, with its own flags, in one library that belongs to no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        why = obstacle()
        if why is None:
            try:
                return super().run()
            except Exception as error:
                why = f"the compiler failed: {' '.join(str(error).split())[:300]}"
                if WANTED == "1":
                    raise
        if WANTED == "1":
            raise SystemExit(f"ADAKD_NATIVE=1, but the C++ kernels for the CPU cannot be built: {why}")
        print(f"adakd_kernels: installed without the C++ kernels for the CPU, because {why}")
        self.extensions = self.distribution.ext_modules = []
        if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
            wheel.root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        cxx = os.environ.get("CXX", "c++").split()
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        built = [f"-DADAKD_HAS_{name.upper()}" for name in INSTRUCTION_SETS]
        units = [(SOURCES / "core" / "dispatch.cpp", CORE + built), (SOURCES / "core" / "tokens.cpp", CORE)]
        units += [(SOURCES / "core" / f"isa_{name}.cpp", CORE + flags) for name, flags in INSTRUCTION_SETS.items()]
        includes = [flag for path in include_paths() for flag in ("-isystem", path)]
        units.append((SOURCES / "register.cpp", ["-O2", f"-DTORCH_TARGET_VERSION={STABLE_ABI:#x}", *includes]))

        def compile_unit(unit: tuple[Path, list[str]]) -> str:
            source, flags = unit
            target = str(folder / f"{source.stem}.o")
            self.spawn([*cxx, *COMMON, *flags, *SANITIZERS, *CXXFLAGS, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        torch_libraries = [flag for path in library_paths() for flag in ("-L", path)]
        self.spawn(
            [*cxx, "-shared", *SANITIZERS, *objects, *torch_libraries, "-ltorch", "-ltorch_cpu", "-o", str(library)]
        )


class Wheel(bdist_wheel):
    """Named after the build, which says whether there is a library in it."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        return "py3", "none", "any" if self.root_is_pure else platform_tag


setup(
    ext_modules=[Extension("adakd_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
