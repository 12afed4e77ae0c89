"""Options and arguments that the driver refuses, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from adakd_kernels.integrations.transformers import AdaKDTrainer

from .tiny_models import tiny_model
from .trainer_process import config

pytestmark = pytest.mark.fast


def test_wrong_arguments(tmp_path: Path) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama", layers=2)
    with pytest.raises(TypeError, match="args must be an AdaKDConfig, got TrainingArguments"):
        AdaKDTrainer(model=model, teacher=teacher, args=TrainingArguments(output_dir=str(tmp_path)))
    with pytest.raises(TypeError, match="teacher must be a causal language model"):
        AdaKDTrainer(model=model, args=config(tmp_path))
    for missing in ({"model": model, "teacher": "/no/teacher"}, {"model": "/no/model", "teacher": teacher}):
        with pytest.raises(OSError, match=r"^(teacher '/no/teacher'|model '/no/model') cannot be loaded: "):
            AdaKDTrainer(args=config(tmp_path), **missing)
    with pytest.raises(ValueError, match="share parameters"):
        AdaKDTrainer(model=model, teacher=model, args=config(tmp_path))
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        AdaKDTrainer(model=model, teacher=teacher, args=config(tmp_path)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="a batch must have labels, got \\['input_ids'\\]"):
        AdaKDTrainer(model=model, teacher=teacher, args=config(tmp_path)).compute_loss(
            model, {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
        )

    class Split(AdaKDTrainer):
        def get_cp_size(self) -> int:
            return 2

    with pytest.raises(ValueError, match="needs whole sequences: set cp_size and sp_size"):
        Split(model=model, teacher=teacher, args=config(tmp_path))
    several = config(tmp_path)
    several._n_gpu = 2
    several.__dict__["_setup_devices"] = torch.device("cpu")
    with pytest.raises(ValueError, match="one GPU a process, but this process sees 2: start it with 'torchrun"):
        AdaKDTrainer(model=model, teacher=teacher, args=several)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of forward_kl, .*, got 'kl'"),
        ({"divergence_kwargs": {"alpha": 1}}, "divergence_kwargs .* do not fit 'reverse_kl': .*alpha"),
        (
            {"divergence": "jensen_shannon", "divergence_kwargs": '{"beta": 2}'},
            "beta must lie strictly between 0 and 1",
        ),
        ({"divergence_kwargs": "{beta"}, "divergence_kwargs must be JSON, got '{beta'"),
        ({"divergence_kwargs": "[1]"}, "divergence_kwargs must be a mapping"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be 1 or more, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be 1 or more, got 0"),
        ({"difficulty": "hard"}, "difficulty must be one of hellinger, .*, got 'hard'"),
        ({"temperature_scale": float("inf")}, "temperature_scale must be a finite number, got inf"),
        ({"base_temperature": 0.0}, "base_temperature must be > 0, got 0.0"),
        ({"ce_weight": 1.5}, r"ce_weight must be in \[0, 1\], got 1.5"),
        ({"focus_ratio": 0.0}, r"focus_ratio must be in \(0, 1\], got 0.0"),
        ({"focus_warmup_ratio": 2.0}, r"^focus_warmup_ratio must lie in \[0, 1\], got 2.0"),
        ({"focus_schedule": "cosine"}, r"^focus_schedule must be one of loss, linear, got 'cosine'"),
        (
            {"focus_schedule": "linear", "focus_ratio": 0.5},
            r"^focus_schedule 'linear' needs a share that changes, but focus_ratio is 0.5: leave one of the two out",
        ),
        ({"focus_min_ratio": 0.0}, r"^focus_min_ratio must lie in \(0, 1\], got 0.0"),
        ({"logits_route": "both"}, "logits_route must be one of auto, logits, hidden, got 'both'"),
        ({"selection": "batch"}, "selection must be one of micro_batch, step, got 'batch'"),
        ({"on_nan": "stop"}, "on_nan must be one of raise, skip, got 'stop'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)
