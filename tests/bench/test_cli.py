"""The commands end to end: an engine and a server on the same load, the JSON that comes of it, and the pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semipd import CadencePolicy, build
from semipd.bench.cli import main
from semipd.bench.environment import _command
from tests.bench.server import Answer, Body, CompletionServer, complete

ENGINE = ["--engine", "load_format=dummy", "device=cpu", "kv_cache_tokens=4096"]
QUICK = [
    "--workloads",
    "lengths:8-24,4-8",
    "--warmup",
    "0.2",
    "--duration",
    "0.8",
    "--drain",
    "20",
    "--client-processes",
    "1",
]


@pytest.fixture(scope="module")
def results(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies and a server, at two rates."""
    path = tmp_path_factory.mktemp("results") / "both.json"
    with CompletionServer() as server:
        targets = ["--model", str(tiny_folder), *ENGINE, "--policies", "exclusive", "mixed:token_budget=32"]
        targets += ["--url", server.url, "--label", "other"]
        judgement = ["--slo", "0.5/100ms", "1/1", "--slo-scales", "0.5", "2"]
        assert main(["serve", *targets, *QUICK, *judgement, "--rates", "10", "20", "--json", str(path)]) == 0
    return path


def test_the_json_holds_every_run_and_where_it_comes_from(results: Path) -> None:
    read: dict[str, Any] = json.loads(results.read_text())
    assert [target["label"] for target in read["targets"]] == ["exclusive", "mixed:token_budget=32", "other"]
    assert [(run["target"], run["rate"]) for run in read["runs"]] == [
        (target, rate) for target in ("exclusive", "mixed:token_budget=32", "other") for rate in (10.0, 20.0)
    ]
    assert {"command", "commit", "cpu", "gpu", "python", "versions", "settings", "goodput"} <= set(read)
    assert str(results.parent) not in json.dumps(read), "paths of this machine are in the results"
    first, last = read["runs"][0], read["runs"][4]
    for name in ("due", "num_prompt_tokens"):
        assert first["requests"][name] == last["requests"][name], "the targets were offered different requests"
    for run in read["runs"]:
        assert run["statuses"]["ok"] == run["num_requests"] > 0
        assert run["num_requests"] == sum(run["requests"]["is_measured"])
        assert run["num_warmup_requests"] + run["num_requests"] == len(run["requests"]["due"])
        assert run["num_short_outputs"] == 0 and run["errors"] == {}
        assert len(run["attainment"]) == 2 * 3
        assert run["throughput"]["output_tokens"] > 0
    assert not list(results.parent.glob("*.part"))


