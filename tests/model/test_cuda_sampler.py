"""The GPU's sampler against the CPU's: the same logits and the same requests, step after step, give the same tokens."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from semipd.kernels.triton_util import is_interpreted
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.pinned_ring import PinnedRing
from semipd.model.sampler import Sampler
from semipd.sched.batch import SamplingFeature, SlotSampling
from tests.model.test_sampler import ALL_FEATURES, random_logits, random_sampling, slot_sampling

DEVICE = "cpu" if is_interpreted() else "cuda"


class Pair:
    """Both samplers, with the same requests in the same slots."""

    def __init__(self, max_slots: int, vocab_size: int) -> None:
        self.cpu = Sampler(max_slots=max_slots, vocab_size=vocab_size, device="cpu")
        self.gpu = CudaSampler(max_slots=max_slots, vocab_size=vocab_size, device=DEVICE)

    def admit(self, slot: int, sampling: SlotSampling) -> None:
        self.cpu.admit(slot, sampling)
        self.gpu.admit(slot, sampling)

    def step(self, logits_RV: Tensor, slots: list[int], features: SamplingFeature = ALL_FEATURES) -> list[int]:
        """One token for each slot, the same from both; the GPU's batch is padded with a row of the null slot."""
        expected: list[int] = self.cpu.sample(logits_RV, torch.tensor(slots), features).token_ids_R.tolist()
        padded_RV = torch.cat((logits_RV, torch.full((1, logits_RV.shape[1]), math.nan))).to(DEVICE)
        before = padded_RV.clone()
        slots_R = torch.tensor([*slots, self.gpu.null_slot], dtype=torch.int32, device=DEVICE)
        sampled = self.gpu.sample(padded_RV, slots_R, features)
        assert sampled.token_ids_R[:-1].tolist() == expected
        assert sampled.token_ids_R.dtype == torch.int64
        assert torch.equal(padded_RV.nan_to_num(), before.nan_to_num())
        assert self.gpu.last_token.tolist() == [*self.cpu.last_token.tolist(), 0]
        return expected


@pytest.mark.parametrize("seed", range(4))
def test_any_requests_get_the_tokens_of_the_cpu(seed: int) -> None:
    """Requests of all kinds beside each other; slots change owners, and preempted requests return."""
    rng = random.Random(seed)
    vocab_size = (5, 64, 65, 300)[seed]
    pair = Pair(6, vocab_size)
    samplings: dict[int, SlotSampling] = {}
    outputs: dict[int, list[int]] = {}
    for _ in range(4):
        for slot in range(6):
            if slot not in samplings or rng.random() < 0.2:
                samplings[slot], outputs[slot] = random_sampling(rng, vocab_size), []
                pair.admit(slot, samplings[slot])
            elif rng.random() < 0.2:
                pair.admit(slot, replace(samplings[slot], output_token_ids=tuple(outputs[slot])))
        slots = rng.sample(range(6), 4)
        logits = random_logits(rng, 4, vocab_size, torch.float32)
        if rng.random() < 0.5:
            logits[0, rng.randrange(vocab_size) :] = -math.inf
        for slot, token_id in zip(slots, pair.step(logits, slots), strict=True):
            outputs[slot].append(token_id)


@pytest.mark.parametrize(
    "features", [SamplingFeature.NONE, SamplingFeature.RANDOM, SamplingFeature.RANDOM | SamplingFeature.TRUNCATION]
)
def test_the_core_serves_batches_without_rare_features(features: SamplingFeature) -> None:
    pair = Pair(3, 100)
    temperature = 1.1 if SamplingFeature.RANDOM in features else 0.0
    top_k = 7 if SamplingFeature.TRUNCATION in features else 0
    for slot in range(3):
        pair.admit(slot, slot_sampling(seed=slot, temperature=temperature, top_k=top_k))
    for step in range(3):
        pair.step(random_logits(random.Random(step), 3, 100, torch.float32), [2, 0, 1], features)


def test_sample_into_writes_given_memory_and_keeps_its_own() -> None:
    """What a captured graph needs: the same addresses at every step, whatever is admitted meanwhile."""
    sampler = CudaSampler(max_slots=2, vocab_size=70, device=DEVICE)
    scratch, token_ids = sampler.make_scratch(4), torch.full((3,), -1, dtype=torch.int32, device=DEVICE)
    address = sampler.last_token.data_ptr()
    logits = torch.zeros(2, 70, device=DEVICE)
    logits[:, 40] = 1.0
    for first in (0, 1):
        sampler.admit(first, slot_sampling(temperature=0, logit_bias=((1, 2.0),), bad_word_ids=((1, 2, 3),)))
        slots = torch.tensor([first, sampler.null_slot], dtype=torch.int32, device=DEVICE)
        sampler.sample_into(logits, slots, token_ids[:2], scratch)
        assert token_ids.tolist() == [40, 40, -1]
    assert sampler.last_token.tolist() == [40, 40, 0]
    assert sampler.last_token.data_ptr() == address


