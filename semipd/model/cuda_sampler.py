"""`semipd.model.sampler.Sampler` for GPUs: the same tokens, nothing read on the host, and a core that graphs capture.

A step's sampling has three parts. `adjust` changes logits for masks, bad words and penalties, and `look_back` records
the tokens for them: few requests need these, so they are launched one by one behind a graph. Between them stands
`sample_into`, two launches on buffers that are made once. It reads from device tables whether a row is greedy and what
truncates it, so that one captured graph serves every batch of its size.

Shape suffixes: R rows of a batch, T positions of a prompt, V vocab, P request slots (the last is the null slot, which
padding rows use).
"""

from __future__ import annotations

import torch
from torch import Tensor

from semipd.kernels import sampling
from semipd.kernels.sampling import SamplingScratch
from semipd.model.cuda_sampling_state import CudaSamplingState
from semipd.model.sampler import LogprobTensors, SampledTokens, logprob_tensors
from semipd.sched.batch import SamplingFeature, SlotSampling

_EAGER = SamplingFeature.PENALTIES | SamplingFeature.MASKS | SamplingFeature.BAD_WORDS


class CudaSampler:
    """Chooses tokens and keeps the sampling state of `max_slots` slots and the null slot.

    A row's token depends on its logits, its request's parameters and tokens, and (seed, sample_index, number of output
    tokens), not on batch-mates, row, slot, lane or preemptions. Two threads may call it for different slots.

    Logits are float32 or bfloat16, compared and weighed as float32. Slots of rows are int32 or int64, on the device;
    rows that pad a batch name the null slot, change nothing and get some token.
    """

    def __init__(self, *, max_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._vocab_size = vocab_size
        self._state = CudaSamplingState(max_slots=max_slots, vocab_size=vocab_size, device=self._device)
        self.null_slot = max_slots

    @property
    def last_token(self) -> Tensor:
        """int64 `[max_slots + 1]`: what each slot sampled last, which is its next input; always the same memory."""
        return self._state.last_token_P

    def admit(self, slot: int, sampling: SlotSampling) -> None:
        """Stage the state of a slot's new owner, or of one that returns with the outputs it had; does not wait."""
        self._state.admit(slot, sampling)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile and load the kernels for logits of `dtype`: seconds that no step should wait for."""
        slots_R = torch.full((1,), self.null_slot, dtype=torch.int32, device=self._device)
        for logits_dtype in {dtype, torch.float32}:  # adjusted logits are float32
            logits_RV = torch.zeros(1, self._vocab_size, dtype=logits_dtype, device=self._device)
            self.sample(logits_RV, slots_R, SamplingFeature.NONE)
        self._state.warm_up()

    def make_scratch(self, max_rows: int) -> SamplingScratch:
        """What `sample_into` writes for itself, 89 KB a row at a vocabulary of 128,256. Each lane has its own."""
        return SamplingScratch.make(max_rows, self._vocab_size, self._device)

    def sample_into(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        token_ids_R: Tensor,
        scratch: SamplingScratch,
    ) -> None:
        """Writes the next token of each row to `token_ids_R` and to its slot. Can be captured in a graph.

        Temperature, min_p, top_k and top_p are applied in this order, each where its row's slot says so.
        """
        state = self._state
        sampling.sample(
            logits_RV,
            slots_R,
            state.params_PF,
            state.last_token_P,
            state.num_outputs_P,
            token_ids_R,
            scratch,
        )

    def adjust(self, logits_RV: Tensor, slots_R: Tensor, features: SamplingFeature) -> Tensor:
        """Logits after bias, allowed ids, min_tokens and bad words, then penalties, in float32.

        Those given are not changed, and returned where `features` asks for none of these.
        """
        if not features & _EAGER:
            return logits_RV
        slots_R = slots_R.long()
        scores_RV = logits_RV.float()
        if SamplingFeature.MASKS in features:
            scores_RV = self._state.apply_masks(scores_RV, slots_R)
        if SamplingFeature.BAD_WORDS in features:
            scores_RV = self._state.apply_bad_words(scores_RV, slots_R)
        if SamplingFeature.PENALTIES in features:
            scores_RV = self._state.apply_penalties(scores_RV, slots_R)
        return scores_RV

    def look_back(self, slots_R: Tensor, token_ids_R: Tensor, features: SamplingFeature) -> None:
        """Record sampled tokens for later calls of `adjust`, on the stream that sampled them."""
        if features & (SamplingFeature.PENALTIES | SamplingFeature.BAD_WORDS):
            self._state.look_back(
                slots_R.long(),
                token_ids_R,
                has_penalties=SamplingFeature.PENALTIES in features,
                has_bad_words=SamplingFeature.BAD_WORDS in features,
            )

    def sample(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        features: SamplingFeature,
        num_logprobs: int = 0,
        *,
        scratch: SamplingScratch | None = None,
    ) -> SampledTokens:
        """The next token of each row, recorded in its slot: all parts, launched one by one; see `Sampler.sample`."""
        num_rows = logits_RV.shape[0]
        scratch = scratch or self.make_scratch(num_rows)
        token_ids_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
        scores_RV = self.adjust(logits_RV, slots_R, features)
        self.sample_into(scores_RV, slots_R, token_ids_R, scratch)
        self.look_back(slots_R, token_ids_R, features)
        logprobs = None
        if SamplingFeature.LOGPROBS in features:
            logprobs = self.score(logits_RV, token_ids_R, num_logprobs)
        return SampledTokens(token_ids_R, logprobs)

    @staticmethod
    def score(logits_TV: Tensor, token_ids_T: Tensor, num: int) -> LogprobTensors:
        """Raw log-probabilities of given tokens, each with the `num` most likely ones at its position."""
        return logprob_tensors(logits_TV.float(), token_ids_T, num)
