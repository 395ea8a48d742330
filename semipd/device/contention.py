"""How many threads a team on k cores should have while other programs use those cores too.

An OpenMP team waits for its slowest thread at the end of every operation. When one of its threads queues for a core,
the others spin for it: on two cores beside two busy processes, a decode step of a 135M model took 1500 ms with two
threads and 215 ms with one. So a team gives up as many threads as there are cores in use by others.

The two directions look at different things. A full team knows that it is in contention when its own threads wait for a
core, which the kernel counts to the nanosecond. A smaller team leaves room and does not wait, so it looks at how busy
others keep the cores; that is read without trying, since a try in vain would be one very slow step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

TOLERATED = 0.25
"""Cores that others may use of ours, or threads of ours that wait, on average, without a change of size."""

CHECK_INTERVAL = 0.02
"""Seconds between looks at a full team."""

MIN_EVIDENCE = 0.04
"""Seconds that a full team must have wanted cores, over its threads, before its waits mean anything."""

MIN_RECOVERY, MAX_RECOVERY = 0.25, 4.0
"""Seconds over which the cores must be free before a team grows; /proc/stat counts in steps of 0.01."""

RELAPSE = 2.0
"""Seconds after growing to full size in which new contention doubles the next recovery, up to the maximum."""


class TeamTimes(NamedTuple):
    """Seconds over all threads of a team so far: on a core, and ready but waiting for one."""

    ran: float
    waited: float


class Counters(Protocol):
    """What the kernel counts of a team and of its cores. Both only grow."""

    def team(self) -> TeamTimes:
        """Times of the team's threads."""
        ...

    def cores(self) -> float:
        """Seconds that the cores were busy, with anybody's work, over all cores."""
        ...


class TeamSizer:
    """The size of one team over time. Not thread-safe: it belongs to the team's master."""

    def __init__(self, num_cores: int, counters: Counters, now: float) -> None:
        """A sizer for a team of all `num_cores`; `now` is a monotonic clock in seconds, here and in `update`."""
        self.num_threads = num_cores
        self._num_cores = num_cores
        self._counters = counters
        self._recovery = MIN_RECOVERY
        self._grown_at = -math.inf
        self._marked_at = now
        self._team = counters.team()
        self._busy = 0.0  # read only while the team is small: on a machine of many cores it costs a millisecond

    def update(self, now: float) -> bool:
        """Whether `num_threads` has just changed; to be called between two works."""
        is_full = self.num_threads == self._num_cores
        if now - self._marked_at < (CHECK_INTERVAL if is_full else self._recovery):
            return False
        size = self._size_when_full(now) if is_full else self._size_when_small(now)
        if size == self.num_threads:
            return False
        self.num_threads = size
        return True

    def _size_when_full(self, now: float) -> int:
        team = self._counters.team()
        ran, waited = team.ran - self._team.ran, team.waited - self._team.waited
        if ran + waited < MIN_EVIDENCE:
            return self._num_cores
        waiting_threads = self._num_cores * waited / (ran + waited)
        self._marked_at, self._team = now, team
        if waiting_threads <= TOLERATED:
            return self._num_cores
        self._busy = self._counters.cores()
        has_relapsed = now - self._grown_at < RELAPSE
        self._recovery = min(2 * self._recovery, MAX_RECOVERY) if has_relapsed else MIN_RECOVERY
        return max(1, self._num_cores - math.ceil(waiting_threads))

    def _size_when_small(self, now: float) -> int:
        team, busy = self._counters.team(), self._counters.cores()
        others = (busy - self._busy - (team.ran - self._team.ran)) / (now - self._marked_at)
        self._marked_at, self._team, self._busy = now, team, busy
        size = min(self._num_cores, max(1, self._num_cores - math.ceil(others - TOLERATED)))
        if size == self._num_cores:
            self._grown_at = now
        return size


class ProcCounters:
    """Counters of Linux. A team's threads are known by their name, which each inherits from the thread that made it."""

    def __init__(self, thread_name: str, cores: Sequence[int]) -> None:
        """Counters of the threads of this process called `thread_name` (15 bytes at most), and of `cores`."""
        self._thread_name = thread_name
        self._core_labels = {f"cpu{core}" for core in cores}
        self._ticks_per_second = os.sysconf("SC_CLK_TCK")
        self._files: dict[int, int] = {}
        self._last: dict[int, TeamTimes] = {}
        self._total = TeamTimes(0.0, 0.0)

    @staticmethod
    def are_supported() -> bool:
        """Whether this system counts what is needed and lets a thread be named; macOS and some sandboxes do not."""
        try:
            name = Path("/proc/thread-self/comm")
            name.write_text(name.read_text())
            ran, _, _ = Path("/proc/thread-self/schedstat").read_text().split()
            return int(ran) > 0 and bool(_read_core_ticks())
        except OSError:
            return False

    def find_team(self) -> list[int]:
        """Thread ids of the team as it is now; they are the ones counted from now on."""
        self.close()
        for task in Path("/proc/self/task").iterdir():
            try:
                if (task / "comm").read_text().rstrip("\n") == self._thread_name:
                    self._files[int(task.name)] = os.open(task / "schedstat", os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, ProcessLookupError):  # ended since it was listed
                continue
        self._last = {thread: self._read_thread(thread) for thread in self._files}
        return list(self._files)

    def team(self) -> TeamTimes:
        """Times of the team's threads; a thread counts from when it was found."""
        ran, waited = self._total
        try:
            for thread, last in self._last.items():
                times = self._last[thread] = self._read_thread(thread)
                ran += times.ran - last.ran
                waited += times.waited - last.waited
        except ProcessLookupError:  # the OpenMP runtime ended a thread by itself, to change the size of its team
            self.find_team()
        self._total = TeamTimes(ran, waited)
        return self._total

    def cores(self) -> float:
        """Seconds that the cores were busy, what the hypervisor took included."""
        ticks = _read_core_ticks()
        return sum(busy for label, busy in ticks.items() if label in self._core_labels) / self._ticks_per_second

    def close(self) -> None:
        """Give the open files back; the counters then stand still until `find_team`."""
        for file in self._files.values():
            os.close(file)
        self._files = {}
        self._last = {}

    def _read_thread(self, thread: int) -> TeamTimes:
        ran, waited, _ = os.pread(self._files[thread], 64, 0).split()
        return TeamTimes(int(ran) * 1e-9, int(waited) * 1e-9)


def _read_core_ticks() -> dict[str, int]:
    """Ticks that each core was busy, by its label in /proc/stat."""
    busy = {}
    for line in Path("/proc/stat").read_text().splitlines():
        label, *fields = line.split()
        if label.startswith("cpu") and label != "cpu":
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            busy[label] = user + nice + system + irq + softirq + steal
    return busy
