"""Estimators of the noise scale against published traces, and against known signal and noise."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime import known
from trainc.runtime.noise_scale.estimate import UNDETERMINED, Estimate
from trainc.runtime.noise_scale.estimators import (
    SquaredNorms,
    noise_scale,
    noise_scale_from_contributions,
)
from trainc.runtime.step.record import Contribution

CASES = json.loads((Path(__file__).parents[1] / "reference/noise_scale.json").read_text())["cases"]


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
    assert found.noise_scale == pytest.approx(expected["gns"], rel=1e-12)
    # Published code takes the examples for equally long, which makes a quarter's difference here.
    equal = noise_scale_from_contributions(expected["S1"], expected["big_sqnorm"], 1 / 8)
    naive = expected["naive_equal_weight(nanoGNS product)"]
    assert equal == pytest.approx((naive["gtg"], naive["trsigma"]), rel=1e-10)
    assert equal.noise_scale == pytest.approx(naive["gns"], rel=1e-10)
    assert equal.noise_scale > 1.25 * found.noise_scale


def test_a_loss_scale_cancels() -> None:
    plain = noise_scale_from_contributions(0.3, 0.5, 0.2)
    scaled = noise_scale_from_contributions(0.3 * 1024**2, 0.5 * 1024**2, 0.2)
    assert scaled.noise_scale == plain.noise_scale


@pytest.mark.parametrize("q", [1.0, 1.0 + 1e-7, 1.0 - 1e-8, 0.0, math.nan])
def test_one_example_gives_no_estimate(q: float) -> None:
    assert all(map(math.isnan, noise_scale_from_contributions(0.3, 0.5, q)))
    assert all(map(math.isnan, noise_scale(0.3, 0.5, 4, 4)))


@pytest.mark.parametrize(
    ("signal", "noise"),
    [(-1.0, 3.0), (0.0, 3.0), (2.0, -1.0), (2.0, 0.0), (1e-320, 1e3), (math.nan, 1.0)],
)
def test_a_noise_scale_is_a_positive_number_or_none(signal: float, noise: float) -> None:
    assert math.isnan(Estimate(signal, noise).noise_scale)


def test_groups_of_equal_size_are_the_two_batch_estimator() -> None:
    small, big = [0.3, 0.9, 0.1, 0.7], 0.21
    found = noise_scale_from_contributions(sum(small) / 16, big, 1 / 4, 1 / 12)
    assert found == pytest.approx(noise_scale(sum(small) / 4, big, 3, 12), rel=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1e-3, 0.99))
def test_groups_of_one_are_examples_bit_for_bit(s1: float, batch: float, q: float) -> None:
    plain = noise_scale_from_contributions(s1, batch, q)
    assert noise_scale_from_contributions(s1, batch, q, q) == plain
    assert plain == ((batch - s1) / (1 - q), (s1 / q - batch) / (1 - q))


def test_the_weight_of_a_group_is_at_least_that_of_its_examples() -> None:
    for examples in (0.3, 0.0, -0.1):
        with pytest.raises(ValueError, match=r"sum of w_b\^2 over single examples"):
            noise_scale_from_contributions(0.3, 0.5, 0.25, examples)
    assert noise_scale_from_contributions(0.3, 0.5, 0.25, math.nan) is UNDETERMINED
    assert noise_scale_from_contributions(0.3, 0.5, 1.0, 0.1) is UNDETERMINED


@pytest.mark.parametrize("weights", [[1.0] * 6, [5.0, 1.0, 1.0, 3.0], [9.0, 1.0]])
def test_both_parts_are_unbiased_also_for_unequal_weights(weights: list[float]) -> None:
    w = torch.tensor(weights, dtype=torch.float64)
    w /= w.sum()
    squares, _, batch = known.sq_norms(known.gradients(40_000, len(w), seed=3) * w[:, None])
    s1, q = squares.sum(0), float(w.square().sum())
    signal, noise = (batch - s1) / (1 - q), (s1 / q - batch) / (1 - q)
    for values, true in ((signal, 6.0), (noise, 14.0)):
        error = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - true) < 4 * error
        assert error < 0.2
    one = noise_scale_from_contributions(float(s1[0]), float(batch[0]), q)
    assert one == pytest.approx((float(signal[0]), float(noise[0])))


def test_squared_norms_are_read_from_micro_batches_by_parameter() -> None:
    parts = [
        Contribution(torch.tensor([0.25, 0.25]), {"a": torch.tensor([1.0, 2.0])}),
        Contribution(torch.tensor([0.5]), {"a": torch.tensor([4.0])}),
    ]
    squares = SquaredNorms.of(parts, {"a": torch.tensor([3.0, 4.0], dtype=torch.bfloat16)})
    assert (squares.sums, squares.batch, squares.sum_sq_weights) == ({"a": 7.0}, {"a": 25.0}, 0.375)
    assert squares.estimate() == noise_scale_from_contributions(7.0, 25.0, 0.375)
    assert squares.estimate(["a"]) == squares.estimate()
    assert squares.estimate(["gone"]) is UNDETERMINED
    assert SquaredNorms.of([], {}).estimate() is UNDETERMINED


def test_a_single_example_is_noticed() -> None:
    weights = {"one": [1.0], "two": [0.5, 0.5], "padding": [1.0, 0.0]}
    found = {
        name: SquaredNorms.of(
            [Contribution(torch.tensor(w), {"a": torch.tensor(w)})], {"a": torch.ones(1)}
        )
        for name, w in weights.items()
    }
    assert {name: s.single for name, s in found.items()} == {
        "one": True,
        "two": False,
        "padding": True,
    }
    assert not SquaredNorms.of([], {}).single


divisions = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3)


def micro_batch(names: dict[str, slice], each: torch.Tensor, weights: torch.Tensor) -> Contribution:
    """Return what examples with these gradients (B, n) and weights (B,) leave behind."""
    shares = {name: (weights[:, None] * each)[:, columns] for name, columns in names.items()}
    return Contribution(
        weights,
        {name: share.square().sum(1) for name, share in shares.items()},
        batch_sq_norms={name: share.sum(0).square().sum() for name, share in shares.items()},
    )


@given(divisions, st.integers(0, 1000), st.booleans())
def test_the_division_into_micro_batches_and_ranks_changes_no_estimate(
    division: list[list[int]], seed: int, averaged: bool
) -> None:
    """`division` holds every rank's micro-batch sizes; the exchange averages gradients or sums."""
    count = sum(map(sum, division))
    each = known.gradients(1, count, seed)[0]
    weights = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = (weights + 0.1) / (weights + 0.1).sum()
    names = {"a": slice(0, 2), "b": slice(2, 3)}
    gradient = (weights[:, None] * each).sum(0)
    whole = {name: gradient[columns] for name, columns in names.items()}
    expected = SquaredNorms.of([micro_batch(names, each, weights)], whole)

    # A rank's own units are those of the gradient before the exchange.
    divisor = len(division) if averaged else 1
    rows = iter(torch.arange(count).split([size for rank in division for size in rank]))
    gathered = []
    for sizes in division:
        for r in islice(rows, len(sizes)):
            part = micro_batch(names, each[r], divisor * weights[r])
            squares = {name: square / divisor**2 for name, square in part.sq_norms.items()}
            gathered.append(Contribution(part.weights / divisor, squares))
    found = SquaredNorms.of(gathered, whole)

    assert found.sum_sq_weights == pytest.approx(expected.sum_sq_weights, rel=1e-12)
    assert found.sums == pytest.approx(expected.sums, rel=1e-12)
    for chosen in (None, ["a"], ["b"]):
        estimates = found.estimate(chosen), expected.estimate(chosen)
        assert estimates[0] == pytest.approx(estimates[1], rel=1e-9, abs=1e-12, nan_ok=True)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(0, 1000))
