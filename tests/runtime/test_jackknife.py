"""The jackknife of one step: published numbers, leaving out by hand, closed forms."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.runtime import known
from trainc.runtime.noise_scale.estimate import UNDETERMINED, Estimate, Uncertainty
from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions
from trainc.runtime.noise_scale.geometry import l1_estimate
from trainc.runtime.noise_scale.interval import ratio_interval
from trainc.runtime.noise_scale.jackknife import Jackknife, jackknife

CASES = json.loads((Path(__file__).parents[1] / "reference/noise_scale.json").read_text())["cases"]
TINY = CASES["tiny_transformer_ln"]


def lcg(shape: list[int], seed: int, scale: float) -> Tensor:
    """Return the reference file's numbers, from its linear congruential generator."""
    x, values = seed & 0x7FFFFFFF, []
    for i in range(math.prod(shape) + 8):
        x = (1103515245 * x + 12345) & 0x7FFFFFFF
        if i >= 8:
            values.append(scale * (2 * (x >> 8) / 2**23 - 1))
    return torch.tensor(values, dtype=torch.float64).view(shape)


def tiny_parameters() -> dict[str, Tensor]:
    found = {}
    for i, (name, shape) in enumerate(TINY["inputs"]["param_shapes"].items()):
        is_norm = name.startswith("ln")
        values = lcg(shape, 1000 + i, 0.2 if is_norm else 0.5)
        found[name] = values + float(is_norm and name.endswith("weight"))
    return found


def tiny_loss(p: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of one sequence (T,) under the reference file's transformer."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (8,), p[f"{name}.weight"], p[f"{name}.bias"])

    x = F.embedding(ids, p["wte.weight"]) + p["wpe.weight"]
    qkv = F.linear(norm(x, "ln1"), p["attn.qkv.weight"], p["attn.qkv.bias"])
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(0, 1) for part in qkv.split(8, -1))
    blocked = torch.ones(6, 6, dtype=torch.bool).triu(1)
    weights = (q @ k.mT / 2).masked_fill(blocked, -math.inf).softmax(-1)
    mixed = (weights @ v).transpose(0, 1).flatten(1)
    x = x + F.linear(mixed, p["attn.proj.weight"], p["attn.proj.bias"])
    wide = F.gelu(F.linear(norm(x, "ln2"), p["fc1.weight"], p["fc1.bias"]))
    x = x + F.linear(wide, p["fc2.weight"], p["fc2.bias"])
    return F.cross_entropy(F.linear(norm(x, "lnf"), p["head.weight"]), targets)


@pytest.fixture(scope="module")
def tiny() -> dict[str, Tensor]:
    """Return the six sequences' contributions (6, numel) to every parameter, by autograd."""
    inputs, parameters = TINY["inputs"], tiny_parameters()
    ids, targets = torch.tensor(inputs["ids"]), torch.tensor(inputs["targets"])
    each = torch.func.vmap(torch.func.grad(tiny_loss), (None, 0, 0))(parameters, ids, targets)
    return {name: gradient.flatten(1) / 6 for name, gradient in each.items()}


def sixth() -> Tensor:
    return torch.full((6,), 1 / 6, dtype=torch.float64)


def of_norms(shares: dict[str, Tensor]) -> Tensor:
    return torch.cat([share for name, share in shares.items() if name.startswith("ln")], 1)


def test_published_errors_of_a_transformer(tiny: dict[str, Tensor]) -> None:
    sets = {"total": torch.cat(list(tiny.values()), 1), "norm_only": of_norms(tiny)}
    columns = [known.sq_norms(shares[None]) for shares in sets.values()]
    sq_norms, dots = (torch.cat([c[i] for c in columns], 1) for i in (0, 1))
    found = jackknife(sq_norms, dots, torch.cat([c[2] for c in columns]), sixth())
    for key, one in zip(sets, found, strict=True):
        expected = TINY["outputs"][key]
        assert one.estimate.noise_scale == pytest.approx(expected["gns"], rel=1e-10)
        assert one.standard_error == pytest.approx(expected["jackknife_se_gns"], rel=1e-10)


def test_published_estimates_of_every_parameter(tiny: dict[str, Tensor]) -> None:
    for name, expected in TINY["outputs"]["per_param"].items():
        sq_norms, dots, batch = known.sq_norms(tiny[name][None])
        assert sq_norms[:, 0].mul(36).tolist() == pytest.approx(expected["pe_sqnorm"], rel=1e-10)
        estimate = jackknife(sq_norms, dots, batch, sixth())[0].estimate
        assert estimate == pytest.approx((expected["gtg"], expected["trsigma"]), rel=1e-10)


