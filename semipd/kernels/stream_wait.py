"""A wait of a stream for a counter in the GPU's memory: one thread that looks again and again.

The wait has an end: a flag that any thread of the host may set, also while the kernel runs, and a time limit. A wait
that reaches its limit sets the flag by itself, so all later waits pass at once and the host can see it. What runs
behind a wait that was released so computes on what is not there yet; whoever set the flag, or finds it set, throws it
away.

The driver's own wait for a value (`cuStreamWaitValue32`) cannot be released, and on an H200 it lagged 5 us behind the
counter where this kernel lags 1.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from semipd.kernels.triton_util import is_interpreted, launch

_LOOKS_PER_FLAG = 64  # at the counter for each at the flag, which is read over PCIe


def stream_wait(counter: Tensor, target: int, flag: Tensor, *, limit: float) -> None:
    """Has the current stream wait until `counter` is at least `target`, or `flag` is not 0.

    What was written before the counter was raised, with release semantics and for the whole GPU, is visible behind it;
    so is what another GPU wrote. A counter that reached its target is 0 again afterwards.

    Args:
        counter: int32, one element on the device, that nobody raises further.
        flag: int32, one element, in pinned memory of the host.
        limit: seconds after which the wait gives up and sets `flag` to 1.
    """
    assert counter.dtype == flag.dtype == torch.int32 and counter.numel() == flag.numel() == 1
    if is_interpreted():
        launch(_interpreted_wait_kernel, (1,))(counter, target, flag, round(limit * 1e6), num_warps=1)
    else:
        launch(_wait_kernel, (1,))(counter, target, flag, round(limit * 1e9), LOOKS=_LOOKS_PER_FLAG, num_warps=1)


@triton.jit(do_not_specialize=["target", "limit"])
def _wait_kernel(
    counter_ptr: tl.tensor, target: tl.tensor, flag_ptr: tl.tensor, limit: tl.tensor, LOOKS: tl.constexpr
) -> None:
    tl.inline_asm_elementwise(
        """{
        .reg .pred is_done, is_early;
        .reg .u64 start, now;
        .reg .s32 value, look;
        mov.u64 start, %globaltimer;
        again:
        mov.s32 look, $5;
        look_again:
        ld.acquire.sys.global.s32 value, [$1];
        setp.ge.s32 is_done, value, $2;
        @is_done bra met;
        nanosleep.u32 64;
        sub.s32 look, look, 1;
        setp.gt.s32 is_early, look, 0;
        @is_early bra look_again;
        ld.relaxed.sys.global.s32 value, [$3];
        setp.ne.s32 is_done, value, 0;
        @is_done bra done;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, start;
        setp.lt.u64 is_early, now, $4;
        @is_early bra again;
        mov.s32 value, 1;
        st.relaxed.sys.global.s32 [$3], value;
        bra done;
        met:
        mov.s32 value, 0;
        st.relaxed.sys.global.s32 [$1], value;
        done:
        mov.u32 $0, 0;
        }""",
        "=r,l,r,l,l,r",
        [counter_ptr, target, flag_ptr, limit.to(tl.int64), LOOKS],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _interpreted_wait_kernel(counter_ptr: tl.tensor, target: int, flag_ptr: tl.tensor, limit: int) -> None:
    """The same with a count of looks for a limit, since the interpreter knows neither the assembler nor clocks."""
    looks = 0
    is_met = tl.atomic_add(counter_ptr, 0, sem="acquire") >= target
    is_released = is_met & False
    while (looks < limit) & (is_met == 0) & (is_released == 0):
        is_met = tl.atomic_add(counter_ptr, 0, sem="acquire") >= target
        is_released = tl.atomic_add(flag_ptr, 0) != 0
        looks += 1
    if is_met:
        tl.store(counter_ptr, 0)
    elif is_released == 0:
        tl.store(flag_ptr, 1)
