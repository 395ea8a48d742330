"""What scenarios show: who kept the targets, how long the worst request waited, and when the load was gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def scenario_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """One line a run; `runs` are those of results."""
    table = Table(title="scenarios: attainment of the first SLO, times in s", title_justify="left")
    for name in ("scenario", "target"):
        table.add_column(name)
    for name in (
        "req/s",
        "attained",
        "TTFT p99",
        "longest wait",
        "worst gap p90",
        "drained after",
        "never ended",
        "chosen changes of plan per step",
    ):
        table.add_column(name, justify="right")
    for run in runs:
        totals = run["engine"]["totals"]
        num_steps = totals["num_prefill_steps"] + totals["num_decode_steps"]
        num_chosen = totals["num_plan_changes"] - totals["num_forced_plan_changes"]
        num_unfinished = run["num_requests"] - run["statuses"]["ok"]
        table.add_row(
            run["workload"],
            run["target"],
            f"{run['rate']:.3g}",
            f"{run['attainment'][0]['attained']:.2f}",
            f"{run['ttft']['p99']:.2f}",
            f"{run['ttft']['max']:.2f}",
            f"{run['worst_gap']['p90']:.3f}" if run["worst_gap"] else "-",
            f"{run['drained']:.1f}",
            str(num_unfinished),
            f"{num_chosen / max(num_steps, 1):.3f}",
        )
    return table
