"""Sampling: every row against a reference that treats one row in plain Python, then statistics, then independence."""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from semipd.model import sampling_ops as ops
from semipd.model.sampler import Sampler
from semipd.sched.batch import SamplingFeature, SlotSampling

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
ALL_FEATURES = (
    SamplingFeature.RANDOM
    | SamplingFeature.TRUNCATION
    | SamplingFeature.PENALTIES
    | SamplingFeature.MASKS
    | SamplingFeature.BAD_WORDS
)


# The reference ------------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def reference_uniform(seed: int, sample_index: int, index: int) -> float:
    key = mix((mix(seed & MASK64) + (sample_index + 1) * GOLDEN) & MASK64)
    return (mix((key + (index + 1) * GOLDEN) & MASK64) >> 11) * 2.0**-53


def reference_scores(logits: Tensor, sampling: SlotSampling, outputs: list[int]) -> Tensor:
    """Masked and penalised logits of one row, token by token in the logits' own precision."""
    scores = logits.clone()
    for token_id, value in sampling.logit_bias:
        scores[token_id] += value
    if sampling.allowed_token_ids is not None:
        for token_id in set(range(len(scores))) - set(sampling.allowed_token_ids):
            scores[token_id] = -math.inf
    if len(outputs) < sampling.min_tokens:
        for token_id in sampling.min_tokens_stop_ids:
            scores[token_id] = -math.inf
    for word in sampling.bad_word_ids:
        num_before = len(word) - 1
        if len(outputs) >= num_before and tuple(outputs[len(outputs) - num_before :]) == word[:-1]:
            scores[word[-1]] = -math.inf
    repetition = torch.tensor(sampling.repetition_penalty, dtype=scores.dtype)
    for token_id in set(sampling.prompt_token_ids) | set(outputs):
        score = scores[token_id]
        scores[token_id] = score / repetition if score > 0 else score * repetition
    for token_id in set(outputs):
        frequency = torch.tensor(sampling.frequency_penalty, dtype=scores.dtype)
        scores[token_id] -= frequency * outputs.count(token_id)
        scores[token_id] -= torch.tensor(sampling.presence_penalty, dtype=scores.dtype)
    return scores


def reference_weights(scores: Tensor, sampling: SlotSampling) -> dict[int, int]:
    """Kept token ids, ascending, with their weights in units of the sampler's resolution: exact integers."""
    values = scores.tolist()
    peak = max(values)
    unit = ops.WEIGHT_UNIT
    weights = [round(math.exp((value - peak) / sampling.temperature) / unit) for value in values]
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    ranked = [i for i in ranked if weights[i] * unit >= sampling.min_p]
    ranked.sort(key=lambda i: (-weights[i], i))
    nucleus = sampling.top_p * sum(weights[i] for i in ranked)
    kept, reached = [], 0
    for i in ranked:
        if reached < nucleus or sampling.top_p == 1:
            kept.append(i)
        reached += weights[i]
    return {i: weights[i] for i in sorted(kept)}


def reference_token(logits: Tensor, sampling: SlotSampling, outputs: list[int]) -> int:
    scores = reference_scores(logits, sampling, outputs)
    if sampling.temperature == 0:
        return int(scores.argmax())
    weights = reference_weights(scores, sampling)
    target = reference_uniform(sampling.seed, sampling.sample_index, len(outputs)) * sum(weights.values())
    reached = 0
    for token_id, weight in weights.items():
        reached += weight
        if reached > target:
            return token_id
    raise AssertionError("u is below 1, so some token is reached")


# Makers -------------------------------------------------------------------------------------------------------------


def slot_sampling(**values: Any) -> SlotSampling:
    return SlotSampling(**{"seed": 0, "sample_index": 0, "prompt_token_ids": (0,), **values})


