"""Estimators of the noise scale against published traces, and against known signal and noise."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainc.runtime.noise_scale import (
    UNDETERMINED,
    Averages,
    Estimate,
    Squares,
    noise_scale,
    noise_scale_from_contributions,
)
from trainc.runtime.step import Contribution

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
        assert averages.scale() == pytest.approx(row["gns"], rel=1e-12)


def test_one_step_can_be_undetermined_while_the_average_is_not() -> None:
    averages = Averages()
    scales = []
    for estimate in estimates():
        averages.add(estimate, 0.9)
        scales.append((estimate.scale, averages.scale()))
    assert math.isnan(scales[4][0])
    assert scales[4][1] > 0


def test_equal_weights_are_the_two_batch_estimator_with_single_examples() -> None:
    squares, big = [0.3, 0.9, 0.1, 0.7, 0.2], 0.21
    mean = sum(squares) / 5
    by_contribution = noise_scale_from_contributions(sum(squares) / 25, big, 1 / 5)
    assert by_contribution == pytest.approx(noise_scale(mean, big, 1, 5), rel=1e-12)


def test_examples_of_unequal_length() -> None:
    expected = CASES["variable_length_token_mean"]["outputs"]
    q = math.fsum(w * w for w in expected["weights"])
    assert q == pytest.approx(expected["q"], rel=1e-12)
    found = noise_scale_from_contributions(expected["S1"], expected["big_sqnorm"], q)
    assert found == pytest.approx((expected["gtg"], expected["trsigma"]), rel=1e-12)
    assert found.scale == pytest.approx(expected["gns"], rel=1e-12)
    equal = noise_scale_from_contributions(expected["S1"], expected["big_sqnorm"], 1 / 8)
    assert equal.scale == pytest.approx(
        expected["naive_equal_weight(nanoGNS product)"]["gns"], rel=0.4
    )
    assert equal.scale != pytest.approx(expected["gns"], rel=0.1)


def test_a_loss_scale_cancels() -> None:
    plain = noise_scale_from_contributions(0.3, 0.5, 0.2)
    scaled = noise_scale_from_contributions(0.3 * 1024**2, 0.5 * 1024**2, 0.2)
    assert scaled.scale == plain.scale


@pytest.mark.parametrize("q", [1.0, 1.0 + 1e-7, 1.0 - 1e-8, 0.0, math.nan])
def test_one_example_tells_nothing(q: float) -> None:
    assert all(map(math.isnan, noise_scale_from_contributions(0.3, 0.5, q)))
    assert all(map(math.isnan, noise_scale(0.3, 0.5, 4, 4)))


sizes = st.floats(0, 1e6)


@given(
    st.lists(st.tuples(sizes, sizes, st.floats(1e-4, 1.5)), min_size=1, max_size=8),
    st.floats(0, 0.999),
    st.floats(0, 3),
)
def test_the_noise_scale_is_a_positive_number_or_undetermined(
    steps: list[tuple[float, float, float]], decay: float, errors: float
) -> None:
    averages = Averages()
    for s1, s_big, q in steps:
        estimate = noise_scale_from_contributions(s1, s_big, q)
        if not math.isnan(estimate.signal):
            averages.add(estimate, decay)
    scale = averages.scale(errors)
    signal, noise = averages.estimate
    if not math.isnan(scale):
        assert signal > 0
        assert scale == noise / signal
    assert math.isnan(averages.error()) or averages.error() >= 0


def draws(weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return both sums of squares of each step, and q; G = (1, 2, -1), Sigma = diag(1, 4, 9)."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, len(weights), 3)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    each = torch.tensor([1.0, 2.0, -1.0]) + noise * torch.tensor([1.0, 2.0, 3.0])
    shares = each * weights[:, None]
    s1, s_big = shares.square().sum((1, 2)), shares.sum(1).square().sum(1)
    return s1, s_big, float(weights.square().sum())


@pytest.mark.parametrize("weights", [[1.0] * 6, [5.0, 1.0, 1.0, 3.0], [9.0, 1.0]])
def test_both_parts_are_unbiased_also_for_unequal_weights(weights: list[float]) -> None:
    shares = torch.tensor(weights, dtype=torch.float64)
    s1, s_big, q = draws(shares / shares.sum(), 40_000)
    signal, noise = (s_big - s1) / (1 - q), (s1 / q - s_big) / (1 - q)
    for values, true in ((signal, 6.0), (noise, 14.0)):
        error = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - true) < 4 * error
        assert error < 0.2
    one = noise_scale_from_contributions(float(s1[0]), float(s_big[0]), q)
    assert one == pytest.approx((float(signal[0]), float(noise[0])))


def test_the_standard_error_is_the_scatter_between_runs() -> None:
    weights = torch.full((16,), 1 / 16, dtype=torch.float64)
    s1, s_big, q = draws(weights, 200 * 100)
    ratios, errors = [], []
    for run in range(200):
        averages = Averages()
        for i in range(100 * run, 100 * run + 100):
            estimate = noise_scale_from_contributions(float(s1[i]), float(s_big[i]), q)
            averages.add(estimate, 0.97)
        ratios.append(averages.scale())
        errors.append(averages.error())
    scatter = float(torch.tensor(ratios).std())
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.25)


def test_a_signal_within_its_error_is_undetermined_on_request() -> None:
    averages = Averages()
    for signal in (0.9, -0.7, 0.8, -0.6, 0.1):
        averages.add(Estimate(signal, 3.0), 0.9)
    assert averages.scale() > 0
    assert math.isnan(averages.scale(errors=2))
    alone = Averages()
    alone.add(Estimate(0.5, 3.0), 0.9)
    assert alone.scale() == pytest.approx(6.0, rel=1e-12)
    assert math.isnan(alone.scale(errors=1))
    assert math.isnan(alone.error())


def test_averages_continue_bit_for_bit() -> None:
    whole, first, second = Averages(), Averages(), Averages()
    for i, estimate in enumerate(estimates()):
        whole.add(estimate, 0.97)
        (first if i < 4 else second).add(estimate, 0.97)
        if i == 3:
            second.load(json.loads(json.dumps(first.state())))
    assert second.state() == whole.state()
    with pytest.raises(ValueError, match="7 numbers, not 2"):
        second.load([0.0, 1.0])


def test_squares_are_read_from_micro_batches_by_parameter() -> None:
    parts = [
        Contribution(torch.tensor([0.25, 0.25]), {"a": torch.tensor([1.0, 2.0])}),
        Contribution(torch.tensor([0.5]), {"a": torch.tensor([4.0])}),
    ]
    squares = Squares.of(parts, {"a": torch.tensor([3.0, 4.0], dtype=torch.bfloat16)})
    assert (squares.shares, squares.whole, squares.q) == ({"a": 7.0}, {"a": 25.0}, 0.375)
    assert squares.estimate() == noise_scale_from_contributions(7.0, 25.0, 0.375)
    assert squares.estimate(["a"]) == squares.estimate()
    assert squares.estimate(["gone"]) is UNDETERMINED
    assert Squares.of([], {}).estimate() is UNDETERMINED
