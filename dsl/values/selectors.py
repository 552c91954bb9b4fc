"""Selectors: sets of modules or parameters, as trees; the compiler says what they contain."""

from __future__ import annotations

from typing import ClassVar

from trainc.dsl.values.expressions import Expr
from trainc.dsl.values.notation import ATOM, Written, call, infix, number, quoted
from trainc.dsl.values.value import Value, plain_number


class Glob(Value):
    """Names by pattern: `*` is one segment, `**` is any number of them."""

    pattern: str

    def written(self) -> Written:
        return quoted(self.pattern)


class OfType(Value):
    """Modules by class name, and their own parameters."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        self._set("names", tuple(sorted(set(self.names))))

    def written(self) -> Written:
        return call("type", ((None, (name, ATOM)) for name in self.names))


class Ndim(Value):
    """Parameters with `n` axes."""

    n: int

    def written(self) -> Written:
        return call("ndim", [(None, number(self.n))])


class Role(Value):
    """What plays a role: `norm`, `head` ..."""

    name: str

    def written(self) -> Written:
        return call("role", [(None, (self.name, ATOM))])


class DepthRange(Value):
    """What lies between two depths in the model; 0 is the input, 1 the head."""

    low: float
    high: float

    def __post_init__(self) -> None:
        self._set("low", plain_number(self.low))
        self._set("high", plain_number(self.high))

    def written(self) -> Written:
        return call("depth", [(None, infix("..", number(self.low), number(self.high)))])


class All(Value):
    """Everything."""

    def written(self) -> Written:
        return "all", ATOM


class Trainable(Value):
    """What requires a gradient."""

    def written(self) -> Written:
        return "trainable", ATOM


class Matrices(Value):
    """Weights of linear layers, convolutions, embeddings and experts, however many matrices one tensor holds."""

    def written(self) -> Written:
        return "matrices", ATOM


class Where(Value):
    """The members of a selection for which a condition on `numel`, `ndim`, `depth` or `block` is true."""

    selector: Selector
    condition: Expr

    def written(self) -> Written:
        return infix("where", self.selector.written(), self.condition.written())


class Pair(Value):
    """Two selectors and the operator between them."""

    op: ClassVar[str]
    left: Selector
    right: Selector

    def written(self) -> Written:
        return infix(self.op, self.left.written(), self.right.written())


class Union(Pair):
    """`left | right`."""

    op = "|"


class Intersection(Pair):
    """`left & right`."""

    op = "&"


class Difference(Pair):
    """`left - right`."""

    op = "-"


class Expect(Value):
    """A selection that must have `count` members."""

    selector: Selector
    count: int

    def written(self) -> Written:
        return infix("expect", self.selector.written(), number(self.count))


Selector = (
    Glob | OfType | Ndim | Role | DepthRange | All | Trainable | Matrices | Where
    | Union | Intersection | Difference | Expect
)  # fmt: skip


class Scoped(Value):
    """A number, or an expression for one, for some parameters: `0.1 on mats`; `on` None means for all of them."""

    value: float | Expr
    on: Selector | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.value, Expr):
            self._set("value", plain_number(self.value))

    @property
    def number(self) -> float:
        """Return its number; raises TypeError where it is an expression."""
        if isinstance(self.value, Expr):
            raise TypeError(f"`{self}` is an expression, no number")
        return self.value

    def written(self) -> Written:
        value = self.value.written() if isinstance(self.value, Expr) else number(self.value)
        return value if self.on is None else infix("on", value, self.on.written())
