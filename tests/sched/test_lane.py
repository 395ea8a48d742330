"""The loop of a lane: one step ahead, in order, and loud when something breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from semipd.config import Phase
from semipd.device.partition import Completion
from semipd.sched.batch import Batch, StepResult
from semipd.sched.lane import Lane
from tests.sched.oracle import Driver, expected_output


class _Recorder:
    """Runs steps on the oracle when they are waited for, and keeps the order of launches and reads."""

    def __init__(self, driver: Driver, fail: Callable[[Batch], bool] = lambda batch: False) -> None:
        self.log: list[tuple[str, int]] = []
        self._driver = driver
        self._fail = fail

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass

    def execute(self, batch: Batch) -> Completion[StepResult]:
        self.log.append(("launch", batch.step_id))
        recorder = self

        class Step:
            def is_done(self) -> bool:
                return True

            def wait(self) -> StepResult:
                recorder.log.append(("read", batch.step_id))
                if recorder._fail(batch):
                    raise RuntimeError("planted")
                return StepResult(recorder._driver.pool.run(batch), 0.0)

        return Step()


def _lane(driver: Driver, executor: _Recorder, phase: Phase, steps_ahead: int, failures: list[BaseException]) -> Lane:
    return Lane(
        phase, scheduler=driver.scheduler, executor=executor, steps_ahead=steps_ahead, on_failure=failures.append
    )


def _prefill(driver: Driver) -> None:
    while driver.launch(Phase.PREFILL):
        driver.commit(Phase.PREFILL)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_lane_stays_its_number_of_steps_ahead(steps_ahead: int) -> None:
    driver = Driver()
    request = driver.submit([1, 2, 3], 5)[0]
    _prefill(driver)
    executor = _Recorder(driver)
    lane = _lane(driver, executor, Phase.DECODE, steps_ahead, [])
    while not request.is_finished:
        lane.step()
    assert request.output_token_ids == expected_output([1, 2, 3], 5)
    launches = [step for kind, step in executor.log if kind == "launch"]
    reads = [step for kind, step in executor.log if kind == "read"]
    assert launches == reads == sorted(launches)
    ahead = max(
        sum(kind == "launch" for kind, _ in executor.log[:end]) - sum(kind == "read" for kind, _ in executor.log[:end])
        for end in range(len(executor.log) + 1)
    )
    assert ahead == steps_ahead + 1


def test_an_exception_in_a_step_ends_the_lane_with_its_cause() -> None:
    driver = Driver()
    driver.submit([1, 2, 3], 5)
    failures: list[BaseException] = []
    failed = threading.Event()

    def on_failure(error: BaseException) -> None:
        failures.append(error)
        failed.set()

    lane = Lane(
        Phase.PREFILL,
        scheduler=driver.scheduler,
        executor=_Recorder(driver, fail=lambda batch: True),
        steps_ahead=0,
        on_failure=on_failure,
    )
    lane.start()
    assert failed.wait(10)
    lane.join()
    assert [str(error) for error in failures] == ["planted"]


def test_a_stopped_lane_reads_what_it_launched_and_ends() -> None:
    driver = Driver()
    driver.submit([1, 2, 3], 50)
    _prefill(driver)
    executor = _Recorder(driver)
    lane = _lane(driver, executor, Phase.DECODE, 1, [])
    lane.step()
    lane.start()
    driver.scheduler.stop()
    lane.join()
    launches = [step for kind, step in executor.log if kind == "launch"]
    assert launches == [step for kind, step in executor.log if kind == "read"]
