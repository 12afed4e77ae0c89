"""The formulas of `benchmarks/scale.py` beside what is allocated and sent at small sizes, its page and its example.

Memory of the losses is that of the C++ kernels (native), traffic that of the Triton kernels (interpret), the rest is
fast. Two processes run `tests/scale_process.py`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adakd_kernels import VocabParallel, adakd_loss, linear_adakd_loss
from adakd_kernels.divergences import get_divergence
from adakd_kernels.linear import chunks, heads
from benchmarks import scale
from instruments.devices import Cpu, produced

from .cases import DIVERGENCES, logits, name_of, tokens
from .scale_process import TOKENS, WIDTHS, fsdp
from .simulated_ranks import on_ranks

fast, native, interpret = pytest.mark.fast, pytest.mark.native, pytest.mark.interpret
ROOT = Path(__file__).parent.parent


class AllAlike(VocabParallel):
    """The first of so many ranks with equal shards; the number stands in the group's place."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def ranks(self) -> int:
        return self.group

    def gather(self, numbers):
        return numbers.expand(self.ranks, *numbers.shape).clone()

    def add_up(self, values):
        values *= self.ranks


@pytest.fixture
def without_processes(monkeypatch):
    monkeypatch.setattr("adakd_kernels.vocab_parallel.check_vocab_parallel", lambda value: None)


def shard_of(ranks: int, columns: int) -> VocabParallel | None:
    """Columns of a vocabulary of so many on each rank; None for one rank."""
    return AllAlike(ranks, 0, ranks * columns) if ranks > 1 else None


def assert_covers(formula: float, measured: float, slack: float) -> None:
    assert measured <= formula <= (1 + slack) * measured, (formula, measured)


# Memory of the losses.


@native
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("inplace", [False, True])
def test_memory_from_logits(inplace, ranks, without_processes):
    n, columns = 300, 5000
    student, teacher, labels = logits(n, columns, seed=1), logits(n, columns, seed=2), tokens(columns, n)

    def run():
        leaf = produced(student.requires_grad_())
        adakd_loss(leaf, teacher, labels, inplace=inplace, vocab_parallel=shard_of(ranks, columns)).loss.backward()

    run()
    measured = student.nbytes + teacher.nbytes + Cpu().peak_bytes(run)
    assert_covers(scale.logits_memory(n, ranks * columns, ranks, 4, inplace), measured, 0.03)


@native
@pytest.mark.parametrize("ranks", [2, 16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys", "alpha_beta"])
def test_memory_of_what_is_merged(divergence, ranks, without_processes):
    n = 4000
    student, teacher, labels = logits(n, 3, seed=1), logits(n, 3, seed=2), tokens(3, n)
    options = {"divergence": divergence, "inplace": True, "vocab_parallel": shard_of(ranks, 3)}

    def run():
        adakd_loss(produced(student.requires_grad_()), teacher, labels, **options).loss.backward()

    run()
    assert_covers(scale.merge_memory(n, ranks), Cpu().peak_bytes(run), 0.6)


@native
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("trained_head", [True, False])
def test_memory_from_hidden_states(trained_head, ranks, without_processes, monkeypatch):
    n, columns, hidden, budget = 3000, 4000, 48, 2**23
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", budget)
    monkeypatch.setitem(heads.BLOCK_BYTES, "cpu", 2**18)
    states, weight = logits(n, hidden, seed=1), logits(columns, hidden, seed=2).requires_grad_(trained_head)
    teacher_states, teacher_weight, labels = logits(n, hidden, seed=3), logits(columns, hidden, seed=4), tokens(9, n)

    def run():
        leaf = states.detach().requires_grad_()
        return linear_adakd_loss(
            leaf, weight, teacher_states, teacher_weight, labels, vocab_parallel=shard_of(ranks, columns)
        )

    run()
    formula = scale.hidden_memory(n, ranks * columns, hidden, ranks, 4, budget, 2**18, trained_head)
    assert_covers(formula, Cpu().peak_bytes(run), 0.35)


# Memory of models.


@fast
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("AdamW", torch.optim.AdamW),
        ("SGD with momentum", partial(torch.optim.SGD, momentum=0.9)),
        ("SGD", torch.optim.SGD),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_trained_model(dtype, name, optimizer):
    model = nn.Linear(100, 50, bias=False).to(dtype)
    stepping = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 100, dtype=dtype)).sum().backward()
    stepping.step()
    kept = [x for state in stepping.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim()]
    held = sum(x.nbytes for x in (model.weight, model.weight.grad, *kept))
    assert held == scale.trained_memory(5000, 1, dtype.itemsize, name)
    assert model.weight.nbytes == scale.frozen_memory(5000, 1, dtype.itemsize)


