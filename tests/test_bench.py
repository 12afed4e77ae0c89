"""The benchmarks at a small size: what is measured, what is refused, what is written, and the pictures made of it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

from adakd_kernels import reference
from benchmarks import __main__ as command
from benchmarks import accuracy, compare, figures, frame, providers, workloads
from benchmarks.frame import Bench
from benchmarks.workloads import Workload
from instruments.devices import ROOT
from instruments.project_copy import copy_project, replace

from .conftest import SANITIZED
from .test_quality import made_up

SMALL = Workload(model="257", tokens=20, dtype="fp32", hidden=16)
EVERY_KIND = [
    SMALL,
    SMALL.but(divergence="jensen_shannon"),
    SMALL.but(loss="mean", divergence="jensen_shannon"),
    SMALL.but(route="hidden", loss="mean", dtype="bf16"),
    SMALL.but(route="hidden"),
]


@pytest.fixture
def traced(monkeypatch, unpoisoned):
    """torch.compile traces and guards as ever, and leaves out the C++ compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for compiled in (providers._compiled_difficulty, providers.compiled_gradient):
        compiled.cache_clear()
    yield
    torch._dynamo.reset()
    for compiled in (providers._compiled_difficulty, providers.compiled_gradient):
        compiled.cache_clear()


def silent(_: str) -> None:
    """Says nothing."""


def records_of(of, device="cpu", memory=False, **options):
    out = io.StringIO()
    found = Bench("peers", device, out, rounds=2, memory=memory, **options).run(of, say=silent)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == found
    return found


def check_records(found, device):
    names = {"liger_kernel": "liger-kernel", "trl": "trl", "orda_kernel": "orda-kernel"}
    for record in found:
        provider = providers.providers(figures.workload(record), device)[record["provider"]]
        if "failed" in record:  # a peer that is not installed, or whose kernels need a GPU
            missing = provider.package and record["versions"][names[provider.package]] is None
            assert missing or (provider.gpu_only and device == "cpu"), record
            assert "ms" not in record and ("not installed" if missing else "need a GPU") in record["failed"]
            continue
        assert record["error"] <= (0.05 if record["workload"]["dtype"] == "bf16" else 1e-5)
        assert 0 < record["ms"]["p20"] <= record["ms"]["median"] <= record["ms"]["p80"]
        assert ("cpu_ms" in record) == (device == "cpu")
        assert record["copy_gb_per_s"] > 0 and record["versions"]["torch"] and record["machine"] and record["date"]
    assert {r["provider"] for r in found if "ms" in r} >= {"eager", "ours in place", "ours hidden"}


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore")  # of peers
def test_every_provider_is_gated_and_measured(traced, monkeypatch):
    monkeypatch.setattr(frame, "copy_speed", lambda *_: 1e10)
    found = records_of(EVERY_KIND)
    check_records(found, "cpu")
    (floor,) = {r["floor_bytes"] for r in found if figures.workload(r) == SMALL}
    assert floor == (2 * 10 + 3 * 20) * 257 * 4  # (2r + 3)·U


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_every_provider_on_a_gpu(unpoisoned):
    check_records(records_of(EVERY_KIND, device="cuda"), "cuda")


@pytest.mark.fast
@pytest.mark.parametrize("of", [SMALL, SMALL.but(loss="mean", divergence="jensen_shannon")], ids=["adakd", "mean"])
def test_the_yardstick_is_the_reference_in_fp64(of):
    x = workloads.inputs(of, "cpu")
    loss, gradient = providers.exact("cpu")(x, of)
    student = x["student"].double().requires_grad_()
    if of.loss == "adakd":
        expected = reference.adakd_loss(student, x["teacher"].double(), x["labels"], of.divergence, of.share)
    else:
        expected = reference.token_divergence(student, x["teacher"].double(), 1.0, of.divergence).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, student.grad, rtol=0, atol=1e-14)


@pytest.mark.fast
def test_both_devices_have_the_mean_from_logits_that_a_formula_computes():
    for device in ("cpu", "cuda"):
        found = [w for w in workloads.peers(device, ["llama2"], [64], ["fp32"]) if w.route == "logits"]
        assert {w.divergence for w in found if w.loss == "mean"} == {"reverse_kl", "jensen_shannon"}


