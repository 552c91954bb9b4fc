"""Laws over several runs: exact on points that follow them, with intervals that cover, and errors that name runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainc.runtime.fits import least_squares
from trainc.runtime.fits.batch import Reached, fit_batch
from trainc.runtime.fits.transfer import Trained, fit_transfer

K, ALPHA, BETA = 1.9e4, 0.18, 0.38
"""Of text to Python: Hernandez et al., arXiv:2102.01293."""
SIZES = (1e5, 1e6, 1e7, 1e8)


def scratch_loss(size: float, data: float) -> float:
    return (
        2 + math.log10(size) ** -1
        if data == 0
        else (1e13 / data) ** 0.09 * (1 + 1 / math.log(size))
    )


def runs(noise: float = 0.0) -> list[Trained]:
    """Return runs from scratch and fine-tuned ones whose transferred data follows the law, times exp(noise normal)."""
    drawn = np.random.default_rng(1)
    found = [
        Trained(f"scratch {n:g} {d:g}", n, d, scratch_loss(n, d), False)
        for n, d in itertools.product(SIZES, np.geomspace(1e4, 1e12, 17))
    ]
    for n, d in itertools.product(SIZES, (1e4, 1e5, 1e6, 1e7)):
        amount = K * d**ALPHA * n**BETA * math.exp(noise * drawn.standard_normal())
        found.append(Trained(f"tuned {n:g} {d:g}", n, d, scratch_loss(n, d + amount), True))
    return found


def test_transfer_of_exact_runs_is_the_law() -> None:
    law = fit_transfer(runs())
    assert (law.k.value, law.alpha.value, law.beta.value) == pytest.approx(
        (K, ALPHA, BETA), rel=1e-8
    )
    assert law.r2 == pytest.approx(1)
    assert law.left_out == ()
    assert law.sizes == (1e5, 1e8)
    assert law.data == (1e4, 1e7)
    assert law.amount(1.0, 1.75e11) == pytest.approx(3.56e8, rel=2e-3)  # the paper has 3.7e8


def test_transfer_of_noisy_runs_has_intervals_that_hold_the_constants() -> None:
    law = fit_transfer(runs(noise=0.1))
    for interval, constant in ((law.k, K), (law.alpha, ALPHA), (law.beta, BETA)):
        assert interval.low < constant < interval.high
        assert interval.low < interval.value < interval.high
    assert 0.9 < law.r2 < 1


def test_transfer_leaves_out_what_the_law_does_not_hold_for() -> None:
    given = runs()
    size = SIZES[0]
    given += [
        Trained("much data", size, 2e11, scratch_loss(size, 3e11), True),
        Trained("ossified", size, 1e6, scratch_loss(size, 5e5), True),
        Trained("too good", size, 1e6, 0.1, True),
        Trained("too bad", size, 1e6, 99.0, True),
    ]
    once_more = next(run for run in given if not run.pretrained and run.data < 1e8)
    given.append(replace(once_more, name="nothing gained", pretrained=True))
    law = fit_transfer(given)
    assert law.k.value == pytest.approx(K)
    assert law.left_out[-1].startswith("nothing gained: it is no better than training from scratch")
    given.pop()
    law = fit_transfer(given)
    assert [line.partition(":")[0] for line in law.left_out] == [run.name for run in given[-4:]]
    for line, said in zip(
        law.left_out,
        ("more than 10%", "no better than", "as low as", "has a lower loss"),
        strict=True,
    ):
        assert said in line


def test_transfer_says_what_is_missing() -> None:
    given = runs()
    with pytest.raises(ValueError, match="no run began with pre-trained weights"):
        fit_transfer([run for run in given if not run.pretrained])
    other = replace(given[-1], name="other size", size=123.0)
    with pytest.raises(
        ValueError, match=r"other size has 123 parameters .* of this size have 0 amounts of data"
    ):
        fit_transfer([*given, other])
    one_size = [run for run in given if run.size == SIZES[0]]
    with pytest.raises(ValueError, match=r"two sizes and two amounts .*, and has \d, of 1 and \d"):
        fit_transfer(one_size)
    tuned = [run for run in given if run.pretrained]
    diagonal = [tuned[0], tuned[5], tuned[10]]  # size and data grow by the same factor
    with pytest.raises(ValueError, match="change together"):
        fit_transfer([run for run in given if not run.pretrained] + diagonal)


def test_three_runs_determine_the_law_without_intervals() -> None:
    given = runs()
    tuned = [run for run in given if run.pretrained]
    law = fit_transfer(
        [run for run in given if not run.pretrained] + [tuned[0], tuned[1], tuned[4]]
    )
    assert law.beta.value == pytest.approx(BETA)
    assert math.isnan(law.beta.low)


def points(least_steps: float, least_samples: float, noise: float = 0.0) -> list[Reached]:
    drawn = np.random.default_rng(2)
    found = []
    for batch in (8, 16, 32, 64, 128, 256, 512):
        steps = (least_steps + least_samples / batch) * math.exp(noise * drawn.standard_normal())
        found.append(Reached(f"batch {batch}", steps, steps * batch, (("gns", 60.0),)))
    return found


@pytest.mark.parametrize(("steps", "samples"), [(100, 6000), (1000, 3e3), (10, 5e5)])
def test_batches_of_exact_runs_are_the_law(steps: float, samples: float) -> None:
    law = fit_batch(1.0, points(steps, samples))
    assert law.steps.value == pytest.approx(steps, rel=1e-6)
    assert law.samples.value == pytest.approx(samples, rel=1e-6)
    assert law.critical.value == pytest.approx(samples / steps, rel=1e-6)
    for point in law.points:
        assert (point.steps / law.steps.value - 1) * (
            point.samples / law.samples.value - 1
        ) == pytest.approx(1)


def test_the_interval_of_the_critical_batch_holds_it() -> None:
    law = fit_batch(1.0, points(100, 6000, noise=0.05))
    assert law.critical.low < 60 < law.critical.high
    assert law.critical.high / law.critical.low < 3


@pytest.mark.parametrize("count", [3, 4, 6, 12])
def test_intervals_of_few_points_hold_the_numbers_as_often_as_they_say(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Of 300 lines through points with normal noise 95 in 100 hold the slope; without Student's t 65 of four points."""
    monkeypatch.setattr(least_squares, "RESAMPLED", 300)
    matrix = np.stack([np.ones(count), np.arange(count)], 1)
    solved = np.linalg.inv(matrix.T @ matrix) @ matrix.T
    drawn = np.random.default_rng(4)
    held = 0

    def solve(values: least_squares.Array) -> least_squares.Array:
        return np.asarray(solved @ values, np.float64)

    def predict(p: least_squares.Array) -> least_squares.Array:
        return np.asarray(matrix @ p, np.float64)

    for _ in range(300):
        y = matrix @ np.array([1.0, 2.0]) + drawn.standard_normal(count)
        (slope,), _ = least_squares.fit_with_intervals(solve, predict, y, [lambda p: float(p[1])])
        held += slope.low <= 2 <= slope.high
    assert 0.91 < held / 300 < 0.99


