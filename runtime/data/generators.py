"""Random generators that a data object holds: found, kept in checkpoints, and left alone by evaluations."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from trainc.runtime.storage.differences import Difference
from trainc.runtime.storage.form import reading
from trainc.runtime.storage.random_streams import derive_seed

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
States = dict[str, Any]

# The generators that every step seeds anew, which modules may hold under names of their own.
_SEEDED = {id(torch.default_generator), id(np.random.mtrand._rand), id(vars(random)["_inst"])}
_FOREIGN = {"torch", "numpy", "trainc", *sys.stdlib_module_names} - {"__main__"}
_DEPTH, _ITEMS, _OBJECTS = 5, 256, 20_000


def find_generators(data: object) -> dict[str, Generator]:
    """Return the generators that a data object, its parts, and the modules of their classes hold, by name.

    Attributes, short lists, tuples and dicts, and what functions close over are searched; other modules are not.
    """
    search = _Search()
    search.visit(data, "data", _DEPTH)
    for name in dict.fromkeys(search.modules):
        search.visit_items(vars(sys.modules[name]).items(), name, 1)
    return search.found


class _Search:
    """A walk through objects that visits each once."""

    def __init__(self) -> None:
        self.found: dict[str, Generator] = {}
        self.modules: list[str] = []
        self._seen = set(_SEEDED)

    def visit(self, value: object, name: str, depth: int) -> None:
        """Keep a generator; look into anything else that the user's code made."""
        if id(value) in self._seen or value is None or len(self._seen) > _OBJECTS:
            return
        self._seen.add(id(value))
        if isinstance(value, Generator):
            self.found[name] = value
        elif depth and not isinstance(value, type):
            self.visit_items(self._parts(value), name, depth - 1)

    def visit_items(self, items: Iterable[tuple[Any, object]], name: str, depth: int) -> None:
        """Visit values under the name of what holds them."""
        for key, value in list(items):
            self.visit(value, f"{name}.{key}", depth)

    def _parts(self, value: object) -> Iterable[tuple[Any, object]]:
        if isinstance(value, list | tuple):
            return enumerate(value) if len(value) <= _ITEMS else ()
        if isinstance(value, dict):
            return value.items() if len(value) <= _ITEMS else ()
        if isinstance(value, MethodType):
            return [("self", value.__self__), ("function", value.__func__)]
        if isinstance(value, FunctionType):
            self._from(value.__module__)
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            return [(key, cell.cell_contents) for key, cell in cells if _is_set(cell)]
        if isinstance(value, torch.Tensor | ModuleType):
            return ()
        self._from(type(value).__module__)
        return _attributes(value)

    def _from(self, module: str) -> None:
        """Note the module that something comes from, if it is the user's."""
        if module in sys.modules and module.partition(".")[0] not in _FOREIGN:
            self.modules.append(module)


def _attributes(value: object) -> Iterable[tuple[str, object]]:
    """Return the attributes that an object itself has, in `__dict__` or `__slots__`; no code of it is run."""
    slots: set[str] = set()
    for one in type(value).__mro__:
        own = one.__dict__.get("__slots__", ())
        slots |= {own} if isinstance(own, str) else set(own)
    found = {s: getattr(value, s) for s in sorted(slots) if s[:2] != "__" and hasattr(value, s)}
    return {**found, **getattr(value, "__dict__", {})}.items()


def _is_set(cell: Any) -> bool:
    """Say whether a closed-over name has a value yet."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def states_of(generators: Mapping[str, Generator]) -> States:
    """Return the states of generators as a checkpoint can hold them."""
    return {name: _state(generator) for name, generator in generators.items()}


def load_states(generators: Mapping[str, Generator], states: Mapping[str, Any]) -> None:
    """Restore the states of the generators that are in both."""
    for name in generators.keys() & states.keys():
        generator, state = generators[name], states[name]
        with reading(f"generators/{name}", f"the state of a {type(generator).__name__}"):
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            elif isinstance(generator, np.random.RandomState):
                generator.set_state(_from_plain(state))
            else:
                generator.bit_generator.state = _from_plain(state)


def seed_generators(generators: Mapping[str, Generator], seed: int) -> None:
    """Seed generators anew, each with numbers of its own."""
    for name, generator in generators.items():
        own = derive_seed(seed, name)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, random.Random):
            generator.seed(own)
        elif isinstance(generator, np.random.RandomState):
            generator.seed([own & 0xFFFFFFFF, own >> 32])
        else:
            generator.bit_generator.state = type(generator.bit_generator)(own).state


def _state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _plain(value: Any) -> Any:
    """Return a state of numpy with lists in place of arrays."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"dtype", "values"}:
            return np.array(value["values"], dtype=value["dtype"])
        return {key: _from_plain(inner) for key, inner in value.items()}
    return value


def generator_differences(before: Iterable[str], now: Iterable[str]) -> Iterator[Difference]:
    """Yield the generators that are only in the checkpoint, or only in the data now."""
    old, new = set(before), set(now)
    for name in sorted(old ^ new):
        what = "was in the data and is no longer" if name in old else "is in the data and was not"
        yield Difference(f"the random generator `{name}` {what}: it starts anew")


@contextmanager
def kept(generators: Mapping[str, Generator]) -> Iterator[None]:
    """Give generators the states from before the block back."""
    before = states_of(generators)
    try:
        yield
    finally:
        load_states(generators, before)
