"""The timer takes callables in turns and says how much its samples differ; the tests bring clocks of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from ldmq_kernels import timing
from ldmq_kernels.timing import Samples, interleaved

CPU = torch.device("cpu")


class FakeTime:
    """A CPU's clock that only calls move on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def now(self) -> float:
        return self.seconds

    def call_of(self, *milliseconds: float) -> Callable[[], None]:
        """A call that takes so long the first time, the second time ..., and from then on as long as the last."""

        def call() -> None:
            self.seconds += milliseconds[min(self.calls, len(milliseconds) - 1)] * 1e-3
            self.calls += 1

        return call


def test_percentiles_lie_between_the_samples() -> None:
    samples = Samples((6.0, 1.0, 2.0, 3.0, 4.0, 5.0))
    assert (samples.p20, samples.median, samples.p80, samples.least) == (2.0, 3.5, 5.0, 1.0)
    assert samples.noise == pytest.approx(1.5 / 3.5)
    assert Samples((7.0,)).p80 == 7.0


def test_equal_samples_have_no_noise_and_a_single_outlier_makes_none() -> None:
    assert Samples((2.0,) * 9).noise == 0
    assert Samples((*(2.0,) * 9, 50.0)).noise == 0


def test_each_round_begins_with_the_next_callable_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    times = iter(range(100))

    def clock(call: Callable[[], None], _: torch.device) -> float:
        call()
        return float(next(times))

    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = interleaved(calls, CPU, rounds=3, warm_up=1, clock=clock)
    assert "".join(order) == "abcbcacababc"
    assert found == {
        "a": Samples((5.0, 7.0, 9.0)),
        "b": Samples((3.0, 8.0, 10.0)),
        "c": Samples((4.0, 6.0, 11.0)),
    }
    assert list(found) == list("abc")


def test_a_context_is_entered_around_its_own_callable_and_outside_the_time() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def forced() -> Iterator[None]:
        events.append("enter")
        yield
        events.append("leave")

    def clock(call: Callable[[], None], _: torch.device) -> float:
        events.append("start")
        call()
        events.append("stop")
        return 1.0

    calls = {name: lambda name=name: events.append(name) for name in ("free", "tile")}
    interleaved(calls, CPU, rounds=1, warm_up=0, clock=clock, contexts={"tile": forced})
    assert events == ["start", "free", "stop", "enter", "start", "tile", "stop", "leave"]


def test_nothing_to_time_gives_nothing() -> None:
    assert interleaved({}, CPU) == {}


def test_a_short_call_is_repeated_after_a_first_one_that_does_not_count() -> None:
    clock = FakeTime()
    taken = timing.warm_ms(clock.call_of(0.5, 0.1), CPU, clock.now)
    assert taken == pytest.approx(0.1)
    assert clock.calls == 1 + round(timing.SAMPLE_MS / 0.5)


def test_a_long_call_runs_once() -> None:
    clock = FakeTime()
    assert timing.warm_ms(clock.call_of(300.0), CPU, clock.now) == pytest.approx(300.0)
    assert clock.calls == 1


def test_a_call_that_takes_no_time_at_all_ends() -> None:
    clock = FakeTime()
    assert timing.warm_ms(clock.call_of(0.0), CPU, clock.now) == 0
    assert clock.calls == 10_001


def test_a_cold_call_runs_once_after_a_buffer_was_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = FakeTime(), []
    real = torch.empty

    def empty(size: int, **settings: object) -> torch.Tensor:
        written.append(size)
        assert clock.calls == 0
        return real(1, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "empty", empty)
    assert timing.cold_ms(clock.call_of(0.25), CPU, clock.now) == pytest.approx(0.25)
    assert (written, clock.calls) == ([timing.FLUSHED_BYTES], 1)


def test_the_usual_clock_of_a_cpu_is_the_warm_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "warm_ms", lambda *_: 4.0)
    assert interleaved({"call": lambda: None}, CPU, rounds=2)["call"].milliseconds == (4.0, 4.0)


def test_the_wall_clock_counts_one_call() -> None:
    clock = FakeTime()
    assert timing.wall_ms(clock.call_of(1.5), CPU, clock.now) == pytest.approx(1.5)
    assert clock.calls == 1
