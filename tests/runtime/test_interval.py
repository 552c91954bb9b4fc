"""Student's quantile against tables, and the interval of a ratio against its definition."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime import known
from trainc.runtime.noise_scale.estimate import UNDETERMINED, Estimate, Uncertainty
from trainc.runtime.noise_scale.interval import ratio_interval
from trainc.runtime.report.student_t import student_t_quantile


@pytest.mark.parametrize(
    ("level", "dof", "expected"),
    # Tables of Student's distribution, two-sided.
    [
        (0.9, 1, 6.314),
        (0.9, 2, 2.920),
        (0.95, 5, 2.571),
        (0.99, 10, 3.169),
        (0.9, 30, 1.697),
        (0.999, 30, 3.646),
        (0.95, 120, 1.980),
        (0.9, math.inf, 1.645),
    ],
)
def test_students_quantiles(level: float, dof: float, expected: float) -> None:
    assert student_t_quantile(level, dof) == pytest.approx(expected, abs=5e-4)


def test_students_quantile_is_smooth_between_its_two_forms_and_infinite_below_one_degree() -> None:
    values = [student_t_quantile(0.99, nu) for nu in (97, 98, 99, 100, 101)]
    steps = [a - b for a, b in pairwise(values)]
    assert max(steps) < 1.1 * min(steps)
    assert student_t_quantile(0.9, 2.9) == student_t_quantile(0.9, 2)
    assert math.isinf(student_t_quantile(0.9, 0.9))
    assert math.isinf(student_t_quantile(0.9, math.nan))
    for level in (0.0, 1.0, 90.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            student_t_quantile(level, 5)


@given(st.floats(-3, 3), st.floats(-3, 3), known.uncertainties())
def test_the_interval_holds_the_ratios_that_fieller_does_not_reject(
    signal: float, noise: float, uncertainty: Uncertainty
) -> None:
    low, high = ratio_interval(Estimate(signal, noise), uncertainty)
    assert 0 <= low <= high
    assert low < math.inf
    bound = student_t_quantile(0.9, uncertainty.dof)
    s, n = max(signal, 0.0), max(noise, 0.0)

    def rejected(ratio: float) -> float:
        """Return the distance from the rejection boundary, in the ratio's unit over its scale."""
        variance = (
            uncertainty.noise_variance
            - 2 * ratio * uncertainty.covariance
            + ratio**2 * uncertainty.signal_variance
        )
        size = abs(n) + ratio * abs(s) + 1e-3
        return (abs(n - ratio * s) - bound * math.sqrt(max(variance, 0.0))) / size

    if math.isinf(bound):
        assert (low, high) == (0, math.inf)
        return
    assert math.isinf(high) == (not s > bound * math.sqrt(uncertainty.signal_variance))
    for end in (low, high):
        if 0 < end < 1e4:
            assert abs(rejected(end)) < 1e-4
    if low > 0:
        assert rejected(low * 0.9) > -1e-9
    if high < 1e4:
        assert rejected(high * 1.1 + 1e-6) > -1e-9
    if s > 0 and n > 0:
        assert low <= n / s <= high or n / s == pytest.approx(low) or n / s == pytest.approx(high)


def test_an_exact_estimate_has_an_interval_without_width() -> None:
    exact = Uncertainty(0.0, 0.0, 0.0)
    assert ratio_interval(Estimate(2.0, 8.0), exact) == (4.0, 4.0)
    assert ratio_interval(Estimate(0.0, 8.0), exact) == (0.0, math.inf)
    assert ratio_interval(Estimate(0.0, 0.0), exact) == (0.0, math.inf)
    assert all(map(math.isnan, ratio_interval(UNDETERMINED, exact)))
