"""What measuring may cost: the fields that say how much at a time, and how often, and what is read for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Self

from pydantic import Field, field_validator, model_validator

from trainc.dsl.reading.construct import Construct, Effect, Fraction

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.structure.weights import MatrixUnit
    from trainc.kernels.parameter.spectrum import Gram
    from trainc.runtime.factors.measuring import Measuring


class MeasuredAtTimes(Construct):
    """Base of policies that measure weights now and then."""

    parts: int = Field(
        default=1,
        ge=1,
        description="each measurement after the first is of one of so many parts of the weights, in turn, so that no"
        " step takes long",
    )
    budget: Fraction | None = Field(
        default=None,
        description="the largest fraction of the steps' time that measurements may take: from the second on each"
        " decides how many steps there are to the next, at least 10. Default: none",
    )
    tolerance: float | None = Field(
        default=None,
        gt=0,
        description="a weight whose change since it was measured cannot have moved alpha by more than this is not"
        " measured again. Needs memory for a copy of each measured weight. Default: all are",
    )
    beside: bool = Field(
        default=False,
        description="whether a thread measures copies of the weights while the step runs, on CUDA in a stream of its"
        " own; factors then act from the next step on. Needs memory for these copies. Not measured on a GPU",
    )

    @field_validator("budget", mode="after")
    @classmethod
    def _is_some(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"a budget is above 0% and below 100%, not {100 * value:g}%")
        return value

    @model_validator(mode="after")
    def _has_one_remedy(self) -> Self:
        if self.beside and self.budget is not None:
            raise ValueError(
                "`budget` is of the time that steps wait for a measurement, and with `beside` its cost is that the"
                " passes run more slowly, which nothing measures: remove one of the two"
            )
        return self

    def describe(self, effect: Effect) -> str:
        """Return the words for an effect in the plan's table of the step, and from when on factors act."""
        later = self.beside and effect.phase == "rates"
        return f"{effect.action} of the next step, beside this one" if later else effect.action

    def measuring(self, label: str) -> Measuring:
        """Return what decides when a clause with these fields measures, and what."""
        from trainc.runtime.factors.measuring import Measuring
        from trainc.runtime.factors.refresh import Refresh
        from trainc.runtime.factors.unmoved import Unmoved

        unmoved = None if self.tolerance is None else Unmoved()
        return Measuring(Refresh(label, self.parts, self.budget), unmoved, self.beside)

    @property
    def takes_grams(self) -> bool:
        """Whether `measure` takes Gram matrices in place of matrices, so that sharded weights are not gathered."""
        return False

    @abstractmethod
    def measure_with_room(self, matrices: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Return the figure of each part, and the Frobenius norm of a change that moves it by `tolerance` at most."""


def read(
    model: nn.Module, units: Iterable[MatrixUnit], takes_grams: bool
) -> dict[str, Tensor | Gram]:
    """Return the matrices of units by name; all processes call this alike.

    Weights that are sharded over processes are gathered. With `takes_grams`, those with rows on each, and at least as
    many rows as columns, are not: the Gram matrices of the rows are added up.
    """
    from trainc.compiler.structure.weights import read_units
    from trainc.runtime.processes.sharded import full

    units = [*units]
    found: dict[str, Tensor | Gram] = {}
    for unit in units if takes_grams else ():
        if (gram := _summed(model, unit)) is not None:
            found[unit.name] = gram
    return found | read_units(model, [unit for unit in units if unit.name not in found], full)


def _summed(model: nn.Module, unit: MatrixUnit) -> Gram | None:
    """Return the Gram matrix of a unit whose rows are on several processes; None where these are not its outputs."""
    import torch

    from trainc.compiler.structure.weights import read_weight
    from trainc.kernels.parameter.spectrum import Gram
    from trainc.runtime.processes.sharded import held_rows, sum_over_processes

    part, weight = unit.part, unit.weight
    by_rows = weight.division.layout == "linear" and part.axis == "outputs"
    if weight.computed or not by_rows or part.index is not None or unit.outputs < unit.inputs:
        return None
    value = read_weight(model, weight)
    if (shard := held_rows(value)) is None:
        return None
    rows, held = shard
    if part.ranges:
        index = [i - held.start for r in part.ranges for i in r if i in held]
        rows = rows[torch.tensor(index, dtype=torch.long, device=rows.device)]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float64))
    both = torch.cat([wide.mH @ wide, wide.new_zeros(1, unit.inputs)])
    both[-1, 0] = (rows != 0).any(1).sum()
    sum_over_processes(both, value)
    return Gram(both[:-1], int(both[-1, 0].real), rows.dtype)