def random_sampling(rng: random.Random, vocab_size: int) -> SlotSampling:
    """Any mix of parameters; each one neutral about half the time."""

    def maybe(value: Any, neutral: Any) -> Any:
        return value if rng.random() < 0.5 else neutral

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocab_size), k=rng.randint(least, most)))

    return slot_sampling(
        seed=rng.randrange(-(2**63), 2**64),
        sample_index=rng.randrange(4),
        prompt_token_ids=tokens(1, 8),
        temperature=maybe(rng.choice((0.0, 1e-6, 0.3, 1.0, 3.0)), 0.7),
        top_p=maybe(rng.choice((1e-6, 0.2, 0.7, 0.95, 0.999)), 1.0),
        top_k=maybe(rng.choice((1, 2, 5, 70, vocab_size, vocab_size + 9)), 0),
        min_p=maybe(rng.choice((0.01, 0.2, 1.0)), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        min_tokens=(min_tokens := maybe(rng.randrange(1, 5), 0)),
        min_tokens_stop_ids=tokens(1, 3) if min_tokens else (),
        logit_bias=maybe(tuple((t, rng.uniform(-5, 5)) for t in set(tokens(1, 4))), ()),
        allowed_token_ids=maybe((*tokens(2, 2), *range(0, vocab_size, 2)), None),
        bad_word_ids=maybe(tuple(tokens(1, 4) for _ in range(5)), ()),
    )


def random_logits(rng: random.Random, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Rows of several spreads, some rounded so that they are full of ties."""
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    logits = torch.randn(num_rows, vocab_size, generator=generator, dtype=dtype)
    logits *= torch.tensor([rng.choice((0.1, 1.0, 4.0)) for _ in range(num_rows)], dtype=dtype).unsqueeze(-1)
    for row in logits:
        if rng.random() < 0.3:
            row.round_()
    return logits


@dataclass
class Run:
    """A sampler with one slot per request, all stepped together."""

    sampler: Sampler
    samplings: list[SlotSampling]
    slots: list[int]

    @staticmethod
    def of(samplings: list[SlotSampling], vocab_size: int, *, dtype: torch.dtype = torch.float32) -> Run:
        sampler = Sampler(max_slots=len(samplings) + 1, vocab_size=vocab_size, device="cpu", dtype=dtype)
        for slot, sampling in enumerate(samplings):
            sampler.admit(slot, sampling)
        return Run(sampler, samplings, list(range(len(samplings))))

    def step(self, logits_RV: Tensor, features: SamplingFeature = ALL_FEATURES) -> list[int]:
        token_ids: list[int] = self.sampler.sample(logits_RV, torch.tensor(self.slots), features).token_ids_R.tolist()
        return token_ids


def sample_once(logits: Tensor, features: SamplingFeature = ALL_FEATURES, **values: Any) -> int:
    return Run.of([slot_sampling(**values)], logits.shape[-1], dtype=logits.dtype).step(logits.unsqueeze(0), features)[
        0
    ]


def sample_many(logits: Tensor, num: int, features: SamplingFeature = ALL_FEATURES, **values: Any) -> Tensor:
    """`num` draws from the same logits: 200 seeds, and as many token indices as that takes."""
    run = Run.of([slot_sampling(**{**values, "seed": seed}) for seed in range(200)], logits.shape[-1])
    rows = logits.expand(200, -1)
    return torch.tensor([run.step(rows, features) for _ in range(num // 200)]).flatten()


def assert_fits(counts: Tensor, probabilities: Tensor) -> None:
    """Chi-square with the normal approximation of Wilson and Hilferty; 4.5 sigma, and nothing where nothing may be."""
    assert int(counts[probabilities == 0].sum()) == 0
    num = counts.sum()
    is_common = probabilities * num >= 5
    observed = torch.cat((counts[is_common], counts[~is_common].sum().view(1))).double()
    expected = num * torch.cat((probabilities[is_common], probabilities[~is_common].sum().view(1))).double()
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    freedom = max(len(expected) - 1, 1)
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.5, f"chi-square {chi_square:.1f} for {freedom} degrees of freedom"


# Random numbers -----------------------------------------------------------------------------------------------------


def test_uniform_is_splitmix_of_seed_sample_and_index() -> None:
    rng = random.Random(0)
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, *(rng.randrange(2**64) for _ in range(20))):
        for sample_index in (0, 1, 7):
            indices = torch.tensor([0, 1, 2, 1000, 2**31])
            key = ops.stream_key(seed, sample_index)
            expected = [reference_uniform(seed, sample_index, int(i)) for i in indices]
            assert ops.uniform(key.expand(5), indices).tolist() == expected


@pytest.mark.parametrize("varied", ["seed", "sample_index", "index"])
def test_uniform_is_even_along_each_part_of_its_key(varied: str) -> None:
    num = 4000 if varied != "index" else 100_000
    if varied == "index":
        u = ops.uniform(ops.stream_key(5, 0).expand(num), torch.arange(num))
    else:
        keys = [ops.stream_key(i, 0) if varied == "seed" else ops.stream_key(5, i) for i in range(num)]
        u = ops.uniform(torch.stack(keys), torch.zeros(num, dtype=torch.int64))
    assert 0 <= float(u.min())
    assert float(u.max()) < 1
    assert_fits((u * 64).long().bincount(minlength=64), torch.full((64,), 1 / 64))
    # Neighbours are independent: pairs fill the square evenly.
    pairs = (u[:-1] * 8).long() * 8 + (u[1:] * 8).long()
    assert_fits(pairs.bincount(minlength=64), torch.full((64,), 1 / 64))
    # So do the low bits that decide between tokens of nearly equal place.
    assert_fits((u * 2**40 % 32).long().bincount(minlength=32), torch.full((32,), 1 / 32))


# Building blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_argmax_takes_the_smallest_id_among_equals(vocab_size: int, dtype: torch.dtype) -> None:
    rng = random.Random(vocab_size)
    logits = torch.cat([random_logits(rng, 30, vocab_size, dtype), torch.full((1, vocab_size), -math.inf, dtype=dtype)])
    assert torch.equal(ops.argmax(logits), logits.argmax(-1))
    assert ops.argmax(logits)[-1] == 0


@pytest.mark.parametrize("vocab_size", [5, 130, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_tokens_ranks_by_logit_then_id(vocab_size: int, dtype: torch.dtype) -> None:
    rng = random.Random(vocab_size)
    logits = random_logits(rng, 20, vocab_size, dtype)
    logits[0] = 1.5
    logits[1] = -math.inf
    logits[2, ::2] = 0.0
    logits[2, 1::2] = -0.0
    logits[3, 3:] = -math.inf
    expected = logits.sort(dim=-1, descending=True, stable=True).indices
    for k in {1, 2, 3, vocab_size // 64 + 1, vocab_size - 1, vocab_size}:
        assert torch.equal(ops.top_tokens(logits, k), expected[:, :k]), k


# Against the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_mixed_batches_match_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    vocab_size = rng.choice((7, 64, 150, 700))
    dtype = rng.choice((torch.float32, torch.float32, torch.float64))
    samplings = [random_sampling(rng, vocab_size) for _ in range(12)]
    run = Run.of(samplings, vocab_size, dtype=dtype)
    outputs: list[list[int]] = [[] for _ in samplings]
    for _ in range(8):
        logits = random_logits(rng, len(samplings), vocab_size, dtype)
        before = logits.clone()
        expected = [
            reference_token(row, sampling, output) if reference_scores(row, sampling, output).isfinite().any() else 0
            for row, sampling, output in zip(logits, samplings, outputs, strict=True)
        ]
        assert run.step(logits) == expected
        assert torch.equal(logits, before)
        for output, token_id in zip(outputs, expected, strict=True):
            output.append(token_id)
    assert run.sampler.last_token.tolist()[:-1] == [output[-1] for output in outputs]


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5, 1.5, 5.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.95, 0.9999])
def test_wide_nuclei_match_the_reference(spread: float, top_p: float) -> None:
    """A nucleus of more tokens than are sorted is found digit by digit; ties at its border are cut by id."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5000, generator=generator) * spread
    logits[1] = (logits[1] * 4).round() / 4
    samplings = [slot_sampling(seed=seed, temperature=0.9, top_p=top_p) for seed in range(3)]
    run = Run.of(samplings, 5000)
    for step in range(2):
        outputs = [0] * step
        expected = [reference_token(row, s, outputs) for row, s in zip(logits, samplings, strict=True)]
        assert run.step(logits, SamplingFeature.RANDOM | SamplingFeature.TRUNCATION) == expected


# Statistics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 2.5},
        {"temperature": 0.4, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_filtered_distribution(values: dict[str, Any]) -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(3)) * 2
    sampling = slot_sampling(**values)
    probabilities = torch.zeros(100, dtype=torch.float64)
    for token_id, weight in reference_weights(logits, sampling).items():
        probabilities[token_id] = weight
    probabilities /= probabilities.sum()
    token_ids = sample_many(logits, 20_000, **values)
    assert_fits(token_ids.bincount(minlength=100), probabilities)


def test_untruncated_distribution_is_the_softmax() -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(4)) * 3
    token_ids = sample_many(logits, 20_000, SamplingFeature.RANDOM, temperature=1.7)
    assert_fits(token_ids.bincount(minlength=60), (logits.double() / 1.7).softmax(-1))


def test_sample_indices_of_one_seed_differ() -> None:
    logits = torch.zeros(1000)
    first, second = (
        [sample_once(logits, seed=seed, sample_index=sample_index) for seed in range(50)] for sample_index in (0, 1)
    )
    assert sum(a == b for a, b in zip(first, second, strict=True)) <= 2


# Independence -------------------------------------------------------------------------------------------------------


def test_tokens_do_not_depend_on_batch_slot_or_row() -> None:
    rng = random.Random(5)
    vocab_size, num = 3000, 12
    samplings = [random_sampling(rng, vocab_size) for _ in range(num)]
    steps = [random_logits(rng, num, vocab_size, torch.float32) for _ in range(3)]
    together = Run.of(samplings, vocab_size)
    expected = [together.step(logits) for logits in steps]

    order = rng.sample(range(num), num)
    shuffled = Run.of([samplings[i] for i in order], vocab_size)
    for logits, tokens in zip(steps, expected, strict=True):
        assert shuffled.step(logits[order]) == [tokens[i] for i in order]

    sampler = Sampler(max_slots=30, vocab_size=vocab_size, device="cpu")
    for i, sampling in enumerate(samplings):
        sampler.admit(29 - i, sampling)
        for logits, tokens in zip(steps, expected, strict=True):
            alone = sampler.sample(logits[i : i + 1], torch.tensor([29 - i]), ALL_FEATURES).token_ids_R
            assert alone.tolist() == [tokens[i]]


def test_preempted_request_goes_on_with_the_same_tokens() -> None:
    rng = random.Random(6)
    vocab_size, num, num_steps = 50, 8, 12
    samplings = [random_sampling(rng, vocab_size) for _ in range(num)]
    steps = [random_logits(rng, num, vocab_size, torch.float32) for _ in range(num_steps)]
    run = Run.of(samplings, vocab_size)
    tokens = [run.step(logits) for logits in steps]
    for stop in (1, 5, 11):
        replayed = [
            replace(sampling, output_token_ids=tuple(step[i] for step in tokens[:stop]))
            for i, sampling in enumerate(samplings)
        ]
        # Into slots that others have used, in another order.
        run.slots = run.slots[1:] + run.slots[:1]
        for slot, sampling in zip(run.slots, replayed, strict=True):
            run.sampler.admit(slot, sampling)
        assert run.sampler.last_token[run.slots].tolist() == tokens[stop - 1]
        assert [run.step(logits) for logits in steps[stop:]] == tokens[stop:]


def test_slot_keeps_nothing_of_its_last_owner() -> None:
    rng = random.Random(7)
    vocab_size = 10
    used = Sampler(max_slots=1, vocab_size=vocab_size, device="cpu")
    slots = torch.tensor([0])
    for _ in range(150):
        sampling = random_sampling(rng, vocab_size)
        used.admit(0, sampling)
        fresh = Run.of([sampling], vocab_size)
        for _ in range(5):
            logits = random_logits(rng, 1, vocab_size, torch.float32)
            assert used.sample(logits, slots, ALL_FEATURES).token_ids_R.tolist() == fresh.step(logits)


def test_two_threads_on_disjoint_slots_give_what_one_gives(switch_often: None) -> None:
    """One lane in inference mode and one outside: each writes tables that the other made or grew."""
    vocab_size, num, num_steps = 200, 24, 5
    rng = random.Random(8)
    # Ever larger tables, so that both lanes keep growing them.
    samplings = [
        slot_sampling(
            seed=slot,
            temperature=1.0,
            frequency_penalty=1.0,
            logit_bias=((slot, 2.0),),
            min_tokens=3,
            min_tokens_stop_ids=tuple(range(slot + 1)),
            bad_word_ids=tuple(tuple(rng.choices(range(vocab_size), k=2)) for _ in range(20 * slot + 1)),
        )
        for slot in range(num)
    ]
    logits = random_logits(rng, num, vocab_size, torch.float32)
    alone = Run.of(samplings, vocab_size)
    expected = torch.tensor([alone.step(logits) for _ in range(num_steps)])

    for _ in range(10):
        sampler = Sampler(max_slots=num, vocab_size=vocab_size, device="cpu")
        lanes = [Lane(sampler, logits, samplings, range(first, num, 2), num_steps) for first in (0, 1)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        assert torch.equal(lanes[0].token_ids + lanes[1].token_ids, expected)


@pytest.fixture
def switch_often() -> Iterator[None]:
    """Threads take turns every microsecond instead of every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class Lane(threading.Thread):
    """Admits its slots one after the other, then samples each of them; `token_ids` are 0 for others' slots."""

    def __init__(
        self, sampler: Sampler, logits: Tensor, samplings: list[SlotSampling], slots: range, num_steps: int
    ) -> None:
        super().__init__()
        self.token_ids = torch.zeros(num_steps, len(samplings), dtype=torch.int64)
        self._sampler, self._logits, self._samplings, self._slots = sampler, logits, samplings, slots

    def run(self) -> None:
        with torch.inference_mode(self._slots.start == 0):
            for slot in self._slots:
                self._sampler.admit(slot, self._samplings[slot])
            for step in range(len(self.token_ids)):
                for slot in self._slots:
                    row, slots = self._logits[slot : slot + 1], torch.tensor([slot])
                    self.token_ids[step, slot] = self._sampler.sample(row, slots, ALL_FEATURES).token_ids_R[0]


# Features -----------------------------------------------------------------------------------------------------------


def test_greedy_rows_ignore_random_neighbours_and_their_own_truncation() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(9))
    samplings = [slot_sampling(seed=row, temperature=row % 2 * 5.0, top_k=20, top_p=0.5, min_p=0.5) for row in range(6)]
    token_ids = Run.of(samplings, 500).step(logits)
    assert token_ids[::2] == logits.argmax(-1).tolist()[::2]


def test_empty_batch_gives_no_tokens() -> None:
    sampler = Sampler(max_slots=2, vocab_size=100, device="cpu")
    features = ALL_FEATURES | SamplingFeature.LOGPROBS
    sampled = sampler.sample(torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64), features, 3)
    assert sampled.token_ids_R.shape == (0,)
    assert sampled.logprobs() == []


