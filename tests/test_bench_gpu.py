"""`make bench-gpu` without a GPU: the whole benchmark at a small size, in the interpreter with the real kernels."""

from __future__ import annotations

import io
import json

import pytest
import torch

from benchmarks import bench_gpu
from instruments.devices import Cpu

from .conftest import INTERPRETING


def records_of(monkeypatch, jobs=None):
    """The JSON lines of one small shape."""
    monkeypatch.setattr(bench_gpu, "random_states", lambda *a, **k: random_states(*a, **k, hidden=16))
    if jobs is not None:
        monkeypatch.setattr(bench_gpu, "jobs", lambda _: jobs)
    out = io.StringIO()
    bench_gpu.run(Cpu(), out, rounds=3, shapes=[(8, 257)], dtypes=[torch.float32])
    return [json.loads(line) for line in out.getvalue().splitlines()]


random_states = bench_gpu.random_states


@pytest.mark.fast
@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:ORDA:RuntimeWarning")
def test_every_provider_is_gated_and_measured(monkeypatch, unpoisoned):
    torch._dynamo.reset()
    records = records_of(monkeypatch)
    assert {record["job"] for record in records} == set(bench_gpu.jobs(Cpu()))
    for record in records:
        package = {"liger": "liger-kernel", "orda": "orda-kernel", "trl": "trl"}.get(record["provider"])
        if "failed" in record:  # a peer that is not installed, or whose kernels need the interpreter or a GPU
            assert package and (record["versions"][package] is None or not INTERPRETING), record
            continue
        assert record["error"] <= 1e-5
        assert 0 < record["milliseconds"]["p20"] <= record["milliseconds"]["median"] <= record["milliseconds"]["p80"]
        assert record["peak_bytes"] >= 0 and record["copy_gb_per_s"] > 0 and record["versions"]["torch"]
    ours = {(r["job"], r["provider"]): r for r in records if r["provider"].startswith("adakd")}
    unit = 8 * 257 * 4
    assert ours["adakd from logits", "adakd"]["bytes"] == 4 * unit
    if INTERPRETING:  # the reference of the fast tier keeps more
        new, inplace = (ours["forward_kl from logits", name]["peak_bytes"] for name in ("adakd", "adakd in place"))
        assert inplace < unit <= new < 2 * unit
    torch._dynamo.reset()


@pytest.mark.fast
def test_a_wrong_result_gets_no_time(monkeypatch, unpoisoned):
    job = bench_gpu.jobs(Cpu())["forward_kl from logits"]
    wrong = {"eager": bench_gpu.eager_kl, "off": lambda **inputs: 1.001 * bench_gpu.eager_kl(**inputs)}
    right, off = records_of(monkeypatch, {"forward_kl": bench_gpu.Job(job.make, job.wanted, wrong, job.passes)})
    assert "milliseconds" in right and "failed" not in right
    assert "milliseconds" not in off and "is above" in off["failed"]


@pytest.mark.fast
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would measure")
def test_the_command_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_gpu"])
    assert bench_gpu.main() == 1
    assert "no CUDA or ROCm device" in capsys.readouterr().err
