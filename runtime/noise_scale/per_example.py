"""Estimates of one step from the examples' gradients themselves: with a jackknife, or in the optimizer's geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainc.runtime.noise_scale.estimate import Estimate, Spread
from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions
from trainc.runtime.noise_scale.geometry import Matched, l1_squares, matched_squares
from trainc.runtime.noise_scale.jackknife import jackknives

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step.record import Step


@dataclass(frozen=True, slots=True)
class Rows:
    """All contributions of a step: by parameter their gradients (B, n), the sum of these (n,), and weights (B,)."""

    gradients: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    weights: Tensor
    geometry: Literal["euclidean", "adam", "sign"]
    scales: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        step: Step,
        gradients: Mapping[str, Tensor],
        geometry: Literal["euclidean", "adam", "sign"],
    ) -> Rows:
        """Read the step's contributions; under `adam` with the preconditioner its update will start from."""
        import torch

        from trainc.runtime.step.sharded import full

        rows = {n: torch.cat([p.gradients[n] for p in step.contributions]) for n in gradients}
        whole = {n: full(g).reshape(-1) for n, g in gradients.items()}
        weights = torch.cat([part.weights for part in step.contributions])
        scales = {}
        if geometry == "adam":
            scales = {n: full(s) for n in gradients if (s := step.preconditioner(n)) is not None}
            if step.clock.steps and not scales:
                raise ValueError(
                    "`geometry = adam` needs an optimizer with second moments, such as adamw: after"
                    f" {step.clock.steps} steps there are none for `{next(iter(gradients))}`"
                )
        return cls(rows, whole, weights, geometry, scales)

    def estimates(
        self, groups: Mapping[str, Sequence[str]], jackknife: bool
    ) -> dict[str, tuple[Estimate, Spread | None]] | None:
        """Return each group's estimate, with its spread under `jackknife`; None where there is nothing to compare."""
        if not 1 - float(self.weights.double().square().sum()) > 1e-6:
            return None
        if self.geometry == "sign":
            return {key: (self._l1(names), None) for key, names in groups.items()}
        if self.geometry == "adam" and len(self.scales) < len(self.gradients):
            return {}  # before the optimizer's first step it has no second moments
        return self._euclidean(groups, jackknife)

    def _l1(self, names: Sequence[str]) -> Estimate:
        import torch

        rows = torch.cat([self.gradients[name] for name in names], 1)
        whole = torch.cat([self.whole[name] for name in names])
        return l1_squares(rows, whole, self.weights)

    def _euclidean(
        self, groups: Mapping[str, Sequence[str]], jackknife: bool
    ) -> dict[str, tuple[Estimate, Spread | None]]:
        import torch

        matched = {name: self._matched(name) for name in self.gradients}
        squares, dots, whole = (
            torch.stack([_sum([part(matched[n]) for n in names]) for names in groups.values()], -1)
            for part in (_squares, _dots, _whole)
        )
        if not jackknife:
            q = float(self.weights.double().square().sum())
            sums, bigs = squares.sum(0).tolist(), whole.tolist()
            return {
                key: (noise_scale_from_contributions(s1, big, q), None)
                for key, s1, big in zip(groups, sums, bigs, strict=True)
            }
        found = jackknives(squares, dots, whole, self.weights)
        return {key: (one.estimate, one.spread) for key, one in zip(groups, found, strict=True)}

    def _matched(self, name: str) -> Matched:
        import torch

        rows, whole = self.gradients[name].double(), self.whole[name].double()
        scale = self.scales.get(name)
        scale = torch.ones_like(whole) if scale is None else scale.double().reshape(-1)
        return matched_squares(rows, whole, scale)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _squares(one: Matched) -> Tensor:
    return one.squares


def _dots(one: Matched) -> Tensor:
    return one.dots


def _whole(one: Matched) -> Tensor:
    return one.s_big
