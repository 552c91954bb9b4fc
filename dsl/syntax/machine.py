"""Tokens to tree: the shift-reduce loop over the generated tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trainc.dsl.syntax import tables
from trainc.dsl.syntax.lexer import END, Token

MAX_DEPTH = 100  # of the tree: what reads it is recursive


def _row(line: str) -> dict[str, int]:
    words = iter(line.split())
    return {symbol: int(step) for symbol, step in zip(words, words, strict=True)}


_ACTIONS = [_row(line) for line in tables.ACTIONS.split("\n")]
_SYMBOLS = {rule[0] for rule in tables.RULES}


class Builder(Protocol):
    """Makes a node of a rule and its children; tokens come as they are."""

    def build(self, rule: str, children: list[Any], start: int, end: int) -> Any:
        """Return the node."""


class Refused(Exception):
    """The token that cannot stand where it stands, and what could."""

    def __init__(self, token: Token, accepts: frozenset[str], too_deep: bool = False) -> None:
        super().__init__(token)
        self.token, self.accepts, self.too_deep = token, accepts, too_deep


def run(tokens: Sequence[Token], builder: Builder) -> Any:
    """Return what the builder makes of the start rule, or raise Refused."""
    states = [tables.START]
    values: list[tuple[Any, int, int, int]] = []  # node, start, end, depth
    last = tokens[-1].end if tokens else 0
    for token in [*tokens, Token(END, "", last, last)]:
        while True:
            step = _ACTIONS[states[-1]].get(token.type)
            if step is None:
                raise Refused(token, _accepts(states))
            if step > 0:
                states.append(step - 1)
                values.append((token, token.start, token.end, 0))
                break
            symbol, length, keep, splice, name = tables.RULES[-step - 1]
            cut = len(values) - length
            taken = values[cut:]
            del values[cut:], states[cut + 1 :]
            start, end = (taken[0][1], taken[-1][2]) if taken else (token.start, token.start)
            depth = max((value[3] for value in taken), default=0)
            if name == "":
                node = taken[keep[0]][0]
            else:
                children = _children(taken, keep, splice)
                if name == "_":
                    node = children
                else:
                    depth += 1
                    node = builder.build(name, children, start, end)
            if depth > MAX_DEPTH:
                raise Refused(token, frozenset(), too_deep=True)
            values.append((node, start, end, depth))
            states.append(_ACTIONS[states[-1]][symbol] - 1)
            if states[-1] == tables.END:
                return node
    raise AssertionError("the tables have no end")


def _children(
    taken: list[tuple[Any, int, int, int]], keep: tuple[int, ...], splice: tuple[int, ...]
) -> list[Any]:
    """Return what a rule keeps; a repetition that comes first grows in place."""
    children: list[Any] = []
    for n in keep:
        node = taken[n][0]
        if n not in splice:
            children.append(node)
        elif children:
            children += node
        else:
            children = node
    return children


def _accepts(states: list[int]) -> frozenset[str]:
    """Return the terminals that could really be shifted next, reductions played through."""
    return frozenset(t for t in _ACTIONS[states[-1]] if t not in _SYMBOLS and _shifts(states, t))


def _shifts(states: list[int], terminal: str) -> bool:
    stack = states.copy()
    while (step := _ACTIONS[stack[-1]].get(terminal)) is not None:
        if step > 0:
            return True
        symbol, length, *_ = tables.RULES[-step - 1]
        if length:
            del stack[-length:]
        stack.append(_ACTIONS[stack[-1]][symbol] - 1)
        if stack[-1] == tables.END:
            return True
    return False
