"""Many requests: what they leave behind, and many threads that submit, read and leave at once."""

from __future__ import annotations

import gc
import random
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from semipd import FinishReason, SamplingParams
from semipd.request import Request
from tests.fakes import expected_text, make_engine, wait_until, wait_until_idle


def test_twenty_thousand_short_requests_leave_nothing_behind() -> None:
    def live() -> int:
        gc.collect()
        return sum(type(thing) is Request for thing in gc.get_objects())

    params = SamplingParams(temperature=0.0, max_tokens=2)
    with make_engine(max_num_seqs=32) as engine:
        engine.generate([[1, 2, 3]] * 100, params)
        before = live()
        num_objects = len(gc.get_objects())
        for _ in range(10):
            engine.generate([[1, index % 97, 3] for index in range(2000)], params)
        wait_until(lambda: live() <= before + 32)  # the last decode batch may still be known
        assert len(gc.get_objects()) < num_objects + 1000
        assert engine._core.outbox.empty()
        wait_until_idle(engine)


@pytest.mark.parametrize("caching", [True, False])
def test_threads_that_submit_read_and_leave_at_once(caching: bool) -> None:
    """What is read is always right, and in the end nothing is held."""
    stop_at = time.monotonic() + 1.0

    def user(seed: int) -> int:
        rng = random.Random(seed)
        num_finished = 0
        while time.monotonic() < stop_at:
            prompt = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 40)))
            params = SamplingParams(
                temperature=1.0, max_tokens=rng.randrange(1, 40), n=rng.randrange(1, 3), priority=rng.randrange(3)
            )
            stream = engine.stream(prompt, params, wait=True)
            for _ in range(rng.randrange(4)):
                if next(iter(stream), None) is None:
                    break
            match rng.randrange(4):
                case 0:
                    stream.abort()
                case 1:
                    engine.abort(stream.request_id)
                case 2:
                    del stream
                    continue
            for output in stream.result(30).outputs:
                assert output.text == expected_text(prompt, len(output.token_ids))
                if output.finish_reason is FinishReason.LENGTH:
                    assert len(output.token_ids) == params.max_tokens
                    num_finished += 1
        return num_finished

    options: dict[str, Any] = {"num_blocks": 60, "max_num_seqs": 6, "max_queued_requests": 4, "max_model_len": 100}
    with make_engine(enable_prefix_caching=caching, **options) as engine, ThreadPoolExecutor(8) as pool:
        users = [pool.submit(user, seed) for seed in range(8)]
        while wait(users, timeout=0.01).not_done:
            engine.check_integrity()
        assert sum(one.result() for one in users) > 0
        wait_until_idle(engine)
        assert not engine._delivery._decodings and not engine._delivery._backlog
