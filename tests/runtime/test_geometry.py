"""Noise scales in the optimizer's geometry, against vectors written out."""

import math

import pytest
import torch

from tests.runtime import known
from trainc.runtime.noise_scale.estimate import UNDETERMINED
from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions
from trainc.runtime.noise_scale.geometry import l1_estimate, preconditioned_norms
from trainc.runtime.noise_scale.jackknife import jackknife


def equal(count: int) -> torch.Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def test_no_preconditioning_is_the_simple_noise_scale() -> None:
    shares = known.gradients(1, 6, seed=1)[0] / 6
    found = preconditioned_norms(shares, shares.sum(0), torch.ones(3))
    sq_norms, dots, batch = known.sq_norms(shares[None])
    torch.testing.assert_close(found.sq_norms, sq_norms[:, 0])
    torch.testing.assert_close(found.dots, dots[:, 0])
    torch.testing.assert_close(found.batch_sq_norm, batch[0])


def test_preconditioned_parts_are_unbiased() -> None:
    """With P = 1 / (sqrt(v) + eps) they are |P G|^2 and tr(P Sigma P)."""
    count, steps = 5, 4000
    scale = 1 / (torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64).sqrt() + 1e-8)
    shares = known.gradients(steps, count, seed=2) / count
    found = [preconditioned_norms(c, c.sum(0), scale) for c in shares]
    parts = torch.tensor(
        [
            noise_scale_from_contributions(
                float(f.sq_norms.sum()), float(f.batch_sq_norm), 1 / count
            )
            for f in found
        ],
        dtype=torch.float64,
    )
    truth = (known.MEAN * scale).square().sum(), (known.DEVIATION * scale).square().sum()
    for values, true in zip(parts.T, truth, strict=True):
        error = float(values.std()) / steps**0.5
        assert abs(float(values.mean()) - float(true)) < 4 * error
        assert error < 0.03 * float(true)
    first = found[0]
    sq_norms, dots = first.sq_norms[:, None], first.dots[:, None]
    (one,) = jackknife(sq_norms, dots, first.batch_sq_norm[None], equal(count))
    assert one.estimate == pytest.approx(parts[0].tolist(), rel=1e-12)


def test_half_precision_gradients_are_squared_in_single() -> None:
    shares = torch.full((2, 4), 1e-4, dtype=torch.float16)
    found = preconditioned_norms(shares, shares.sum(0), torch.ones(4))
    assert found.sq_norms.dtype == torch.float32
    assert float(found.sq_norms[0]) == pytest.approx(4e-8, rel=1e-3)


def test_the_l1_form_is_bessels_variance_entry_by_entry() -> None:
    gradients = known.gradients(1, 7, seed=3)[0]
    found = l1_estimate(gradients / 7, gradients.mean(0), equal(7))
    assert found.noise == pytest.approx(float(gradients.std(0).sum()) ** 2, rel=1e-12)
    assert found.signal == pytest.approx(float(gradients.mean(0).abs().sum()) ** 2, rel=1e-12)
    padded = torch.cat([gradients / 7, torch.zeros(1, 3)])
    weights = torch.cat([equal(7), torch.zeros(1, dtype=torch.float64)])
    assert l1_estimate(padded, gradients.mean(0), weights) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [1, 2, 3], [2, 2, 2, 2]])
def test_entries_variances_are_unbiased_for_unequal_groups(sizes: list[int]) -> None:
    """One entry alone, so that the sum's square is the variance itself."""
    lengths = torch.tensor([1.0, 2.0, 4.0] * sum(sizes), dtype=torch.float64)[: sum(sizes)]
    weights = lengths / lengths.sum()
    each = known.gradients(3000, len(weights), seed=4)[:, :, 1:2]
    parts = (weights[:, None] * each).split(sizes, 1)
    shares = torch.stack([part.sum(1) for part in parts], 1)
    of_groups = torch.stack([w.sum() for w in weights.split(sizes)])
    of_examples = torch.stack([w.square().sum() for w in weights.split(sizes)])
    found = [l1_estimate(c, c.sum(0), of_groups, of_examples).noise for c in shares]
    values = torch.tensor(found, dtype=torch.float64)
    assert abs(float(values.mean()) - 4) < 4 * float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("width", [0.0, 0.1, 0.5])
def test_the_l1_form_saturates_at_half_pi_times_the_batch(width: float) -> None:
    """Of entries G_i ~ Normal(0, width^2) with sigma_i = 1 the true ratio is pi / (2 width^2)."""
    count = 32
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn((count + 1, 20_000), generator=generator, dtype=torch.float64)
    gradients = normal[1:] + width * normal[0]
    found = l1_estimate(gradients / count, gradients.mean(0), equal(count))
    inverse = 2 / math.pi * (width**2 + 1 / count)
    assert 1 / found.noise_scale == pytest.approx(inverse, rel=0.05)


def test_one_example_has_no_variance() -> None:
    assert l1_estimate(torch.ones(1, 3), torch.ones(3), torch.ones(1)) is UNDETERMINED
    two = torch.ones(2, 3)
    assert l1_estimate(two, torch.ones(3), torch.tensor([1.0, 0.0])) is UNDETERMINED


def test_shapes_that_do_not_fit_are_refused() -> None:
    gradients, entries, rows = torch.ones(2, 3), torch.ones(3), torch.ones(2)
    with pytest.raises(
        ValueError,
        match=r"gradients has shape \(3,\), expected two axes: a row for each contribution",
    ):
        preconditioned_norms(entries, entries, entries)
    with pytest.raises(ValueError, match=r"batch_gradient has shape \(2,\), expected \(3,\)"):
        preconditioned_norms(gradients, rows, entries)
    with pytest.raises(ValueError, match=r"preconditioner has shape \(2,\), expected \(3,\)"):
        preconditioned_norms(gradients, entries, rows)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\), expected \(2,\)"):
        l1_estimate(gradients, entries, entries)
    with pytest.raises(
        ValueError, match=r"sum_sq_example_weights has shape \(3,\), expected \(2,\)"
    ):
        l1_estimate(gradients, entries, rows, entries)
