"""What the device remembers of each slot's sampling: parameters, and what penalties, masks and bad words look back at.

A slot belongs to one request at a time, and a lane touches only its own slots, so rows are read and written without a
lock. Tables that few requests need are made by the first that does; they are made, grown and staged under the lock, and
replaced whole, so that the other lane sees the old table or the new one, both with its rows in them.

Shape suffixes: P slots, R rows of a batch, V vocab, E stop ids, W bad words, L tokens before the last of a bad word.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semipd.model.sampling_ops import DrawParams, stream_key, uniform
from semipd.sched.batch import SlotSampling

# Tokens a slot remembers for bad words; fixed, so that sampling needs no lock. A longer word is known by its end.
_NUM_RECENT = 63

_NO_TOKEN = -1  # fills tables of token ids

# A stronger penalty decides alone which of two tokens wins, and float32 logits divided by 1e-40 would be infinite.
_MAX_REPETITION_PENALTY = 1e6


@dataclass(frozen=True, slots=True)
class BadWords:
    """Bad words of several tokens. Words that a slot does not have end in _NO_TOKEN.

    Attributes:
        before_PWL: int32, the tokens before the last, newest first; _NO_TOKEN matches anything.
        last_PW: int64, the last token, forbidden after these.
    """

    before_PWL: Tensor
    last_PW: Tensor


class SamplingState:
    """The sampling state of `max_slots` slots on `device`; `dtype` is that of the logits.

    Attributes:
        last_token_P: int64, what each slot sampled last.
        num_outputs_P: int64, output tokens so far: the index of the next one.
    """

    def __init__(self, *, max_slots: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._lock = threading.Lock()
        self._vocab_size = vocab_size
        self._max_slots = max_slots
        self._device = device
        self._dtype = dtype
        self.last_token_P = self._full((max_slots,), 0, torch.int64)
        self.num_outputs_P = self._full((max_slots,), 0, torch.int64)
        self._key_P = self._full((max_slots,), 0, torch.int64)
        self._top_k_P = self._full((max_slots,), 0, torch.int64)
        self._min_tokens_P = self._full((max_slots,), 0, torch.int64)
        self._temperature_P = self._full((max_slots,), 0, torch.float64)
        self._top_p_P = self._full((max_slots,), 1, torch.float64)
        self._min_p_P = self._full((max_slots,), 0, torch.float64)
        self._presence_P = self._full((max_slots,), 0, dtype)
        self._frequency_P = self._full((max_slots,), 0, dtype)
        self._repetition_P = self._full((max_slots,), 1, dtype)
        # Newest first.
        self._recent_PL = self._full((max_slots, _NUM_RECENT), _NO_TOKEN, torch.int32)
        # Twice the number of occurrences in the output, plus one if the prompt has the token: one gather for both.
        self._seen_PV: Tensor | None = None
        self._bias_PV: Tensor | None = None
        self._stop_ids_PE: Tensor | None = None
        self._bad_words: BadWords | None = None

    def admit(self, slot: int, sampling: SlotSampling) -> None:
        """Stage a slot's state as it is after `sampling.output_token_ids`; nothing of the slot's last owner is left."""
        outputs = sampling.output_token_ids
        with self._lock:
            self.num_outputs_P[slot] = len(outputs)
            self.last_token_P[slot] = outputs[-1] if outputs else 0
            self._key_P[slot] = stream_key(sampling.seed, sampling.sample_index)
            self._temperature_P[slot] = sampling.temperature
            self._top_p_P[slot] = sampling.top_p
            self._top_k_P[slot] = sampling.top_k
            self._min_p_P[slot] = sampling.min_p
            self._min_tokens_P[slot] = sampling.min_tokens
            self._presence_P[slot] = sampling.presence_penalty
            self._frequency_P[slot] = sampling.frequency_penalty
            limit = _MAX_REPETITION_PENALTY
            self._repetition_P[slot] = min(max(sampling.repetition_penalty, 1 / limit), limit)
            self._stage_seen(slot, sampling)
            self._stage_bias(slot, sampling)
            self._stage_stop_ids(slot, sampling.min_tokens_stop_ids if sampling.min_tokens > 0 else ())
            self._stage_bad_words(slot, [word for word in sampling.bad_word_ids if len(word) > 1], outputs)

    def draw_params(self, slots_R: Tensor) -> DrawParams:
        """What the next token's draw needs beside logits; the temperature of greedy rows is 0."""
        return DrawParams(
            self._temperature_P[slots_R],
            self._top_p_P[slots_R],
            self._top_k_P[slots_R],
            self._min_p_P[slots_R],
            uniform(self._key_P[slots_R], self.num_outputs_P[slots_R]),
        )

    def apply_masks(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        """New logits: logit_bias added, -inf at what allowed_token_ids, min_tokens or bad words of one token forbid."""
        if self._bias_PV is not None:
            logits_RV = logits_RV + self._bias_PV[slots_R]
        if self._stop_ids_PE is not None:
            ids_RE = self._stop_ids_PE[slots_R]
            is_early_R = self.num_outputs_P[slots_R] < self._min_tokens_P[slots_R]
            logits_RV = _forbid(logits_RV, ids_RE, is_early_R.unsqueeze(-1) & (ids_RE != _NO_TOKEN))
        return logits_RV

    def apply_bad_words(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        """New logits with -inf at the last token of each bad word whose other tokens were just generated."""
        words = self._bad_words
        if words is None:
            return logits_RV
        before_RWL, last_RW = words.before_PWL[slots_R], words.last_PW[slots_R]
        recent_R1L = self._recent_PL[slots_R, : before_RWL.shape[-1]].unsqueeze(1)
        is_begun_RW = ((before_RWL == recent_R1L) | (before_RWL == _NO_TOKEN)).all(-1)
        return _forbid(logits_RV, last_RW, is_begun_RW & (last_RW != _NO_TOKEN))

    def apply_penalties(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        """New logits: repetition_penalty on tokens of prompt and output, then frequency and presence on the output's.

        Logits of rows without penalties keep their values.
        """
        if self._seen_PV is None:
            return logits_RV
        # Flat, shape [F]: few tokens are seen, and working on whole rows takes three times as long.
        seen_RV = self._seen_PV[slots_R]
        row_F, token_F = (seen_RV != 0).nonzero(as_tuple=True)
        slot_F = slots_R[row_F]
        logit_F = logits_RV[row_F, token_F]
        repetition_F = self._repetition_P[slot_F]
        logit_F = torch.where(logit_F > 0, logit_F / repetition_F, logit_F * repetition_F)
        count_F = seen_RV[row_F, token_F] >> 1
        logit_F -= count_F * self._frequency_P[slot_F]
        logit_F -= (count_F > 0) * self._presence_P[slot_F]
        return logits_RV.index_put((row_F, token_F), logit_F)

    def append(self, slots_R: Tensor, token_ids_R: Tensor, *, has_penalties: bool, has_bad_words: bool) -> None:
        """Record one sampled token for each of these slots, which differ."""
        self.last_token_P[slots_R] = token_ids_R
        self.num_outputs_P[slots_R] += 1
        if has_penalties and self._seen_PV is not None:
            self._seen_PV[slots_R, token_ids_R] += 2
        if has_bad_words:
            newest_R1 = token_ids_R.to(torch.int32).unsqueeze(-1)
            self._recent_PL[slots_R] = torch.cat((newest_R1, self._recent_PL[slots_R, :-1]), dim=-1)

    def _stage_seen(self, slot: int, sampling: SlotSampling) -> None:
        neutral = sampling.repetition_penalty == 1 and sampling.frequency_penalty == 0 == sampling.presence_penalty
        if neutral:
            return  # whatever the row holds is multiplied by neutral penalties
        if self._seen_PV is None:
            self._seen_PV = self._full((self._max_slots, self._vocab_size), 0, torch.int32)
        outputs = torch.tensor(sampling.output_token_ids, dtype=torch.int64)
        row = 2 * outputs.bincount(minlength=self._vocab_size)
        row[list(sampling.prompt_token_ids)] += 1
        self._seen_PV[slot] = row

    def _stage_bias(self, slot: int, sampling: SlotSampling) -> None:
        allowed = sampling.allowed_token_ids
        forbidden = [word[0] for word in sampling.bad_word_ids if len(word) == 1]
        if not sampling.logit_bias and allowed is None and not forbidden:
            if self._bias_PV is not None:
                self._bias_PV[slot] = 0
            return
        if self._bias_PV is None:
            self._bias_PV = self._full((self._max_slots, self._vocab_size), 0, self._dtype)
        row = torch.zeros(self._vocab_size, dtype=self._dtype)
        if allowed is not None:
            row.fill_(-torch.inf)
            row[list(allowed)] = 0
        ids, values = [token_id for token_id, _ in sampling.logit_bias], [value for _, value in sampling.logit_bias]
        row[ids] += torch.tensor(values, dtype=self._dtype)
        row[forbidden] = -torch.inf
        self._bias_PV[slot] = row

    def _stage_stop_ids(self, slot: int, ids: Sequence[int]) -> None:
        if ids:
            self._stop_ids_PE = self._grown(self._stop_ids_PE, (len(ids),), torch.int64)
        if self._stop_ids_PE is not None:
            self._stop_ids_PE[slot] = _NO_TOKEN
            self._stop_ids_PE[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int64)

    def _stage_bad_words(self, slot: int, words: Sequence[tuple[int, ...]], outputs: Sequence[int]) -> None:
        table = self._bad_words
        if words:
            length = min(max(map(len, words)) - 1, _NUM_RECENT)
            before = self._grown(table.before_PWL if table else None, (len(words), length), torch.int32)
            last = self._grown(table.last_PW if table else None, (len(words),), torch.int64)
            self._bad_words = table = BadWords(before, last)
            recent = outputs[: -_NUM_RECENT - 1 : -1]
            self._recent_PL[slot] = _NO_TOKEN
            self._recent_PL[slot, : len(recent)] = torch.tensor(recent, dtype=torch.int32)
        if table is not None:
            before, last = table.before_PWL[slot], table.last_PW[slot]
            before.fill_(_NO_TOKEN)
            last.fill_(_NO_TOKEN)
            last[: len(words)] = torch.tensor([word[-1] for word in words], dtype=torch.int64)
            for row, word in zip(before, words, strict=False):
                newest_first = word[-2::-1][:_NUM_RECENT]
                row[: len(newest_first)] = torch.tensor(newest_first, dtype=torch.int32)

    def _grown(self, table: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`table` if each slot's part has at least `sizes`; else a larger copy filled up with _NO_TOKEN."""
        if table is not None:
            sizes = tuple(max(new, old) for new, old in zip(sizes, table.shape[1:], strict=True))
            if sizes == table.shape[1:]:
                return table
        grown = self._full((self._max_slots, *sizes), _NO_TOKEN, dtype)
        if table is not None:
            grown[tuple(slice(size) for size in table.shape)] = table
        return grown

    def _full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        # Made in inference mode, a tensor could not be written outside of it, and lanes enter it each for itself.
        with torch.inference_mode(False):
            if value == 0:  # untouched pages of a large table cost nothing
                return torch.zeros(shape, dtype=dtype, device=self._device)
            return torch.full(shape, value, dtype=dtype, device=self._device)


def _forbid(logits_RV: Tensor, ids_RE: Tensor, is_forbidden_RE: Tensor) -> Tensor:
    """New logits with -inf at those `ids` that are forbidden; the others may be _NO_TOKEN."""
    ceiling_RE = torch.where(is_forbidden_RE, -torch.inf, torch.inf).to(logits_RV.dtype)
    return logits_RV.scatter_reduce(1, ids_RE.clamp_min(0), ceiling_RE, "amin")
