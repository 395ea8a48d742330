"""Times in turns: of a made-up device whose clock follows what it did."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest

from semipd.parallel.turns import Turn, time_in_turns

MS = 1e-3


class Device:
    """What computes makes it hot, and hot it computes slower."""

    def __init__(self) -> None:
        self.heat = 0.0
        self.seconds = 0.0
        self.launches: list[tuple[str, int]] = []

    def turn(self, name: str, seconds: float, load: float) -> Turn:
        def launch(repeats: int) -> Callable[[], float]:
            self.launches.append((name, repeats))
            total = 0.0
            for _ in range(repeats):
                once = seconds * (1 + 0.2 * self.heat)
                self.heat += (load - self.heat) * min(1.0, once / 0.02)
                total += once
            self.seconds += total
            return lambda: total

        return launch


def share(text: str) -> str:
    return text


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_meet_the_same_clock(order: Sequence[int]) -> None:
    device = Device()
    made = [device.turn("slow", 3.0 * MS, 1.0), device.turn("fast", 2.7 * MS, 1.0), device.turn("idle", 1 * MS, 0.0)]
    times = dict(zip(order, time_in_turns([made[i] for i in order], share, seconds=0.6), strict=True))
    assert times[1] / times[0] == pytest.approx(0.9, rel=0.02)
    assert device.seconds >= 0.6


def test_short_ones_are_repeated_and_long_ones_have_rounds() -> None:
    device = Device()
    times = time_in_turns([device.turn("short", 0.1 * MS, 0.0), device.turn("long", 50 * MS, 0.0)], share)
    assert times == pytest.approx([0.1 * MS, 50 * MS])
    _, _, *counted = device.launches
    assert {(name, repeats) for name, repeats in counted} == {("short", 40), ("long", 1)}
    assert len(counted) == 2 * 6  # 0.3 s and more


def test_all_ranks_launch_the_same() -> None:
    said: list[str] = []

    def say(text: str) -> str:
        said.append(text)
        return text

    first, other = Device(), Device()
    time_in_turns([first.turn("a", 1 * MS, 0.0), first.turn("b", 2 * MS, 0.0)], say, seconds=0.1)
    time_in_turns([other.turn("a", 5 * MS, 0.0), other.turn("b", 0.1 * MS, 0.0)], lambda text: said[0], seconds=9.0)
    assert first.launches == other.launches
    json.loads(said[0])
