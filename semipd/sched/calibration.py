"""Steps that are run to be measured, while the engine has nothing else to do.

A `Trial` is one kind of step, or two side by side: so many decodes of so long contexts, and a prompt chunk. Its batches
are made here, of slots and blocks that are free. They stay free: no request's step is scheduled while one of these is
launched, so whatever they write is of no content to anybody. No request, queue, event or statistic knows of them.

A request that arrives waits for what is launched, `LIMIT` seconds at most as far as predictions go, which know of no
step that is launched without a graph; the trial begins anew when the engine is idle again. Contexts are what blocks
hold by chance, for reading them takes the same time.

Called only under the scheduler's lock; knows neither devices nor clocks.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from semipd.config import Phase
from semipd.memory.block_allocator import BlockAllocator
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SamplingFeature, SlotSampling, StepResult
from semipd.sched.in_flight import InFlight, LaunchedStep
from semipd.sched.latency import LatencyModel, StepWork

LIMIT = 0.025
"""Predicted seconds of the steps that a lane has launched, so also of a step, if the device makes a token in less."""

_LEAST_LIMIT = 2.5  # steps of one decode, of slower devices

_LARGEST_CHUNK = 512
_SMALLEST_CHUNK = 16
_MEASUREMENTS = 6  # of each kind of step
_MOST_UNUSUAL = 4  # steps of a shape whose graph is not captured yet; then the trial is put off
_MOST_ATTEMPTS = 6  # at a trial: a GPU captures for some seconds after its first step
_MOST_STEPS = 200  # of a lane beside a slower one
_DECODE_STEPS = 32  # from a context, which is then set anew
_GREEDY = SlotSampling(seed=0, sample_index=0, prompt_token_ids=(), temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to run and measure.

    Attributes:
        decode_sms: share of the decode lane.
        prefill_sms: share of the prefill lane, which computes the chunk then; 0 has the decode lane compute it.
        num_decodes: requests that decode.
        context: tokens of each.
        chunk: prompt tokens of a step.
        chunk_start: position of the first of them.
    """

    decode_sms: int
    prefill_sms: int = 0
    num_decodes: int = 0
    context: int = 0
    chunk: int = 0
    chunk_start: int = 0


def usual_trials(num_sms: int, splits: Sequence[tuple[int, int]]) -> Iterator[Trial]:
    """Where policies go: decodes, prompts and both on the whole device, then both side by side on each split.

    Sizes tell the terms apart: few and many rows, short and long contexts, chunks below and above the rows that reading
    the weights leaves time for. Those of MIXED steps are round with their decodes, as policies choose them.
    """
    for num_decodes, context in ((1, 256), (64, 256), (64, 2048), (128, 1024)):
        yield Trial(decode_sms=num_sms, num_decodes=num_decodes, context=context)
    for chunk, start in ((128, 0), (512, 0), (512, 4096)):
        yield Trial(decode_sms=num_sms, chunk=chunk, chunk_start=start)
    for num_decodes, context, chunk, start in ((16, 1024, 48, 0), (64, 1024, 256, 0), (16, 1024, 496, 0)):
        yield Trial(decode_sms=num_sms, num_decodes=num_decodes, context=context, chunk=chunk, chunk_start=start)
    yield Trial(decode_sms=num_sms, num_decodes=16, context=256, chunk=240, chunk_start=4096)
    for prefill_sms, decode_sms in splits:
        for num_decodes, context, chunk in ((64, 1024, 128), (16, 512, 512)):
            yield Trial(
                decode_sms=decode_sms, prefill_sms=prefill_sms, num_decodes=num_decodes, context=context, chunk=chunk
            )


