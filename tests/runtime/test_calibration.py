"""What norm layers say about the whole model: the lines, their errors, and when there are none."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainc.runtime.calibration import Calibration
from trainc.runtime.estimates import UNDETERMINED, Estimate, student

X = [10.0, 12.0, 9.0, 15.0, 20.0, 18.0]
Y = [17.0, 18.5, 15.0, 22.0, 33.0, 27.5]


def calibrated(xs: list[float], ys: list[float], decay: float = 0.0) -> Calibration:
    """Return a calibration that saw these noise scales, at signals of 1 and 2."""
    calibration = Calibration()
    for x, y in zip(xs, ys, strict=True):
        calibration.add(Estimate(1.0, x), Estimate(2.0, 2 * y), decay)
    return calibration


def test_the_lines_are_least_squares() -> None:
    calibration = calibrated(X, Y)
    x, y, n = np.array(X), np.array(Y), len(X)
    assert (calibration.points, calibration.independent) == (n, n)
    assert calibration.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)

    origin = calibration.through_origin(0.95)
    (slope,), (residual,), *_ = np.linalg.lstsq(x[:, None], y, rcond=None)
    error = math.sqrt(residual / (n - 1) / (x @ x))
    assert origin[:3] == pytest.approx((slope, 0.0, error), rel=1e-12)
    assert origin.high - origin.slope == pytest.approx(student(0.95, n - 1) * error, rel=1e-12)
    assert origin.slope - origin.low == pytest.approx(student(0.95, n - 1) * error, rel=1e-12)

    line = calibration.with_intercept(0.95)
    design = np.stack([x, np.ones(n)], 1)
    (slope, intercept), (residual,), *_ = np.linalg.lstsq(design, y, rcond=None)
    covariance = residual / (n - 2) * np.linalg.inv(design.T @ design)
    assert line[:3] == pytest.approx((slope, intercept, covariance[0, 0] ** 0.5), rel=1e-10)
    assert line.high - line.low == pytest.approx(2 * student(0.95, n - 2) * line.error, rel=1e-10)

    at = np.array([14.0, 1.0])
    reading = calibration.predict(14.0, level=0.95, intercept=True)
    doubt = math.sqrt(residual / (n - 2) + at @ covariance @ at)
    assert reading.scale == pytest.approx(slope * 14 + intercept, rel=1e-12)
    assert reading.high - reading.scale == pytest.approx(student(0.95, n - 2) * doubt, rel=1e-10)


def test_an_uncertain_norm_noise_scale_widens_the_prediction() -> None:
    calibration = calibrated(X, Y)
    slope, _, error, *_ = calibration.through_origin()
    x, y = np.array(X), np.array(Y)
    scatter = float(((y - slope * x) ** 2).sum()) / (len(X) - 1)
    for given_error in (0.0, 2.0):
        reading = calibration.predict(14.0, error=given_error)
        doubt = math.sqrt(scatter + (14 * error) ** 2 + (slope * given_error) ** 2)
        assert reading.scale == pytest.approx(14 * slope, rel=1e-12)
        width = reading.high - reading.low
        assert width == pytest.approx(2 * student(0.9, len(X) - 1) * doubt, rel=1e-10)
    assert calibration.predict(14.0, error=1e6).low == 0


def test_averages_make_the_points() -> None:
    calibration, decay = calibrated(X, Y, 0.5), 0.5
    assert calibration.norms.estimate == pytest.approx((1.0, calibration.norms.scale()))
    xs, ys = [], []
    for n in range(1, len(X) + 1):
        weights = decay ** np.arange(n)[::-1]
        weights /= weights.sum()
        xs.append(weights @ X[:n])
        ys.append(weights @ Y[:n])
    assert calibration.through_origin().slope == pytest.approx(
        np.dot(xs, ys) / np.dot(xs, xs), rel=1e-12
    )
    assert calibration.norms.scale() == pytest.approx(xs[-1], rel=1e-12)
    assert calibration.total.scale() == pytest.approx(ys[-1], rel=1e-12)


@given(st.lists(st.tuples(st.floats(0, 0.95), st.floats(-2, 3)), min_size=1, max_size=12))
def test_points_that_overlap_count_for_less(steps: list[tuple[float, float]]) -> None:
    """Two points have in common the product of the decays between them."""
    calibration, made = Calibration(), []
    for i, (decay, signal) in enumerate(steps):
        before = calibration.points
        calibration.add(Estimate(signal, 5.0), Estimate(1.0, 8.0), decay)
        made += [i] * (calibration.points - before)
    common = [
        math.prod(decay for decay, _ in steps[min(k, m) + 1 : max(k, m) + 1])
        for k in made
        for m in made
    ]
    expected = len(made) ** 2 / sum(common) if made else 0.0
    assert calibration.independent == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("decay", "count"), [(0.0, 12), (0.6, 30)])
def test_intervals_hold_the_true_slope_and_the_next_point(decay: float, count: int) -> None:
    """The truth is total = 1.6 norms; of all layers' estimates a Gaussian part is noise."""
    runs, level = 1500, 0.9
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn((runs, count + 1), generator=generator, dtype=torch.float64)
    xs = [10.0 + i % 5 for i in range(count)]
    slopes = lines = points = 0
    for row in noise.tolist():
        *ys, last = (1.6 * x + e for x, e in zip([*xs, 12.0], row, strict=True))
        calibration = calibrated(xs, ys, decay)
        for line in (calibration.through_origin(level), calibration.with_intercept(level)):
            assert line.low <= line.slope <= line.high
        slopes += calibration.through_origin(level).low <= 1.6 <= calibration.through_origin().high
        lines += calibration.with_intercept(level).low <= 1.6 <= calibration.with_intercept().high
        reading = calibration.predict(12.0, level)
        points += reading.low <= last <= reading.high
    margin = 4 * math.sqrt(level * (1 - level) / runs)
    if decay:  # the smoothed points scatter less than a single one and are dependent
        assert slopes / runs > level - margin
    else:
        for held in (slopes, lines, points):
            assert abs(held / runs - level) < margin


