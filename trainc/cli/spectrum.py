"""`trainc spectrum`: how heavy the tails of the spectra of weights are, as a table and as a picture."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainc.cli.common import Overrides, Plot, overrides, require_drawable

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.cli.weights import FoundWeights
    from trainc.kernels.parameter.spectrum import Spectrum

LEAST = 3
"""The least number of eigenvalues that an exponent says something of."""
DRAWN = 48
"""The most spectra in a picture."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is measured of one weight; NaN where a number means nothing."""

    name: str
    shape: tuple[int, ...]
    alpha: float
    null: float
    spread: float
    xmin: float
    stable_rank: float
    spectral_norm: float
    entropy: float
    eigenvalues: list[float] = field(repr=False)

    @property
    def distance(self) -> float:
        """Return how far alpha is from the null, in standard deviations of the null."""
        return (self.alpha - self.null) / self.spread

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, None where they mean nothing; without the eigenvalues."""
        found = asdict(self) | {"distance": self.distance}
        del found["eigenvalues"], found["xmin"]
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()
        }


def measure(stacks: dict[str, Tensor]) -> list[Row]:
    """Return a row for each weight, given as matrices (count, out, in)."""
    from trainc.kernels.parameter.spectrum import WHOLE, spectra_of

    found = spectra_of([*stacks.values()], WHOLE)
    return [_row(name, w, s) for (name, w), s in zip(stacks.items(), found, strict=True)]


def _row(name: str, stack: Tensor, found: Spectrum) -> Row:
    from trainc.kernels.parameter.figures import figures_of
    from trainc.kernels.parameter.spectral_null import null_law

    shape = tuple(stack.shape)[stack.shape[0] == 1 :]
    figures, null, spread = figures_of(found), math.nan, math.nan
    if figures.eigenvalues >= LEAST:
        null, spread = null_law((found.rows, found.columns, found.count, 1))
    return Row(
        name,
        shape,
        figures.alpha,
        null,
        spread,
        figures.xmin,
        figures.stable_rank,
        figures.spectral_norm,
        0.0 if figures.stable_rank == 1 else figures.entropy,
        found.values.tolist() or [0.0],
    )


def choose(
    found: FoundWeights, only: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the weights to measure, and the shapes of the others; `only` are patterns of names, all without one."""

    def wanted(name: str) -> bool:
        return not only or any(fnmatchcase(name, pattern) for pattern in only)

    stacks = {name: stack for name, stack in found.stacks.items() if wanted(name)}
    small = {n: tuple(s.shape) for n, s in stacks.items() if len(s) * min(s.shape[1:]) < LEAST}
    fit = {name: stack for name, stack in stacks.items() if name not in small}
    if not fit:
        names = [f"`{name}`" for name in [*found.stacks, *found.others]]
        among = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "none"
        chosen = f" that `--only {' '.join(only)}` chooses" if only else ""
        raise ValueError(
            f"{found.source} has no weight{chosen} with a spectrum: that is a matrix, or the kernel of a 2-D"
            f" convolution, with {LEAST} eigenvalues or more. Its tensors: {among}"
        )
    return fit, {name: shape for name, shape in found.others.items() if wanted(name)} | small


def _print(rows: Sequence[Row], others: dict[str, tuple[int, ...]], source: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trainc.runtime.report.number_text import format_number

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(Text(f"{source}: {len(rows)} weight{'s' * (len(rows) != 1)}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("weight", overflow="fold")
    heads = ("shape", "alpha", "null", "distance", "stable rank", "norm", "entropy")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        numbers = (row.stable_rank, row.spectral_norm, row.entropy)
        table.add_row(
            Text(row.name),
            " x ".join(map(str, row.shape)),
            *(f"{value:.3f}" if math.isfinite(value) else "?" for value in (row.alpha, row.null)),
            f"{row.distance:+.1f}" if math.isfinite(row.distance) else "?",
            *map(format_number, numbers),
        )
    console.print(table)
    if unknown := [row.name for row in rows if not math.isfinite(row.alpha)]:
        console.print(
            Text(f"? zero, not finite, of low rank or orthogonal: {', '.join(unknown)}"),
            soft_wrap=True,
        )
    if left := _without_spectrum(others):
        console.print(Text(f"without a spectrum: {left}"), soft_wrap=True)


def _without_spectrum(others: dict[str, tuple[int, ...]]) -> str:
    """Return how many vectors there are, and the names of other tensors."""
    vectors = sum(len(shape) < 2 for shape in others.values())
    odd = [f"{name} {[*shape]}" for name, shape in others.items() if len(shape) >= 2]
    said = [f"{vectors} vector{'s' * (vectors > 1)}"] if vectors else []
    return ", ".join([*said, *odd[:5], *(["..."] if len(odd) > 5 else [])])


def _draw(rows: Sequence[Row], plot: Path) -> None:
    require_drawable(plot)
    from trainc.runtime.report.spectra import DrawnSpectrum, draw_spectra

    shown = [
        DrawnSpectrum(
            row.name,
            row.eigenvalues,
            min(row.shape[-2:]) / max(row.shape[-2:]),
            row.alpha,
            row.xmin,
            row.null,
            row.spread,
        )
        for row in rows[:DRAWN]
    ]
    said = f"drew {draw_spectra(shown, plot)}"
    if len(rows) > DRAWN:
        said += f", with the first {DRAWN} of {len(rows)} weights: choose others with `--only`"
    print(said, file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("spectrum")
    def spectrum(
        weights: Annotated[
            str,
            typer.Argument(
                metavar="WEIGHTS",
                help="A run, a checkpoint, a saved program, FILE.safetensors, SPEC.train, or"
                ' "module:callable { name = value }".',
            ),
        ],
        only: Annotated[
            list[str] | None,
            typer.Option(
                "--only", metavar="NAME", help="Weights to measure, with `*`; may be repeated."
            ),
        ] = None,
        set_: Overrides = None,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print JSON: a list of weights with their numbers.")
        ] = False,
        plot: Plot = None,
    ) -> None:
        """Show how heavy the tails of the spectra of weights are.

        The spectrum of a weight is its squared singular values. `alpha` is the exponent of the power law that fits
        their larger half. Training makes tails heavier, and alpha smaller: of the weights of one model, those with the
        largest alpha are trained least, which is what `lr temp_balance` goes by.

        `null` is alpha of a matrix of this shape with independent entries, as at the start of training, and
        `distance` is how far alpha is from the null, in standard deviations of the null. From -2 to 2 alpha says
        nothing of the training; compare distances, not alphas, where shapes differ.

        `stable rank` is the sum of the spectrum over its largest value; `norm` the largest singular value; `entropy`
        that of the spectrum, 1 where all are equal. A convolution has the spectra of all its kernel positions
        together, times 1/2. Of a model each part of a fused projection has a row, as `lr temp_balance` measures it;
        a checkpoint does not say what is fused, and has whole weights.

        For instance: trainc spectrum runs/tonight --only "blocks.*.mlp.*" --plot spectra.png
        """
        from trainc.cli.weights import find_weights

        found = find_weights(weights, [f"{n}={v}" for n, v in overrides(set_).items()])
        fit, others = choose(found, only or ())
        rows = measure(fit)
        if as_json:
            print(json.dumps([row.to_json() for row in rows], indent=1))
        else:
            _print(rows, others, found.source)
        if plot is not None:
            _draw(rows, plot)