def test_top_k_keeps_the_smaller_ids_of_a_tie() -> None:
    logits = torch.zeros(300)
    logits[250] = 1.0
    assert set(sample_many(logits, 2000, top_k=4).tolist()) == {0, 1, 2, 250}
    assert set(sample_many(torch.zeros(10_000), 2000, top_k=3).tolist()) == {0, 1, 2}


def test_top_p_keeps_the_smaller_ids_of_a_tie() -> None:
    assert set(sample_many(torch.zeros(8), 2000, top_p=0.5).tolist()) == {0, 1, 2, 3}
    assert set(sample_many(torch.zeros(1024), 4000, top_p=100 / 1024).tolist()) == set(range(100))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-310},
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"top_k": 1},
        {"temperature": 1e300, "top_k": 1},
    ],
)
def test_extreme_truncation_is_greedy(values: dict[str, Any]) -> None:
    for seed in range(20):
        logits = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 3
        assert sample_once(logits, seed=seed, **values) == int(logits.argmax())


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(10))
    for seed in range(20):
        expected = sample_once(logits, SamplingFeature.RANDOM, seed=seed)
        for top_k in (500, 501, 10**9):
            assert sample_once(logits, seed=seed, top_k=top_k) == expected


def test_endless_temperature_is_even_over_what_top_k_keeps() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(11))
    best = logits.topk(5).indices
    token_ids = sample_many(logits, 4000, temperature=1e300, top_k=5)
    probabilities = torch.zeros(1000).index_fill_(0, best, 0.2)
    assert_fits(token_ids.bincount(minlength=1000), probabilities)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("num_candidates", [0, 20])
