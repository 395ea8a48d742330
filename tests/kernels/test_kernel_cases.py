"""What compute-sanitizer watches on a GPU: that the cases run, that no kernel is left out, that reports are counted."""

from __future__ import annotations

from collections import Counter

import pytest

from semipd.kernels.triton_util import is_interpreted
from tests.gpu.kernel_cases import all_cases, counting_launches, kernel_names
from tests.gpu.sanitize import PLANTED, reports

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="tests/gpu runs them on a GPU")

LOG = f"""\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at _rms_norm_kernel+0x120
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f0000000400 is out of bounds
=========
========= Invalid __global__ write of size 4 bytes
=========     at {PLANTED}+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Program hit cudaErrorInvalidValue (error 1) on CUDA API call to cudaFoo.
=========     Saved host backtrace up to driver entry point
=========
========= ERROR SUMMARY: 3 errors
launched of the program itself
"""


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # numpy's, where a kernel divides what it masks
def test_every_kernel_that_the_interpreter_has_is_launched() -> None:
    num_run: Counter[object] = Counter()
    with counting_launches() as counts:
        for case in all_cases():
            function = getattr(case, "func", case)
            if num_run[function] < 2:  # the others are of kernels that were launched, and take their time here
                num_run[function] += 1
                case()
    assert set(kernel_names()) - counts.keys() == {
        "gemm_signal_hopper._gemm_signal_hopper_kernel",
        "prefill_attention_hopper._prefill_attention_hopper_kernel",
        "stream_k_gemm_hopper._stream_k_gemm_kernel",
        "stream_wait._wait_kernel",  # assembly
    }


def test_reports_are_counted_by_kernel() -> None:
    found = reports(LOG)
    assert found["_rms_norm_kernel"] == 1
    assert found[PLANTED] == 1
    assert sum(found.values()) == 3
