"""From samples to a batch: collated by torch or by the user's function, then divided into inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from trainc.runtime.data.batch import Batch, WrongBatch, check_batch

TARGETS = ("label", "labels", "target", "targets")
"""The fields of a dict that are its target where no other is named."""
COLLATE = 'give `collate = "module:callable"` in the `data` clause'


@dataclass(frozen=True, slots=True)
class Collation:
    """How samples become a batch.

    `function` takes a list of samples, as torch's `collate_fn` does; without one they are stacked by torch's
    `default_collate`. `target` is the field of a dict that holds the
    targets, or the fields of several, which are then a dict.
    """

    function: Callable[[list[Any]], Any] | None = None
    target: str | tuple[str, ...] | None = None

    def __call__(self, samples: Sequence[Any]) -> Batch:
        """Return the batch of some samples; raises WrongBatch where they are no pairs or dicts that go together."""
        if self.function is not None:
            return self.divide(self.function(list(samples)), "`collate` returned")
        _check_sample(samples[0])
        if isinstance(samples[0], Mapping) and any(s.keys() != samples[0].keys() for s in samples):
            # `default_collate` would leave out a field that the first sample does not have.
            raise WrongBatch(_uneven(samples))
        try:
            made = default_collate(list(samples))
        except (RuntimeError, TypeError, KeyError, ValueError) as error:
            raise WrongBatch(_uneven(samples) or f"samples cannot be stacked: {error}") from error
        return self.divide(made, "a sample is")

    def divide(self, made: Any, said: str) -> Batch:
        """Return inputs and targets of what was collated: a pair, or a mapping with a field of targets."""
        if isinstance(made, Mapping):
            return self._of_mapping(made)
        if not isinstance(made, tuple | list) or len(made) != 2:
            found = f"{len(made)} values" if isinstance(made, tuple | list) else type(made).__name__
            raise WrongBatch(
                f"{said} {found}: expected a pair (inputs, targets), or a dict with a field of targets"
            )
        if self.target is not None:
            raise WrongBatch(
                f"`target = {_shown(self.target)}` names a field, and {said} a pair, which has no fields: remove"
                " `target`"
            )
        return made[0], _targets(made[1], "the targets of the pairs")

    def _of_mapping(self, made: Mapping[str, Any]) -> Batch:
        names = ", ".join(f"`{name}`" for name in made)
        given = (self.target,) if isinstance(self.target, str) else self.target
        known = given or tuple(name for name in TARGETS if name in made)
        lacking = [name for name in known if name not in made]
        if lacking or not known or (len(known) > 1 and not given):
            wrong = (
                f"has no field `{lacking[0]}`"
                if lacking
                else f"has {' and '.join(f'`{name}`' for name in known)}, of which one is the target"
                if known
                else "has no field named as targets are"
            )
            raise WrongBatch(
                f'a sample {wrong}; its fields are {names}: write `target = "NAME"` in the `data` clause'
            )
        targets = {name: _targets(made[name], f"`{name}`") for name in known}
        inputs = {name: value for name, value in made.items() if name not in known}
        if self.function is None:
            for name, value in inputs.items():
                if text := next(
                    (x for x in tree_leaves(value) if isinstance(x, str | bytes)), None
                ):
                    raise WrongBatch(
                        f"the field `{name}` of a sample is text ({text[:20]!r}), which no model takes: remove it from"
                        f" the samples, or {COLLATE}, which leaves it out"
                    )
        if not inputs:
            raise WrongBatch(f"a sample has the field {names} alone, and no inputs")
        only = next(iter(inputs.values()))
        alone = len(inputs) == 1 and isinstance(only, torch.Tensor)
        return only if alone else inputs, targets[known[0]] if len(known) == 1 else targets


def _shown(target: str | tuple[str, ...]) -> str:
    """Return the field as a spec writes it."""
    names = (target,) if isinstance(target, str) else target
    text = ", ".join(f'"{name}"' for name in names)
    return text if isinstance(target, str) else f"[{text}]"


def _targets(value: Any, name: str) -> Any:
    """Return targets: a tensor, or a dict or tuple of tensors."""
    try:
        return check_batch((None, value))[1]
    except WrongBatch:
        raise WrongBatch(
            f"{name} cannot be made one tensor, but {type(value).__name__}: make each target a number or a tensor, or"
            f" {COLLATE}"
        ) from None


def _check_sample(sample: Any) -> None:
    """Raise WrongBatch for a sample that is no pair and no dict, or holds a list where torch wants a tensor."""
    if isinstance(sample, Mapping):
        parts = [(f"`{name}`", value) for name, value in sample.items()]
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        parts = [("x", sample[0]), ("y", sample[1])]
    else:
        found = f"{type(sample).__name__}"
        if isinstance(sample, tuple | list):
            found = f"a {found} of {len(sample)}"
        raise WrongBatch(
            f"a sample is {found}: expected a pair (x, y), or a dict with a field of targets. For samples of another"
            f" form, {COLLATE}"
        )
    for name, value in parts:
        if value is None:
            raise WrongBatch(
                f"{name} of a sample is None: leave it out of the samples, or {COLLATE}"
            )
        if isinstance(value, list) and value and isinstance(value[0], int | float | list):
            raise WrongBatch(
                f"{name} of a sample is a list of numbers, of which torch's `default_collate` makes one tensor for each"
                f" place: make it a tensor with `torch.tensor(...)`, or {COLLATE}"
            )


def _uneven(samples: Sequence[Any]) -> str | None:
    """Return what is said of samples whose tensors have different shapes, or that have different fields."""
    first = _shapes(samples[0])
    for at, sample in enumerate(samples):
        shapes = _shapes(sample)
        for name in [*first, *(n for n in shapes if n not in first)]:
            if shapes.get(name) != first.get(name):
                one, other = (s.get(name, "not there") for s in (first, shapes))
                return (
                    f"samples of one batch differ: {name} is {one} in the first and {other} in sample {at} of the"
                    f" batch, which torch's `default_collate` cannot stack. To pad them, {COLLATE}"
                )
    return None


def _shapes(sample: Any) -> dict[str, Any]:
    """Return the shapes of a sample's tensors by field."""
    parts = sample if isinstance(sample, Mapping) else dict(zip(("x", "y"), sample, strict=False))
    found = {}
    for name, value in parts.items():
        shown = f"`{name}`" if isinstance(sample, Mapping) else name
        if isinstance(value, torch.Tensor | np.ndarray):
            found[shown] = tuple(value.shape)
        else:
            found[shown] = tuple(
                tuple(leaf.shape)
                for leaf in tree_leaves(value)
                if isinstance(leaf, torch.Tensor | np.ndarray)
            )
    return found
