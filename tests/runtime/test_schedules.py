"""Schedules: closed forms, `then`, and what is refused."""

import math
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.notation import (
    BATCH,
    LENGTH,
    TOKENS,
    UNITS,
    at,
    call,
    name,
    number,
    percent,
    steps,
    values,
)
from trainc.runtime.schedule.clock import Clock, RunLength
from trainc.runtime.schedule.schedules import compile_schedule
from trainc.runtime.schedule.time_span import Unit
from trainc.runtime.schedule.timeline import counters_at
from trainc.runtime.schedule.unit_conversion import UnitConversion

WARM_COSINE = ["then", call("warmup", percent(5)), call("cosine", to=percent(10))]


def test_a_number_is_the_constant_schedule() -> None:
    assert set(values(number(3e-4))) == {3e-4}
    assert set(values(0.5)) == {0.5}


def test_warmup_rises_to_one_and_stays() -> None:
    expected = [min(1.0, (t + 1) / 10) for t in range(200)]
    assert values(call("warmup", steps(10))) == pytest.approx(expected, abs=1e-15)
    assert values(call("warmup", steps(10)))[9] == 1.0


def test_warmup_can_rise_from_another_value() -> None:
    found = values(call("warmup", steps(10), from_=number(0.5)))
    assert found[:10] == pytest.approx([0.5 + 0.5 * (t + 1) / 10 for t in range(10)])


def test_a_warmup_of_length_zero_has_no_effect() -> None:
    assert set(values(call("warmup", steps(0)))) == {1.0}


def test_warmup_then_cosine_is_the_usual_schedule() -> None:
    found = values(["*", number(3e-4), WARM_COSINE])
    for t, value in enumerate(found):
        fall = 0.1 + 0.9 * (1 + math.cos(math.pi * (t - 10) / 190)) / 2
        factor = (t + 1) / 10 if t < 10 else fall
        assert value == pytest.approx(3e-4 * factor, rel=1e-12)
    assert found[9] == found[10] == 3e-4


def test_linear_and_cosine_end_at_their_value_and_stay() -> None:
    for shape in ("linear", "cosine", "exponential"):
        found = values(call(shape, to=number(0.25), over=steps(50)))
        assert found[0] == 1
        assert found[50:] == pytest.approx([0.25] * 150)
        assert all(a > b for a, b in pairwise(found[:51]))
    assert values(call("linear", number(0)))[100] == 0.5
    assert values(call("exponential", to=number(0.01)))[100] == pytest.approx(0.1)


def test_cubic_is_fast_at_first() -> None:
    found = values(call("cubic", to=number(0.2), over=steps(50)))
    assert found[:51] == pytest.approx(
        [0.2 + 0.8 * (1 - t / 50) ** 3 for t in range(51)], abs=1e-15
    )
    assert set(found[50:]) == {0.2}


def test_a_decay_can_begin_at_another_value() -> None:
    found = values(call("linear", to=number(0), from_=number(4)))
    assert found[0] == 4
    assert found[150] == pytest.approx(1)


def test_step_multiplies_at_points_of_the_run() -> None:
    drops = call("step", steps(30), percent(50), factor=number(0.1))
    found = values(["then", call("warmup", steps(10)), drops])
    assert found[29] == 1
    assert found[30] == found[99] == 0.1
    assert found[100] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "points",
    [["list", [steps(30), steps(60)]], ["list", steps(30), steps(60)], [steps(30), steps(60)]],
)
def test_points_may_come_as_a_list(points: Any) -> None:
    expected = values(call("step", steps(30), steps(60), factor=number(0.5)))
    assert values(call("step", at=points, factor=number(0.5))) == expected


