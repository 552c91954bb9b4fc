"""Policies of the batch size against their definitions, also after a resume."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.schedule.timeline import counters_under_ramp
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.batch_policy import BatchPolicy, Bounds, Follow, Ramp, SignalNoise
from trainc.runtime.step.machine import StepMachine
from trainc.runtime.step.record import Signals, Step

TOKENS = 8
Observed = Callable[[Clock], float]


def sizes(policy: BatchPolicy, steps: int, machine: StepMachine | None = None) -> list[int]:
    """Return the batch of each step of a machine that runs nothing but the policy."""
    if machine is None:
        machine = StepMachine([policy], Clock(), {}, Signals())
        machine.batch_size, machine.micro_size = policy.start, 1
    found = []
    for _ in range(steps):
        step: Step = machine.begin()
        step.samples, step.tokens = step.batch_size, TOKENS * step.batch_size
        found.append(step.batch_size)
        machine.finish()
    return found


def series(values: Sequence[float]) -> Observed:
    """Return a signal that has these values step by step, and the last one afterwards."""
    return lambda clock: values[min(clock.steps, len(values) - 1)]


def follow(signal: Observed, bounds: Bounds, grain: int, **options: object) -> Follow:
    return Follow("data", "follow(gns)", signal, bounds, grain, **options)  # type: ignore[arg-type]


# The ramp


def ramp(ends: tuple[int, int] = (16, 120), micro: int = 8, over: int = 10**6, at: int = 0) -> Ramp:
    begun = TimeSpan(at, "tokens") if at else None
    return Ramp("data", "ramp", ends, micro, TimeSpan(over, "tokens"), begun)


@given(st.integers(0, 2_219_950_080))
def test_the_ramp_is_the_published_one(tokens: int) -> None:
    """2 to 15 accumulation steps in ten points, linear in tokens between them, rounded up."""
    points = np.linspace(0, 2_219_950_080, 10)
    wanted = math.ceil(np.interp(tokens, points, np.linspace(2, 15, 10)) - 1e-9)
    clock = Clock(tokens=tokens)
    assert ramp(over=2_219_950_080).at(clock) == 8 * wanted


@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 10**6), st.integers(0, 10**6),
    st.integers(0, 3 * 10**6),
)  # fmt: skip
def test_a_ramp_rounds_up_and_stays_between_its_ends(
    first: int, last: int, over: int, begun: int, tokens: int
) -> None:
    made = ramp((8 * first, 8 * last), 8, over, begun)
    part = min(max((tokens - begun) / over, 0.0), 1.0)
    exact = first + (last - first) * part
    found = made.at(Clock(tokens=tokens))
    assert found % 8 == 0
    assert exact - 1e-6 <= found / 8 < exact + 1
    assert min(first, last) <= found / 8 <= max(first, last)


def test_ends_are_rounded_up_to_whole_micro_batches() -> None:
    made = ramp((10, 100), 16)
    assert made.start == 16
    assert made.at(Clock(tokens=10**6)) == 112


def test_a_ramp_may_fall() -> None:
    found = sizes(ramp((64, 16), 16, 20_000), 60)
    assert found[0] == 64
    assert found[-1] == 16
    assert found == sorted(found, reverse=True)


def test_counters_under_a_ramp_are_those_of_stepping_through_it() -> None:
    made, length = ramp(over=60_000), RunLength(100_000, "tokens")
    units = UnitConversion(16, TOKENS, 500)
    rows = counters_under_ramp(made.at, units, length, [i / 20 for i in range(21)])
    clock, expected, parts = Clock(samples_per_epoch=500), [], [i / 20 for i in range(21)]
    while parts:
        if clock.tokens >= parts[0] * 100_000:
            expected.append((clock.steps, clock.samples, clock.tokens, clock.epochs))
            parts.pop(0)
            continue
        batch = made.at(clock)
        clock.advance(batch, TOKENS * batch, 0.0)
    assert [(r["steps"], r["samples"], r["tokens"], r["epochs"]) for r in rows] == expected


def test_a_run_in_steps_has_its_tokens_counted_too() -> None:
    made = ramp(over=60_000)
    (row,) = counters_under_ramp(
        made.at, UnitConversion(16, TOKENS), RunLength(150, "steps"), [1.0]
    )
    assert row["samples"] == sum(sizes(made, 150))
    assert row["epochs"] is None


def test_a_run_in_seconds_has_an_unknown_number_of_steps() -> None:
    with pytest.raises(ValueError, match="cannot be converted to steps"):
        counters_under_ramp(ramp().at, UnitConversion(16, TOKENS), RunLength(60, "seconds"), [1.0])


# Following


def test_the_batch_follows_in_multiples_of_the_step() -> None:
    signal = series([math.nan, 40.0, 100.0, 300.0, 9e9, 1.0])
    found = sizes(follow(signal, Bounds(16, 128, 8), 16, factor=0.5), 6)
    assert found == [16, 16, 48, 128, 128, 16]


def test_noise_around_a_boundary_changes_nothing() -> None:
    """Wanted sizes 39 and 41 round to 32 and 48; neither is a whole step from 32."""
    signal = series([32.0, 41.0, 39.0, 41.0, 47.9, 48.0, 33.0, 32.0])
    assert sizes(follow(signal, Bounds(16, 128, 16), 16), 8) == [32] * 5 + [48, 48, 32]


@given(st.lists(st.floats(0, 1e4) | st.just(math.nan), min_size=1, max_size=40))
def test_every_size_is_inside_the_bounds_and_every_change_is_wanted(values: list[float]) -> None:
    bounds, grain = Bounds(24, 200, 8), 16
    found = sizes(follow(series(values), bounds, grain), len(values))
    present = 24
    for value, size in zip(values, found, strict=True):
        wanted = bounds.clip(value) if not math.isnan(value) else math.nan
        assert size % 8 == 0
        assert 24 <= size <= 200
        assert (size != present) == (abs(wanted - present) >= grain)
        if size != present:
            assert abs(size - wanted) <= grain / 2 or size in (24, 200)
        present = size


def test_it_changes_once_in_every() -> None:
    signal = series([16.0, 64.0, 16.0, 16.0, 16.0, 64.0])
    made = follow(signal, Bounds(16, 64, 16), 16, every=TimeSpan(3, "steps"))
    assert sizes(made, 8) == [16, 64, 64, 64, 16, 16, 16, 64]


def test_it_may_grow_only() -> None:
    signal = series([16.0, 64.0, 16.0, 128.0])
    assert sizes(follow(signal, Bounds(16, 128, 16), 16, grow_only=True), 5) == [
        16, 64, 64, 128, 128,
    ]  # fmt: skip


def test_infinite_noise_is_the_largest_batch() -> None:
    assert sizes(follow(series([math.inf]), Bounds(16, 64, 16), 16), 1) == [64]


# Signal and noise


def signal_noise(signal: Observed, gate: Gate | None = None) -> SignalNoise:
    return SignalNoise("data", "signal_noise", signal, Bounds(16, 512, 8), 0.6, gate or Gate())


@given(st.lists(st.floats(0, 1e4) | st.just(math.nan), min_size=1, max_size=40))
def test_the_rule_is_the_published_one_in_micro_batches(values: list[float]) -> None:
    found = sizes(signal_noise(series(values)), len(values))
    size = 16
    for value, batch in zip(values, found, strict=True):
        if not math.isnan(value):
            wanted = min(math.ceil(value / 0.36), 512)
            size = max(size, 8 * math.ceil(wanted / 8))
        assert batch == size


def test_it_reads_the_signal_when_its_gate_fires() -> None:
    gate = Gate(start=TimeSpan(4, "steps"), every=TimeSpan(3, "steps"))
    signal = series([36.0, 36.0, 36.0, 36.0, 3.6, 36.0, 36.0, 7.2 * 5, 72.0])
    assert sizes(signal_noise(signal, gate), 11) == [16] * 7 + [104] * 3 + [200]


# State


def policies() -> dict[str, BatchPolicy]:
    rng = np.random.default_rng(0)
    signal = series([math.nan, *rng.uniform(10, 300, 60).tolist()])
    gate = Gate(start=TimeSpan(5, "steps"), every=TimeSpan(4, "steps"))
    return {
        "ramp": ramp(over=20_000),
        "follow": follow(signal, Bounds(16, 256, 8), 16, every=TimeSpan(3000, "tokens")),
        "signal_noise": signal_noise(series([*range(5, 65)]), gate),
    }


@pytest.mark.parametrize("name", policies())
@pytest.mark.parametrize("left", [1, 7, 30])
def test_a_resumed_policy_decides_as_the_uninterrupted_one(name: str, left: int) -> None:
    def machine(policy: BatchPolicy) -> StepMachine:
        made = StepMachine([policy], Clock(), {}, Signals())
        made.batch_size, made.micro_size = policy.start, 1
        return made

    whole = policies()[name]
    expected = sizes(whole, 60)
    assert len(set(expected)) > 2
    first, second = policies()[name], policies()[name]
    before = machine(first)
    found = sizes(first, left, before)
    after = machine(second)
    after.load_state_dict(before.state_dict())
    assert found + sizes(second, 60 - left, after) == expected
    assert second.state_dict() == whole.state_dict()
    assert second.summary() == whole.summary()