def test_before_two_points_it_is_undetermined_and_says_why() -> None:
    calibration = Calibration()
    assert calibration.predict(5.0).reason == "no calibration yet"
    calibration.add(Estimate(-0.5, 3.0), Estimate(1.0, 8.0), 0.9)
    calibration.add(UNDETERMINED, Estimate(1.0, 8.0), 0.9)
    calibration.add(Estimate(1.0, math.inf), Estimate(1.0, 8.0), 0.9)
    said = "in 0 of 3 calibrations both noise scales were determined, a slope needs two"
    assert calibration.predict(5.0).reason == said
    assert math.isnan(calibration.correlation)
    calibration.add(Estimate(30.0, 3.0), Estimate(1.0, 8.0), 0.9)
    assert calibration.points == 1
    assert all(map(math.isnan, calibration.through_origin()))
    assert all(map(math.isnan, calibration.with_intercept()))
    calibration.add(Estimate(2.0, 4.0), Estimate(1.0, 8.0), 0.9)
    found = calibration.predict(5.0)
    assert found.determined
    assert math.isfinite(found.scale)
    # Two points of averages over ten are hardly one independent point: nothing bounds the slope.
    assert (found.low, found.high) == (0.0, math.inf)
    line = calibration.through_origin()
    assert (line.low, line.high) == (-math.inf, math.inf)


def test_what_the_line_cannot_say() -> None:
    stood = calibrated([10.0, 10.0, 10.0], [16.0, 17.0, 15.0])
    assert stood.through_origin().slope == pytest.approx(1.6)
    assert math.isnan(stood.correlation)
    assert "never changed" in stood.predict(10.0, intercept=True).reason
    for norms in (math.nan, -1.0, 0.0, math.inf):
        reason = "the noise scale of the norm layers is undetermined"
        assert stood.predict(norms).reason == reason
    steep = calibrated([10.0, 11.0, 12.0], [1.0, 5.0, 9.0])
    assert steep.predict(5.0, intercept=True).reason == "the line gives -19 at 5"


def test_two_points_on_a_line_have_no_error_to_speak_of() -> None:
    calibration = calibrated([10.0, 20.0], [15.0, 30.0])
    assert calibration.correlation == pytest.approx(1.0)
    assert calibration.through_origin()[:3] == pytest.approx((1.5, 0.0, 0.0), abs=1e-9)
    # A line with an intercept passes through any two points: they tell nothing about its error.
    line = calibration.with_intercept()
    assert line[:2] == pytest.approx((1.5, 0.0), abs=1e-9)
    assert math.isnan(line.error)
    assert (line.low, line.high) == (-math.inf, math.inf)


@given(st.lists(st.tuples(st.floats(-1, 5), st.floats(0.1, 9)), max_size=6), st.floats(0, 0.99))
def test_it_continues_bit_for_bit(pairs: list[tuple[float, float]], decay: float) -> None:
    whole, resumed = Calibration(), Calibration()
    for signal, noise in pairs:
        for calibration in (whole, resumed):
            calibration.add(Estimate(signal, noise), Estimate(1.0, 3 * noise), decay)
        loaded = Calibration()
        loaded.load(json.loads(json.dumps(resumed.state())))
        resumed = loaded
    assert resumed.state() == whole.state()
    assert str(resumed.predict(3.0)) == str(whole.predict(3.0))
    with pytest.raises(ValueError, match=f"{Calibration.SIZE} numbers, not 3"):
        whole.load([1.0, 2.0, 3.0])
