"""Selectors: sets of modules or parameters, as trees; the compiler says what they contain."""

from __future__ import annotations

from dataclasses import dataclass

from trainc.dsl.expressions import Expr
from trainc.dsl.quantities import Value, tidy

ROLES = ("norm", "bias", "embedding", "attention", "mlp", "head")


@dataclass(frozen=True, slots=True)
class Glob(Value):
    """Names by pattern: `*` is one segment, `**` is any number of them."""

    pattern: str


@dataclass(frozen=True, slots=True)
class OfType(Value):
    """Modules by class name, and the parameters they own."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(sorted(set(self.names))))


@dataclass(frozen=True, slots=True)
class Ndim(Value):
    """Parameters with `n` axes."""

    n: int


@dataclass(frozen=True, slots=True)
class Role(Value):
    """What plays one of `ROLES`."""

    name: str


@dataclass(frozen=True, slots=True)
class DepthRange(Value):
    """What lies between two depths; 0 is the input, 1 the head."""

    low: float
    high: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", tidy(self.low))
        object.__setattr__(self, "high", tidy(self.high))


@dataclass(frozen=True, slots=True)
class All(Value):
    """Everything."""


@dataclass(frozen=True, slots=True)
class Trainable(Value):
    """What requires a gradient."""


@dataclass(frozen=True, slots=True)
class Where(Value):
    """Those of a selection that fulfil a condition on `numel`, `ndim`, `depth` or `block`."""

    selector: Selector
    condition: Expr


@dataclass(frozen=True, slots=True)
class Union(Value):
    """`left | right`."""

    left: Selector
    right: Selector


@dataclass(frozen=True, slots=True)
class Intersection(Value):
    """`left & right`."""

    left: Selector
    right: Selector


@dataclass(frozen=True, slots=True)
class Difference(Value):
    """`left - right`."""

    left: Selector
    right: Selector


@dataclass(frozen=True, slots=True)
class Expect(Value):
    """A selection that must have `count` members."""

    selector: Selector
    count: int


Selector = (
    Glob | OfType | Ndim | Role | DepthRange | All | Trainable | Where
    | Union | Intersection | Difference | Expect
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scoped(Value):
    """A number for some parameters, written `0.1 on mats`; `on` None means for all of them."""

    value: float
    on: Selector | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", tidy(self.value))
