"""Nodes of the tree to plain values: numbers, durations, ranges, paths, and JSON."""

from __future__ import annotations

from typing import Any, cast

from trainc.dsl.syntax import ast
from trainc.dsl.syntax.ast import Node
from trainc.dsl.text.source import Span
from trainc.dsl.text.vocabulary import TIMES, UNITS
from trainc.dsl.values import value_json as v

_PLURALS = {word: unit for unit in UNITS for word in (unit, unit[:-1])}
_SUFFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Unreadable(Exception):
    """Raised for a node that is not what its place needs; `text` says what was expected, `edit` what to write.

    `safe` edits cannot change what was meant.
    """

    def __init__(
        self,
        node: Node | Span,
        text: str,
        rule: str = "bad-value",
        help: str | None = None,
        message: str = "",
        edit: str | None = None,
        safe: bool = False,
    ) -> None:
        super().__init__(text)
        self.span = node if isinstance(node, Span) else node.span
        self.text, self.rule, self.help, self.message = text, rule, help, message
        self.edit, self.safe = edit, safe


def number_of(node: ast.Num) -> float:
    """Return the value of a number; an int where it is written as one."""
    text = node.text.replace("_", "")
    factor = _SUFFIXES.get(text[-1], 1)
    digits = text[:-1] if factor > 1 else text
    if len(digits) > 400:
        raise Unreadable(node, "this number has too many digits")
    value = int(digits) if digits.isdigit() else float(digits)
    product = value * factor
    if abs(product) > 1e300:
        raise Unreadable(node, "this number is too large")
    whole = factor > 1 and product == int(product)
    return int(product) if whole else product


def constant(node: Node) -> float | v.Duration:
    """Return the number or duration that an expression without names is equal to."""
    match node:
        case ast.Num():
            return number_of(node)
        case ast.Measure(number, "%"):
            return v.Duration(_hundredth(number), "run")
        case ast.Measure(number, unit):
            written = _PLURALS[unit]
            if written in TIMES:
                return v.Duration(number_of(number) * TIMES[written], "seconds")
            return v.Duration(number_of(number), cast(v.Unit, written))
        case ast.Prefix("-", operand):
            return _arithmetic(node, "*", -1, constant(operand))
        case ast.Infix("+" | "-" | "*" | "/" as op, left, right):
            return _arithmetic(node, op, constant(left), constant(right))
    raise Unreadable(node, f"expected a number, found {describe(node)}")


def _hundredth(node: ast.Num) -> float:
    """Return a hundredth of a number, rounded once: `7%` is the float nearest to 0.07."""
    value = number_of(node)
    mantissa, _, exponent = node.text.replace("_", "").lower().partition("e")
    exact = mantissa[-1].isdigit() and (exponent or "0")[-1].isdigit()
    return float(f"{mantissa}e{int(exponent or 0) - 2}") if exact else value / 100


def _arithmetic(
    node: Node, op: str, left: float | v.Duration, right: float | v.Duration
) -> float | v.Duration:
    a = left.amount if isinstance(left, v.Duration) else left
    b = right.amount if isinstance(right, v.Duration) else right
    units = [x.unit for x in (left, right) if isinstance(x, v.Duration)]
    if (op in "+-" and len(units) == 1) or len(set(units)) > 1:
        raise Unreadable(
            node, "the two sides have different units", "wrong-unit", "give both the same unit"
        )
    if op == "*" and len(units) == 2:
        raise Unreadable(node, "two durations cannot be multiplied", "wrong-unit")
    if op == "/" and b == 0:
        raise Unreadable(node, "division by zero")
    if op == "/" and units and not isinstance(left, v.Duration):
        raise Unreadable(node, "a number cannot be divided by a duration", "wrong-unit")
    whole = isinstance(a, int) and isinstance(b, int)
    if op == "/":
        value = a // b if whole and a % b == 0 else a / b
    else:
        value = a + b if op == "+" else a - b if op == "-" else a * b
    if abs(value) > 1e300:
        raise Unreadable(node, "this number is too large")
    pure = not units or (op == "/" and len(units) == 2)
    return value if pure else v.Duration(value, units[0])


def number(node: Node) -> float:
    """Return a number without a unit; a percentage counts as one."""
    value = constant(node)
    if not isinstance(value, v.Duration):
        return value
    if value.unit == "run":
        return value.amount
    raise Unreadable(
        node, f"expected a number without a unit, found an amount of {value.unit}", "wrong-unit"
    )


