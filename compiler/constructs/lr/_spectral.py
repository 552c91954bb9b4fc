"""What all policies on spectra share: where the tail of a spectrum begins, and its exponent alpha."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainc.compiler.constructs.lr._base import MeasuredPolicy

if TYPE_CHECKING:
    from torch import Tensor

Fit = Literal["median", "dks", "peak"]


class SpectralPolicy(MeasuredPolicy):
    """Base of the policies whose figure is the Hill exponent alpha of a weight's spectrum."""

    functions: ClassVar[tuple[str, ...]] = (
        *MeasuredPolicy.functions,
        "trainc.kernels.parameter.figures:log_alpha",
        "trainc.kernels.parameter.figures:spectral_entropy",
        "trainc.kernels.parameter.figures:spectral_norm",
        "trainc.kernels.parameter.figures:stable_rank",
        "trainc.kernels.parameter.spectral_null:null_alpha",
        "trainc.kernels.parameter.spectral_null:null_distance",
        "trainc.kernels.parameter.spectral_windows:farms_alpha",
        "trainc.kernels.parameter.spectrum:spectrum",
        "trainc.kernels.parameter.tail_fit:hill_alpha",
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

    @model_validator(mode="after")
    def _has_fields_of_one_fit(self) -> Self:
        if self.fit != "median" and {"xmin_pos", "convention"} & self.model_fields_set:
            raise ValueError(f"`xmin_pos` and `convention` are of `fit = median`, not `{self.fit}`")
        return self

    def measure(self, weights: Sequence[Tensor]) -> list[float]:
        """Return the exponent of each weight, NaN where it means nothing."""
        from trainc.kernels.parameter.spectrum import WHOLE, Hill, alphas, spectra
        from trainc.kernels.parameter.tail_fit import fit_tail

        if self.fit == "median":
            return alphas(weights, Hill(self.xmin_pos, self.convention))
        return [fit_tail(spectrum, self.fit).alpha for spectrum in spectra(weights, WHOLE)]

    def reference(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each weight's factor by definition, from singular values in float64."""
        import torch

        found = {}
        for name, weight in weights.items():
            w = weight.detach().double()
            w = w.flatten(2).permute(2, 0, 1) * math.sqrt(0.5) if w.dim() == 4 else w
            ascending = torch.linalg.svdvals(w).square().flatten().sort().values
            found[name] = self._alpha(ascending)
        return self.balance(found)

    def _alpha(self, ascending: Tensor) -> float:
        """Return the exponent of a spectrum by definition."""
        n = len(ascending)
        if self.fit != "median":
            from trainc.kernels.parameter.tail_fit import fit_tail

            return fit_tail(ascending, self.fit).alpha
        if self.convention == "code":
            k = n - int(n / self.xmin_pos)
            xmin = ascending[n - k]
        else:
            k = int(n - n / self.xmin_pos)
            xmin = ascending[n - k - 1]
        return float(1 + k / (ascending[n - k :].log().sum() - k * xmin.log()))
