"""Noise scales in a few characters."""

import math

import pytest

from tests.runtime.noise_runs import NAN, figures
from trainc.runtime.noise_scale.format import format_noise_scale, format_whole_model


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (figures("g", 142.4, 98.2, 210.0), "142 [98.2, 210]"),
        (figures("g", 0.012345, 0.0, 3.0), "0.0123 [0, 3]"),
        (figures("g", 5e7, 1234.5, math.inf), "5e7 [1234, inf]"),
        # An interval without a bound, or unknown.
        (figures("g", 7.0, 0.0, math.inf), "7 [?]"),
        (figures("g", 7.0), "7 [?]"),
        (figures("g", NAN, signal=NAN, noise=NAN), "? no estimate"),
        (figures("g", NAN, 98.0, math.inf, signal=-0.1), "? |G|^2 <= 0, > 98"),
        (figures("g", NAN, 0.0, math.inf, signal=-0.1), "? |G|^2 <= 0"),
        (figures("g", NAN, 0.0, 12.0, noise=-2.0), "? tr(Sigma) <= 0, < 12"),
        (figures("g", NAN, 40.0, 90.0), "? |G|^2 uncertain, > 40"),
    ],
)
def test_a_noise_scale_in_few_characters(found: dict[str, float], expected: str) -> None:
    assert format_noise_scale(found, "g") == expected


def test_the_whole_model_is_shown_where_it_is_calibrated() -> None:
    found = figures("g", 5.0, 4.0, 6.0)
    assert format_whole_model(found, "g") is None
    found |= {"g.total": NAN, "g.total_low": NAN, "g.total_high": NAN, "g.slope": NAN}
    assert format_whole_model(found, "g") == "? no calibration"
    assert format_whole_model({**found, "g.slope": 1.5}, "g") == "?"
    assert format_whole_model({**found, "g.total_low": 0.0}, "g") == "? calibration uncertain"
    assert (
        format_whole_model({**found, "g.total_low": 4.25}, "g") == "? calibration uncertain, > 4.25"
    )
    sure = {"g.slope": 1.5, "g.total": 7.5, "g.total_low": 6.0, "g.total_high": 9.0}
    assert format_whole_model({**found, **sure}, "g") == "7.5 [6, 9]"