def test_wsd_rises_stays_and_falls() -> None:
    found = values(call("wsd", warmup=steps(10), decay=percent(20), to=number(0)))
    assert found[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert set(found[10:161]) == {1.0}
    assert found[180] == pytest.approx(0.5)
    root = values(call("wsd", warmup=steps(10), decay=percent(20), shape=name("sqrt")))
    assert root[170] == pytest.approx(1 - math.sqrt(0.25))


def test_inverse_sqrt_is_the_transformer_rule() -> None:
    found = values(["then", call("warmup", steps(50)), call("inverse_sqrt", steps(50))])
    assert found[150] == pytest.approx(math.sqrt(50 / 150))


def test_then_joins_more_than_two_with_either_grouping() -> None:
    a = call("warmup", steps(10))
    b = call("constant", over=steps(100))
    c = call("linear", to=number(0))
    left, right = values(["then", ["then", a, b], c]), values(["then", a, ["then", b, c]])
    assert left == right
    assert left[109] == 1
    assert left[155] == pytest.approx(0.5)


def test_a_scaled_schedule_ends_where_the_schedule_ends() -> None:
    scaled = ["then", ["*", number(2), call("warmup", steps(10))], ["*", number(2), call("cosine")]]
    assert values(scaled) == values(
        ["*", number(2), ["then", call("warmup", steps(10)), call("cosine")]]
    )


def test_depth_and_blocks_come_from_the_values() -> None:
    falling = ["*", number(1.2), ["-", number(1), name("depth")]]
    assert values(falling, depth=0.25)[0] == pytest.approx(0.9)
    deep = call("linear", to=name("depth"))
    assert values(deep, depth=0.5)[100] == 0.75


def test_a_name_without_a_value_is_named() -> None:
    with pytest.raises(ValueError, match="`detph` has no value here: write one of depth"):
        values(name("detph"), depth=0.0)


# Units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length",
    [
        LENGTH,
        RunLength(200 * BATCH, "samples"),
        RunLength(200 * BATCH * TOKENS, "tokens"),
        RunLength(1, "epochs"),
    ],
)
@pytest.mark.parametrize("unit", ["run", "steps", "samples", "tokens", "epochs"])
@pytest.mark.parametrize("shape", ["cosine", "linear", "step", "wsd", "inverse_sqrt"])
def test_a_schedule_does_not_depend_on_its_units(length: RunLength, unit: Unit, shape: str) -> None:
    def part(fraction: float) -> list[Any]:
        return ["dur", UNITS.convert(LENGTH, unit, LENGTH) * fraction, unit]

    pieces = {
        "cosine": call("cosine", to=number(0.1)),
        "linear": call("linear", to=number(0.1), over=part(0.5)),
        "step": call("step", part(0.35), part(0.7), factor=number(0.5)),
        "wsd": call("wsd", warmup=part(0.05), decay=part(0.3)),
        "inverse_sqrt": call("inverse_sqrt", part(0.1)),
    }
    schedule = ["then", call("warmup", part(0.1)), pieces[shape]]
    reference = {
        "cosine": call("cosine", to=number(0.1)),
        "linear": call("linear", to=number(0.1), over=steps(100)),
        "step": call("step", steps(70), steps(140), factor=number(0.5)),
        "wsd": call("wsd", warmup=steps(10), decay=steps(60)),
        "inverse_sqrt": call("inverse_sqrt", steps(20)),
    }
    expected = values(["then", call("warmup", steps(20)), reference[shape]])
    assert values(schedule, length) == pytest.approx(expected, rel=1e-12)


@given(
    warm=st.integers(1, 100),
    to=st.floats(0, 1),
    shape=st.sampled_from(["cosine", "linear"]),
    unit=st.sampled_from(["samples", "tokens", "steps"]),
)
def test_a_decay_begins_where_the_warmup_ends(warm: int, to: float, shape: str, unit: Unit) -> None:
    length = RunLength(UNITS.convert(LENGTH, unit), unit)
    schedule = compile_schedule(
        ["then", call("warmup", steps(warm)), call(shape, to=number(to))], UNITS, length
    )
    found = [schedule(at(step), {}) for step in range(201)]
    # Continuous: no step changes it by more than the steepest slope of its pieces.
    slope = max(1 / warm, (1 - to) * math.pi / 2 / (200 - warm)) + 1e-12
    assert all(abs(b - a) <= slope for a, b in pairwise(found))
    assert found[warm - 1] == found[warm] == 1
    assert found[200] == pytest.approx(to, abs=1e-12)


