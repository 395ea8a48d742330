"""Figures against timelines made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from semipd.bench.metrics import (
    RequestRecord,
    Status,
    attainment,
    columns,
    parse_slo,
    percentiles,
    scale_slo,
    slo_label,
    summarise,
)
from semipd.bench.schedule import PlannedRequest, Window
from semipd.config import SLO
from semipd.errors import ConfigError


def make_record(
    due: float,
    times: Sequence[float],
    *,
    sent: float | None = None,
    tokens: int | None = None,
    status: Status = Status.OK,
    error: str | None = None,
    wanted: int | None = None,
) -> RequestRecord:
    num_tokens = len(times) if tokens is None else tokens
    return RequestRecord(
        request=PlannedRequest(index=0, due=due, num_prompt_tokens=100, num_output_tokens=wanted or num_tokens or 1),
        sent=due if sent is None else sent,
        token_times=times,
        num_output_tokens=num_tokens,
        status=status,
        error=error,
    )


def test_a_timeline_gives_its_latencies() -> None:
    record = make_record(1.0, (1.5, 1.6, 2.0, 2.1), sent=1.2)
    assert record.late == pytest.approx(0.2)
    assert record.ttft == pytest.approx(0.5), "from when it was due, not from when it was sent"
    assert record.tpot == pytest.approx(0.2)
    assert record.gaps == pytest.approx([0.1, 0.4, 0.1])
    assert record.worst_gap == pytest.approx(0.4)
    assert record.e2e == pytest.approx(1.1)


def test_one_token_has_a_ttft_and_no_more() -> None:
    record = make_record(0.0, (0.25,))
    assert (record.ttft, record.tpot, record.worst_gap, record.gaps) == (0.25, None, None, [])
    assert record.attains(SLO(ttft=0.3, tpot=0.001))


def test_no_token_has_nothing_and_attains_nothing() -> None:
    record = make_record(0.0, (), status=Status.ERROR, error="gone")
    assert (record.ttft, record.tpot, record.worst_gap, record.e2e) == (None, None, None, None)
    assert not record.attains(SLO(ttft=9.0, tpot=9.0))


def test_tokens_that_come_together_count_each() -> None:
    record = make_record(0.0, (0.1, 0.5, 0.9), tokens=9)
    assert record.tpot == pytest.approx(0.1)
    assert record.worst_gap == pytest.approx(0.4)


@pytest.mark.parametrize("status", [Status.REJECTED, Status.ERROR, Status.UNFINISHED])
def test_a_request_that_did_not_end_well_attains_nothing(status: Status) -> None:
    assert make_record(0.0, (0.1, 0.2)).attains(SLO(ttft=1.0, tpot=1.0))
    assert not make_record(0.0, (0.1, 0.2), status=status).attains(SLO(ttft=1.0, tpot=1.0))


def test_attainment_needs_both_targets() -> None:
    records = [
        make_record(0.0, (0.4, 0.42)),
        make_record(0.0, (0.6, 0.62)),  # late first token
        make_record(0.0, (0.4, 0.45)),  # slow
        make_record(0.0, (0.1,), status=Status.UNFINISHED),
    ]
    assert attainment(records, SLO(ttft=0.5, tpot=0.025)) == 0.25
    assert attainment(records, SLO(ttft=1.0, tpot=0.05)) == pytest.approx(0.75)
    assert attainment([], SLO(ttft=1.0)) == 0


def test_a_summary_measures_the_window_and_counts_every_error() -> None:
    window = Window(start=10.0, end=20.0)
    records = [
        make_record(5.0, (), status=Status.ERROR, error="boom"),  # warm-up
        make_record(9.0, (11.0, 12.0)),  # warm-up, whose tokens arrive inside
        make_record(10.0, (10.5, 11.5)),
        make_record(12.0, (12.5, 25.0), wanted=5),
        make_record(19.0, (), status=Status.REJECTED, error="HTTP 429: busy"),
        make_record(19.5, (), status=Status.REJECTED, error="HTTP 429: busy"),
        make_record(19.9, (20.5,), status=Status.UNFINISHED, sent=19.95),
    ]
    summary = summarise(records, window, [parse_slo("1/1"), parse_slo("1/10s")], [0.1, 1.0])
    assert (summary["num_requests"], summary["num_warmup_requests"]) == (5, 2)
    assert summary["statuses"] == {"ok": 2, "rejected": 2, "error": 0, "unfinished": 1}
    assert summary["errors"] == {"HTTP 429: busy": 2, "boom": 1}
    assert summary["num_short_outputs"] == 1
    assert summary["throughput"] == pytest.approx({"requests": 0.2, "prompt_tokens": 30.0, "output_tokens": 0.5})
    assert summary["num_running_at_end"] == 2
    assert summary["drained"] == pytest.approx(5.0)
    assert summary["late"]["max"] == pytest.approx(0.05)
    assert summary["ttft"]["p50"] == pytest.approx(0.5)
    assert summary["itl"]["max"] == pytest.approx(12.5)
    attained = {(entry["slo"], entry["scale"]): entry["attained"] for entry in summary["attainment"]}
    assert attained == {("1/1000ms", 0.1): 0, ("1/1000ms", 1.0): 0.2, ("1/10000ms", 0.1): 0, ("1/10000ms", 1.0): 0.2}
    table = columns(records, window)
    assert {len(column) for column in table.values()} == {7}
    assert table["is_measured"] == [False, False, True, True, True, True, True]
    assert table["ttft"][:3] == [None, 2.0, 0.5]


def test_percentiles_leave_out_what_is_missing() -> None:
    values = percentiles([None, *(value / 100 for value in range(101))])
    assert values == pytest.approx({"mean": 0.5, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0})
    assert percentiles([None]) is None


@pytest.mark.parametrize(
    ("text", "ttft", "tpot"),
    [("0.5/25ms", 0.5, 0.025), ("300ms/15ms", 0.3, 0.015), ("2/0.1", 2.0, 0.1), ("1s/50 ms", 1.0, 0.05)],
)
def test_targets_are_read(text: str, ttft: float, tpot: float) -> None:
    slo = parse_slo(text)
    assert (slo.ttft, slo.tpot) == pytest.approx((ttft, tpot))
    assert parse_slo(slo_label(slo)) == slo
    scaled = scale_slo(slo, 2.0)
    assert (scaled.ttft, scaled.tpot) == pytest.approx((2 * ttft, 2 * tpot))


def test_a_third_target_is_for_the_worst_gap() -> None:
    slo = parse_slo("0.5/25ms/0.05")
    assert slo == SLO(ttft=0.5, tpot=0.025, gap=0.05)
    assert slo_label(slo) == "0.5/25ms/50ms"
    assert scale_slo(slo, 2.0).gap == 0.1


@pytest.mark.parametrize("text", ["", "0.5", "0.5/", "fast/25ms", "0/25ms", "nan/1", "0.5/25ms/", "0.5/25ms/3/4"])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected targets for TTFT and TPOT above 0, such as 0.5/25ms"):
        parse_slo(text)


def test_tokens_that_came_at_once_or_not_at_all_have_no_tpot() -> None:
    assert make_record(0.0, (0.1,), tokens=5).tpot is None
    assert make_record(0.0, (), tokens=5).tpot is None