def test_warming_up_changes_nothing() -> None:
    sampler = CudaSampler(max_slots=2, vocab_size=70, device=DEVICE)
    sampler.warm_up(torch.bfloat16)
    assert sampler.last_token.tolist() == [0, 0, 0]


def test_a_slot_is_wholly_its_new_owners() -> None:
    """A plain request after one with everything, and one that returns with outputs."""
    pair = Pair(2, 50)
    heavy = slot_sampling(
        prompt_token_ids=(1, 2, 3),
        temperature=0.9,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        presence_penalty=1.5,
        frequency_penalty=0.5,
        repetition_penalty=1.7,
        min_tokens=3,
        min_tokens_stop_ids=(4, 5, 6),
        logit_bias=((7, 9.0),),
        allowed_token_ids=tuple(range(0, 50, 2)),
        bad_word_ids=((8,), (2, 2), (2, 4, 6, 8)),
    )
    logits = random_logits(random.Random(1), 1, 50, torch.float32)
    for sampling in (heavy, slot_sampling(), replace(heavy, output_token_ids=(2, 2, 4, 6)), slot_sampling(seed=9)):
        pair.admit(1, sampling)
        expected = sampling.output_token_ids[-1] if sampling.output_token_ids else 0
        assert pair.gpu.last_token[1] == expected
        for _ in range(3):
            pair.step(logits, [1])


def test_tables_grow_and_keep_what_they_hold() -> None:
    """Longer lists of stop ids and bad words than any before, up to what a slot remembers and beyond."""
    pair = Pair(4, 90)
    for slot, length in enumerate((2, 5, 63, 70)):
        outputs = tuple(range(length - 1))
        pair.admit(
            slot,
            slot_sampling(
                temperature=0,
                output_token_ids=outputs,
                min_tokens=100,
                min_tokens_stop_ids=tuple(range(80 - slot, 81)),
                bad_word_ids=((*outputs, 89), *(((1, 88),) * slot)),
            ),
        )
    logits = torch.zeros(4, 90)
    logits[:, 89], logits[:, 78:81], logits[:, 88] = 9.0, 8.0, 7.0
    assert pair.step(logits, [0, 1, 2, 3]) == [78, 78, 88, 88]


def test_bfloat16_logits_are_scored_as_float32() -> None:
    rng = random.Random(3)
    pair = Pair(3, 80)
    logits = random_logits(rng, 3, 80, torch.float32).bfloat16()
    for slot in range(3):
        pair.admit(slot, replace(random_sampling(rng, 80), repetition_penalty=1.3))
    expected = pair.cpu.sample(logits.float(), torch.arange(3), ALL_FEATURES).token_ids_R
    actual = pair.gpu.sample(logits.to(DEVICE), torch.arange(3, device=DEVICE), ALL_FEATURES).token_ids_R
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("num_logprobs", [0, 3, 25])
def test_logprobs_are_those_of_the_cpu(num_logprobs: int) -> None:
    pair = Pair(2, 2000)
    for slot in range(2):
        pair.admit(slot, slot_sampling(seed=slot, logit_bias=((3, 50.0),)))
    logits = random_logits(random.Random(8), 2, 2000, torch.float32)
    features = SamplingFeature.RANDOM | SamplingFeature.MASKS | SamplingFeature.LOGPROBS
    expected = pair.cpu.sample(logits, torch.arange(2), features, num_logprobs).logprobs()
    slots = torch.arange(2, dtype=torch.int32, device=DEVICE)
    actual = pair.gpu.sample(logits.to(DEVICE), slots, features, num_logprobs).logprobs()
    targets = torch.tensor([1, 1999])
    expected += Sampler.token_logprobs(logits, targets, num_logprobs)
    actual += CudaSampler.score(logits.to(DEVICE), targets.to(DEVICE), num_logprobs).to_host()
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.rank, ours.top_token_ids) == (theirs.rank, theirs.top_token_ids)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-5)


def test_a_ring_copies_rows_longer_than_its_buffers() -> None:
    ring = PinnedRing(num_buffers=2, num_bytes=16, device=torch.device(DEVICE))
    outs = [torch.zeros(11, dtype=torch.int32, device=DEVICE) for _ in range(5)]
    for index, out in enumerate(outs):
        ring.copy(torch.arange(11) + 100 * index, out)
    assert [out.tolist() for out in outs] == [[100 * index + i for i in range(11)] for index in range(5)]
