"""What a step must run behind, beside what its own stream says."""

from __future__ import annotations

from semipd.config import Phase
from semipd.device.partition import Completion, Stream
from semipd.sched.batch import Batch, StepResult


class LaneOrder:
    """The last launched step of each lane. Each lane asks and tells from its own thread."""

    def __init__(self) -> None:
        # A key for each lane from the start: one lane reads all of it while the other writes its own.
        self._last: dict[Phase, tuple[Stream, Completion[StepResult]] | None] = dict.fromkeys(Phase)

    def before(self, batch: Batch, stream: Stream) -> list[Completion[StepResult]]:
        """The steps on other streams that `batch` must not overtake.

        A lane that moved to another stream must not overtake its own last step; a MIXED step follows both lanes.
        """
        return [
            last[1]
            for phase, last in self._last.items()
            if last is not None and last[0] is not stream and _precedes(phase, batch)
        ]

    def launched(self, batch: Batch, stream: Stream, completion: Completion[StepResult]) -> None:
        """`batch` is its lane's last step now."""
        self._last[batch.phase] = (stream, completion)


def _precedes(phase: Phase, batch: Batch) -> bool:
    return phase is batch.phase or (batch.phase is Phase.DECODE and bool(batch.prefill))
