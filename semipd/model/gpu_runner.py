"""Executes batches on a GPU: a step is one copy of its description to the device and the replay of captured graphs.

What the device knows of each request slot (block table, length, last token, sampling state) stays there. Sampled ids
feed the next step without the host, which reads them from pinned memory when the step's event has fired. A step whose
graph is not captured yet runs the very same launches eagerly, on the same static memory.

Shapes: T rows of the step, B decode rows, R sampled rows, X request slots and the null slot, N blocks of a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import zip_longest
from types import MappingProxyType

import torch
from torch import Tensor

from semipd.config import Phase
from semipd.device.partition import Completion, PartitionBackend
from semipd.kernels.ops import PeerSums, StepContext
from semipd.kernels.prefill_attention import prefill_config
from semipd.kernels.step_inputs import apply_block_updates, decode_inputs, gather_rows, prefill_inputs
from semipd.kernels.triton_attention import DeviceMetadata, TritonPlan
from semipd.kernels.triton_util import compiling_in_parallel, has_tma, is_hopper
from semipd.memory.kv_cache import KVCache
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.decoder import Decoder
from semipd.model.graphs import GraphKey, Graphs
from semipd.model.lane_memory import LaneMemory
from semipd.model.lane_order import LaneOrder
from semipd.model.sampler import LogprobTensors
from semipd.model.step_inputs import Buckets, StepShape
from semipd.model.step_timer import StepTimer
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SamplingFeature, StepResult, TokenLogprobs

_MAX_PADDING = 1024  # more rows of a graph that stands in: 30 ms on an H100, whose host launches 32 layers in 50
_KERNELS = 10  # of a layer in a graph, at most
_CAPTURED_FEATURES = SamplingFeature.RANDOM | SamplingFeature.TRUNCATION


class GpuRunner:
    """Runs the steps of both lanes over one copy of the weights and one KV pool.

    Args:
        decoder: the model, on the op table "triton".
        sampler: sampling state of all slots.
        kv_cache: the pool of blocks.
        backend: gives each phase its stream.
        graphs: captures and replays.
        buckets: the padded sizes of each lane's steps.
        num_heads: query heads.
        max_slots: requests that hold a slot at the same time.
        max_model_len: longest request in tokens; bounds the block table.
        peers: what sums small steps of a lane over the ranks.
        check: raises if a step that has ended may have computed garbage.
        on_close: gives back what the ranks share, when no step or graph uses it any more.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        sampler: CudaSampler,
        kv_cache: KVCache,
        backend: PartitionBackend,
        graphs: Graphs,
        buckets: Mapping[Phase, Buckets],
        num_heads: int,
        max_slots: int,
        max_model_len: int,
        device: torch.device,
        peers: Mapping[Phase, PeerSums] = MappingProxyType({}),
        check: Callable[[], None] = lambda: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._kv_cache = kv_cache
        self._backend = backend
        self._graphs = graphs
        self._num_heads = num_heads
        self._device = device
        self._peers = peers
        self._check = check
        self._on_close = on_close
        self._order = LaneOrder()
        self._first_shares: Mapping[Phase, Sequence[int]] = {}
        max_blocks = max_model_len // kv_cache.block_size + 1
        with torch.inference_mode(False):
            self._block_table_XN = torch.zeros(max_slots + 1, max_blocks, dtype=torch.int32, device=device)
            self._lengths_X = torch.zeros(max_slots + 1, dtype=torch.int32, device=device)
        kv_LPS2KH = kv_cache.kv_LPS2KH
        self._prefill_config = prefill_config(
            kv_LPS2KH.shape[-1],
            kv_cache.block_size,
            kv_LPS2KH.dtype,
            has_tma=has_tma(device),
            is_hopper=is_hopper(device),
        )
        self._lanes = {
            phase: LaneMemory(
                phase,
                buckets[phase],
                tile_rows=self._prefill_config.block_m,
                null_slot=max_slots,
                sampler=sampler,
                device=device,
            )
            for phase in Phase
        }

    def use_pool(self, kv_cache: KVCache) -> None:
        """Run all further steps on another pool of the same layout: the real one, sized by what the warm-up left."""
        self._kv_cache = kv_cache

    def choose_shape(self, batch: Batch) -> StepShape:
        """What to pad a step to: the batch's own shape; while that has no graph, the smallest graph's that covers it.

        Steps of decodes alone run as what they are: their few sizes all have graphs soon.
        """
        lane = self._lanes[batch.phase]
        shape = lane.buckets.shape_of(batch)
        if shape.max_chunks == 0:
            return shape
        captured = self._graphs.captured(batch.phase, batch.num_sms)
        if shape in captured:
            return shape
        covers = [other for other in captured if isinstance(other, StepShape) and other.covers(shape)]
        best = min(covers, key=lambda other: other.num_rows, default=None)
        if best is None or best.num_rows > shape.num_rows + _MAX_PADDING:
            return shape
        self._graphs.request(*self._body(lane, batch.phase, batch.num_sms, shape))
        return best

    def execute(self, batch: Batch, shape: StepShape | None = None) -> Completion[StepResult]:
        """Launch the step on its phase's stream, behind the phase's earlier steps; returns at once.

        Args:
            batch: the step.
            shape: of `choose_shape`, on the rank that chooses for all; None chooses here.
        """
        stream = self._backend.stream(batch.phase, batch.num_sms)
        launch = partial(self._launch, batch, shape or self.choose_shape(batch))
        completion = stream.submit(launch, self._order.before(batch, stream))
        self._order.launched(batch, stream, completion)
        self._request_usual_graphs()
        return completion

    def settle(self) -> None:
        """Return once the usual steps have graphs."""
        self._request_usual_graphs()
        self._graphs.wait_until_captured()

    def close(self) -> None:
        """Drop graphs and pinned memory, which must not outlive the streams, and all memory of the device."""
        self._graphs.close()
        self._on_close()
        self._lanes.clear()
        del self._sampler, self._decoder, self._kv_cache, self._block_table_XN, self._lengths_X

    # ---- a step: stage, launch, read

    def _launch(self, batch: Batch, shape: StepShape) -> Callable[[], StepResult]:
        timer = StepTimer(self._device)
        lane = self._lanes[batch.phase]
        num_sampled = lane.buckets.sampled_of(batch)
        self._stage(lane, batch, shape, num_sampled)
        is_usual = self._graphs.run(*self._body(lane, batch.phase, batch.num_sms, shape))
        is_usual = is_usual and shape == lane.buckets.shape_of(batch)
        prompt_logprobs = self._launch_prompt_logprobs(lane, batch)
        read_tokens = self._launch_sampling(lane, batch, num_sampled)
        timer.stop()

        def read() -> StepResult:
            self._check()
            token_ids, logprobs = read_tokens()
            return StepResult(
                token_ids=token_ids,
                logprobs=logprobs,
                prompt_logprobs={index: score() for index, score in prompt_logprobs.items()} or None,
                done_time=time.monotonic(),
                seconds=timer.seconds(),
                is_usual=is_usual,
            )

        return read

    def _body(
        self, lane: LaneMemory, phase: Phase, num_sms: int, shape: StepShape
    ) -> tuple[GraphKey, Callable[[], None]]:
        """The layers of a step, and what their graph is known by."""
        return GraphKey(phase, num_sms, shape), partial(self._launch_layers, lane, shape, num_sms)

    def _head(
        self, lane: LaneMemory, phase: Phase, num_sms: int, num_sampled: int, *, samples: bool
    ) -> tuple[GraphKey, Callable[[], None]]:
        """The head of a step, sampling included if it `samples`, and what the graph is known by."""
        launch = partial(self._launch_head, lane, num_sampled, num_sms, samples=samples)
        return GraphKey(phase, num_sms, (num_sampled, samples)), launch

    def _stage(self, lane: LaneMemory, batch: Batch, shape: StepShape, num_sampled: int) -> None:
        """Copy to the device what it does not know yet: new blocks, new requests, and the step itself."""
        for updates_U3, num_updates_1 in lane.inputs.stage_updates(batch):
            apply_block_updates(updates_U3, num_updates_1, self._block_table_XN)
        for entry in batch.prefill:
            if entry.admit is not None:
                self._sampler.admit(entry.slot, entry.admit)
        lane.inputs.stage(batch, shape, num_sampled)

    def _context(self, lane: LaneMemory, num_sms: int, *, is_warm_up: bool = False) -> StepContext:
        return StepContext(num_sms, lane.buffers, lane.phase, self._peers.get(lane.phase), is_warm_up)

    def _launch_layers(self, lane: LaneMemory, shape: StepShape, num_sms: int, *, is_warm_up: bool = False) -> None:
        """From the staged step to the normed hidden state of every row, in the lane's memory.

        A warm-up has one layer of each kind: Triton spends 0.6 ms on each launch of a kernel that it still compiles.
        """
        inputs, context = lane.inputs, self._context(lane, num_sms, is_warm_up=is_warm_up)
        num_rows, max_decodes = shape.num_rows, shape.max_decodes
        positions_T, slot_mapping_T = inputs.positions_T[:num_rows], inputs.slot_mapping_T[:num_rows]
        context_lens_B = inputs.context_lens_B[:max_decodes]
        block_size = self._kv_cache.block_size
        if max_decodes:
            decode_inputs(
                inputs.decode_slots(shape),
                self._lengths_X,
                self._sampler.last_token,
                self._block_table_XN,
                block_size,
                inputs.token_ids_T[:max_decodes],
                inputs.positions_T[:max_decodes],
                inputs.slot_mapping_T[:max_decodes],
                context_lens_B,
            )
        if shape.max_chunks:  # behind the decodes' kernel, which fills all rows that there is room for
            prefill_inputs(
                inputs.chunks(shape),
                self._block_table_XN,
                self._lengths_X,
                block_size,
                positions_T,
                slot_mapping_T,
            )
        metadata = DeviceMetadata(
            positions_T=positions_T,
            slot_mapping_T=slot_mapping_T,
            block_table_XN=self._block_table_XN,
            decode_slots_B=inputs.decode_slots(shape),
            decode_context_lens_B=context_lens_B,
            prefill_tiles_G4=inputs.tiles(shape),
        )
        plan = TritonPlan(
            metadata,
            self._kv_cache.kv_LPS2KH,
            self._decoder.attention,
            num_heads=self._num_heads,
            prefill=self._prefill_config,
            context=context,
        )
        run = self._decoder.warm_up if is_warm_up else self._decoder.forward
        lane.keep_hidden(run(inputs.token_ids_T[:num_rows], plan, context))

    def _launch_sampling(
        self, lane: LaneMemory, batch: Batch, num_sampled: int
    ) -> Callable[[], tuple[list[int], Mapping[int, TokenLogprobs] | None]]:
        """Sample `num_sampled` rows, padding included, and start the copy of the tokens to the host."""
        if num_sampled == 0:
            return lambda: ([], None)
        is_captured = not batch.features & ~_CAPTURED_FEATURES
        self._graphs.run(*self._head(lane, batch.phase, batch.num_sms, num_sampled, samples=is_captured))
        token_ids_R, logprobs = lane.token_ids_R, None
        if not is_captured:
            sampled = self._sampler.sample(
                lane.logits_RV[:num_sampled],
                lane.inputs.sampled_slots(num_sampled),
                batch.features,
                batch.num_logprobs,
            )
            token_ids_R = sampled.token_ids_R
            if sampled.logprob_tensors is not None:
                logprobs = _start_copy(sampled.logprob_tensors)
        num_tokens = len(batch.decode_slots) + sum(entry.samples for entry in batch.prefill)
        on_host = lane.take_output()[:num_tokens]
        on_host.copy_(token_ids_R[:num_tokens], non_blocking=True)

        def read() -> tuple[list[int], Mapping[int, TokenLogprobs] | None]:
            return on_host.tolist(), None if logprobs is None else dict(enumerate(logprobs.to_host()[:num_tokens]))

        return read

    def _launch_head(self, lane: LaneMemory, num_sampled: int, num_sms: int, *, samples: bool) -> None:
        """Logits of the sampled rows, and their tokens where all parameters are read on the device."""
        context, hidden_TD = self._context(lane, num_sms), lane.hidden_TD
        hidden_RD = context.buffer("sampled", (num_sampled, hidden_TD.shape[1]), hidden_TD)
        gather_rows(hidden_TD, lane.inputs.sampled_rows(num_sampled), hidden_RD)
        lane.keep_logits(self._decoder.compute_logits(hidden_RD, context))
        if samples:
            self._sampler.sample_into(
                lane.logits_RV[:num_sampled],
                lane.inputs.sampled_slots(num_sampled),
                lane.token_ids_R[:num_sampled],
                lane.scratch,
            )

    def _launch_prompt_logprobs(
        self, lane: LaneMemory, batch: Batch
    ) -> dict[int, Callable[[], tuple[TokenLogprobs, ...]]]:
        """For each entry that asked: the next token's raw log-probability at each of its positions that has one."""
        scored = {}
        row = len(batch.decode_slots)
        for index, entry in enumerate(batch.prefill):
            if entry.num_prompt_logprobs is not None:
                scored[index] = self._launch_scores(lane, batch, entry, entry.num_prompt_logprobs, row)
            row += len(entry.token_ids)
        return scored

    def _launch_scores(
        self, lane: LaneMemory, batch: Batch, entry: PrefillEntry, num_logprobs: int, row: int
    ) -> Callable[[], tuple[TokenLogprobs, ...]]:
        last = () if entry.next_token_id is None else (entry.next_token_id,)
        targets = torch.tensor(entry.token_ids[1:] + last, dtype=torch.int64)
        if self._device.type == "cuda":
            targets = targets.pin_memory().to(self._device, non_blocking=True)
        parts = []
        num_rows = len(lane.logits_RV)
        for first in range(0, len(targets), num_rows):
            part = targets[first : first + num_rows]
            hidden_CD = lane.hidden_TD[row + first : row + first + len(part)]
            logits_CV = self._decoder.compute_logits(hidden_CD, self._context(lane, batch.num_sms))
            parts.append(_start_copy(self._sampler.score(logits_CV, part, num_logprobs)))
        return lambda: tuple(item for part in parts for item in part.to_host())

    # ---- before the first step

    def warm_up(self, shares: Mapping[Phase, Sequence[int]]) -> None:
        """Run steps of padding alone: the lanes' buffers are then as large as they get, and kernels are loaded.

        Args:
            shares: SMs that each lane will start with.
        """
        if self._device.type == "cuda":
            with compiling_in_parallel():
                self._launch_samples(shares)
        self._launch_samples(shares)
        self._first_shares = shares
        if self._device.type == "cuda":
            self._launch_every_size(shares)
            torch.cuda.synchronize(self._device)
            usual = sum(len(lane.buckets.usual(phase)) * len(shares[phase]) for phase, lane in self._lanes.items())
            self._graphs.reserve(usual, _KERNELS * self._decoder.num_layers)

    def _request_usual_graphs(self) -> None:
        """Have graphs captured of the steps that will come, once, beside the first that do; the lanes' in turns."""
        shares, self._first_shares = self._first_shares, {}
        for launches in zip_longest(*(self._usual_launches(phase, sizes) for phase, sizes in shares.items())):
            for launch in launches:
                if launch is not None:
                    self._graphs.request(*launch, is_urgent=False)

    def _usual_launches(self, phase: Phase, sizes: Sequence[int]) -> Iterator[tuple[GraphKey, Callable[[], None]]]:
        lane = self._lanes[phase]
        for num_sms in sizes:
            for num_sampled in lane.buckets.heads:
                yield self._head(lane, phase, num_sms, num_sampled, samples=True)
        for shape in lane.buckets.usual(phase):
            for num_sms in sizes:
                yield self._body(lane, phase, num_sms, shape)

    def _launch_samples(self, shares: Mapping[Phase, Sequence[int]]) -> None:
        self._sampler.warm_up(torch.float32)
        for phase, lane in self._lanes.items():
            self._launch_padding(lane, lane.buckets.samples(phase), lane.buckets.sample_heads(), shares[phase])

    def _launch_every_size(self, shares: Mapping[Phase, Sequence[int]]) -> None:
        """Have cuBLAS load the kernels that it chooses for all numbers of rows, which are the same on any share.

        On an idle H100 one takes 5 ms, all 0.35 s. Beside busy lanes a step with some to load took up to 190 ms, and
        neither lane could launch meanwhile.
        """
        launched: set[int] = set()
        for phase, lane in self._lanes.items():
            shapes = [shape for shape in lane.buckets.usual(phase) if shape.num_rows not in launched]
            launched.update(shape.num_rows for shape in shapes)
            self._launch_padding(lane, shapes, lane.buckets.heads, shares[phase][:1])

    def _launch_padding(
        self, lane: LaneMemory, shapes: Iterable[StepShape], heads: Iterable[int], shares: Sequence[int]
    ) -> None:
        null_slot = len(self._block_table_XN) - 1
        no_work = replace(_NO_WORK, block_updates=(BlockUpdate(null_slot, 0, (0,)),))  # which has its kernel compiled
        for shape in shapes:
            self._stage(lane, no_work, shape, 0)
            for num_sms in shares:
                self._launch_layers(lane, shape, num_sms, is_warm_up=True)
        for num_sampled in heads:
            lane.inputs.stage(_NO_WORK, _NO_ROWS, num_sampled)
            for num_sms in shares:
                self._launch_head(lane, num_sampled, num_sms, samples=True)


def _start_copy(tensors: LogprobTensors) -> LogprobTensors:
    """The same on the host, once the stream has come to it."""
    return LogprobTensors(*(_to_host(getattr(tensors, field.name)) for field in fields(tensors)))


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


_NO_ROWS = StepShape(num_rows=0, max_decodes=0, max_chunks=0)
_NO_WORK = Batch(
    step_id=-1,
    phase=Phase.DECODE,
    num_sms=0,
    decode_slots=(),
    prefill=(),
    block_updates=(),
    features=SamplingFeature.NONE,
)
