"""Executes batches: stages what changed, runs the decoder and the sampler on the lane's stream, reads the tokens back.

The runner keeps what the device knows of each slot: block table and length here, sampling state in the sampler. A slot
belongs to one lane at a time, so both lanes write their own rows without a lock. Sampled ids stay on the device and
feed the next step; the host reads them one step later.

Shapes: B decode rows, R sampled rows, T rows of the step, N blocks a request can have, D model dim, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from semipd.device.partition import Completion, PartitionBackend
from semipd.kernels.ops import StepContext
from semipd.kernels.paged_attention import AttentionMetadata, PrefillMetadata
from semipd.kernels.reference import ReferencePlan
from semipd.memory.kv_cache import KVCache
from semipd.model.decoder import Decoder
from semipd.model.lane_order import LaneOrder
from semipd.model.sampler import Sampler
from semipd.sched.batch import Batch, PrefillEntry, SamplingFeature, StepResult, TokenLogprobs

_PROMPT_LOGPROB_ROWS = 128  # rows of [rows, V] logits at a time: 25 MB at V = 49152, instead of a whole chunk's


class Runner:
    """Runs the steps of both lanes over one copy of the weights and one KV pool.

    Args:
        decoder: the model.
        sampler: sampling state of all slots.
        kv_cache: the pool of blocks.
        backend: gives each phase its stream.
        max_slots: requests that hold a slot at the same time.
        max_model_len: longest request in tokens; bounds the block table.
    """

    def __init__(
        self,
        *,
        decoder: Decoder,
        sampler: Sampler,
        kv_cache: KVCache,
        backend: PartitionBackend,
        max_slots: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._sampler = sampler
        self._kv_cache = kv_cache
        self._backend = backend
        self._device = device
        self._block_size = kv_cache.block_size
        max_blocks = max_model_len // self._block_size + 1
        self._block_table_SN = torch.zeros(max_slots, max_blocks, dtype=torch.int64, device=device)
        self._lengths_S = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._order = LaneOrder()

    def choose_shape(self, batch: Batch) -> None:
        """Steps are not padded."""

    def execute(self, batch: Batch, shape: None = None) -> Completion[StepResult]:
        """Launch the step on its phase's stream, behind the phase's earlier steps; returns at once."""
        stream = self._backend.stream(batch.phase, batch.num_sms)
        completion = stream.submit(lambda: lambda: self._run(batch), self._order.before(batch, stream))
        self._order.launched(batch, stream, completion)
        return completion

    def settle(self) -> None:
        """Steps are as fast as they get from the first one on."""

    def close(self) -> None:
        """Nothing has to go before the streams do."""

    def _run(self, batch: Batch) -> StepResult:
        started = time.monotonic()
        self._stage(batch)
        token_ids_T, positions_T, metadata = self._inputs(batch)
        context = StepContext(batch.num_sms, phase=batch.phase)
        plan = ReferencePlan(positions_T, metadata, self._kv_cache.kv_LPS2KH, self._decoder.attention)
        hidden_TD = self._decoder.forward(token_ids_T, plan, context)
        prompt_logprobs = self._prompt_logprobs(batch, hidden_TD, context)
        result = self._sample(batch, hidden_TD, context)
        done = time.monotonic()
        return StepResult(
            token_ids=result[0],
            logprobs=result[1],
            prompt_logprobs=prompt_logprobs,
            done_time=done,
            seconds=done - started,
        )

    def _stage(self, batch: Batch) -> None:
        """Write what the device does not know yet: new blocks, and the sampling state of admitted slots."""
        for update in batch.block_updates:
            stop = update.index + len(update.block_ids)
            self._block_table_SN[update.slot, update.index : stop] = torch.tensor(update.block_ids)
        for entry in batch.prefill:
            if entry.admit is not None:
                self._sampler.admit(entry.slot, entry.admit)

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
        """Token ids, positions and attention metadata of all rows: decodes first, then prompt chunks."""
        block_size = self._block_size
        token_ids, positions, slot_mapping = [], [], []
        decode_table_BN = self._block_table_SN[:0]
        context_lens_B = self._lengths_S[:0]
        if batch.decode_slots:
            slots_B = torch.tensor(batch.decode_slots, device=self._device)
            positions_B = self._lengths_S[slots_B]
            context_lens_B = positions_B + 1
            self._lengths_S[slots_B] = context_lens_B
            num_blocks = (int(positions_B.max()) // block_size) + 1
            decode_table_BN = self._block_table_SN[slots_B, :num_blocks]
            block_B = decode_table_BN.gather(1, (positions_B // block_size).unsqueeze(1)).squeeze(1)
            token_ids.append(self._sampler.last_token[slots_B])
            positions.append(positions_B)
            slot_mapping.append(block_B * block_size + positions_B % block_size)
        row = len(batch.decode_slots)
        prefills = []
        for entry in batch.prefill:
            stop = entry.start + len(entry.token_ids)
            table_N = self._block_table_SN[entry.slot, : (stop - 1) // block_size + 1]
            positions_C = torch.arange(entry.start, stop, device=self._device)
            prefills.append(
                PrefillMetadata(
                    row_start=row, num_rows=stop - entry.start, start_position=entry.start, block_table_N=table_N
                )
            )
            token_ids.append(torch.tensor(entry.token_ids, device=self._device))
            positions.append(positions_C)
            slot_mapping.append(table_N[positions_C // block_size] * block_size + positions_C % block_size)
            self._lengths_S[entry.slot] = stop
            row += stop - entry.start
        metadata = AttentionMetadata(
            slot_mapping_T=_concat(slot_mapping),
            num_decodes=len(batch.decode_slots),
            decode_block_table_BN=decode_table_BN,
            decode_context_lens_B=context_lens_B,
            prefills=tuple(prefills),
        )
        return _concat(token_ids), _concat(positions), metadata

    def _sample(
        self, batch: Batch, hidden_TD: torch.Tensor, context: StepContext
    ) -> tuple[list[int], Mapping[int, TokenLogprobs] | None]:
        """Token ids of the sampled rows, and their raw log-probabilities if any row asked."""
        rows, slots = list(range(len(batch.decode_slots))), list(batch.decode_slots)
        row = len(rows)
        for entry in batch.prefill:
            row += len(entry.token_ids)
            if entry.samples:
                rows.append(row - 1)
                slots.append(entry.slot)
        if not rows:
            return [], None
        hidden_RD = hidden_TD if len(rows) == hidden_TD.shape[0] else hidden_TD[torch.tensor(rows, device=self._device)]
        logits_RV = self._decoder.compute_logits(hidden_RD, context)
        slots_R = torch.tensor(slots, device=self._device)
        sampled = self._sampler.sample(logits_RV, slots_R, batch.features, batch.num_logprobs)
        logprobs = dict(enumerate(sampled.logprobs())) if batch.features & SamplingFeature.LOGPROBS else None
        return sampled.token_ids_R.tolist(), logprobs

    def _prompt_logprobs(
        self, batch: Batch, hidden_TD: torch.Tensor, context: StepContext
    ) -> Mapping[int, tuple[TokenLogprobs, ...]] | None:
        """For each entry that asked: the next token's raw log-probability at each of its positions that has one."""
        scored: dict[int, tuple[TokenLogprobs, ...]] = {}
        row = len(batch.decode_slots)
        for index, entry in enumerate(batch.prefill):
            if entry.num_prompt_logprobs is not None:
                hidden_CD = hidden_TD[row : row + len(entry.token_ids)]
                scored[index] = self._score_chunk(entry, entry.num_prompt_logprobs, hidden_CD, context)
            row += len(entry.token_ids)
        return scored or None

    def _score_chunk(
        self, entry: PrefillEntry, num_logprobs: int, hidden_CD: torch.Tensor, context: StepContext
    ) -> tuple[TokenLogprobs, ...]:
        last = () if entry.next_token_id is None else (entry.next_token_id,)
        next_token_ids = torch.tensor(entry.token_ids[1:] + last, device=self._device)
        scored: list[TokenLogprobs] = []
        for first in range(0, len(next_token_ids), _PROMPT_LOGPROB_ROWS):
            targets = next_token_ids[first : first + _PROMPT_LOGPROB_ROWS]
            logits = self._decoder.compute_logits(hidden_CD[first : first + len(targets)], context)
            scored += self._sampler.token_logprobs(logits, targets, num_logprobs)
        return tuple(scored)


def _concat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