def test_masked_tokens_are_never_drawn_at_the_ends_of_the_interval(u: float, num_candidates: int) -> None:
    generator = torch.Generator().manual_seed(12)
    for _ in range(30):
        logits = torch.randn(4, 777, generator=generator) * 4
        logits[torch.rand(4, 777, generator=generator) < 0.6] = -math.inf
        logits[:, :2] = logits[:, -2:] = -math.inf
        ones = torch.ones(4, dtype=torch.float64)
        top_k_R = torch.full((4,), num_candidates)
        params = ops.DrawParams(ones * 1.2, ones * 0.97, top_k_R, ones * 0, ones * u)
        for token_ids in (ops.draw(logits, params), ops.draw_truncated(logits, params)):
            chosen = logits.gather(1, token_ids.unsqueeze(-1)).squeeze(-1)
            assert chosen.isfinite().all()
            assert (chosen > logits.amax(-1) - 34 * math.log(2) * 1.2 - 1).all()


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {}, {"top_k": 5, "top_p": 0.5}, {"top_p": 0.5, "min_p": 0.5}])
def test_row_without_any_allowed_token_gives_token_0(values: dict[str, Any]) -> None:
    assert sample_once(torch.full((200,), -math.inf), **values) == 0
    features = SamplingFeature.RANDOM if values == {} else ALL_FEATURES
    assert sample_once(torch.full((200,), -math.inf), features, **values) == 0
    masks: dict[str, Any] = {"allowed_token_ids": (7,), "min_tokens": 1, "min_tokens_stop_ids": (7,)}
    assert sample_once(torch.randn(200), **values, **masks) == 0


