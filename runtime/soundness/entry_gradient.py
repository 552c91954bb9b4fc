"""The gradient of a parameter of which some entries train, as code between the backward pass and the update sees it.

Its entries are a vector of their own, and all others are zero: a norm of it is theirs, and what scales it scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map

_aten: Any = torch.ops.aten
_OF_ENTRIES = {
    _aten.mul_,
    _aten.div_,
    _aten.zero_,
    _aten.norm,
    _aten.linalg_vector_norm,
    _aten._foreach_mul_,
    _aten._foreach_div_,
    _aten._foreach_norm,
}
"""Operators that do to the entries what they do to the whole, where all else that they are given is numbers."""


class EntryGradient(Tensor):
    """A gradient in the shape and dtype of its parameter that is zero but at sorted flat positions (k,).

    `entries` (k,) are those that the optimizer reads: norms are theirs, in their dtype, and what multiplies or divides
    by a number, as clipping does, changes them. Before the first choice there are none. Other operators read the whole,
    which is made for each of them; one that writes raises RuntimeError. Where the entries are not yet averaged over
    replicas, every operator does.
    """

    mask: HasEntries
    entries: Tensor
    held: Tensor | None
    """The whole gradient, where a choice needs it."""

    @staticmethod
    def __new__(
        cls, mask: HasEntries, entries: Tensor, held: Tensor | None = None
    ) -> EntryGradient:
        make: Callable[..., EntryGradient] = Tensor._make_wrapper_subclass
        like = mask.parameter
        form = {"strides": like.stride(), "dtype": like.dtype, "device": like.device}
        one = make(cls, like.shape, **form)
        one.mask, one.entries, one.held = mask, entries, held
        return one

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"EntryGradient({len(self.entries)} of {self.numel()} entries of `{self.mask.name}`)"

    @property
    def is_local(self) -> bool:
        """Whether it is not yet averaged over replicas."""
        return self.mask.averages_last

    def whole(self) -> Tensor:
        """Return the gradient with all its zeros, in its own dtype."""
        if self.mask.waits:
            return self.entries.new_zeros(self.shape, dtype=self.dtype)
        return self.mask.whole(self.entries).to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = next(one for one in _leaves((args, kwargs)) if isinstance(one, EntryGradient))
        if func.overloadpacket in (_aten.detach, _aten.alias):
            return EntryGradient(first.mask, first.entries)
        if first.is_local:
            raise RuntimeError(
                f"{_says(first.mask.name)} after replicas have averaged it, and `update()` does: {_INSTEAD}"
            )
        writes = _writes(func, args, kwargs)
        if func.overloadpacket in _OF_ENTRIES and _is_alone(args, kwargs):
            found = func(*tree_map(_entries, args), **tree_map(_entries, kwargs))
            return args[0] if writes and found is not None else found
        if writes:
            raise RuntimeError(
                f"{_says(first.mask.name)} by operators that multiply or divide by a number, and {func} is none:"
                f" {_INSTEAD}"
            )
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs))


_INSTEAD = (
    "change gradients by clauses of the spec, such as `clip = 1.0` of `run` or `optimizer`, and leave these parameters"
    " out of your own code"
)


def _says(owner: str) -> str:
    return (
        f"the gradient of `{owner}`, of which a `mask` clause trains some entries, can be read and changed between"
        " `backward()` and `update()` only"
    )


class HasEntries(Protocol):
    """The mask of a parameter, whose trained entries are a vector of their own, `values`, where it is `separate`."""

    name: str
    parameter: Parameter
    values: Parameter
    averages_first: bool
    averages_last: bool
    """Whether the gradient of `values` is averaged over replicas at the update."""
    is_shown: bool
    """Whether code of the user's own had the gradient of `values`, of a whole one that is kept for a choice."""

    @property
    def separate(self) -> bool: ...

    @property
    def waits(self) -> bool: ...

    @property
    def frees_gradient(self) -> bool: ...

    def gather(self) -> None: ...

    def entries_of(self, grad: Tensor) -> Tensor: ...

    def whole(self, values: Tensor) -> Tensor: ...


def show_entries(mask: HasEntries) -> None:
    """Let a parameter show the gradient of the entries that train; one that is kept for a choice is put aside."""
    parameter, held = mask.parameter, mask.parameter.grad
    if isinstance(held, EntryGradient) or mask.averages_first:
        return
    if held is not None and mask.frees_gradient and not mask.waits:
        # It was added by hand, after the entries of what autograd had added were picked.
        mask.gather()
        parameter.grad = held = None
    if held is not None:
        entries = mask.values.new_zeros(0) if mask.waits else mask.entries_of(held)
        mask.values.grad = None
    elif mask.values.grad is not None:
        entries = mask.values.grad
    else:
        return
    parameter.grad = EntryGradient(mask, entries, held)


def hide_entries(mask: HasEntries, *, ends: bool) -> bool:
    """Take away what `show_entries` showed, and say whether there was something.

    Where the passes have ended, entries of a gradient that is kept for a choice are the optimizer's as they are now.
    """
    shown = mask.parameter.grad
    if not isinstance(shown, EntryGradient):
        return False
    mask.parameter.grad = shown.held
    if shown.held is not None and ends and not (mask.waits or mask.averages_last):
        mask.values.grad, mask.is_shown = shown.entries, True
    return True


def is_empty(gradient: Tensor) -> bool:
    """Say whether a gradient is shown of a parameter of which nothing trains yet."""
    return isinstance(gradient, EntryGradient) and not len(gradient.entries)


def _leaves(tree: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(tree)


def _writes(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Say whether an operator writes into such a gradient."""
    for place, operand in enumerate(func._schema.arguments):
        alias = operand.alias_info
        given = args[place] if place < len(args) else kwargs.get(operand.name)
        if alias is not None and alias.is_write and any(map(_is_ours, _leaves(given))):
            return True
    return False


def _is_ours(one: Any) -> bool:
    return isinstance(one, EntryGradient)


def _is_alone(args: tuple[Any, ...], kwargs: Any) -> bool:
    """Say whether all operands but the first are numbers, and no axes are named."""
    rest = (args[1:], kwargs)
    numbers = all(one.dim() == 0 for one in _leaves(rest) if isinstance(one, Tensor))
    lists = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, (list, tuple))]
    return numbers and not any(lists)


def _entries(one: Any) -> Any:
    return one.entries if isinstance(one, EntryGradient) else one


def _whole(one: Any) -> Any:
    return one.whole() if isinstance(one, EntryGradient) else one