@pytest.mark.fast
def test_only_who_asks_for_it_replaces_the_lines_of_the_docs():
    committed = (ROOT / "benchmarks").resolve()
    assert not (ROOT / command.arguments([]).out).resolve().is_relative_to(committed)
    assert "--results benchmarks/results" not in (ROOT / "Makefile").read_text()


@pytest.mark.fast
def test_the_lines_of_another_folder_are_drawn_into_it_and_leave_the_docs_as_they_are(monkeypatch, tmp_path):
    assert figures.draw(tmp_path, tmp_path / "none") == []  # a folder may lack a benchmark
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda *folders: drawn.append(folders) or [])
    monkeypatch.setattr(figures, "write_tables", lambda: drawn.append("tables"))
    assert figures.main(["--results", str(tmp_path)]) == 0 and drawn == [(tmp_path, tmp_path)]


@pytest.mark.fast
def test_days_and_commits_of_all_lines_are_named():
    lines = [
        made_up("reverse_kl", 0, 0.0) | {"date": day, "commit": commit} for day, commit in (("d2", "c1"), ("d1", "c0"))
    ]
    assert figures.where(lines).endswith("d1, d2, commits c0, c1")


@pytest.mark.fast
def test_a_formula_of_the_user_is_measured_and_a_wrong_result_gets_no_time(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def right(s, t, labels):\n"
        "    q, p = s.float().log_softmax(-1), t.float().log_softmax(-1)\n"
        "    return (q.exp() * (q - p)).sum(-1).mean()\n"
        "def wrong(s, t, labels):\n    return 1.001 * right(s, t, labels)\n"
        "def broken(s, t, labels):\n    raise ValueError('not mine')\n"
    )
    places = tuple(f"{path}:{name}" for name in ("right", "wrong", "broken"))
    found = {r["provider"]: r for r in records_of([SMALL.but(loss="mean")], only=("eager",), formulas=places)}
    assert list(found) == ["eager", *places]
    right, wrong, broken = (found[place] for place in places)
    assert "ms" in right and "failed" not in right
    assert "ms" not in wrong and "is above" in wrong["failed"] and 0.0009 < wrong["error"] < 0.0011
    assert broken["failed"] == "ValueError: not mine"


@pytest.mark.native
@pytest.mark.skipif(SANITIZED, reason="a sanitizer keeps freed memory")
def test_memory_is_that_of_a_process_of_its_own():
    """Ours in place takes no memory of the size of the logits, ours one gradient; what does not fit is said to."""
    of = SMALL.but(model="32000", tokens=64)
    unit = 64 * 32_000 * 4
    (in_place,) = frame.peaks("ours in place", [of], "cpu", ())
    fits, too_large, fits_again = frame.peaks("ours", [of, of.but(tokens=2**40), of.but(tokens=32)], "cpu", ())
    assert in_place["peak_bytes"] < unit / 8
    assert unit <= fits["peak_bytes"] < 1.2 * unit and unit / 2 <= fits_again["peak_bytes"] < 0.7 * unit
    assert "peak_bytes" not in too_large and "RuntimeError" in too_large["failed"]


