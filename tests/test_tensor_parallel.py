"""Tensor parallelism in the trainer: two ranks of split models against one process with whole ones.

The runs are those of `AdaKDTrainer` itself, on a CPU, and `torchrun … adakd train`: where accelerate's own check of a
parallelism would refuse a CPU, `AdaKDTrainer.create_accelerator_and_postprocess` sets it afterwards. Nothing of
accelerate or transformers is replaced here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adakd_kernels.cli import main
from adakd_kernels.trainer.tensor_parallel import check_ranks, split_as, split_over

pytest.importorskip("transformers.distributed.tensor_parallel", reason="this transformers splits models otherwise")

from .tensor_parallel_process import RUNS, SCENARIOS, resumed_trainer, run, skipped_run, weights
from .tiny_models import save_pair, tiny_model, write_jsonl
from .trainer_process import ROOT, config, of_both_ranks, once_for_all_workers

pytestmark = pytest.mark.fast


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_ranks(folder: Path) -> None:
    """Make the models of `RUNS`, and run `SCENARIOS` in two processes. Their files count, not how gloo ends."""
    for seed, name in enumerate(sorted({name for pair in RUNS.values() for name in pair[:2]})):
        kind, size = name.split("-")
        tiny_model(kind, vocab_size=int(size), seed=seed, kv_heads=2).double().save_pretrained(folder / name)
    command = [sys.executable, "-m", "tests.tensor_parallel_process", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": free_port()}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    left = {file.name for file in folder.glob("*.pt")}
    assert left == {f"{name}.rank{rank}.pt" for name in SCENARIOS for rank in (0, 1)}, process.stderr


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the models, and of what two ranks found with them."""
    return once_for_all_workers(tmp_path_factory, "tensor_parallel", run_ranks)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-9) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(value, other[name], rtol=1e-6, atol=atol) for name, value in one.items())


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_and_evaluate_as_one_process(name: str, ranks: Path, tmp_path: Path) -> None:
    expected = run(ranks, tmp_path, name, ranks=1)
    found = of_both_ranks(ranks, name)
    for got in found:
        assert len(got["gradients"]) == len(expected["gradients"]) == 3
        assert all(map(close, got["gradients"], expected["gradients"]))
        assert close(got["weights"], expected["weights"])
        assert close(got["predicted"], expected["predicted"])
        assert got["logs"] == [pytest.approx(log, rel=1e-6) for log in expected["logs"]]
        assert got["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6)
    one, other = found
    assert one["share"] == other["share"] < 1.0
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


def test_a_run_goes_on_from_its_checkpoint_split_and_whole(ranks: Path, tmp_path: Path) -> None:
    found = of_both_ranks(ranks, "resumed")
    expected = resumed_trainer(ranks, tmp_path / "one", ranks=1)
    expected.train()
    for got in found:
        assert close(got["resumed"], got["last"], atol=0.0) and not close(got["best"], got["last"])
        assert close(got["best"], weights(expected.model))
    checkpoint = ranks / "resumed" / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert close({name: found[0]["best"][name] for name in saved}, saved)
    whole = resumed_trainer(ranks, tmp_path / "whole", ranks=1)
    whole.args.load_best_model_at_end = False
    whole.train(str(checkpoint))
    assert close(weights(whole.model), found[0]["last"])


def test_micro_batches_that_are_nan_are_left_out_and_counted_once(ranks: Path, tmp_path: Path) -> None:
    expected = skipped_run(ranks, tmp_path, ranks=1)
    assert 0 < expected["skipped"][-1] < 4
    for got in of_both_ranks(ranks, "skipped"):
        assert got["skipped"] == expected["skipped"] and close(got["weights"], expected["weights"])


def test_no_logits_are_sent(ranks: Path) -> None:
    hidden = 16
    for sent in of_both_ranks(ranks, "wire"):
        assert sent["hidden"] <= hidden * sent["tokens"]  # the hidden states themselves, which the layers sum
        assert sent["logits"] >= 33 * sent["tokens"]


def test_a_rank_takes_the_rows_of_its_columns(ranks: Path) -> None:
    for rank, pairs in enumerate(of_both_ranks(ranks, "rows")):
        for (of_student, of_teacher), first, rows in pairs:
            step = -(-of_student // 2)
            assert first == min(rank * step, of_student)
            end = min(first + step, of_student, of_teacher)
            assert rows == list(range(first, end)), (of_student, of_teacher)


def test_what_cannot_be_taken_is_said(ranks: Path) -> None:
    expected = {
        "local logits": "of its 65 logits on this rank: plan its output layer as 'colwise_gather_output'",
        "head kept whole": "taken",
        "teacher's head split, student's whole": "the teacher's head is split over processes, and the student's is not",
        "head that doubles": "student: what its split head returns is not the product of hidden states and weight",
        "adapter on all layers": "got one on down_proj, o_proj: set lora_target_modules, or target_modules of the "
        "peft_config, to gate_proj k_proj q_proj up_proj v_proj",
        "adapter on the head": "by columns alone, got one on lm_head: set lora_target_modules",
        "split over 2 dimensions": "its head is split over a mesh of 2 dimensions (fsdp × tp)",
        "split along the inputs": "its head is split as (Shard(dim=1),), not along the vocabulary",
        "copied": "its head is split as (Replicate(),), not along the vocabulary",
    }
    for said in of_both_ranks(ranks, "judgements"):
        assert said.keys() == expected.keys()
        for what, text in expected.items():
            assert text in said[what], what


def test_models_that_are_split_in_different_ways_are_refused(tmp_path: Path) -> None:
    whole, two, four = (SimpleNamespace(_tp_size=size) for size in (None, 2, 4))
    none, same = (SimpleNamespace(tp_size=1, teacher_parallel=kind) for kind in ("none", "tp"))
    for student, teacher in ((whole, whole), (two, two), (two, whole)):
        check_ranks(student, teacher, none)
    check_ranks(two, two, same)
    assert split_as(two, "none") == split_over(1) == {}
    with pytest.raises(ValueError, match=r"teacher is split by tensor parallelism over 2 ranks, .* student over 1:"):
        check_ranks(whole, two, none)
    with pytest.raises(ValueError, match=r"over 4 ranks, which must all read the same records, but the student over 2"):
        check_ranks(two, four, none)
    with pytest.raises(ValueError, match="teacher_parallel is 'tp', but the teacher that is given is whole: give its"):
        check_ranks(two, whole, same)
    with pytest.raises(ValueError, match=r"teacher_parallel='tp' splits the teacher .* but the student is whole"):
        check_ranks(whole, whole, same)
    with pytest.raises(ValueError, match="tp_size is 2, but the model that is given is split over 1: give its folder"):
        check_ranks(whole, whole, SimpleNamespace(tp_size=2, teacher_parallel="none"))
    twice = SimpleNamespace(_tp_size=2, config=SimpleNamespace(distributed_config=SimpleNamespace(dp_size=2)))
    for pair in ((twice, whole), (two, twice)):
        with pytest.raises(ValueError, match=r"is split by tensor parallelism and by FSDP .*: load it with a tp_size"):
            check_ranks(*pair, none)
    with pytest.raises(ValueError, match="tp_size must be 1 or the number of processes, which is 1, got 2: start one"):
        config(tmp_path, tp_size=2)


@pytest.mark.parametrize("kind", ["data", "tensor"])
def test_adakd_train_on_two_ranks_gives_what_one_process_gives(kind: str, tmp_path: Path) -> None:
    student, teacher = save_pair(tmp_path, "llama", kv_heads=2)
    records, one, two = write_jsonl(tmp_path / "train.jsonl"), tmp_path / "one", tmp_path / "two"
    shared = [
        "train", "--student", str(student), "--teacher", str(teacher), "--train_file", str(records), "--eval_file",
        str(records), "--max_steps", "2", "--temperature_scale", "0", "--focus_ratio", "1", "--optim", "sgd",
        "--learning_rate", "0.1", "--report_to", "none", "--logging_steps", "1", "--save_strategy", "no", "--use_cpu",
        "--disable_tqdm", "true",
    ]  # fmt: skip
    options = ["--tp_size", "2", "--teacher_parallel", "tp", "--logits_route", "hidden"] if kind == "tensor" else []
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    batch = "2" if kind == "data" else "4"
    process = subprocess.run(
        [
            sys.executable, *launch, "-m", "adakd_kernels.cli", *shared, "--output_dir", str(two),
            "--per_device_train_batch_size", batch, *options,
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    # What is saved counts, not how gloo ends.
    assert (two / "trainer_state.json").exists(), process.stderr
    assert main([*shared, "--output_dir", str(one), "--per_device_train_batch_size", "4"]) == 0
    got, expected = (json.loads((folder / "all_results.json").read_text()) for folder in (two, one))
    for metric in ("train_loss", "eval_loss", "eval_forward_kl", "eval_reverse_kl", "eval_cross_entropy"):
        assert got[metric] == pytest.approx(expected[metric], rel=1e-5), metric
    assert close(load_file(two / "model.safetensors"), load_file(one / "model.safetensors"), atol=1e-6)
    AutoModelForCausalLM.from_pretrained(two)
