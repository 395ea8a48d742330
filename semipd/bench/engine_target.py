"""An engine in this process as a target.

One thread sends and never waits for the engine. Tokens are stamped by the engine's delivery thread as it hands them
over, which costs a few microseconds each; no reader of ours has to be scheduled first.
"""

from __future__ import annotations

import gc
import queue
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from semipd.bench.engine_arguments import SHAPES, parse_policy_spec, policy_name, save_shapes
from semipd.bench.metrics import RequestRecord, Status
from semipd.bench.prompts import PromptMaker
from semipd.bench.schedule import PlannedRequest
from semipd.bench.target import Outcome, Run, clock
from semipd.config import SLO, Phase
from semipd.engine import Engine
from semipd.errors import EngineDead, QueueFull, SemiPDError
from semipd.metrics import EngineStatistics
from semipd.request import RequestOutput, SamplingParams
from semipd.sched.decisions import Decision
from semipd.streams import Stream

HEAD_START = 0.1
"""Seconds from the start of a run to its first possible arrival."""
SAMPLE_INTERVAL = 0.1
"""Seconds between two samples of the engine's gauges."""
STALLED = 60.0
"""Seconds in which an engine that lives ends aborted requests."""


class EngineTarget:
    """An engine with one policy, made when entered.

    Args:
        model: as `Engine` takes it, or a name of `SHAPES`.
        policy: see `parse_policy_spec`; also the target's label. None takes the engine's default; the label is its
            name once the target is entered.
        options: further arguments of `Engine`.
        slo: the targets that the engine is told.
    """

    def __init__(self, model: str, *, policy: str | None, options: Mapping[str, Any], slo: SLO | None) -> None:
        self.label = policy or "default"
        self._model = model
        self._policy = None if policy is None else parse_policy_spec(policy)
        self._options = {"calibrate": False, **options, "slo": slo}
        self._engine: Engine | None = None
        self._vocab_size = 0
        self._startup = 0.0
        self._death: EngineDead | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def description(self) -> Mapping[str, Any]:
        """The engine's arguments, the model by its name alone, and the seconds of its start."""
        options = {name: value for name, value in self._options.items() if name not in ("slo", "trace")}
        slo = self._options["slo"]
        return {
            "kind": "engine",
            "model": Path(self._model).name,
            "policy": repr(self._policy),
            "slo": None if slo is None else asdict(slo),
            "options": options,
            "startup": self._startup,
        }

    def __enter__(self) -> Self:
        from semipd.arguments import as_config
        from semipd.build import build_core

        started = clock()
        options, model = {**self._options, "policy": self._policy}, self._model
        if model in SHAPES:
            self._folder = tempfile.TemporaryDirectory()
            model = str(save_shapes(model, Path(self._folder.name)))
            options = {"load_format": "dummy", **options}
        try:
            built = build_core(as_config(model, options))  # type: ignore[arg-type]  # which judges the names
            self._vocab_size = built.core.limits.vocab_size
            self._engine = Engine.from_core(built.core, built.tokenizer)
            if self._policy is None:
                self._policy = self._engine.config.policy
                assert self._policy is not None, "the build fills it in"
                self.label = policy_name(self._policy)
            self._startup = clock() - started
            self._engine.settle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        gc.collect()  # the next engine needs this one's memory

    def run(self, run: Run) -> Outcome:
        assert self._engine is not None, "enter the target first"
        if self._death is not None:  # in an earlier run, whose requests say so
            raise self._death
        maker = PromptMaker(vocab_size=self._vocab_size, seed=run.prompt_seed, run=run.number)
        prompts = [maker.token_ids(request) for request in run.requests]
        gc.collect()
        before = self._engine.statistics()
        start = clock() + HEAD_START
        ended: queue.SimpleQueue[None] = queue.SimpleQueue()

        def on_ended() -> None:
            ended.put(None)
            run.on_ended(1)

        flights = [_Flight(request, start, on_ended) for request in run.requests]
        with _Sampler(self._engine, start) as sampler:
            for flight, prompt in zip(flights, prompts, strict=True):
                if (delay := start + flight.request.due - clock()) > 0:
                    time.sleep(delay)
                flight.send(self._engine, prompt.tolist())
            _wait(ended, flights, deadline=clock() + run.drain)
        self._death = next((flight.death for flight in flights if flight.death is not None), None)
        counted = totals(before, self._engine.statistics())
        return Outcome(records=[flight.record for flight in flights], engine={"totals": counted, **sampler.columns()})


