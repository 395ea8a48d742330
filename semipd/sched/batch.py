"""What one step of a lane computes, as a frozen value of plain ints.

The same value drives a local runner or a remote rank, so it carries no tensors, no requests and no clocks. A request is
known to the device by its slot; what the device already has (lengths, last tokens, block tables, sampling state) is
never sent again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag

from semipd.config import Phase


class SamplingFeature(IntFlag):
    """What the sampler must do for at least one row of a batch; greedy rows need none of it."""

    NONE = 0
    RANDOM = 1
    TRUNCATION = 2  # top_k, top_p or min_p
    PENALTIES = 4
    MASKS = 8  # logit_bias, allowed_token_ids, min_tokens, bad words of one token
    BAD_WORDS = 16  # bad words of several tokens
    LOGPROBS = 32


@dataclass(frozen=True, slots=True)
class SlotSampling:
    """The sampling state of a slot, staged once when its request is admitted.

    `prompt_token_ids` and `output_token_ids` are what penalties and bad words look back at; `output_token_ids` is not
    empty after a preemption. The random number of output token i depends on (seed, sample_index, i) alone.
    `min_tokens_stop_ids` are masked until `min_tokens` tokens are out.
    """

    seed: int
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    min_tokens_stop_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int | None = None
    features: SamplingFeature = SamplingFeature.NONE


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Blocks appended to a slot's table: entries [index, index + len(block_ids))."""

    slot: int
    index: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillEntry:
    """A chunk of one prompt: tokens at positions [start, start + len(token_ids)).

    Attributes:
        samples: the chunk ends the prompt, so a token is sampled after its last position.
        admit: sampling state to stage; set on the first chunk after each admission.
        num_prompt_logprobs: None for none; else how many beside the actual next token's, for each position. The chunk's
            last position needs `next_token_id`, the first token of the next chunk; None there ends the prompt.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    samples: bool
    admit: SlotSampling | None = None
    num_prompt_logprobs: int | None = None
    next_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One step of one lane.

    Rows of the step are: the decode slots, in order, then the tokens of each prefill entry. Sampled rows are: the
        decode slots, then each prefill entry that samples.

    Attributes:
        step_id: unique and increasing over both lanes.
        phase: the lane that runs it. A decode batch with prefill entries is a MIXED step.
        num_sms: the share of the device it runs on.
        decode_slots: slots that feed their last sampled token at their present length.
        prefill: prompt chunks.
        block_updates: blocks appended since the slots' last step.
        features: union over the sampled rows.
        num_logprobs: the largest `num_logprobs` of the sampled rows.
    """

    step_id: int
    phase: Phase
    num_sms: int
    decode_slots: tuple[int, ...]
    prefill: tuple[PrefillEntry, ...]
    block_updates: tuple[BlockUpdate, ...]
    features: SamplingFeature
    num_logprobs: int = 0

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return len(self.decode_slots) + sum(len(entry.token_ids) for entry in self.prefill)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities at one position: of the token there with its rank, and the most likely ones, best first."""

    logprob: float
    rank: int
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave back, read on the host.

    Attributes:
        token_ids: one per sampled row.
        logprobs: sampled row to its log-probabilities; only rows that asked.
        prompt_logprobs: prefill entry index to one item per position whose next token is known.
        done_time: the engine's clock when the step's done event fired, in seconds.
        seconds: how long the step ran on its stream.
        is_usual: whether others like it will take as long; not so if the device waited for its launches.
    """

    token_ids: list[int]
    done_time: float
    seconds: float = 0.0
    is_usual: bool = True
    logprobs: Mapping[int, TokenLogprobs] | None = None
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] | None = None
