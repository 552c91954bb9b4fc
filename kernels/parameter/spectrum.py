"""Eigenvalue spectra of weights, and the Hill estimate of how heavy their tails are.

The spectrum of a matrix is its squared singular values. That of a convolution's weight, shape
(O, I, kh, kw), pools those of its kh*kw matrices of O x I, scaled by sqrt(0.5) as in TempBalance's
code.

They come from the Gram matrix of the short side, which costs a fraction of singular values.
Squaring loses digits at the small end, where the Hill estimate does not look; where it would, the
spectrum is taken again in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

CONV_SCALE = 0.5
# Relative to the largest eigenvalue: below the first, float32 is off by a percent and more; below
# the second, an eigenvalue is the rounding noise of float32 weights.
GUARD = 1e-5
RANK = 1e-12
# Of all eigenvalues above the threshold: mean ln(lambda / xmin) below this is rounding, as of an orthogonal weight.
NO_SPREAD = 1e-5
# What rounding may take from a whole number of eigenvalues.
_ROUNDING = 1e-9
# Entries of Gram matrices decomposed at once.
BATCH = 1 << 24
BLOCKS, BLOCKED = 4, 256
"""In how many blocks of columns a Gram matrix is taken, from how many columns on: 5/8 of the products then do."""


Convention = Literal["code", "paper"]


@dataclass(frozen=True, slots=True)
class Hill:
    """Which of n ascending eigenvalues the estimate runs over: those from n / `xmin_pos` on.

    `code` is what released implementations do: the threshold is the smallest of the k terms.
    `paper` is the published formula: the threshold is the eigenvalue below them.
    """

    xmin_pos: float = 2.0
    convention: Convention = "code"

    @classmethod
    def of_tail(cls, fraction: float, convention: Convention = "code") -> Hill:
        """Return the estimate over a fraction of the eigenvalues, in (0, 1); raises ValueError for another."""
        if not 0 < fraction < 1:
            raise ValueError(
                f"tail = {fraction:g}: expected the fraction of the eigenvalues in the tail, between 0 and 1"
            )
        if convention not in ("code", "paper"):
            raise ValueError(f"convention = {convention!r}: expected 'code' or 'paper'")
        return cls(1 / (1 - fraction), convention)

    def tail(self, n: int) -> tuple[int, int]:
        """Return the threshold's index, and the number k of terms."""
        if self.convention == "code":
            index = int(n / self.xmin_pos + _ROUNDING)
            return index, n - index
        k = int(n - n / self.xmin_pos + _ROUNDING)
        return n - k - 1, k

    def alpha(self, spectrum: Tensor, spread: float = NO_SPREAD) -> float:
        """Return 1 + k / sum(ln(lambda / xmin)) over the k largest of an ascending spectrum (n,).

        NaN where it means nothing: weights that are zero, not finite, of low rank, or orthogonal: the mean of
        ln(lambda / xmin) is below `spread` then.
        """
        n = len(spectrum)
        if n < 2:
            return math.nan
        index, k = self.tail(n)
        xmin, largest = float(spectrum[index]), float(spectrum[-1])
        if k < 1 or not (math.isfinite(largest) and largest > 0 and xmin > RANK * largest):
            return math.nan
        total = float((spectrum[n - k :].double() / xmin).log().sum())
        return 1 + k / total if total > spread * k else math.nan


MEDIAN = Hill()
WHOLE = Hill(math.inf)
"""What spectra have to be exact enough for where all of one is looked at."""


