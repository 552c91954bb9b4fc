"""Describe pydantic's errors in the words of the language."""

from __future__ import annotations

from typing import Any

from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.source import printable

_PLAIN = {
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "bool_type": "expected `true` or `false`",
    "bool_parsing": "expected `true` or `false`",
    "string_type": "expected a name or a string",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected named values",
    "finite_number": "this number is too large",
}
_BOUNDS = {
    "greater_than": ("gt", "expected more than {}"),
    "greater_than_equal": ("ge", "expected {} or more"),
    "less_than": ("lt", "expected less than {}"),
    "less_than_equal": ("le", "expected {} or less"),
    "too_short": ("min_length", "expected {} or more entries"),
    "too_long": ("max_length", "expected {} entries or fewer"),
    "multiple_of": ("multiple_of", "expected a multiple of {}"),
}


def problem_text(detail: Any) -> tuple[str, str | None]:
    """Return what was expected of a value, and a suggestion or None."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _PLAIN:
        return _PLAIN[kind], None
    if kind in _BOUNDS:
        key, text = _BOUNDS[kind]
        bound = context[key]
        return text.format(f"{bound:g}" if isinstance(bound, float) else bound), None
    if kind == "missing":
        return f"expected {detail['loc'][-1] + 1} entries or more", None
    if kind == "literal_error":
        options = [
            o.strip().strip("'") for o in context["expected"].replace(" or ", ", ").split(",")
        ]
        spelled = [f"`{o}`" for o in options]
        text = " or ".join([", ".join(spelled[:-1]), spelled[-1]] if len(spelled) > 1 else spelled)
        return f"expected {text}", suggest(str(detail["input"]), options)
    text = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return printable(text[:1].lower() + text[1:], 200), None
