"""Times of launches that all ranks make together, taken in turns.

What a GPU computes decides its clock some milliseconds later, so times that are taken one after another compare
clocks: a product of 2.7 ms behind a pause of the tensor cores was 10 % faster than in a row. Here everything runs many
times for a few milliseconds, each time in another random order, and nothing pauses: all meet the same clocks.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Launch = Callable[[int], object]
"""Launches something on the operands of a number, on the current stream."""

_TURN_SECONDS = 4e-3
_MIN_ROUNDS = 5
_SETTLING = 0.3  # share of the rounds that is not counted: power settles
_ROUNDS_AHEAD = 4  # that are launched before the host waits


class Turn(Protocol):
    """Something to be timed."""

    def __call__(self, repeats: int) -> Callable[[], float]:
        """Launch it so many times; what is returned waits, and gives the seconds of all of them."""
        ...


def time_in_turns(turns: Sequence[Turn], share: Callable[[str], str], *, seconds: float = 0.3) -> list[float]:
    """Median seconds of one launch of each. All ranks call it together; each gets its own times.

    Args:
        share: gives every rank what rank 0 passes: how often to launch what.
        seconds: that it takes, at least.
    """
    once = [turn(2)() / 2 for turn in turns]
    repeats = [max(1, math.ceil(_TURN_SECONDS / max(value, 1e-7))) for value in once]
    round_seconds = sum(count * value for count, value in zip(repeats, once, strict=True))
    num_rounds = max(_MIN_ROUNDS, math.ceil(seconds / max(round_seconds, 1e-7)))
    repeats, num_rounds = json.loads(share(json.dumps([repeats, num_rounds])))
    rng = random.Random(0)  # the same orders on all ranks
    orders = [rng.sample(range(len(turns)), len(turns)) for _ in range(num_rounds)]
    times: list[list[float]] = [[] for _ in turns]
    for first in range(0, num_rounds, _ROUNDS_AHEAD):
        reads = [(i, turns[i](repeats[i])) for order in orders[first : first + _ROUNDS_AHEAD] for i in order]
        for i, read in reads:
            times[i].append(read() / repeats[i])
    return [statistics.median(values[int(_SETTLING * num_rounds) :]) for values in times]


class GraphTurns:
    """Makes turns of launches on a GPU: a graph of some of them, replayed.

    Args:
        stream: on which they are captured and run.
        meet: launches what ends when all ranks have come to it.
    """

    def __init__(self, stream: torch.cuda.Stream, meet: Callable[[], None]) -> None:
        self._stream = stream
        self._meet = meet

    def launched(self, launch: Launch, number: int) -> Turn:
        """A turn of as many launches, of what a graph cannot hold."""

        def run() -> None:
            for i in range(number):
                launch(i)

        return self._make_turn(run)

    def capture(self, launch: Launch, number: int) -> Turn:
        """A turn of as many launches as `number`, on the operands of all numbers below."""
        with torch.cuda.stream(self._stream):
            launch(0)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for i in range(number):
                    launch(i)
            finally:
                graph.capture_end()
        return self._make_turn(graph.replay)

    def _make_turn(self, run: Callable[[], None]) -> Turn:
        def turn(repeats: int) -> Callable[[], float]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                self._meet()
                start.record(self._stream)
                for _ in range(repeats):
                    run()
                end.record(self._stream)

            def read() -> float:
                end.synchronize()
                return float(start.elapsed_time(end)) * 1e-3

            return read

        return turn
