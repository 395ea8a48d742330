"""What the device has to be told.

Of a request: its sampling state once per admission, then chunks and new blocks. Of a step: the batch that holds them.
"""

from __future__ import annotations

from semipd.config import Phase
from semipd.request import Request
from semipd.sched.batch import Batch, BlockUpdate, PrefillEntry, SamplingFeature, SlotSampling
from semipd.sched.in_flight import LaunchedStep


def sampling_features(request: Request) -> SamplingFeature:
    """What the sampler must do for `request` beside taking the largest logit."""
    params = request.params
    features = SamplingFeature.NONE
    if params.temperature > 0:
        features |= SamplingFeature.RANDOM
        if params.top_p < 1 or params.top_k > 0 or params.min_p > 0:
            features |= SamplingFeature.TRUNCATION
    if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
        features |= SamplingFeature.PENALTIES
    if params.logit_bias or params.allowed_token_ids is not None or params.min_tokens > 0:
        features |= SamplingFeature.MASKS
    for word in request.bad_word_ids:
        features |= SamplingFeature.MASKS if len(word) == 1 else SamplingFeature.BAD_WORDS
    if params.logprobs is not None:
        features |= SamplingFeature.LOGPROBS
    return features


def slot_sampling(request: Request) -> SlotSampling:
    """The sampling state that the request's slot starts from; after a preemption it continues where it stopped."""
    params = request.params
    return SlotSampling(
        seed=request.seed,
        sample_index=request.sample_index,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=tuple(request.output_token_ids),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        min_tokens=params.min_tokens,
        min_tokens_stop_ids=tuple(sorted(request.stop_token_ids)) if params.min_tokens else (),
        logit_bias=tuple(params.logit_bias.items()) if params.logit_bias else (),
        allowed_token_ids=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
        bad_word_ids=request.bad_word_ids,
        num_logprobs=params.logprobs,
        features=SamplingFeature(request.features),
    )


def stage_blocks(request: Request) -> BlockUpdate:
    """The update that tells the device of the request's new blocks; marks them as staged."""
    assert request.slot is not None
    index = request.num_staged_blocks
    request.num_staged_blocks = len(request.block_ids)
    return BlockUpdate(request.slot, index, tuple(request.block_ids[index:]))


def prefill_entry(request: Request, start: int, stop: int, *, is_first: bool) -> PrefillEntry:
    """The chunk [start, stop) of the request's known tokens; the first one after an admission carries its state."""
    assert request.slot is not None
    num_prompt_tokens = len(request.prompt_token_ids)
    tokens = request.known_token_ids
    return PrefillEntry(
        slot=request.slot,
        start=start,
        token_ids=tokens[start:stop],
        samples=stop == len(tokens),
        admit=slot_sampling(request) if is_first else None,
        num_prompt_logprobs=request.num_prompt_logprobs_wanted if start < num_prompt_tokens else None,
        next_token_id=tokens[stop] if stop < num_prompt_tokens else None,
    )


class _DecodeRows:
    """What a batch says of its decoding requests."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.slots = tuple(map(_slot_of, requests))
        self.features = 0
        for request in requests:
            self.features |= request.features
        self.num_logprobs = max((request.params.logprobs or 0 for request in requests), default=0)


class BatchStager:
    """Freezes steps into batches. The decode rows are kept from step to step, as they are mostly the same ones."""

    def __init__(self) -> None:
        self._decode_rows = _DecodeRows([])

    def forget_slots(self) -> None:
        """Look the decode slots up again: a request came back and has another one."""
        self._decode_rows = _DecodeRows([])

    def freeze(
        self,
        phase: Phase,
        step_id: int,
        step: LaunchedStep,
        entries: tuple[PrefillEntry, ...],
        updates: tuple[BlockUpdate, ...],
    ) -> Batch:
        """The batch of a launched step with the chunks and new blocks given."""
        if step.decodes and step.decodes != self._decode_rows.requests:
            self._decode_rows = _DecodeRows(step.decodes)
        features = self._decode_rows.features if step.decodes else 0
        num_logprobs = self._decode_rows.num_logprobs if step.decodes else 0
        for request in step.prefills:
            features |= request.features
            num_logprobs = max(num_logprobs, request.params.logprobs or 0)
        return Batch(
            step_id=step_id,
            phase=phase,
            num_sms=step.num_sms,
            decode_slots=self._decode_rows.slots if step.decodes else (),
            prefill=entries,
            block_updates=updates,
            features=SamplingFeature(features),
            num_logprobs=num_logprobs,
        )


def _slot_of(request: Request) -> int:
    assert request.slot is not None, f"{request.request_id} decodes without a slot"
    return request.slot
