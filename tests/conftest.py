"""Set-up shared by all tiers: what a run leaves out, the device, and poison in memory that nobody has written yet."""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

from adakd_kernels.ops import backend, native

from . import left_out

INTERPRETING = backend("cpu").name == "triton-interpreter"
NATIVE = backend("cpu").name == "native"
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")
"""Whether `make sanitize` has loaded AddressSanitizer, which keeps freed memory, into this process."""

if INTERPRETING:
    from instruments import interpreter

    interpreter.install()
LONGEST = ("test_tenth_divergence.py", "test_trainer_runs.py", "test_any_row.py", "test_documentation.py")
TIERS = {"fast", "native", "interpret", "compile", "gpu"}
SHARED_CACHE = "ADAKD_COMPILED_KERNELS"
SHARED_DATA = "HF_DATASETS_CACHE"

# Whether the C++ kernels run with a narrower instruction set than this processor has.
NARROWER = NATIVE and native.library().adakd_isa().decode() != native.instruction_sets()[0]

# The same examples every time, few where one takes the interpreter a second and where making a failure smaller takes
# minutes. `make fuzz` asks for new ones.
for name, share in (("thorough", 1.0), ("same", 0.25)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=True,
        max_examples=int(share * (40 if INTERPRETING else 400)),
        phases=[Phase.explicit, Phase.generate] if INTERPRETING else list(Phase),
    )
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10000")), print_blob=True
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--thorough` is what `make test-all` adds."""
    parser.addoption("--thorough", action="store_true", help="run what tests/left_out.py leaves out of a tier, too")


def pytest_configure(config: pytest.Config) -> None:
    """`-m gpu` puts every tensor that a test makes on the GPU; the tests are those that other tiers run on the CPU."""
    if _tier("gpu", config) and torch.cuda.is_available():
        torch.set_default_device("cuda")
    if SHARED_DATA not in os.environ:  # likewise; nothing of the user's cache is read or written
        data = tempfile.TemporaryDirectory()
        os.environ[SHARED_DATA] = data.name
        config.add_cleanup(data.cleanup)
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("thorough" if config.getoption("--thorough") else "same")
    if _tier("compile", config) and SHARED_CACHE not in os.environ:  # the workers inherit it
        folder = tempfile.TemporaryDirectory()
        os.environ[SHARED_CACHE] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import the files of other tiers alone: transformers takes each process of each tier seconds."""
    if collection_path.suffix != ".py" or config.getoption("markexpr") not in TIERS:
        return None
    tiers = set(re.findall(r"pytest\.mark\.(\w+)", collection_path.read_text())) & TIERS
    return True if tiers and config.getoption("markexpr") not in tiers else None


def _is_left_out(item: pytest.Item, rules: dict[str, Callable[..., bool]]) -> bool:
    """Whether a rule of `left_out.py` holds for a test and its parameters."""
    when = rules.get(f"{item.path.name}::{getattr(item, 'originalname', item.name)}")
    if when is None:
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return when(**{name: parameters[name] for name in inspect.signature(when).parameters})


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Takes out of `items` what `make test-all` alone runs."""
    tiers = {
        "fast": left_out.IN_PLAIN_TORCH,
        "interpret": left_out.IN_THE_INTERPRETER,
        "compile": left_out.COMPILED,
        "native": left_out.WITH_ANOTHER_INSTRUCTION_SET if NARROWER else left_out.WITH_THE_WIDEST_INSTRUCTION_SET,
    }
    rules = {test: when for tier, of_tier in tiers.items() if _tier(tier, config) for test, when in of_tier.items()}
    gone = {item for item in items if _is_left_out(item, rules)}
    config.hook.pytest_deselected(items=list(gone))
    items[:] = [item for item in items if item not in gone]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the run does without; skip what needs a GPU, the interpreter or the C++ kernels, absent."""
    if os.environ.get("ADAKD_NATIVE") == "1" and not NATIVE and not INTERPRETING:
        raise pytest.UsageError(f"ADAKD_NATIVE=1, but {backend('cpu').reason}")
    if not config.getoption("--thorough"):
        _leave_out(config, items)
    items.sort(key=lambda item: item.path.name not in LONGEST)  # so that no worker waits for one of them at the end
    for item in items:
        markers = {marker.name for marker in item.iter_markers()}
        if "native" in markers and _tier("native", config) and not NATIVE:
            item.add_marker(pytest.mark.skip(reason=f"needs the C++ kernels: {backend('cpu').reason}"))
        if "gpu" in markers and _tier("gpu", config) and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device on this machine"))
        if "interpret" in markers and not markers & {"fast", "gpu"} and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="runs in Triton's interpreter: start with TRITON_INTERPRET=1"))


def _tier(name: str, config: pytest.Config) -> bool:
    return name in config.getoption("markexpr").split()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """`torch.empty` gives NaN, so that a kernel which leaves a lane unwritten is seen."""
    if not {"fast", "interpret"} & {marker.name for marker in request.node.iter_markers()}:
        return
    if "unpoisoned" in request.fixturenames:
        return
    allocate = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        if out.is_floating_point() and out.device.type in ("cpu", "cuda") and type(out) is torch.Tensor:
            out.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def poisoned_memory_of_the_native_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The C++ kernels allocate by themselves; in this mode torch fills new memory with NaN wherever it is asked for."""
    if not NATIVE or "unpoisoned" in request.fixturenames:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes left of `trainer_process.SCENARIOS`, run once for all tests and workers."""
    from .trainer_process import once_for_all_workers, run_two_ranks

    return once_for_all_workers(tmp_path_factory, "two_ranks", run_two_ranks)


@pytest.fixture
def unpoisoned() -> None:
    """For tests that trace or compile, where `torch.empty` must stay itself."""
