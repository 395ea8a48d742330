"""What the device remembers of each slot's sampling: parameters, and what penalties, masks and bad words look back at.

Shape suffixes: P slots, R rows of a batch, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from semipd.model.sampling_ops import DrawParams, stream_key, uniform
from semipd.model.sampling_tables import SamplingTables, repetition_penalty
from semipd.sched.batch import SlotSampling


class SamplingState(SamplingTables):
    """The sampling state of `max_slots` slots on `device`; `dtype` is that of the logits.

    Attributes:
        last_token_P: int64, what each slot sampled last.
        num_outputs_P: int64, output tokens so far: the index of the next one.
    """

    def __init__(self, *, max_slots: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(num_slots=max_slots, vocab_size=vocab_size, device=device, dtype=dtype)
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
            self._repetition_P[slot] = repetition_penalty(sampling)
            self._stage(slot, sampling)

    def draw_params(self, slots_R: Tensor) -> DrawParams:
        """What the next token's draw needs beside logits; the temperature of greedy rows is 0."""
        return DrawParams(
            self._temperature_P[slots_R],
            self._top_p_P[slots_R],
            self._top_k_P[slots_R],
            self._min_p_P[slots_R],
            uniform(self._key_P[slots_R], self.num_outputs_P[slots_R]),
        )

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
        self.look_back(slots_R, token_ids_R, has_penalties=has_penalties, has_bad_words=has_bad_words)
