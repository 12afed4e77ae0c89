"""Ranks as threads of one process, which meet where ranks exchange numbers: for what does not depend on processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adakd_kernels import VocabParallel


class Meeting:
    """Where the ranks exchange their numbers, and what they sent there."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.sent: list[Tensor] = []  # of the first rank
        self.turn = threading.Lock()  # one rank computes at a time: Triton's interpreter takes no threads
        self._barrier = threading.Barrier(ranks)
        self._slots: list[Any] = [None] * ranks

    def gather(self, rank: int, numbers: Tensor) -> Tensor:
        self._slots[rank] = numbers.clone()
        self._meet()
        gathered = torch.stack(self._slots)
        if rank == 0:
            self.sent.append(numbers)
        self._meet()
        return gathered

    def _meet(self) -> None:
        self.turn.release()
        try:
            self._barrier.wait(300)
        finally:
            self.turn.acquire()

    def leave(self) -> None:
        """Let nobody wait for a rank that has failed."""
        self._barrier.abort()


class SimulatedRank(VocabParallel):
    """A `VocabParallel` whose group is (meeting, rank)."""

    @property
    def rank(self) -> int:
        return self.group[1]

    @property
    def ranks(self) -> int:
        return self.group[0].ranks

    def gather(self, numbers: Tensor) -> Tensor:
        return self.group[0].gather(self.group[1], numbers)

    def add_up(self, values: Tensor) -> None:
        values.copy_(self.gather(values.unsqueeze(0))[:, 0].sum(0))


def on_ranks(
    cuts: Sequence[int], vocab: int, function: Callable[[SimulatedRank, slice], Any]
) -> tuple[list[Any], Meeting]:
    """What `function` gives on every rank, from its `VocabParallel` and its columns, and the meeting.

    Args:
        cuts: where the shards begin, and where the last one ends.
        vocab: number of common entries.
    """
    meeting = Meeting(len(cuts) - 1)
    results: list[Any] = [None] * meeting.ranks
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            columns = slice(cuts[rank], cuts[rank + 1])
            with meeting.turn:
                results[rank] = function(SimulatedRank((meeting, rank), cuts[rank], vocab), columns)
        except BaseException as error:
            errors.append(error)
            meeting.leave()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(meeting.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results, meeting
