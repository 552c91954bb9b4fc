"""Masks by which selected entries of a parameter train, and the others stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from trainc.runtime.mask.positions import Arrived, Positions, carry, size_of, staying
from trainc.runtime.mask.update_mask import Begin, UpdateMask, leaves_of, no_state, own_tensors
from trainc.runtime.soundness.gradient_norm import FreedGradient
from trainc.runtime.step.entry_updates import Chosen
from trainc.runtime.step.gradients import as_dense


class ComesInParts(Exception):
    """More of a gradient came after what was taken for the whole of it; the message is the parameter's name."""


class SelectedEntries(UpdateMask):
    """Selected entries train, as a vector of their own; the others stay as they are.

    A dense gradient is freed once its entries are gathered. `index` (k,) holds sorted flat positions, int32 where they
    fit, or is None until they are chosen; until then nothing trains. While a choice depends on dense gradients, that of
    the step stays in `parameter.grad`, unless it is known to be whole as it arrives: then it is chosen by at once.
    `values` (k,) is what the optimizer updates, in float32 at least: a master copy of 16-bit weights, or without
    `master` a copy that is made of them before every update. Where an operator updates the weights themselves
    (`update`), those that have no master copy need none, and `values` holds nothing.
    """

    def __init__(
        self,
        name: str,
        parameter: Parameter,
        count: int,
        master: bool = True,
        is_counted: bool = True,
    ) -> None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        values = Parameter(torch.zeros(count, dtype=dtype, device=parameter.device))
        super().__init__(name, parameter, values)
        self._has_master = master and dtype != parameter.dtype
        self.is_counted = is_counted
        """Whether `count` is how many entries every choice takes."""
        self._positions: Positions | None = None
        self.left = False
        """Whether entries that trained before do not any more, so that others than those of now have changed."""
        self.keeps_dense = False
        """Whether the next choice depends on the dense gradient of the open step."""
        self.arrival: Callable[[Tensor], Arrived] | None = None
        """What the next choice keeps of a whole dense gradient; None where it needs the gradient itself."""
        self.is_whole = False
        """Whether a gradient that arrives now is that of the whole step, which nobody else reads."""
        self.kept: Tensor | Arrived | None = None
        """What the open step says of the next choice: its dense gradient, what a score makes of it, or the choice."""
        self._is_gathered = False
        self._handle: RemovableHandle | None = None
        self._in_place = False
        self._before: Tensor | None = None
        self._moved: Tensor | None = None

    @property
    def index(self) -> Tensor | None:
        """The sorted flat positions (k,) of the selection, made from what is held; None until it is chosen."""
        return None if self._positions is None else self._positions.index()

    @index.setter
    def index(self, index: Tensor | None) -> None:
        numel = self.parameter.numel()
        self._positions = None if index is None else Positions.of(index, numel)

    @property
    def is_chosen(self) -> bool:
        """Whether there is a selection."""
        return self._positions is not None

    @property
    def waits(self) -> bool:
        return not self.is_chosen

    @property
    def density(self) -> float:
        """Return the fraction of the entries that trains; 1 for a tensor without entries."""
        numel = self.parameter.numel()
        return self.values.numel() / numel if numel else 1.0

    # gradients

    @property
    def frees_gradient(self) -> bool:
        return self._chooses_now or (self.is_chosen and not self.keeps_dense)

    @property
    def _chooses_now(self) -> bool:
        """Whether the next gradient is chosen by as it arrives."""
        return self.arrival is not None and self.is_whole

    def open_step(
        self, *, keeps_dense: bool, arrival: Callable[[Tensor], Arrived] | None = None
    ) -> None:
        """Say, before the passes of a step, whether a choice depends on its gradients, and what it keeps of them."""
        self.keeps_dense, self.arrival = keeps_dense, arrival
        self.kept, self.freed, self._is_gathered, self.is_shown = None, None, False, False
        if arrival is not None and self.parameter.requires_grad:
            self._listen()

    def close_passes(self) -> None:
        """Gather the step's gradient, unless that was done, and free what no choice depends on."""
        if not (self.keeps_dense and self._is_gathered):  # those were, and may be changed since
            self.gather()
        grad, self.parameter.grad, self.freed = self.parameter.grad, None, None
        if grad is not None and self.keeps_dense:
            self.kept = as_dense(grad)

    def accumulated(self) -> Tensor | None:
        """Return what holds the gradient of the open step: all of it where a choice depends on it, else its entries."""
        return self.values.grad if self.frees_gradient else self.parameter.grad

    def take(self, grad: Tensor) -> None:
        """Add a dense gradient: its selected entries, or all of it where a choice depends on it."""
        grad = as_dense(grad).detach()
        if self._chooses_now:
            self._arrive(grad)
            return
        index = self.index
        if index is None or self.keeps_dense:
            held = self.parameter.grad
            self.parameter.grad = grad if held is None else held + grad
        elif index.numel():
            picked = grad.reshape(-1).index_select(0, index).to(self.values.dtype)
            self.values.grad = picked if self.values.grad is None else self.values.grad.add_(picked)

    def picked(self, tensor: Tensor) -> Tensor:
        index = self.index
        return tensor if index is None else tensor.reshape(-1).index_select(0, index)

    def whole(self, values: Tensor) -> Tensor:
        index = self.index
        if index is None:
            return values
        spread = values.new_zeros(self.parameter.numel())
        spread[index] = values
        return spread.view(self.parameter.shape)

    def gradient(self) -> Tensor | None:
        return self.values.grad if self.is_chosen else self.parameter.grad

    def gather(self) -> None:
        """Move the selected entries of `parameter.grad` to `values.grad` and free the rest."""
        self._is_gathered = True
        grad = self.parameter.grad
        if grad is None or not self.is_chosen or (self.is_shown and self.keeps_dense):
            return
        if self.keeps_dense:  # it holds all that the step has added
            self.values.grad = self.entries_of(grad)
            return
        self.parameter.grad = None
        self.take(grad)

    def _gather_now(self, _: Tensor) -> None:
        """Gather as soon as the backward pass has the gradient, unless all of it is needed first."""
        grad = self.parameter.grad
        if self._chooses_now and grad is not None:
            self.parameter.grad = None
            self._arrive(grad)
        elif not (self.averages_first or self.keeps_dense):
            self.gather()

    def _arrive(self, grad: Tensor) -> None:
        """Keep of the whole gradient what trains now, what the next choice is by it, and its norm, and no more.

        Raises ComesInParts for a second one.
        """
        if self.kept is not None:
            raise ComesInParts(self.name)
        assert self.arrival is not None
        with torch.no_grad():
            dense = as_dense(grad)
            if self.is_chosen:
                self.values.grad = self.entries_of(dense)
            else:
                self.freed = FreedGradient.of(grad)
            self.kept = self.arrival(dense)

    def discard(self) -> None:
        super().discard()
        self.kept, self._is_gathered, self.is_shown = None, False, False

    def _listen(self) -> None:
        """Have gradients from now on as soon as a backward pass has accumulated them."""
        if self._handle is None:
            register: Any = self.parameter.register_post_accumulate_grad_hook
            self._handle = register(self._gather_now)

    # entries

    def choose(
        self, index: Tensor, state: Mapping[str, Any] | None = None, begin: Begin = no_state
    ) -> int | None:
        """Set the selection, sorted flat positions of shape (k,), and copy the weights there.

        `state` is what the optimizer holds for the selection of now, of any nesting: its vectors (k,) keep the numbers
        of entries that stay selected, and have those of `begin` for the others. Return how many stay; None for the
        first selection.
        """
        small = self.parameter.numel() <= torch.iinfo(torch.int32).max
        old, held = self.index, self.values.shape
        self.index = index.to(self.parameter.device, torch.int32 if small else torch.int64)
        own = own_tensors(state or {}, (held,))
        assert self.index is not None
        stays, place = staying(old, self.index)
        if old is not None or held != index.shape:
            # An optimizer may have made its state before it was known how many are chosen.
            fresh = leaves_of(begin(self._weights().to(self.values.dtype)) if own else {})
            for key, tensor in own.items():
                carry(tensor, fresh.get(key), stays, place)
            carry(self.values, None, stays, place)
        if old is not None:
            self.values.grad = None
        self._listen()
        self.read()
        return None if old is None else int(stays.sum())

    def _weights(self) -> Tensor:
        """Return the selected weights, (k,)."""
        assert self.index is not None
        return self.parameter.detach().reshape(-1).index_select(0, self.index)

    def forget(self) -> None:
        """Drop the selection, so that another can be chosen."""
        self.index = None
        self.values.data = torch.zeros_like(self.values, memory_format=torch.contiguous_format)
        self.remove()

    def read(self) -> None:
        """Copy the weights to `values`; a value of a master copy that still rounds to its weight is kept."""
        index = self.index
        if index is None:
            return
        if self._is_empty:
            # Of the right size, and loud where somebody reads it.
            self.values.data = self.values.new_full((1,), torch.nan).expand(len(index))
            return
        with torch.no_grad():
            now = self._weights()
            if not self._has_master:
                self.values.copy_(now)
                return
            stale = self.values.detach().to(now.dtype) != now
            self.values.copy_(torch.where(stale, now.to(self.values.dtype), self.values))

    def write(self) -> Tensor:
        """Write `values` into the parameter; return how many weights changed, 0-d."""
        index, moved = self.index, self._moved
        self._moved = None
        if moved is not None:
            return moved
        if index is None or self._is_empty:
            return torch.zeros((), dtype=torch.int64, device=self.values.device)
        with torch.no_grad():
            weights = self.parameter.detach()
            new = self.values.detach().to(weights.dtype)
            changed = (weights.reshape(-1).index_select(0, index) != new).sum()
            if weights.is_contiguous():
                weights.view(-1)[index] = new
            else:
                weights[torch.unravel_index(index.long(), weights.shape)] = new
        return changed

    # the update of the weights themselves

    def update_in_place(self) -> None:
        """Say that an operator takes every step, so that weights which are precise enough need no copy."""
        self._in_place = True
        self.read()

    @property
    def _is_empty(self) -> bool:
        """Whether `values` has a size and nothing else."""
        return self._in_place and self.is_chosen and not self._has_master

    def open_update(self, state: dict[str, Any]) -> Chosen | None:
        index, grad = self.index, self.values.grad
        if index is None or grad is None:
            return None
        weight = self.parameter.detach()
        self._before = weight.reshape(-1).index_select(0, index)
        return Chosen(weight, grad, index, None if self._is_empty else self.values.detach(), state)

    def close_update(self, chosen: Chosen) -> None:
        before, self._before = self._before, None
        assert before is not None
        self._moved = (chosen.weight.reshape(-1).index_select(0, chosen.index) != before).sum()
        self.values.grad = None

    # what a checkpoint holds

    def state(self) -> dict[str, Tensor]:
        """Return the positions, and the master copy where there is one; nothing before the choice.

        `trainc delta` finds the positions by their key, `index/` and the name of the parameter.
        """
        index = self.index
        if index is None:
            return {}
        found = {f"index/{self.name}": index}
        return found | {f"values/{self.name}": self.values.detach()} if self._has_master else found

    def load(self, state: Mapping[str, Any]) -> None:
        """Set the selection and its values to what `state` gave, whose weights are in the parameter already."""
        index, values = (state.get(f"{key}/{self.name}") for key in ("index", "values"))
        if index is None:
            self.forget()
            return
        self.choose(index)
        if values is not None and self._has_master:
            with torch.no_grad():
                self.values.copy_(values)

    def describe(self) -> str:
        return f"{self.values.numel()} of {self.parameter.numel()}"

    def memory(self) -> int:
        copied = not self._in_place or self._has_master
        held = self._positions
        positions = (
            size_of(self.values.numel(), self.parameter.numel()) if held is None else held.nbytes
        )
        return positions + self.values.nbytes * copied

    def remove(self) -> None:
        """Leave the parameter's gradients to others."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
