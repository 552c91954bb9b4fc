"""How trees and values are written: how tightly operators bind, and so where brackets are needed."""

from __future__ import annotations

from collections.abc import Iterable

# As in dsl/syntax/train.lark, loosest first.
_LEVELS = (
    ("on",), ("where", "expect"), ("or",), ("and",), ("not",),
    ("<", ">", "<=", ">=", "==", "!=", "is"), ("then",), ("|",), ("&",), ("+", "-"), ("*", "/"),
    ("..",), ("neg",),
)  # fmt: skip
BINDS = {op: level for level, ops in enumerate(_LEVELS) for op in ops}
ATOM = len(_LEVELS)
_CHAINS = {"or", "and", "then", "|", "&", "+", "-", "*", "/", "where", "expect"}

Written = tuple[str, int]
"""A text, and how tightly its outermost operator binds: `ATOM` where it has none."""


def bracketed(written: Written, loosest: int = 0) -> str:
    """Return the text, in brackets where it binds looser than `loosest`."""
    text, binds = written
    return text if binds >= loosest else f"({text})"


def prefix(op: str, operand: Written) -> Written:
    """Write `-x` or `not x`."""
    if op == "-":
        return f"-{bracketed(operand, BINDS['neg'])}", BINDS["neg"]
    return f"{op} {bracketed(operand, BINDS[op] + 1)}", BINDS[op]


def infix(op: str, left: Written, right: Written) -> Written:
    """Write two operands and the operator between them."""
    level = BINDS[op]
    first = bracketed(left, level if op in _CHAINS else level + 1)
    gap = "" if op == ".." else " "
    return f"{first}{gap}{op}{gap}{bracketed(right, level + 1)}", level


def call(function: str, arguments: Iterable[tuple[str | None, Written]]) -> Written:
    """Write a call; the name of a positional argument is None."""
    texts = (f"{name} = {bracketed(x)}" if name else bracketed(x) for name, x in arguments)
    return f"{function}({', '.join(texts)})", ATOM


def listed(items: Iterable[Written]) -> Written:
    """Write a list."""
    return f"[{', '.join(map(bracketed, items))}]", ATOM


def number(value: float) -> Written:
    """Write a plain number."""
    size = repr(abs(value)), ATOM
    return prefix("-", size) if value < 0 else size


def quoted(text: str) -> Written:
    """Write a string of the language."""
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        text = text.replace(plain, escaped)
    return f'"{text}"', ATOM
