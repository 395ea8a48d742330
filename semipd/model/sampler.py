"""The next token of each row: logits in, token ids and their log-probabilities out, all on the device.

One sampler serves both lanes of an engine, each on its own slots. It knows neither requests nor the scheduler; which
work a batch needs it is told, so that a batch of greedy rows costs one argmax.

Shape suffixes: R rows of a batch, T positions of a prompt, V vocab, K most likely tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from semipd.model.sampling_ops import MAX_VOCAB_SIZE, argmax, draw, draw_truncated, select, top_tokens
from semipd.model.sampling_state import SamplingState
from semipd.sched.batch import SamplingFeature, SlotSampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Raw log-probabilities of one token per row and of the row's most likely ones, on the device.

    Ranks count from 1 by falling logit, the smaller id first among equals; top tokens are in that order.

    Attributes:
        logprob_R: of the token.
        rank_R: int64, of the token.
        top_ids_RK: int64, best first.
        top_logprobs_RK: theirs.
    """

    logprob_R: Tensor
    rank_R: Tensor
    top_ids_RK: Tensor
    top_logprobs_RK: Tensor

    def to_host(self) -> list[TokenLogprobs]:
        """One value per row, each with K most likely tokens."""
        return [
            TokenLogprobs(logprob, rank, tuple(top_ids), tuple(top_logprobs))
            for logprob, rank, top_ids, top_logprobs in zip(
                self.logprob_R.tolist(),
                self.rank_R.tolist(),
                self.top_ids_RK.tolist(),
                self.top_logprobs_RK.tolist(),
                strict=True,
            )
        ]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What one step sampled, on the device: ids int64 `[R]`, and log-probabilities if the step asked for them."""

    token_ids_R: Tensor
    logprob_tensors: LogprobTensors | None

    def logprobs(self) -> list[TokenLogprobs]:
        """Log-probabilities of all rows, each with as many most likely tokens as the row that wants the most."""
        assert self.logprob_tensors is not None
        return self.logprob_tensors.to_host()


class Sampler:
    """Chooses tokens and keeps the sampling state of `max_slots` slots.

    A row's token depends on its logits, its request's parameters and tokens, and (seed, sample_index, number of output
    tokens), not on batch-mates, row, slot, lane or preemptions. Two threads may call it for different slots.
    """

    def __init__(
        self, *, max_slots: int, vocab_size: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        assert vocab_size <= MAX_VOCAB_SIZE, f"a vocabulary of {vocab_size} is above {MAX_VOCAB_SIZE}"
        assert dtype in (torch.float32, torch.float64), f"logits are float32 or float64, not {dtype}"
        self._dtype = dtype
        self._state = SamplingState(
            max_slots=max_slots, vocab_size=vocab_size, device=torch.device(device), dtype=dtype
        )

    @property
    def last_token(self) -> Tensor:
        """int64 `[max_slots]`: what each slot sampled last, which is its next input. `sample` writes it in place."""
        return self._state.last_token_P

    def admit(self, slot: int, sampling: SlotSampling) -> None:
        """Stage the state of a slot's new owner, or of one that returns with the outputs it had."""
        self._state.admit(slot, sampling)

    def sample(
        self, logits_RV: Tensor, slots_R: Tensor, features: SamplingFeature, num_logprobs: int = 0
    ) -> SampledTokens:
        """The next token of each row, recorded in its slot.

        Logits pass, in this order: bias, allowed ids, min_tokens and bad words; repetition, frequency and presence
        penalties; temperature; min_p, top_k, top_p. Log-probabilities are those of the logits as given. A row that is
        -inf throughout, as when masks forbid every token, gives token 0.

        Args:
            logits_RV: of the sampler's dtype; not changed.
            slots_R: int64 on the sampler's device; the slots differ.
            features: all that some row needs. Greedy rows (temperature 0) may stand beside random ones.
            num_logprobs: with LOGPROBS, how many most likely tokens per row.
        """
        assert logits_RV.dtype == self._dtype
        state = self._state
        has_penalties = SamplingFeature.PENALTIES in features
        has_bad_words = SamplingFeature.BAD_WORDS in features
        scores_RV = logits_RV
        if SamplingFeature.MASKS in features:
            scores_RV = state.apply_masks(scores_RV, slots_R)
        if has_bad_words:
            scores_RV = state.apply_bad_words(scores_RV, slots_R)
        if has_penalties:
            scores_RV = state.apply_penalties(scores_RV, slots_R)

        token_ids_R = argmax(scores_RV)
        if SamplingFeature.RANDOM in features:
            params = state.draw_params(slots_R)
            rows = (params.temperature_R > 0).nonzero().squeeze(-1)
            choose = draw_truncated if SamplingFeature.TRUNCATION in features else draw
            token_ids_R[rows] = choose(select(scores_RV, rows), params[rows])

        state.append(slots_R, token_ids_R, has_penalties=has_penalties, has_bad_words=has_bad_words)
        logprobs = None
        if SamplingFeature.LOGPROBS in features:
            logprobs = logprob_tensors(logits_RV, token_ids_R, num_logprobs)
        return SampledTokens(token_ids_R, logprobs)

    @staticmethod
    def token_logprobs(logits_TV: Tensor, token_ids_T: Tensor, num: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens, each with the `num` most likely ones at its position; read on the host."""
        return logprob_tensors(logits_TV, token_ids_T, num).to_host()


def logprob_tensors(logits_RV: Tensor, token_ids_R: Tensor, num: int) -> LogprobTensors:
    """Log-probabilities under raw logits of one token per row and of the `num` most likely ones."""
    log_sum_R1 = logits_RV.logsumexp(-1, keepdim=True)
    ids_R1 = token_ids_R.unsqueeze(-1)
    logits_R1 = logits_RV.gather(1, ids_R1)
    ids_V = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
    is_better_RV = (logits_RV > logits_R1).logical_or_((logits_RV == logits_R1).logical_and_(ids_V < ids_R1))
    top_ids_RK = top_tokens(logits_RV, min(num, logits_RV.shape[-1]))
    return LogprobTensors(
        logprob_R=(logits_R1 - log_sum_R1).squeeze(-1),
        rank_R=is_better_RV.sum(-1) + 1,
        top_ids_RK=top_ids_RK,
        top_logprobs_RK=logits_RV.gather(1, top_ids_RK) - log_sum_R1,
    )
