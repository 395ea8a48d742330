"""A simulated engine as a target of the serving benchmark: its sessions, searches and plots work as they are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from benchmarks.simulation.device import DeviceStep, StepTimes
from benchmarks.simulation.engine import EngineShape, SimulatedEngine
from semipd.bench.engine_arguments import parse_policy_spec
from semipd.bench.engine_target import SAMPLE_INTERVAL, decision_columns, sample_row, totals
from semipd.bench.metrics import RequestRecord, Status
from semipd.bench.prompts import PromptMaker
from semipd.bench.schedule import PlannedRequest
from semipd.bench.target import Outcome, Run
from semipd.config import SLO, PolicyConfig
from semipd.errors import PromptTooLong, QueueFull
from semipd.request import FinishReason, Request
from semipd.sched.decisions import Decision
from semipd.sched.events import StepEvents

VOCAB_SIZE = 128_256


class Flights:
    """The requests of one engine and what became of them; prompts are made when they are due."""

    def __init__(
        self,
        shape: EngineShape,
        *,
        policy: PolicyConfig,
        slo: SLO | None,
        times: StepTimes,
        maker: PromptMaker,
        seed: int,
        on_step: Callable[[DeviceStep], None] | None = None,
    ) -> None:
        self.engine = SimulatedEngine(
            shape, policy=policy, slo=slo, times=times, emit=self._on_events, seed=seed, on_step=on_step
        )
        self.num_ended = 0
        self._maker = maker
        self._open: dict[Request, tuple[PlannedRequest, array[float]]] = {}
        self._records: list[RequestRecord] = []

    @property
    def num_open(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._open)

    def outstanding_tokens(self) -> int:
        """Prompt tokens of requests without a first token, and output tokens that are still to come."""
        return sum(
            [
                planned.num_output_tokens - len(times) + (0 if times else planned.num_prompt_tokens)
                for planned, times in self._open.values()
            ]
        )

    def send(self, planned: PlannedRequest) -> None:
        """Let the engine go on up to a request's time, and hand the request over.

        Raises:
            PromptTooLong: it cannot be served.
        """
        self.engine.advance(planned.due)
        if planned.num_prompt_tokens >= self.engine.shape.max_model_len:
            raise PromptTooLong(
                f"a prompt of {planned.num_prompt_tokens} tokens does not fit max_model_len "
                f"{self.engine.shape.max_model_len}; raise it or cut the workload"
            )
        try:
            request = self.engine.submit(self._maker.token_ids(planned).tolist(), planned.num_output_tokens)
        except QueueFull as error:
            self.num_ended += 1
            self._record(planned, array("d"), Status.REJECTED, error=f"QueueFull: {error}")
            return
        self._open[request] = planned, array("d")

    def give_up(self) -> None:
        """End what is still open; it counts as unfinished."""
        for request in list(self._open):
            self.engine.abort(request)

    def records(self) -> list[RequestRecord]:
        """Of all requests that ended, in the order of their schedule."""
        return sorted(self._records, key=lambda record: record.request.index)

    def _on_events(self, events: StepEvents) -> None:
        now = self.engine.clock.now
        flights = self._open
        for request in events.requests:
            flights[request][1].append(now)
        for request in events.finished:
            planned, times = flights.pop(request)
            self.num_ended += 1
            is_ok = request.finish_reason is not FinishReason.ABORT
            queued = request.timings(now).queued if is_ok else None
            self._record(planned, times, Status.OK if is_ok else Status.UNFINISHED, queued=queued)

    def _record(
        self,
        planned: PlannedRequest,
        times: array[float],
        status: Status,
        *,
        queued: float | None = None,
        error: str | None = None,
    ) -> None:
        self._records.append(
            RequestRecord(
                request=planned,
                sent=planned.due,
                token_times=times,
                num_output_tokens=len(times),
                status=status,
                error=error,
                queued=queued,
            )
        )


class SimulatedTarget:
    """An engine with one policy. Each run has a fresh one, so a run depends on its own load and seed alone.

    Args:
        policy: see `parse_policy_spec`; also the target's label.
        shape: device and limits.
        slo: the targets that the engine is told.
        times: how long steps take.
        source: what results say of them.
    """

    def __init__(self, *, policy: str, shape: EngineShape, slo: SLO | None, times: StepTimes, source: str) -> None:
        self.label = policy
        self._policy = parse_policy_spec(policy)
        self._shape = shape
        self._slo = slo
        self._times = times
        self._source = source

    @property
    def description(self) -> Mapping[str, Any]:
        """The engine's arguments and where its step times come from."""
        return {
            "kind": "simulated",
            "policy": repr(self._policy),
            "slo": None if self._slo is None else asdict(self._slo),
            "options": asdict(self._shape),
            "step_times": self._source,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def run(self, run: Run) -> Outcome:
        flights = Flights(
            self._shape,
            policy=self._policy,
            slo=self._slo,
            times=self._times,
            maker=PromptMaker(vocab_size=VOCAB_SIZE, seed=run.prompt_seed, run=run.number),
            seed=run.prompt_seed + run.number,
        )
        engine = flights.engine
        before = engine.statistics()
        rows: list[dict[str, Any]] = []
        decisions: dict[int, Decision] = {}
        num_told = 0

        def advance(until: float) -> None:
            nonlocal num_told
            while (sampled_at := (len(rows) + 1) * SAMPLE_INTERVAL) <= until:
                engine.advance(sampled_at)
                statistics = engine.statistics()
                rows.append(sample_row(statistics, sampled_at))
                decisions.update({decision.number: decision for decision in statistics.decisions})
                if flights.num_ended > num_told:
                    run.on_ended(flights.num_ended - num_told)
                    num_told = flights.num_ended
                if sampled_at > last_due and not flights.num_open:
                    return
            engine.advance(until)

        last_due = run.requests[-1].due
        for planned in run.requests:
            advance(planned.due)
            flights.send(planned)
        advance(last_due + run.drain)
        flights.give_up()
        engine.advance(engine.clock.now + 60.0)  # launched steps end, and with them what they hold
        engine.check_integrity()
        assert engine.next_event == float("inf") and not flights.num_open, "requests are open in an idle engine"
        run.on_ended(flights.num_ended - num_told)
        names = rows[0] if rows else ()
        return Outcome(
            records=flights.records(),
            engine={
                "totals": totals(before, engine.statistics()),
                "samples": {name: [row[name] for row in rows] for name in names},
                "decisions": decision_columns(list(decisions.values()), 0.0),
            },
        )