def test_an_engine_has_the_policy_of_its_device_unless_told_otherwise(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "default.json"
    monkeypatch.setitem(build._DEFAULTS, "cpu", replace(build._DEFAULTS["cpu"], policy=CadencePolicy()))
    assert main(["serve", "--model", str(tiny_folder), *ENGINE, *QUICK, "--rates", "10", "--json", str(path)]) == 0
    read = json.loads(path.read_text())
    (target,) = read["targets"]
    assert (target["label"], target["policy"]) == ("cadence", repr(CadencePolicy()))
    assert [run["target"] for run in read["runs"]] == ["cadence"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_results_are_drawn(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    out = tmp_path / "plots"
    extra = ["--timelines"] if suffix == "png" else ["--rate", "10"]
    assert main(["plot", str(results), "--out", str(out), "--format", suffix, *extra]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(paths) == sorted(out.iterdir())
    assert len(paths) == (1 + 6 if suffix == "png" else 1)
    start = b"\x89PNG" if suffix == "png" else b"<?xml"
    assert all(path.read_bytes().startswith(start) for path in paths)


def test_several_files_are_drawn_together(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(results.read_bytes())
    assert main(["plot", str(results), str(copy), "--out", str(tmp_path), "--format", "svg"]) == 0
    (picture,) = tmp_path.glob("*.svg")
    assert picture.stat().st_size > 10_000


def test_goodput_is_searched_over_http(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "goodput.json"
    with CompletionServer() as server:
        arguments = ["--url", server.url, *QUICK, "--rates", "20", "--slo", "0.001ms/1", "1/1", "--max-runs", "1"]
        assert main(["serve", *arguments, "--goodput", "--json", str(path)]) == 0
    strict, loose = json.loads(path.read_text())["goodput"]
    assert strict["rate"] is None and strict["failed_rate"] == 10.0
    assert loose["rate"] == 40.0 and loose["failed_rate"] is None
    assert "goodput in req/s at 90% attainment" in capsys.readouterr().out


def test_errors_are_shown_and_fail_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with CompletionServer(lambda answer, _: answer.plain(429, "[busy]")) as server:
        assert main(["serve", "--url", server.url, *QUICK, "--rates", "10"]) == 1
    assert "x HTTP 429: [busy]" in capsys.readouterr().out


def test_outputs_that_came_out_short_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    async def stop_early(answer: Answer, body: Body) -> None:
        await complete(answer, {**body, "max_tokens": 2})

    with CompletionServer(stop_early) as server:
        assert main(["serve", "--url", server.url, *QUICK, "--rates", "10"]) == 0
    assert "outputs came out shorter than asked for" in capsys.readouterr().out


def test_a_target_that_cannot_start_costs_the_others_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.json"
    with CompletionServer() as server:
        urls = ["--url", "http://127.0.0.1:9/v1", server.url]
        assert main(["serve", *urls, *QUICK, "--rates", "10", "--json", str(path)]) == 2
    read = json.loads(path.read_text())
    assert len(read["runs"]) == 1
    assert [failure["target"] for failure in read["failures"]] == ["127.0.0.1:9"]
    said = capsys.readouterr().out
    assert "127.0.0.1:9 failed: ConfigError: no model at http://127.0.0.1:9/v1/models" in said and "worst gap" in said


def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("semipd.bench.http_target", "semipd.bench.http_client"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert main(["serve", "--url", "http://h", "--rates", "1"]) == 2
    assert "install it with: pip install 'semipd[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("engine_target, semipd.bench.report", {"httpx", "matplotlib", "torch"}),
        ("http_target, semipd.bench.report", {"matplotlib", "torch", "semipd.engine"}),
        ("plot", {"httpx", "torch", "rich"}),
    ],
)
def test_a_target_loads_only_what_it_needs(modules: str, unwanted: set[str]) -> None:
    code = f"import sys, semipd.bench.cli, semipd.bench.{modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure; give --model, --url, or both"),
        (["--url", "http://h", "--label", "a", "b"], "2 labels for 1 servers"),
        (["--url", "http://h", "--extra-body", "[]"], "expected a JSON object"),
        (["--url", "http://h", "--extra-body", "{"], "--extra-body is '{'"),
        (["--url", "http://h", "--api-key-env", "NO_SUCH_NAME"], "which is not set"),
        (["--model", "m", "--policies", "static", "static"], "static is there twice"),
        (["--model", "m", "--url", "http://h", "--label", "adaptive"], "adaptive is there twice"),
        (["--model", "m", "--engine", "device"], "--engine 'device'; expected NAME=VALUE"),
        (
            ["--model", "m", "--engine", "policy=mixed"],
            "--engine 'policy=mixed'; use --policies for the engine's policy",
        ),
        (
            ["--model", "m", "--policies", "static", "mixed", "--engine", "trace=t.jsonl"],
            "--engine trace=FILE with several policies, each of which would write it anew; give one",
        ),
        (["--model", "m", "--policies", "best"], "policy is 'best'; expected one of"),
        (["--model", "m", "--workloads", "trace:none.jsonl"], "the trace none.jsonl cannot be read"),
        (["--url", "http://h", "--json", "no/such/folder.json"], "is no folder"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--rates", "1", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "other"}', '{"benchmark": "serve", "runs": []}'])
def test_a_file_without_results_cannot_be_drawn(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    assert main(["plot", str(path)]) == 2
    assert "expected a file that serve --json wrote" in capsys.readouterr().err


def test_a_rate_that_was_not_run_cannot_be_drawn(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(results), "--rate", "7"]) == 2
    assert "no run of lengths:8-24,4-8 at 7 requests per second; there are [10.0, 20.0]" in capsys.readouterr().err


def test_the_command_is_recorded_without_folders() -> None:
    arguments = ["serve", "--model=/a/b/m.gguf", "--workloads", "trace:/a/t.jsonl", "--url", "http://h:1/v1", "--slo"]
    assert _command("semipd.bench", [*arguments, "0.5/25ms", "--json", "/a/r.json"]) == (
        "python -m semipd.bench serve --model=m.gguf --workloads trace:t.jsonl --url http://h:1/v1 --slo 0.5/25ms "
        "--json r.json"
    )
