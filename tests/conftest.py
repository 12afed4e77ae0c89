"""Set-up shared by all tiers: which backend the CPU runs, and poison in memory that nobody has written yet."""

from __future__ import annotations

import pytest
import torch

from adakd_kernels.ops import backend

INTERPRETING = backend("cpu").name == "triton-interpreter"

if INTERPRETING:
    from . import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of the interpreter alone cannot run in another process; one that is also `fast` runs on the reference."""
    reason = "runs the kernels in Triton's interpreter: start the process with TRITON_INTERPRET=1"
    for item in items:
        markers = {marker.name for marker in item.iter_markers()}
        if "interpret" in markers and "fast" not in markers and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason=reason))


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
        if out.is_floating_point() and out.device.type == "cpu" and type(out) is torch.Tensor:
            out.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def unpoisoned() -> None:
    """For tests that trace or compile, where `torch.empty` must stay itself."""
