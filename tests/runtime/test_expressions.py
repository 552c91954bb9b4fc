"""Arithmetic on signals and counters, and conditions."""

import math

import pytest

from tests.runtime.notation import (
    BATCH,
    LENGTH,
    NAN,
    TOKENS,
    UNITS,
    at,
    call,
    holds,
    name,
    number,
    percent,
    values,
)
from trainc.runtime.schedule.expressions import names_read
from trainc.runtime.schedule.schedules import compile_condition


def test_mathematics() -> None:
    found = values(["/", call("sqrt", number(16)), call("max", number(1), number(2))])
    assert found[0] == 2
    assert values(["/", number(1), number(0)])[0] == math.inf
    assert math.isnan(values(["/", number(0), number(0)])[0])
    assert math.isnan(values(call("min", number(1), name("x")), x=NAN)[0])
    assert math.isnan(values(call("min", name("x"), number(1)), x=NAN)[0])
    assert math.isnan(values(call("sqrt", number(-1)))[0])
    assert values(call("log", number(0)))[0] == -math.inf
    assert values(call("exp", number(1e6)))[0] == math.inf


def test_conditions_compare_and_combine() -> None:
    doubled = [">", name("gns"), ["*", number(2), name("batch")]]
    assert holds(doubled, gns=70, batch=32)
    assert not holds(doubled, gns=64, batch=32)
    assert holds([">=", number(1), number(1)])
    assert holds(["<=", number(1), number(1)])
    assert holds(["==", number(1), number(1)])
    assert holds(["or", ["<", number(2), number(1)], ["not", ["<", number(2), number(1)]]])
    assert not holds(["and", ["<", number(1), number(2)], ["<", number(2), number(1)]])


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
def test_a_comparison_with_nan_is_false(op: str) -> None:
    assert not holds([op, name("loss"), number(1)], loss=NAN)
    assert not holds([op, number(1), name("loss")], loss=NAN)


def test_is_nan_holds_for_nan_only() -> None:
    assert holds(["is", name("loss"), "nan"], loss=NAN)
    assert not holds(["is", name("loss"), "nan"], loss=math.inf)


def test_a_counter_is_compared_in_its_own_unit() -> None:
    late = [">", name("steps"), percent(50)]
    assert not holds(late, at(100))
    assert holds(late, at(101))
    assert holds([">=", name("tokens"), ["dur", 100 * BATCH, "samples"]], at(100))
    assert not holds([">=", name("tokens"), ["dur", 100 * BATCH, "samples"]], at(99))
    assert holds(["<", percent(50), name("progress")], at(101))
    # An epoch has 200 steps; the constant is the side that is converted.
    assert holds(["==", ["dur", 0.5, "epochs"], name("steps")], at(100))


def test_a_batch_is_bounded_in_samples_or_in_tokens() -> None:
    in_samples = call("min", ["*", number(2), name("batch")], ["dur", 50, "samples"])
    assert values(in_samples, batch=32)[0] == 50
    in_tokens = call("min", ["*", number(2), name("batch")], ["dur", 50 * TOKENS, "tokens"])
    assert values(in_tokens, batch=32)[0] == 50


def test_a_number_is_not_a_condition() -> None:
    with pytest.raises(ValueError, match="expected a condition such as"):
        compile_condition(number(1), UNITS, LENGTH)


def test_names_read_are_the_signals_of_an_expression() -> None:
    expression = [
        "and",
        [">", name("gns"), ["*", number(2), name("batch")]],
        ["<", name("steps"), 3],
    ]
    assert set(names_read(expression)) == {"gns", "batch"}
    assert set(names_read(call("linear", to=name("depth")))) == {"depth"}
