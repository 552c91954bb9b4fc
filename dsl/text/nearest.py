"""Suggest names that are similar to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option most similar to `name`, or None where none is similar."""
    from difflib import get_close_matches

    if len(name) > 64:  # difflib is quadratic, and nobody mistypes that much
        return None
    known = {option.lower(): option for option in options}
    match = get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return known[match[0]] if match else None


def suggest(name: str, options: Iterable[str]) -> str | None:
    """Return a help line that proposes the most similar option, or None."""
    near = nearest(name, options)
    return f"did you mean `{near}`?" if near else None