class _Flight:
    """One request under way."""

    def __init__(self, request: PlannedRequest, start: float, on_ended: Callable[[], None]) -> None:
        self.request = request
        self._start = start
        self._on_ended = on_ended
        self._sent = 0.0
        self._stream: Stream | None = None
        self._times = array("d")  # which the garbage collector need not look through
        self._status = Status.UNFINISHED
        self._error: str | None = None
        self._queued: float | None = None
        self._is_given_up = False
        self.death: EngineDead | None = None

    def send(self, engine: Engine, prompt: Sequence[int]) -> None:
        """Hand it to the engine, which calls `_on_ready`; never waits."""
        params = SamplingParams(temperature=0.0, max_tokens=self.request.num_output_tokens, ignore_eos=True)
        self._sent = clock() - self._start
        try:
            self._stream = engine.submit(prompt, params)
        except SemiPDError as error:
            self._fail(error)
        else:
            self._listen()

    def give_up(self) -> None:
        """The drain is over: whatever still comes does not count."""
        self._is_given_up = True
        if (stream := self._stream) is not None:
            stream.abort()

    @property
    def record(self) -> RequestRecord:
        """What happened so far."""
        return RequestRecord(
            request=self.request,
            sent=self._sent,
            token_times=self._times,
            num_output_tokens=len(self._times),
            status=self._status,
            error=self._error,
            queued=self._queued,
        )

    def _listen(self) -> None:
        stream = self._stream
        assert stream is not None
        while not stream.call_when_ready(self._on_ready):  # there is something already
            if self._take():
                return

    def _on_ready(self) -> None:
        """On the engine's delivery thread, once per step."""
        if not self._take():
            self._listen()

    def _take(self) -> bool:
        """Stamp what is new; whether that was the end."""
        assert self._stream is not None
        now = clock() - self._start
        try:
            delta = self._stream.poll()
        except SemiPDError as error:  # the engine ended
            self._fail(error)
            return True
        if delta is None:
            return False
        if not self._is_given_up:
            self._times.extend([now] * len(delta.outputs[0].token_ids))
        if delta.finished:
            self._end(delta)
        return delta.finished

    def _end(self, delta: RequestOutput) -> None:
        timings = delta.outputs[0].timings
        self._queued = None if timings is None else timings.queued
        if not self._is_given_up:
            self._status = Status.OK
        self._stream = None
        self._on_ended()

    def _fail(self, error: SemiPDError) -> None:
        self.death = error if isinstance(error, EngineDead) else None
        self._status = Status.REJECTED if isinstance(error, QueueFull) else Status.ERROR
        cause = "" if error.__cause__ is None else f" ({type(error.__cause__).__name__}: {error.__cause__})"
        self._error = f"{type(error).__name__}: {error}{cause}"[:200]
        self._stream = None
        self._on_ended()


class _Sampler:
    """Reads the engine's gauges and decisions now and then, in a thread of its own."""

    def __init__(self, engine: Engine, start: float) -> None:
        self._engine = engine
        self._start = start
        self._rows: list[dict[str, Any]] = []
        self._decisions: dict[int, Decision] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bench-sampler", daemon=True)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._take(self._engine.statistics())

    def columns(self) -> dict[str, dict[str, list[Any]]]:
        """Samples and decisions, each by column."""
        samples = {name: [row[name] for row in self._rows] for name in (self._rows[0] if self._rows else ())}
        return {"samples": samples, "decisions": decision_columns(list(self._decisions.values()), self._start)}

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL):
            statistics = self._engine.statistics()
            self._rows.append(sample_row(statistics, clock() - self._start))
            self._take(statistics)

    def _take(self, statistics: EngineStatistics) -> None:
        """The decisions made since the last sample; earlier ones may have got their measured step since."""
        self._decisions.update({decision.number: decision for decision in statistics.decisions})


def _wait(ended: queue.SimpleQueue[None], flights: Sequence[_Flight], *, deadline: float) -> None:
    """Wait for all requests to end; at the deadline the rest is aborted, so that the next run finds an idle engine."""
    num_open = len(flights)
    while num_open and (left := deadline - clock()) > 0:
        try:
            ended.get(timeout=left)
            num_open -= 1
        except queue.Empty:
            break
    if num_open:
        for flight in flights:
            flight.give_up()
        for _ in range(num_open):
            try:
                ended.get(timeout=STALLED)
            except queue.Empty:
                raise RuntimeError(f"the engine did not end its aborted requests in {STALLED:.0f} s") from None


def sample_row(statistics: EngineStatistics, time: float) -> dict[str, Any]:
    """The gauges of an engine at `time` of the run."""
    plan = statistics.plan
    return {
        "time": round(time, 4),
        "plan": None if plan is None else plan.kind.value,
        "prefill_sms": None if plan is None else plan.prefill_sms,
        "decode_sms": None if plan is None else plan.decode_sms,
        "num_waiting": statistics.num_waiting,
        "num_prefilling": statistics.num_running[Phase.PREFILL],
        "num_decoding": statistics.num_running[Phase.DECODE],
        "kv_cache_usage": round(statistics.kv_cache_usage, 4),
        "num_steps": sum(times.count for times in statistics.step_time.values()),  # since the engine's start
    }


_DECISION_COLUMNS = ("reason", "is_forced", "num_waiting", "num_prompt_tokens", "num_decodes", "context_tokens")


def decision_columns(decisions: Sequence[Decision], start: float) -> dict[str, list[Any]]:
    """The decisions of a run that began at `start`, by column, after the one that was in force then."""
    num_before = sum(decision.time < start for decision in decisions)
    mine = decisions[max(num_before - 1, 0) :]
    plans = [decision.after for decision in mine]
    return {
        "time": [round(max(decision.time - start, 0.0), 4) for decision in mine],
        "plan": [plan.kind.value for plan in plans],
        "prefill_sms": [plan.prefill_sms for plan in plans],
        "decode_sms": [plan.decode_sms for plan in plans],
        "token_budget": [plan.token_budget for plan in plans],
        **{name: [getattr(decision, name) for decision in mine] for name in _DECISION_COLUMNS},
        "step": [None if decision.work is None else decision.work.kind.value for decision in mine],
        "predicted": [decision.predicted for decision in mine],
        "measured": [decision.measured for decision in mine],
    }


_TOTALS = (
    *("num_plan_changes", "num_forced_plan_changes", "num_prompt_tokens", "num_generation_tokens", "num_preemptions"),
    "num_prefix_hit_tokens",
)


def totals(before: EngineStatistics, after: EngineStatistics) -> dict[str, Any]:
    """What the engine counted during a run."""
    counted: dict[str, Any] = {name: getattr(after, name) - getattr(before, name) for name in _TOTALS}
    for phase in Phase:
        first, last = before.step_time[phase], after.step_time[phase]
        counted[f"num_{phase.value}_steps"] = last.count - first.count
        counted[f"{phase.value}_step_seconds"] = last.total - first.total
    return counted
