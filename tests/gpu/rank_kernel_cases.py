"""Launches of the kernels of several ranks, by one of them: what it would get from the others is there already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from semipd.kernels.gemm_signal import GemmSignalConfig, config_for, gemm_signal
from semipd.kernels.peer_all_reduce import EMPTY, PeerInboxes, PeerSumConfig, half_words, peer_add_norm
from semipd.kernels.stream_wait import stream_wait
from semipd.kernels.triton_util import is_hopper
from tests.kernels.contexts import DEVICE

BF16 = torch.bfloat16
PORTABLE = GemmSignalConfig(block_n=128, block_k=64, num_stages=3, band=8, uses_hopper=False)


def rank_cases() -> list[Callable[[], None]]:
    """Each may be launched again and again."""
    configs = [PORTABLE, *([GemmSignalConfig()] if is_hopper() else [])]
    return [
        *(partial(launch_gemm_signal, config, adds=adds) for config in configs for adds in (False, True)),
        launch_stream_wait,
        *(partial(launch_peer_sum, has_two_shots=has_two_shots) for has_two_shots in (False, True)),
    ]


def launch_gemm_signal(config: GemmSignalConfig, *, adds: bool) -> None:
    x, weight = (torch.randn(size, 136, device=DEVICE).to(BF16) for size in (200, 328))
    out = torch.randn(200, 328, device=DEVICE).to(BF16)
    assert not config.uses_hopper or config_for(x, weight, out).uses_hopper
    gemm_signal(
        x,
        weight,
        out,
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
        group_ends=(128, 200),
        num_sms=3,
        num_reserved=1,
        config=config,
        residual_TO=out if adds else None,
        bias_O=torch.randn(328, device=DEVICE).to(BF16) if adds else None,
    )


def launch_stream_wait() -> None:
    counter = torch.full((1,), 5, dtype=torch.int32, device=DEVICE)
    stream_wait(counter, 5, torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE != "cpu"), limit=1.0)


def launch_peer_sum(*, has_two_shots: bool) -> None:
    """Rank 0 of two. All of its inbox is full: of what it reads, and of what it leaves."""
    num_rows, dim = 5, 264
    num_words = half_words(num_rows, dim, BF16, 2)
    memory = torch.full((2, 2 * num_words), EMPTY, dtype=torch.int32, device=DEVICE)
    memory[0] = 1
    residual, partial_sums, out = (torch.randn(num_rows, dim, device=DEVICE).to(BF16) for _ in range(3))
    peer_add_norm(
        residual,
        partial_sums,
        torch.ones(dim, dtype=BF16, device=DEVICE),
        1e-5,
        out,
        PeerInboxes(
            rank=0,
            addresses_W=torch.tensor([row.data_ptr() for row in memory], device=DEVICE),
            half_words=num_words,
            stop=torch.zeros(1, dtype=torch.int32, pin_memory=DEVICE != "cpu"),
        ),
        half=1,
        num_ctas=2,
        config=PeerSumConfig(has_two_shots=has_two_shots, block_rows=2, num_sources=2),
    )
