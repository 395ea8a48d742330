"""Ranks that a launcher placed, torchrun say, on this host or on others: how rank 0's engines find them.

The launcher's store, at MASTER_ADDR and MASTER_PORT, is where an engine says by which door its ranks come in, and by
which secret it knows them. Whoever can reach that store is trusted, as by torch.distributed itself.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping

from semipd.config import Shard
from semipd.errors import ConfigError
from semipd.parallel.channel import Channel
from semipd.parallel.communicator import LOOPBACK
from semipd.parallel.group import TensorGroup, join_store

_MARK = "SEMIPD_LAUNCHED"  # set by `parallel/launch.py` for the script that it runs as rank 0
_MEET_SECONDS = 120.0  # in which the ranks of a launcher come, which may be starting or closing another engine
_HELLO_SECONDS = 5.0
_POLL_SECONDS = 0.05
_HELLO = struct.Struct("!32sI")  # secret, rank


def is_launched() -> bool:
    """Whether the ranks of this process's engines are placed, rather than started by each engine."""
    return os.environ.get(_MARK) == str(os.getpid())


def mark_launched() -> None:
    """Have the engines of this process, rank 0, meet ranks that are placed."""
    os.environ[_MARK] = str(os.getpid())  # and not of those that they start


class Launch:
    """What a launcher says to each of its processes, by the variables that torchrun sets.

    Raises:
        ConfigError: a variable is missing or no number.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        try:
            self.shard = Shard(rank=int(environment["RANK"]), world_size=int(environment["WORLD_SIZE"]))
            self.local_shard = Shard(
                rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
                world_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
            )
            host, self.port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"a launcher's variable is missing or wrong ({error}); expected RANK, WORLD_SIZE, MASTER_ADDR and "
                "MASTER_PORT, as torchrun sets them: start the script with torchrun, or without semipd.parallel.launch"
            ) from error
        self.host = LOOPBACK if host in ("localhost", "::1") else host
        # torchrun's store outlives an attempt, and what was said in it
        self.prefix = f"semipd/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet_workers(launch: Launch, world_size: int) -> tuple[dict[int, Channel], TensorGroup]:
    """Let the ranks of the launcher in: a channel to each, by rank, and the group with them.

    Raises:
        ConfigError: there are fewer or more of them than the engine has ranks, or they do not come.
    """
    if launch.shard.world_size != world_size:
        raise ConfigError(
            f"tensor_parallel_size is {world_size}, but the launcher placed {launch.shard.world_size} ranks; expected "
            "as many"
        )
    store = join_store(launch.host, launch.port, prefix=launch.prefix)
    number = store.add("engines", 1)
    secret = secrets.token_bytes(32)
    is_local = launch.host == LOOPBACK
    channels: dict[int, Channel] = {}
    try:
        with socket.create_server((LOOPBACK if is_local else "", 0)) as door:
            store.set(f"{number}/door", f"{door.getsockname()[1]} {secret.hex()}")
            deadline = time.monotonic() + _MEET_SECONDS
            while len(channels) < world_size - 1:
                door.settimeout(max(0.01, deadline - time.monotonic()))
                connection, _ = door.accept()
                rank = _greeted(connection, secret)
                if rank is None:
                    connection.close()
                else:
                    channels[rank] = Channel(connection)
    except TimeoutError as error:
        for channel in channels.values():
            channel.close()
        missing = sorted(set(range(1, world_size)) - set(channels))
        raise ConfigError(
            f"ranks {missing} did not come within {_MEET_SECONDS:g} s; expected every rank to run "
            "semipd.parallel.launch, and one engine at a time"
        ) from error
    return channels, make_group(launch, number)


def _greeted(connection: socket.socket, secret: bytes) -> int | None:
    """Which rank has come in; None for whoever does not know the secret."""
    connection.settimeout(_HELLO_SECONDS)
    said = b""
    try:
        while len(said) < _HELLO.size:
            said += connection.recv(_HELLO.size - len(said)) or bytes(_HELLO.size)
    except OSError:
        return None
    told, rank = _HELLO.unpack(said[: _HELLO.size])
    if not hmac.compare_digest(told, secret):
        return None
    _prepare(connection)
    return int(rank)


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a step must not wait for the next one


def make_group(launch: Launch, number: int) -> TensorGroup:
    """The membership in this process of the launcher's engine of that number."""
    store = join_store(launch.host, launch.port, prefix=f"{launch.prefix}/{number}")
    return TensorGroup(launch.shard, store, host=launch.host)


def next_engine(launch: Launch, number: int) -> Channel | None:
    """A worker's channel to rank 0's engine of that number, once there is one; None when there will be none."""
    store = join_store(launch.host, launch.port, prefix=launch.prefix)
    try:
        while not store.check([f"{number}/door"]):
            if store.check(["end"]):
                return None
            time.sleep(_POLL_SECONDS)
        port, secret = store.get(f"{number}/door").decode().split()
    except RuntimeError:  # the store went with rank 0, whose process hosted it
        return None
    connection = socket.create_connection((launch.host, int(port)), timeout=_MEET_SECONDS)
    _prepare(connection)
    connection.sendall(_HELLO.pack(bytes.fromhex(secret), launch.shard.rank))
    return Channel(connection)


def say_end(launch: Launch) -> None:
    """Have the workers end: rank 0 makes no engine any more."""
    join_store(launch.host, launch.port, prefix=launch.prefix).set("end", "1")
