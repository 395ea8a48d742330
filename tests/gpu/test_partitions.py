"""Partitions on a real GPU: which SMs run what, order between streams, and what closing gives back.

A kernel writes down the %smid of each of its blocks, so an SM is known by its number. Whole file: some seconds.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl

from semipd.config import Phase
from semipd.device.green_context import GpuStream, GreenContextBackend, PlainStreamBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_BLOCKS = 4096  # more than all SMs hold at a time, so that each of them gets some
SLEEP_CYCLES = 200_000_000  # 0.1 s at 2 GHz
MIB = 1 << 20


@triton.jit
def _write_smid(out_ptr: tl.tensor) -> None:
    block = tl.program_id(0)
    smid = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r,r", [block], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out_ptr + block, smid)


@pytest.fixture(scope="module")
def backend() -> Iterator[GreenContextBackend]:
    backend = GreenContextBackend()
    # A kernel's first launch compiles or loads it, which a capture must not and which may wait for all running work.
    _write_smid[(1,)](torch.empty(1, dtype=torch.int32, device="cuda"))
    torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
    torch.zeros(1, device="cuda").fill_(1).add_(1).clone().item()
    torch.cuda.synchronize()
    yield backend
    backend.close()


def launch_smids() -> Callable[[], set[int]]:
    """Work that reads as the SMs it ran on."""
    smids = torch.empty(NUM_BLOCKS, dtype=torch.int32, device="cuda")
    _write_smid[(NUM_BLOCKS,)](smids)
    return lambda: set(smids.tolist())


def launch_sleep() -> Callable[[], None]:
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    return lambda: None


def both(backend: GreenContextBackend, split: tuple[int, int]) -> tuple[GpuStream, GpuStream]:
    return backend.stream(Phase.PREFILL, split[0]), backend.stream(Phase.DECODE, split[1])


# Which SMs ------------------------------------------------------------------------------------------------------------


def test_every_split_is_disjoint_and_granted_in_full(backend: GreenContextBackend) -> None:
    assert len(backend.splits) >= 1
    for split in backend.splits:
        prefill, decode = (stream.submit(launch_smids).wait() for stream in both(backend, split))
        assert (len(prefill), len(decode)) == split
        assert not prefill & decode
        assert len(prefill | decode) == backend.num_sms


def test_a_larger_share_of_decode_holds_the_smaller(backend: GreenContextBackend) -> None:
    shares = backend.shares(Phase.DECODE)
    seen = [backend.stream(Phase.DECODE, num_sms).submit(launch_smids).wait() for num_sms in shares]
    assert all(smaller < larger for smaller, larger in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("phase", list(Phase))
def test_the_whole_device_is_all_sms(backend: GreenContextBackend, phase: Phase) -> None:
    plain = PlainStreamBackend()
    for owner in (backend, plain):
        assert len(owner.stream(phase, owner.num_sms).submit(launch_smids).wait()) == backend.num_sms
    plain.close()


def test_decode_has_the_higher_priority(backend: GreenContextBackend) -> None:
    prefill_sms, decode_sms = backend.default_split
    for share in (prefill_sms, backend.num_sms):
        assert backend.stream(Phase.PREFILL, share).torch_stream.priority == 0
    for share in (decode_sms, backend.num_sms):
        assert backend.stream(Phase.DECODE, share).torch_stream.priority < 0
        assert (
            backend.capture_stream(Phase.DECODE, share).priority
            == backend.stream(Phase.DECODE, share).torch_stream.priority
        )


# Graphs ---------------------------------------------------------------------------------------------------------------


def capture(stream: torch.cuda.Stream, smids: torch.Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        _write_smid[(NUM_BLOCKS,)](smids)
        graph.capture_end()
    return graph


def launch_graph(graph: torch.cuda.CUDAGraph, smids: torch.Tensor) -> Callable[[], Callable[[], set[int]]]:
    def launch() -> Callable[[], set[int]]:
        smids.fill_(-1)
        graph.replay()
        return lambda: set(smids.tolist())

    return launch


def test_a_graph_stays_on_the_partition_it_was_captured_on(backend: GreenContextBackend) -> None:
    for split in (backend.splits[0], backend.default_split, backend.splits[-1]):
        for phase, num_sms in zip(Phase, split, strict=True):
            smids = torch.empty(NUM_BLOCKS, dtype=torch.int32, device="cuda")
            torch.cuda.synchronize()
            lane = backend.stream(phase, num_sms)
            expected = lane.submit(launch_smids).wait()
            graph = capture(backend.capture_stream(phase, num_sms), smids)
            for _ in range(20):
                assert lane.submit(launch_graph(graph, smids)).wait() == expected
            whole = backend.stream(phase, backend.num_sms)
            assert whole.submit(launch_graph(graph, smids)).wait() == expected
            del graph


def test_graphs_are_captured_in_a_thread_while_both_lanes_work(backend: GreenContextBackend) -> None:
    prefill, decode = both(backend, backend.default_split)
    expected = decode.submit(launch_smids).wait()
    buffers = [torch.empty(NUM_BLOCKS, dtype=torch.int32, device="cuda") for _ in range(10)]
    torch.cuda.synchronize()
    stream = backend.capture_stream(Phase.DECODE, decode.num_sms)
    with ThreadPoolExecutor(1) as pool:
        captured = pool.submit(lambda: [capture(stream, smids) for smids in buffers])
        num_mib = 20
        while not captured.done():
            num_mib = min(num_mib + 1, 60)  # more than torch has cached: it takes memory from the device meanwhile
            for step in [prefill.submit(launch_fresh(num_mib * MIB)), decode.submit(launch_smids)]:
                step.wait()
    for graph, smids in zip(captured.result(), buffers, strict=True):
        assert decode.submit(launch_graph(graph, smids)).wait() == expected


def launch_fresh(num_bytes: int) -> Callable[[], Callable[[], int]]:
    def launch() -> Callable[[], int]:
        fresh = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
        return lambda: fresh.numel()

    return launch


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_whole", [False, True])
def test_work_waits_for_other_streams_only_when_told(backend: GreenContextBackend, is_whole: bool) -> None:
    prefill, decode = both(backend, backend.default_split)
    if is_whole:
        prefill = backend.stream(Phase.PREFILL, backend.num_sms)
    value = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()

    def write() -> Callable[[], None]:
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        value.fill_(1)
        return lambda: None

    def copy() -> Callable[[], float]:
        copied = value.clone()
        return copied.item

    slow = prefill.submit(write)
    assert decode.submit(copy).wait() == 0
    assert not slow.is_done()
    dependent = decode.submit(copy, after=[slow])
    assert not dependent.is_done()
    assert dependent.wait() == 1
    assert slow.is_done()


def test_a_lane_that_changes_its_share_stays_in_order(backend: GreenContextBackend) -> None:
    value = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()

    def count(expected: int) -> Callable[[], Callable[[], bool]]:
        def launch() -> Callable[[], bool]:
            torch.cuda._sleep(SLEEP_CYCLES // 100)  # type: ignore[no-untyped-call]
            value.add_(1)
            counted = value.clone()
            return lambda: counted.item() == expected

        return launch

    shares = backend.shares(Phase.DECODE)
    completions = [backend.stream(Phase.DECODE, shares[0]).submit(count(1))]
    for step in range(2, 41):
        stream = backend.stream(Phase.DECODE, shares[step * 5 % len(shares)])
        completions.append(stream.submit(count(step), after=completions[-1:]))
    assert all(completion.wait() for completion in completions)


def test_a_waiting_thread_uses_no_core_and_leaves_the_gil(backend: GreenContextBackend) -> None:
    stream = backend.stream(Phase.DECODE, backend.num_sms)
    stream.submit(launch_smids).wait()
    ticks = [0]
    is_over = threading.Event()

    def tick() -> None:
        while not is_over.wait(0.001):
            ticks[0] += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    completion = stream.submit(launch_sleep)
    ticks[0] = 0
    wall, cpu = time.monotonic(), time.thread_time()
    completion.wait()
    wall, cpu = time.monotonic() - wall, time.thread_time() - cpu
    seen = ticks[0]
    is_over.set()
    ticker.join()
    assert wall > 0.03
    assert cpu < wall / 2
    assert seen > 10


# The end --------------------------------------------------------------------------------------------------------------


def test_close_gives_the_memory_back(backend: GreenContextBackend) -> None:
    def free_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    free = []
    for _ in range(4):
        other = GreenContextBackend()
        other.prebuild()
        for split in other.splits:
            for stream in both(other, split):
                stream.submit(launch_smids).wait()
        other.close()
        free.append(free_bytes())
    # The driver keeps 4 MiB of each of the 28 contexts of all splits, 112 MiB every time; an engine has 2.
    kept = [(free[0] - later) // MIB for later in free]
    assert all(mib <= 128 * cycle for cycle, mib in enumerate(kept)), kept
    assert backend.stream(Phase.DECODE, backend.default_split[1]).submit(launch_smids).wait()
