"""The size of a team under contention, with counters and a clock that the test moves."""

from __future__ import annotations

import threading

import pytest

from semipd.device.contention import MAX_RECOVERY, MIN_RECOVERY, RELAPSE, ProcCounters, TeamSizer, TeamTimes


class FakeMachine:
    """Cores that a team and others use, as far as counters can see them."""

    def __init__(self, num_cores: int) -> None:
        self.now = 100.0
        self.reads = 0
        self._num_cores = num_cores
        self._ran = 5.0
        self._waited = 1.0
        self._busy = 70.0
        self.sizer = TeamSizer(num_cores, self, self.now)

    def team(self) -> TeamTimes:
        self.reads += 1
        return TeamTimes(self._ran, self._waited)

    def cores(self) -> float:
        return self._busy

    def work(self, seconds: float, others: float) -> bool:
        """Run the team for `seconds` while others want `others` cores, sharing fairly; whether its size changed."""
        threads = self.sizer.num_threads
        wanted = threads + others
        granted = min(1.0, self._num_cores / wanted)
        self.now += seconds
        self._ran += seconds * threads * granted
        self._waited += seconds * threads * (1 - granted)
        self._busy += seconds * wanted * granted
        return self.sizer.update(self.now)

    def seconds_until(self, num_threads: int, others: float, limit: float = 60.0) -> float:
        """How long the team works in steps of 50 ms until it has `num_threads`."""
        start = self.now
        while self.sizer.num_threads != num_threads:
            self.work(0.05, others)
            assert self.now - start < limit, f"still {self.sizer.num_threads} threads after {limit} s"
        return self.now - start


def test_a_team_alone_keeps_its_size() -> None:
    machine = FakeMachine(2)
    assert not any(machine.work(0.025, others=0.0) for _ in range(1000))
    assert machine.sizer.num_threads == 2


@pytest.mark.parametrize("others", [1.0, 2.0, 5.0])
def test_two_threads_become_one_at_the_first_contended_work(others: float) -> None:
    machine = FakeMachine(2)
    assert machine.work(0.1, others)
    assert machine.sizer.num_threads == 1


@pytest.mark.parametrize("others", [1.0, 2.0])
def test_a_small_team_stays_small_while_others_use_the_cores(others: float) -> None:
    machine = FakeMachine(2)
    machine.work(0.1, others)
    assert not any(machine.work(0.05, others) for _ in range(2000))


def test_a_team_grows_soon_after_its_cores_are_free() -> None:
    machine = FakeMachine(2)
    for _ in range(40):
        machine.work(0.1, others=2.0)
    assert machine.seconds_until(2, others=0.0) <= 2 * MIN_RECOVERY + 0.1


def test_light_load_beside_a_team_changes_nothing() -> None:
    machine = FakeMachine(2)
    assert not any(machine.work(0.05, others=0.2) for _ in range(1000))
    machine.work(0.1, others=2.0)
    assert machine.seconds_until(2, others=0.2) < 1.0


@pytest.mark.parametrize(("num_cores", "others"), [(16, 1.0), (16, 5.0), (16, 8.0), (64, 40.0), (4, 10.0)])
def test_a_large_team_gives_up_as_many_threads_as_others_use_cores(num_cores: int, others: float) -> None:
    machine = FakeMachine(num_cores)
    expected = max(1, num_cores - int(others))
    machine.seconds_until(expected, others)
    for _ in range(200):
        machine.work(0.05, others)
    assert machine.sizer.num_threads == expected


def test_load_that_comes_and_goes_is_tried_ever_more_rarely() -> None:
    machine = FakeMachine(2)
    recoveries = []
    for _ in range(8):
        machine.work(0.1, others=2.0)
        assert machine.sizer.num_threads == 1
        recoveries.append(machine.seconds_until(2, others=0.0))
    assert recoveries == sorted(recoveries)
    assert recoveries[0] <= MIN_RECOVERY + 0.1
    assert recoveries[-1] == pytest.approx(MAX_RECOVERY, abs=0.1)


def test_a_calm_time_forgives_earlier_relapses() -> None:
    machine = FakeMachine(2)
    for _ in range(8):
        machine.work(0.1, others=2.0)
        machine.seconds_until(2, others=0.0)
    machine.work(RELAPSE + 0.1, others=0.0)
    machine.work(0.1, others=2.0)
    assert machine.seconds_until(2, others=0.0) <= MIN_RECOVERY + 0.1


def test_short_works_share_one_look_at_the_counters() -> None:
    machine = FakeMachine(2)
    reads = machine.reads
    for _ in range(1000):
        machine.work(0.0001, others=0.0)
    assert machine.reads - reads <= 6


def test_idle_time_is_no_evidence() -> None:
    machine = FakeMachine(2)
    for _ in range(100):
        machine.now += 1.0
        assert not machine.sizer.update(machine.now)
    assert machine.work(0.1, others=2.0), "contention is seen at once after it"


needs_counters = pytest.mark.skipif(not ProcCounters.are_supported(), reason="this system has no such counters")


@needs_counters
def test_counters_of_this_system_see_the_threads_that_carry_the_name() -> None:
    with open("/proc/thread-self/comm") as file:
        own_name = file.read()
    sampled: list[TeamTimes] = []
    found: list[int] = []

    def use_a_core() -> None:
        with open("/proc/thread-self/comm", "w") as file:
            file.write("team-of-test")
        counters = ProcCounters("team-of-test", [0])
        found.extend(counters.find_team())
        sampled.append(counters.team())
        end = threading.Event()
        for _ in range(20):
            sum(range(10_000))
            end.wait(0.0001)
        sampled.append(counters.team())
        counters.close()

    thread = threading.Thread(target=use_a_core)
    thread.start()
    thread.join()
    assert found == [thread.native_id]
    assert sampled[1].ran > sampled[0].ran
    assert sampled[1].waited >= sampled[0].waited
    with open("/proc/thread-self/comm") as file:
        assert file.read() == own_name


@needs_counters
def test_counters_survive_the_end_of_a_thread() -> None:
    started, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with open("/proc/thread-self/comm", "w") as file:
            file.write("team-of-test")
        started.set()
        leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    started.wait()
    counters = ProcCounters("team-of-test", [0])
    assert counters.find_team() == [thread.native_id]
    before = counters.team()
    leave.set()
    thread.join()
    after = [counters.team() for _ in range(3)]
    assert all(times.ran >= before.ran for times in after)
    counters.close()
