"""Masked parameters in replicas: only the gradients of chosen entries are averaged, not whole tensors.

DistributedDataParallel averages dense gradients in the backward pass. It leaves out parameters whose names stand in an
attribute of the module that it wraps; this exchanges those itself, once a step, and their weights before the first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainc.runtime.mask.selected_entries import ComesInParts, SelectedEntries
from trainc.runtime.mask.update_mask import UpdateMask
from trainc.runtime.processes.replica_group import ReplicaGroup

_ATTRIBUTE = "_ddp_params_and_buffers_to_ignore"


class ReplicaEntries:
    """The masks of one program, which they belong to until `release`, and those that it averages itself.

    A DistributedDataParallel that is put around the model later leaves out parameters of which entries are chosen.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, UpdateMask]) -> None:
        self._model, self._masks = model, masks
        self._own: list[SelectedEntries] = []
        self._begun = False
        for mask in masks.values():
            mask.claim()
        names = [name for name, mask in masks.items() if isinstance(mask, SelectedEntries)]
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if names and trained.keys() <= set(
            names
        ):  # it refuses a module without anything to average
            names.remove(min(names, key=lambda name: trained[name].numel()))
        if names:
            setattr(model, _ATTRIBUTE, [*getattr(model, _ATTRIBUTE, ()), *names])

    def release(self) -> None:
        """Leave the parameters to others."""
        for mask in self._masks.values():
            mask.release()
        left = [name for name in getattr(self._model, _ATTRIBUTE, ()) if name not in self._masks]
        if left:
            setattr(self._model, _ATTRIBUTE, left)
        elif hasattr(self._model, _ATTRIBUTE):
            delattr(self._model, _ATTRIBUTE)

    def begin(
        self, replicas: ReplicaGroup | None, wrappers: Iterable[DistributedDataParallel]
    ) -> None:
        """Find before a step what the wrappers leave out; before the first, give all replicas the weights of rank 0."""
        if not self._masks:
            return
        around = [*wrappers]
        averaged = {id(p) for one in around for p in _parameters(one)}
        self._own = []
        for mask in self._masks.values():
            own = bool(around) and replicas is not None and id(mask.parameter) not in averaged
            mask.averages_first, mask.averages_last = replicas is not None and not own, own
            if own and isinstance(mask, SelectedEntries):
                self._own.append(mask)
        if replicas is not None and self._own and not self._begun:
            replicas.copy_from(0, [entries.parameter.detach() for entries in self._own])
        self._begun = True

    @property
    def awaits(self) -> bool:
        """Whether a choice can be made as soon as a gradient of the open step is there."""
        masks = self._masks.values()
        return any(isinstance(one, SelectedEntries) and one.arrival is not None for one in masks)

    @contextmanager
    def arriving(self, read: Collection[str]) -> Iterator[None]:
        """Let gradients that arrive in this block be chosen by at once: they are whole, and nobody else reads them.

        Those of the parameters `read` are read. Raises ComesInParts for one that was not whole: free all gradients
        then, and run the passes again outside of this block.
        """
        alone = [
            mask
            for name, mask in self._masks.items()
            if isinstance(mask, SelectedEntries) and mask.arrival is not None and name not in read
        ]
        for mask in alone:
            mask.is_whole = True
        try:
            yield
        finally:
            for mask in alone:
                mask.is_whole = False
        for mask in alone:
            if mask.kept is not None and mask.parameter.grad is not None:
                raise ComesInParts(mask.name)

    def average(self, replicas: ReplicaGroup | None) -> None:
        """Average the gradients that the wrappers left out: those of chosen entries, and dense ones before a choice."""
        if replicas is None or not self._own:
            return
        found = [entries.accumulated() for entries in self._own]
        # A replica may have no gradient of a parameter that its examples do not reach.
        have = torch.tensor([float(grad is not None) for grad in found])
        for entries, grad in zip(self._own, found, strict=True):
            if grad is None:
                entries.take(torch.zeros_like(entries.parameter, requires_grad=False))
        now = (entries.accumulated() for entries in self._own)
        replicas.mean_in_place([grad for grad in now if grad is not None])
        replicas.mean_in_place([have])
        for entries, share in zip(self._own, have.tolist(), strict=True):
            if not share:
                entries.discard()
            entries.gather()


def _parameters(wrapper: DistributedDataParallel) -> list[Any]:
    """Return the parameters whose gradients a wrapper averages."""
    found: list[Any] = wrapper._module_parameters
    return found
