"""A rank but the first: builds its part of the model, then launches every step that rank 0 sends, in that order.

Rank 0 decides everything and reads the results; here they are only waited for, since a step that fails must be told.
The process lives as long as rank 0 wants it: when its channel closes it ends at once, whatever it waits for.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from semipd.config import EngineConfig, Shard
from semipd.device.cuda_driver import raise_max_connections
from semipd.errors import RankError
from semipd.frozen_heap import hold_frozen_heap
from semipd.parallel.channel import Channel, Close, Execute, Failed, Message, Ready, Settle, Settled, Start
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import TensorGroup, join_store
from semipd.parallel.launched import Launch, make_group, next_engine
from semipd.switch_interval import hold_switch_interval

if TYPE_CHECKING:
    from semipd.build_model import BuiltModel
    from semipd.device.partition import Completion
    from semipd.parallel.executor import RankRunner
    from semipd.sched.batch import StepResult

_CLOSE_SECONDS = 30.0  # in which the memory is given back
_PARENT_SECONDS = 1.0  # between looks whether rank 0's process is there


class Rank:
    """One engine's part in this process, from its start to its close.

    Args:
        channel: to rank 0.
        group: of this rank.
        local_shard: which of this host's ranks it is.
    """

    def __init__(self, channel: Channel, group: TensorGroup, local_shard: Shard) -> None:
        self._channel = channel
        self._group = group
        self._local_shard = local_shard
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[Completion[StepResult] | None] = queue.SimpleQueue()
        self._is_closed = threading.Event()

    def serve(self) -> None:
        """Build the model and run the steps, until rank 0 says that no more come."""
        threading.Thread(target=self._receive, name="semipd-receive", daemon=True).start()
        try:
            start = self._inbox.get()
            assert isinstance(start, Start), start
            model = _build(start.config, self._group, self._local_shard)
            self._channel.send(Ready(model.backend.num_sms, tuple(model.backend.splits)))
            with hold_switch_interval(start.config.switch_interval), hold_frozen_heap(start.config.freeze_gc):
                self._run(model.executor)
            model.executor.close()
            self._group.close()
            backend = model.backend
            del model  # and with it the weights: then the backend can give their memory back
            backend.close()
        except BaseException as error:
            self._fail(error)
        self._is_closed.set()
        self._channel.close()

    def _run(self, runner: RankRunner) -> None:
        waiter = threading.Thread(target=self._wait_for_steps, name="semipd-wait", daemon=True)
        waiter.start()
        while not isinstance(message := self._inbox.get(), Close):
            match message:
                case Execute(batch, shape):
                    self._launched.put(runner.execute(batch, shape))
                case Settle():
                    # Beside the steps, which go on.
                    threading.Thread(target=self._settle, args=(runner,), name="semipd-settle", daemon=True).start()
        self._launched.put(None)
        waiter.join()

    def _wait_for_steps(self) -> None:
        try:
            while (completion := self._launched.get()) is not None:
                completion.wait()
        except BaseException as error:
            self._fail(error)

    def _settle(self, runner: RankRunner) -> None:
        try:
            runner.settle()
            self._channel.send(Settled())
        except BaseException as error:
            self._fail(error)

    def _receive(self) -> None:
        """Pass messages on, and end the process when there is nobody left to send any."""
        try:
            while True:
                message = self._channel.receive()
                self._inbox.put(message)
                if isinstance(message, Close):
                    break
        except EOFError:
            os._exit(1)  # a collective that waits for rank 0 would keep any other way out from ending
        except BaseException as error:  # of values that cannot be read
            self._fail(error)
        if not self._is_closed.wait(_CLOSE_SECONDS):
            os._exit(1)

    def _fail(self, error: BaseException) -> None:
        """Tell rank 0, which ends this process."""
        try:
            self._channel.send(Failed(_named(error, self._group.shard.rank), traceback.format_exc()))
            time.sleep(_CLOSE_SECONDS)
        finally:
            os._exit(1)


def _build(config: EngineConfig, group: TensorGroup, local_shard: Shard) -> BuiltModel:
    from semipd.build_model import build_model
    from semipd.model.loader import load_spec, resolve_model

    if config.device != "cpu":
        raise_max_connections()  # before anything starts CUDA
    source = resolve_model(config.model, revision=config.revision, load_format=config.load_format)
    return build_model(config, source, load_spec(source), group, local_shard)


def _named(error: BaseException, rank: int) -> Exception:
    """The same kind of error, if it can be made of a message and sent, with the rank in the message."""
    try:
        named: BaseException = type(error)(f"rank {rank}: {error}")
        pickle.loads(pickle.dumps(named))
    except Exception:
        named = RankError(f"rank {rank} failed with {type(error).__name__}: {error}")
    return named if isinstance(named, Exception) else RankError(f"rank {rank} ended with {type(error).__name__}")


def serve_started(shard: Shard, descriptor: int, store_port: int, parent: int) -> None:
    """Be a rank of the engine of process `parent`, over the socket that was inherited from it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; rank 0 says what it ends
    threading.Thread(target=_end_with, args=(parent,), name="semipd-parent", daemon=True).start()
    channel = Channel(socket.socket(fileno=descriptor))
    Rank(channel, TensorGroup(shard, join_store(LOOPBACK, store_port)), shard).serve()


def serve_launched(launch: Launch) -> None:
    """Be a rank of the engines of the launcher's rank 0, one after another, until it makes none any more."""
    number = 1
    while (channel := next_engine(launch, number)) is not None:
        Rank(channel, make_group(launch, number), launch.local_shard).serve()
        number += 1


def _end_with(parent: int) -> None:
    """End when rank 0's process has: a process that it forked may hold its end of the channel open."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    rank, world_size, *numbers = map(int, sys.argv[1:])
    serve_started(Shard(rank=rank, world_size=world_size), *numbers)
