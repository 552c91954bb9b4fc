"""Densities by alphas: published vectors, exact totals, and what makes no sense."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from trainc.runtime.mask.allocation import allocate

CASES = json.loads((Path(__file__).parents[1] / "reference/layer_rates.json").read_text())
PUBLISHED = {k: c for k, c in CASES["alphapruning"]["cases"].items() if isinstance(c, dict)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_densities_are_those_of_the_published_code_where_it_empties_no_layer(name: str) -> None:
    case = PUBLISHED[name]
    sparsity, spread = (float(part[1:].lstrip("eps")) for part in name.split("_")[-2:])
    alphas, ratios = case["block_mean_alpha"], case["block_ratio"]
    found = allocate(alphas, [1] * len(alphas), 1 - sparsity, spread)
    assert sum(found) / len(found) == pytest.approx(1 - sparsity, abs=1e-12)
    assert min(found) >= 0
    if max(ratios) <= 1:
        assert [1 - one for one in found] == pytest.approx(ratios, abs=2e-6)
    else:
        assert [x for x, ratio in zip(found, ratios, strict=True) if ratio >= 1] == pytest.approx(
            [0.0] * sum(ratio >= 1 for ratio in ratios)
        )


def test_the_total_is_exact_for_layers_of_any_size() -> None:
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(1, 9)
        alphas = [draw.uniform(1.5, 9) for _ in range(count)]
        sizes = [draw.randint(1, 999) for _ in range(count)]
        density, spread = draw.uniform(0.01, 1), draw.uniform(0, 1)
        found = allocate(alphas, sizes, density, spread)
        kept = sum(d * n for d, n in zip(found, sizes, strict=True))
        assert kept == pytest.approx(density * sum(sizes), rel=1e-9)
        assert all(-1e-12 <= d <= 1 + 1e-12 for d in found)
        order = sorted(range(count), key=alphas.__getitem__)
        assert all(found[a] >= found[b] - 1e-12 for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
def test_the_total_is_exact_where_the_smallest_alpha_would_keep_all(density: float) -> None:
    """At a spread of 1 its sparsity is in proportion to 0, until the others are empty."""
    sizes = [10, 20, 50, 1]
    found = allocate([1.0, 2.0, 3.0, 9.0], sizes, density, 1.0)
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(density * 81)
    assert found[0] == pytest.approx(min(1, density * 8.1)) or density > 0.2


def test_alphas_may_be_of_an_array() -> None:
    listed = allocate([2.0, 5.0], [4, 8], 0.3, 0.5)
    assert allocate(torch.tensor([2.0, 5.0]), torch.tensor([4, 8]), 0.3, 0.5) == listed  # type: ignore[arg-type]


def test_equal_alphas_have_equal_densities() -> None:
    assert allocate([3.0, 3.0], [4, 8], 0.3, 0.5) == pytest.approx([0.3, 0.3])
    assert allocate([2.0, 5.0], [4, 8], 0.3, 0.0) == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alphas": [2.0]}, "an alpha and a size for each layer"),
        ({"alphas": [2.0, math.nan]}, "not finite"),
        ({"numel": [3, 0]}, "no entries"),
        ({"density": 0.0}, "`density` is 0"),
        ({"density": 1.5}, "`density` is 1.5"),
        ({"spread": 2.0}, "`spread` is 2"),
    ],
)
def test_what_makes_no_sense_is_an_error(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        allocate(**{"alphas": [2.0, 3.0], "numel": [3, 3], "density": 0.5, **given})
