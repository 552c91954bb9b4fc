"""Levels that a model states itself, by a method `group_matcher` as models of timm have it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from trainc.compiler.structure.roles import EMBEDDING, HEAD

_SAME_LEVEL = 99999
"""The last number of a group that shares the level of the group before it."""

Key = tuple[float, ...]


def grouped_levels(model: nn.Module, roles: Mapping[str, set[str]]) -> dict[str, int] | None:
    """Return the level of every parameter under each of its names; None for a model that states none.

    One module of the model may have the method. What is outside of it is at its input or its head. `roles` are those
    of modules and parameters.
    """
    named = list(model.named_modules())
    owners = [(n, m) for n, m in named if callable(getattr(type(m), "group_matcher", None))]
    # A module inside of one that has the method is part of it.
    owners = [
        (n, m)
        for n, m in owners
        if not any(n != other and (not other or n.startswith(f"{other}.")) for other, _ in owners)
    ]
    if len(owners) != 1:
        return None
    name, owner = owners[0]
    prefix = f"{name}." if name else ""
    inner = [n for n, _ in owner.named_parameters(remove_duplicate=False)]
    keys = _keys(owner, inner)
    if len(set(keys.values())) < 2:
        return None
    level = _numbered(set(keys.values()))
    found = {prefix + n: level[key] for n, key in keys.items()}
    top = max(found.values())
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    first = next(i for i, n in enumerate(names) if n in found)
    # Without a head of its own, the model's head is outside.
    end = top if (math.inf,) in level else top + 1
    for i, n in enumerate(names):
        if n not in found:
            is_input = EMBEDDING in roles[n] or (i < first and HEAD not in roles[n])
            found[n] = 0 if is_input else end
    return found


def _keys(owner: nn.Module, names: Iterable[str]) -> dict[str, Key]:
    """Return for each name the numbers of its group: equal ones for one group, in order from the input on."""
    method: Any = owner.group_matcher
    fine = {"coarse": False} if "coarse" in inspect.signature(method).parameters else {}
    matcher = method(**fine)
    if callable(matcher):
        return {name: _tuple(matcher(name)) for name in names}
    patterns: list[tuple[re.Pattern[str], int, Key]] = []
    for order, given in enumerate(matcher.values()):
        if isinstance(given, str):
            patterns.append((re.compile(given), order, ()))
        elif given is not None:
            patterns += [(re.compile(p), order, _tuple(suffix)) for p, suffix in given]
    return {name: _key(name, patterns) for name in names}


def _key(name: str, patterns: Iterable[tuple[re.Pattern[str], int, Key]]) -> Key:
    """Return the numbers of the first pattern that matches; infinity, for the head, if none does."""
    for pattern, order, suffix in patterns:
        if match := pattern.match(name):
            return (order, *(float(g) for g in match.groups() if g is not None), *suffix)
    return (math.inf,)


def _tuple(numbers: Any) -> Key:
    """Return one number, several or none as a tuple."""
    if numbers is None:
        return ()
    return tuple(numbers) if isinstance(numbers, Iterable) else (numbers,)


def _numbered(keys: set[Key]) -> dict[Key, int]:
    """Return the level of each group."""
    level, found = -1, {}
    for key in sorted(keys):
        if level < 0 or key[-1] != _SAME_LEVEL:
            level += 1
        found[key] = level
    return found
