"""Averages of noise scale estimates: published traces, errors and intervals, what is undetermined."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime import known
from trainc.runtime.noise_scale.averages import Averages
from trainc.runtime.noise_scale.estimate import UNDETERMINED, Estimate, Uncertainty
from trainc.runtime.noise_scale.estimators import noise_scale, noise_scale_from_contributions
from trainc.runtime.noise_scale.jackknife import jackknife

CASES = json.loads((Path(__file__).parents[1] / "reference/noise_scale.json").read_text())["cases"]


def estimates() -> list[Estimate]:
    given_ = CASES["ema"]["inputs"]
    pairs = zip(given_["mean_small_sqnorm"], given_["big_sqnorm"], strict=True)
    return [noise_scale(small, big, given_["B_small"], given_["B_big"]) for small, big in pairs]


@pytest.mark.parametrize("beta", ["0.9", "0.99", "0.995"])
def test_averages_are_those_of_a_published_tracker(beta: str) -> None:
    averages = Averages()
    rows = CASES["ema"]["outputs"]["crowson_beta"][beta]
    for estimate, row in zip(estimates(), rows, strict=True):
        averages.add(estimate, float(beta))
        assert estimate == pytest.approx((row["gtg"], row["trsigma"]), rel=1e-12)
        assert averages.state()[2:4] == pytest.approx([row["ema_gtg"], row["ema_tr"]], rel=1e-12)
        debiased = (row["debiased_gtg"], row["debiased_tr"])
        assert averages.estimate == pytest.approx(debiased, rel=1e-12)
        assert averages.noise_scale() == pytest.approx(row["gns"], rel=1e-12)


def test_one_step_can_be_undetermined_while_the_average_is_not() -> None:
    averages = Averages()
    scales = []
    for estimate in estimates():
        averages.add(estimate, 0.9)
        scales.append((estimate.noise_scale, averages.noise_scale()))
    assert math.isnan(scales[4][0])
    assert scales[4][1] > 0


sizes = st.floats(0, 1e6)


@given(
    st.lists(st.tuples(sizes, sizes, st.floats(1e-4, 1.0)), min_size=1, max_size=8),
    st.floats(0, 0.999),
    st.floats(0, 3),
)
def test_the_noise_scale_is_a_positive_number_or_undetermined(
    steps: list[tuple[float, float, float]], decay: float, errors: float
) -> None:
    averages = Averages()
    for s1, batch, q in steps:
        estimate = noise_scale_from_contributions(s1, batch, q)
        if not math.isnan(estimate.signal):
            averages.add(estimate, decay)
    scale = averages.noise_scale(errors)
    signal, noise = averages.estimate
    if not math.isnan(scale):
        assert signal > 0
        assert scale == noise / signal
    assert math.isnan(averages.standard_error()) or averages.standard_error() >= 0


def test_the_standard_error_is_the_scatter_between_runs() -> None:
    sq_norms, _, batch = known.sq_norms(known.gradients(200 * 100, 16, seed=3) / 16)
    s1, q = sq_norms.sum(0), 1 / 16
    ratios, errors = [], []
    for run in range(200):
        averages = Averages()
        for i in range(100 * run, 100 * run + 100):
            estimate = noise_scale_from_contributions(float(s1[i]), float(batch[i]), q)
            averages.add(estimate, 0.97)
        ratios.append(averages.noise_scale())
        errors.append(averages.standard_error())
    scatter = float(torch.tensor(ratios).std())
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.25)


def test_a_signal_within_its_error_is_undetermined_on_request() -> None:
    averages = Averages()
    for signal in (0.9, -0.7, 0.8, -0.6, 0.1):
        averages.add(Estimate(signal, 3.0), 0.9)
    assert averages.noise_scale() > 0
    assert math.isnan(averages.noise_scale(errors=2))
    single = Averages()
    single.add(Estimate(0.5, 3.0), 0.9)
    assert single.noise_scale() == pytest.approx(6.0, rel=1e-12)
    assert math.isnan(single.noise_scale(errors=1))
    assert math.isnan(single.standard_error())


def test_averages_continue_bit_for_bit() -> None:
    whole, first, second = Averages(), Averages(), Averages()
    for i, estimate in enumerate(estimates()):
        whole.add(estimate, 0.97)
        (first if i < 4 else second).add(estimate, 0.97)
        if i == 3:
            second.load(json.loads(json.dumps(first.state())))
    assert second.state() == whole.state()


def test_averages_of_another_length_are_refused() -> None:
    for wrong in ([0.0, 1.0], [0.0] * 7):
        with pytest.raises(ValueError, match=f"{Averages.SIZE} numbers, not {len(wrong)}: another"):
            Averages().load(wrong)


@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.floats(-5, 5), known.uncertainties() | st.none()), max_size=8
    ),
    st.floats(0, 0.99),
)
def test_any_state_is_restored_bit_for_bit(
    steps: list[tuple[float, float, Uncertainty | None]], decay: float
) -> None:
    whole, resumed = Averages(), Averages()
    for i, (signal, noise, uncertainty) in enumerate(steps):
        for averages in (whole, resumed):
            averages.add(Estimate(signal, noise), decay, uncertainty)
            if i % 3 == 2:
                averages.skip("single")
        loaded = Averages()
        loaded.load(json.loads(json.dumps(resumed.state())))
        resumed = loaded
    assert resumed.state() == whole.state()
    assert str(resumed.interval_estimate()) == str(whole.interval_estimate())


def test_a_decay_of_one_is_refused() -> None:
    for decay in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="the clock has not moved"):
            Averages().add(Estimate(1.0, 2.0), decay)


def test_own_uncertainties_are_folded_with_squared_weights() -> None:
    averages, decay = Averages(), 0.8
    given_ = [
        Uncertainty(1.0, 4.0, -0.5, 7.0),
        Uncertainty(2.0, 3.0, 0.1, 15.0),
        Uncertainty(0.5, 1.0, 0.0, 31.0),
    ]
    for i, uncertainty in enumerate(given_):
        averages.add(Estimate(1.0 + i, 5.0), decay, uncertainty)
    weights = torch.tensor([(1 - decay) * decay**i for i in (2, 1, 0)], dtype=torch.float64)
    weights /= weights.sum()
    parts = torch.tensor([uncertainty[:3] for uncertainty in given_], dtype=torch.float64)
    expected = (weights.square()[:, None] * parts).sum(0).tolist()
    assert list(averages.uncertainty[:3]) == pytest.approx(expected, rel=1e-12)
    fourth = sum(w**4 / s.dof for w, s in zip(weights.tolist(), given_, strict=True))
    dof = float(weights.square().sum()) ** 2 / fourth
    assert averages.uncertainty.dof == pytest.approx(dof, rel=1e-12)


def test_an_interval_exists_from_the_first_step() -> None:
    averages = Averages()
    averages.add(Estimate(2.0, 8.0), 0.9, Uncertainty(0.01, 0.04, 0.0, 30.0))
    low, high = averages.interval()
    assert 3 < low < averages.noise_scale() < high < 5
    assert averages.interval_estimate() == (4.0, low, high, "")
    assert averages.standard_error() == pytest.approx(math.sqrt(0.04 + 16 * 0.01) / 2, rel=1e-12)


def test_one_step_without_an_uncertainty_brings_back_the_sample_covariance() -> None:
    steps = [Estimate(1.0, 5.0), Estimate(1.4, 4.0), Estimate(0.8, 6.0)]
    without, some = Averages(), Averages()
    for i, estimate in enumerate(steps):
        without.add(estimate, 0.9)
        some.add(estimate, 0.9, None if i == 1 else Uncertainty(1.0, 1.0, 0.0))
    assert some.uncertainty == without.uncertainty
    unknown = Averages()
    unknown.add(steps[0], 0.9, Uncertainty(math.nan, math.nan, math.nan))
    assert math.isnan(unknown.uncertainty.signal_variance)
    assert all(map(math.isnan, unknown.interval()))


def cover(examples: int, mean: float, own: bool, seed: int) -> float:
    """Return how many of 1000 averages of 12 steps have the truth in their 90 % interval."""
    runs, steps = 1000, 12
    draws = known.sq_norms(known.gradients(runs * steps, examples, seed, mean) / examples)
    equal = torch.full((examples,), 1 / examples, dtype=torch.float64)
    found = jackknife(*draws, equal)
    true, covered = known.TRACE / (6 * mean**2), 0
    for run in range(runs):
        averages = Averages()
        for one in found[run * steps : (run + 1) * steps]:
            averages.add(one.estimate, 0.9, one.uncertainty if own else None)
        low, high = averages.interval()
        covered += low <= true <= high
    return covered / runs


@pytest.mark.parametrize("own", [True, False], ids=["jackknife", "scatter"])
def test_the_interval_of_averages_covers_the_truth_at_its_rate(own: bool) -> None:
    margin = 4 * math.sqrt(0.9 * 0.1 / 1000)
    assert abs(cover(16, 1.0, own, seed=21) - 0.9) < margin
    assert cover(16, 0.1, own, seed=22) > 0.9 - margin


def test_an_undetermined_noise_scale_has_a_reason() -> None:
    averages = Averages()
    assert averages.interval_estimate().reason == "no step yet"
    averages.skip("single")
    assert (
        averages.interval_estimate().reason
        == "a noise scale needs two samples in a step; every step had one"
    )
    averages.add(Estimate(math.inf, 1.0), 0.9)
    averages.add(UNDETERMINED, 0.9)
    assert averages.interval_estimate().reason == "gradients were not finite in 2 of 3 steps"
    assert averages.state()[: Averages.MOMENTS] == [0.0] * Averages.MOMENTS
    averages.add(Estimate(-0.1, 3.0), 0.9)
    found = averages.interval_estimate()
    assert found.reason.startswith("|G|^2 is not above zero after 1 step: average over more steps")
    assert math.isnan(found.value)


def test_an_undetermined_signal_bounds_the_noise_scale_from_below() -> None:
    averages = Averages()
    for _ in range(3):
        averages.add(Estimate(-0.1, 10.0), 0.9, Uncertainty(0.04, 1.0, 0.0, 60.0))
    found = averages.interval_estimate(unit="rows")
    assert found.high == math.inf
    assert 20 < found.low < 100
    bound = f"{found.low:.3g} rows"
    assert found.reason == f"|G|^2 is not above zero after 3 steps: at least {bound}"


def test_an_undetermined_noise_bounds_it_from_above() -> None:
    averages = Averages()
    averages.add(Estimate(2.0, -0.1), 0.9, Uncertainty(0.01, 0.04, 0.0, 60.0))
    found = averages.interval_estimate()
    assert (found.low, math.isnan(found.value)) == (0.0, True)
    assert (
        found.reason
        == f"tr(Sigma) is not above zero after 1 step: at most {found.high:.3g} samples"
    )


def test_a_margin_for_the_signal_is_in_the_reason() -> None:
    averages = Averages()
    averages.add(Estimate(0.3, 3.0), 0.9, Uncertainty(0.04, 0.04, 0.0, 60.0))
    assert averages.interval_estimate().value == pytest.approx(10.0)
    found = averages.interval_estimate(errors=2)
    assert found.reason.startswith(
        "|G|^2 is not 2 standard errors above zero after 1 step: at least"
    )
