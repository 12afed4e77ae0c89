"""What models and losses take that are spread over GPUs, computed from sizes: bytes in memory, on the wire, seconds.

`python -m benchmarks.scale` prints the tables of docs/scale.md with more rows; with `--write` it writes those of the
page. A model and no measurement: `tests/test_scale.py` compares each formula of bytes with what is allocated and sent
at small sizes; seconds are bytes over a vendor's rate, without latency and overlap.

Bytes are those of one rank. Bytes on the wire are those that a rank receives, from collectives that move as little as
they can: a gather or a scattered sum (ranks − 1)/ranks of the whole tensor, a sum on all ranks twice that.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from adakd_kernels.divergences import Divergence, get_divergence
from adakd_kernels.ops.shards import PARTS

from .roofline import H100

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
# Bytes a second in one direction, from data sheets: NVIDIA's of the H100 SXM for NVLink 4, PCI-SIG's for 16 lanes of
# PCIe 5, and 400 Gb/s Ethernet or InfiniBand.
LINKS = {"NVLink 4": 450e9, "PCIe 5": 64e9, "400 Gb/s": 50e9}
GPU_MEMORY, LEFT_FREE = 80e9, 0.2
CHUNKS, WEIGHT_BLOCK = 2**30, 2**27  # bytes of the buffers of `linear_adakd_loss` on a GPU
MOST_BYTES = {"each": 330, "rank": 150}
"""While the numbers of a token are merged: bytes, and bytes for each rank."""
STATE = {"AdamW": 2, "SGD with momentum": 1, "SGD": 0}
"""Numbers that an optimizer keeps for each parameter."""
ADAPTER = 0.01  # of the parameters are those of an adapter, assumed


class Model(NamedTuple):
    """Sizes of a decoder with gated MLPs, as its configuration gives them."""

    hidden: int
    inner: int
    key_values: int  # width of the keys, and of the values
    layers: int
    vocab: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Parameters of a layer, without norms and biases."""
        return self.hidden * (2 * self.hidden + 2 * self.key_values + 3 * self.inner)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def root(self) -> int:
        """Parameters of embedding and head."""
        return self.embedding * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root


# The configurations of Qwen2.5 on the hub.
MODELS = {
    "1.5B": Model(1536, 8960, 256, 28, 151_936, tied=True),
    "7B": Model(3584, 18_944, 512, 28, 152_064),
    "14B": Model(5120, 13_824, 1024, 48, 152_064),
    "32B": Model(5120, 27_648, 1024, 64, 152_064),
    "72B": Model(8192, 29_568, 1024, 80, 152_064),
}