def test_nan_logits_give_an_id_in_range() -> None:
    for values in ({"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}):
        assert 0 <= sample_once(torch.full((200,), math.nan), **values) < 200


def test_allowed_ids_and_bias_shape_the_distribution() -> None:
    logits = torch.zeros(50)
    token_ids = sample_many(logits, 4000, allowed_token_ids=(3, 30, 3), logit_bias=((30, math.log(3)), (4, 100.0)))
    probabilities = torch.zeros(50)
    probabilities[3], probabilities[30] = 0.25, 0.75
    assert_fits(token_ids.bincount(minlength=50), probabilities)


def test_stop_ids_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, 20)
    logits[0, 5], logits[0, 9], logits[0, 2] = 3.0, 2.0, 1.0
    run = Run.of([slot_sampling(temperature=0.0, min_tokens=3, min_tokens_stop_ids=(5, 9))], 20)
    assert [run.step(logits, SamplingFeature.MASKS)[0] for _ in range(5)] == [2, 2, 2, 5, 5]


def test_stop_id_tables_grow_with_their_longest_row() -> None:
    logits = torch.arange(20.0).repeat(2, 1)
    run = Run.of([slot_sampling(temperature=0.0, min_tokens=9, min_tokens_stop_ids=(19,))] * 2, 20)
    assert run.step(logits) == [19 - 1] * 2
    run.sampler.admit(1, slot_sampling(temperature=0.0, min_tokens=9, min_tokens_stop_ids=(19, 18, 17, 16)))
    assert run.step(logits) == [18, 15]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 64, 65, 90])
