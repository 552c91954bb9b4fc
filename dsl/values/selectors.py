"""Selectors: sets of modules or parameters, as trees; the compiler says what they contain."""

from __future__ import annotations

from trainc.dsl.values.durations import Value, tidy
from trainc.dsl.values.expressions import Expr

ROLES = ("norm", "bias", "embedding", "attention", "mlp", "head")


class Glob(Value):
    """Names by pattern: `*` is one segment, `**` is any number of them."""

    pattern: str


class OfType(Value):
    """Modules by class name, and the parameters they own."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        self._put("names", tuple(sorted(set(self.names))))


class Ndim(Value):
    """Parameters with `n` axes."""

    n: int


class Role(Value):
    """What plays one of `ROLES`."""

    name: str


class DepthRange(Value):
    """What lies between two depths; 0 is the input, 1 the head."""

    low: float
    high: float

    def __post_init__(self) -> None:
        self._put("low", tidy(self.low))
        self._put("high", tidy(self.high))


class All(Value):
    """Everything."""


class Trainable(Value):
    """What requires a gradient."""


class Where(Value):
    """Those of a selection that fulfil a condition on `numel`, `ndim`, `depth` or `block`."""

    selector: Selector
    condition: Expr


class Union(Value):
    """`left | right`."""

    left: Selector
    right: Selector


class Intersection(Value):
    """`left & right`."""

    left: Selector
    right: Selector


class Difference(Value):
    """`left - right`."""

    left: Selector
    right: Selector


class Expect(Value):
    """A selection that must have `count` members."""

    selector: Selector
    count: int


Selector = (
    Glob | OfType | Ndim | Role | DepthRange | All | Trainable | Where
    | Union | Intersection | Difference | Expect
)  # fmt: skip


class Scoped(Value):
    """A number for some parameters, written `0.1 on mats`; `on` None means for all of them."""

    value: float
    on: Selector | None = None

    def __post_init__(self) -> None:
        self._put("value", tidy(self.value))
