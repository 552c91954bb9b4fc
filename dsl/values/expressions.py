"""Expressions: schedules, signals and the conditions on them, as trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trainc.dsl.values.durations import Duration
from trainc.dsl.values.notation import ATOM, Written, call, infix, listed, number, prefix
from trainc.dsl.values.value import Value, plain_number

BINARY = ("or", "and", "<", ">", "<=", ">=", "==", "!=", "is", "then", "+", "-", "*", "/")
COMPARISONS = ("<", ">", "<=", ">=", "==", "!=", "is")


class Number(Value):
    """A plain number."""

    value: float

    def __post_init__(self) -> None:
        self._set("value", plain_number(self.value))

    def written(self) -> Written:
        return number(self.value)


class Quantity(Value):
    """A duration inside an expression."""

    duration: Duration

    def written(self) -> Written:
        return self.duration.written()


class Name(Value):
    """A name: `depth`, a signal such as `label` or `label.low`."""

    id: str

    def written(self) -> Written:
        return self.id, ATOM


class Call(Value):
    """A function of the language; keyword arguments are kept sorted by name."""

    function: str
    args: tuple[Expr, ...] = ()
    kwargs: tuple[tuple[str, Expr], ...] = ()

    def __post_init__(self) -> None:
        pairs = self.kwargs.items() if isinstance(self.kwargs, Mapping) else self.kwargs
        self._set("args", tuple(self.args))
        self._set("kwargs", tuple(sorted(pairs)))

    def written(self) -> Written:
        plain = ((None, x.written()) for x in self.args)
        return call(self.function, [*plain, *((name, x.written()) for name, x in self.kwargs)])


class Unary(Value):
    """`-x` (op `neg`) or `not x` (op `not`)."""

    op: str
    x: Expr

    def written(self) -> Written:
        return prefix("-" if self.op == "neg" else self.op, self.x.written())


class Binary(Value):
    """Two operands and one of `BINARY`; `x is nan` is `Binary("is", x, Name("nan"))`."""

    op: str
    left: Expr
    right: Expr

    def written(self) -> Written:
        return infix(self.op, self.left.written(), self.right.written())


class Items(Value):
    """A list, as in `step(at = [50%, 75%], factor = 0.1)`."""

    items: tuple[Expr, ...]

    def __post_init__(self) -> None:
        self._set("items", tuple(self.items))

    def written(self) -> Written:
        return listed(x.written() for x in self.items)


Expr = Number | Quantity | Name | Call | Unary | Binary | Items


def called(function: str, *args: Expr, **kwargs: Expr) -> Call:
    """Return a `Call` of Python arguments."""
    return Call(function, args, tuple(kwargs.items()))


def walk(expression: Expr) -> Iterator[Expr]:
    """Yield an expression and everything inside it, outermost first."""
    todo: list[Expr] = [expression]
    while todo:
        item = todo.pop()
        yield item
        match item:
            case Call(_, args, kwargs):
                todo += [*args, *(x for _, x in kwargs)]
            case Items(items):
                todo += items
            case Unary(_, x):
                todo.append(x)
            case Binary(_, left, right):
                todo += [left, right]