def test_bad_word_of_any_length_is_stopped_at_its_last_token(length: int) -> None:
    """Logits ask for 0, 1, 2, ...: exactly the last token of the word gives way to the second choice."""
    word = tuple(range(3, 3 + length))
    run = Run.of([slot_sampling(temperature=0.0, bad_word_ids=(word,)), slot_sampling(temperature=0.0)], 200)
    asked = [0, 1, 2, *word, 150]
    outputs = []
    for token_id in asked:
        logits = torch.zeros(2, 200)
        logits[:, token_id], logits[:, 199] = 2.0, 1.0
        outputs.append(run.step(logits))
    assert [free for _, free in outputs] == asked
    expected = [199 if token_id == word[-1] else token_id for token_id in asked]
    assert [bound for bound, _ in outputs] == expected


def test_bad_words_share_beginnings_and_ignore_the_prompt() -> None:
    words = ((4, 5), (4, 5, 6), (5, 7), (8,), (4, 4, 4))
    sampling = slot_sampling(temperature=0.0, prompt_token_ids=(4, 4), bad_word_ids=words)

    def follow(outputs: tuple[int, ...]) -> set[int]:
        """Tokens forbidden after `outputs`."""
        run = Run.of([replace(sampling, output_token_ids=outputs)] * 10, 10)
        wanted = torch.eye(10)
        return {token_id for token_id, chosen in enumerate(run.step(wanted)) if chosen != token_id}

    assert follow(()) == {8}
    assert follow((4,)) == {5, 8}
    assert follow((4, 5)) == {6, 7, 8}
    assert follow((4, 4)) == {4, 5, 8}
    assert follow((5, 4)) == {5, 8}


