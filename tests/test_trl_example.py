"""examples/on_policy.py on a random model: the whole path, and what its report shows."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")

pytestmark = pytest.mark.fast

EXAMPLE = Path(__file__).parent.parent / "examples" / "on_policy.py"


def test_on_policy_with_and_without_adakd(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # the example sets it where it is not set
    main = runpy.run_path(str(EXAMPLE))["main"]
    sizes = ["--steps", "4", "--batch-size", "2", "--tokens", "6", "--held-out", "2", "--examples", "1"]
    results = main(["--tiny", "--learning-rate", "1e-2", "--output-dir", str(tmp_path), *sizes])
    assert results == json.loads((tmp_path / "on_policy.json").read_text())
    plain, adakd = (results[name] for name in ("plain", "AdaKD"))
    assert [line["step"] for line in plain["logs"]] == [line["step"] for line in adakd["logs"]] == [1, 2, 3, 4]
    # One student and one seed: what is sampled first is the same, and the losses of the same tokens are not.
    assert plain["logs"][0]["entropy"] == pytest.approx(adakd["logs"][0]["entropy"], rel=1e-5)
    assert plain["logs"][0]["loss"] != pytest.approx(adakd["logs"][0]["loss"], rel=1e-3)
    assert plain["reverse_kl"] < results["before"]["reverse_kl"]
    assert {"focus_ratio", "temperature_p50"} <= adakd["logs"][0].keys()
    shown = capsys.readouterr().out
    assert "| step | plain: loss | entropy | AdaKD: loss | entropy | share |" in shown
    assert "reverse KL (nats/token)" in shown and "[before] " in shown and "[AdaKD] " in shown
