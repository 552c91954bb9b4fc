"""Choose entries of tensors by their scores, under a structure and a budget: the same ones on every machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainc.runtime.mask.budget import Allocation, Count, kept_count, shares
from trainc.runtime.mask.structures import ELEMENT, Reduce, Structure, l2_norm


@dataclass(frozen=True, slots=True)
class Choice:
    """Which entries the largest scores choose: of each tensor by itself, or of all `together`.

    `allocate` gives each tensor a density of its own, and `measured` says by what of the weights, where it reads them.
    `count` says how many of a number of units a density is, and `reduce` what the score of a unit is.
    """

    structure: Structure = ELEMENT
    together: bool = False
    allocate: Allocation | None = None
    count: Count = kept_count
    reduce: Reduce = l2_norm
    measured: str = ""

    @property
    def known(self) -> bool:
        """Return whether shapes alone say how many entries of each tensor are chosen."""
        return not (self.together or self.measured)

    def masks(self, scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
        """Return where the chosen entries are, bool in the shape of each tensor's scores; no score is NaN."""
        if self.structure.kind == "n_m":
            return {name: self.structure.largest_of_each(score) for name, score in scores.items()}
        shapes = {name: tuple(score.shape) for name, score in scores.items()}
        units = [self.structure.scores(score, self.reduce) for score in scores.values()]
        if self.together:
            chosen = largest(units, self.count(sum(map(len, units)), density))
        else:
            counts = self.counts(shapes, density).values()
            chosen = [largest([one], n)[0] for one, n in zip(units, counts, strict=True)]
        pairs = zip(shapes.items(), chosen, strict=True)
        return {name: self.structure.mask(found, shape) for (name, shape), found in pairs}

    def counts(self, shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, int]:
        """Return how many units of each tensor are chosen, where that does not depend on scores.

        What is `measured` is read from the weights as they are now.
        """
        units = {name: self.structure.count(shape) for name, shape in shapes.items()}
        if self.structure.density is not None:
            return {name: round(self.structure.density * n) for name, n in units.items()}
        if self.allocate is None:
            return {name: self.count(n, density) for name, n in units.items()}
        return shares(units, self.allocate(shapes, density), self.count)

    def densities(self, shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
        """Return which fraction of the units of each tensor is chosen; none where shapes alone do not say."""
        counts = self.counts(shapes, density) if self.known else {}
        return {name: n / max(1, self.structure.count(shapes[name])) for name, n in counts.items()}

    def sizes(self, shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, int]:
        """Return how many entries of each tensor are chosen; 0 where shapes alone do not say."""
        if not self.known:
            return dict.fromkeys(shapes, 0)
        counts = self.counts(shapes, density)
        return {name: n * self.structure.unit(shapes[name]) for name, n in counts.items()}


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the positions of the `count` largest scores of all, for each flat tensor, sorted, int64.

    Of equal scores the earlier tensor goes first, inside a tensor the lower position, so the choice
    is a function of the numbers alone. No score is NaN, and `count` is at most their number.
    """
    # Only a tensor's own `count` largest can be among those of all.
    tops = [score.topk(min(count, score.numel()), sorted=False).values for score in scores]
    together = torch.cat([top.to(tops[0].device) for top in tops])
    threshold = together.topk(count).values[-1] if count else together.new_full((), torch.inf)
    above = [(score > threshold.to(score.device)).nonzero()[:, 0] for score in scores]
    left = count - sum(len(found) for found in above)
    chosen = []
    for score, found in zip(scores, above, strict=True):
        equal = (score == threshold.to(score.device)).nonzero()[:left, 0]
        left -= len(equal)
        chosen.append(torch.cat([found, equal]).sort().values)
    return chosen


def topk_mask(score: Tensor, *, density: float, structure: str | Structure = "element") -> Tensor:
    """Return where the entries with the largest scores are, bool of the shape of `score`.

    `density` is the fraction that is chosen: of n units n - round((1 - density) n), and one at least. `structure` says
    what a unit is: `"element"`, `"row"` (an index of axis 0), `"column"` (one of axis 1) or `"block(r, c)"`, whose
    score is the L2 norm of its entries' scores; or `"n_m(n, m)"`, also `"n:m"`, which takes the n largest of each m
    consecutive entries along axis 1, where `density` has to be n / m. Of equal scores the lower position goes first.

    Raises ValueError for a `density` that is not above 0 and at most 1, for a structure that does not exist, does not
    divide the shape or is `"layer"`, of which a tensor has one, and for scores that are NaN or complex.
    """
    one = Structure.of(structure) if isinstance(structure, str) else structure
    if not 0 < density <= 1:
        raise ValueError(f"`density` is {density:g}: expected a fraction above 0, at most 1")
    if one.density is not None and density != one.density:
        raise ValueError(
            f"`{one}` chooses {one.density:g} of the entries: write `density={one.density:g}`"
        )
    if one.kind == "layer":
        raise ValueError(
            "one tensor is one layer, so that there is nothing to choose among: compare the norms of the scores of"
            " several, or write another `structure`"
        )
    if (problem := one.problem(tuple(score.shape))) is not None:
        raise ValueError(f"the score {problem}")
    if score.is_complex():
        raise ValueError("complex scores have no order: give their absolute values")
    if score.dtype == torch.bool:
        score = score.to(torch.uint8)
    if score.is_floating_point() and bool(score.isnan().any()):
        raise ValueError("a score is NaN, which is neither larger nor smaller than another")
    return Choice(one).masks({"": score}, density)[""]
