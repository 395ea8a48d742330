"""The other ranks, as rank 0 sees them: their processes, what it tells them, and how it learns that one has ended.

A rank ends this rank's engine when it says so, or when its channel closes, which the system does for a process that
was killed. Then nothing may wait for it any more: the collectives are aborted, the other workers are ended, and the
engine is told why.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from semipd.config import EngineConfig, Shard
from semipd.engine_thread import EngineThread
from semipd.errors import ConfigError, RankError
from semipd.parallel import launched
from semipd.parallel.channel import Channel, Close, Failed, Message, Ready, Settle, Settled, Start, broadcast
from semipd.parallel.group import TensorGroup, host_store

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 30.0  # in which a worker gives its memory back
_BLAME_SECONDS = 3.0  # between what a rank's end breaks here and the news of it: more than `_how_it_ended` takes


class _RemoteTraceback(Exception):
    """Where a worker raised what ended it, as text."""


@dataclass(slots=True)
class Worker:
    """One other rank.

    Attributes:
        process: None for one that a launcher placed.
        ready: what it said once it had its model.
        is_settled: its steps get no faster.
    """

    rank: int
    channel: Channel
    process: subprocess.Popen[bytes] | None
    ready: Ready | None = None
    is_settled: bool = False


class Ranks:
    """All ranks but this one, rank 0.

    Args:
        workers: the others, by rank.
        group: of this rank; aborted when another one fails.
        local_shard: which of the ranks on this host this one is.
    """

    def __init__(self, workers: Sequence[Worker], group: TensorGroup, local_shard: Shard) -> None:
        self.group = group
        self.local_shard = local_shard
        self._workers = workers
        self._changed = threading.Condition()
        self._settling = threading.Lock()
        self._failure: BaseException | None = None
        self._is_closing = False
        self._on_failure: Callable[[BaseException], None] | None = None
        self._readers = [EngineThread(partial(self._read, worker), f"rank-{worker.rank}") for worker in workers]
        for reader in self._readers:
            reader.start()

    def send(self, message: Message) -> None:
        """Tell all workers."""
        broadcast([worker.channel for worker in self._workers], message)

    def wait_until_ready(self, num_sms: int, splits: Sequence[tuple[int, int]]) -> None:
        """Return once every worker has its model.

        Args:
            num_sms: of this rank's device.
            splits: of it.

        Raises:
            ConfigError: a worker's device has other shares than this one's.
            Exception: what kept a worker from making its model.
        """
        self._wait_for(lambda worker: worker.ready is not None)
        expected = Ready(num_sms, tuple(splits))
        for worker in self._workers:
            if worker.ready != expected:
                raise ConfigError(
                    f"rank {worker.rank} has a device of other shares ({worker.ready}) than rank 0 ({expected}); "
                    "expected devices of one kind"
                )

    def settle(self, settle_here: Callable[[], None]) -> None:
        """Have every worker settle, and this rank by `settle_here`."""
        with self._settling:
            for worker in self._workers:
                worker.is_settled = False
            with suppress(OSError):  # one has ended, as `_wait_for` will say
                self.send(Settle())
            settle_here()
            self._wait_for(lambda worker: worker.is_settled)

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """Have `on_failure` called, from another thread or here, when a rank fails or has failed; it must not wait."""
        with self._changed:
            self._on_failure = on_failure
            failure = self._failure
        if failure is not None:
            on_failure(failure)

    def raise_if_failed(self) -> None:
        """Raise why a rank has failed, if one has."""
        if self._failure is not None:
            raise self._failure

    def blame(self, error: BaseException) -> None:
        """Raise what ended another rank, if that is why a step on this one failed with `error`.

        If not, the others wait for a rank that has failed, and are ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._is_closing, timeout=_BLAME_SECONDS)
            failure = self._failure
        if failure is None:
            self._fail(error)
        elif failure is not error:
            raise failure

    def kill(self) -> None:
        """End all workers now, and release this rank from waiting for them."""
        self._is_closing = True
        self._release()

    def close(self) -> None:
        """Tell the workers that no step comes any more: they give their memory back while this rank does."""
        if not self._is_closing:
            with self._changed:
                self._is_closing = True
                self._changed.notify_all()
            try:
                self.send(Close())
            except OSError:  # one has ended
                self._release()

    def join(self) -> None:
        """Return once all workers have ended, the slow ones by force, and give back what they had here."""
        self.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in self._workers:
            if worker.process is not None:
                try:
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    logger.warning("rank %d did not end within %g s and is killed", worker.rank, _CLOSE_SECONDS)
                    worker.process.kill()
                    worker.process.wait()
            worker.channel.shut()
        for reader in self._readers:
            reader.join()
        for worker in self._workers:
            worker.channel.close()

    # ---- the threads that read

    def _read(self, worker: Worker) -> None:
        try:
            while True:
                match message := worker.channel.receive():
                    case Ready():
                        with self._changed:
                            worker.ready = message
                            self._changed.notify_all()
                    case Settled():
                        with self._changed:
                            worker.is_settled = True
                            self._changed.notify_all()
                    case Failed():
                        message.error.__cause__ = _RemoteTraceback(message.traceback)
                        self._fail(message.error)
                        return
        except EOFError:
            if not self._is_closing:
                self._fail(RankError(f"rank {worker.rank} {_how_it_ended(worker.process)}"))
        except BaseException as error:  # of values that cannot be read
            self._fail(error)

    def _fail(self, failure: BaseException) -> None:
        with self._changed:
            if self._failure is not None or self._is_closing:
                return
            self._failure = failure
            on_failure = self._on_failure
        try:
            if on_failure is not None:
                on_failure(failure)  # first, or a lane that is released could be the one to tell
        finally:
            self._release()

    def _release(self) -> None:
        """End the workers and abort the collectives: nobody waits for anybody any more."""
        with self._changed:
            self._changed.notify_all()
        self.group.abort()
        for worker in self._workers:
            worker.channel.shut()
            if worker.process is not None:
                worker.process.kill()

    def _wait_for(self, condition: Callable[[Worker], bool]) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or self._is_closing or all(map(condition, self._workers))
            )
        self.raise_if_failed()
        if self._is_closing:
            raise RankError("the ranks were closed meanwhile")


