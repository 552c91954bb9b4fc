"""What optimizers share that move all parameters as one vector: no rate, no decay, few parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.optimizer._base import Optimizer
from trainc.compiler.errors import FieldError
from trainc.dsl.reading.construct import ScopedSchedules
from trainc.dsl.values.value_json import Number, expressions_in

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering

MOST = 10_000
"""The most parameters that are searched together."""


class OfVector(Optimizer):
    """Base of these."""

    entrywise: ClassVar = False
    may_stay: ClassVar = True

    lr: ScopedSchedules = Field(
        default=Number(1),
        description="fraction of the way to the point that an iteration finds which the weights go; by selector,"
        " entries have to reach each parameter",
    )

    @property
    def asks(self) -> bool:
        """True: each step evaluates the loss several times."""
        return True

    @property
    def moments_known(self) -> bool:
        """True: the state is that of all parameters together."""
        return True

    @property
    def matrices(self) -> int:
        """Return how many matrices of n times n numbers are kept, for n parameters."""
        return 0

    def state_bytes(self, entries: int) -> int:
        """Return the bytes of the state of so many numbers together, in float64 whatever the weights are."""
        return round(8 * entries * (self.moments + self.matrices * entries))

    def lower(self, to: Lowering) -> None:
        """Claim the parameters; raises FieldError for too many, or complex ones, and for a weight decay."""
        if any(value != Number(0) for value in expressions_in(self.weight_decay)):
            raise FieldError(
                "weight_decay",
                f"`{self.title}` minimizes the loss as it is: add a penalty as a `regularize` clause,"
                " and remove `weight_decay`",
            )
        frozen = set() if self.freeze is None else {*to.select(self.freeze, "parameters")}
        entries = [one for one in to.parameters() if one.name not in frozen]
        for entry in entries:
            if to.tensor(entry.name).is_complex():
                raise FieldError(
                    "on", f"`{entry.name}` is complex: `{self.title}` moves real numbers"
                )
        count = sum(to.tensor(entry.name).numel() for entry in entries)
        if count > MOST:
            raise FieldError(
                "on",
                f"`{self.title}` searches at most {MOST:,} parameters together, and these are {count:,}: select fewer,"
                " or use an optimizer that steps by gradients",
            )
        super().lower(to)
