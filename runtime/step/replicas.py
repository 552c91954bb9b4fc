"""Replicas: processes that average their gradients exchange their contributions once a step.

Averaging over R replicas divides an example's weight and its contribution to the gradient by R, and a squared norm by
R^2. A step costs two exchanges: the lengths, 16 bytes a replica, then as many numbers as the longest replica has, 8
bytes each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.step.record import CalibrationSample, Contribution


@dataclass(frozen=True, slots=True)
class MessageLayout:
    """The names of what a replica sends, the same on each: of squared norms, and of per-example gradients with size."""

    sq_norms: tuple[str, ...] = ()
    batch_sq_norms: tuple[str, ...] = ()
    gradients: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, part: Contribution) -> MessageLayout:
        """Return the layout of a contribution's message."""
        rows = tuple((name, g.shape[1]) for name, g in part.gradients.items())
        return cls(tuple(part.sq_norms), tuple(part.batch_sq_norms), rows)

    def names(self) -> list[str]:
        """Return one line for each item of the message, for the checksum and for errors."""
        rows = [
            f"per-example gradients of `{name}` ({numel} entries)" for name, numel in self.gradients
        ]
        per_example = [f"per-example squared norms of `{name}`" for name in self.sq_norms]
        batch = [f"squared norm of the batch gradient of `{name}`" for name in self.batch_sq_norms]
        return [*per_example, *batch, *rows]

    def sizes(self, units: int, examples: int) -> list[int]:
        """Return the lengths of the pieces of a contribution with `units` rows; `examples` -1: no example weights."""
        rows = [units * numel for _, numel in self.gradients]
        return [
            units,
            max(examples, 0),
            len(self.sq_norms) * units,
            len(self.batch_sq_norms),
            *rows,
        ]

    def pack(self, part: Contribution) -> list[Tensor]:
        """Return the flat pieces of a contribution."""
        pieces = [part.weights, *([] if part.example_weights is None else [part.example_weights])]
        pieces += [part.sq_norms[name] for name in self.sq_norms]
        pieces += [part.batch_sq_norms[name] for name in self.batch_sq_norms]
        pieces += [part.gradients[name] for name, _ in self.gradients]
        return [piece.detach().reshape(-1) for piece in pieces]

    def unpack(
        self, pieces: Iterator[Tensor], units: int, examples: int, replica: int, replicas: int
    ) -> Contribution:
        """Return a replica's contribution to the averaged gradient."""
        weights, example_weights = next(pieces) / replicas, next(pieces) / replicas
        sq_norms = next(pieces).view(len(self.sq_norms), units) / replicas**2
        batch_sq_norms = next(pieces) / replicas**2
        rows = {n: next(pieces).view(units, numel) / replicas for n, numel in self.gradients}
        return Contribution(
            weights,
            dict(zip(self.sq_norms, sq_norms, strict=True)),
            rows,
            dict(zip(self.batch_sq_norms, batch_sq_norms, strict=True)),
            None if examples < 0 else example_weights,
            replica,
        )


class Replicas(ReplicaGroup):
    """The processes of a group (None: all) that average their gradients, each with its own examples."""

    def gather(
        self, contributions: Sequence[Contribution], figures: Mapping[str, float]
    ) -> tuple[list[Contribution], dict[str, float]]:
        """Return the contributions of all replicas to the averaged gradient, by rank, and the means of the figures.

        All replicas get the same bits. They may differ in micro-batches and examples; where they differ in what they
        measure, all raise ValueError.
        """
        layout = MessageLayout.of(contributions[0]) if contributions else MessageLayout()
        for part in contributions:
            if MessageLayout.of(part) != layout:
                raise ValueError("two micro-batches of one step measured different parameters")
        counts = [
            (len(p.weights), -1 if p.example_weights is None else len(p.example_weights))
            for p in contributions
        ]
        head = [*figures.values(), len(contributions), *(n for pair in counts for n in pair)]
        device = contributions[0].weights.device if contributions else torch.device("cpu")
        numbers = torch.tensor(head, dtype=torch.float64, device=device)
        pieces = [numbers, *(piece for part in contributions for piece in layout.pack(part))]
        # Joined with float64 numbers, all of it is float64.
        vectors = self._exchange(torch.cat(pieces), [*figures, *layout.names()])
        found = [
            p for i, one in enumerate(vectors) for p in self._read(one[len(figures) :], layout, i)
        ]
        sums = torch.stack([one[: len(figures)] for one in vectors]).sum(0) / self.size
        return found, dict(zip(figures, sums.tolist(), strict=True))

    def gather_calibration(self, own: CalibrationSample) -> CalibrationSample:
        """Return the examples of all replicas as one sample; `own.batch_sq_norms` is of the summed gradients."""
        parts, _ = self.gather([Contribution(own.weights, own.sq_norms)], {})
        return CalibrationSample(
            torch.cat([part.weights for part in parts]),
            {name: torch.cat([part.sq_norms[name] for part in parts]) for name in own.sq_norms},
            {name: square / self.size**2 for name, square in own.batch_sq_norms.items()},
        )

    # inside

    def _read(self, numbers: Tensor, layout: MessageLayout, replica: int) -> Iterator[Contribution]:
        """Yield the contributions that a replica sent."""
        micros = int(numbers[0])
        counts = [(int(a), int(b)) for a, b in numbers[1 : 1 + 2 * micros].view(-1, 2).tolist()]
        sizes = [size for units, examples in counts for size in layout.sizes(units, examples)]
        pieces = iter(numbers[1 + 2 * micros :].split(sizes))
        for units, examples in counts:
            yield layout.unpack(pieces, units, examples, replica, self.size)

    def _exchange(self, own: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Return the vectors of all replicas; raises ValueError where `names` differ, lengths may."""
        sent = own.to(self._device(own))
        check = zlib.crc32("\n".join(names).encode())
        head = torch.tensor([len(own), check], dtype=torch.int64, device=sent.device)
        lengths, checks = zip(*(one.tolist() for one in self._gather(head)), strict=True)
        if len(set(checks)) > 1:
            self._raise_difference(names)
        padded = sent.new_zeros(max(lengths))
        padded[: len(sent)] = sent
        vectors = self._gather(padded)
        return [v[:n].to(own.device) for v, n in zip(vectors, lengths, strict=True)]

    def _raise_difference(self, names: Sequence[str]) -> None:
        """Raise ValueError with the first item that two replicas do not both send."""
        everyone: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, list(names), group=self.group)
        rank, others = next((i, n) for i, n in enumerate(everyone) if n != everyone[0])
        ours, theirs = next(
            pair
            for pair in zip_longest(everyone[0], others, fillvalue="nothing")
            if len(set(pair)) > 1
        )
        raise ValueError(
            f"the replicas do not measure the same: rank 0 sends {ours}, rank {rank} sends {theirs};"
            " compile the same spec with the same model on every process"
        )
