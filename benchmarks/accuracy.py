"""Errors against float64, ours beside the ATen composition's in the same dtype, on hard inputs.

An error is in units in the last place (ulp) of the scale of what it is part of: of an example where
a result has examples, of an entry where entries are statistics of their own, else of the result.
A ratio is our error to ATen's, ATen's counted as half a unit, what rounding alone leaves, where it
is less. Entries that are not finite are counted and not measured.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.accuracy_cases import CASES, Case
from benchmarks.adversarial import fill
from benchmarks.device import clones, poison
from benchmarks.measure import Json, machine
from benchmarks.operators import Problem, step
from trainc.kernels.library.contracts import accumulation_dtype

RESULTS = ROOT / "benchmarks" / "results" / "accuracy_cpu.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXAMPLES = {"y", "total", "dx", "dresidual", "dh0", "ddelta", "dlogits", "weight", "norms"}
COLUMNS = (
    "operator", "variant", "result", "dtype", "family", "ours max", "ours rms", "aten max", "aten rms",
    "ratio max", "ratio rms", "lost", "gained",
)  # fmt: skip
# Rounding alone leaves up to half a unit in the last place.
FLOOR = 0.5


@dataclass
class Errors:
    """Errors of one result in units in the last place, gathered over draws."""

    largest: float = 0.0
    squares: list[float] = field(default_factory=list)
    entries: int = 0

    def add(self, units: Tensor) -> None:
        """Take in another draw's errors."""
        if units.numel():
            self.entries += units.numel()
            self.largest = max(self.largest, float(units.max()))
            self.squares.append(float(units.square().mean()))

    @property
    def rms(self) -> float:
        """Root of the mean square."""
        return math.sqrt(sum(self.squares) / max(1, len(self.squares)))


@dataclass
class Pair:
    """Both versions' errors in one result, and entries that only one of them made finite."""

    ours: Errors = field(default_factory=Errors)
    aten: Errors = field(default_factory=Errors)
    lost: int = 0
    gained: int = 0

    def add(self, mine: Tensor, theirs: Tensor, true: Tensor, unit: Tensor, largest: float) -> None:
        """Take in another draw, `largest` being the largest number of the results' dtype."""
        finite, other = mine.isfinite(), theirs.isfinite()
        held = true.abs() <= largest / 2  # what overflows by right is nobody's loss
        self.lost += int((held & other & ~finite).sum())
        self.gained += int((held & finite & ~other).sum())
        both = finite & other & true.isfinite()
        self.ours.add(((mine - true).abs() / unit)[both])
        self.aten.add(((theirs - true).abs() / unit)[both])

    def ratios(self) -> tuple[float, float]:
        """Ours to ATen's: of the largest errors, and of the root mean squares."""
        return (
            self.ours.largest / max(self.aten.largest, FLOOR),
            self.ours.rms / max(self.aten.rms, FLOOR),
        )


