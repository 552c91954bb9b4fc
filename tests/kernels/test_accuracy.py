"""Every operator against float64 on hard inputs: errors at most those of the ATen composition.

The table behind this is `python -m benchmarks.accuracy`; errors are in units in the last place.
"""

import functools
import math
from typing import Any

import pytest
import torch

import trainc.functional
from benchmarks.accuracy import DTYPES, FLOOR, rows, text, ulp, worst
from benchmarks.accuracy_cases import CASES, Case
from benchmarks.adversarial import FAMILIES, LOGITS

# Sums in another order differ by chance: twice the largest error is no loss, a tenth more of root
# mean square is. A unit is what a result takes that is rounded twice, whoever computes it.
LARGEST, RMS, UNIT = 2.0, 1.1, 1.0
# The logarithm of a ratio of two root mean squares of n errors scatters by 1 / sqrt(n) or so. Five
# times that, so that neither other seeds nor a processor that adds in another order decide.
CHANCE = 5.0
# Where ATen has lost six bits, one or two roundings decide, magnified by the problem.
LOST, OF_LOST = 64.0, 32.0

# What is worse than that, by (operator, result, family): the bounds that hold, and why.
Known = dict[tuple[str, str, str], tuple[float, float, str]]
ONE_PASS = "in 16 bits: the mean is y's, ATen's of one pass; the composition takes its own by two"
ROWS = "examples of many rows are summed row by row, not pairwise"
DENORMAL = "squares of gradients, 1e-40, are denormal before they meet those of x"
ONE_VALUE = (
    "rows of one value: exactly nothing is left of them, but for the last bit of a one-pass mean"
)
NOISE = "views are equal but for rounding: the last bits of their logits decide"
KNOWN: Known = {
    ("layer_norm", "norms", "large mean"): (200.0, 120.0, ONE_PASS),
    ("group_norm", "norms", "large mean"): (20.0, 20.0, ONE_PASS),
    ("rms_norm", "dweight", "*"): (8.0, 2.0, ROWS),
    ("rms_norm", "norms", "*"): (4.0, 2.0, ROWS),
    ("linear", "norms", "small gradients"): (4.0, 3.5, DENORMAL),
    ("layer_norm", "dweight", "tiny variance"): (math.inf, math.inf, ONE_VALUE),
}
for _result in ("dx", "dweight", "dbias", "consistency", "dlambda"):
    KNOWN["linear_cross_entropy_consistency", _result, "tiny variance"] = (
        math.inf,
        math.inf,
        NOISE,
    )


def bounds(found: dict[str, Any]) -> tuple[float, float]:
    """How much larger than ATen's the largest error and the root mean square may be."""
    place, lost = (found["operator"], found["result"]), found["aten"]["max"] > LOST
    least = (OF_LOST, OF_LOST) if lost else (LARGEST, RMS)
    for family in (found["family"], "*"):
        if (known := KNOWN.get((*place, family))) is not None:
            return max(known[0], least[0]), max(known[1], least[1])
    return least


def acceptable(found: dict[str, Any]) -> bool:
    """Whether a row of the table holds its bounds and is finite where ATen's result is."""
    chance = math.exp(CHANCE / math.sqrt(max(found["entries"], 1)))
    return not found["lost"] and all(
        found["ours"][which] <= chance * bound * max(found["aten"][which], UNIT)
        for which, bound in zip(("max", "rms"), bounds(found), strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_errors_are_at_most_those_of_aten(case: Case, dtype: torch.dtype) -> None:
    found = rows(case, dtype, draws=1 if case.size.rows > 64 else 2)  # many rows are a sample
    assert len(found) == len(case.families) * len(case.results)
    worse = [text(one) for one in found if not acceptable(one)]
    assert not worse, "\n".join(worse)


# Two calls that only together have the norms of one gradient.
TOGETHER = {"tied_embedding", "tied_linear"}


def test_every_operator_has_a_case() -> None:
    registered = {name for name in trainc.functional.__all__ if hasattr(torch.ops.trainc, name)}
    assert {case.operator for case in CASES} == registered - TOGETHER


def test_families_are_what_they_say() -> None:
    z = torch.randn(6, 5, 40, dtype=torch.float64)
    for dtype in DTYPES:
        made = {name: make(z, dtype).to(dtype) for name, make in LOGITS.items()}
        limits = torch.finfo(dtype)
        assert all(one.isfinite().all() and one.shape == z.shape for one in made.values())
        assert made["denormal"].count_nonzero() > 0
        assert made["denormal"].abs().median() < limits.tiny
        assert made["zeros"].count_nonzero() == 0
        assert made["large mean"].double().mean() > 900
        deviation = made["tiny variance"].double().std(-1)
        assert deviation.max() < 1e-2
        assert made["tiny variance"].double().std() > 0.1
        assert made["huge entry"].abs().max() >= 1e10 or dtype == torch.float16
        top = made["confident"].double().topk(2, -1).values
        assert (top[..., 0] - top[..., 1]).min() > 50
    assert made["wide range"].double().flatten(1).std(1).log10().diff().min() > 0.5
    squares = LOGITS["large"](z, torch.float32).float().square()
    assert squares.isfinite().all()
    assert squares.max() > 1e36
    assert set(FAMILIES) < set(LOGITS)


def test_units_follow_the_scale_of_what_they_are_part_of() -> None:
    by_name = {case.name: functools.partial(ulp, case) for case in CASES}
    exact = torch.tensor([[4.0, -1.0], [0.0, 0.5]], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    unit = by_name["layer_norm"]
    assert unit("y", exact, torch.float32).tolist() == [[4 * eps] * 2, [eps / 2] * 2]
    assert unit("dweight", exact, torch.float32).tolist() == [[4 * eps] * 2] * 2
    smallest = torch.finfo(torch.float32).tiny * eps
    apart = by_name["linear, gram"]("norms", exact, torch.float32)
    assert apart.tolist() == [[4 * eps, eps], [smallest, eps / 2]]


def test_ratios_count_rounding_as_no_error() -> None:
    case = next(case for case in CASES if case.operator == "masked_update_")
    found = rows(case, torch.float32, draws=1)
    assert all(one["ratio"] == {"max": 0.0, "rms": 0.0} for one in found)
    (line,) = worst(found).values()
    assert set(line) == set(case.families)
    assert FLOOR == 0.5
