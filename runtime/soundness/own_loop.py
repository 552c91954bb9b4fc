"""Whether each loss counts once in a step of a loop of the user's own: what happened between `loss` and `update`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.soundness.entry_gradient import (
    HasEntries,
    hide_entries,
    is_empty,
    show_entries,
)
from trainc.runtime.soundness.loss_graph import operations_of

_TOLERANCE = 1e-3
"""How far from 1 the factor of a loss may be: it may have 16 bits."""
_DISCARD = "Call `program.discard_step()` and run the step again"


@dataclass(slots=True)
class _Returned:
    """A loss that was returned, and its backward passes that accumulate: how many were begun, and ended."""

    weight: float
    differentiable: bool
    begun: int = 0
    ended: int = 0
    factor: Tensor | None = None
    """What it was multiplied by before its backward pass, 0-d."""


class OwnLoop:
    """The losses that were returned in the open step, their backward passes, and the weights that they are of."""

    def __init__(
        self, parameters: Mapping[str, Parameter], masks: Mapping[str, HasEntries]
    ) -> None:
        """Watch the parameters of a model, and the entries that train of those that are masked."""
        self._parameters = parameters
        self._entries = {name: mask for name, mask in masks.items() if mask.separate}
        self._returned: list[_Returned] = []
        self._versions: dict[str, int] = {}
        self._holding: dict[str, tuple[Parameter, tuple[int, int]]] = {}
        """The parameters that had a gradient after the last backward pass, and the version of that gradient."""
        self._by_hand = False
        """Whether all gradients were changed after the last backward pass, as unscaling by hand does."""
        self._rewritten: str | None = None
        """A parameter whose sharded gradient was changed since: whether all are zero, their norm says."""

    def clear(self) -> None:
        """Forget the step."""
        self._returned.clear()
        self._versions.clear()
        self._holding.clear()
        self._rewritten, self._by_hand = None, False

    # before a step

    @staticmethod
    def require_gradients(what: str) -> None:
        """Raise RuntimeError under `torch.no_grad()` or inference mode, where nothing can be trained."""
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"`program.{what}` was called without gradients (inside `torch.no_grad()` or inference mode), but it"
                " runs a part of a training step: for a validation loss call `program.evaluate(inputs, targets)`, or"
                " `program.module`"
            )

    def require_whole_step(self, ran: int) -> None:
        """Raise RuntimeError where `program.step` cannot run a step; `ran` counts micro-batches of the open one."""
        self.require_gradients("step")
        if ran:
            raise RuntimeError(
                f"`program.step` runs a whole step, but {ran} micro-batches of the open one ran already, by"
                " `program.loss` or `program.graph`: call `program.update()` or `program.discard_step()` first"
            )

    def refuse_gradients(self) -> None:
        """Raise RuntimeError where a trained parameter has a gradient before a step is opened: it would be counted."""
        values = ((name, one.values) for name, one in self._entries.items())
        for name, parameter in chain(self._parameters.items(), values):
            if parameter.grad is not None and parameter.requires_grad:
                raise RuntimeError(
                    f"`{name}` has a gradient before the step begins, so the step would add to it: free it with"
                    " `program.discard_step()`, which frees all. To add the gradient of a loss of your own to a step,"
                    " call its `backward()` after `program.begin()` or `program.loss`"
                )

    # around a forward pass

    def before_loss(self) -> dict[str, int]:
        """Check that another micro-batch can be added, and return the versions of the weights for `watch`."""
        self._check_passes()
        if self._returned:
            self._check_weights()
            self._check_holding()
        return self._versions_now()

    def watch(
        self, loss: Tensor, weight: float, before: Mapping[str, int], *, multiplied: bool = False
    ) -> None:
        """Count the backward passes of a loss that is returned; one that others weigh may be `multiplied`.

        A forward pass that changes weights itself, as `nn.Embedding(max_norm=...)` does, changes them again where a
        checkpoint repeats it: these are not compared.
        """
        now = self._versions_now()
        self._versions = {name: v for name, v in now.items() if before.get(name) == v}
        entry = _Returned(weight, loss.requires_grad)
        self._returned.append(entry)
        if loss.requires_grad:
            loss.register_hook(partial(self._count, entry, _first_leaf(loss), multiplied))

    def _count(self, entry: _Returned, leaf: Any, multiplied: bool, gradient: Tensor) -> None:
        """Count a backward pass; `torch.autograd.grad`, which accumulates nothing, is none."""
        if not _accumulates(leaf):
            return
        self._check_holding()
        self._hide(ends=False)
        entry.begun += 1
        entry.factor = None if multiplied else gradient.detach()
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(self._end, entry))

    def _end(self, entry: _Returned) -> None:
        entry.ended += 1
        for one in self._entries.values():
            show_entries(one)
        self._holding = {
            name: (parameter, _version(gradient))
            for name, parameter in self._parameters.items()
            if (gradient := parameter.grad) is not None
        }

    def _hide(self, *, ends: bool) -> None:
        """Leave parameters of which entries train without the gradients that the user's code was shown."""
        for name, one in self._entries.items():
            if hide_entries(one, ends=ends):
                self._holding.pop(name, None)

    def _versions_now(self) -> dict[str, int]:
        """Return for each trained parameter a number that grows with every change in place; none of a sharded model."""
        trained = {n: p for n, p in self._parameters.items() if p.requires_grad}
        if any(map(is_sharded, trained.values())):
            return {}
        return {name: parameter._version for name, parameter in trained.items()}

    # at the update

    def check_update(self, ran: int) -> None:
        """Raise RuntimeError where nothing `ran`, a loss was not differentiated or twice, or weights were changed.

        Nothing has changed then, and the step is still open.
        """
        if not ran:
            raise RuntimeError(
                "nothing to update: call `program.loss(batch)` and its `backward()` first"
            )
        self._check_passes()
        self._check_weights()
        self._check_holding()
        held = self._holding.values()
        self._by_hand = bool(held) and all(
            p.grad is not None and _version(p.grad) != before for p, before in held
        )
        self._hide(ends=True)
        number = len(self._returned)
        for i, one in enumerate(self._returned):
            which = "the loss" if number == 1 else f"loss {i + 1} of {number}"
            if not one.differentiable and one.weight:
                raise RuntimeError(
                    f"{which} of this step has no gradient, because every parameter that it was computed from is"
                    f" frozen: let one train (`requires_grad_(True)`). {_DISCARD}"
                )
            if not one.ended and one.weight:
                raise RuntimeError(
                    f"`update` was called, but {which} that `program.loss` returned in this step was not"
                    " differentiated: call its `backward()` once, or `program.discard_step()` to leave the step out. To"
                    " look at a loss only, call `program.evaluate(inputs, targets)`"
                )
            if one.ended > 1:
                raise RuntimeError(
                    f"`backward()` ran {one.ended} times on {which} of this step, so that its gradients count"
                    f" {one.ended} times. {_DISCARD}, with one `backward()` for each loss"
                )

    def factors(self) -> list[Tensor]:
        """Return what losses were multiplied by before their backward passes, 0-d, to be read with the loss."""
        return [one.factor for one in self._returned if one.weight and one.factor is not None]

    def check_gradients(self, norm: float | None, factors: Sequence[float], scale: float) -> None:
        """Raise where losses were differentiated, and their gradients are not there, or those of other losses.

        `norm` is that of all gradients, None where there is none. `factors` are what losses were multiplied by, and
        `scale` what a GradScaler multiplies them by.
        """
        differentiated = any(one.weight and one.ended for one in self._returned)
        if norm is None and differentiated:
            raise _freed("no parameter has a gradient")
        if norm == 0 and differentiated and self._rewritten is not None:
            raise _freed(f"`{self._rewritten}` has a gradient of zeros")
        for factor in factors:
            # One that is not finite is of a scale that overflows, or of a loss that does: the step is not sound.
            if factor > 1 == scale and self._by_hand:
                continue  # unscaled since; what is measured of examples is compared with the gradients
            if math.isfinite(factor) and abs(factor / scale - 1) > _TOLERANCE:
                raise ValueError(_multiplied(factor, scale))

    def _check_holding(self) -> None:
        """Raise RuntimeError where gradients were freed, or set to zero, after the backward pass that gave them.

        Others may be changed, as clipping changes them: all that were changed are zero only where that is all that
        was done. So values are read, on the device, only where something was changed, and until one is not zero.
        """
        changed = []
        for name, (parameter, version) in self._holding.items():
            if parameter.grad is None:
                raise _freed(f"`{name}` has no longer a gradient")
            if _version(parameter.grad) != version:
                if is_sharded(parameter.grad):
                    self._rewritten = name
                elif not is_empty(parameter.grad):
                    changed.append((name, parameter.grad))
        if changed and not any(_has_value(gradient) for _, gradient in changed):
            raise _freed(f"`{changed[0][0]}` has a gradient of zeros")

    def _check_passes(self) -> None:
        """Raise RuntimeError where a backward pass ended with an error, so that some gradients have its part."""
        if any(one.begun > one.ended for one in self._returned):
            raise RuntimeError(
                "the backward pass of a micro-batch ended with an error, so that some gradients of this step hold its"
                f" part and others do not. {_DISCARD}, all of its micro-batches"
            )

    def _check_weights(self) -> None:
        """Raise RuntimeError where weights were changed after the forward pass that the gradients are of."""
        now = self._versions_now() if self._versions else {}
        for name, version in self._versions.items():
            if now.get(name, version) != version:
                raise RuntimeError(
                    f"`{name}` was changed between `program.loss` and `program.update()`, by another optimizer's"
                    " `step()` or by loading weights, so that the gradients of this step are of other weights."
                    " `update()` steps itself: remove the other step, or change weights after `update()`."
                    f" {_DISCARD}"
                )


