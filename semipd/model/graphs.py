"""CUDA graphs of steps: captured beside the running lanes, replayed instead of hundreds of launches.

A graph keeps the SMs of the stream that it was captured on, so each partition has its own. A step without a graph runs
eagerly; a thread of its own then captures the same launches on a spare stream of the same partition. Capturing runs
nothing and allocates nothing, and in thread_local mode it does not forbid anything to others.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import NamedTuple, Protocol

import torch

from semipd.config import Phase
from semipd.engine_thread import EngineThread
from semipd.switch_interval import hold_switch_interval

logger = logging.getLogger(__name__)

MAX_GRAPH_BYTES = 2 << 30
"""Device memory of all graphs together; the least recently used are dropped."""

_MAX_ATTEMPTS = 3
_SWITCH_INTERVAL = 0.5e-3  # seconds; a capture is 50 ms of Python, and with the usual 5 ms others wait for it in turns


class LaneStream(Protocol):
    """A lane's stream on a partition."""

    @property
    def torch_stream(self) -> torch.cuda.Stream:
        """The stream for torch."""
        ...


class Streams(Protocol):
    """Where graphs are captured and replayed: of a partition backend."""

    def stream(self, phase: Phase, num_sms: int) -> LaneStream:
        """The lane's stream on the partition of `phase` on `num_sms` SMs."""
        ...

    def capture_stream(self, phase: Phase, num_sms: int) -> torch.cuda.Stream:
        """A second stream on the same partition."""
        ...


class GraphKey(NamedTuple):
    """What a graph is of: a lane, its partition, and the shape of what is launched."""

    phase: Phase
    num_sms: int
    shape: Hashable


_FIRST, _URGENT, _USUAL, _LAST = range(4)
_NO_KEY = GraphKey(Phase.DECODE, 0, None)


class Graphs(Protocol):
    """What runs the launches of a step."""

    def run(self, key: GraphKey, launch: Callable[[], None]) -> bool:
        """Launch, or replay what an earlier launch of the same key was captured as; whether it gets no faster."""
        ...

    def request(self, key: GraphKey, launch: Callable[[], None], *, is_urgent: bool = True) -> None:
        """Have it captured before it is run."""
        ...

    def reserve(self, num_graphs: int, num_kernels: int) -> None:
        """Take what memory so many graphs of so many kernels will need, before the first step."""
        ...

    def wait_until_captured(self) -> None:
        """Return once all that was asked for is captured."""
        ...

    def captured(self, phase: Phase, num_sms: int) -> Sequence[Hashable]:
        """Shapes that are captured on a partition."""
        ...

    def close(self) -> None:
        """Give back what was captured."""
        ...


def _nothing(phase: Phase) -> AbstractContextManager[None]:
    return nullcontext()


