"""Sampling parameters say no at the call, in words that name the field; requests keep their counters in order."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest

from semipd.config import SLO
from semipd.errors import RequestError
from semipd.request import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, Request, RequestStatus, SamplingParams


def make_request(**values: Any) -> Request:
    defaults: dict[str, Any] = {
        "request_id": "r",
        "prompt_token_ids": (1, 2, 3),
        "params": SamplingParams(),
        "arrival_time": 10.0,
        "seed": 0,
        "max_tokens": 8,
    }
    return Request(**{**defaults, **values})


# Sampling parameters --------------------------------------------------------------------------------------------------


def test_defaults_sample_from_the_whole_distribution() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.seed, params.logprobs) == (DEFAULT_MAX_TOKENS, None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"n": 5, "temperature": 1e-6},
        {"temperature": 0},
        {"temperature": 1e6},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"top_k": 10**9},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"max_tokens": 1, "min_tokens": 1},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"repetition_penalty": 1e-9},
        {"logit_bias": {0: -100, 7: 100.0}},
        {"logit_bias": {}},
        {"logprobs": 0, "prompt_logprobs": MAX_LOGPROBS},
        {"allowed_token_ids": [0]},
        {"stop": "end", "include_stop_str_in_output": True},
        {"stop_token_ids": [2], "include_stop_str_in_output": True},
        {"include_stop_str_in_output": True},
        {"max_tokens": None, "min_tokens": 10**6},
        {"allowed_token_ids": [2, 3], "stop_token_ids": [2], "min_tokens": 1},
        {"allowed_token_ids": [2], "stop_token_ids": [2]},
        {"priority": -5},
    ],
)
def test_values_at_their_bounds_are_taken(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert SamplingParams.from_dict(values) == params
    assert pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n is 0; expected an integer from 1"),
        ({"n": True}, "n is True; expected an integer from 1"),
        ({"n": 2, "temperature": 0}, "n is 2 with temperature 0"),
        ({"temperature": -0.1}, "temperature is -0.1; expected a finite number from 0"),
        ({"temperature": math.nan}, "temperature is nan; expected a finite number"),
        ({"temperature": math.inf}, "temperature is inf; expected a finite number"),
        ({"temperature": 10**400}, "temperature is 1000.*; expected a finite number"),
        ({"temperature": "1"}, "temperature is '1'; expected a finite number"),
        ({"temperature": None}, "temperature is None; expected a finite number"),
        ({"temperature": False}, "temperature is False; expected a finite number"),
        ({"top_p": 0}, "top_p is 0; expected a finite number above 0 to 1"),
        ({"top_p": 1.01}, "top_p is 1.01; expected a finite number above 0 to 1"),
        ({"top_k": -2}, "top_k is -2; expected an integer from -1"),
        ({"top_k": -1.0}, "top_k is -1.0; expected an integer"),
        ({"top_k": 5.0}, "top_k is 5.0; expected an integer"),
        ({"min_p": -1e-9}, "min_p is -1e-09; expected a finite number from 0 to 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; expected an integer in"),
        ({"seed": 1.5}, "seed is 1.5; expected an integer in"),
        ({"max_tokens": 0}, "max_tokens is 0; expected an integer from 1"),
        ({"max_tokens": "8"}, "max_tokens is '8'; expected an integer from 1"),
        ({"min_tokens": -1}, "min_tokens is -1; expected an integer from 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, above max_tokens 8"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; expected a finite number from -2 to 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1; expected a finite number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a finite number above 0"),
        ({"stop": ["a", ""]}, "stop is .'a', ''.; expected non-empty strings"),
        ({"stop": ""}, "stop is .*; expected non-empty strings"),
        ({"stop": 7}, "stop is 7; expected a sequence of strings"),
        ({"bad_words": "word"}, "bad_words is 'word'; expected non-empty strings"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7; expected a sequence of token ids"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids is \[-1\]; expected token ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids is '12'; expected token ids"),
        ({"stop_token_ids": [True]}, r"stop_token_ids is \[True\]; expected token ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [1.0]}, r"allowed_token_ids is \[1.0\]; expected token ids"),
        (
            {"allowed_token_ids": [2, 2], "stop_token_ids": [1, 2], "min_tokens": 1},
            "allowed_token_ids is .2, 2., all of them in stop_token_ids",
        ),
        ({"logit_bias": [1, 2]}, r"logit_bias is \[1, 2\]; expected a mapping"),
        ({"logit_bias": {"5": 1.0}}, r"logit_bias is \('5',\); expected token ids"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\] is 101; expected a finite number from -100 to 100"),
        ({"logprobs": MAX_LOGPROBS + 1}, "logprobs is 21; expected an integer in"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; expected an integer in"),
        ({"ignore_eos": 1}, "ignore_eos is 1; expected True or False"),
        ({"skip_special_tokens": None}, "skip_special_tokens is None; expected True or False"),
        ({"priority": 2**31}, "priority is 2147483648; expected an integer in"),
    ],
)
def test_values_that_cannot_be_served_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


def test_unknown_fields_are_named_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="unknown sampling field best_of, temprature; known are .*temperature"):
        SamplingParams.from_dict({"temprature": 1, "best_of": 2})


def test_sequences_become_tuples_and_top_k_minus_one_keeps_all() -> None:
    params = SamplingParams(stop="end", bad_words=["x"], stop_token_ids=[3, 3], allowed_token_ids=range(2), top_k=-1)
    assert params.stop == ("end",)
    assert params.bad_words == ("x",)
    assert params.stop_token_ids == (3, 3)
    assert params.allowed_token_ids == (0, 1)
    assert params.top_k == 0


def test_none_is_the_default_of_sequences() -> None:
    params = SamplingParams.from_dict({"stop": None, "stop_token_ids": None, "bad_words": None})
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert params == SamplingParams(stop=None, stop_token_ids=None, bad_words=None) == SamplingParams()


def test_iterators_are_read_whole() -> None:
    values: dict[str, Any] = {"stop": iter(["a", "b"]), "stop_token_ids": iter([1, 2]), "bad_words": iter(["c"])}
    params = SamplingParams(**values)
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("a", "b"), (1, 2), ("c",))


def test_params_are_frozen_and_keep_their_own_bias() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
    assert dataclasses.replace(params, top_k=3).logit_bias == {1: 2.0}


# Requests -------------------------------------------------------------------------------------------------------------


def test_known_tokens_are_prompt_and_output() -> None:
    request = make_request()
    assert (request.num_tokens, request.known_token_ids) == (3, (1, 2, 3))
    request.output_token_ids += [7, 8]
    assert (request.num_tokens, request.known_token_ids) == (5, (1, 2, 3, 7, 8))
    assert not request.is_finished
    request.status = RequestStatus.FINISHED
    assert request.is_finished


def test_requests_are_equal_only_to_themselves() -> None:
    first, second = make_request(), make_request()
    assert first != second
    assert len({first, second, first}) == 2


def test_timings_are_intervals_from_arrival() -> None:
    request = make_request(output_token_ids=[5, 6, 7], first_scheduled_time=11.0, first_token_time=12.0)
    request.last_token_time, request.worst_gap = 15.0, 2.5
    timings = request.timings(16.0)
    assert (timings.arrival, timings.queued, timings.ttft) == (10.0, 1.0, 2.0)
    assert (timings.tpot, timings.worst_gap, timings.e2e) == (1.5, 2.5, 6.0)


@pytest.mark.parametrize("output_token_ids", [[], [5]])
def test_tpot_needs_two_tokens(output_token_ids: list[int]) -> None:
    request = make_request(output_token_ids=output_token_ids, first_token_time=12.0, last_token_time=12.0)
    assert request.timings(13.0).tpot is None


def test_aborted_in_the_queue_has_only_an_end() -> None:
    timings = make_request().timings(10.5)
    assert (timings.queued, timings.ttft, timings.tpot, timings.worst_gap, timings.e2e) == (None,) * 4 + (0.5,)


def test_slo_is_judged_by_the_times_so_far() -> None:
    times: dict[str, Any] = {"output_token_ids": [1, 2], "first_token_time": 10.2, "last_token_time": 10.3}
    assert make_request(**times).is_slo_attained(11.0) is None
    assert make_request(slo=SLO(ttft=0.3, tpot=0.2), **times).is_slo_attained(11.0) is True
    assert make_request(slo=SLO(ttft=0.1), **times).is_slo_attained(11.0) is False
    assert make_request(slo=SLO(tpot=0.05), **times).is_slo_attained(11.0) is False
    assert make_request(slo=SLO(gap=0.2), worst_gap=0.1, **times).is_slo_attained(11.0) is True
    assert make_request(slo=SLO(gap=0.05), worst_gap=0.1, **times).is_slo_attained(11.0) is False


@pytest.mark.parametrize(
    ("counters", "num_steps", "is_in_order"),
    [
        ({}, 0, True),
        ({"num_computed_tokens": 2, "num_scheduled_tokens": 3}, 0, True),
        ({"num_scheduled_tokens": 4}, 1, True),
        ({"num_computed_tokens": 2, "num_scheduled_tokens": 1}, 0, False),
        ({"num_computed_tokens": -1}, 0, False),
        ({"num_scheduled_tokens": 4}, 0, False),
        ({"num_scheduled_tokens": 5}, 1, False),
    ],
)
def test_check_holds_the_counters_to_their_order(counters: dict[str, int], num_steps: int, is_in_order: bool) -> None:
    request = make_request(**counters)
    if is_in_order:
        request.check(num_steps)
    else:
        with pytest.raises(AssertionError):
            request.check(num_steps)
