"""Spectra and Hill exponents against published code, closed forms and singular values."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainc.functional import (
    hill_alpha,
    log_alpha,
    null_distance,
    spectral_entropy,
    spectral_norm,
    stable_rank,
)
from trainc.kernels.parameter.figures import measure
from trainc.kernels.parameter.spectrum import MEDIAN, Hill, alphas, count, matrices, spectra
from trainc.kernels.parameter.tail_fit import Fit

REFERENCE = json.loads((Path(__file__).parents[1] / "reference/layer_rates.json").read_text())
# (rows of the table) x (positions of xmin): the fits that take the median and its like.
MEDIANS = [(name, x) for name in REFERENCE["inputs"] for x in ("2", "1.5", "4")]


def weight(name: str) -> Tensor:
    """Return an input of the reference as its recipe says."""
    shape = tuple(REFERENCE["inputs"][name]["shape"])
    draw: dict[str, Callable[[], Any]] = {
        "gauss_128x64": lambda: np.random.RandomState(0).standard_normal(shape) * 0.05,
        "gauss_256x256": lambda: np.random.RandomState(2).standard_normal(shape) * 0.02,
        "student_t2.5_192x96": lambda: np.random.RandomState(3).standard_t(2.5, shape) * 0.02,
        "powerlaw_sv_i^-0.75_96x96": powerlaw,
        "conv_16x8x3x3": lambda: np.random.RandomState(6).standard_normal(shape) * 0.1,
        "gauss_300x200": lambda: np.random.RandomState(10).standard_normal(shape) * 0.05,
    }
    return torch.from_numpy(draw[name]().astype(np.float32))


def powerlaw() -> Any:
    random = np.random.RandomState(5)

    def orthogonal() -> Any:
        q, r = np.linalg.qr(random.standard_normal((96, 96)))
        return q * np.sign(np.diag(r))

    left = orthogonal()
    return (left * np.arange(1, 97) ** -0.75) @ orthogonal()


@pytest.mark.parametrize("name", REFERENCE["inputs"])
def test_inputs_are_those_of_the_reference(name: str) -> None:
    known, found = REFERENCE["inputs"][name], weight(name).double()
    assert float(found.square().sum()) == pytest.approx(known["sumsq"])
    assert found.flatten()[:4].tolist() == pytest.approx(known["first4"])


@pytest.mark.parametrize(("name", "position"), MEDIANS)
def test_alpha_is_that_of_the_published_code(name: str, position: str) -> None:
    known = REFERENCE["tempbalance_alpha"][name][f"median_x{position}"]
    (spectrum,) = spectra([weight(name)])
    assert Hill(float(position)).alpha(spectrum) == pytest.approx(known["alpha"], rel=1e-4)
    assert len(spectrum) == known["eigs_num"] == count(weight(name).shape)
    assert float(spectrum[-1]) == pytest.approx(known["spectral_norm(=max eig)"], rel=1e-5)
    assert float(spectrum.sum()) == pytest.approx(known["norm(=sum eigs)"], rel=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, v in REFERENCE["tempbalance_alpha"].items() if "eigs_ascending" in v]
)
def test_eigenvalues_are_those_of_the_published_code(name: str) -> None:
    known = REFERENCE["tempbalance_alpha"][name]["eigs_ascending"]
    assert spectra([weight(name)])[0].tolist() == pytest.approx(known, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", REFERENCE["paper_vs_code_hill"]["values"])
def test_code_and_paper_count_the_threshold_differently(name: str) -> None:
    known = REFERENCE["paper_vs_code_hill"]["values"][name]
    tensor = weight(name).double()
    paper, code = (alphas([tensor], Hill(convention=c))[0] for c in ("paper", "code"))
    assert code == pytest.approx(known["code_formula_fp64"], rel=1e-6)
    assert paper == pytest.approx(known["paper_formula_k=floor(n/2)_lambda_{n-k}"], rel=1e-6)


def test_eigenvalues_that_fall_as_a_power_have_a_closed_form() -> None:
    """alpha = 1 + k / (p (k ln k - ln k!)) for eigenvalues i^-p."""
    known = REFERENCE["analytic"]["powerlaw_sv_i^-0.75_96x96"]["expected_alpha_code"]
    k, p = 48, 1.5
    closed = 1 + k / (p * (k * math.log(k) - math.lgamma(k + 1)))
    assert closed == pytest.approx(known)
    spectrum = torch.arange(96, 0, -1, dtype=torch.float64) ** -p
    assert MEDIAN.alpha(spectrum) == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "known"), REFERENCE["mp_null"]["gaussian_check_mean_std_theory"].items()
)
def test_gaussian_matrices_have_the_exponent_of_their_aspect(
    shape: str, known: list[float]
) -> None:
    rows, columns = map(int, shape.split("x"))
    torch.manual_seed(0)
    found = alphas([torch.randn(rows, columns) for _ in range(4)])
    mean, deviation, _ = known
    assert sum(found) / 4 == pytest.approx(mean, abs=2.5 * deviation)


def by_definition(tensor: Tensor) -> Tensor:
    w = tensor.double()
    stack = w.flatten(2).permute(2, 0, 1) * math.sqrt(0.5) if w.dim() == 4 else w
    ascending: Tensor = torch.linalg.svdvals(stack).square().flatten().sort().values
    return ascending


@given(
    st.integers(0, 2**31),
    st.integers(4, 40),
    st.integers(4, 40),
    st.sampled_from([(), (1, 1), (3, 3), (2, 5)]),
    st.floats(0, 9),
    st.sampled_from([Hill(), Hill(1.5), Hill(2, "paper")]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e25]),
)
def test_alpha_is_that_of_singular_values(
    seed: int,
    rows: int,
    columns: int,
    kernel: tuple[int, ...],
    decades: float,
    hill: Hill,
    unit: float,
) -> None:
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, *kernel, generator=random, dtype=torch.float64)
    tensor *= torch.logspace(0, -decades, rows, dtype=torch.float64).view(
        -1, *[1] * (tensor.dim() - 1)
    )
    tensor = (tensor * unit).float()
    expected = by_definition(tensor)
    assume(expected[hill.tail(len(expected))[0]] > 1e-11 * expected[-1])
    assert alphas([tensor], hill) == [pytest.approx(hill.alpha(expected), rel=1e-3)]


def test_equal_shapes_and_transposes_are_measured_together_and_in_order() -> None:
    torch.manual_seed(0)
    shapes = [(60, 60), (60, 80), (80, 60), (12, 10, 3, 3), (60, 60), (10, 12, 3, 3)]
    tensors = [torch.randn(shape) for shape in shapes]
    together, alone = alphas(tensors), [alphas([t])[0] for t in tensors]
    assert together == pytest.approx(alone, rel=1e-6)
    assert together[1] == pytest.approx(MEDIAN.alpha(by_definition(tensors[1].T)), rel=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64]
)
def test_weights_of_any_precision_are_measured(dtype: torch.dtype) -> None:
    tensor = weight("gauss_128x64").to(dtype)
    assert alphas([tensor])[0] == pytest.approx(MEDIAN.alpha(by_definition(tensor)), rel=1e-5)


def test_complex_weights_have_the_squares_of_their_singular_values() -> None:
    weight = torch.randn(9, 6, dtype=torch.complex128)
    expected = torch.linalg.svdvals(weight).square().flip(0)
    torch.testing.assert_close(spectra([weight])[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fit", ["median", "dks", "peak"])
def test_orthogonal_weights_have_no_tail(fit: Fit, dtype: torch.dtype) -> None:
    """All their singular values are 1: what these differ by is rounding, of which alpha would be a million."""
    random = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    square = nn.init.orthogonal_(torch.empty(96, 96, dtype=wide), generator=random).to(dtype)
    assert math.isnan(hill_alpha(3 * square, fit))
    assert math.isnan(hill_alpha(square[:, :48], fit))
    figures = measure({"wide": square[None, :48]}, fit)["wide"]
    assert math.isnan(figures.alpha)
    assert figures.stable_rank == pytest.approx(48, rel=0.01)
    # A spread that training makes counts, also in 16 bits.
    assert math.isfinite(hill_alpha(square * torch.linspace(1, 1.1, 96).to(dtype), fit))


def test_weights_without_values_or_storage_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="meta device"):
        hill_alpha(torch.ones(8, 8, device="meta"))
    with pytest.raises(ValueError, match="to_dense"):
        hill_alpha(torch.eye(8).to_sparse())


def test_what_cannot_be_measured_is_nan_and_disturbs_nothing_else() -> None:
    torch.manual_seed(0)
    good = torch.randn(64, 64)
    low_rank = torch.randn(64, 8) @ torch.randn(8, 64)
    broken, infinite = good.clone(), good.clone()
    broken[3, 4], infinite[0, 0] = math.nan, math.inf
    found = alphas([torch.zeros(64, 64), good, low_rank, broken, infinite, torch.eye(64)])
    assert [math.isnan(alpha) for alpha in found] == [True, False, True, True, True, True]
    assert found[1] == alphas([good])[0]


@pytest.mark.parametrize("name", REFERENCE["inputs"])
def test_other_figures_are_those_of_the_published_code(name: str) -> None:
    known, one = REFERENCE["tempbalance_alpha"][name]["median_x2"], weight(name)
    (found,) = measure({name: matrices(one)}).values()
    assert log_alpha(one) == pytest.approx(known["alphahat"], rel=1e-4, abs=1e-6)
    assert found.log_alpha == pytest.approx(known["alphahat"], rel=1e-4, abs=1e-6)
    largest, total = known["spectral_norm(=max eig)"], known["norm(=sum eigs)"]
    assert spectral_norm(one) == pytest.approx(math.sqrt(largest), rel=1e-5)
    assert found.spectral_norm == pytest.approx(math.sqrt(largest), rel=1e-5)
    assert stable_rank(one) == pytest.approx(total / largest, rel=1e-5)
    assert found.stable_rank == pytest.approx(total / largest, rel=1e-5)
    parts = by_definition(one) / by_definition(one).sum()
    entropy = -float((parts * parts.log()).sum()) / math.log(len(parts))
    assert spectral_entropy(one) == pytest.approx(entropy, rel=1e-5)
    assert found.entropy == pytest.approx(entropy, rel=1e-5)
    distance = null_distance(found.alpha, tuple(one.shape))
    assert found.null_distance == pytest.approx(distance, rel=1e-9)


def test_figures_have_their_values_where_they_are_known() -> None:
    equal = measure({"": torch.eye(6)[None] * 3})[""]
    assert equal.stable_rank == pytest.approx(6)
    assert equal.entropy == pytest.approx(1)
    assert equal.spectral_norm == pytest.approx(3)
    single = measure({"": torch.ones(1, 4, 5)})[""]
    assert single.stable_rank == pytest.approx(1)
    assert single.spectral_norm == pytest.approx(math.sqrt(20))
    assert single.entropy == pytest.approx(0, abs=1e-5)
    assert math.isnan(single.alpha)


def test_rows_and_columns_of_zeros_do_not_count() -> None:
    torch.manual_seed(0)
    small = torch.randn(2, 40, 30)
    padded = torch.zeros(2, 64, 50)
    rows, columns = torch.randperm(64)[:40], torch.randperm(50)[:30]
    padded[:, rows[:, None], columns] = small
    found, expected = measure({"padded": padded, "small": small}).values()
    assert (found.spectrum.rows, found.spectrum.columns) == (40, 30)
    assert found.eigenvalues == 60
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-5)
    assert found.null_distance == pytest.approx(expected.null_distance, rel=1e-4)
    nothing = measure({"": torch.zeros(1, 8, 8)})[""]
    assert nothing.eigenvalues == 0
    assert all(map(math.isnan, (nothing.alpha, nothing.stable_rank, nothing.entropy)))


def test_weights_that_are_not_finite_are_named() -> None:
    bad = torch.randn(1, 5, 5)
    bad[0, 2, 3] = math.inf
    with pytest.raises(ValueError, match=r"`fc2\.weight` has entries that are not finite"):
        measure({"fc1.weight": torch.randn(1, 5, 5), "fc2.weight": bad})