def _freed(who: str) -> RuntimeError:
    return RuntimeError(
        f"{who} before `program.update()`, although `backward()` ran: something freed it or set it to zero, such as"
        " `zero_grad()` of another optimizer or of the model. `update()` steps and frees gradients itself: remove the"
        " other call. To leave a parameter out of a step, freeze it (`requires_grad_(False)`) before the forward pass."
        f" {_DISCARD}"
    )


def _multiplied(factor: float, scale: float) -> str:
    what = f"a loss of this step was multiplied by {factor:.6g}, "
    if scale != 1:
        return f"{what}and the GradScaler multiplies by {scale:.6g}: write `scaler.scale(loss).backward()`"
    return (
        f"{what}so that the step would be of another loss. With a GradScaler call `program.update(scaler)`. For"
        " several micro-batches write `program.loss(batch, loss_weight=...)`, with the fraction of the step that each"
        " is, and divide nothing. To weigh the loss against another one, compute it in a `program.micro_batch` block"
    )


def _version(gradient: Tensor) -> tuple[int, int]:
    """Return what differs where another tensor stands there, or it was changed in place."""
    return id(gradient), gradient._version


def _has_value(gradient: Tensor) -> bool:
    """Return whether an entry of a gradient is not zero."""
    entries = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(entries.any())


def _first_leaf(loss: Tensor) -> Any:
    """Return a node of the loss's graph that accumulates a gradient; None where there is none."""
    return next((node for node in operations_of(loss) if hasattr(node, "variable")), None)


def _accumulates(leaf: Any) -> bool:
    """Return whether the backward pass under way accumulates the gradient of a leaf that it reaches."""
    if leaf is None:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:  # `torch.autograd.grad` by this very tensor
        return False