def columns(vocab: int, ranks: int) -> int:
    """The most columns that a rank has."""
    return -(-vocab // ranks)


# Memory of the loss.


def logits_memory(tokens: int, vocab: int, ranks: int = 1, itemsize: int = 2, inplace: bool = False) -> float:
    """Both models' logits, the gradient of the student's, and what is merged."""
    of_logits = (2 if inplace else 3) * tokens * columns(vocab, ranks) * itemsize
    return of_logits + merge_memory(tokens, ranks)


def hidden_memory(
    tokens: int, vocab: int, hidden: int, ranks: int = 1, itemsize: int = 2, chunks: int = CHUNKS,
    block: int = WEIGHT_BLOCK, trained_head: bool = True,
) -> float:  # fmt: skip
    """Chunks of logits, the gradients of hidden states and (in fp32) of the head, and what is merged."""
    row = columns(vocab, ranks) * itemsize
    of_chunks = min(chunks, (1.5 if ranks == 1 else 2.0) * tokens * row)
    of_head = (4 * columns(vocab, ranks) * hidden + min(block, hidden * row)) if trained_head else 0
    # Hidden states of a chunk are gathered, and their gradients made, before they are put in place.
    rows = min(tokens, of_chunks / row)
    return of_chunks + of_head + (tokens + 2 * rows) * hidden * itemsize + merge_memory(tokens, ranks)


def merge_memory(tokens: int, ranks: int) -> float:
    """The most that the numbers of the tokens take while those of all ranks are merged."""
    return tokens * (MOST_BYTES["each"] + MOST_BYTES["rank"] * ranks)


# Memory of the models.


def trained_memory(parameters: float, ranks: int = 1, itemsize: int = 4, optimizer: str = "AdamW") -> float:
    """Weights, gradients and what the optimizer keeps, split over the ranks."""
    return parameters * itemsize * (2 + STATE[optimizer]) / ranks


def frozen_memory(parameters: float, ranks: int = 1, itemsize: int = 2) -> float:
    return parameters * itemsize / ranks


def cast_memory(parameters: float, ranks: int = 1) -> float:
    """Autocast's copies of fp32 weights in bf16, kept for the backward. FSDP2 gathers weights in bf16 instead."""
    return 2 * parameters / ranks


def bucket_memory(parameters: float, itemsize: int = 4) -> float:
    """What DDP adds: the gradients once more, in the buckets that it sends."""
    return parameters * itemsize


def whole_units(root: float, layer: float, itemsize: int = 2, trained: bool = True) -> float:
    """The most that FSDP2 has in one piece of its root unit and of the layers, each of which is a unit.

    Of a frozen unit these are the weights as they arrive, and in their places; of a trained one, its weights, their
    gradient, and that gradient as it is sent. The next layer's weights come meanwhile, and the gradients of the one
    before may still be on their way.
    """
    if trained:
        return itemsize * max(2 * root + 3 * layer, root + 4 * layer)
    return itemsize * max(2 * root + 2 * layer, root + 3 * layer)


# Bytes on the wire.


def message_numbers(divergence: Divergence) -> tuple[int, ...]:
    """fp32 numbers a token in the messages of a loss over a vocabulary in parts."""
    # Two sums of masses, and two numbers of each divergence that is found, or both logits of the peak.
    second = 2 + 2 * len(PARTS.get(divergence.name, "-"))
    return (6, second) if divergence.sweeps == 1 else (6, second, 2)


def loss_wire(tokens: float, ranks: int, divergence: Divergence) -> float:
    """All tokens selected; from hidden states, the later messages are of the selected tokens alone."""
    return 4.0 * tokens * (ranks - 1) * sum(message_numbers(divergence))


def logits_wire(tokens: float, vocab: int, ranks: int, itemsize: int = 2) -> float:
    """To gather the logits of both models instead."""
    return part(ranks) * 2 * tokens * vocab * itemsize


def part(ranks: int) -> float:
    return (ranks - 1) / ranks


def ddp_wire(parameters: float, ranks: int, itemsize: int = 4) -> float:
    """Gradients are summed on all ranks, once a step."""
    return 2 * part(ranks) * parameters * itemsize


def fsdp_wire(parameters: float, ranks: int, itemsize: int = 2, trained: bool = True) -> float:
    """Of one micro-batch: weights gathered in the forward; in the backward again, and gradients summed into parts."""
    return (3 if trained else 1) * part(ranks) * parameters * itemsize


def head_wire(vocab: int, hidden: int, ranks: int, itemsize: int = 2) -> float:
    """The teacher's head, which the loss from hidden states needs after the teacher's forward."""
    return part(ranks) * vocab * hidden * itemsize


def tensor_parallel_wire(
    tokens: float, hidden: int, layers: int, ranks: int, itemsize: int = 2, trained: bool = True
) -> float:
    """Two sums of hidden states a layer in the forward, two in the backward, and one in front of the head."""
    sums = (4 * layers + 1) if trained else 2 * layers
    return 2 * part(ranks) * sums * tokens * hidden * itemsize


def streamed_wire(parameters: float, itemsize: int = 2) -> float:
    """Of one micro-batch, from CPU memory to each GPU: a frozen teacher."""
    return parameters * itemsize


def loss_traffic(
    tokens: float, vocab: int, ranks: int, divergence: Divergence, share: float = 1.0, itemsize: int = 2
) -> float:
    """What the loss itself reads and writes in a rank's memory from logits: (4r + 3)·U or (6r + 3)·U of its columns."""
    return ((2 + 2 * divergence.sweeps) * share + 3) * tokens * columns(vocab, ranks) * itemsize


# Which engine.


class Setting(NamedTuple):
    student: Model
    teacher: Model
    gpus: int
    tokens: int = 8192  # of a micro-batch, of a GPU or of all tensor-parallel ones


def loss_of(of: Setting, ranks: int = 1, trained_head: bool = True) -> float:
    student = of.student
    return hidden_memory(of.tokens, student.vocab, student.hidden, ranks, trained_head=trained_head)


def whole_student(of: Setting) -> float:
    size = of.student.parameters
    return trained_memory(size) + cast_memory(size) + (bucket_memory(size) if of.gpus > 1 else 0) + loss_of(of)


def sharded_student(of: Setting) -> float:
    student = of.student
    return trained_memory(student.parameters, of.gpus) + whole_units(student.root, student.layer) + loss_of(of)


def adapted_student(of: Setting) -> float:
    size = of.student.parameters
    return frozen_memory(size) + trained_memory(ADAPTER * size) + loss_of(of, trained_head=False)


def sharded_adapted_student(of: Setting) -> float:
    parts = frozen_memory(of.student.parameters, of.gpus)
    parts += whole_units(of.student.root, of.student.layer, trained=False)
    return parts + trained_memory(ADAPTER * of.student.parameters, of.gpus) + loss_of(of, trained_head=False)


def whole_teacher(of: Setting) -> float:
    return frozen_memory(of.teacher.parameters)


def sharded_teacher(of: Setting) -> float:
    teacher = of.teacher
    return frozen_memory(teacher.parameters, of.gpus) + whole_units(teacher.root, teacher.layer, trained=False)


def streamed_teacher(of: Setting) -> float:
    """On the GPU: a layer, or the head."""
    return frozen_memory(max(of.teacher.layer, of.teacher.embedding))


def tensor_parallel(of: Setting) -> float:
    """The plans of transformers leave the embedding whole."""
    student, teacher = (model.parameters - model.embedding for model in (of.student, of.teacher))
    split = trained_memory(student, of.gpus) + cast_memory(student, of.gpus) + frozen_memory(teacher, of.gpus)
    whole = trained_memory(of.student.embedding) + frozen_memory(of.teacher.embedding)
    return split + whole + loss_of(of, of.gpus)


Memory = Callable[[Setting], float]
ON_ONE: dict[str, tuple[Memory, Memory]] = {
    "whole ← whole": (whole_student, whole_teacher),
    "whole ← CPU": (whole_student, streamed_teacher),
    "LoRA ← whole": (adapted_student, whole_teacher),
    "LoRA ← CPU": (adapted_student, streamed_teacher),
}
ON_SEVERAL: dict[str, tuple[Memory, Memory]] = {
    "whole ← whole": (whole_student, whole_teacher),
    "sharded ← whole": (sharded_student, whole_teacher),
    "sharded ← sharded": (sharded_student, sharded_teacher),
    "sharded ← CPU": (sharded_student, streamed_teacher),
    "LoRA, sharded ← sharded": (sharded_adapted_student, sharded_teacher),
    "LoRA, sharded ← CPU": (sharded_adapted_student, streamed_teacher),
}
"""In the order in which they are to be tried; tensor parallelism is chosen for another reason."""


def fits(number: float) -> bool:
    return number <= (1 - LEFT_FREE) * GPU_MEMORY


def engine(of: Setting) -> str:
    """The first engine that fits, and what it takes."""
    for name, parts in (ON_ONE if of.gpus == 1 else ON_SEVERAL).items():
        taken = sum(memory(of) for memory in parts)
        if fits(taken):
            return f"{name}, {gigabytes(taken)}"
    return "–"


def both_wire(of: Setting) -> float:
    """Of one micro-batch from hidden states, student and teacher sharded."""
    student, teacher = of.student, of.teacher
    of_teacher = fsdp_wire(teacher.parameters, of.gpus, trained=False)
    of_teacher += head_wire(teacher.vocab, teacher.hidden, of.gpus)
    return fsdp_wire(student.parameters, of.gpus) + of_teacher


def equal_tokens(of: Setting) -> float:
    """Tokens of one micro-batch, of all GPUs together, for which FSDP2 and tensor parallelism send the same."""
    student, teacher = of.student, of.teacher
    each = tensor_parallel_wire(1, student.hidden, student.layers, of.gpus)
    each += tensor_parallel_wire(1, teacher.hidden, teacher.layers, of.gpus, trained=False)
    return both_wire(of) / each


# Tables.


def gigabytes(number: float) -> str:
    if number < 9.95e7:
        return f"{number / 1e6:.0f} MB"
    return f"{number / 1e9:,.0f} GB" if number >= 9.95e9 else f"{number / 1e9:.2g} GB"


def megabytes(number: float) -> str:
    return f"{number / 1e6:,.1f}" if number < 99.95e6 else f"{number / 1e6:,.0f}"


def milliseconds(number: float, rate: float) -> str:
    time = 1e3 * number / rate
    return f"{time:,.{3 if time < 1 else 1 if time < 100 else 0}f}"


def thousands(number: float) -> str:
    return f"{number / 2**10:,.0f}k" if number < 2**20 else f"{number / 2**20:,.0f}M"


PAIRS = [("1.5B", "7B"), ("7B", "14B"), ("7B", "72B"), ("14B", "32B"), ("14B", "72B"), ("32B", "72B"), ("72B", "72B")]


def engine_table(full: bool) -> Iterator[str]:
    gpus = (1, 2, 4, 8, 16, 64) if full else (1, 8, 64)
    yield "| student ← teacher | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in gpus) + " |"
    yield "|---|" + "---|" * len(gpus)
    pairs = [(a, b) for a in MODELS for b in MODELS if MODELS[b].parameters >= MODELS[a].parameters] if full else PAIRS
    for student, teacher in pairs:
        cells = (engine(Setting(MODELS[student], MODELS[teacher], n)) for n in gpus)
        yield f"| {student} ← {teacher} | " + " | ".join(cells) + " |"


def choice_table(full: bool) -> Iterator[str]:
    yield (
        "| student ← teacher | tensor parallelism holds | FSDP2 receives | over NVLink 4 | equal at tokens | "
        "teacher over PCIe 5 |"
    )
    yield "|---|--:|--:|--:|--:|--:|"
    every = [(a, b) for a in MODELS for b in MODELS if MODELS[b].parameters > MODELS[a].parameters]
    for student, teacher in every if full else PAIRS[1:5]:
        of = Setting(MODELS[student], MODELS[teacher], gpus=8)
        holds, sent = tensor_parallel(of), both_wire(of)
        cells = (
            gigabytes(holds) if fits(holds) else "–", gigabytes(sent), f"{sent / LINKS['NVLink 4']:.2f} s",
            f"{equal_tokens(of):,.0f}", f"{streamed_wire(of.teacher.parameters) / LINKS['PCIe 5']:.2f} s",
        )  # fmt: skip
        yield f"| {student} ← {teacher} | " + " | ".join(cells) + " |"


LOSSES = [(8192, 151_936, 1), (8192, 151_936, 8), (65_536, 151_936, 8), (2**20, 151_936, 64)]


def loss_table(full: bool) -> Iterator[str]:
    yield "| tokens | V | ranks | from logits | in place | from hidden states | of it merged |"
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    rows = [(n, v, r) for n in (8192, 65_536, 2**20) for v in (32_000, 151_936, 262_144) for r in (1, 2, 8, 64)]
    for tokens, vocab, ranks in rows if full else LOSSES:
        numbers = (
            logits_memory(tokens, vocab, ranks), logits_memory(tokens, vocab, ranks, inplace=True),
            hidden_memory(tokens, vocab, 4096, ranks), merge_memory(tokens, ranks),
        )  # fmt: skip
        yield f"| {thousands(tokens)} | {vocab:,} | {ranks} | " + " | ".join(map(gigabytes, numbers)) + " |"


WIRE = [
    (8192, 32_000, 2), (8192, 32_000, 8), (8192, 151_936, 2), (8192, 151_936, 8), (8192, 262_144, 8),
    (65_536, 32_000, 8), (65_536, 151_936, 8), (65_536, 151_936, 16), (65_536, 262_144, 64), (2**20, 32_000, 8),
    (2**20, 151_936, 8), (2**20, 262_144, 64),
]  # fmt: skip


def wire_table(full: bool, divergence: str = "reverse_kl") -> Iterator[str]:
    div = get_divergence(divergence)
    links = " | ".join(f"{name}, ms" for name in LINKS)
    yield f"| tokens | V | ranks | messages, MB | {links} | logits, MB | NVLink 4, ms | in memory, ms |"
    yield "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    rows = [
        (n, v, r) for n in (8192, 32_768, 131_072, 2**20) for v in (32_000, 128_256, 151_936, 262_144)
        for r in (2, 4, 8, 16, 32, 64)
    ]  # fmt: skip
    for tokens, vocab, ranks in rows if full else WIRE:
        sent, gathered = loss_wire(tokens, ranks, div), logits_wire(tokens, vocab, ranks)
        cells = [megabytes(sent), *(milliseconds(sent, rate) for rate in LINKS.values()), megabytes(gathered)]
        cells += [milliseconds(gathered, LINKS["NVLink 4"])]
        cells += [milliseconds(loss_traffic(tokens, vocab, ranks, div), H100.bandwidth)]
        yield f"| {thousands(tokens)} | {vocab:,} | {ranks} | " + " | ".join(cells) + " |"


TABLES: dict[str, Callable[[bool], Iterator[str]]] = {
    "engines": engine_table, "choice": choice_table, "losses": loss_table, "wire": wire_table,
}  # fmt: skip


def written(page: str) -> str:
    """The page with the tables of now between its markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- benchmarks/scale.py: {name} -->\n", "<!-- end -->"
        lines = "\n".join(table(False))
        page, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}{lines}\n{end}", page, flags=re.DOTALL)  # noqa: B023
        assert found == 1, name
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables of docs/scale.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(written(PAGE.read_text()))
        return 0
    for name, table in TABLES.items():
        print(f"{name} (computed)\n", *table(True), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
