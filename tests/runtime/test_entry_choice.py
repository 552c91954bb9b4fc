"""The choice of entries by brute force: structures, budgets and ties."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainc import functional
from trainc.runtime.mask.budget import erk_densities, shares
from trainc.runtime.mask.entry_choice import Choice, topk_mask
from trainc.runtime.mask.structures import Structure, mean

UNITS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "row": ((6, 8), 1, 8),
    "column": ((6, 8), 6, 1),
    "block(2, 4)": ((6, 8), 2, 4),
    "block(1, 4)": ((6, 8, 3), 1, 4),
}


def scores(*shape: int, values: int = 5) -> Tensor:
    """Return few different numbers, so that there are ties."""
    g = torch.Generator().manual_seed(len(shape))
    return torch.randint(1, values, shape, generator=g).double()


@pytest.mark.parametrize(("text", "where"), UNITS.items())
@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 1.0])
def test_units_are_chosen_by_their_norm(text: str, where: Any, density: float) -> None:
    shape, rows, columns = where
    score = scores(*shape)
    parts = [
        (slice(i, i + rows), slice(j, j + columns))
        for i, j in itertools.product(range(0, 6, rows), range(0, 8, columns))
    ]
    ranked = sorted(range(len(parts)), key=lambda p: (-float(score[parts[p]].norm().float()), p))
    wanted = torch.zeros(shape, dtype=torch.bool)
    for place in ranked[: max(1, len(parts) - round((1 - density) * len(parts)))]:
        wanted[parts[place]] = True
    assert torch.equal(topk_mask(score.float(), density=density, structure=text), wanted)


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 3)])
@pytest.mark.parametrize("spelled", ["2:4", "n_m(2, 4)", " 2 : 4 "])
def test_n_of_m_inputs(shape: tuple[int, ...], spelled: str) -> None:
    score = scores(*shape)
    wanted = torch.zeros(shape, dtype=torch.bool)
    for place in itertools.product(*map(range, (shape[0], 2, *shape[2:]))):
        inputs = [(place[0], 4 * place[1] + k, *place[2:]) for k in range(4)]
        for one in sorted(inputs, key=lambda at: (-float(score[at]), at[1]))[:2]:
            wanted[one] = True
    assert torch.equal(topk_mask(score, density=0.5, structure=spelled), wanted)
    assert functional.topk_mask is topk_mask


@pytest.mark.parametrize("density", [0.01, 0.11, 0.5, 1.0])
def test_elements_are_chosen_by_value_then_place(density: float) -> None:
    score = scores(7, 5)
    flat = score.flatten().tolist()
    ranked = sorted(range(35), key=lambda i: (-flat[i], i))
    wanted = torch.zeros(35, dtype=torch.bool)
    wanted[ranked[: max(1, 35 - round((1 - density) * 35))]] = True
    assert torch.equal(topk_mask(score, density=density), wanted.view(7, 5))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"density": 0}, "above 0, at most 1"),
        ({"density": 1.01}, "above 0, at most 1"),
        ({"density": math.nan}, "above 0, at most 1"),
        ({"density": 0.3, "structure": "2:4"}, "write `density=0.5`"),
        ({"density": 0.3, "structure": "diagonal"}, "no structure `diagonal`"),
        ({"density": 0.3, "structure": "block(4, 4)"}, "6 is no multiple of 4"),
        ({"density": 0.6, "structure": "3:5"}, "8 columns, and 8 is no multiple of 5"),
        ({"density": 0.3, "structure": "5:4"}, "at most 4 of 4"),
        ({"density": 0.3, "structure": "layer"}, "one tensor is one layer"),
    ],
)
def test_what_makes_no_sense_is_an_error(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        topk_mask(scores(6, 8), **given)
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(torch.tensor([1.0, math.nan]), density=0.5)
    with pytest.raises(ValueError, match="complex scores have no order"):
        topk_mask(torch.ones(2, dtype=torch.complex64), density=0.5)
    with pytest.raises(ValueError, match="is not a matrix, so it has no rows"):
        topk_mask(scores(6), density=0.5, structure="row")


def test_scores_may_be_true_or_false() -> None:
    found = topk_mask(torch.tensor([False, True, False, True]), density=0.75)
    assert found.tolist() == [True, True, False, True]


def test_erk_is_exact_and_dense_where_it_would_be_more() -> None:
    shapes = {"conv": (8, 4, 3, 3), "wide": (64, 128), "head": (2, 3), "empty": (0, 5)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    for density in (0.01, 0.1, 0.5, 0.9, 1.0):
        found = erk_densities(shapes, density)
        assert sum(found[n] * sizes[n] for n in shapes) == pytest.approx(density * 8486)
        assert all(0 <= one <= 1 for one in found.values())
        free = [n for n in ("conv", "wide", "head") if found[n] < 1]
        factors = {found[n] * sizes[n] / sum(shapes[n]) for n in free}
        assert max(factors, default=0) == pytest.approx(min(factors, default=0))
        masks = Choice(allocate=erk_densities).masks(
            {n: scores(*s) for n, s in shapes.items()}, density
        )
        assert sum(int(mask.sum()) for mask in masks.values()) == round(density * 8486)
    assert erk_densities(shapes, 0.1)["head"] == 1


def test_shares_are_whole_numbers_that_add_up() -> None:
    units = {"a": 3, "b": 10, "c": 7}
    count = lambda n, density: round(n * density)  # noqa: E731
    assert shares(units, {"a": 0.5, "b": 0.45, "c": 0.5}, count) == {"a": 2, "b": 5, "c": 3}
    assert shares(units, {"a": 1, "b": 0.0, "c": 1}, count) == {"a": 3, "b": 0, "c": 7}


def test_whole_tensors_are_chosen_among_all() -> None:
    found = Choice(Structure("layer"), together=True, reduce=mean).masks(
        {"a": torch.ones(2, 3), "b": torch.full((2, 2), 1.4), "c": torch.zeros(4)}, 0.34
    )
    assert [bool(mask.all()) for mask in found.values()] == [False, True, False]
    assert not found["a"].any()
