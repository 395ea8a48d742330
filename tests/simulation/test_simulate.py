"""The command: results like those of the serving benchmark, and they are drawn by its plots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.simulate import main
from semipd.bench.plot import draw


def test_results_have_the_form_of_the_serving_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    command = "--policies static mixed:token_budget=256 --rates 8 --duration 4 --warmup 1 --slo 0.5/25ms"
    assert main([*command.split(), "--workloads", "lengths:100-800,20", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["benchmark"] == "serve" and "benchmarks.simulate" in results["command"]
    assert [target["label"] for target in results["targets"]] == ["static", "mixed:token_budget=256"]
    for run in results["runs"]:
        assert run["statuses"]["ok"] == run["num_requests"] > 10
        assert run["throughput"]["output_tokens"] > 0 and run["late"]["max"] == 0.0
        samples = run["engine"]["samples"]
        assert set(samples["plan"]) <= {"exclusive", "split", "mixed", None} and max(samples["num_decoding"]) > 0
        assert run["engine"]["totals"]["num_decode_steps"] > 0
        assert len(run["engine"]["decisions"]["time"]) == run["engine"]["totals"]["num_plan_changes"] + 1
    assert len(list(draw([path], tmp_path, "png", has_timelines=True))) == 3
    again = tmp_path / "again.json"
    assert main([*command.split(), "--workloads", "lengths:100-800,20", "--json", str(again)]) == 0
    assert json.loads(again.read_text())["runs"] == results["runs"]


def test_goodput_of_a_fleet(tmp_path: Path) -> None:
    path, picture = tmp_path / "fleet.json", tmp_path / "fleet.png"
    command = "--policies exclusive --fleet 1 2 8 --routers random shortest --rates 30 --duration 3 --warmup 1"
    command += " --workloads lengths:100-2000,4 --slo 0.2/50ms --largest-simulated 2 --precision 0.3 --max-runs 4"
    assert main([*command.split(), "--json", str(path), "--plot", str(picture)]) == 0
    results = json.loads(path.read_text())
    kinds = {(row["engines"], row["engine"]) for row in results["rows"]}
    assert kinds == {(1, "scheduler"), (2, "scheduler"), (1, "model"), (2, "model"), (8, "model")}
    assert all(row["goodput_per_engine"] > 5 for row in results["rows"])
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--policies nothing --rates 1", "policy is 'nothing'"),
        ("--engine noise --rates 1", "expected NAME=VALUE with one of num_sms"),
        ("--policies static mixed --fleet 2 --rates 1", "one policy"),
        ("--workloads sharegpt", "needs --rates"),
    ],
)
def test_wrong_arguments_are_said(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scenarios bursts --staircase", "--scenarios takes no --staircase"),
        ("--fleet 1 --staircase", "--fleet takes one policy, no --slo-scales and no --staircase"),
    ],
)
def test_what_runs_at_one_rate_takes_no_staircase(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--workloads", "lengths:10,5", "--rates", "2", "3", *options.split()]) == 2
    assert message in capsys.readouterr().err
