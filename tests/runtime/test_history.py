"""Noise scales in the records of a run: each one's history, and the layers at its end."""

import math

from tests.runtime.noise_runs import NAN, figures, six_steps, step
from trainc.runtime.noise_scale.history import calibration_points
from trainc.runtime.noise_scale.pictures.layer_table import last_layers
from trainc.runtime.report.interval_curves import read_history
from trainc.runtime.report.run_records import choose_counter

ENDS = ("gns.low", "gns.high")


def test_undetermined_intervals_begin_at_the_step_before() -> None:
    found = read_history(six_steps(), "gns", ENDS, "tokens")
    assert found.positions == [800, 1600, 2400, 3200, 4000, 4800]
    assert found.undetermined() == [(800, 2400), (4000, 4800)]
    assert read_history(six_steps()[1:], "gns", ENDS, "tokens").undetermined()[0] == (0, 2400)
    assert found.bounded == [True] * 6
    empty = [step(1, figures("gns", 1.0)), step(2, figures("gns", 1.0, 0.0, math.inf))]
    assert read_history(empty, "gns", ENDS, "step").bounded == [False, False]


def test_a_run_is_drawn_over_tokens_samples_or_steps() -> None:
    evaluation = {"step": 2, "eval_loss": 1.0}
    assert choose_counter([step(1), step(2), evaluation]) == "tokens"
    assert choose_counter([step(1, tokens=1), step(2, tokens=1)]) == "samples"
    assert choose_counter([{"step": 1, "loss": 1.0}]) == "step"
    assert choose_counter([]) == "step"


def test_layers_at_the_end() -> None:
    a, b, c = last_layers(six_steps(), "gns")
    assert [layer.name for layer in (a, b, c)] == ["a", "b", "c"]
    assert (b.noise_scale, b.signal, b.noise) == (12.0, 2.0, 5.0)
    assert [layer.share for layer in (a, b, c)] == [0.3, 0.5, 0.2]
    assert [layer.undetermined for layer in (a, b, c)] == [0.5, 0.0, 1.0]
    assert math.isnan(a.noise_scale)
    assert last_layers([step(1)], "gns") == []
    bare = last_layers([step(1, series={"gns": {"a": 2.0}})], "gns")[0]
    assert bare.noise_scale == 2.0
    assert math.isnan(bare.share)


def test_calibrations_are_the_finite_pairs() -> None:
    pairs = [(1.0, 2.0), (NAN, 2.0), (3.0, 4.5)]
    records = [
        step(number, {"gns.point": x, "gns.point_total": y})
        for number, (x, y) in enumerate(pairs, 1)
    ]
    found = calibration_points([*records, step(4)], "gns", "tokens")
    assert found == [(800, 1.0, 2.0), (2400, 3.0, 4.5)]
