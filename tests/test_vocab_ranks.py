"""Vocabulary-parallel losses in four processes: what is sent, DTensors, groups of two, three and four."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adakd_kernels import adakd_loss, linear_adakd_loss, token_difficulty, token_divergence

from .vocab_process import NAMES, OPTIONS, RANKS, TOKENS, batch

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the processes left."""
    folder = tmp_path_factory.mktemp("vocab_ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.vocab_process", str(folder)],
            cwd=Path(__file__).parent.parent,
            env={**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    # gloo may abort while a process ends, after everything is written.
    assert all((folder / f"dtensors.rank{rank}.pt").exists() for rank in range(RANKS)), said
    return folder


def of_ranks(folder, kind, ranks):
    return [torch.load(folder / f"{kind}.rank{rank}.pt") for rank in range(ranks)]


def whole(divergence):
    """Losses and gradients of whole rows in fp64, from logits and from hidden states."""
    of = {name: x.double() if x.is_floating_point() else x for name, x in batch().items()}
    student = of["student"].requires_grad_()
    from_logits = adakd_loss(student, of["teacher"], of["labels"], divergence=divergence, **OPTIONS)
    from_logits.loss.backward()
    leaves = [of[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    from_hidden = linear_adakd_loss(
        *leaves[:2], of["teacher_hidden"], of["teacher_weight"], of["labels"], student_bias=leaves[2],
        divergence=divergence, **OPTIONS,
    )  # fmt: skip
    from_hidden.loss.backward()
    return {"logits": (from_logits, [student.grad]), "hidden": (from_hidden, [leaf.grad for leaf in leaves])}


def assert_gradients(found, exact):
    for grad, right in zip(found, exact, strict=True):
        assert (grad.double() - right).norm() <= 2e-6 * right.norm()
        assert abs((grad.double() * right).sum() / right.square().sum() - 1.0) <= 1e-6


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_local_shards(folder, ranks, divergence):
    exact = whole(divergence)
    found = [of_rank[divergence] for of_rank in of_ranks(folder, f"local.{ranks}", ranks)]
    for route in ("logits", "hidden"):
        out, grads = exact[route]
        for of_rank in found:
            assert all(torch.equal(a, b) for a, b in zip(of_rank[route]["out"], found[0][route]["out"], strict=True))
        assert torch.allclose(found[0][route]["out"][0].double(), out.loss, rtol=1e-6, atol=0.0)
        assert torch.equal(found[0][route]["out"][4], out.selected)
        if route == "logits":
            assert_gradients([torch.cat([of_rank[route]["grads"][0] for of_rank in found], dim=-1)], grads)
            continue
        for of_rank in found:  # the sum of the hidden states' gradients is on every rank
            assert_gradients([of_rank[route]["grads"][0]], grads[:1])
        rows = [torch.cat([of_rank[route]["grads"][i] for of_rank in found]) for i in (1, 2)]
        assert_gradients(rows, grads[1:])


@pytest.mark.parametrize("divergence", NAMES)
def test_what_is_sent(folder, divergence):
    """Message 1 of six numbers a token; then one or two, a chunk from hidden states; nothing in the backward."""
    numbers = {"reverse_kl": [6, 4], "jeffreys": [6, 6], "jensen_shannon": [6, 4, 2]}[divergence]
    valid = int((batch()["labels"] != -100).sum())
    for of_rank in of_ranks(folder, "local.3", 3):
        sent = of_rank[divergence]
        assert [size for _, size in sent["logits"]["forward"]] == [TOKENS * count for count in numbers]
        assert all("allgather" in name for name, _ in sent["logits"]["forward"])
        *messages, (name, size) = sent["hidden"]["forward"]
        assert name.startswith("allreduce")
        assert size == valid * batch()["hidden"].shape[-1]  # of the tokens that have a gradient
        chunks = (16, valid - 16)
        assert [size for _, size in messages] == [
            6 * valid, *(count * of_chunk for of_chunk in chunks for count in numbers[1:])
        ]  # fmt: skip
        assert sent["logits"]["backward"] == sent["hidden"]["backward"] == []


@pytest.mark.parametrize("divergence", NAMES)
def test_dtensors(folder, divergence):
    exact, of = whole(divergence), batch()
    for of_rank in of_ranks(folder, "dtensors", RANKS):
        found = of_rank[divergence]
        for route in ("logits", "hidden"):
            out, grads = exact[route]
            assert torch.allclose(found[route]["out"][0].double(), out.loss, rtol=1e-6, atol=0.0)
            assert_gradients(found[route]["grads"], grads)
            assert all("allgather" in name for name, _ in found[route]["forward"])
        assert_gradients([found["sum of the parts"]], exact["hidden"][1][:1])
        each, difficulty = found["values"]
        student, teacher = of["student"].double(), of["teacher"].double()
        assert torch.allclose(each.double(), token_divergence(student, teacher, 2.0, divergence), rtol=1e-5)
        assert torch.allclose(difficulty.double(), token_difficulty(student, teacher), rtol=1e-5)


def test_errors(folder):
    said = of_ranks(folder, "dtensors", 1)[0]["errors"]
    expected = (
        "TypeError: teacher_logits must be a DTensor as the other one is, got Tensor",
        "ValueError: teacher_logits must be a DTensor on a mesh of one dimension, split along the vocabulary",
        "ValueError: student_logits and teacher_logits must be split at the same entries of the vocabulary, but 83 and",
        "TypeError: vocab_parallel must be None where logits are DTensors, which say where they lie",
        "TypeError: vocab_parallel.group must be a process group or None, got str",
        "ValueError: student_logits must have here the 21 of 83 entries that Shard gives rank 0 of 4, got 40",
        "ValueError: student_logits must not be a leaf that requires grad, or a view of one, with inplace=True",
        "ValueError: student_logits must not be a leaf that requires grad, or a view of one, with inplace=True",
        "TypeError: labels must be a plain tensor, the same on all ranks, got a DTensor: pass its full_tensor()",
        "TypeError: mask must be a plain tensor, the same on all ranks",
        "TypeError: num_items must be a plain tensor, the same on all ranks",
        "ValueError: reduce_hidden must be False where student_hidden is a DTensor, which adds up its gradient",
        *["TypeError: student_weight must give plain logits of the whole vocabulary"] * 2,
    )
    assert len(said) == len(expected)
    for text, beginning in zip(said, expected, strict=True):
        assert text.startswith(beginning), text
