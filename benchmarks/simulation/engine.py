"""One engine under a virtual clock: the real scheduler, allocator, policy and metrics; lanes without threads.

A lane does what `semipd.sched.lane.Lane` does, as a state machine: it launches up to `steps_ahead` steps beyond the one
that it waits for, commits, and sleeps while there is nothing to do. Between the end of a step and its commit, between a
reason to wake up and waking up, and to launch a step, the host takes fixed times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.simulation.device import DeviceStep, StepTimes, VirtualClock, VirtualDevice
from semipd.config import SLO, MixedPolicy, Phase, PolicyConfig
from semipd.latency_figures import H100_LLAMA_3_8B, stored_state
from semipd.memory.block_allocator import BlockAllocator
from semipd.metrics import EngineStatistics, Metrics
from semipd.model.step_inputs import Buckets
from semipd.request import FinishReason, Request, SamplingParams
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, StepResult
from semipd.sched.events import StepEvents
from semipd.sched.in_flight import LaunchedStep
from semipd.sched.latency import LatencyModel, StepWork
from semipd.sched.policies import make_policy
from semipd.sched.scheduler import Scheduler, SchedulerConfig

_STUCK = 10_000  # actions of lanes at one moment: a policy that never makes up its mind
TOKEN_ID = 7
"""Every generated token; its value decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The device and the limits of an engine; the defaults are an 8B model on an H100 of 80 GB.

    Attributes:
        num_sms: of the device.
        group_size: SMs by which splits differ.
        kv_cache_tokens: tokens of the KV pool.
        block_size: tokens of a block.
        max_num_seqs: requests that run at the same time.
        max_prefill_tokens: most prompt tokens of a prefill step.
        max_model_len: most tokens of a request.
        max_queued_requests: bound of the waiting queue; None for none.
        enable_prefix_caching: whether prompts share blocks.
        prefill_steps_ahead, decode_steps_ahead: launched steps that may be unread while the next one is launched.
        host_delay: seconds from the end of a step to its commit, or from a reason to wake up to being awake.
        launch_delay: seconds that a lane takes to launch a step; beside an H100 it took 0.9 ms for decodes.
        noise: standard deviation of the logarithm of step times.
        slowdown: of steps while an engine serves, over those that were measured one after another. An H100 took up to
            6 % longer for decodes of mixed contexts and 3 to 9 % for MIXED steps, padding left out.
    """

    num_sms: int = 132
    group_size: int = 8
    kv_cache_tokens: int = 400_000
    block_size: int = 64
    max_num_seqs: int = 256
    max_prefill_tokens: int = 2048
    max_model_len: int = 32_768
    max_queued_requests: int | None = None
    enable_prefix_caching: bool = True
    prefill_steps_ahead: int = 1
    decode_steps_ahead: int = 1
    host_delay: float = 150e-6
    launch_delay: float = 900e-6
    noise: float = 0.02
    slowdown: float = 1.05

    @property
    def splits(self) -> tuple[tuple[int, int], ...]:
        """(prefill, decode) SMs: decode has the first groups, prefill the others and what is left over."""
        num_groups = self.num_sms // self.group_size - (self.num_sms % self.group_size > 0)  # 15 and 12 of 132
        return tuple((self.num_sms - self.group_size * k, self.group_size * k) for k in range(1, num_groups))

    @property
    def default_split(self) -> tuple[int, int] | None:
        """As the CUDA backend has it."""
        return self.splits[(3 * (len(self.splits) + 1) + 4) // 8 - 1] if self.splits else None


class _Scheduler(Scheduler):
    """Lets its lanes be driven from outside: what changed, and what the last launched step has to do."""

    work: StepWork

    def has_changed(self, phase: Phase) -> bool:
        """Whether `wait` would return at once."""
        return self._version != self._seen[phase]

    def _launch(
        self, phase: Phase, step: LaunchedStep, entries: tuple[PrefillEntry, ...], updates: tuple[BlockUpdate, ...]
    ) -> Batch:
        self.work = step.work
        return super()._launch(phase, step, entries, updates)


@dataclass(slots=True, eq=False)
class _Lane:
    """Where the loop of one phase stands.

    Attributes:
        in_flight: launched steps that are not committed.
        is_reading: it waits for the oldest of them, or commits it when it acts next; else it sleeps.
        acts_at: when it goes on; infinite while nothing gives it a reason.
        is_free_at: when it has launched what it was about to.
    """

    phase: Phase
    steps_ahead: int
    in_flight: deque[tuple[Batch, DeviceStep]]
    is_reading: bool = False
    acts_at: float = math.inf
    is_free_at: float = 0.0


class SimulatedEngine:
    """Serves requests in virtual time.

    Args:
        shape: device and limits.
        policy: the policy's arguments.
        slo: the targets that requests have.
        times: how long steps take.
        emit: gets the news of each commit, at the time that `clock` shows then.
        seed: of the noise.
        on_step: called with each device step that ended.
    """

    def __init__(
        self,
        shape: EngineShape,
        *,
        policy: PolicyConfig,
        slo: SLO | None,
        times: StepTimes,
        emit: Callable[[StepEvents], None],
        seed: int = 0,
        on_step: Callable[[DeviceStep], None] | None = None,
    ) -> None:
        self.shape = shape
        self.clock = VirtualClock()
        self.allocator = BlockAllocator(
            shape.kv_cache_tokens // shape.block_size,
            shape.block_size,
            enable_prefix_caching=shape.enable_prefix_caching,
        )
        self._slo = slo
        self._num_requests = 0
        self._device = VirtualDevice(times, noise=shape.noise, slowdown=shape.slowdown, seed=seed, on_step=on_step)
        budget = policy.token_budget if isinstance(policy, MixedPolicy) else None
        self._buckets = Buckets(shape.max_num_seqs, max(shape.max_prefill_tokens, budget or 0))
        latency = LatencyModel.from_state(stored_state(H100_LLAMA_3_8B, shape.num_sms))
        self._scheduler = _Scheduler(
            SchedulerConfig(
                max_num_seqs=shape.max_num_seqs,
                max_prefill_tokens=shape.max_prefill_tokens,
                num_sms=shape.num_sms,
                shares={
                    Phase.PREFILL: tuple(sorted({split[0] for split in shape.splits} | {shape.num_sms})),
                    Phase.DECODE: tuple(sorted({split[1] for split in shape.splits} | {shape.num_sms})),
                },
                max_queued_requests=shape.max_queued_requests,
            ),
            allocator=self.allocator,
            policy=make_policy(
                policy,
                num_sms=shape.num_sms,
                splits=shape.splits,
                default_split=shape.default_split,
                max_prefill_tokens=shape.max_prefill_tokens,
                slo=slo,
                latency=latency,
            ),
            latency=latency,
            metrics=Metrics(),
            emit=emit,
            clock=self.clock,
        )
        self._lanes = [
            _Lane(Phase.PREFILL, shape.prefill_steps_ahead, deque()),
            _Lane(Phase.DECODE, shape.decode_steps_ahead, deque()),
        ]

    def submit(self, prompt: Sequence[int], num_output_tokens: int) -> Request:
        """Queue a request now.

        Raises:
            QueueFull: the queue is at its bound.
        """
        room = self.shape.max_model_len - len(prompt)
        assert room > 0, f"a prompt of {len(prompt)} tokens does not fit max_model_len {self.shape.max_model_len}"
        params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)
        request = Request(
            request_id=f"simulated-{self._num_requests}",
            prompt_token_ids=tuple(prompt),
            params=params,
            arrival_time=self.clock.now,
            seed=0,
            max_tokens=min(num_output_tokens, room),
            slo=self._slo,
        )
        self._num_requests += 1
        self._scheduler.add([request])
        self._wake()
        return request

    def abort(self, request: Request) -> None:
        """End a request now."""
        self._scheduler.finish(request, FinishReason.ABORT)
        self._wake()

    @property
    def next_event(self) -> float:
        """When something happens next by itself; infinite in an idle engine."""
        prefill, decode = self._lanes
        return min(self._device.next_event, prefill.acts_at, decode.acts_at)

    def advance(self, until: float) -> None:
        """Let everything happen that is due up to `until`, that moment included, and stop there."""
        num_actions, moment = 0, -math.inf
        while (now := self.next_event) <= until:
            self.clock.advance(now)
            if now > moment:
                num_actions, moment = 0, now
            num_actions += 1
            assert num_actions < _STUCK, f"at {now} s the lanes act for ever; the policy does not settle for a plan"
            for step in self._device.advance(now):
                lane = self._lanes[step.phase is Phase.DECODE]
                if lane.is_reading and lane.in_flight[0][1] is step:
                    lane.acts_at = max(now, lane.is_free_at) + self.shape.host_delay
            for lane in self._lanes:
                if lane.acts_at <= now:
                    self._act(lane)
        self.clock.advance(max(until, self.clock.now))

    def statistics(self) -> EngineStatistics:
        """Counters and gauges, as `Engine.statistics` gives them."""
        return self._scheduler.statistics()

    def check_integrity(self) -> None:
        """Assert that requests, slots and blocks agree."""
        self._scheduler.check_integrity()

    def _act(self, lane: _Lane) -> None:
        """One turn of the lane's loop, up to where it waits or sleeps."""
        now = lane.is_free_at = self.clock.now
        lane.acts_at = math.inf
        if lane.is_reading:
            batch, step = lane.in_flight.popleft()
            num_sampled = len(batch.decode_slots) + sum([entry.samples for entry in batch.prefill])
            result = StepResult([TOKEN_ID] * num_sampled, step.end, step.end - step.start)
            self._scheduler.commit(batch, result)
        while (launched := self._scheduler.next_batch(lane.phase)) is not None:
            lane.is_free_at += self.shape.launch_delay
            step = self._device.submit(lane.phase, self._padded(self._scheduler.work), now, ready=lane.is_free_at)
            lane.in_flight.append((launched, step))
            if len(lane.in_flight) > lane.steps_ahead:
                break
        lane.is_reading = bool(lane.in_flight)
        if lane.is_reading and lane.in_flight[0][1].is_done:
            lane.acts_at = lane.is_free_at + self.shape.host_delay
        self._wake()

    def _padded(self, work: StepWork) -> StepWork:
        """What the device computes: rows up to those of a graph."""
        num_rows = self._buckets.padded_rows(work.num_decodes, work.num_prompt_tokens)
        if work.num_prompt_tokens:
            return replace(work, num_prompt_tokens=num_rows - work.num_decodes)
        return replace(work, num_decodes=num_rows)

    def _wake(self) -> None:
        """Lanes that sleep and missed something go on as soon as the host can."""
        for lane in self._lanes:
            if not lane.is_reading and lane.acts_at == math.inf and self._scheduler.has_changed(lane.phase):
                lane.acts_at = max(self.clock.now, lane.is_free_at) + self.shape.host_delay