class Calibrator:
    """Makes the batches of trials and teaches their times to the model.

    Args:
        trials: run in this order, each cut to what slots, blocks and `LIMIT` allow.
        num_sms: of the device.
        num_slots: of the device.
        max_tokens: longest context.
        max_chunk: most prompt tokens of a step.
        vocab_size: token ids are below it.
        latency: learns, and says how large a step may be.
        allocator: whose unused blocks are borrowed; cached ones are left alone.
        on_done: called once after the last trial, under the lock.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        *,
        num_sms: int,
        num_slots: int,
        max_tokens: int,
        max_chunk: int,
        vocab_size: int,
        latency: LatencyModel,
        allocator: BlockAllocator,
        on_done: Callable[[], None],
    ) -> None:
        self._trials = deque((trial, _MOST_ATTEMPTS) for trial in trials)
        self._num_sms = num_sms
        self._num_slots = num_slots
        self._max_tokens = max_tokens
        self._max_chunk = min(max_chunk, _LARGEST_CHUNK)
        self._latency = latency
        self._allocator = allocator
        self._on_done = on_done
        rng = random.Random(0)
        self._token_ids = tuple(rng.randrange(vocab_size) for _ in range(max(self._max_chunk, num_slots)))
        self._is_armed = False
        self._has_measured = False
        self._run: _Run | None = None
        self._launched: set[int] = set()

    @property
    def num_launched(self) -> int:
        """Its steps on the device: while there is one, no other may be scheduled."""
        return len(self._launched)

    def next_batch(self, phase: Phase, in_flight: InFlight, *, is_idle: bool) -> Batch | None:
        """The next step of `phase`; None when there is none now.

        Args:
            phase: the lane.
            in_flight: all launched steps; the new one is among them then.
            is_idle: no request waits or runs, and no step but these is launched.
        """
        if not is_idle:
            self._run = None  # requests may use its slots and blocks: it begins anew
            return None
        if self._run is None and self._is_armed and not self._launched:
            self._run = self._begin()
        if self._run is None:
            return None
        made = self._run.next_step(phase, in_flight.num_sms(phase.other))
        if made is None:
            return None
        batch, work = made
        ahead = in_flight.works(phase)
        if ahead and sum(map(self._latency.predict, ahead)) + self._latency.predict(work) > self._limit:
            return None
        step_id = in_flight.launch(phase, LaunchedStep(batch.num_sms, [], [], work))
        self._launched.add(step_id)
        self._run.on_launch(batch)
        return replace(batch, step_id=step_id)

    def commit(self, batch: Batch, result: StepResult, in_flight: InFlight) -> bool:
        """Learn from a finished step; False if it is a request's. The first token of one lets the trials begin."""
        if batch.step_id not in self._launched:
            self._is_armed = self._is_armed or bool(result.token_ids)
            return False
        work = in_flight.done(batch.phase, batch.step_id).work
        self._launched.remove(batch.step_id)
        run = self._run
        if run is not None:
            if run.take(batch.phase, work, result):
                self._latency.calibrate(work, result.seconds)
                self._has_measured = True
            if run.has_measured or run.is_in_vain:
                self._run = None
                self._end_trial(is_put_off=not run.has_measured)
        return True

    def _begin(self) -> _Run | None:
        """The next trial; those of which nothing is left when they are cut are passed over."""
        if not self._trials:
            return None
        unused = self._allocator.unused_blocks()
        while self._trials:
            trial = self._cut(self._trials[0][0], len(unused))
            if trial is not None:
                return _Run(trial, unused, self._allocator.block_size, self._num_sms, self._token_ids)
            self._end_trial()
        return None

    @property
    def _limit(self) -> float:
        return max(LIMIT, _LEAST_LIMIT * self._latency.predict(StepWork(self._num_sms, num_decodes=1)))

    def _end_trial(self, *, is_put_off: bool = False) -> None:
        trial, num_attempts = self._trials.popleft()
        if is_put_off and num_attempts > 1:
            self._trials.append((trial, num_attempts - 1))
        if not self._trials:
            self._latency.is_calibrated = self._has_measured
            self._on_done()

    def _cut(self, trial: Trial, num_unused: int) -> Trial | None:
        """The trial as far as slots, blocks and time allow; None if little is left of it."""
        block_size = self._allocator.block_size
        # their contexts are set by a step of as many prompt tokens
        num_decodes, context = min(trial.num_decodes, self._num_slots - 1, self._max_chunk), trial.context
        if num_decodes:
            while True:  # fewer of them if a small pool leaves them no context
                num_each = num_unused // 2 // num_decodes  # the other half is for the chunk
                context = min(trial.context, min(num_each * block_size, self._max_tokens) - _DECODE_STEPS)
                if context >= _DECODE_STEPS or num_decodes == 1:
                    break
                num_decodes //= 2
            decodes = StepWork(trial.decode_sms, trial.prefill_sms, 0, 0, num_decodes, num_decodes * context)
            if context < 1 or (num_decodes > 1 and self._latency.predict(decodes) > self._limit):
                return None
        chunk, start = min(trial.chunk, self._max_chunk), trial.chunk_start
        if chunk:
            longest = min(num_unused // 2 * block_size, self._max_tokens - 1)
            start = max(0, min(start, longest - chunk))
            beside = StepWork(trial.decode_sms, 0, 0, 0, num_decodes, num_decodes * context)
            if trial.prefill_sms:
                beside = StepWork(trial.prefill_sms, trial.decode_sms)
            fitting = self._latency.max_prompt_tokens(beside, self._limit, [(start, min(chunk, longest))])
            if fitting < chunk:
                chunk = 1 << fitting.bit_length() >> 1  # sizes of powers of two have graphs
            if chunk < min(_SMALLEST_CHUNK, self._max_chunk):
                return None
        if not num_decodes and (trial.num_decodes or not chunk):
            return None
        return replace(trial, num_decodes=num_decodes, context=context, chunk=chunk, chunk_start=start)


class _Run:
    """A trial on certain blocks: slots [0, num_decodes) decode, the one after them has the chunk."""

    def __init__(
        self, trial: Trial, blocks: Sequence[int], block_size: int, num_sms: int, token_ids: Sequence[int]
    ) -> None:
        self._trial = trial
        self._num_sms = num_sms
        self._token_ids = tuple(token_ids)
        num_each = -(-(trial.context + _DECODE_STEPS) // block_size)
        num_chunk = -(-(trial.chunk_start + trial.chunk) // block_size)
        slots = range(trial.num_decodes)
        self._contexts = tuple(BlockUpdate(i, 0, tuple(blocks[i * num_each : (i + 1) * num_each])) for i in slots)
        rest = len(slots) * num_each
        self._chunk_blocks = BlockUpdate(len(slots), 0, tuple(blocks[rest : rest + num_chunk]))
        self._num_decoded: int | None = None  # steps since contexts were set; None: they have to be
        self._num_steps = dict.fromkeys(self._phases, 0)
        self._num_unusual = dict.fromkeys(self._phases, 0)
        self._num_measured = dict.fromkeys(self._phases, 0)

    @property
    def has_measured(self) -> bool:
        """Each lane has measured enough."""
        return min(self._num_measured.values()) >= _MEASUREMENTS

    @property
    def is_in_vain(self) -> bool:
        """Another time may be better."""
        return max(self._num_unusual.values()) >= _MOST_UNUSUAL or max(self._num_steps.values()) >= _MOST_STEPS

    @property
    def _phases(self) -> tuple[Phase, ...]:
        return (Phase.PREFILL, Phase.DECODE) if self._trial.prefill_sms else (Phase.DECODE,)

    def next_step(self, phase: Phase, other_sms: int) -> tuple[Batch, StepWork] | None:
        """A batch without its id, and its work beside a step of the other lane on `other_sms`."""
        trial = self._trial
        if phase not in self._phases:
            return None
        if phase is Phase.PREFILL:
            return self._step(phase, trial.prefill_sms, other_sms, has_chunk=True)
        if trial.num_decodes and self._num_decoded is None:
            return self._set_contexts(other_sms)
        num_context_tokens = trial.num_decodes * (trial.context + (self._num_decoded or 0) + 1)
        return self._step(
            phase, trial.decode_sms, other_sms, has_chunk=not trial.prefill_sms, context_tokens=num_context_tokens
        )

    def on_launch(self, batch: Batch) -> None:
        """The batch that `next_step` gave is launched."""
        if batch.phase is Phase.PREFILL or not self._trial.num_decodes:
            return
        if not batch.decode_slots:
            self._num_decoded = 0
        elif self._num_decoded is not None:
            self._num_decoded += 1
            if self._num_decoded == _DECODE_STEPS:
                self._num_decoded = None

    def take(self, phase: Phase, work: StepWork, result: StepResult) -> bool:
        """Count a finished step; whether it is one to learn from."""
        trial = self._trial
        if phase is Phase.DECODE and work.num_decodes != trial.num_decodes:
            return False  # it set contexts
        other_sms = trial.decode_sms if phase is Phase.PREFILL else trial.prefill_sms
        is_measured = result.is_usual and work.other_sms == other_sms
        self._num_steps[phase] += 1
        self._num_unusual[phase] += not result.is_usual
        self._num_measured[phase] += is_measured
        return is_measured

    def _set_contexts(self, other_sms: int) -> tuple[Batch, StepWork]:
        """Each decode's last token before its first measured one; on the whole device, so that few graphs serve it."""
        last = self._trial.context - 1
        entries = tuple(
            PrefillEntry(update.slot, last, (self._token_ids[update.slot],), samples=True, admit=_GREEDY)
            for update in self._contexts
        )
        work = StepWork.of(self._num_sms, other_sms=other_sms, chunks=[(last, 1)] * len(entries))
        return _batch(Phase.DECODE, self._num_sms, prefill=entries, updates=self._contexts), work

    def _step(
        self, phase: Phase, num_sms: int, other_sms: int, *, has_chunk: bool, context_tokens: int = 0
    ) -> tuple[Batch, StepWork]:
        """One that is measured."""
        trial = self._trial
        num_decodes = trial.num_decodes if phase is Phase.DECODE else 0
        slots = tuple(range(num_decodes))
        if not (has_chunk and trial.chunk):
            work = StepWork(num_sms, other_sms, 0, 0, num_decodes, context_tokens)
            return _batch(phase, num_sms, slots), work
        work = StepWork.of(
            num_sms,
            other_sms=other_sms,
            chunks=[(trial.chunk_start, trial.chunk)],
            num_decodes=num_decodes,
            context_tokens=context_tokens,
        )
        blocks, token_ids = self._chunk_blocks, self._token_ids[: trial.chunk]
        entry = PrefillEntry(blocks.slot, trial.chunk_start, token_ids, samples=False, admit=_GREEDY)
        return _batch(phase, num_sms, slots, (entry,), (blocks,)), work


def _batch(
    phase: Phase,
    num_sms: int,
    decode_slots: tuple[int, ...] = (),
    prefill: tuple[PrefillEntry, ...] = (),
    updates: tuple[BlockUpdate, ...] = (),
) -> Batch:
    return Batch(-1, phase, num_sms, decode_slots, prefill, updates, SamplingFeature.NONE)
