"""Turn train.lark into dsl/syntax/tables.py: `python -m trainc.dsl.syntax.generate`.

Building a parser from the grammar takes longer than checking a spec, and importing Lark doubles the
time that `trainc check` needs to start. So Lark works here, once, and a parse reads its tables.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from pprint import pformat
from typing import Any

from lark import Lark
from lark.lexer import PatternStr
from lark.parsers.lalr_analysis import Shift

HERE = Path(__file__).parent
HEADER = '''"""Generated from train.lark by `python -m trainc.dsl.syntax.generate`; do not edit.

ACTIONS: a line per state, pairs of a symbol and n: go to state n - 1, or reduce rule -n - 1.
RULES: (rule, length, children to keep, those of them to splice, builder or "" to pass on).
"""

# ruff: noqa
# fmt: off
'''


def tables(grammar: str) -> str:
    """Return the text of dsl/syntax/tables.py for a grammar."""
    lark = Lark(grammar, parser="lalr", lexer="basic", maybe_placeholders=False)
    table = lark.parser.parser._parse_table
    number = _numbered(table)
    rules = {rule: n for n, rule in enumerate(lark.rules)}
    actions = []
    for state in number:
        row = table.states[state]
        steps = [
            f"{symbol} {number[argument] + 1 if action is Shift else -rules[argument] - 1}"
            for symbol, (action, argument) in sorted(row.items())
        ]
        actions.append(" ".join(steps))
    literals = {}
    patterns = []
    by_name = {t.name: t for t in lark.terminals}
    for terminal in sorted(by_name.values(), key=_lexing_order):
        value = terminal.pattern.value
        if isinstance(terminal.pattern, PatternStr):
            literals[terminal.name] = value
            value = re.escape(value)
            if literals[terminal.name].isalpha():
                continue  # a word: the lexer looks it up after it read a name
        patterns.append(f"(?P<{terminal.name}>{value})")
    parts: dict[str, Any] = {
        "GRAMMAR": hashlib.sha256(grammar.encode()).hexdigest(),
        "START": number[table.start_states["start"]],
        "END": number[table.end_states["start"]],
        "TERMINALS": patterns,
        "LITERALS": literals,
        "RULES": [_shape(rule) for rule in rules],
    }
    body = "".join(f"{name} = {pformat(v, width=99, compact=True)}\n" for name, v in parts.items())
    return f'{HEADER}{body}ACTIONS = """\\\n{chr(10).join(actions)}"""\n'


def _numbered(table: Any) -> dict[Any, int]:
    """Number the states in the order a walk from the start meets them, which is always the same."""
    number: dict[Any, int] = {}
    todo = [table.start_states["start"]]
    for state in todo:
        if state not in number:
            number[state] = len(number)
            row = sorted(table.states[state].items())
            todo += [argument for _, (action, argument) in row if action is Shift]
    return number


def _lexing_order(terminal: Any) -> tuple[int, int, int, str]:
    literal = isinstance(terminal.pattern, PatternStr)
    length = len(terminal.pattern.value) if literal else terminal.pattern.max_width
    return (-terminal.priority, not literal, -length, terminal.name)


def _shape(rule: Any) -> tuple[str, int, tuple[int, ...], tuple[int, ...], str]:
    keep = [
        n
        for n, symbol in enumerate(rule.expansion)
        if not (symbol.is_term and symbol.filter_out and not rule.options.keep_all_tokens)
    ]
    splice = [n for n in keep if rule.expansion[n].name.startswith("_")]
    origin = str(rule.origin.name)
    name = str(rule.alias or origin)
    if origin.startswith("_"):
        name = "_"
    elif rule.options.expand1 and not rule.alias and len(keep) == 1:
        name = ""
    return (origin, len(rule.expansion), tuple(keep), tuple(splice), name)


if __name__ == "__main__":
    (HERE / "tables.py").write_text(tables((HERE / "train.lark").read_text()))
