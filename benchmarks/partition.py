"""Streams on some of a GPU's SMs, and the time of what runs in a CUDA graph on them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from cuda.bindings import driver

GROUP_SIZE = 8  # SMs


class Partition:
    """A stream of a green context on the first groups of 8 SMs, or a plain one for all."""

    def __init__(self, num_sms: int) -> None:
        torch.zeros(1, device="cuda")  # starts CUDA
        device = _call(driver.cuDeviceGet(0))
        sm_type = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        whole = _call(driver.cuDeviceGetDevResource(device, sm_type))
        num_groups = whole.sm.smCount // GROUP_SIZE
        self.stream: torch.cuda.Stream
        if num_sms >= whole.sm.smCount:
            self.num_sms = int(whole.sm.smCount)
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            return
        groups, _, _ = _call(driver.cuDevSmResourceSplitByCount(num_groups, whole, 0, GROUP_SIZE))
        chosen = list(groups)[: num_sms // GROUP_SIZE]
        descriptor = _call(driver.cuDevResourceGenerateDesc(chosen, len(chosen)))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        self._context = _call(driver.cuGreenCtxCreate(descriptor, device, flags))
        self.num_sms = int(_call(driver.cuGreenCtxGetDevResource(self._context, sm_type)).sm.smCount)
        non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = _call(driver.cuGreenCtxStreamCreate(self._context, non_blocking, 0))
        self.stream = torch.cuda.ExternalStream(int(self._stream))  # type: ignore[no-untyped-call]

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
        samples = []
        with torch.cuda.stream(self.stream):
            graph.replay()
            for _ in range(3):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                for _ in range(num_replays):
                    graph.replay()
                end.record()
                end.synchronize()
                samples.append(float(start.elapsed_time(end)) / 1e3 / num_replays)
        return statistics.median(samples)


def _call(result: tuple[Any, ...]) -> Any:
    status, *values = result
    assert status == driver.CUresult.CUDA_SUCCESS, status
    return values[0] if len(values) == 1 else values
