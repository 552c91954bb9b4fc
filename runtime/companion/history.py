"""A history: the logits that each sample of the training data had when it was last seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.observer import Observer, Seen
from trainc.runtime.storage.form import Form, Record, Values

GIB = 1 << 30
_BYTES = 2
_LARGEST = torch.finfo(torch.float16).max


class History(Observer):
    """A table with a row for each sample, in float16, and which samples were seen; rows are numbered by sample ids.

    It reads every training step in which its gate is open, and writes at its end: rows of all replicas, by rank, so
    that each of these has the same table. `expected` is the shape that the table will have, as far as it is known;
    `instead` is what to do without a table, for messages.
    """

    sample_ids = True

    def __init__(
        self, clause: str, limit: float, instead: str, expected: Sequence[int] = ()
    ) -> None:
        self.clause, self.name, self.instead = clause, f"{clause} history", instead
        self.limit, self.expected = limit * GIB, tuple(expected)
        self.rows = torch.zeros(0, 0, dtype=torch.float16)
        """Flat logits by sample, (samples, numbers)."""
        self.shape: tuple[int, ...] = ()
        """That of one sample's logits."""
        self.seen = torch.zeros(0, dtype=torch.bool)
        self._new: list[tuple[Tensor, Tensor]] = []

    # what terms read

    def recall(self, ids: Tensor, shape: Callable[[], Sequence[int]]) -> Tensor:
        """Return the last logits of samples, (B, *shape) in float32; those of one that was never seen are NaN."""
        if not self.seen.numel():
            return torch.full((len(ids), *shape()), math.nan, device=ids.device)
        self._move(ids.device)
        inside = (ids >= 0) & (ids < len(self.rows))
        at = ids.where(inside, 0)
        known = (inside & self.seen[at]).unsqueeze(1)
        return self.rows[at].float().where(known, math.nan).view(len(ids), *self.shape)

    # what it keeps

    def see(self, forward: Seen) -> None:
        self._new.append((forward.sample_ids.clone(), forward.view(0).to(torch.float32).clone()))

    def found(self, replicas: ReplicaGroup | None = None) -> Mapping[str, float]:
        """Write what was seen into the table."""
        ids, logits = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)
        if self._new:
            shapes = [one.shape[1:] for _, one in self._new]
            self.check_shapes([*shapes, *([self.shape] if self.seen.numel() else [])])
            self.shape = tuple(shapes[0])
            ids = torch.cat([one for one, _ in self._new])
            logits = torch.cat([one.reshape(len(one), -1) for _, one in self._new])
        if replicas is not None:
            # Numbers of samples are exact in float64.
            sent = torch.cat([ids[:, None].double(), logits.double()], 1)
            every = replicas.gather_examples(sent)
            ids, logits = every[:, 0].long(), every[:, 1:]
        if len(ids):
            self._write(ids, logits)
        return {}

    def forget(self) -> None:
        self._new = []

    def check_shapes(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raise ValueError where logits of one sample have several shapes."""
        first = tuple(shapes[0])
        for other in shapes:
            if len(other) != len(first) or any(a != b for a, b in zip(other, first, strict=True)):
                raise ValueError(
                    f"`{self.clause}` compares each sample's logits with those of its last visit, and they have"
                    f" different shapes, {list(first)} and {list(other)}: give every sample the same number of tokens,"
                    f" or {self.instead}"
                )

    def _write(self, ids: Tensor, logits: Tensor) -> None:
        if int(ids.min()) < 0:
            raise ValueError(
                f"`{self.clause}`: sample ids number the samples from 0, found {int(ids.min())}"
            )
        self._grow(int(ids.max()) + 1, logits.shape[1])
        self._move(logits.device)
        # Of several rows of a sample the last counts, on every replica.
        order = torch.arange(len(ids), device=ids.device)
        last = order.new_full((len(self.rows),), -1).scatter_reduce(0, ids, order, "amax")[ids]
        kept = order == last
        self.rows[ids[kept]] = logits[kept].clamp(-_LARGEST, _LARGEST).to(torch.float16)
        self.seen[ids[kept]] = True

    def _grow(self, samples: int, numbers: int) -> None:
        """Give the table rows for as many samples; raises ValueError where that is more than the limit."""
        if samples <= len(self.rows):
            return
        wanted = max(samples, self.expected[0] if self.expected else 2 * len(self.rows))
        count = wanted if _BYTES * wanted * numbers <= self.limit else samples
        if _BYTES * count * numbers > self.limit:
            raise ValueError(self.too_large((count, *self.shape)))
        rows, seen = self.rows.new_zeros(count, numbers), self.seen.new_zeros(count)
        if len(self.rows):
            rows[: len(self.rows)], seen[: len(self.seen)] = self.rows, self.seen
        self.rows, self.seen = rows, seen

    def _move(self, device: torch.device) -> None:
        self.rows, self.seen = self.rows.to(device), self.seen.to(device)

    def too_large(self, shape: Sequence[int]) -> str:
        """Return what is wrong with a table of this shape, and what to do."""
        size = _BYTES * math.prod(shape) / GIB
        return (
            f"`{self.clause}` keeps the last logits of every sample, a table of {list(shape)} that takes"
            f" {size:.3g} GiB in 16 bits, more than `max_table` = {self.limit / GIB:g}: {self.instead}, which"
            " keeps none, or raise `max_table`"
        )

    # state

    def memory(self) -> int:
        """Return the bytes of the table as it is, or will be."""
        return _BYTES * math.prod(self.expected) if self.expected else _BYTES * self.rows.numel()

    def state_dict(self) -> ActionState:
        if not self.seen.numel():
            return {}
        return {
            "rows": self.rows,
            "seen": self.seen,
            "shape": torch.tensor(self.shape, dtype=torch.int64),
        }

    def state_form(self) -> Form:
        rows, seen = Values([None, None], "float16"), Values([None], "bool")
        return Record({}, {"rows": rows, "seen": seen, "shape": Values([None], "int64", low=0)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the table; without a state no sample was seen."""
        self.forget()
        empty = {"rows": self.rows.new_zeros(0, 0), "seen": self.seen.new_zeros(0)}
        rows, seen = (state.get(name, empty[name]) for name in ("rows", "seen"))
        shape = tuple(state["shape"].tolist()) if "shape" in state else ()
        if len(rows) != len(seen) or (len(rows) and rows.shape[1] != math.prod(shape)):
            raise ValueError(
                f"{self.name}: rows {list(rows.shape)} of logits {list(shape)} do not fit {len(seen)} samples"
            )
        self.rows, self.seen, self.shape = rows.clone(), seen.clone(), shape