def count(shape: Sequence[int]) -> int:
    """Return how many eigenvalues a weight of this shape has; 0 where no spectrum is defined."""
    if len(shape) == 2:
        return min(shape)
    return min(shape[:2]) * math.prod(shape[2:]) if len(shape) == 4 else 0


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The ascending eigenvalues `values` (n,) of `count` matrices of `rows` x `columns`, float64 on the CPU.

    Rows and columns that are zero in all of the matrices do not count, nor do the eigenvalues that are zero with them.
    `spread` is that of `no_spread` for the entries.
    """

    values: Tensor
    count: int
    rows: int
    columns: int
    spread: float = NO_SPREAD


@dataclass(frozen=True, slots=True)
class Gram:
    """The Gram matrix `values` (n, n), in float64, of a matrix with n columns, `rows` that are not zero, and a `dtype`.

    It is what is known of a matrix whose rows are in several places: the sum of the Gram matrices of them.
    """

    values: Tensor
    rows: int
    dtype: torch.dtype

    def spectrum(self) -> Spectrum:
        """Return its eigenvalues, as the spectrum of the matrix."""
        columns = int((self.values.diagonal() != 0).sum())
        n = min(self.rows, columns)
        finite = bool(self.values.isfinite().all())
        found = (
            torch.linalg.eigvalsh(self.values).clamp_min(0.0)
            if finite
            else self.values.new_full((len(self.values),), math.nan).real
        )
        values = found.double().cpu()[len(found) - n :]
        return Spectrum(values, 1, self.rows, columns, no_spread(self.dtype))


def no_spread(dtype: torch.dtype) -> float:
    """Return below which mean ln(lambda / xmin) the spread of eigenvalues is that of rounded entries of this type.

    It is eps of a type of 16 bits: rounding moves the singular values of an orthogonal weight by less than half of it.
    """
    return max(NO_SPREAD, torch.finfo(dtype).eps)


def matrices(weight: Tensor) -> Tensor:
    """Return a weight, (out, in) or (out, in, kh, kw), as matrices (count, out, in)."""
    if not count(weight.shape):
        raise ValueError(f"a spectrum needs a 2-D or 4-D weight, not shape {tuple(weight.shape)}")
    if weight.layout is not torch.strided or weight.is_meta:
        kind = (
            "values: it is on the meta device"
            if weight.is_meta
            else "dense storage: call `to_dense()`"
        )
        raise ValueError(f"a spectrum needs a weight with {kind}")
    if weight.dim() == 2:
        return weight[None]
    # Scaled in float32 at least: 16 bits would round.
    wide = weight.to(_wider(weight.dtype, torch.float32))
    return wide.flatten(2).permute(2, 0, 1) * math.sqrt(CONV_SCALE)


def _wider(dtype: torch.dtype, least: torch.dtype) -> torch.dtype:
    """Return a type that holds both; PyTorch promotes no 8-bit floats."""
    return least if dtype.itemsize == 1 else torch.promote_types(dtype, least)


def spectra_of(given: Sequence[Tensor | Gram], hill: Hill = MEDIAN) -> list[Spectrum]:
    """Return the spectrum of each stack of matrices (count, out, in) or Gram matrix, exact enough for `hill`.

    All eigenvalues are NaN for matrices that are not finite.
    """
    stacks = [one for one in given if isinstance(one, Tensor)]
    sides = _sides(stacks)
    found = (
        Spectrum(
            values[len(values) - len(stack) * min(side) :],
            len(stack),
            *side,
            no_spread(stack.dtype),
        )
        for stack, side, values in zip(stacks, sides, _exact(stacks, hill, sides), strict=True)
    )
    return [one.spectrum() if isinstance(one, Gram) else next(found) for one in given]


def spectra(weights: Sequence[Tensor], hill: Hill = MEDIAN) -> list[Tensor]:
    """Return each weight's ascending spectrum (n,) in float64 on the CPU, exact enough for `hill`.

    All are NaN for a weight that is not finite.
    """
    return _exact([matrices(weight.detach()) for weight in weights], hill)


def spectrum(weight: Tensor) -> Tensor:
    """Return the ascending eigenvalues (n,) of a weight's Gram matrix: its squared singular values, float64 on the CPU.

    `weight` is (out, in), or (out, in, kh, kw): then those of the matrices of all kernel positions, times sqrt(0.5)
    each, together. Small ones are exact to 1e-12 of the largest. All are NaN where the weight is not finite. Raises
    ValueError for another shape.
    """
    (found,) = spectra([weight], WHOLE)
    return found


def alphas(weights: Sequence[Tensor], hill: Hill = MEDIAN) -> list[float]:
    """Return each weight's Hill exponent, NaN where it cannot be measured."""
    pairs = zip(weights, spectra(weights, hill), strict=True)
    return [hill.alpha(spectrum, no_spread(weight.dtype)) for weight, spectrum in pairs]