def test_the_published_l1_noise_scale(tiny: dict[str, Tensor]) -> None:
    shares = of_norms(tiny)
    found = l1_estimate(shares, shares.sum(0), sixth())
    expected = TINY["outputs"]["norm_only"]["l1_gns_plugin"]
    assert found.noise_scale == pytest.approx(expected, rel=1e-10)


def by_hand(gradients: Tensor, weights: Tensor, groups: list[list[int]]) -> Jackknife:
    """Leave out each group of examples and estimate from the vectors of the others."""

    def estimate(kept: list[list[int]]) -> Estimate:
        w = weights / sum(float(weights[g].sum()) for g in kept)
        shares = [(w[g, None] * gradients[g]).sum(0) for g in kept]
        q = sum(float(w[g].sum()) ** 2 for g in kept)
        examples = sum(float(w[g].square().sum()) for g in kept)
        s1 = sum(float(share.square().sum()) for share in shares)
        batch = float(torch.stack(shares).sum(0).square().sum())
        return noise_scale_from_contributions(s1, batch, q, examples)

    rest = [estimate(groups[:i] + groups[i + 1 :]) for i in range(len(groups))]
    parts = torch.tensor(
        [[e.signal, e.noise, e.noise / e.signal] for e in rest], dtype=torch.float64
    )
    matrix = torch.cov(parts.T) * (len(groups) - 1) ** 2 / len(groups)
    (signal, covariance, _), (_, noise, _), (_, _, ratio) = matrix.tolist()
    uncertainty = Uncertainty(signal, noise, covariance, len(groups) - 1.0)
    return Jackknife(estimate(groups), uncertainty, math.sqrt(ratio))


@given(
    st.lists(st.lists(st.floats(0.1, 5), min_size=1, max_size=3), min_size=3, max_size=6),
    st.integers(0, 1000),
)
def test_it_equals_leaving_out_by_hand(lengths: list[list[float]], seed: int) -> None:
    weights = torch.tensor([length for group in lengths for length in group], dtype=torch.float64)
    weights /= weights.sum()
    each = known.gradients(1, len(weights), seed)[0]
    ends = torch.tensor([0, *map(len, lengths)]).cumsum(0).tolist()
    groups = [list(range(a, b)) for a, b in pairwise(ends)]
    shares = torch.stack([(weights[g, None] * each[g]).sum(0) for g in groups])
    sq_norms, dots, batch = known.sq_norms(shares[None])
    of_groups = torch.stack([weights[g].sum() for g in groups])
    of_examples = torch.stack([weights[g].square().sum() for g in groups])
    found = jackknife(sq_norms, dots, batch, of_groups, of_examples)[0]
    expected = by_hand(each, weights, groups)
    assert found.estimate == pytest.approx(expected.estimate, rel=1e-9, abs=1e-9)
    assert found.uncertainty == pytest.approx(expected.uncertainty, rel=1e-7, abs=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-6)


def test_the_estimators_variances_and_the_jackknifes_excess() -> None:
    # Closed forms for Gaussian gradients of n examples; the jackknife counts the pairs' part twice.
    n, steps = 12, 20_000
    sq_norms, dots, batch = known.sq_norms(known.gradients(steps, n, seed=5) / n)
    found = jackknife(sq_norms, dots, batch, torch.full((n,), 1 / n, dtype=torch.float64))
    parts = torch.tensor([one.estimate for one in found], dtype=torch.float64)
    uncertainties = torch.tensor([one.uncertainty[:3] for one in found], dtype=torch.float64)
    pairs = 2 * known.TRACE_OF_SQUARE / (n * (n - 1))
    variances = [4 * known.ALONG_MEAN / n + pairs, 2 * known.TRACE_OF_SQUARE / (n - 1)]
    twice = 2 * pairs * (n - 1) / (n - 2)
    jackknifed = [4 * known.ALONG_MEAN / n + twice, 2 * known.TRACE_OF_SQUARE / (n - 2)]
    for i in (0, 1):
        deviations = (parts[:, i] - parts[:, i].mean()).square()
        assert_mean(deviations, variances[i])
        assert_mean(uncertainties[:, i], jackknifed[i])
    signal, noise = (parts - parts.mean(0)).T
    # tr(Sigma) of Gaussians varies independently of their mean, |G|^2 is |mean|^2 - tr(Sigma) / n.
    assert_mean(signal * noise, -2 * known.TRACE_OF_SQUARE / (n * (n - 1)), within=0.1)


def assert_mean(values: Tensor, expected: float, within: float = 0.05) -> None:
    """Hold the mean to four of its standard errors, which must be below a part of it."""
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) < 4 * error
    assert error < within * abs(expected)


