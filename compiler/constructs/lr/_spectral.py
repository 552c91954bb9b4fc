"""What all policies on spectra share: where the tail of a spectrum begins, its exponent alpha, and its null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.lr._base import MeasuredPolicy
from trainc.compiler.constructs.lr._definition import alpha_of, gain_of
from trainc.runtime.factors.units import BalancedGroup

if TYPE_CHECKING:
    from torch import Tensor

Fit = Literal["median", "dks", "peak"]
Metric = Literal["calibrated", "alpha"]


class SpectralPolicy(MeasuredPolicy):
    """Base of the policies whose figure is the Hill exponent alpha of a weight's spectrum."""

    functions: ClassVar[tuple[str, ...]] = (
        *MeasuredPolicy.functions,
        "trainc.kernels.parameter.figures:log_alpha",
        "trainc.kernels.parameter.figures:spectral_entropy",
        "trainc.kernels.parameter.figures:spectral_norm",
        "trainc.kernels.parameter.figures:stable_rank",
        "trainc.kernels.parameter.spectral_null:calibrated_alpha",
        "trainc.kernels.parameter.spectral_null:null_alpha",
        "trainc.kernels.parameter.spectral_null:null_distance",
        "trainc.kernels.parameter.spectral_windows:farms_alpha",
        "trainc.kernels.parameter.spectrum:spectrum",
        "trainc.kernels.parameter.tail_fit:hill_alpha",
    )

    metric: Metric | None = Field(
        default=None,
        description="what the factors follow: alpha beside that of random weights of the shape (`calibrated`), or"
        " `alpha` itself, as published. Default: `calibrated` with `fit = median`",
    )
    fit: Fit = Field(
        default="median", description="where the tail begins: `median`, `dks` or `peak`"
    )
    xmin_pos: float = Field(
        default=2.0,
        gt=1,
        description="with `median` the tail begins at eigenvalue number n / `xmin_pos` of n in ascending order",
    )
    convention: Literal["code", "paper"] = Field(
        default="code",
        description="whether xmin is one of the k eigenvalues (`code`, as published) or the one below them"
        " (`paper`)",
    )
    min_eigenvalues: int = Field(
        default=50, ge=3, description="modules with fewer eigenvalues than this keep their rate"
    )

    @model_validator(mode="after")
    def _has_fields_of_one_fit(self) -> Self:
        if self.fit == "median":
            return self
        if {"xmin_pos", "convention"} & self.model_fields_set:
            raise ValueError(f"`xmin_pos` and `convention` are of `fit = median`, not `{self.fit}`")
        unknown = "what random weights have is known for `fit = median` alone"
        if self.metric == "calibrated":
            raise ValueError(f"{unknown}: write `metric = alpha`, or remove `fit = {self.fit}`")
        if self.shrink and "shrink" in self.model_fields_set:
            raise ValueError(f"{unknown}: remove `shrink = true`, or `fit = {self.fit}`")
        return self

    @property
    def _calibrates(self) -> bool:
        return self.metric == "calibrated" or (self.metric is None and self.fit == "median")

    @property
    def _null(self) -> dict[str, Any]:
        """Return which null is that of alpha, for a shape."""
        return {"tail": 1 - 1 / self.xmin_pos, "convention": self.convention}

    def measure(self, weights: Sequence[Tensor]) -> list[float]:
        """Return the figure of each weight, NaN where it means nothing."""
        from trainc.kernels.parameter.spectral_null import calibrated_alpha
        from trainc.kernels.parameter.spectrum import WHOLE, Hill, alphas, spectra
        from trainc.kernels.parameter.tail_fit import fit_tail

        if self.fit != "median":
            return [fit_tail(spectrum, self.fit).alpha for spectrum in spectra(weights, WHOLE)]
        found = alphas(weights, Hill(self.xmin_pos, self.convention))
        if not self._calibrates:
            return found
        return [
            calibrated_alpha(alpha, tuple(weight.shape), **self._null)
            for alpha, weight in zip(found, weights, strict=True)
        ]

    def levels(
        self, figures: Mapping[str, float], groups: Sequence[BalancedGroup]
    ) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return calibrated exponents and their noise; None for a fit whose null is not known."""
        if self.fit != "median":
            return None
        from trainc.kernels.parameter.spectral_null import calibrated_alpha, calibrated_spread

        shapes = {group.name: group.shape for group in groups if group.name in figures}
        noise = {name: calibrated_spread(shape, **self._null) for name, shape in shapes.items()}
        if self._calibrates:
            return dict(figures), noise
        return {n: calibrated_alpha(figures[n], s, **self._null) for n, s in shapes.items()}, noise

    def reference(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each weight's factor by definition, from singular values in float64; weights are units."""
        import torch

        from trainc.kernels.parameter.spectral_null import null_alpha, null_law

        found: dict[str, float] = {}
        levels: dict[str, float] = {}
        noise: dict[str, float] = {}
        for name, weight in weights.items():
            w = weight.detach().double()
            w = w.flatten(2).permute(2, 0, 1) * math.sqrt(0.5) if w.dim() == 4 else w
            values = torch.linalg.svdvals(w).square().flatten().tolist()
            found[name] = alpha_of(values, self.fit, self.xmin_pos, self.convention)
            if self.fit == "median":
                centre, spread = null_law(tuple(weight.shape), **self._null)
                scale = (null_alpha(1.0, self._null["tail"]) - 1) / (centre - 1)
                levels[name], noise[name] = 1 + scale * (found[name] - 1), scale * spread
        gain = gain_of(levels, noise) if levels and self.shrink else 1.0
        return self.factors(levels if self._calibrates else found, gain)