def duration(node: Node, unit: v.Unit = "steps") -> v.Duration:
    """Return a duration, 0 or longer; `unit` is proposed for a number without a unit."""
    if not isinstance(node, ast.Num | ast.Measure | ast.Prefix | ast.Infix):
        raise Unreadable(node, f"expected a duration such as `200 steps`, found {describe(node)}")
    value = constant(node)
    if not isinstance(value, v.Duration):
        written = f"{value:.12g} {unit}"
        what = "an amount of samples" if unit == "samples" else "a duration"
        raise Unreadable(
            node,
            f"expected {what}, found a number without a unit",
            "wrong-unit",
            f"write a unit: `{written}`",
            edit=written,
        )
    if value.amount < 0:
        raise Unreadable(node, "a duration cannot be negative")
    if value.unit == "run" and value.amount > 1:
        raise Unreadable(node, "a percentage is a part of the run: expected at most 100%")
    return value


def samples(node: Node) -> v.Duration:
    """Return a duration for a field that counts samples; the caller checks its unit."""
    return duration(node, "samples")


def samples_or_auto(node: Node) -> v.Duration | str:
    """Return an amount of samples, or the word `auto`."""
    return node.id if isinstance(node, ast.Ident) and node.id == "auto" else samples(node)


def number_range(node: Node) -> v.Range:
    """Return a range."""
    if not (isinstance(node, ast.Infix) and node.op == ".."):
        raise Unreadable(node, f"expected a range such as `0.5..1.5`, found {describe(node)}")
    low, high = number(node.left), number(node.right)
    if low > high:
        raise Unreadable(
            node,
            "the first number of a range cannot be above the second",
            help=f"write `{high:g}..{low:g}`",
            edit=f"{high:g}..{low:g}",
        )
    return v.Range(low, high)


def import_path(node: Node) -> v.ImportPath:
    """Return an import path."""
    if not isinstance(node, ast.Str):
        raise Unreadable(node, f'expected a string such as "module:name", found {describe(node)}')
    module, colon, attribute = node.value.partition(":")
    if not colon:
        module, _, attribute = node.value.rpartition(".")
        path = f'"{module}:{attribute}"' if module and attribute else None
        help = f"write {path}" if path else None
        raise Unreadable(node, 'expected "module:name", with a colon', help=help, edit=path)
    try:
        return v.ImportPath(module, attribute)
    except ValueError as error:
        raise Unreadable(node, str(error)) from None


def plain_value(node: Node, words: bool = False) -> Any:
    """Return a JSON value: a number, string, boolean, list or None; a range becomes a list of two.

    With `words` a name becomes a string, for fields whose values are words. Elsewhere it is an error.
    """
    match node:
        case ast.Str(value):
            return value
        case ast.Ident("true" | "false" as word):
            return word == "true"
        case ast.Ident("none") if not words:
            return None
        case ast.Ident(name):
            if not words:
                raise unquoted(node)
            return name
        case ast.Items(items):
            return [plain_value(item, words) for item in items]
        case ast.Infix("..", _, _):
            pair = number_range(node)
            return [pair.low, pair.high]
        case (
            ast.Num() | ast.Measure() | ast.Prefix("-", _) | ast.Infix("+" | "-" | "*" | "/", _, _)
        ):
            return number(node)
    raise Unreadable(
        node, f"expected a number, a string, a name, a boolean or a list, found {describe(node)}"
    )


_PYTHON = {"True": "true", "False": "false", "None": "none"}


def unquoted(node: ast.Ident) -> Unreadable:
    """Return the error for a word that stands where only a value can: text needs quotes."""
    if (word := _PYTHON.get(node.id)) is not None:
        message = f"`{node.id}` is a word of Python"
        return Unreadable(node, "", "unknown-name", f"write `{word}`", message, word, safe=True)
    message = f"`{node.id}` is not defined: a word without quotes is the name of a `let`"
    text = f'"{node.id}"'
    help = f"write text in quotes: `{text}`"
    return Unreadable(node, "", "unknown-name", help, message, text, safe=True)


def describe(node: Node) -> str:
    """Return the words for a node in a message: `a number`, `a list` ..."""
    match node:
        case ast.Num():
            return "a number"
        case ast.Measure(_, unit):
            return "a percentage" if unit == "%" else f"a duration in {_PLURALS[unit]}"
        case ast.Str():
            return "a string"
        case ast.Ident("true" | "false"):
            return "a boolean"
        case ast.Ident(name):
            return f"the name `{name}`"
        case ast.Apply(function, _):
            return f"`{function.id}(...)`"
        case ast.Items():
            return "a list"
        case ast.Infix("..", _, _):
            return "a range"
        case ast.Infix("on", _, _):
            return "a value with `on`"
        case ast.Infix("|" | "&" | "where" | "expect", _, _):
            return "a selector"
        case ast.Prefix("not", _):
            return "a condition"
        case ast.Infix(op, _, _) if op in ("and", "or", *v.COMPARISONS):
            return "a condition"
    return "an expression"
