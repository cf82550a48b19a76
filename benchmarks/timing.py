"""Interleaved timing: every peer runs once in every round, so that drift of the machine is shared.

Garbage collection stays on: what a peer leaves behind is part of its cost.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

__all__ = ["Timing", "time_interleaved", "use_one_core"]

_NUM_WARM_UP = 3


class Timing(NamedTuple):
    """What one peer took.

    Attributes:
        rounds: milliseconds per call in each round.
        cores: CPU time of the process over wall time: above 1, several threads were at work; below
            1, it had to wait for the core, and the numbers are worth little.
    """

    rounds: tuple[float, ...]
    cores: float

    @property
    def milliseconds(self) -> float:
        """Median over rounds."""
        return median(self.rounds)


def use_one_core() -> None:
    """Keep this process to one core, where the system allows it; call it before jax starts.

    XLA computes on a thread of its own also when it has only one. Waking it on another core costs
    about 0.05 ms per call, which is most of the time of a small problem.
    """
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


class _Block(NamedTuple):
    wall: float
    cpu: float


def time_interleaved(
    peers: Mapping[str, Callable[[], object]], *, num_rounds: int, block_seconds: float = 0.1
) -> dict[str, Timing]:
    """Time the peers in alternation.

    A round runs one block of calls per peer; each round begins with another peer, so that none
    always follows the same one.

    Args:
        peers: what to call; each call must have finished its work when it returns.
        num_rounds: how often each peer has its turn.
        block_seconds: how long one turn lasts, roughly.
    """
    num_calls = {name: _calls_per_block(call, block_seconds) for name, call in peers.items()}
    blocks: dict[str, list[_Block]] = {name: [] for name in peers}
    names = list(peers)
    for i in range(num_rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            blocks[name].append(_run(peers[name], num_calls[name]))
    return {name: _timing(blocks[name], num_calls[name]) for name in names}


def _calls_per_block(call: Callable[[], object], block_seconds: float) -> int:
    _run(call, _NUM_WARM_UP)
    seconds = _run(call, _NUM_WARM_UP).wall / _NUM_WARM_UP
    return max(1, round(block_seconds / seconds))


def _run(call: Callable[[], object], num_calls: int) -> _Block:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(num_calls):
        call()
    return _Block(time.perf_counter() - wall, time.process_time() - cpu)


def _timing(blocks: list[_Block], num_calls: int) -> Timing:
    milliseconds = tuple(1e3 * block.wall / num_calls for block in blocks)
    return Timing(milliseconds, sum(block.cpu for block in blocks) / sum(b.wall for b in blocks))
