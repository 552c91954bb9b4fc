"""Mistakes of spelling that are known by their tokens: units, names of lets, and brackets of the wrong kind."""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token

from trainc.dsl.syntax.repairs import KNOWN_UNITS, WORDS, begins_line, meant_unit, new_token
from trainc.dsl.text.diagnostic import Diagnostic, Edit, Label
from trainc.dsl.text.source import Source, Span, printable


def repair_tokens(tokens: list[Token], source: Source) -> tuple[list[Token], list[Diagnostic]]:
    """Return the tokens as they were meant, and a diagnostic for each repair."""
    out: list[Token] = []
    found: list[Diagnostic] = []
    for n, token in enumerate(tokens):
        kinds = [t.type for t in tokens[n + 1 : n + 4]]
        if token.type == "NAME" and _is_unit(out, token, kinds, source):
            token = _repair_unit(token, source, found)
        out.append(token)
    _repair_lets(out, source, found)
    _repair_braces(out, source, found)
    _repair_lists(out, source, found)
    return out, found


def _is_unit(before: list[Token], token: Token, after: list[str], source: Source) -> bool:
    """Say whether a name stands where only a unit can: behind a number, on its line, and before no `=`."""
    if not before or before[-1].type != "NUMBER" or "." in token or after[:1] == ["EQUAL"]:
        return False
    if token in ("stop", "save", "warn"):
        return False
    return "\n" not in source.text[before[-1].end_pos : token.start_pos]


def _repair_unit(token: Token, source: Source, found: list[Diagnostic]) -> Token:
    span = Span(source, token.start_pos or 0, token.end_pos or 0)
    unit = meant_unit(token)
    message = f"there is no unit `{printable(token)}`"
    help = None if unit is None else f"did you mean `{unit}`?"
    edit = None if unit is None else Edit(span, unit, safe=True)
    found.append(
        Diagnostic("unknown-unit", message, (Label(span),), (KNOWN_UNITS,), help, edit=edit)
    )
    if unit is None:
        return token
    return new_token("PERCENT" if unit == "%" else "UNIT", unit, span)


def _repair_lets(tokens: list[Token], source: Source, found: list[Diagnostic]) -> None:
    """Report the name of a `let` that has two words, and go on with the first."""
    n = 0
    while n + 3 < len(tokens):
        kinds = [t.type for t in tokens[n : n + 4]]
        if kinds[0] == "LET" and {kinds[1], kinds[2]} <= WORDS and kinds[3] == "EQUAL":
            first, second = tokens[n + 1 : n + 3]
            span = Span(source, first.start_pos or 0, second.end_pos or 0)
            name = f"{first}_{second}".replace(".", "_")
            found.append(
                Diagnostic(
                    "syntax",
                    "the name of a `let` is one word",
                    (Label(span),),
                    (),
                    f"write `let {name} = ...`",
                    edit=Edit(span, name),
                )
            )
            tokens[n + 1 : n + 3] = [new_token("NAME", first.replace(".", "_"), span)]
        n += 1


def _repair_braces(tokens: list[Token], source: Source, found: list[Diagnostic]) -> None:
    """Read brackets around named values, outside of all others, as the braces of a clause."""
    depth = 0
    for n, token in enumerate(tokens):
        if token.type in ("LBRACE", "LSQB", "LPAR"):
            named = len(tokens) > n + 2 and tokens[n + 2].type == "EQUAL"
            if token.type == "LPAR" and depth == 0 and named and _is_brace(tokens, n, source):
                close = _closing(tokens, n)
                if close is not None:
                    _as_braces(tokens, n, close, source, found)
            depth += 1
        elif token.type in ("RBRACE", "RSQB", "RPAR"):
            depth = max(0, depth - 1)


def _repair_lists(tokens: list[Token], source: Source, found: list[Diagnostic]) -> None:
    """Read round brackets around several values as those of a list."""
    for n, token in enumerate(tokens):
        if token.type != "LPAR" or n == 0 or tokens[n - 1].type not in ("EQUAL", "COMMA", "LSQB"):
            continue
        close = _closing(tokens, n)
        if close is None or not _has_comma(tokens[n + 1 : close]):
            continue
        opens, closes = (
            Span(source, t.start_pos or 0, t.end_pos or 0) for t in (token, tokens[close])
        )
        written = f"[{(opens | closes).text[1:-1]}]"
        found.append(
            Diagnostic(
                "syntax",
                "a list stands in square brackets",
                (Label(opens | closes),),
                (),
                f"write `{printable(written, 80)}`",
                edit=Edit(opens | closes, written, safe=True),
            )
        )
        tokens[n], tokens[close] = new_token("LSQB", "[", opens), new_token("RSQB", "]", closes)


def _has_comma(tokens: Sequence[Token]) -> bool:
    """Say whether a comma stands outside all brackets."""
    depth = 0
    for token in tokens:
        depth += (token.type in ("LPAR", "LSQB")) - (token.type in ("RPAR", "RSQB"))
        if token.type == "COMMA" and depth == 0:
            return True
    return False


def _is_brace(tokens: Sequence[Token], at: int, source: Source) -> bool:
    """Say whether a bracket stands in a clause and opens no call."""
    for n in range(at - 1, -1, -1):
        kind, after = tokens[n].type, tokens[n + 1].type
        if kind in ("LET", "WHEN", "USE", "TRAIN"):
            return False
        if (kind == "KIND" and after in ("NAME", "STRING", "UNIT")) or (
            kind == "RUN"
            and (after in ("FROM", "UNTIL", "EVERY") or begins_line(tokens[n], source))
        ):
            last = tokens[at - 1]
            apart = source.text[tokens[at].start_pos - 1].isspace()  # type: ignore[operator]
            return (
                apart or at - 1 <= n + 1 or last.type not in WORDS or last in ("all", "trainable")
            )
    return False


def _closing(tokens: Sequence[Token], at: int) -> int | None:
    depth = 0
    for n in range(at, len(tokens)):
        depth += (tokens[n].type == "LPAR") - (tokens[n].type == "RPAR")
        if depth == 0:
            return n
    return None


def _as_braces(
    tokens: list[Token], first: int, last: int, source: Source, found: list[Diagnostic]
) -> None:
    opens, closes = (
        Span(source, t.start_pos or 0, t.end_pos or 0) for t in (tokens[first], tokens[last])
    )
    span = opens | closes
    gap = "" if source.text[opens.start - 1 : opens.start].isspace() else " "
    written = f"{gap}{{ {span.text[1:-1].strip()} }}"
    found.append(
        Diagnostic(
            "syntax",
            "the fields of a clause stand in braces",
            (Label(span),),
            (),
            f"write `{printable(written.strip(), 80)}`",
            edit=Edit(span, written, safe=True),
        )
    )
    tokens[first], tokens[last] = new_token("LBRACE", "{", opens), new_token("RBRACE", "}", closes)
