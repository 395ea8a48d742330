"""From what happened to each request to the figures of a run.

TTFT is from when a request was due to its first token, so a send that the generator delayed counts against the result
and not for it. TPOT is (last - first) / (tokens - 1), ITL every gap between arrivals of tokens, the worst gap the
largest of a request. A request that failed, or was still running when the drain was over, attains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np

from semipd.bench.schedule import PlannedRequest, Window
from semipd.config import SLO
from semipd.errors import ConfigError

_UNITS = {"ms": 1e-3, "s": 1.0}


class Status(StrEnum):
    """How a request ended."""

    OK = "ok"
    REJECTED = "rejected"  # by a full queue, or HTTP 429 or 503
    ERROR = "error"
    UNFINISHED = "unfinished"  # when the drain was over


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What happened to a request; times are seconds from the start of the run.

    Attributes:
        request: what was planned.
        sent: when it was handed over.
        token_times: when tokens arrived; a server may send several at once.
        num_output_tokens: tokens that arrived.
        status: how it ended.
        error: what went wrong, if anything did.
        queued: time until the first step that computed any of it, where the target tells.
    """

    request: PlannedRequest
    sent: float
    token_times: Sequence[float]
    num_output_tokens: int
    status: Status
    error: str | None = None
    queued: float | None = None

    @property
    def late(self) -> float:
        """How long after its time it was sent."""
        return self.sent - self.request.due

    @property
    def ttft(self) -> float | None:
        """Due to first token; None without one."""
        return self.token_times[0] - self.request.due if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Mean time per token after the first; None below two tokens or two arrivals."""
        if self.num_output_tokens < 2 or len(self.token_times) < 2:  # all in one event has no time between tokens
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """The times between arrivals of tokens."""
        return [end - start for start, end in pairwise(self.token_times)]

    @property
    def worst_gap(self) -> float | None:
        """The largest gap; None below two arrivals."""
        return max(self.gaps, default=None)

    @property
    def e2e(self) -> float | None:
        """Due to last token; None unless it ended well."""
        return self.token_times[-1] - self.request.due if self.token_times and self.status is Status.OK else None

    def shifted(self, seconds: float) -> RequestRecord:
        """The same with all times moved by so many seconds.

        The time when it was due is rounded to a nanosecond: moved there and back it is what it was, and as before in a
        window that begins or ends just then.
        """
        return replace(
            self,
            request=replace(self.request, due=round(self.request.due + seconds, 9)),
            sent=self.sent + seconds,
            token_times=[time + seconds for time in self.token_times],
        )

    def attains(self, slo: SLO) -> bool:
        """Whether it ended well and within its targets."""
        return self.status is Status.OK and slo.is_attained(ttft=self.ttft, tpot=self.tpot, worst_gap=self.worst_gap)


def parse_slo(text: str) -> SLO:
    """Targets for TTFT, TPOT and maybe the worst gap, such as 0.5/25ms/50ms; seconds unless a unit (s, ms) is given.

    Raises:
        ConfigError: it is something else.
    """
    parts = text.split("/")
    values = [_parse_seconds(part) for part in parts]
    if len(parts) not in (2, 3) or not all(value is not None and 0 < value < float("inf") for value in values):
        raise ConfigError(
            f"the SLO is {text!r}; expected targets for TTFT and TPOT above 0, such as 0.5/25ms, and maybe one for the "
            "worst gap, such as 0.5/25ms/50ms"
        )
    return SLO(**dict(zip(("ttft", "tpot", "gap"), values, strict=False)))


def slo_label(slo: SLO) -> str:
    """The short form that `parse_slo` reads."""
    assert slo.ttft is not None and slo.tpot is not None
    gap = "" if slo.gap is None else f"/{1e3 * slo.gap:g}ms"
    return f"{slo.ttft:g}/{1e3 * slo.tpot:g}ms{gap}"


def scale_slo(slo: SLO, scale: float) -> SLO:
    """All targets times `scale`."""
    assert slo.ttft is not None and slo.tpot is not None
    return SLO(ttft=slo.ttft * scale, tpot=slo.tpot * scale, gap=None if slo.gap is None else slo.gap * scale)


def attainment(records: Sequence[RequestRecord], slo: SLO) -> float:
    """Share of the requests that meet `slo`; 0 if there are none."""
    return sum(record.attains(slo) for record in records) / len(records) if records else 0.0


def summarise(
    records: Sequence[RequestRecord],
    window: Window,
    slos: Sequence[SLO],
    scales: Sequence[float],
    *,
    beside: Sequence[RequestRecord] = (),
) -> dict[str, Any]:
    """The figures of a rate: of requests due inside the window, and of tokens that arrived inside it.

    Args:
        records: of the requests of this rate.
        window: in the same seconds as their times.
        slos: targets.
        scales: factors of them.
        beside: other requests of the same run, which count only in what the target did at the time.
    """
    measured = [record for record in records if window.holds(record.request.due)]
    errors = Counter(record.error for record in records if record.error is not None)
    return {
        "num_requests": len(measured),
        "num_warmup_requests": len(records) - len(measured),
        "statuses": {status.value: sum(record.status is status for record in measured) for status in Status},
        "num_short_outputs": sum(map(_is_short, measured)),
        "errors": dict(errors.most_common(10)),  # of the warm-up too
        "throughput": _throughput([*records, *beside], window),
        "num_running_at_end": sum(_is_running(record, window.end) for record in [*records, *beside]),
        "drained": max([0.0, *(record.token_times[-1] - window.end for record in records if record.token_times)]),
        "late": percentiles(record.late for record in measured),
        "ttft": percentiles(record.ttft for record in measured),
        "tpot": percentiles(record.tpot for record in measured),
        "itl": percentiles(gap for record in measured for gap in record.gaps),
        "worst_gap": percentiles(record.worst_gap for record in measured),
        "queued": percentiles(record.queued for record in measured),
        "e2e": percentiles(record.e2e for record in measured),
        "attainment": [
            {
                "slo": slo_label(slo),
                "scale": scale,
                "attained": attainment(measured, scale_slo(slo, scale)),
            }
            for slo in slos
            for scale in scales
        ],
    }


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 and maximum of those that are not None; None without any."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return None
    p50, p90, p99 = np.quantile(known, (0.5, 0.9, 0.99)).tolist()
    return {"mean": float(known.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(known.max())}


def columns(records: Sequence[RequestRecord], window: Window) -> Mapping[str, list[Any]]:
    """What plots need of each request, by column; times to 10 us."""
    return {
        "due": [_rounded(record.request.due) for record in records],
        "is_measured": [window.holds(record.request.due) for record in records],
        "late": [_rounded(record.late) for record in records],
        "queued": [_rounded(record.queued) for record in records],
        "ttft": [_rounded(record.ttft) for record in records],
        "tpot": [_rounded(record.tpot) for record in records],
        "worst_gap": [_rounded(record.worst_gap) for record in records],
        "e2e": [_rounded(record.e2e) for record in records],
        "num_prompt_tokens": [record.request.num_prompt_tokens for record in records],
        "num_output_tokens": [record.num_output_tokens for record in records],
        "status": [record.status.value for record in records],
    }


def _throughput(records: Sequence[RequestRecord], window: Window) -> dict[str, float]:
    """Per second of the window; a prompt counts when its first token arrives."""
    ended = sum(record.e2e is not None and window.holds(record.token_times[-1]) for record in records)
    prompts = sum(
        record.request.num_prompt_tokens
        for record in records
        if record.token_times and window.holds(record.token_times[0])
    )
    outputs = sum(  # tokens that came together count as one arrival each
        sum(map(window.holds, record.token_times)) * record.num_output_tokens / len(record.token_times)
        for record in records
        if record.token_times
    )
    return {
        "requests": ended / window.seconds,
        "prompt_tokens": prompts / window.seconds,
        "output_tokens": outputs / window.seconds,
    }


def _is_short(record: RequestRecord) -> bool:
    return record.status is Status.OK and record.num_output_tokens < record.request.num_output_tokens


def _is_running(record: RequestRecord, time: float) -> bool:
    """Whether it was sent and had not ended at `time`; a request that failed counts as ended with its last token."""
    if record.sent >= time:
        return False
    if record.status is Status.UNFINISHED:
        return True
    return bool(record.token_times) and record.token_times[-1] >= time


def _parse_seconds(text: str) -> float | None:
    number = text.strip()
    unit = next((unit for unit in _UNITS if number.endswith(unit)), "")
    try:
        return float(number.removesuffix(unit)) * _UNITS.get(unit, 1.0)
    except ValueError:
        return None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)
