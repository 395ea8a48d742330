"""Runs each step on all ranks: what rank 0's lanes launch, the workers launch too, in the same order.

One lock makes that order. Without it the two lanes' steps could reach the ranks crosswise, and each rank would wait in
the collective of another step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from semipd.device.partition import Completion
from semipd.parallel.channel import Execute
from semipd.sched.batch import Batch, StepResult
from semipd.sched.lane import Executor

if TYPE_CHECKING:  # it imports torch.distributed, which one rank has no use for
    from semipd.parallel.ranks import Ranks


class RankRunner(Executor, Protocol):
    """Runs steps on this rank's device: `Runner` or `GpuRunner`."""

    def choose_shape(self, batch: Batch) -> Any:
        """What to pad a step to, which depends on the graphs of this rank."""
        ...

    def execute(self, batch: Batch, shape: Any = None) -> Completion[StepResult]:
        """Launch one step, padded to `shape`, which is the same on all ranks as their collectives are."""
        ...


class RankedExecutor:
    """Rank 0's executor.

    Args:
        runner: of this rank.
        ranks: the others.
    """

    def __init__(self, runner: RankRunner, ranks: Ranks) -> None:
        self._runner: RankRunner | None = runner
        self._ranks = ranks
        self._lock = threading.Lock()

    def execute(self, batch: Batch) -> Completion[StepResult]:
        """Launch the step on all ranks; its completion is this rank's."""
        runner = self._runner
        assert runner is not None, "a step was launched on a closed executor"
        try:
            with self._lock:
                self._ranks.raise_if_failed()
                shape = runner.choose_shape(batch)
                self._ranks.send(Execute(batch, shape))
                return _RankedCompletion(runner.execute(batch, shape), self._ranks)
        except BaseException as error:
            self._ranks.blame(error)
            raise

    def settle(self) -> None:
        """Return once no rank gets faster."""
        runner = self._runner
        if runner is not None:
            self._ranks.settle(runner.settle)

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """Have `on_failure` called, once, when a worker ends before this executor is closed."""
        self._ranks.watch(on_failure)

    def close(self) -> None:
        """Have all ranks let go of model and group, and return once the workers have ended."""
        self._ranks.close()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            runner.close()  # its graphs hold collectives, and go before the group
            del runner
        self._ranks.join()
        self._ranks.group.close()  # behind the workers, which meet in its store until they have ended


class _RankedCompletion:
    """A step on this rank, which ends as the other ranks let it."""

    def __init__(self, completion: Completion[StepResult], ranks: Ranks) -> None:
        self._completion = completion
        self._ranks = ranks

    def is_done(self) -> bool:
        return self._completion.is_done()

    def wait(self) -> StepResult:
        try:
            result = self._completion.wait()
            self._ranks.raise_if_failed()  # an aborted collective ends too, and leaves anything
            return result
        except BaseException as error:
            self._ranks.blame(error)
            raise