def test_a_number_that_overflows_is_infinite() -> None:
    assert least_squares.exponential(1.0) == math.e
    assert least_squares.exponential(1e3) == math.inf


@pytest.mark.parametrize(
    ("steps", "samples", "says"),
    [
        (0.0, 4096.0, "the steps fall as much as the batch grows: all are below"),
        (100.0, 0.0, "the steps do not fall as the batch grows: all are beyond"),
    ],
)
def test_batches_on_one_side_of_the_critical_one_do_not_show_it(
    steps: float, samples: float, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        fit_batch(1.0, points(steps, samples))


def test_an_interval_of_the_critical_batch_may_have_no_end() -> None:
    """Where resampled fits leave it open whether the steps fall as much as the batch grows."""
    steps = [1000.0, 510, 240, 130]
    law = fit_batch(
        1.0, [Reached(str(b), s, s * b) for b, s in zip((1, 2, 4, 8), steps, strict=True)]
    )
    assert 8 < law.critical.value < math.inf
    assert law.critical.high == math.inf
    assert law.steps.low == 0
    assert law.samples.low > 800


def test_steps_that_grow_with_the_batch_follow_no_law() -> None:
    grown = [Reached(str(b), 10.0 * b, 10.0 * b * b) for b in (8, 16, 32)]
    with pytest.raises(ValueError, match="do not fall as the batch grows"):
        fit_batch(1.0, grown)


def test_one_batch_size_has_no_law() -> None:
    with pytest.raises(ValueError, match="two different batch sizes"):
        fit_batch(1.0, points(100, 6000)[:1] * 3)


def test_laws_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from trainc.runtime.fits.pictures import draw_batch, draw_transfer

    assert draw_transfer(fit_transfer(runs(0.1)), tmp_path / "transfer.png").stat().st_size > 5000
    assert (
        draw_batch(fit_batch(1.0, points(100, 6000, 0.05)), tmp_path / "batch.png").stat().st_size
        > 5000
    )