def start_ranks(config: EngineConfig) -> Ranks:
    """Start the other ranks as processes of this one, which begin to build their part of the engine's model."""
    if launched.is_launched():
        return _meet_ranks(config)
    store, port = host_store()
    workers: list[Worker] = []
    try:
        for rank in range(1, config.tensor_parallel_size):
            workers.append(_start_worker(Shard(rank=rank, world_size=config.tensor_parallel_size), port))
            workers[-1].channel.send(Start(config))
    except BaseException:
        for worker in workers:
            assert worker.process is not None
            worker.process.kill()
            worker.process.wait()
            worker.channel.close()
        raise
    shard = Shard(world_size=config.tensor_parallel_size)
    return Ranks(workers, TensorGroup(shard, store), shard)


def _start_worker(shard: Shard, store_port: int) -> Worker:
    """A process that runs `parallel/worker.py`: a new interpreter, which takes nothing over of the caller's script.

    Its channel is a socket that it inherits: no other process can talk to it, and nothing secret is on command lines.
    """
    package_folder = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (package_folder, os.environ.get("PYTHONPATH"))))
    }
    ours, theirs = socket.socketpair()
    with theirs:
        numbers = shard.rank, shard.world_size, theirs.fileno(), store_port, os.getpid()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "semipd.parallel.worker", *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment,
        )
    return Worker(shard.rank, Channel(ours), process)


def _meet_ranks(config: EngineConfig) -> Ranks:
    """Take the ranks that a launcher placed."""
    launch = launched.Launch()
    channels, group = launched.meet_workers(launch, config.tensor_parallel_size)
    ranks = Ranks([Worker(rank, channel, None) for rank, channel in channels.items()], group, launch.local_shard)
    ranks.send(Start(config))
    return ranks


def _how_it_ended(process: subprocess.Popen[bytes] | None) -> str:
    if process is None:
        return "closed its channel"
    try:
        code = process.wait(1.0)  # its channel is closed, so it has ended or is about to
    except subprocess.TimeoutExpired:
        return f"(process {process.pid}) closed its channel"
    if code < 0:
        return f"(process {process.pid}) was killed by {signal.Signals(-code).name}"
    return f"(process {process.pid}) exited with status {code}"
