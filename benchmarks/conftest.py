"""What pytest-benchmark leaves of a run: a line of JSON for each operator, as the other benchmarks write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instruments.devices import Cpu, Gpu, device_of, quantiles

from .workloads import VOCABULARIES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="the folder of operators.jsonl, which is not written without it")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption("--model", default="qwen2", help=f"a vocabulary: {', '.join(VOCABULARIES)}, or any size")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--model")
    return name


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Gpu | Cpu:
    return device_of(request.config.getoption("--device"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    plugin = getattr(session.config, "_benchmarksession", None)
    folder = session.config.getoption("--results")
    if folder is None or plugin is None or not plugin.benchmarks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "operators.jsonl").open("w") as out:
        for found in plugin.benchmarks:
            ms = quantiles([seconds * 1e3 for seconds in found.stats.data])
            print(json.dumps({"benchmark": "operators", **found.extra_info, "ms": ms}), file=out)
