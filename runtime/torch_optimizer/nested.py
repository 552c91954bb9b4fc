"""Values of any nesting, as optimizers keep them: their leaves, copies of them, and whether they can be saved."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.processes.sharded import is_sharded

_ATOMS = (bool, int, float, str, type(None))
_MAPPINGS = (dict, OrderedDict)
_SEQUENCES = (list, tuple, torch.Size)


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield what is in a value of dicts, lists, tuples and deques, each with its place, such as `weight/GG/0`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}/{key}")
    elif isinstance(value, list | tuple | deque):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{place}/{i}")
    else:
        yield place, value


def copied(value: Any, move: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    """Return a copy of a value in which `move` has copied the tensors; what was one tensor in two places stays one."""
    if id(value) in memo:
        return memo[id(value)][1]
    made = value
    if isinstance(value, Tensor):
        made = move(value.detach())
    elif isinstance(value, dict):
        made = {key: copied(inner, move, memo) for key, inner in value.items()}
    elif isinstance(value, deque):
        made = deque((copied(inner, move, memo) for inner in value), value.maxlen)
    elif type(value) in (list, tuple):
        made = type(value)(copied(inner, move, memo) for inner in value)
    if made is not value:
        memo[id(value)] = value, made  # the value is kept, so that no other one gets its id
    return made


def encoded(value: Any) -> Any:
    """Return a value in what a checkpoint holds: dicts with other keys than strings, deques, dtypes, sparse tensors."""
    if isinstance(value, dict):
        if all(type(key) is str and key[:1] not in ("$", "(") for key in value):
            return {key: encoded(inner) for key, inner in value.items()}
        return {"(items)": [[encoded(key), encoded(inner)] for key, inner in value.items()]}
    if isinstance(value, deque):
        return {"(deque)": [encoded(inner) for inner in value], "(longest)": value.maxlen}
    if type(value) in (list, tuple):
        return type(value)(encoded(inner) for inner in value)
    if isinstance(value, torch.dtype):
        return {"(dtype)": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor) and value.layout == torch.sparse_coo:
        parts = {"(indices)": value._indices(), "(values)": value._values()}
        return {**parts, "(size)": list(value.shape), "(coalesced)": value.is_coalesced()}
    return value


def decoded(value: Any) -> Any:
    """Return the value that `encoded` had."""
    match value:
        case {"(items)": list(items)}:
            return {decoded(key): decoded(inner) for key, inner in items}
        case {"(deque)": list(items), "(longest)": longest}:
            return deque(map(decoded, items), longest)
        case {"(dtype)": str(name)}:
            found = getattr(torch, name, None)
            if not isinstance(found, torch.dtype):
                raise ValueError(f"torch has no dtype `{name}`")
            return found
        case {"(indices)": at, "(values)": entries, "(size)": size, "(coalesced)": coalesced}:
            return torch.sparse_coo_tensor(
                at, entries, size, is_coalesced=coalesced, check_invariants=True
            )
        case dict():
            return {key: decoded(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(decoded, value))
    return value


def unsavable(value: Any, place: str) -> tuple[str, str] | None:
    """Return the place and the type of the first part that a checkpoint cannot hold; None where it can hold all."""
    kind = type(value)
    if kind in _MAPPINGS:
        keys = (unsavable(key, f"{place}/{key!r}") for key in value)
        inside = [unsavable(inner, f"{place}/{key}") for key, inner in value.items()]
        return next((found for found in (*keys, *inside) if found is not None), None)
    if kind in _SEQUENCES or kind is deque:
        parts = (unsavable(inner, f"{place}/{i}") for i, inner in enumerate(value))
        return next((found for found in parts if found is not None), None)
    known = kind in _ATOMS or kind in (Tensor, Parameter) or isinstance(value, torch.dtype)
    if known or (isinstance(value, Tensor) and is_sharded(value)):
        return None
    return place, kind.__name__


def same(one: Any, two: Any) -> bool:
    """Say whether two values are equal, bit for bit; NaN is equal to NaN."""
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        if one.shape != two.shape or one.dtype != two.dtype or one.device != two.device:
            return False
        both = one == two
        if one.is_floating_point() or one.is_complex():
            both |= (one != one) & (two != two)
        return bool(both.all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(two) and all(map(same, one, two))
    return one is two or bool(one == two) or bool(one != one and two != two)
