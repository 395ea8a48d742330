"""Streams on some of a GPU's SMs, and the time of what runs in a CUDA graph on them."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu import event_time
from semipd.config import Phase
from semipd.device.green_context import GreenContextBackend


class Partition:
    """The decode lane's stream on `num_sms` SMs, or on all if there are no more."""

    def __init__(self, num_sms: int) -> None:
        self._backend = GreenContextBackend()
        self.num_sms = min(num_sms, self._backend.num_sms)
        self.stream = self._backend.stream(Phase.DECODE, self.num_sms).torch_stream

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

    def seconds(self, launch: Callable[[], object], num_replays: int = 6) -> float:
        """Time of one `launch` in a graph: the median of three runs of some replays each."""
        graph = self.capture(launch)
        with torch.cuda.stream(self.stream):
            return statistics.median(event_time(graph.replay, num_replays) for _ in range(3))