def ulp(case: Case, name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit of error of every entry of a result."""
    size = exact.abs().nan_to_num(posinf=0.0)
    if name in case.each:
        pass
    elif name in EXAMPLES and size.dim():
        size = size.flatten(1).amax(1).view(-1, *[1] * (size.dim() - 1)).expand(size.shape)
    elif size.numel():
        size = size.amax().expand(size.shape)
    limits = torch.finfo(dtype)
    return (size * limits.eps).clamp(min=limits.tiny * limits.eps)


def measured(case: Case, dtype: torch.dtype, family: str, draws: int, device: str) -> list[Pair]:
    """Errors of every result of one case."""
    pairs = [Pair() for _ in case.results]
    for draw in range(draws):
        torch.manual_seed(draw)
        problem = case.build(case.size, dtype, device)
        fill(problem, family, case.data, dtype)
        for pair, name, three in zip(pairs, case.results, _three_ways(problem), strict=True):
            kind = three[0].dtype
            # Sums that are returned in a wider dtype are not expected to have its precision.
            kind = kind if kind.itemsize < 8 else accumulation_dtype(dtype)
            mine, theirs, true = (one.detach().double() for one in three)
            pair.add(mine, theirs, true, ulp(case, name, true, kind), torch.finfo(kind).max)
    return pairs


def _three_ways(problem: Problem) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ours on poisoned memory, ATen's and the exact results."""
    theirs = step(clones(problem), problem.aten, by_hand=True)
    poison(theirs)
    mine = step(clones(problem), problem.ours)
    wide = clones(problem, torch.float64)
    exact = step(wide, problem.exact or problem.aten, by_hand=True)
    triples = zip(mine, theirs, exact, strict=True)
    return [(a, b, c) for a, b, c in triples if a is not None and b is not None and c is not None]


def row(case: Case, result: str, dtype: torch.dtype, family: str, pair: Pair) -> Json:
    """One row of the table."""
    largest, rms = pair.ratios()
    return {
        "operator": case.operator,
        "variant": case.variant,
        "result": result,
        "dtype": str(dtype)[6:],
        "family": family,
        "ours": {"max": rounded(pair.ours.largest), "rms": rounded(pair.ours.rms)},
        "aten": {"max": rounded(pair.aten.largest), "rms": rounded(pair.aten.rms)},
        "ratio": {"max": rounded(largest), "rms": rounded(rms)},
        "entries": pair.ours.entries,
        "lost": pair.lost,
        "gained": pair.gained,
    }


def flat(one: Json) -> list[Any]:
    """A row as a list, in the order of COLUMNS."""
    return [one[key][part[0]] if part else one[key] for key, *part in map(str.split, COLUMNS)]


def rounded(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


def rows(case: Case, dtype: torch.dtype, draws: int = 4, device: str = "cpu") -> list[Json]:
    """Every family and result of one case in one dtype."""
    return [
        row(case, result, dtype, family, pair)
        for family in case.families
        for result, pair in zip(
            case.results, measured(case, dtype, family, draws, device), strict=True
        )
    ]


def run(only: Sequence[str] = (), draws: int = 4, device: str = "cpu") -> list[Json]:
    """Measure every case whose name starts with one of `only`."""
    return [
        found
        for case in CASES
        if not only or case.name.startswith(tuple(only))
        for dtype in DTYPES
        for found in rows(case, dtype, draws, device)
    ]


def worst(found: Sequence[Json], which: str = "max") -> dict[str, dict[str, float]]:
    """The largest ratio of every operator and family."""
    table: dict[str, dict[str, float]] = {}
    for one in found:
        line = table.setdefault(one["operator"], {})
        line[one["family"]] = max(line.get(one["family"], 0.0), one["ratio"][which])
    return table


def text(one: Json) -> str:
    """One row of the printed table."""
    name = f"{one['operator']}, {one['variant']}" if one["variant"] else one["operator"]
    parts = [f"{name:36} {one['result']:11} {one['dtype']:9} {one['family']:16}"]
    parts += [f"{one[who]['max']:10.3g} {one[who]['rms']:10.3g}" for who in ("ours", "aten")]
    parts.append(f"{one['ratio']['max']:9.3g} {one['ratio']['rms']:9.3g}")
    parts += [f"{word} {one[word]}" for word in ("lost", "gained") if one[word]]
    return " ".join(parts)


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names that cases start with")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options: Any = parser.parse_args()
    print(f"{'operator':36} {'result':11} {'dtype':9} {'family':16}"
          f"{'ours: max':>10} {'rms':>10} {'ATen: max':>10} {'rms':>10} {'ratio':>9} {'rms':>9}")  # fmt: skip
    found = run(options.only, options.draws, options.device)
    for one in found:
        print(text(one))
    default = RESULTS if options.device == "cpu" and not options.only else None
    if (out := options.out or default) is not None:
        result = {
            "benchmark": "accuracy",
            "taken": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "device": options.device,
            "unit": "units in the last place of the scale; ratios with a floor of half a unit",
            "draws": options.draws,
            "worst": {which: worst(found, which) for which in ("max", "rms")},
            "columns": COLUMNS,
        }
        lines = ",\n".join(json.dumps(flat(one)) for one in found)
        shown = json.dumps(result, indent=1).removesuffix("\n}")
        out.write_text(f'{shown},\n "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
