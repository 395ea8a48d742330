"""The runners: what their steps tell the decoder. Their tokens are judged where they run in an engine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from semipd import Engine, SamplingParams
from semipd.config import Phase
from semipd.device.cpu import CpuPartitionBackend
from semipd.errors import RankError
from semipd.memory.kv_cache import KVCache
from semipd.model.cuda_sampler import CudaSampler
from semipd.model.decoder import Decoder
from semipd.model.families import parse_config
from semipd.model.gpu_runner import _NO_WORK, GpuRunner
from semipd.model.step_inputs import Buckets
from tests.fakes import EagerGraphs
from tests.tiny import save_tiny_model, tiny_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def test_steps_say_whose_lane_they_run_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[tuple[int, Phase]] = []
    forward = Decoder.forward

    def noting(self: Decoder, token_ids_T: Tensor, plan: Any, context: Any) -> Tensor:
        steps.append((len(token_ids_T), context.phase))
        return forward(self, token_ids_T, plan, context)

    save_tiny_model(tmp_path, "llama")
    monkeypatch.setattr(Decoder, "forward", noting)
    with Engine(str(tmp_path), device="cpu", policy="exclusive", kv_cache_tokens=256) as engine:
        engine.generate([list(range(5))], SamplingParams(max_tokens=3, ignore_eos=True))
    assert steps == [(5, Phase.PREFILL), (1, Phase.DECODE), (1, Phase.DECODE)]


class Peers:
    """Sums over ranks that gave up."""

    max_rows = 4
    is_closed, is_late = False, False

    def add_norm(self, *args: Any, **options: Any) -> Tensor:
        raise AssertionError("the launches of these steps are replaced")

    def check(self) -> None:
        if self.is_late:
            raise RankError("a sum over the ranks waited for too long")

    def close(self) -> None:
        self.is_closed = True


def test_steps_of_the_gpu_runner_do_too_and_fail_with_the_sums_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = Peers()
    spec, device = parse_config(tiny_config("llama").to_dict()), torch.device("cpu")
    layout = spec.kv_layout(4)
    with closing(CpuPartitionBackend()) as backend:
        runner = GpuRunner(
            decoder=cast("Decoder", None),
            sampler=CudaSampler(max_slots=2, vocab_size=spec.vocab_size, device=device),
            kv_cache=KVCache(layout=layout, num_blocks=1, block_size=16, dtype=torch.float32, device=device),
            backend=backend,
            graphs=EagerGraphs(),
            buckets={phase: Buckets(2, 8) for phase in Phase},
            num_heads=spec.num_heads,
            max_slots=2,
            max_model_len=16,
            device=device,
            peers={Phase.DECODE: peers},
            check=peers.check,
            on_close=peers.close,
        )
        for phase in Phase:
            context = runner._context(runner._lanes[phase], 3)
            assert context.phase is phase and context.peers is (peers if phase is Phase.DECODE else None)
        for name in ("_stage", "_launch_prompt_logprobs"):
            monkeypatch.setattr(runner, name, lambda *args: {})
        monkeypatch.setattr(runner, "_body", lambda *args: (None, lambda: None))
        monkeypatch.setattr(runner, "_launch_sampling", lambda *args: lambda: ([], None))
        batches = {phase: replace(_NO_WORK, phase=phase) for phase in Phase}
        reads = {phase: runner._launch(batch, runner.choose_shape(batch)) for phase, batch in batches.items()}
        assert reads[Phase.PREFILL]().token_ids == []
        peers.is_late = True
        with pytest.raises(RankError, match="waited for too long"):
            reads[Phase.DECODE]()
        runner.close()
        assert peers.is_closed