@pytest.mark.parametrize("size", [2, 4])
def test_variances_of_groups(size: int) -> None:
    n, steps = 16, 20_000
    each = known.gradients(steps, n, seed=7)
    sq_norms, _, batch = known.sq_norms(each.unflatten(1, (-1, size)).sum(2) / n)
    q, examples = size / n, 1 / n
    found = [
        noise_scale_from_contributions(s1, s, q, examples)
        for s1, s in zip(sq_norms.sum(0).tolist(), batch.tolist(), strict=True)
    ]
    signal, noise = torch.tensor(found, dtype=torch.float64).T
    assert abs(float(signal.mean()) - 6) < 4 * float(signal.std()) / steps**0.5
    assert abs(float(noise.mean()) - 14) < 4 * float(noise.std()) / steps**0.5
    pairs = 2 * known.TRACE_OF_SQUARE / (n * (n - size))
    assert_mean((signal - signal.mean()).square(), 4 * known.ALONG_MEAN / n + pairs)
    assert_mean((noise - noise.mean()).square(), pairs * n * size)


@pytest.mark.parametrize("lengths", [[1.0] * 24, [1.0, 2.0, 4.0] * 8])
def test_the_interval_covers_the_truth_at_its_rate(lengths: list[float]) -> None:
    steps, level = 4000, 0.9
    weights = torch.tensor(lengths, dtype=torch.float64)
    weights = weights / weights.sum()
    covered = {}
    for mean in (1.0, 0.1):
        each = known.gradients(steps, len(weights), seed=11, mean=mean)
        found = jackknife(*known.sq_norms(weights[:, None] * each), weights)
        true = known.TRACE / (6 * mean**2)
        bounds = [ratio_interval(one.estimate, one.uncertainty, level) for one in found]
        assert all(0 <= low <= high for low, high in bounds)
        covered[mean] = sum(low <= true <= high for low, high in bounds) / steps
    margin = 4 * math.sqrt(level * (1 - level) / steps)
    assert abs(covered[1.0] - level) < margin
    assert covered[0.1] > level - margin


def test_examples_without_weight_do_not_count() -> None:
    shares = known.gradients(1, 5, seed=2) / 5
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    sq_norms, dots, batch = known.sq_norms(shares)
    plain = jackknife(sq_norms, dots, batch, weights)[0]
    zero = torch.zeros(2, dtype=torch.float64)
    more_sq_norms, more_dots = (torch.cat([t, zero[:, None]]) for t in (sq_norms, dots))
    (padded,) = jackknife(more_sq_norms, more_dots, batch, torch.cat([weights, zero]))
    assert padded.uncertainty == pytest.approx(plain.uncertainty, rel=1e-12)
    assert padded.standard_error == pytest.approx(plain.standard_error, rel=1e-12)


def test_two_examples_have_an_estimate_and_no_uncertainty() -> None:
    sq_norms, dots, batch = known.sq_norms(known.gradients(1, 2, seed=2) / 2)
    half = torch.full((2,), 0.5)
    found = jackknife(sq_norms, dots, batch, half)[0]
    assert math.isfinite(found.estimate.noise)
    assert math.isnan(found.uncertainty.noise_variance)
    assert math.isnan(found.standard_error)
    (single,) = jackknife(sq_norms[:1], dots[:1], batch, torch.ones(1))
    assert single.estimate is UNDETERMINED
    assert math.isnan(single.uncertainty.signal_variance)


def test_two_examples_and_a_tiny_one_have_no_uncertainty_either() -> None:
    sq_norms, dots, batch = known.sq_norms(known.gradients(1, 3, seed=2) / 3)
    weights = torch.tensor([0.5, 0.5 - 1e-9, 1e-9], dtype=torch.float64)
    found = jackknife(sq_norms, dots, batch, weights)[0]
    assert math.isfinite(found.estimate.noise)
    assert math.isnan(found.uncertainty.noise_variance)


def test_shapes_that_do_not_fit_are_refused() -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    column = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"dots has shape \(3, 1\), expected \(2, 1\)"):
        jackknife(column, torch.ones(3, 1), one, two)
    with pytest.raises(ValueError, match=r"batch_sq_norms has shape \(2,\), expected \(1,\)"):
        jackknife(column, column, two, two)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\), expected \(2,\)"):
        jackknife(column, column, one, three / 3)
    with pytest.raises(ValueError, match="sum_sq_example_weights has shape"):
        jackknife(column, column, one, two / 2, three)
    with pytest.raises(ValueError, match=r"sq_norms has shape \(2,\), expected two axes"):
        jackknife(two, two, two, two)
    with pytest.raises(ValueError, match="weights sum to 2, expected 1"):
        jackknife(column, column, one, two)