class GraphCache:
    """Graphs by what they are of. `run` is for the lanes' threads, each with its own keys.

    Args:
        streams: where they are captured and replayed.
        device: of the streams.
        ending: entered while a capture of a lane ends.
        max_bytes: of all graphs together.
    """

    def __init__(
        self,
        streams: Streams,
        device: torch.device,
        *,
        ending: Callable[[Phase], AbstractContextManager[None]] = _nothing,
        max_bytes: int = MAX_GRAPH_BYTES,
    ) -> None:
        self._streams = streams
        self._ending = ending
        self._device = device
        self._max_bytes = max_bytes
        self._graphs: OrderedDict[GraphKey, _Graph] = OrderedDict()
        self._requested: dict[GraphKey, int] = {}  # and how urgently
        self._num_requests = count()
        self._is_closed = False
        self._num_failures: Counter[GraphKey] = Counter()
        self._lock = threading.Lock()
        self._requests: queue.PriorityQueue[tuple[int, int, GraphKey, Callable[[], None]]] = queue.PriorityQueue()
        self._dropped: list[tuple[GraphKey, _Graph]] = []
        self._draining: list[tuple[_Graph, torch.cuda.Event]] = []
        self._thread = EngineThread(self._capture_requests, "capture")
        self._thread.start()

    def run(self, key: GraphKey, launch: Callable[[], None]) -> bool:
        """Replay the graph of `key` on the current stream; launch eagerly, and have it captured, if there is none.

        Whatever `launch` launches for one key must be the same at every call, down to the addresses.

        Returns:
            Whether it is as fast as it gets: replayed.
        """
        with self._lock:
            graph = self._graphs.get(key)
            if graph is not None:
                self._graphs.move_to_end(key)
        if graph is not None:
            graph.graph.replay()
            return True
        launch()
        self.request(key, launch)
        return False

    def request(self, key: GraphKey, launch: Callable[[], None], *, is_urgent: bool = True) -> None:
        """Have `key` captured, before all that is not urgent; the kernels that it launches must be loaded."""
        priority = _URGENT if is_urgent else _USUAL
        with self._lock:
            if self._requested.get(key, _LAST) > priority:
                self._requested[key] = priority
                self._put(priority, key, launch)

    def captured(self, phase: Phase, num_sms: int) -> Sequence[Hashable]:
        """The shapes that there are graphs of on a partition."""
        with self._lock:
            return [key.shape for key in self._graphs if key.phase is phase and key.num_sms == num_sms]

    def reserve(self, num_graphs: int, num_kernels: int) -> None:
        """Have the driver map memory for so many graphs of so many kernels, while the device has nothing to do.

        It keeps what ended graphs had, for those to come. For about every sixteenth graph it maps more, and waits until
        the device has done all that it was given: a millisecond on an idle H100, and beside busy lanes 50 to 135, in
        which neither of them can launch.
        """
        free_before, _ = torch.cuda.mem_get_info(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        ended = []
        with torch.inference_mode(), torch.cuda.stream(stream):
            count = torch.zeros(1, device=self._device)
            count.add_(1)  # loads the kernel
            for _ in range(num_graphs):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                for _ in range(num_kernels):
                    count.add_(1)
                graph.capture_end()
                ended.append(graph)
        free_after, _ = torch.cuda.mem_get_info(self._device)
        self._max_bytes -= max(0, free_before - free_after)  # which graphs take that are then measured as less

    def wait_until_captured(self) -> None:
        """Return once everything that was requested so far is captured."""
        done = threading.Event()
        with self._lock:
            if self._is_closed:
                return
            self._put(_LAST, _NO_KEY, done.set)
        done.wait()

    def close(self) -> None:
        """Drop all graphs; no lane may run any more."""
        self._put(_FIRST, _NO_KEY, lambda: None)
        self._thread.join()
        with self._lock:
            self._is_closed = True
            while not self._requests.empty():  # nobody waits for what will not be captured
                _, _, key, launch = self._requests.get()
                if key is _NO_KEY:
                    launch()
            self._graphs.clear()
            self._dropped.clear()
            self._draining.clear()

    def _put(self, priority: int, key: GraphKey, launch: Callable[[], None]) -> None:
        self._requests.put((priority, next(self._num_requests), key, launch))

    def _capture_requests(self) -> None:
        while (request := self._requests.get())[0] != _FIRST:
            _, _, key, launch = request
            if key is _NO_KEY:
                launch()
                continue
            if key in self._graphs:  # it was asked for twice, the second time urgently
                continue
            try:
                with hold_switch_interval(_SWITCH_INTERVAL):
                    graph = self._capture(key, launch)
            except Exception:  # the lane goes on launching; nothing is lost but speed
                self._on_failure(key)
                continue
            ended: list[_Graph] = []
            with self._lock:
                self._graphs[key] = graph
                try:
                    ended = self._drop_oldest()
                except Exception:  # they stay: memory is lost, and `wait_until_captured` still ends
                    logger.exception("graphs that are used no more could not be dropped")
            ended.clear()  # without the lock: the driver takes its time over it, and lanes look for graphs meanwhile

    def _on_failure(self, key: GraphKey) -> None:
        """Have it tried again: another thread that synchronises the whole device breaks what is being captured."""
        self._num_failures[key] += 1
        if self._num_failures[key] < _MAX_ATTEMPTS:
            logger.info("a capture of %s failed; it will be tried again", key, exc_info=True)
            with self._lock:
                self._requested.pop(key, None)
        else:
            logger.warning("no graph for %s: its steps are launched eagerly", key, exc_info=True)

    def _capture(self, key: GraphKey, launch: Callable[[], None]) -> _Graph:
        stream = self._streams.capture_stream(key.phase, key.num_sms)
        free_before, _ = torch.cuda.mem_get_info(self._device)
        with torch.inference_mode(), torch.cuda.stream(stream):
            _make_cublas_workspace(self._device)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launch()
            finally:
                with self._ending(key.phase):
                    graph.capture_end()
        free_after, _ = torch.cuda.mem_get_info(self._device)
        return _Graph(graph, max(0, free_before - free_after))

    def _drop_oldest(self) -> list[_Graph]:
        """Keep to the memory bound. A lane may just replay what is dropped, and a graph must not go while it runs.

        So a dropped graph lies until the next capture, when the lane's last replay of it is on its stream for sure, and
        then until an event behind that has fired.

        Returns:
            Those that nothing uses any more.
        """
        drained = [item for item in self._draining if item[1].query()]  # type: ignore[no-untyped-call]
        self._draining = [item for item in self._draining if item not in drained]
        for key, graph in self._dropped:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._streams.stream(key.phase, key.num_sms).torch_stream)
            self._draining.append((graph, event))
        self._dropped.clear()
        num_bytes = sum(graph.num_bytes for graph in self._graphs.values())
        while num_bytes > self._max_bytes and len(self._graphs) > 1:
            key, graph = self._graphs.popitem(last=False)
            num_bytes -= graph.num_bytes
            self._requested.pop(key, None)
            self._dropped.append((key, graph))
        return [graph for graph, _ in drained]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    num_bytes: int


def _make_cublas_workspace(device: torch.device) -> None:
    """CuBLAS has one workspace for each thread's handle and stream: made now, it is not part of a capture."""
    small = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(small, small)
