"""Estimates of one step: over groups of its parameters, and over a calibration's examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainc.runtime.noise_scale.estimate import UNDETERMINED, Estimate, Uncertainty
from trainc.runtime.noise_scale.estimators import SquaredNorms, noise_scale_from_contributions
from trainc.runtime.noise_scale.geometry import (
    PreconditionedNorms,
    l1_estimate,
    preconditioned_norms,
)
from trainc.runtime.noise_scale.jackknife import jackknife
from trainc.runtime.noise_scale.settings import Geometry, NoiseScaleSettings
from trainc.runtime.step.record import CalibrationSample, Contribution, Step

StepEstimate = tuple[Estimate, Uncertainty | None]


def step_estimates(
    step: Step,
    gradients: Mapping[str, Tensor],
    groups: Mapping[str, Sequence[str]],
    settings: NoiseScaleSettings,
) -> dict[str, StepEstimate] | None:
    """Return the estimates of a step by group of parameters; None where it had a single example or group."""
    contributions = step.contributions
    if settings.jackknife or settings.geometry != "euclidean":
        rows = PerExampleGradients.of(step, gradients, settings.geometry)
        return rows.estimates(groups, settings.jackknife)
    if settings.method == "replica":
        contributions = _one_per_replica(contributions)
    if settings.method in ("micro_batch", "replica"):
        norms = SquaredNorms.of_micro_batches(contributions, gradients)
    else:
        weights = [w for one in contributions if (w := one.example_weights) is not None]
        norms = SquaredNorms.of(contributions, gradients, weights or None)
    if norms.single:
        return None
    return {key: (norms.estimate(names), None) for key, names in groups.items()}


def calibration_estimates(
    sample: CalibrationSample, names: Iterable[str]
) -> tuple[Estimate, Estimate]:
    """Return the estimates over `names` and over all parameters from examples measured one by one."""
    norms = SquaredNorms(
        {n: float(s.sum()) for n, s in sample.sq_norms.items() if n in sample.batch_sq_norms},
        {n: float(sample.batch_sq_norms[n]) for n in sample.sq_norms if n in sample.batch_sq_norms},
        float(sample.weights.double().square().sum()),
    )
    if norms.single:
        return UNDETERMINED, UNDETERMINED
    return norms.estimate(names), norms.estimate()


def _one_per_replica(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Return one contribution a replica: its last micro-batch has the squared norm of all of them together."""
    by_replica: dict[int, list[Contribution]] = {}
    for one in contributions:
        by_replica.setdefault(one.replica, []).append(one)
    return [
        Contribution(
            torch.cat([one.weights for one in own]), {}, batch_sq_norms=own[-1].batch_sq_norms
        )
        for own in by_replica.values()
    ]


@dataclass(frozen=True, slots=True)
class PerExampleGradients:
    """All contributions of a step, by parameter (B, n), the gradients they sum to (n,), and their weights (B,).

    `preconditioners` (n,) are those of Adam, under `geometry = adam` alone.
    """

    gradients: Mapping[str, Tensor]
    batch_gradients: Mapping[str, Tensor]
    weights: Tensor
    geometry: Geometry
    preconditioners: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, step: Step, gradients: Mapping[str, Tensor], geometry: Geometry
    ) -> PerExampleGradients:
        """Read the step's contributions; under `adam` also the preconditioner that its update starts from.

        Raises ValueError where the optimizer has no second moments after an update.
        """
        from trainc.runtime.processes.sharded import full

        rows = {n: torch.cat([p.gradients[n] for p in step.contributions]) for n in gradients}
        batch = {n: full(g).reshape(-1) for n, g in gradients.items()}
        weights = torch.cat([one.weights for one in step.contributions])
        scales = {}
        if geometry == "adam":
            scales = {n: full(s) for n in gradients if (s := step.preconditioner(n)) is not None}
            if step.after_update and not scales:
                raise ValueError(
                    "`geometry = adam` needs an optimizer with second moments, such as adamw: after an update there are"
                    f" none for `{next(iter(gradients))}`"
                )
        return cls(rows, batch, weights, geometry, scales)

    def estimates(
        self, groups: Mapping[str, Sequence[str]], with_jackknife: bool
    ) -> dict[str, StepEstimate] | None:
        """Return each group's estimate, with its uncertainty under `with_jackknife`; None for a single example."""
        if not 1 - float(self.weights.double().square().sum()) > 1e-6:
            return None
        if self.geometry == "sign":
            return {key: (self._l1(names), None) for key, names in groups.items()}
        if self.geometry == "adam" and len(self.preconditioners) < len(self.gradients):
            return {}  # before the optimizer's first step it has no second moments
        return self._euclidean(groups, with_jackknife)

    def _l1(self, names: Sequence[str]) -> Estimate:
        rows = torch.cat([self.gradients[name] for name in names], 1)
        batch = torch.cat([self.batch_gradients[name] for name in names])
        return l1_estimate(rows, batch, self.weights)

    def _euclidean(
        self, groups: Mapping[str, Sequence[str]], with_jackknife: bool
    ) -> dict[str, StepEstimate]:
        norms = {name: self._norms(name) for name in self.gradients}
        sq_norms, batch, dots = (
            torch.stack([_total([norms[n][i] for n in names]) for names in groups.values()], -1)
            for i in range(len(PreconditionedNorms._fields))
        )
        if not with_jackknife:
            q = float(self.weights.double().square().sum())
            columns = zip(groups, sq_norms.sum(0).tolist(), batch.tolist(), strict=True)
            return {key: (noise_scale_from_contributions(s1, s, q), None) for key, s1, s in columns}
        found = jackknife(sq_norms, dots, batch, self.weights)
        return {key: (j.estimate, j.uncertainty) for key, j in zip(groups, found, strict=True)}

    def _norms(self, name: str) -> PreconditionedNorms:
        rows, batch = self.gradients[name].double(), self.batch_gradients[name].double()
        scale = self.preconditioners.get(name)
        scale = torch.ones_like(batch) if scale is None else scale.double().reshape(-1)
        return preconditioned_norms(rows, batch, scale)


def _total(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors, added from first to last."""
    return sum(tensors[1:], start=tensors[0])