def _sides(stacks: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the numbers of rows and columns that are not zero in all matrices of a stack."""
    found = []
    for stack in stacks:
        some = (stack.detach() != 0).any(0)
        found.append(torch.stack([some.any(1).sum(), some.any(0).sum()]))
    # Read at once where all are on one device, so that the host waits once.
    one = len({counts.device for counts in found}) == 1
    read = torch.stack(found).tolist() if one else [counts.tolist() for counts in found]
    return [(rows, columns) for rows, columns in read]


def _exact(
    stacks: Sequence[Tensor], hill: Hill, sides: Sequence[tuple[int, int]] | None = None
) -> list[Tensor]:
    """Return ascending spectra: those of which `hill` reads eigenvalues that float32 has not are taken in float64."""
    found = _decompose(stacks, torch.float32)
    again = []
    for i, spectrum in enumerate(found):
        kept = len(spectrum) if sides is None else len(stacks[i]) * min(sides[i])
        index, _ = hill.tail(kept)
        if kept and float(spectrum[len(spectrum) - kept + index]) < GUARD * float(spectrum[-1]):
            again.append(i)
    redone = _decompose([stacks[i] for i in again], torch.float64)
    for i, spectrum in zip(again, redone, strict=True):
        found[i] = spectrum
    return found


def _decompose(stacks: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return spectra from Gram matrices in `dtype` or better, those of one size together."""
    found: list[Tensor] = [torch.empty(0)] * len(stacks)
    sizes: dict[tuple[torch.device, torch.dtype, int, int], list[int]] = {}
    for i, stack in enumerate(stacks):
        wide = _wider(stack.dtype, dtype)
        sizes.setdefault((stack.device, wide, min(stack.shape[1:]), len(stack)), []).append(i)
    for (_, wide, short, number), members in sizes.items():
        step = max(1, BATCH // max(1, short * short * number))
        for start in range(0, len(members), step):
            chunk = members[start : start + step]
            for i, spectrum in zip(chunk, _batch([stacks[j] for j in chunk], wide), strict=True):
                found[i] = spectrum
    return found


def _batch(stacks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the spectra of stacks whose Gram matrices have one size, shape (stacks, n)."""
    number, (short, _) = len(stacks[0]), sorted(stacks[0].shape[1:])
    grams = stacks[0].new_zeros((len(stacks), number, short, short), dtype=dtype)
    squares = []
    for i, stack in enumerate(stacks):
        wide = stack.detach().to(dtype)
        tall = wide if wide.shape[-2] >= wide.shape[-1] else wide.mT
        # Scaled to a largest entry of 1, so that squares neither overflow nor vanish.
        peak = _peak(wide)
        known = peak.isfinite()
        lower_gram(tall / torch.where(known & (peak > 0), peak, 1.0), grams[i])
        grams[i].masked_fill_(~known, 0.0)
        squares.append(torch.where(known, peak.double().square(), math.nan))
    values = torch.linalg.eigvalsh(grams, UPLO="L").double().clamp_min(0.0)
    pooled: Tensor = values.flatten(1).sort(dim=1).values * torch.stack(squares).unsqueeze(1)
    return pooled.cpu()


def _peak(matrices: Tensor) -> Tensor:
    """Return the largest absolute value, NaN where an entry is."""
    if matrices.is_complex():
        norm: Tensor = torch.linalg.vector_norm(matrices, math.inf)
        return norm
    low, high = torch.aminmax(matrices)
    return torch.maximum(high, -low)


def lower_gram(tall: Tensor, gram: Tensor) -> None:
    """Write the Gram matrices of tall ones into their lower triangle, by blocks: the rest is the same again."""
    n = tall.shape[-1]
    ends = [n * i // BLOCKS for i in range(BLOCKS + 1)] if n >= BLOCKED else [0, n]
    for begin, end in pairwise(ends):
        gram[..., begin:end, :end] = tall[..., begin:end].mH @ tall[..., :end]
