"""Lark's parser of the language, loaded from tables that `python -m trainc.dsl.syntax.grammar` writes.

Building the tables from the grammar takes Lark half as long as checking a spec does. So Lark's own serializer
writes them to tables.json once, and a parse loads them. Another minor version of Lark, which may write them in
another form, builds the parser from the grammar.
"""

from __future__ import annotations

import json
import re
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import lark
from lark.grammar import Rule
from lark.lexer import TerminalDef, Token
from lark.parsers.lalr_interactive_parser import InteractiveParser

GRAMMAR = Path(__file__).with_name("train.lark")
TABLES = Path(__file__).with_name("tables.json")
START, EXPRESSION = "start", "expression"
MAX_DEPTH, MAX_CHAIN = 100, 200
"""Levels of a tree, and operators of one chain: functions that read it call themselves once for each."""


class TooDeep(Exception):
    """A tree of more than MAX_DEPTH levels, or a chain of more than MAX_CHAIN operators."""


class Branch(lark.Tree[Any]):
    """A node of Lark's tree that counts its levels; raises TooDeep for more than the limits."""

    def __init__(self, data: str, children: list[Any], meta: Any = None) -> None:
        super().__init__(data, children, meta)
        self.height = self.chain = 0
        # A repetition is no level: the rule that it stands in takes its children over.
        if not data.startswith("_"):
            heights = [child.height for child in children if isinstance(child, Branch)]
            self.height = 1 + max(heights, default=0)
            first = children[0] if children else None
            # A chain such as `a | b | c` is a tree to its left, and is no nesting.
            if data == "binary" and isinstance(first, Branch) and first.data == "binary":
                others = [c.height for c in children[1:] if isinstance(c, Branch)]
                self.height = max(first.height, 1 + max(others, default=0))
                self.chain = first.chain + 1
        if self.height > MAX_DEPTH:
            raise TooDeep(f"this is nested more than {MAX_DEPTH} levels deep")
        if self.chain > MAX_CHAIN:
            raise TooDeep(f"this is a chain of more than {MAX_CHAIN} operators")


class Mismatch:
    """A token that cannot follow what the parser has read; `too_deep` says so if the tree then has too many levels."""

    def __init__(self, token: Token, parser: InteractiveParser, too_deep: str = "") -> None:
        self.token, self.parser, self.too_deep = token, parser, too_deep

    @cached_property
    def accepts(self) -> frozenset[str]:
        """The terminals that are possible in its place."""
        return frozenset() if self.too_deep else frozenset(self.parser.accepts())


@cache
def parser() -> lark.Lark:
    """Return the parser of the language; its trees are Branches with the positions of what they cover."""
    saved = json.loads(TABLES.read_text(encoding="utf-8"))
    if saved["lark"] != _minor(lark.__version__):
        return _build()
    # JSON's keys are strings, Lark's are numbers.
    memo = {int(key): value for key, value in saved["memo"].items()}
    table = saved["data"]["parser"]["parser"]
    table["states"] = {int(state): row for state, row in table["states"].items()}
    loaded: lark.Lark = lark.Lark._load_from_dict(saved["data"], memo, tree_class=Branch)
    return loaded


def tables() -> str:
    """Return the text of tables.json: the grammar's tables as Lark serializes them, numbered anew."""
    data, memo = _build().memo_serialize([TerminalDef, Rule])
    data["options"] |= {"tree_class": None}
    data["parser"]["parser"] = _numbered(data["parser"]["parser"])
    saved = {"lark": _minor(lark.__version__), "memo": memo, "data": data}
    return json.dumps(saved, separators=(",", ":")) + "\n"


def _build() -> lark.Lark:
    # Every word means the same wherever it stands, so the basic lexer serves: the contextual one would compile
    # a pattern for each set of words that some state of the parser accepts, and split `fromage` after `from`.
    return lark.Lark(
        GRAMMAR.read_text(encoding="utf-8"),
        parser="lalr",
        lexer="basic",
        start=[START, EXPRESSION],
        maybe_placeholders=False,
        propagate_positions=True,
        g_regex_flags=re.ASCII | re.DOTALL,
        tree_class=Branch,
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _numbered(table: dict[str, Any]) -> dict[str, Any]:
    """Number symbols by name and states in the order a walk meets them; Lark numbers them by chance."""
    symbols = sorted(table["tokens"].values())
    rows = {
        state: sorted((symbols.index(table["tokens"][token]), *step) for token, step in row.items())
        for state, row in table["states"].items()
    }
    ends = {key: dict(sorted(table[key].items())) for key in ("start_states", "end_states")}
    number: dict[int, int] = {}
    todo = list(ends["start_states"].values())
    for state in todo:
        if state not in number:
            number[state] = len(number)
            todo += [to for _, reduces, to in rows[state] if not reduces]
    return {
        "tokens": dict(enumerate(symbols)),
        "states": {
            number[state]: {
                symbol: (by, to if by else number[to]) for symbol, by, to in rows[state]
            }
            for state in number
        },
        **{
            key: {start: number[state] for start, state in end.items()} for key, end in ends.items()
        },
    }


if __name__ == "__main__":
    TABLES.write_text(tables(), encoding="utf-8")
