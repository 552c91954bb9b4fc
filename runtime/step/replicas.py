"""Replicas: what processes that average their gradients tell each other once a step.

Averaging over R replicas divides an example's weight and its contribution to the gradient by R, and a squared norm by
R^2. A step costs two exchanges: of lengths, 16 bytes a replica, then of the longest replica's numbers, 8 bytes each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from trainc.runtime.step.record import Calibrated, Contribution


def world_size() -> int:
    """Return how many processes there are; 1 without torch.distributed."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True, slots=True)
class Layout:
    """What a replica sends, the same of every one: names of squares, of whole gradients, of rows with their length."""

    squares: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    gradients: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, part: Contribution) -> Layout:
        """Return the layout of a contribution."""
        rows = tuple((name, g.shape[1]) for name, g in part.gradients.items())
        return cls(tuple(part.squares), tuple(part.whole), rows)

    def names(self) -> list[str]:
        """Return a line for each thing that is sent."""
        rows = [f"gradients of `{name}` ({numel} entries)" for name, numel in self.gradients]
        squares = [f"squares of `{name}`" for name in self.squares]
        return [*squares, *(f"whole gradient of `{name}`" for name in self.whole), *rows]

    def sizes(self, units: int, examples: int) -> list[int]:
        """Return the lengths of the pieces of a contribution of some units; `examples` -1: it has none apart."""
        rows = [units * numel for _, numel in self.gradients]
        return [units, max(examples, 0), len(self.squares) * units, len(self.whole), *rows]

    def pack(self, part: Contribution) -> list[Tensor]:
        """Return the pieces of a contribution, flat."""
        pieces = [part.weights, *([] if part.examples is None else [part.examples])]
        pieces += [part.squares[name] for name in self.squares]
        pieces += [part.whole[name] for name in self.whole]
        pieces += [part.gradients[name] for name, _ in self.gradients]
        return [piece.detach().reshape(-1) for piece in pieces]

    def unpack(
        self, pieces: Iterator[Tensor], units: int, examples: int, replica: int, replicas: int
    ) -> Contribution:
        """Return a replica's contribution to the average of all."""
        from trainc.runtime.step.record import Contribution

        weights, singles = next(pieces) / replicas, next(pieces) / replicas
        squares = next(pieces).view(len(self.squares), units) / replicas**2
        whole = next(pieces) / replicas**2
        rows = {n: next(pieces).view(units, numel) / replicas for n, numel in self.gradients}
        return Contribution(
            weights,
            dict(zip(self.squares, squares, strict=True)),
            rows,
            dict(zip(self.whole, whole, strict=True)),
            None if examples < 0 else singles,
            replica,
        )


class Replicas:
    """The processes of a group (None: all), each with its own examples, whose gradients are averaged."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def gather(
        self, contributions: Sequence[Contribution], figures: Mapping[str, float]
    ) -> tuple[list[Contribution], dict[str, float]]:
        """Return the contributions of all replicas to the averaged gradient, by rank, and the figures' means.

        All get the same bits. Replicas may differ in micro-batches and examples, not in what they measure: then all
        raise ValueError.
        """
        import torch

        layout = Layout.of(contributions[0]) if contributions else Layout()
        for part in contributions:
            if Layout.of(part) != layout:
                raise ValueError("two micro-batches of a step measured different parameters")
        counts = [
            (len(p.weights), -1 if p.examples is None else len(p.examples)) for p in contributions
        ]
        head = [*figures.values(), len(contributions), *(n for pair in counts for n in pair)]
        device = contributions[0].weights.device if contributions else torch.device("cpu")
        numbers = torch.tensor(head, dtype=torch.float64, device=device)
        pieces = [numbers, *(piece for part in contributions for piece in layout.pack(part))]
        # Joined with float64 numbers, all of it is float64.
        everyone = self._exchange(torch.cat(pieces), [*figures, *layout.names()])
        found = [
            p for i, one in enumerate(everyone) for p in self._read(one[len(figures) :], layout, i)
        ]
        sums = torch.stack([one[: len(figures)] for one in everyone]).sum(0) / self.size
        return found, dict(zip(figures, sums.tolist(), strict=True))

    def total(self, number: float) -> float:
        """Return the sum of everybody's number."""
        import torch
        import torch.distributed as dist

        found = torch.tensor([number], dtype=torch.float64)
        found = found.to(self._device(found))
        dist.all_reduce(found, group=self.group)
        return float(found)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of everybody's, in place."""
        import torch.distributed as dist

        for tensor in tensors:
            sent = tensor.to(self._device(tensor))
            dist.all_reduce(sent, group=self.group)
            if sent is not tensor:
                tensor.copy_(sent)

    def calibrated(self, own: Calibrated) -> Calibrated:
        """Return everybody's examples as one set; `own.whole` is of the gradients that were added up already."""
        import torch

        from trainc.runtime.step.record import Calibrated, Contribution

        parts, _ = self.gather([Contribution(own.weights, own.squares)], {})
        return Calibrated(
            torch.cat([part.weights for part in parts]),
            {name: torch.cat([part.squares[name] for part in parts]) for name in own.squares},
            {name: square / self.size**2 for name, square in own.whole.items()},
        )

    # inside

    def _read(self, numbers: Tensor, layout: Layout, replica: int) -> Iterator[Contribution]:
        """Yield the contributions that a replica sent."""
        micros = int(numbers[0])
        counts = [(int(a), int(b)) for a, b in numbers[1 : 1 + 2 * micros].view(-1, 2).tolist()]
        sizes = [size for units, examples in counts for size in layout.sizes(units, examples)]
        pieces = iter(numbers[1 + 2 * micros :].split(sizes))
        for units, examples in counts:
            yield layout.unpack(pieces, units, examples, replica, self.size)

    def _exchange(self, own: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Return everybody's vector, of different lengths; raises ValueError where they are not about the same."""
        import torch
        import torch.distributed as dist

        sent = own.to(self._device(own))
        check = zlib.crc32("\n".join(names).encode())
        head = torch.tensor([len(own), check], dtype=torch.int64, device=sent.device)
        heads = [torch.empty_like(head) for _ in range(self.size)]
        dist.all_gather(heads, head, group=self.group)
        lengths, checks = zip(*(one.tolist() for one in heads), strict=True)
        if len(set(checks)) > 1:
            self._refuse(names)
        padded = sent.new_zeros(max(lengths))
        padded[: len(sent)] = sent
        vectors = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(vectors, padded, group=self.group)
        return [v[:n].to(own.device) for v, n in zip(vectors, lengths, strict=True)]

    def _refuse(self, names: Sequence[str]) -> None:
        """Raise ValueError with the first thing that this replica and another one do not both send."""
        import torch.distributed as dist

        everyone: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, list(names), group=self.group)
        rank, others = next((i, n) for i, n in enumerate(everyone) if n != everyone[0])
        ours, theirs = next(
            pair
            for pair in zip_longest(everyone[0], others, fillvalue="nothing")
            if len(set(pair)) > 1
        )
        raise ValueError(
            f"the replicas do not measure the same: where rank 0 sends {ours}, rank {rank} sends {theirs};"
            " compile the same spec against the same model on every process"
        )

    def _device(self, tensor: Tensor) -> torch.device:
        """Return where the group's backend takes tensors: gloo on the CPU, nccl on this process's GPU."""
        import torch
        import torch.distributed as dist

        backend = dist.get_backend(self.group)
        if backend == "gloo":
            return torch.device("cpu")
        if backend == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return tensor.device
