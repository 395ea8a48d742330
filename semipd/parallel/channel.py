"""What rank 0 and a worker say to each other, in order, over one socket: frozen values, pickled.

Pickles run code, so a channel is only ever made with a process that this one started, or that proved the secret of the
ranks (`parallel/launched.py`). A worker that ends closes its channel by that, however it ended.
"""

from __future__ import annotations

import copyreg
import io
import operator
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from semipd.config import EngineConfig
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SlotSampling

if TYPE_CHECKING:
    from semipd.model.step_inputs import StepShape

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Start:
    """Build the model of this engine as one of its ranks. The device of `config` is rank 0's."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Execute:
    """Launch a step; `shape` is what rank 0 pads it to, None where steps are not padded."""

    batch: Batch
    shape: StepShape | None


@dataclass(frozen=True, slots=True)
class Settle:
    """Say `Settled` once later steps get no faster."""


@dataclass(frozen=True, slots=True)
class Close:
    """No step comes any more."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has its model, on a device of these shares."""

    num_sms: int
    splits: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """The answer to `Settle`."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A worker ends because of `error`, which names the rank; `traceback` is where it was raised."""

    error: Exception
    traceback: str


Message = Start | Execute | Settle | Close | Ready | Settled | Failed


class Channel:
    """One end of the connection between two ranks. Each direction is for one thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            OSError: the other end is gone.
        """
        self.send_packed(pack(message))

    def send_packed(self, packed: bytes) -> None:
        """Send one message that `pack` made, to one of several ranks."""
        with self._lock:
            self._socket.sendall(packed)

    def receive(self) -> Message:
        """The next message, once it has come.

        Raises:
            EOFError: the other end is gone.
        """
        try:
            header = self._reader.read(_LENGTH.size)
            payload = self._reader.read(*_LENGTH.unpack(header)) if len(header) == _LENGTH.size else b""
        except (OSError, ValueError) as error:  # it was reset, or `close` came first
            raise EOFError(str(error)) from error
        if not payload:
            raise EOFError("the other rank closed its end")
        message: Message = pickle.loads(payload)
        return message

    def shut(self) -> None:
        """From any thread: have both ends, and whoever waits at them, find the other one gone."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end has done so
            pass

    def close(self) -> None:
        """Give the socket back; nobody reads any more."""
        self.shut()
        self._reader.close()
        self._socket.close()


def pack(message: Message) -> bytes:
    """A message with its length, for `Channel.send_packed`."""
    buffer = io.BytesIO(bytes(_LENGTH.size))
    buffer.seek(_LENGTH.size)
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(message)
    _LENGTH.pack_into(buffer.getbuffer(), 0, buffer.tell() - _LENGTH.size)
    return buffer.getvalue()


def _by_position(kind: type) -> tuple[type, Callable[[Any], tuple[Any, ...]]]:
    get = operator.attrgetter(*(field.name for field in fields(kind)))
    return kind, lambda value: (kind, get(value))


class _Pickler(pickle.Pickler):
    """Pickles the many small values of a batch as calls: a dataclass with slots looks up its fields for each."""

    dispatch_table = copyreg.dispatch_table | dict(map(_by_position, (Batch, BlockUpdate, PrefillEntry, SlotSampling)))


def broadcast(channels: Sequence[Channel], message: Message) -> None:
    """Send one message to several ranks."""
    packed = pack(message)
    for channel in channels:
        channel.send_packed(packed)