def test_micro_batches_as_groups_against_brute_force(sizes: list[int], seed: int) -> None:
    count = sum(sizes)
    each = known.gradients(1, count, seed)[0]
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    names = {"a": slice(0, 3)}
    parts = [micro_batch(names, each[r], weights[r]) for r in torch.arange(count).split(sizes)]
    groups = [each[rows].sum(0) / count for rows in torch.arange(count).split(sizes)]
    squares = SquaredNorms.of_micro_batches(parts, {"a": each.mean(0)})
    s1, batch = sum(float(g.square().sum()) for g in groups), float(each.mean(0).square().sum())
    q = sum(size**2 for size in sizes) / count**2
    signal = (batch - s1) / (1 - q)
    found = (squares.sum_sq_weights, squares.sum_sq_example_weights)
    assert found == pytest.approx((q, 1 / count), rel=1e-12)
    assert squares.estimate() == pytest.approx((signal, count * (s1 - q * signal)), rel=1e-9)


@pytest.mark.parametrize(
    ("small", "big"), [(0, 8), (-1, 8), (8, 4), (4, math.inf), (math.nan, 8), (4, math.nan)]
)
def test_impossible_batch_sizes_are_an_error(small: float, big: float) -> None:
    with pytest.raises(
        ValueError, match="expected finite batch sizes above zero, the small one no"
    ):
        noise_scale(3.0, 1.0, small, big)


@pytest.mark.parametrize("q", [1.5, -0.25, math.inf])
def test_an_impossible_sum_of_squared_weights_is_an_error(q: float) -> None:
    with pytest.raises(ValueError, match=rf"sum_sq_weights = {q:g}: expected a number in \[0, 1\]"):
        noise_scale_from_contributions(3.0, 1.0, q)


@pytest.mark.parametrize("q", [0.0, 1.0, 1 + 1e-8, math.nan])
def test_one_group_or_none_gives_no_estimate(q: float) -> None:
    assert all(map(math.isnan, noise_scale_from_contributions(3.0, 1.0, q)))