def test_penalties_look_at_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.0, -1.0]])
    features = SamplingFeature.PENALTIES
    assert sample_once(logits[0], features, temperature=0.0, prompt_token_ids=(0,), repetition_penalty=1.1) == 1
    # Presence and frequency count the output alone.
    for name in ("presence_penalty", "frequency_penalty"):
        run = Run.of([slot_sampling(temperature=0.0, prompt_token_ids=(0, 0), **{name: 0.5})], 4)
        tokens = [run.step(logits, features)[0] for _ in range(6)]
        # 2.0, 1.9, then either each is penalised once, or once per occurrence.
        assert tokens == ([0, 1, 0, 0, 0, 0] if name == "presence_penalty" else [0, 1, 0, 1, 0, 2])


def test_limitless_repetition_penalty_stays_finite() -> None:
    logits = torch.tensor([3.0, 2.0, -1.0])
    assert sample_once(logits, prompt_token_ids=(0, 1), temperature=0.0, repetition_penalty=1e300) == 0
    assert sample_once(logits, prompt_token_ids=(1, 2), temperature=1.0, repetition_penalty=1e-300) == 1


# Log-probabilities --------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    generator = torch.Generator().manual_seed(13)
    logits = torch.randn(5, 400, generator=generator) * 3
    logits[4] = logits[4].round()
    samplings = [slot_sampling(seed=i, temperature=2.0, top_k=30, logit_bias=((i, 9.0),)) for i in range(5)]
    run = Run.of(samplings, 400)
    features = ALL_FEATURES | SamplingFeature.LOGPROBS
    sampled = run.sampler.sample(logits, torch.arange(5), features, 7)
    expected = logits.double().log_softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    for row, (token_id, item) in enumerate(zip(sampled.token_ids_R.tolist(), sampled.logprobs(), strict=True)):
        assert item.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-5)
        assert item.rank == order[row].tolist().index(token_id) + 1
        assert list(item.top_token_ids) == order[row, :7].tolist()
        assert item.top_logprobs == pytest.approx(expected[row, order[row, :7]].tolist(), abs=1e-5)
        if item.rank <= 7:
            assert item.top_token_ids[item.rank - 1] == token_id


def test_prompt_logprobs_score_the_given_tokens() -> None:
    logits = torch.randn(6, 90, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    token_ids = torch.tensor([0, 89, 5, 5, 44, int(logits[5].argmax())])
    items = Sampler.token_logprobs(logits, token_ids, 0)
    expected = logits.log_softmax(-1).gather(1, token_ids.unsqueeze(-1)).squeeze(-1)
    assert [item.logprob for item in items] == pytest.approx(expected.tolist(), abs=1e-12)
    assert [item.rank for item in items] == [
        int((row > row[i]).sum()) + 1 for row, i in zip(logits, token_ids, strict=True)
    ]
    assert items[5].rank == 1
    assert items[0].top_token_ids == items[0].top_logprobs == ()
    assert len(Sampler.token_logprobs(logits[:, :3], token_ids[:1].expand(6), 20)[0].top_token_ids) == 3


def test_no_logprobs_unless_asked_for() -> None:
    sampler = Sampler(max_slots=1, vocab_size=10, device="cpu")
    sampled = sampler.sample(torch.zeros(1, 10), torch.tensor([0]), SamplingFeature.NONE)
    assert sampled.logprob_tensors is None
