"""docs/kernel-tables.md shows what the kernels compile to, and the launch table is what its command chooses."""

from __future__ import annotations

import importlib.metadata
import re

import pytest

from .conftest import INTERPRETING

pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")
if INTERPRETING:
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled in this process", allow_module_level=True)

import json
from dataclasses import replace

from adakd_kernels.kernels.launch import LAUNCH_TABLE, tiles_and_warps
from benchmarks import few_rows, kernel_table, launch_table
from benchmarks.launch_table import Launch
from benchmarks.roofline import GPUS, H100, bound, bytes_moved, clocks, over_memory
from instruments.compiled import KERNELS, Code, Loop

from .cases import TWO_SWEEPS

pytestmark = pytest.mark.compile

PAGE = kernel_table.PAGE.read_text()
made_with = re.search(r"^Triton (\S+), bf16", PAGE, re.MULTILINE)
same_triton = pytest.mark.skipif(
    made_with is None or made_with[1] != importlib.metadata.version("triton"),
    reason=f"the tables are those of Triton {made_with and made_with[1]}",
)


@same_triton
@pytest.mark.parametrize("kernel, divergence", [("stats", "hellinger"), ("forward", "skew_reverse_kl"),
                                                ("forward", "reverse_kl"), ("backward", "reverse_kl"),
                                                ("terms", "jensen_shannon")])  # fmt: skip
def test_tables_are_those_of_the_kernels(kernel, divergence):
    assert kernel_table.row_of(kernel, divergence) in PAGE
    assert kernel_table.row_of_targets(kernel, divergence, 50_257) in PAGE


@same_triton
def test_the_rows_of_split_rows_are_those_of_the_kernels():
    assert "\n".join(kernel_table.split_lines()) in PAGE


@same_triton
@pytest.mark.parametrize("kernel, divergence", [("forward", "skew_reverse_kl"), ("backward_ce", "skew_reverse_kl")])
def test_nothing_takes_a_tenth_longer_than_the_memory_by_the_model(kernel, divergence):
    """All kernels of the page but the second sweep alone, which is for a part of the vocabulary."""
    rows = re.findall(r"^\| (.*) \| `(\w+)` \| (.*) \|$", PAGE.split("## Beside the memory")[1], re.MULTILINE)[
        : len(KERNELS)
    ]
    ratios = {(name, div): [float(cell.split()[0]) for cell in cells.split(" | ")] for name, div, cells in rows}
    assert len(ratios) == len(KERNELS)
    assert max(max(x) for (name, _), x in ratios.items() if name != "`token_terms`") <= 1.1
    b200, _ = over_memory(kernel_table.in_bf16("sm_100", kernel, divergence), 4, GPUS["B200"])
    assert ratios[kernel_table.NAMES[kernel], divergence][-1] == round(b200, 2)


def test_few_rows_fill_the_gpu_by_the_model():
    """64 rows: the parts are as many as an H100 takes at once, and all launches of a call count, merges included."""
    parts = few_rows.parts_of(64)
    *whole, of_all = few_rows.shares("reverse_kl", 64, 1)
    *split, of_all_split = few_rows.shares("reverse_kl", 64, parts)
    assert parts == 8 and of_all < 0.55 and max(whole) < 0.7 and of_all_split > 0.8 and min(split) > 0.75


def test_every_kernel_has_a_row():
    for kernel, divergence in KERNELS:
        assert f"| {kernel_table.NAMES[kernel]} | `{divergence}` | " in PAGE


@same_triton
def test_the_rows_of_trl_are_those_of_its_kernels():
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'adakd-kernels[trl]'")
    if f"trl {trl.__version__} on sm_90" not in PAGE:
        pytest.skip("the table is that of another trl")
    assert "\n".join(kernel_table.trl_lines()) in PAGE


def test_few_kernels_are_bound_by_anything_but_memory():
    rows = re.findall(r"^\| (\S.*?) \| `(\w+)` \|.*\| ([a-z]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(KERNELS)
    beyond = {(name, div): resource for name, div, resource in rows if resource != "memory"}
    part = {("`token_terms`", div.name): "issue" for div in TWO_SWEEPS if div.name != "total_variation"}
    assert beyond == part


@pytest.mark.parametrize("which", [Launch("stats", "one_sweep", 2), Launch("forward", "both_kls", 2)], ids=str)
def test_launch_table_is_what_the_counts_choose(which):
    """A launch that the table does not name takes the default, one that it names the row that stands there."""
    chosen = {which: launch_table.by_counts("cuda", which)}
    table = launch_table.family_table("cuda", chosen)
    named = [row for row in LAUNCH_TABLE["cuda"]["exceptions"] if which._asdict().items() <= row.items()]
    assert table["default"] == LAUNCH_TABLE["cuda"]["default"]
    assert [{**row, "why": ""} for row in table["exceptions"]] == [{**row, "why": ""} for row in named]
    assert tuple(chosen[which][0].values()) == tiles_and_warps("cuda", *which)


def test_launch_table_names_launches_that_exist():
    for family, table in LAUNCH_TABLE.items():
        for row in table["exceptions"]:
            which = Launch(row["kernel"], row["divergences"], row["itemsize"])
            assert which in launch_table.LAUNCHES
            assert (row["tiles"], row["warps"]) == tiles_and_warps(family, *which) != tuple(table["default"].values())


def test_the_clock_chooses_the_candidate_whose_slowest_divergence_is_fastest():
    def measure(kernel, divergence, types, rows, vocab):
        row = tiles_and_warps("cuda", *which)  # the one on trial
        slow = divergence == "alpha_beta" and row == (1, 8)
        return {(2, 8): 5.0, (1, 8): 3.0, (2, 4): 4.0, (1, 4): 6.0}[row] + 9.0 * slow

    which, before = Launch("forward", "two_sweeps", 2), json.dumps(LAUNCH_TABLE)
    chosen = launch_table.by_clock("cuda", which, measure=measure)
    assert chosen[0] == {"tiles": 2, "warps": 4} and "{'tiles': 1, 'warps': 8} takes 12.00 ms" in chosen[1]
    (exception,) = launch_table.family_table("cuda", {which: chosen})["exceptions"]
    assert exception["tiles"] == 2 and exception["warps"] == 4
    assert json.dumps(LAUNCH_TABLE) == before


def test_the_model_adds_up():
    """One sweep of 16 entries a thread, 4 bytes each, at half of the SM's warps."""
    loop = Loop(
        instructions=16 * 64, pipes={"mufu": 32, "fma": 256, "alu": 128, "lsu": 4}, shuffles=0, barriers=0,
        loads={128: 4}, stores={}, masked=False,
    )  # fmt: skip
    code = Code(64, 0, 0, 0, 0, 0, loads={}, stores={}, loops=[loop], warps=8, shared_bytes=0)
    assert code.occupancy() == 0.5 and bytes_moved(code, 4) == 4.0
    assert clocks(code, 4) == {
        "memory": 4 * H100.clocks_a_byte / 0.9, "latency": 800 / (1024 * 16),
        "issue": 64 / 128, "fma": 16 / 128, "alu": 8 / 64, "mufu": 2 / 16, "lsu": 0.25 / 32,
    }  # fmt: skip
    assert bound(code, 4) == "issue"
    storing = replace(code, loops=[replace(loop, stores={128: 2})])
    assert bytes_moved(storing, 4) == 6.0
    ratios = [over_memory(code, 4, gpu) for gpu in GPUS.values()]
    assert ratios[1] == (clocks(code, 4)["issue"] / clocks(code, 4)["memory"], "issue")
    assert ratios[1][0] < ratios[2][0] < ratios[3][0]