@fast
def test_memory_of_autocast():
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(3)))
    states, held = torch.ones(1, 1000), []

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            held.append(model(states))

    run()
    assert Cpu().peak_bytes(run) == pytest.approx(scale.cast_memory(3 * 1000 * 1000), rel=0.05)


@fast
def test_sizes_of_models():
    transformers = pytest.importorskip("transformers")
    for tied in (False, True):
        config = transformers.Qwen2Config(
            vocab_size=700, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
        of = scale.Model(64, 96, 32, 3, 700, tied)
        assert matrices == of.parameters
        assert of.layer == sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    published = {"1.5B": 1.54e9, "7B": 7.61e9, "14B": 14.7e9, "32B": 32.5e9, "72B": 72.7e9}
    assert {name: of.parameters for name, of in scale.MODELS.items()} == pytest.approx(published, rel=0.01)


@fast
def test_bytes_of_a_streamed_teacher(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    model, moved = nn.Sequential(*(nn.Linear(30, 30, bias=False) for _ in range(4))), []
    accelerate.cpu_offload(model, torch.device("cpu"))
    put = accelerate.hooks.set_module_tensor_to_device

    def spy(module, name, device, *args, **kwargs):
        if torch.device(device).type != "meta":
            moved.append(kwargs["value"].nbytes)
        return put(module, name, device, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", spy)
    model(torch.ones(2, 30))
    assert sum(moved) == scale.streamed_wire(4 * 30 * 30, 4)


# Two processes.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes found."""
    from .test_documentation import PAGES, blocks

    folder = tmp_path_factory.mktemp("scale")
    (folder / "page.py").write_text("\n".join(blocks("python", PAGES["docs/scale.md"])))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.scale_process", str(folder)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    files = [folder / f"scale.rank{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), process.stderr
    return [torch.load(file) for file in files]


@fast
def test_fsdp(ranks):
    for found in (of_rank["fsdp"] for of_rank in ranks):
        size, root, _ = found["sizes"].values()
        assert found["student"]["received"] == scale.fsdp_wire(size, 2, 4)
        assert found["student"]["state"] == scale.trained_memory(size, 2)
        assert found["teacher"]["received"] == scale.fsdp_wire(size, 2, 4, trained=False)
        assert found["teacher"]["head"] == scale.head_wire(root // 2, 1, 2, 4)


@fast
@pytest.mark.parametrize("shape", [(2000, 32, 64), (24, 64, 1024), (512, 64, 128)])
def test_memory_of_fsdp(shape):
    """At 8 ranks that send nothing: gloo's threads free what they sent some time later, which no GPU does."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="this torch has no fake group")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=8)
    try:
        found = fsdp(*shape, peak=True)
    finally:
        dist.destroy_process_group()
    size, root, layer = found["sizes"].values()
    assert found["student"]["received"] == scale.fsdp_wire(size, 8, 4)
    peaks = [
        scale.trained_memory(size, 8) + scale.whole_units(root, layer, 4),
        scale.frozen_memory(size, 8, 4) + scale.whole_units(root, layer, 4, trained=False),
    ]
    for peak, side in zip(peaks, ("student", "teacher"), strict=True):
        # Beside it there are activations of a few tokens.
        assert_covers(1.02 * peak, found[side]["peak"], 0.12)


@fast
def test_ddp(ranks):
    for found in (of_rank["ddp"] for of_rank in ranks):
        size = found["sizes"]["parameters"]
        # Beside the gradients it sends a few numbers of its own.
        assert found["received"] == pytest.approx(scale.ddp_wire(size, 2), abs=100)
        assert found["state"] == scale.trained_memory(size)
        assert found["buckets"] == pytest.approx(scale.bucket_memory(size), rel=1e-3)


@fast
def test_tensor_parallelism(ranks):
    for found in (of_rank["tp"] for of_rank in ranks):
        sizes = (TOKENS, WIDTHS[0], found["layers"], 2, 4)
        assert found["teacher"] == scale.tensor_parallel_wire(*sizes, trained=False)
        loss = scale.loss_wire(TOKENS, 2, get_divergence("reverse_kl"))
        assert found["student and loss"] == scale.tensor_parallel_wire(*sizes) + loss


@fast
def test_the_example_has_equal_losses_on_both_ranks(ranks):
    one, other = (of_rank["example"] for of_rank in ranks)
    assert one == other and one.keys() == {"hidden", "logits"}
    for losses in one.values():
        assert len(losses) == 3 and all(first == second > 0 for first, second in losses)
        assert losses[-1][0] < losses[0][0]
    hidden, of_logits = (torch.tensor(losses) for losses in one.values())
    assert torch.allclose(hidden, of_logits, rtol=1e-5)


# Messages and traffic of the loss.


def received_messages(ranks, n, **options):
    """Bytes that a rank receives from the others in a loss of n tokens."""
    vocab = 40
    student, teacher, labels = logits(n, vocab, seed=1), logits(n, vocab, seed=2), tokens(vocab, n)

    def loss(rank, columns):
        return adakd_loss(student[:, columns], teacher[:, columns], labels, vocab_parallel=rank, **options)

    _, meeting = on_ranks([rank * vocab // ranks for rank in range(ranks + 1)], vocab, loss)
    return (ranks - 1) * sum(numbers.nbytes for numbers in meeting.sent)


@fast
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_bytes_of_the_messages(divergence, ranks, without_processes):
    assert received_messages(ranks, 7, divergence=divergence) == scale.loss_wire(7, ranks, divergence)


@fast
@pytest.mark.parametrize(("difficulty", "more"), [("cross_entropy", 0), ("forward_kl", 1), ("jensen_shannon", 6)])
def test_what_another_difficulty_sends(difficulty, more, without_processes):
    by_default = scale.loss_wire(7, 2, get_divergence("reverse_kl"))
    assert received_messages(2, 7, difficulty=difficulty) == by_default + 4 * 7 * more


@fast
def test_bytes_of_gathered_logits():
    """Those of the issue's measure: 8,192 tokens, V = 151,936, 8 ranks."""
    whole = torch.empty(8192, 151_936, dtype=torch.bfloat16, device="meta")
    assert scale.logits_wire(8192, 151_936, 8) == 2 * (whole.nbytes - whole.chunk(8, -1)[0].numel() * 2)


@interpret
@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys", "hellinger", "jensen_shannon"])
def test_traffic_of_a_shard(divergence, without_processes):
    from instruments.traffic import counting

    n, columns = 4, 1003
    student = logits(n, columns, dtype=torch.bfloat16, seed=1)
    teacher = logits(n, columns, dtype=torch.bfloat16, seed=2)
    leaf = produced(student.requires_grad_())
    options = {"divergence": divergence, "focus_ratio": 0.5, "vocab_parallel": AllAlike(2, 0, 2 * columns)}
    with counting() as traffic:
        adakd_loss(leaf, teacher, tokens(columns, n), **options).loss.backward()
    # The entries of one lane are read once more for the peak.
    formula = scale.loss_traffic(n, 2 * columns, 2, get_divergence(divergence), 0.5)
    assert formula <= sum(traffic.passes()) <= 1.06 * formula
    assert not traffic.faults()


# The page.

# Sizes of which each is told from the others in a result.
SIZES = {
    "N": 6, "V": 640, "T": 4, "b": 4, "m": 5580, "P": 1000, "R": 300, "L": 70, "s": 2, "H": 48, "K": 3, "r": 0.5,
    "C": 2000, "B": 9000,
}  # fmt: skip
ONE_SWEEP, TWO_SWEEPS = get_divergence("reverse_kl"), get_divergence("jensen_shannon")
FORMULAS = {
    "logits, and gradient": scale.logits_memory(6, 640, 4, 4),
    "with `inplace=True`": scale.logits_memory(6, 640, 4, 4, inplace=True),
    "from hidden states, C bytes of logits at a time": scale.hidden_memory(6, 640, 48, 4, 4, 2000, 9000),
    "numbers of all ranks, while they are merged: m": scale.merge_memory(6, 4),
    "student: weights, gradients, optimizer state": scale.trained_memory(1000, 4, 4),
    "autocast's copies of fp32 weights; not with FSDP2": scale.cast_memory(1000, 4),
    "DDP's buckets": scale.bucket_memory(1000, 4),
    "teacher": scale.frozen_memory(1000, 4, 4),
    "FSDP2's whole units of a student": scale.whole_units(300, 70, 4),
    "FSDP2's whole units of a teacher": scale.whole_units(300, 70, 4, trained=False),
    "**received**: messages of the loss": {
        10: scale.loss_wire(6, 4, ONE_SWEEP), 12: scale.loss_wire(6, 4, TWO_SWEEPS),
    },
    "instead, both models' logits": scale.logits_wire(6, 640, 4, 4),
    "DDP, a step": scale.ddp_wire(1000, 4, 4),
    "FSDP2, a micro-batch of the student": scale.fsdp_wire(1000, 4, 4),
    "FSDP2, a micro-batch of the teacher": scale.fsdp_wire(1000, 4, 4, trained=False),
    "from hidden states, the teacher's head once more": scale.head_wire(640, 48, 4, 4),
    "tensor parallelism, student": scale.tensor_parallel_wire(6, 48, 3, 4, 4),
    "tensor parallelism, teacher": scale.tensor_parallel_wire(6, 48, 3, 4, 4, trained=False),
    "teacher in CPU memory": scale.streamed_wire(1000, 4),
    "**read and written** by the loss from logits": {
        1: scale.loss_traffic(6, 640, 4, ONE_SWEEP, 0.5, 4), 2: scale.loss_traffic(6, 640, 4, TWO_SWEEPS, 0.5, 4),
    },
}  # fmt: skip


@fast
def test_the_formulas_of_the_page_are_those_of_the_functions():
    rows = re.findall(r"^\| (.*) \| `(\w+)` \| `(.*)` \|$", scale.PAGE.read_text(), re.MULTILINE)
    assert [what for what, *_ in rows] == list(FORMULAS)
    for what, function, formula in rows:
        assert callable(getattr(scale, function))
        values = FORMULAS[what]
        for number, value in values.items() if isinstance(values, dict) else [(0, values)]:
            assert eval(formula.replace("·", "*"), {**SIZES, "c": number, "w": number}) == value, what


@fast
def test_the_tables_of_the_page_are_those_of_the_formulas():
    page = scale.PAGE.read_text()
    assert scale.written(page) == page


@fast
def test_the_command_prints_more_than_the_page(capsys):
    assert scale.main([]) == 0
    printed = capsys.readouterr().out
    for table in scale.TABLES.values():
        assert len(list(table(True))) > len(list(table(False)))
        assert all(line in printed for line in table(True))
