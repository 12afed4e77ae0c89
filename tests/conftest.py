"""Set-up shared by all tiers: the device of the tests, and poison in memory that nobody has written yet."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, settings

from adakd_kernels.ops import backend

INTERPRETING = backend("cpu").name == "triton-interpreter"
NATIVE = backend("cpu").name == "native"

if INTERPRETING:
    from instruments import interpreter

    interpreter.install()

# The same examples every time, few where one takes the interpreter a second and where making a failure smaller takes
# minutes. `make fuzz` asks for new ones.
settings.register_profile(
    "same",
    deadline=None,
    derandomize=True,
    max_examples=40 if INTERPRETING else 300,
    phases=[Phase.explicit, Phase.generate] if INTERPRETING else list(Phase),
)
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10000")), print_blob=True
)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """`-m gpu` puts every tensor that a test makes on the GPU; the tests are those that other tiers run on the CPU."""
    if _tier("gpu", config) and torch.cuda.is_available():
        torch.set_default_device("cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, the interpreter or the C++ kernels and does not have it."""
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


@pytest.fixture
def unpoisoned() -> None:
    """For tests that trace or compile, where `torch.empty` must stay itself."""
