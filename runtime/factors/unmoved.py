"""Which matrices cannot have changed enough to matter since they were measured, by a bound on their change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.processes.replica_group import ReplicaGroup

COPY, ROOM = "copy/", "room/"


@dataclass(eq=False)
class Unmoved:
    """A copy of all matrices as they were measured, and the Frobenius norm of a change that needs no measurement.

    The copies take as much memory as the measured weights, whole ones where these are sharded, and are in the state.
    """

    copies: dict[str, Tensor] = field(default_factory=dict)
    rooms: dict[str, float] = field(default_factory=dict)

    def moved(self, matrices: Mapping[str, Tensor], peers: ReplicaGroup | None) -> set[str]:
        """Return the names of what has to be measured; of several processes rank 0 decides."""
        found = [float(self._may_have_moved(name, one)) for name, one in matrices.items()]
        if peers is not None:
            found = peers.gather_rows(found)[0].tolist()
        return {name for name, moved in zip(matrices, found, strict=True) if moved}

    def _may_have_moved(self, name: str, matrices: Tensor) -> bool:
        if name not in self.copies:
            return True
        before = self.copies[name] = self.copies[name].to(matrices.device)
        wide = torch.promote_types(matrices.dtype, torch.float64)
        change = torch.linalg.vector_norm(matrices - before, dtype=wide)
        # Rows that are zero do not count, so that one more or less is another matrix.
        return not (change <= self.rooms[name] and torch.equal(matrices == 0, before == 0))

    def measured(self, name: str, matrices: Tensor, room: float) -> None:
        """Keep what was measured, and the norm of a change that it allows."""
        self.rooms[name] = room
        self.copies[name] = matrices.detach().clone()

    def memory(self) -> int:
        """Return the bytes of the copies."""
        return sum(copy.nbytes for copy in self.copies.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        found: dict[str, Any] = {f"{COPY}{name}": copy for name, copy in self.copies.items()}
        return found | {f"{ROOM}{name}": room for name, room in self.rooms.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rooms = {k.removeprefix(ROOM): float(state[k]) for k in state if k.startswith(ROOM)}
        self.copies = {name: state[f"{COPY}{name}"].clone() for name in self.rooms}
