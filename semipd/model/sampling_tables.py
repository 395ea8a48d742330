"""What few requests need of a slot: counts of seen tokens, biases, stop ids and bad words, and how logits change by it.

A slot belongs to one request at a time, and a lane touches only its own slots, so rows are read and written without a
lock. A table is made by the first request that needs it. Tables are made, grown and staged under the lock, and replaced
whole, so that the other lane sees the old table or the new one, both with its rows in them.

Shape suffixes: P slots, R rows of a batch, V vocab, E stop ids, W bad words, L tokens before the last of a bad word.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def repetition_penalty(sampling: SlotSampling) -> float:
    """The request's repetition penalty within what logits can take."""
    return min(max(sampling.repetition_penalty, 1 / _MAX_REPETITION_PENALTY), _MAX_REPETITION_PENALTY)


class SamplingTables:
    """The rarely needed tables of `num_slots` slots on `device`; `dtype` is that of the logits.

    Attributes:
        num_outputs_P: int64, output tokens so far. Made by subclasses, like the other parameters of a slot.
    """

    num_outputs_P: Tensor
    _min_tokens_P: Tensor

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._lock = threading.Lock()
        self._vocab_size = vocab_size
        self._num_slots = num_slots
        self._device = device
        self._dtype = dtype
        # Newest first.
        self._recent_PL = self._full((num_slots, _NUM_RECENT), _NO_TOKEN, torch.int32)
        # Twice the number of occurrences in the output, plus one if the prompt has the token: one gather for both.
        self._seen_PV: Tensor | None = None
        self._bias_PV: Tensor | None = None
        self._stop_ids_PE: Tensor | None = None
        self._bad_words: BadWords | None = None

    def apply_masks(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        """New logits: logit_bias added, -inf at what allowed_token_ids, min_tokens or bad words of one token forbid."""
        bias_PV, stop_ids_PE = self._bias_PV, self._stop_ids_PE
        self._await_staged()
        if bias_PV is not None:
            logits_RV = logits_RV + bias_PV[slots_R]
        if stop_ids_PE is not None:
            ids_RE = stop_ids_PE[slots_R]
            is_early_R = self.num_outputs_P[slots_R] < self._min_tokens_P[slots_R]
            logits_RV = _forbid(logits_RV, ids_RE, is_early_R.unsqueeze(-1) & (ids_RE != _NO_TOKEN))
        return logits_RV

    def apply_bad_words(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        """New logits with -inf at the last token of each bad word whose other tokens were just generated."""
        words = self._bad_words
        if words is None:
            return logits_RV
        self._await_staged()
        before_RWL, last_RW = words.before_PWL[slots_R], words.last_PW[slots_R]
        recent_R1L = self._recent_PL[slots_R, : before_RWL.shape[-1]].unsqueeze(1)
        is_begun_RW = ((before_RWL == recent_R1L) | (before_RWL == _NO_TOKEN)).all(-1)
        return _forbid(logits_RV, last_RW, is_begun_RW & (last_RW != _NO_TOKEN))

    def look_back(self, slots_R: Tensor, token_ids_R: Tensor, *, has_penalties: bool, has_bad_words: bool) -> None:
        """Record one sampled token for each of these slots where penalties and bad words look."""
        if has_penalties and self._seen_PV is not None:
            self._seen_PV[slots_R, token_ids_R] += 2
        if has_bad_words:
            newest_R1 = token_ids_R.to(torch.int32).unsqueeze(-1)
            self._recent_PL[slots_R] = torch.cat((newest_R1, self._recent_PL[slots_R, :-1]), dim=-1)

    def _stage(self, slot: int, sampling: SlotSampling) -> None:
        """Write what a slot's new owner needs after `sampling.output_token_ids`; the caller holds the lock."""
        self._stage_seen(slot, sampling)
        self._stage_bias(slot, sampling)
        self._stage_stop_ids(slot, sampling.min_tokens_stop_ids if sampling.min_tokens > 0 else ())
        words = [word for word in sampling.bad_word_ids if len(word) > 1]
        self._stage_bad_words(slot, words, sampling.output_token_ids)

    def _stage_seen(self, slot: int, sampling: SlotSampling) -> None:
        neutral = sampling.repetition_penalty == 1 and sampling.frequency_penalty == 0 == sampling.presence_penalty
        if neutral:
            return  # whatever the row holds is multiplied by neutral penalties
        if self._seen_PV is None:
            self._seen_PV = self._full((self._num_slots, self._vocab_size), 0, torch.int32)
        outputs = torch.tensor(sampling.output_token_ids, dtype=torch.int64)
        row = 2 * outputs.bincount(minlength=self._vocab_size)
        row[list(sampling.prompt_token_ids)] += 1
        self._write(self._seen_PV, slot, row)

    def _stage_bias(self, slot: int, sampling: SlotSampling) -> None:
        allowed = sampling.allowed_token_ids
        forbidden = [word[0] for word in sampling.bad_word_ids if len(word) == 1]
        if not sampling.logit_bias and allowed is None and not forbidden:
            if self._bias_PV is not None:
                self._write(self._bias_PV, slot, 0)
            return
        if self._bias_PV is None:
            self._bias_PV = self._full((self._num_slots, self._vocab_size), 0, self._dtype)
        row = torch.zeros(self._vocab_size, dtype=self._dtype)
        if allowed is not None:
            row.fill_(-torch.inf)
            row[list(allowed)] = 0
        ids, values = [token_id for token_id, _ in sampling.logit_bias], [value for _, value in sampling.logit_bias]
        row[ids] += torch.tensor(values, dtype=self._dtype)
        row[forbidden] = -torch.inf
        self._write(self._bias_PV, slot, row)

    def _stage_stop_ids(self, slot: int, ids: Sequence[int]) -> None:
        table = self._stop_ids_PE
        if ids:
            self._stop_ids_PE = table = self._grown(table, (len(ids),), torch.int64)
        if table is not None:
            self._write(table, slot, _filled_row(ids, table.shape[1:], torch.int64))

    def _stage_bad_words(self, slot: int, words: Sequence[tuple[int, ...]], outputs: Sequence[int]) -> None:
        table = self._bad_words
        if words:
            length = min(max(map(len, words)) - 1, _NUM_RECENT)
            before = self._grown(table.before_PWL if table else None, (len(words), length), torch.int32)
            last = self._grown(table.last_PW if table else None, (len(words),), torch.int64)
            self._bad_words = table = BadWords(before, last)
            recent = outputs[: -_NUM_RECENT - 1 : -1]
            self._write(self._recent_PL, slot, _filled_row(recent, (_NUM_RECENT,), torch.int32))
        if table is not None:
            before_WL = torch.full(table.before_PWL.shape[1:], _NO_TOKEN, dtype=torch.int32)
            for row_L, word in zip(before_WL, words, strict=False):
                newest_first = word[-2::-1][:_NUM_RECENT]
                row_L[: len(newest_first)] = torch.tensor(newest_first, dtype=torch.int32)
            self._write(table.before_PWL, slot, before_WL)
            last_W = _filled_row([word[-1] for word in words], table.last_PW.shape[1:], torch.int64)
            self._write(table.last_PW, slot, last_W)

    def _grown(self, table: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`table` if each slot's part has at least `sizes`; else a larger copy filled up with _NO_TOKEN."""
        if table is not None:
            sizes = tuple(max(new, old) for new, old in zip(sizes, table.shape[1:], strict=True))
            if sizes == table.shape[1:]:
                return table
        grown = self._full((self._num_slots, *sizes), _NO_TOKEN, dtype)
        if table is not None:
            grown[tuple(slice(size) for size in table.shape)] = table
        return grown

    def _full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        # Made in inference mode, a tensor could not be written outside of it, and lanes enter it each for itself.
        with torch.inference_mode(False):
            if value == 0:  # untouched pages of a large table cost nothing
                return torch.zeros(shape, dtype=dtype, device=self._device)
            return torch.full(shape, value, dtype=dtype, device=self._device)

    def _write(self, table: Tensor, slot: int, row: Tensor | float) -> None:
        """Set a slot's part of a table to a tensor on the host, or to one value throughout."""
        table[slot] = row

    def _await_staged(self) -> None:
        """Let the caller's stream wait until tables that were read before this call hold what was staged."""


def _filled_row(ids: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Ids on the host, filled up with _NO_TOKEN."""
    row = torch.full(shape, _NO_TOKEN, dtype=dtype)
    row[: len(ids)] = torch.tensor(ids, dtype=dtype)
    return row


def _forbid(logits_RV: Tensor, ids_RE: Tensor, is_forbidden_RE: Tensor) -> Tensor:
    """New logits with -inf at those `ids` that are forbidden; the others may be _NO_TOKEN."""
    ceiling_RE = torch.where(is_forbidden_RE, -torch.inf, torch.inf).to(logits_RV.dtype)
    return logits_RV.scatter_reduce(1, ids_RE.clamp_min(0), ceiling_RE, "amin")
