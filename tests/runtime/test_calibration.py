"""Calibration: slopes, their errors against simulated runs, and when they are undetermined."""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.calibrated_runs import NORMS, REST, Outcome, Squares, simulate
from trainc.runtime.noise_scale.calibration import Calibration
from trainc.runtime.noise_scale.estimate import UNDETERMINED, Estimate
from trainc.runtime.report.student_t import student_t_quantile

Row = tuple[float, float, float, float]


def calibrated(rows: Sequence[Row], decay: float = 0.9) -> Calibration:
    """Return a calibration that saw |G|^2 and tr(Sigma) of the norms and of all layers."""
    calibration = Calibration()
    for row in rows:
        calibration.add(Estimate(*row[:2]), Estimate(*row[2:]), decay)
    return calibration


def some_rows(count: int, seed: int = 0) -> list[Row]:
    made = np.random.default_rng(seed).normal([1.0, 20.0, 4.0, 130.0], [0.3, 2, 0.9, 6], (count, 4))
    return [tuple(row) for row in made.tolist()]


def test_the_slope_is_the_quotient_of_weighted_least_squares_slopes_of_either_part() -> None:
    rows = np.array(some_rows(9))
    weights = 0.8 ** np.arange(9)[::-1]
    found = calibrated(some_rows(9), 0.8)
    # Through the origin with weights a / x: sum a y / sum a x.
    signal, noise = (
        np.linalg.lstsq(
            (np.sqrt(weights / rows[:, i]) * rows[:, i])[:, None],
            np.sqrt(weights / rows[:, i]) * rows[:, i + 2],
            rcond=None,
        )[0][0]
        for i in (0, 1)
    )
    assert found.slope().value == pytest.approx(noise / signal, rel=1e-12)
    assert found.predict(7.0).value == pytest.approx(7 * noise / signal, rel=1e-12)
    scales = found.whole_model.noise_scale() / found.measured.noise_scale()
    assert found.slope().value == pytest.approx(scales, rel=1e-12)
    assert found.count == 9
    assert found.effective_count == pytest.approx(
        weights.sum() ** 2 / (weights**2).sum(), rel=1e-12
    )


def test_its_error_is_that_of_the_residuals_from_both_lines() -> None:
    rows = np.array(some_rows(12))
    weights = 0.9 ** np.arange(12)[::-1]
    weights /= weights.sum()
    found = calibrated(some_rows(12))
    relative = rows / (weights @ rows)
    deviation = relative @ np.array([1, -1, -1, 1])
    assert weights @ deviation == pytest.approx(0, abs=1e-12)
    share = float((weights**2).sum())
    variance = float(weights @ deviation**2) * share / (1 - share)
    t = student_t_quantile(0.95, 1 / share - 1)
    slope = found.slope(0.95)
    for end, sign in ((slope.low, 1), (slope.high, -1)):
        assert slope.value / end == pytest.approx(1 + sign * t * math.sqrt(variance), rel=1e-9)
    norms, total = (relative[:, i + 1] - relative[:, i] for i in (0, 2))
    products = [weights @ (a * b) for a, b in ((norms, total), (norms, norms), (total, total))]
    expected = products[0] / math.sqrt(products[1] * products[2])
    assert found.correlation == pytest.approx(float(expected), rel=1e-9)


def test_an_uncertain_norm_noise_scale_widens_the_prediction() -> None:
    found = calibrated(some_rows(20))
    sure, unsure = found.predict(14.0), found.predict(14.0, standard_error=2.0)
    assert sure.value == unsure.value
    t = student_t_quantile(0.9, found.effective_count - 1)
    margins = [(one.value / one.low - 1) / t for one in (sure, unsure)]
    assert margins[1] ** 2 - margins[0] ** 2 == pytest.approx((2 / 14) ** 2, rel=1e-9)


def test_noise_and_trends_common_to_both_cancel() -> None:
    """Ratios that never change are sure whatever |G|^2 and tr(Sigma) do."""
    rows = [(s, n, 3 * s, 5 * n) for s, n, *_ in some_rows(8)]
    rows = [(0.5**i * s, n, 0.5**i * t, m) for i, (s, n, t, m) in enumerate(rows)]
    slope = calibrated(rows).slope()
    assert (slope.low, slope.value, slope.high) == pytest.approx((5 / 3,) * 3, rel=1e-6)


