"""What the device has to be told of a request: sampling state once per admission, then chunks and new blocks."""

from __future__ import annotations

from semipd.request import Request
from semipd.sched.batch import BlockUpdate, PrefillEntry, SamplingFeature, SlotSampling


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
