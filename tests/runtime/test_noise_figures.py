"""What records tell of noise scales: which there are, their stretches, layers, and the few characters of a line."""

import math

import pytest

from tests.runtime.noise_runs import NAN, figures, plan, six_steps, step
from trainc.runtime.noise_scale import figures as noise_figures
from trainc.runtime.noise_scale.figures import Clause, course, told, told_total


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (figures("g", 142.4, 98.2, 210.0), "142 [98.2, 210]"),
        (figures("g", 0.012345, 0.0, 3.0), "0.0123 [0, 3]"),
        (figures("g", 5e7, 1234.5, math.inf), "5e7 [1234, inf]"),
        # Nothing bounds it, or nothing can tell yet: an interval that says nothing is not shown as one.
        (figures("g", 7.0, 0.0, math.inf), "7 [?]"),
        (figures("g", 7.0), "7 [?]"),
        (figures("g", NAN, signal=NAN, noise=NAN), "? no estimate"),
        (figures("g", NAN, 98.0, math.inf, signal=-0.1), "? |G|^2 <= 0, > 98"),
        (figures("g", NAN, 0.0, math.inf, signal=-0.1), "? |G|^2 <= 0"),
        (figures("g", NAN, 0.0, 12.0, noise=-2.0), "? tr(Sigma) <= 0, < 12"),
        (figures("g", NAN, 40.0, 90.0), "? |G|^2 unsure, > 40"),
    ],
)
def test_a_scale_is_told_in_few_characters(found: dict[str, float], expected: str) -> None:
    assert told(found, "g") == expected


def test_the_whole_model_is_told_where_it_is_calibrated() -> None:
    found = figures("g", 5.0, 4.0, 6.0)
    assert told_total(found, "g") is None
    found |= {"g.total": NAN, "g.total_low": NAN, "g.total_high": NAN, "g.slope": NAN}
    assert told_total(found, "g") == "? no calibration"
    assert told_total({**found, "g.slope": 1.5}, "g") == "?"
    assert told_total({**found, "g.total_low": 0.0}, "g") == "? calibration unsure"
    assert told_total({**found, "g.total_low": 4.25}, "g") == "? calibration unsure, > 4.25"
    sure = {"g.slope": 1.5, "g.total": 7.5, "g.total_low": 6.0, "g.total_high": 9.0}
    assert told_total({**found, **sure}, "g") == "7.5 [6, 9]"


def test_clauses_are_those_of_the_plan_whatever_their_label() -> None:
    records = [step(1, figures("early", 1.0), figures("late", 2.0), {"norm": 3.0})]
    written = plan(
        ("observe", "norm", {}),
        ("noise_scale", "late", {"example": "document", "level": 0.95}),
        ("noise_scale", "early", {"example": "row", "level": 0.9}),
        ("noise_scale", "dropped", {}),
    )
    late, early = Clause("late", "documents", 0.95), Clause("early", "samples", 0.9)
    assert noise_figures.clauses(written, records) == [late, early]
    # Without a plan, as a loop of one's own may leave it, by what every noise scale is recorded with.
    assert noise_figures.clauses({}, records) == [Clause("early"), Clause("late")]
    assert noise_figures.clauses(plan(("observe", "norm", {})), [step(1, {"norm": 3.0})]) == []


def test_undetermined_stretches_reach_back_to_the_step_before() -> None:
    found = course(six_steps(), "gns", "tokens")
    assert found.at == [800, 1600, 2400, 3200, 4000, 4800]
    assert found.undetermined() == [(800, 2400), (4000, 4800)]
    assert course(six_steps()[1:], "gns", "tokens").undetermined()[0] == (0, 2400)
    assert found.bounded == [True] * 6
    empty = [step(1, figures("gns", 1.0)), step(2, figures("gns", 1.0, 0.0, math.inf))]
    assert course(empty, "gns", "step").bounded == [False, False]


def test_a_run_is_counted_in_tokens_samples_or_steps() -> None:
    evaluation = {"step": 2, "eval_loss": 1.0}
    assert noise_figures.counter([step(1), step(2), evaluation]) == "tokens"
    assert noise_figures.counter([step(1, tokens=1), step(2, tokens=1)]) == "samples"
    assert noise_figures.counter([{"step": 1, "loss": 1.0}]) == "step"
    assert noise_figures.counter([]) == "step"


def test_layers_at_the_end() -> None:
    a, b, c = noise_figures.layers(six_steps(), "gns")
    assert [layer.name for layer in (a, b, c)] == ["a", "b", "c"]
    assert (b.scale, b.signal, b.noise) == (12.0, 2.0, 5.0)
    assert [layer.share for layer in (a, b, c)] == [0.3, 0.5, 0.2]
    assert [layer.gaps for layer in (a, b, c)] == [0.5, 0.0, 1.0]
    assert math.isnan(a.scale)
    assert noise_figures.layers([step(1)], "gns") == []
    bare = noise_figures.layers([step(1, series={"gns": {"a": 2.0}})], "gns")[0]
    assert bare.scale == 2.0
    assert math.isnan(bare.share)


def test_calibrations_are_the_finite_pairs() -> None:
    pairs = [(1.0, 2.0), (NAN, 2.0), (3.0, 4.5)]
    records = [
        step(number, {"gns.point": x, "gns.point_total": y})
        for number, (x, y) in enumerate(pairs, 1)
    ]
    found = noise_figures.points([*records, step(4)], "gns", "tokens")
    assert found == [(800, 1.0, 2.0), (2400, 3.0, 4.5)]
