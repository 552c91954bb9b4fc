"""How far alpha can move with a weight: no change within the bound leaves the range, whatever its direction."""

import math

import pytest
import torch
from torch import Tensor

from trainc.kernels.parameter.alpha_bound import allowed_change, alpha_range
from trainc.kernels.parameter.spectrum import Hill, matrices

HILLS = (Hill(), Hill(1.5), Hill.of_tail(0.5, "paper"))


def eigenvalues(weight: Tensor) -> Tensor:
    found: Tensor = torch.linalg.svdvals(matrices(weight)).square().flatten().sort().values
    return found


def directions(weight: Tensor, source: torch.Generator) -> list[Tensor]:
    """Random entries, one random direction, the weight itself, and those that move single values near the threshold."""
    rows = torch.randn(weight.shape[0], *[1] * (weight.dim() - 1), generator=source).double()
    found = [torch.randn(weight.shape, generator=source).double(), rows * weight[:1], weight]
    if weight.dim() == 2:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        middle = len(values) // 2
        for first, last in ((middle, middle + 1), (middle - 1, middle + 2), (0, middle)):
            found.append(left[:, first:last] @ right[first:last])
    return [sign * one / one.norm() for one in found for sign in (1, -1)]


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (12, 48), (8, 6, 3, 3)])
def test_no_change_within_a_norm_leaves_the_range(shape: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=source).double()
    before = eigenvalues(weight)
    for hill in HILLS:
        at = math.sqrt(float(before[hill.tail(len(before))[0]]))
        tight = 0.0
        for part in (1e-3, 3e-2, 0.3, 0.9):
            least, most = alpha_range(before, part * at, hill)
            assert least <= hill.alpha(before) <= most
            for one in directions(weight, source):
                alpha = hill.alpha(eigenvalues(weight + part * at * one))
                assert least - 1e-9 <= alpha <= most + 1e-9
                moved = alpha - hill.alpha(before)
                room = (most if moved > 0 else least) - hill.alpha(before)
                tight = max(tight, moved / room)
        assert tight > 0.05  # a range that is never used would let nothing be skipped
        assert alpha_range(before, at, hill) == (1.0, math.inf)


@pytest.mark.parametrize("tolerance", [1e-3, 0.05])
def test_the_allowed_change_is_the_largest_for_a_tolerance(tolerance: float) -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(6)).double()
    before = eigenvalues(weight)
    for hill in HILLS:
        change = allowed_change(before, tolerance, hill)
        alpha = hill.alpha(before)
        least, most = alpha_range(before, change, hill)
        assert max(alpha - least, most - alpha) <= tolerance
        least, most = alpha_range(before, 1.01 * change, hill)
        assert max(alpha - least, most - alpha) > tolerance
        assert allowed_change(100 * before, tolerance, hill) == pytest.approx(10 * change)


def test_a_weight_without_alpha_may_not_change() -> None:
    for weight in (torch.zeros(8, 8), torch.full((8, 8), math.nan), torch.ones(8, 8)):
        values = torch.linalg.eigvalsh((weight @ weight.T).nan_to_num(math.nan).nan_to_num(0.0))
        values = values.double() if bool(weight.isfinite().all()) else torch.full((8,), math.nan)
        assert allowed_change(values.double(), 0.1, Hill()) == 0.0
