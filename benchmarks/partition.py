"""Streams on some of a GPU's SMs, and the time of what runs in a CUDA graph on them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu import event_time
from semipd.config import Phase
from semipd.device.green_context import GreenContextBackend

_NUM_RUNS = 3


class Partition:
    """A lane's stream on `num_sms` SMs, or on all if there are no more: decode's, or else prefill's.

    Decode has shares of 8 SMs and their multiples, prefill what these leave: of 132 SMs 116, 100, 84 and so on.
    """

    def __init__(self, num_sms: int) -> None:
        self._backend = GreenContextBackend()
        self.num_sms = min(num_sms, self._backend.num_sms)
        phase = Phase.DECODE if self.num_sms in self._backend.shares(Phase.DECODE) else Phase.PREFILL
        self.stream = self._backend.stream(phase, self.num_sms).torch_stream

    def capture(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of `launch`, which has run once before."""
        torch.cuda.synchronize()  # inputs may come from other streams
        with torch.cuda.stream(self.stream):
            launch()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                launch()
        return graph

    def seconds(self, launch: Callable[[], object], num_replays: int = 6, *, duration: float = 0.0) -> float:
        """Time of one `launch` in a graph: the median of three runs of some replays each.

        Args:
            launch: what to time.
            num_replays: of a run at least.
            duration: seconds that the three runs take together at least.
        """
        graph = self.capture(launch)
        with torch.cuda.stream(self.stream):
            if duration > 0:
                num_replays = max(num_replays, math.ceil(duration / _NUM_RUNS / event_time(graph.replay, num_replays)))
            return statistics.median(event_time(graph.replay, num_replays) for _ in range(_NUM_RUNS))
