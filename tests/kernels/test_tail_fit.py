"""Fits of spectra's tails, windows and the null: against published code, definitions and Gaussian matrices."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_spectrum import REFERENCE, weight
from trainc.functional import farms_alpha, hill_alpha, null_alpha, null_distance, spectrum
from trainc.kernels.parameter.tail_fit import fit_tail

PUBLISHED = {"goodness-of-fit": "dks", "fix-finger": "peak"}
WINDOWS = [
    (name, key)
    for name, found in REFERENCE["farms_img_alpha"].items()
    for key, known in found.items()
    if key.endswith("median") and "alpha" in known
]


@pytest.mark.parametrize(("published", "fit"), PUBLISHED.items())
@pytest.mark.parametrize("name", REFERENCE["inputs"])
def test_the_threshold_is_that_of_the_published_code(name: str, published: str, fit: Any) -> None:
    known = REFERENCE["tempbalance_alpha"][name][published]
    found = fit_tail(spectrum(weight(name)), fit, published_bound=True)
    assert found.alpha == pytest.approx(known["alpha"], rel=1e-4)
    assert found.distance == pytest.approx(known["D"], abs=1e-4)


def by_definition(values: list[float], index: int) -> tuple[float, float]:
    """Return the exponent and the distance at a threshold."""
    tail = values[index:]
    n = len(tail)
    alpha = 1 + n / sum(math.log(value / tail[0]) for value in tail)
    gaps = (abs(1 - (v / tail[0]) ** (1 - alpha) - j / n) for j, v in enumerate(tail))
    return alpha, max(gaps)


def test_fits_are_their_definition() -> None:
    values = spectrum(torch.randn(40, 30, generator=torch.Generator().manual_seed(0)))
    listed = values.tolist()
    fits = {i: by_definition(listed, i) for i in range(len(listed) - 1)}
    best = min(fits, key=lambda i: fits[i][1])
    found = fit_tail(values, "dks")
    assert (found.alpha, found.distance) == pytest.approx(fits[best])
    assert (found.xmin, found.count) == (listed[best], 30 - best)
    logs = [math.log10(value) for value in listed]
    width = (logs[-1] - logs[0]) / 100
    bins = [min(99, int((one - logs[0]) / width)) for one in logs]
    edge = 10 ** (logs[0] + width * max(range(100), key=bins.count))
    near = {i: one for i, one in fits.items() if 0.95 * edge <= listed[i] <= 1.5 * edge}
    assert 0 < len(near) < len(fits)
    found = fit_tail(values, "peak")
    assert (found.alpha, found.distance) == pytest.approx(
        min(near.values(), key=lambda one: one[1])
    )
    median = fit_tail(values, tail=1 / 3)
    assert (median.alpha, median.distance) == pytest.approx(fits[20])
    assert median.count == 10


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_the_median_of_a_weight_is_the_formula(convention: Any) -> None:
    known = REFERENCE["paper_vs_code_hill"]["values"]
    names = {"code": "code_formula_fp64", "paper": "paper_formula_k=floor(n/2)_lambda_{n-k}"}
    for name, values in known.items():
        found = hill_alpha(weight(name), convention=convention)
        assert found == pytest.approx(values[names[convention]], rel=1e-5), name


@pytest.mark.parametrize("fit", ["median", "dks", "peak"])
@pytest.mark.parametrize(
    "harm", ["zero", "nan", "infinite", "rank one", "equal", "one column", "one entry"]
)
def test_what_has_no_tail_has_no_exponent(fit: Any, harm: str) -> None:
    made: dict[str, Tensor] = {
        "zero": torch.zeros(8, 6),
        "nan": torch.randn(8, 6).index_fill(1, torch.tensor([2]), math.nan),
        "infinite": torch.full((8, 6), math.inf),
        "rank one": torch.outer(torch.arange(1.0, 9), torch.ones(6)),
        "equal": torch.eye(6),
        "one column": torch.randn(8, 1),
        "one entry": torch.ones(1, 1),
    }
    found = hill_alpha(made[harm], fit)
    assert math.isnan(found), found


def test_a_wrong_fraction_fit_or_shape_is_named() -> None:
    w = torch.randn(8, 6)
    for tail in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(ValueError, match="tail = "):
            hill_alpha(w, tail=tail)
    with pytest.raises(ValueError, match="fit = 'mode'"):
        hill_alpha(w, "mode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="convention = 'book'"):
        hill_alpha(w, convention="book")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2-D or 4-D"):
        spectrum(torch.randn(3))
    with pytest.raises(ValueError, match="2-D or 4-D"):
        farms_alpha(torch.randn(3, 3, 3))
    wrong: list[dict[str, Any]] = [{"rows": 0}, {"rows": 2.5}, {"aspect": math.inf}, {"ops": 1.5}]
    for sizes in wrong:
        with pytest.raises(ValueError, match="numbers above 0"):
            farms_alpha(w, **sizes)


@pytest.mark.parametrize(("name", "key"), WINDOWS)
def test_windows_are_those_of_the_published_code(name: str, key: str) -> None:
    rows, aspect, step, ops, _ = key.split("_")
    made = weight(name)
    found = farms_alpha(
        made,
        int(rows[4:]),
        float(aspect[1:]),
        None if ops == "opsNone" else int(ops[3:]),
        int(step[4:]),
    )
    # Where a window is larger than the weight the published image code takes windows of other shapes; its copy for
    # language models limits them.
    known = REFERENCE["farms_img_alpha"][name][key]
    if made.dim() == 2 and int(rows[4:]) > min(made.shape):
        known = REFERENCE["farms_llm_alpha"][name][key.replace("median", "xmin_mid")]
    assert found == pytest.approx(known["alpha"], rel=1e-5)


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_windows_keep_their_aspect_whatever_the_shape(aspect: float) -> None:
    """So the exponent of an iid weight is that of the aspect."""
    torch.manual_seed(0)
    for shape in ((96, 400), (400, 96), (200, 200)):
        found = farms_alpha(torch.randn(shape), 80, aspect)
        assert found == pytest.approx(null_alpha(min(aspect, 1 / aspect)), abs=0.08), shape


def test_the_null_is_the_table() -> None:
    for q, known in REFERENCE["mp_null"]["alpha_MP_null_by_q"].items():
        assert null_alpha(float(q)) == pytest.approx(
            known["x2"], abs=6e-5 if q != "0.3333" else 2e-4
        )
        assert null_alpha(float(q), 1 / 3) == pytest.approx(known["x1.5"], abs=2e-4)


@pytest.mark.parametrize(("q", "tail"), [(0.3, 0.4), (0.9, 0.75), (1.0, 0.1)])
def test_the_null_is_what_a_large_matrix_has(q: float, tail: float) -> None:
    w = torch.randn(round(600 / q), 600, generator=torch.Generator().manual_seed(1))
    assert hill_alpha(w, tail=tail) == pytest.approx(null_alpha(q, tail), rel=0.03)


@pytest.mark.parametrize("convention", ["code", "paper"])
@pytest.mark.parametrize(
    ("shape", "tail"), [((64, 64), 0.5), ((32, 128), 1 / 3), ((16, 16, 3, 3), 0.5)]
)
def test_distances_of_iid_weights_have_a_mean_of_0_and_a_spread_of_1(
    shape: tuple[int, ...], tail: float, convention: Any
) -> None:
    draw = torch.Generator().manual_seed(2)
    found = [
        null_distance(
            hill_alpha(torch.randn(shape, generator=draw), tail=tail, convention=convention),
            shape,
            tail,
            convention,
        )
        for _ in range(120)
    ]
    z = torch.tensor(found)
    assert abs(float(z.mean())) < (0.35 if len(shape) == 2 else 0.6)  # of 16 columns
    assert 0.75 < float(z.std()) < 1.35


def test_a_wrong_ratio_is_named() -> None:
    for q, tail in itertools.product((0.0, 1.5, math.nan), (0.5,)):
        with pytest.raises(ValueError, match="q = "):
            null_alpha(q, tail)
    with pytest.raises(ValueError, match="2-D or 4-D"):
        null_distance(2.0, (3,))


@pytest.mark.parametrize("fit", ["median", "dks"])
def test_scale_and_orthogonal_changes_leave_the_exponent(fit: Any) -> None:
    torch.manual_seed(3)
    w = torch.randn(60, 40, dtype=torch.float64) ** 3
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (60, 40))
    alpha = hill_alpha(w, fit)
    for other in (1e-8 * w, 1e6 * w, left @ w @ right, w.T):
        assert hill_alpha(other, fit) == pytest.approx(alpha, rel=1e-6)
