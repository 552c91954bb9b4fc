"""The clock, conversions between its units, and gates."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan, Unit
from trainc.runtime.schedule.unit_conversion import UnitConversion

UNITS = UnitConversion(samples_per_step=32, tokens_per_sample=128, samples_per_epoch=3200)
LENGTH = RunLength(2000, "steps")


def clocks(batches: list[int], epoch: int = 100) -> list[Clock]:
    """Return the clock before each step, and after the last."""
    clock = Clock(samples_per_epoch=epoch)
    seen = []
    for batch in [*batches, 0]:
        seen.append(Clock(samples_per_epoch=epoch))
        seen[-1].load_state_dict(json.loads(json.dumps(clock.state_dict())))
        clock.advance(samples=batch, tokens=batch * 8, seconds=0.5)
    return seen


def fired(gate: Gate, batches: list[int]) -> list[int]:
    """Return the steps at which a gate is due."""
    return [clock.steps for clock in clocks(batches) if gate.fires(clock)]


def test_the_clock_has_five_counters() -> None:
    clock = Clock(samples_per_epoch=64)
    clock.advance(samples=32, tokens=320, seconds=0.25)
    clock.advance(samples=16, tokens=160, seconds=0.25)
    assert clock.counters() == {
        "steps": 2,
        "samples": 48,
        "tokens": 480,
        "epochs": 0.75,
        "seconds": 0.5,
    }


def test_replicas_that_share_the_data_read_an_epoch_together() -> None:
    units = UnitConversion(samples_per_step=4, samples_per_epoch=101, replicas=3)
    assert units.convert(TimeSpan(3, "epochs"), "samples") == 101
    assert units.convert(TimeSpan(1, "steps"), "epochs") == pytest.approx(12 / 101, rel=1e-15)
    clock, length, ends = units.clock(), RunLength(6, "epochs"), 0
    while not length.done(clock):
        clock.advance(samples=4, tokens=4, seconds=0.1)
        ends += 1
    assert ends == -(-202 // 4)  # each reads two thirds of 303 samples
    assert clock.epochs == 4 * ends * 3 / 101
    assert clock.before is not None
    assert clock.before.epochs == 4 * (ends - 1) * 3 / 101
    assert Gate(every=TimeSpan(1, "epochs")).fires(clock)


def test_its_state_is_json_and_restores_the_clock_one_step_ago_too() -> None:
    clock = clocks([3, 4, 5])[-1]
    copy = Clock(samples_per_epoch=100)
    copy.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    assert copy == clock
    assert copy.before == clock.before
    assert copy.before is not None
    assert copy.before.samples == 7


@pytest.mark.parametrize(
    ("amount", "unit", "wanted", "expected"),
    [
        (100, "steps", "samples", 3200),
        (100, "steps", "tokens", 409600),
        (100, "steps", "epochs", 1),
        (1, "epochs", "steps", 100),
        (4096, "tokens", "samples", 32),
        (0.05, "run", "steps", 100),
        (0.07, "run", "steps", 140),
        (0.5, "run", "epochs", 10),
        (500, "steps", "run", 0.25),
        (7, "seconds", "seconds", 7),
    ],
)
def test_durations_convert(amount: float, unit: Unit, wanted: Unit, expected: float) -> None:
    assert UNITS.convert(TimeSpan(amount, unit), wanted, LENGTH) == expected


def test_a_fraction_of_the_run_is_a_whole_number_of_steps_where_it_should_be() -> None:
    length = RunLength(100, "steps")
    assert 0.07 * 100 != 7
    assert UNITS.convert(TimeSpan(0.07, "run"), "steps", length) == 7


@pytest.mark.parametrize(
    ("units", "unit", "wanted", "missing"),
    [
        (UnitConversion(), "steps", "samples", "the batch size is unknown"),
        (UnitConversion(samples_per_step=2), "steps", "tokens", "tokens per sample"),
        (UnitConversion(samples_per_step=2), "epochs", "steps", "samples per epoch"),
        (UNITS, "seconds", "steps", "the time of a step"),
        (UNITS, "run", "steps", "the run has no length"),
    ],
)
def test_what_cannot_be_converted_says_what_is_missing(
    units: UnitConversion, unit: Unit, wanted: Unit, missing: str
) -> None:
    with pytest.raises(ValueError, match=missing):
        units.convert(TimeSpan(1, unit), wanted)


@pytest.mark.parametrize("amount", [-1, float("nan"), float("inf")])
def test_a_duration_is_finite_and_not_negative(amount: float) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        TimeSpan(amount, "steps")


def test_epochs_cannot_be_read_without_their_size() -> None:
    with pytest.raises(ValueError, match="samples per epoch"):
        Clock().read("epochs")


def test_progress_ends_at_one() -> None:
    length = RunLength(1, "epochs")
    seen = clocks([40, 40, 40], epoch=100)
    assert [length.progress(clock) for clock in seen] == [0, 0.4, 0.8, 1]
    assert [length.done(clock) for clock in seen] == [False, False, False, True]


def test_a_gate_in_steps_fires_at_the_start_and_every_n() -> None:
    assert fired(Gate(every=TimeSpan(3, "steps")), [1] * 9) == [0, 3, 6, 9]


def test_a_gate_counts_from_its_start_and_ends_before_its_stop() -> None:
    gate = Gate(TimeSpan(2, "steps"), TimeSpan(8, "steps"), TimeSpan(3, "steps"))
    assert fired(gate, [1] * 12) == [2, 5]


def test_a_gate_without_bounds_always_fires() -> None:
    assert fired(Gate(), [1] * 3) == [0, 1, 2, 3]


def test_a_gate_in_samples_fires_when_a_multiple_is_crossed() -> None:
    # Samples before each step: 0 4 8 12 32 52 54
    assert fired(Gate(every=TimeSpan(10, "samples")), [4, 4, 4, 20, 20, 2]) == [0, 3, 4, 5]


def test_a_gate_in_fractions_of_an_epoch_fires_on_the_step_of_the_multiple() -> None:
    # 0.1 epochs are 10 samples; 0.3 / 0.1 is below 3 in floating point.
    assert fired(Gate(every=TimeSpan(0.1, "epochs")), [5] * 8) == [0, 2, 4, 6, 8]


def test_a_gate_with_a_start_in_another_unit_fires_at_the_start() -> None:
    units = UnitConversion(samples_per_step=10, samples_per_epoch=100)
    gate = Gate.resolve(units, None, TimeSpan(0.5, "epochs"), None, TimeSpan(2, "steps"))
    assert fired(gate, [10] * 9) == [5, 7, 9]


def test_a_gate_needs_its_fractions_resolved() -> None:
    with pytest.raises(ValueError, match=r"Gate\.resolve"):
        Gate(every=TimeSpan(0.1, "run"))
    gate = Gate.resolve(UNITS, LENGTH, TimeSpan(0.1, "run"), None, TimeSpan(0.05, "run"))
    assert gate == Gate(TimeSpan(200, "steps"), None, TimeSpan(100, "steps"))


@given(
    batches=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    start=st.integers(0, 200),
    every=st.integers(1, 120),
)
def test_a_gate_fires_once_for_all_multiples_a_step_crosses(
    batches: list[int], start: int, every: int
) -> None:
    gate = Gate(TimeSpan(start, "samples"), None, TimeSpan(every, "samples"))
    seen = clocks(batches)
    expected = [0] if start == 0 else []
    for earlier, later in pairwise(seen):
        if any(
            (mark - start) % every == 0
            for mark in range(max(start, earlier.samples + 1), later.samples + 1)
        ):
            expected.append(later.steps)
    assert [clock.steps for clock in seen if gate.fires(clock)] == expected
