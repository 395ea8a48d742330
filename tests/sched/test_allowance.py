"""What decodes have saved of their targets, and may spend."""

from __future__ import annotations

import pytest

from semipd.config import SLO
from semipd.request import Request, SamplingParams
from semipd.sched.allowance import DecodeTargets, affordable, gap_left


def _decoding(
    slo: SLO | None, *, num_tokens: int = 1, seconds_each: float = 0.0, now: float = 0.0, max_tokens: int = 500
) -> Request:
    """A request that has made so many tokens, the later ones at that pace."""
    request = Request(
        request_id="r",
        prompt_token_ids=(1,) * 9,
        params=SamplingParams(),
        arrival_time=0.0,
        seed=0,
        max_tokens=max_tokens,
        slo=slo,
    )
    request.output_token_ids = [1] * num_tokens
    request.first_token_time = now - seconds_each * (num_tokens - 1)
    return request


def test_the_tightest_target_counts_and_a_tpot_is_worth_two_of_it_as_a_gap() -> None:
    requests = [_decoding(slo) for slo in (None, SLO(tpot=0.02), SLO(gap=0.05), SLO(ttft=1.0))]
    assert DecodeTargets.of(requests) == DecodeTargets(gap=0.04, comfort=0.02, has_tpot=True)
    assert DecodeTargets.of(requests[2:]) == DecodeTargets(gap=0.05, comfort=0.05, has_tpot=False)
    assert DecodeTargets.of([]) == DecodeTargets(gap=0.1, comfort=0.1, has_tpot=False)


def test_the_gap_that_is_left_counts_from_the_oldest_of_the_last_tokens() -> None:
    requests = [_decoding(SLO(gap=0.05)) for _ in range(3)]
    assert gap_left(requests, 1.0) == pytest.approx(0.9 * 0.05)
    for request, time in zip(requests, (0.99, None, 0.98), strict=True):
        request.last_token_time = time
    assert gap_left(requests, 1.0) == pytest.approx(0.9 * 0.05 - 0.02)


def test_affordable_is_what_all_can_spend() -> None:
    rich = _decoding(SLO(tpot=0.02, gap=1.0), num_tokens=101, seconds_each=0.01, now=1.0)
    poor = _decoding(SLO(tpot=0.02, gap=1.0), num_tokens=101, seconds_each=0.0185, now=1.0)
    saved, target = 0.95 * 0.02 * 102 - 1.0, 0.95 * 0.02
    pace = (1.0 + 16 * 0.005) / (100 + 16)
    assert affordable([rich], 1.0, 0.005) == pytest.approx((saved + 16 * (target - pace)) / 2)
    assert affordable([rich] * 11 + [poor], 1.0, 0.005) < 0.2 < affordable([rich], 1.0, 0.005)
    tight = _decoding(SLO(tpot=0.02), num_tokens=101, seconds_each=0.01, now=1.0)
    assert affordable([tight], 1.0, 0.005) == pytest.approx(0.9 * 0.04), "up to the gap target"


def test_one_that_has_just_begun_can_spend_what_the_pace_of_all_will_save() -> None:
    slo, fresh = SLO(tpot=0.02, gap=1.0), _decoding(SLO(tpot=0.02, gap=1.0), now=1.0)
    one_step = 0.95 * 0.02  # a token was made, so it may have taken two of these

    def limit(seconds_each: float, of: Request = fresh) -> float:
        other = _decoding(slo, num_tokens=401, seconds_each=seconds_each, now=1.0)
        return affordable([of, other], 1.0, seconds_each)

    assert limit(0.009) == pytest.approx(one_step + 16 * 0.01 / 2, rel=0.01)
    assert limit(0.019) == pytest.approx(one_step, rel=0.01), "nobody saves anything"
    ending = _decoding(slo, now=1.0, max_tokens=5)
    assert limit(0.009, ending) == pytest.approx(one_step + 3 * 0.01 / 2, rel=0.01), "it makes no more"


def test_a_decode_whose_tpot_is_out_of_reach_does_not_hold_up_the_others() -> None:
    rich = _decoding(SLO(tpot=0.02, gap=1.0), num_tokens=101, seconds_each=0.01, now=9.0)
    lost = _decoding(SLO(tpot=0.02, gap=1.0), num_tokens=101, seconds_each=0.09, now=9.0)
    assert affordable([rich, lost], 9.0, 0.01) == affordable([rich], 9.0, 0.01)
    assert affordable([lost], 9.0, 0.01) == pytest.approx(0.9)