def test_a_schedule_in_tokens_holds_when_the_batch_changes() -> None:
    length = RunLength(200 * BATCH * TOKENS, "tokens")
    schedule = compile_schedule(call("linear", to=number(0)), UNITS, length)
    assert schedule(at(50, batch=2 * BATCH), {}) == schedule(at(100), {}) == 0.5


def test_a_schedule_of_a_timed_run_reads_the_seconds() -> None:
    schedule = compile_schedule(WARM_COSINE, UNITS, RunLength(100, "seconds"))
    assert schedule(Clock(seconds=2.5), {}) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="the time of a step is unknown"):
        compile_schedule(call("warmup", steps(5)), UNITS, RunLength(100, "seconds"))


def test_counters_are_known_in_all_units_before_the_run() -> None:
    assert counters_at(UNITS, LENGTH, 0.05) == {
        "steps": 10,
        "samples": 320,
        "tokens": 40960,
        "epochs": 0.05,
        "seconds": None,
    }
    schedule = compile_schedule(["*", number(3e-4), WARM_COSINE], UNITS, LENGTH)
    assert schedule(at(10), {}) == pytest.approx(3e-4)
    assert schedule(at(200), {}) == pytest.approx(3e-5)


def test_counters_of_a_run_without_a_known_batch_have_blanks() -> None:
    length = RunLength(1000, "samples")
    counters = counters_at(UnitConversion(), length, 0.5)
    assert counters["steps"] is None
    assert counters["samples"] == 500
    schedule = compile_schedule(call("linear", to=number(0)), UnitConversion(), length)
    assert schedule(Clock(samples=500), {}) == 0.5


# What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        (call("cosien"), "there is no function `cosien`"),
        (call("warmup"), "`warmup` needs `over`"),
        (call("warmup", number(100)), "expected a duration such as"),
        (call("warmup", steps(1), steps(2)), "takes one argument without a name, not 2"),
        (call("wsd", steps(1), steps(2)), "takes no argument without a name, not 2"),
        (call("cosine", too=number(1)), "has no argument `too`: the arguments are to, over, from"),
        (call("cosine", number(1), to=number(1)), "is given `to` twice"),
        (call("cosine", to=steps(10)), "expected a number such as"),
        (call("linear", over=steps(0)), "give it a longer `over`"),
        (call("wsd", warmup=percent(60), decay=percent(50)), "its decay begins at 100 steps"),
        (
            call("wsd", warmup=steps(1), decay=steps(1), shape=name("cubic")),
            "is `cubic`: use one of linear",
        ),
        (call("step", steps(500), factor=number(0.1)), "`step` at 500 steps has no effect"),
        (call("step", steps(60), steps(30), factor=number(0.1)), "expected rising points"),
        (["then", call("constant"), call("cosine")], "never ends in a run of 200 steps"),
        (["then", call("cosine"), call("cosine")], "right side is never reached"),
        (["then", call("warmup", steps(300)), call("cosine")], "ends at 300 steps"),
        (["then", number(1), call("cosine")], "has no end"),
        (["then", ["*", 3e-4, call("warmup", percent(5))], call("cosine")], "binds tighter"),
        (["<", number(1), number(2)], "expected a schedule, found a condition"),
        (["+", ["<", number(1), number(2)], number(1)], "expected a number, found a condition"),
        (["sometimes", 1, 2, 3], "is not an expression"),
        (["is", number(1), "odd"], "`is odd` is not a condition"),
        (call("sqrt", number(1), number(2)), "takes one number"),
        (call("exponential", to=number(0)), "expected a number above zero"),
    ],
)
def test_an_impossible_schedule_is_refused_with_a_sentence(expression: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        values(expression)


def test_time_and_schedules_load_without_torch() -> None:
    code = (
        "import sys, trainc.runtime.schedule.clock, trainc.runtime.schedule.schedules; "
        "import trainc.runtime.run.live_display; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