@pytest.mark.fast
def test_the_command_says_what_it_cannot_do(capsys, tmp_path):
    for arguments, expected in (
        (["nothing"], "no benchmark 'nothing'"),
        (["--models", "llama9"], "takes llama2, gpt2, llama3, qwen2, gemma or a number"),
        (["--rounds", "1"], "a spread takes two"),
        ([] if torch.cuda.is_available() else ["--device", "cuda"], "no CUDA or ROCm device"),
    ):
        if arguments:
            with pytest.raises(SystemExit):
                command.main(arguments)
            assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit, match="names none"):
        providers.formula(str(tmp_path / "absent.py:loss"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Lines of every benchmark that pictures and tables are made from."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--models", "101", "257", "--tokens", "8", "--dtypes", "fp32", "--rounds", "2", "--out", str(folder)]
    of = Workload(model="101", tokens=8, dtype="fp32")
    sweeps = [of, of.but(share=0.25), of.but(tokens=16), of.but(model="257"), of.but(threads=1)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(frame, "peaks", lambda provider, of, *_: [{"peak_bytes": 10**6} for _ in of])
        patched.setattr(frame, "copy_speed", lambda *_: 1e10)
        patched.setattr(workloads, "scaling", lambda *_: sweeps)
        patched.setattr(accuracy, "DISTANCES", [2.0**-12, 0.25, 4.0])
        patched.setattr(accuracy, "BATCHES", 1)
        patched.setattr(accuracy, "VOCAB", 64)
        assert command.main([*arguments, "--providers", "eager", "ours in place", "ours hidden"]) == 0
    # A worker of xdist says so in the environment, and pytest-benchmark then measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    run = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--model", "64", "--results", str(folder)]
    run += ["-k", "token_stats and fp32-fp32-reverse", "-p", "no:cacheprovider"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    lines = [made_up(arm, seed, 0.0) for arm in ("reverse_kl", "adakd") for seed in (0, 1)]
    (folder / "quality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.fast
def test_pictures_and_tables_go_stale_with_their_data(results, tmp_path):
    (tmp_path / "docs").mkdir()
    for page in {page for page, _ in figures.TABLES}:
        names = [name for of, name in figures.TABLES if of == page]
        (tmp_path / page).write_text("\n".join(f"before\n<!-- figures: {name}  -->\n<!-- end -->" for name in names))
    assert len(figures.stale(tmp_path, results)) == 2 * len(figures.DRAW) + len(figures.TABLES)
    figures.draw(results, tmp_path / "docs" / "pictures")
    figures.write_tables(tmp_path, results)
    assert figures.stale(tmp_path, results) == []
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("before\n") and "| 257 | fp32 |" in page

    written = page.replace("–", "– ", 1)  # a number that somebody edits by hand
    (tmp_path / "README.md").write_text(written)
    assert figures.stale(tmp_path, results) == ["README.md: first"]
    (tmp_path / "README.md").write_text(page)
    newer = shutil.copytree(results, tmp_path / "newer")
    text = (newer / "accuracy.jsonl").read_text()
    (newer / "accuracy.jsonl").write_text(text.replace("e-", "e-0", 1))  # the same number, written anew
    assert figures.stale(tmp_path, newer) == ["accuracy-light.svg", "accuracy-dark.svg"]


@pytest.mark.fast
def test_pictures_and_tables_are_of_the_data_that_is_here():
    assert figures.stale() == [], "run `make figures`"


@pytest.mark.fast
def test_accuracy_goes_from_nearly_equal_to_distant_rows(results):
    lines = figures.lines_of("accuracy", results)
    assert {r["workload"]["dtype"] for r in lines} == {"fp32", "bf16", "fp16"}
    for record in lines:
        divergences = [point["divergence"] for point in record["points"]]
        assert divergences == sorted(divergences) and divergences[0] < 1e-6 and divergences[-1] > 1
        if record["workload"]["dtype"] == "fp32":
            assert record["points"][-1]["loss"] < 1e-5 and record["points"][-1]["gradient"] < 1e-5


@pytest.mark.fast
def test_two_versions_are_compared_each_in_its_own_process(tmp_path, monkeypatch):
    """A version that waits is slower by that much, and one that lacks the function is said to."""
    monkeypatch.setenv("ADAKD_NATIVE", "0")
    slow = tmp_path / "slow"
    slow.mkdir()
    copy_project(slow)
    entrance = "    return loss_of_logits(\n        student_logits, teacher_logits, labels, divergence=divergence"
    wasted = "    total = sum(range(3_000_000))\n    assert total\n"
    replace(slow / "adakd_kernels" / "functional.py", entrance, wasted + entrance)
    replace(slow / "adakd_kernels" / "linear" / "function.py", "def linear_adakd_loss(\n", "def linear_adakd_loss(x, ")
    found, failed = compare.ratios(ROOT, slow, [SMALL, SMALL.but(route="hidden")], 3, "cpu", say=silent)
    assert found["new_over_base"]["median"] > 3 and found["ms"]["new"] > found["ms"]["base"] + 20
    assert 0.2 < found["base_over_base"]["median"] < 3
    assert set(failed["failed"]) == {"new"} and "TypeError" in failed["failed"]["new"]


@pytest.mark.fast
def test_a_base_that_is_no_commit_is_refused(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed: a base is one of its commits")
    with pytest.raises(SystemExit, match="is no commit of this repository"):
        compare.check_out("no-such-commit", tmp_path / "base")
