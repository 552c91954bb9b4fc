"""What all policies on spectra share: where the tail of a spectrum begins, its exponent alpha, and its null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.lr._base import MeasuredPolicy
from trainc.compiler.constructs.lr._definition import alpha_of, figure_of, gain_of
from trainc.runtime.factors.units import MeasuredPart

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.kernels.parameter.figures import Figures
    from trainc.kernels.parameter.spectral_windows import Windows

Fit = Literal["median", "dks", "peak"]
Metric = Literal["calibrated", "alpha", "log_alpha", "stable_rank", "spectral_norm", "entropy"]
_OF_TAIL = ("calibrated", "alpha", "log_alpha")


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
        description="what the factors follow: alpha beside that of random weights of the shape (`calibrated`); `alpha`"
        " itself, as published; `log_alpha`, alpha times log10 of the largest eigenvalue; `stable_rank`, the sum of the"
        " eigenvalues over the largest; `spectral_norm`, its square root; or their `entropy`, from 0 to 1. Default:"
        " `calibrated` with `fit = median`",
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
    window: int | None = Field(
        default=None,
        ge=1,
        description="rows of windows of one aspect, whose spectra are taken together in place of the weight's own, as"
        " FARMS does; the published number is 100. A kernel of one position counts as a matrix. Default: none",
    )
    window_aspect: float = Field(default=1.0, gt=0, description="columns of a window over its rows")
    window_ops: int | None = Field(
        default=None, ge=1, description="windows along each axis, spread evenly. Default: 9"
    )
    window_step: int | None = Field(
        default=None,
        ge=1,
        description="rows and columns from a window to the next, in place of `window_ops`",
    )
    min_eigenvalues: int = Field(
        default=50, ge=3, description="modules with fewer eigenvalues than this keep their rate"
    )

    @model_validator(mode="after")
    def _has_fields_of_one_fit(self) -> Self:
        self._check_windows()
        if self.tolerance is not None and not self._knows_null:
            raise ValueError(
                "`tolerance` needs `fit = median` and alpha of whole matrices: how far other figures can have moved is"
                " not known. Remove it"
            )
        if self.metric == "entropy" and self.map == "log2":
            raise ValueError(
                "`map = log2` needs figures above 1, and `entropy` is at most 1: write another `map`"
            )
        n = self.min_eigenvalues
        above = (
            n - int(n / self.xmin_pos) - 1
            if self.convention == "code"
            else int(n - n / self.xmin_pos)
        )
        if above < 1:
            raise ValueError(
                f"`xmin_pos = {self.xmin_pos:g}` leaves no eigenvalue above the threshold, of"
                f" `min_eigenvalues = {n}`: write a larger `xmin_pos`"
            )
        given = {"fit", "xmin_pos", "convention"} & self.model_fields_set
        if given and self.metric not in (None, *_OF_TAIL):
            raise ValueError(
                f"`{min(given)}` is of the tail, which `metric = {self.metric}` does not read: remove it"
            )
        if not self._knows_null and self.shrink and "shrink" in self.model_fields_set:
            what = (
                f"`window = {self.window}`"
                if self.window is not None
                else f"`fit = {self.fit}`"
                if self.fit != "median"
                else f"`metric = {self.metric}`"
            )
            raise ValueError(
                f"what random weights have is not known for {what}: remove `shrink = true`, or {what}"
            )
        if self.fit == "median":
            return self
        if {"xmin_pos", "convention"} & self.model_fields_set:
            raise ValueError(f"`xmin_pos` and `convention` are of `fit = median`, not `{self.fit}`")
        unknown = "what random weights have is known for `fit = median` alone"
        if self.metric == "calibrated":
            raise ValueError(f"{unknown}: write `metric = alpha`, or remove `fit = {self.fit}`")
        return self

    def _check_windows(self) -> None:
        given = {"window_aspect", "window_ops", "window_step"} & self.model_fields_set
        if self.window is None:
            if given:
                raise ValueError(f"`{min(given)}` is of windows: add `window = 100`, or remove it")
        elif self.metric not in (None, "alpha"):
            raise ValueError(
                f"windows have an alpha of their own, and no other figure: remove `metric = {self.metric}`"
            )
        elif self.window_ops is not None and self.window_step is not None:
            raise ValueError(
                "`window_ops` and `window_step` both say how many windows there are: remove one"
            )

    @property
    def _knows_null(self) -> bool:
        known = self.fit == "median" and self.window is None
        return known and self.metric in (None, "calibrated", "alpha")

    @property
    def _calibrates(self) -> bool:
        return self._knows_null and self.metric != "alpha"

    @property
    def _windows(self) -> Windows | None:
        if self.window is None:
            return None
        from trainc.kernels.parameter.spectral_windows import Windows

        ops = 9 if self.window_step is None and self.window_ops is None else self.window_ops
        return Windows(self.window, self.window_aspect, ops, self.window_step or 1)

    @property
    def _null(self) -> dict[str, Any]:
        """Return which null is that of alpha, for a shape."""
        return {"tail": 1 - 1 / self.xmin_pos, "convention": self.convention}

    @property
    def takes_grams(self) -> bool:
        return self.window is None and self.tolerance is None

    def measure(self, matrices: Mapping[str, Any]) -> dict[str, float]:
        """Return the figure of each part, NaN where it means nothing."""
        from trainc.kernels.parameter.figures import measure, refuse_not_finite

        if (windows := self._windows) is not None:
            refuse_not_finite(matrices)
            return {n: windows.alpha(m, self.fit, **self._null) for n, m in matrices.items()}
        found = measure(matrices, self.fit, **self._null)
        return {name: self._figure(figures) for name, figures in found.items()}

    def measure_with_room(self, matrices: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Return the figure of each part, and the norm of a change that moves its alpha by `tolerance` at most."""
        from trainc.kernels.parameter.alpha_bound import allowed_change
        from trainc.kernels.parameter.figures import measure
        from trainc.kernels.parameter.tail_fit import needed_for

        found = measure(matrices, self.fit, **self._null)
        hill, tolerance = needed_for(self.fit, **self._null), self.tolerance or 0.0
        return {
            name: (self._figure(one), allowed_change(one.spectrum.values, tolerance, hill))
            for name, one in found.items()
        }

    def _figure(self, figures: Figures) -> float:
        """Return the figure that factors follow; NaN where too few eigenvalues are left of a masked weight."""
        if figures.eigenvalues < self.min_eigenvalues:
            return math.nan
        if not self._calibrates:
            return float(getattr(figures, self.metric or "alpha"))
        from trainc.kernels.parameter.spectral_null import calibrated_alpha

        one = figures.spectrum
        shape = (one.rows, one.columns, one.count, 1)
        return calibrated_alpha(figures.alpha, shape, **self._null)

    def levels(
        self, figures: Mapping[str, float], parts: Sequence[MeasuredPart]
    ) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return calibrated exponents and their noise; None for a fit or a figure whose null is not known."""
        if not self._knows_null:
            return None
        from trainc.kernels.parameter.spectral_null import calibrated_alpha, calibrated_spread

        shapes = {part.name: part.shape for part in parts if part.name in figures}
        noise = {name: calibrated_spread(shape, **self._null) for name, shape in shapes.items()}
        if self._calibrates:
            return dict(figures), noise
        return {n: calibrated_alpha(figures[n], s, **self._null) for n, s in shapes.items()}, noise

    def reference(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each weight's factor by definition, from singular values in float64; weights are units."""
        import torch

        from trainc.kernels.parameter.spectral_null import null_alpha, null_law
        from trainc.kernels.parameter.spectrum import matrices

        found: dict[str, float] = {}
        levels: dict[str, float] = {}
        noise: dict[str, float] = {}
        for name, weight in weights.items():
            w = weight.detach().double()
            w = w.flatten(2).permute(2, 0, 1) * math.sqrt(0.5) if w.dim() == 4 else w
            values = torch.linalg.svdvals(w).square().flatten().tolist()
            alpha = (
                alpha_of(values, self.fit, self.xmin_pos, self.convention)
                if self._windows is None
                else self._windows.alpha(matrices(weight.double()), self.fit, **self._null)
            )
            found[name] = figure_of(values, alpha, self.metric)
            if self._knows_null:
                centre, spread = null_law(tuple(weight.shape), **self._null)
                scale = (null_alpha(1.0, self._null["tail"]) - 1) / (centre - 1)
                levels[name], noise[name] = 1 + scale * (alpha - 1), scale * spread
        gain = gain_of(levels, noise) if levels and self.shrink else 1.0
        return self.factors(levels if self._calibrates else found, gain)
