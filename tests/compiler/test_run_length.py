"""Which schedules need to know how long the run is."""

import pytest

import trainc
from trainc.compiler.lower.lowering_context import depends_on_run_length
from trainc.dsl.values.value_json import to_json


@pytest.mark.parametrize(
    ("schedule", "depends"),
    [
        ("0.1", False),
        ("cosine()", True),
        ("cosine(to = 10%)", True),
        ("cosine(over = 50%)", True),
        ("cosine(over = 5 steps)", False),
        ("cosine(10%, over = 5 steps)", False),
        ("linear(from = 80%, to = 20%, over = 3 steps)", False),
        ("constant(10%, over = 3 steps) then cubic(over = 3 steps)", False),
        ("constant(10%, over = 3%) then cubic(over = 3 steps)", True),
        ("linear(to = cosine(), over = 3 steps)", True),
        ("step([10%, 50%], factor = 0.1)", True),
        ("step([10 steps, 50 steps], factor = 10%)", False),
        ("0.1 * min(0.5, sqrt(2))", False),
    ],
)
def test_percentages_that_are_numbers_are_no_part_of_the_run(schedule: str, depends: bool) -> None:
    spec = trainc.check(f"regularize l2_sp on all {{ weight = {schedule} }}").spec
    assert spec is not None
    construct = spec.clauses[0].construct
    assert depends_on_run_length(to_json(construct.weight)) == depends  # type: ignore[attr-defined]