CONSTANT: Squares = lambda part: (1.0, 3.0)  # noqa: E731
TRUTHS: dict[str, Squares] = {
    "constant": CONSTANT,
    "the ratio drifts from 1.2 to 4": lambda part: (1.0, 6 * 0.15**part),
    "both |G|^2 fall tenfold": lambda part: (3 * 0.1**part, 9 * 0.1**part),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_interval_holds_the_truth_of_the_window(name: str) -> None:
    """A drift counts as noise, so that the intervals may hold it more often; none may do so less often."""
    runs = [simulate(TRUTHS[name], seed) for seed in range(200)]
    held = sum(run.held for run in runs) / len(runs)
    margin = 4 * math.sqrt(0.9 * 0.1 / len(runs))
    assert held > 0.9 - margin
    if name == "constant":
        assert held < 0.9 + margin
    errors = [math.log(run.total.value / run.true_total) for run in runs]
    assert abs(float(np.median(errors))) < 0.03
    assert float(np.sqrt(np.mean(np.square(errors)))) < 0.16
    assert float(np.median([run.total.high / run.total.low for run in runs])) < 2


def test_a_first_step_unlike_the_others_is_forgotten() -> None:
    """Its |G|^2 is 100 times larger, and weighs as much: at first nothing is known, later nothing is left of it."""

    def squares(part: float) -> tuple[float, float]:
        return (100.0, 20.0) if part == 0 else (1.0, 3.0)

    early = [simulate(squares, seed, steps=80) for seed in range(40)]
    assert all(run.held or math.isnan(run.total.value) for run in early)
    assert all(math.isnan(run.total.value) or run.slope.high < math.inf for run in early)
    late = [simulate(squares, seed, steps=500) for seed in range(40)]
    errors = [math.log(run.total.value / run.true_total) for run in late]
    assert abs(float(np.median(errors))) < 0.05
    assert max(map(abs, errors)) < 0.4
    assert sum(run.held for run in late) >= 0.8 * len(late)
    assert late[0].true_total == pytest.approx((NORMS + REST) / 4, rel=0.01)


def test_too_few_or_too_noisy_calibrations_give_no_number() -> None:
    """With |G|^2 a tenth of its error nothing bounds the slope: undetermined, not a number with [0, inf]."""
    runs: list[Outcome] = [simulate(lambda part: (0.05, 0.1), seed) for seed in range(60)]
    unknown = [run for run in runs if math.isnan(run.total.value)]
    assert len(unknown) > 50
    for run in unknown:
        assert run.total.reason
        assert not math.isfinite(run.total.high)
    few = calibrated(some_rows(1)).slope()
    assert math.isnan(few.value)
    assert few.reason == "a slope needs two calibrations with finite gradients; 1 of 1 had them"


@given(
    st.lists(st.tuples(*[st.floats(-3, 5)] * 4), max_size=8),
    st.floats(0, 0.99),
    st.floats(0.01, 100),
    st.floats(0, 10),
)
def test_an_interval_is_above_zero_and_contains_its_number(
    rows: list[Row], decay: float, norms: float, error: float
) -> None:
    found = calibrated(rows, decay)
    for reading in (found.slope(), found.predict(norms, standard_error=error)):
        if not reading.reason:
            assert 0 < reading.low <= reading.value <= reading.high < math.inf
        else:
            assert math.isnan(reading.value)
            assert math.isnan(reading.low) or (reading.low >= 0 and reading.high == math.inf)


def test_an_undetermined_slope_has_a_reason() -> None:
    calibration = Calibration()
    assert calibration.slope().reason == "no calibration yet"
    assert math.isnan(calibration.correlation)
    calibration.add(UNDETERMINED, Estimate(1.0, 8.0), 0.9)
    calibration.add(Estimate(1.0, math.inf), Estimate(1.0, 8.0), 0.9)
    said = "a slope needs two calibrations with finite gradients; 0 of 2 had them"
    assert calibration.predict(5.0).reason == said
    for norms in (math.nan, -1.0, 0.0, math.inf):
        reason = "the noise scale of the measured layers is undetermined"
        assert calibrated(some_rows(9)).predict(norms).reason == reason
    negative = calibrated([(1.0, 5.0, -1.0, 9.0)] * 3)
    assert negative.slope().reason == (
        "|G|^2 of the whole model is not above zero over 3 calibrations"
    )
    apart = calibrated([(1.0, 5.0, 0.1, 9.0), (1.0, 5.0, 3.0, 9.0)])
    assert apart.slope().reason == "2 calibrations are too few or too noisy for an upper bound"
    assert apart.slope().high == math.inf


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
