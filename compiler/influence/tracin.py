"""TracInCP: the influence of training examples on the loss of others, summed over checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainc.compiler.influence.example_gradients import ExampleGradients, Gradients
from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.model.inventory import Inventory
from trainc.runtime.data.order import Split, read_batch_at
from trainc.runtime.memory.usable import usable_memory, used_memory
from trainc.runtime.storage.random_streams import derive_seed

ROOM = 2**28
"""Bytes of the gradients of training examples that are held at once."""
MOST = 64
"""The most examples that pass together."""

Tell = Callable[[int, int], None]
"""Called with how many examples are done, and of how many."""


@dataclass(eq=False)
class Influence:
    """Scores (others, training examples) and self-influences (training examples,), float64, and losses of both.

    The losses are those at the last checkpoint of `steps`, NaN for an example of which no target counts.
    """

    steps: list[int]
    rates: list[tuple[float, float]]
    """The lowest and the highest rate of a checkpoint."""
    skipped: list[int]
    """Checkpoints at which no rate was above 0: from before the first step, or at the end of a schedule."""
    scores: Tensor
    own: Tensor
    losses: Tensor
    train_losses: Tensor
    together: bool = False


class Sketch:
    """A count sketch: every entry of a gradient is added, with a random sign, to one of `size` sums.

    The products of sketches have the products of the gradients as means, with a standard deviation of about |g| |g'| /
    sqrt(size). Source: Charikar, Chen, Farach-Colton, Finding Frequent Items in Data Streams, ICALP 2002; of gradients:
    Weinberger et al., Feature Hashing for Large Scale Multitask Learning, ICML 2009.
    """

    def __init__(self, size: int, entries: Mapping[str, int], seed: int) -> None:
        self.size = size
        draw = torch.Generator().manual_seed(derive_seed(seed, "influence", "sketch"))
        self._place = {
            n: torch.randint(size, (k,), generator=draw, dtype=torch.int32)
            for n, k in entries.items()
        }
        self._sign = {
            n: torch.randint(2, (k,), generator=draw, dtype=torch.int8) * 2 - 1
            for n, k in entries.items()
        }

    def __call__(self, rows: Mapping[str, Tensor], rates: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the sketches of gradients by parameter, each times a rate, as one entry of the same kind.

        They are in float64: many entries add up, and those of 16-bit weights would be lost in sums of their kind.
        """
        some = next(iter(rows.values()))
        total = _wide(some.new_zeros(len(some), self.size))
        for name, values in rows.items():
            values = _wide(values)
            place, sign = (one[name].to(values.device) for one in (self._place, self._sign))
            total.index_add_(1, place, values * (sign * rates[name]))
        return {"": total}


@dataclass(eq=False)
class TracIn:
    """Sums the rate times the product of two examples' gradients over checkpoints, each parameter with its own rate.

    Source: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent, NeurIPS 2020,
    arXiv:2002.08484, equation of TracInCP.
    """

    run: RecordedRun
    names: Sequence[str]
    inventory: Inventory
    projected: int | None = None
    tell: Tell = field(default=lambda done, of: None)

    def measure(
        self, train: Sequence[int], others: tuple[Split, Sequence[int]] | None = None
    ) -> Influence:
        """Return the influence of training examples on others, and on themselves.

        Raises ValueError where no checkpoint counts, and where the gradients of the others do not fit into memory.
        """
        gradients = ExampleGradients(self.run.program, self.names, self.inventory)
        sizes = {name: p.numel() for name, p in gradients.parameters.items()}
        seed = self.run.program.settings.seed
        split, ids = others or (_whole(self.run.data.train), [])
        self._require_memory(gradients, len(ids), len(train))
        sketch = Sketch(self.projected, sizes, seed) if self.projected else None
        found = Influence(
            [],
            [],
            [],
            torch.zeros(len(ids), len(train), dtype=torch.float64),
            torch.zeros(len(train), dtype=torch.float64),
            torch.full((len(ids),), torch.nan, dtype=torch.float64),
            torch.full((len(train),), torch.nan, dtype=torch.float64),
        )
        ones = dict.fromkeys(self.names, 1.0)
        done, total = 0, (len(train) + len(ids)) * len(self.run.checkpoints)
        for step in self.run.checkpoints:
            every = self.run.load(step)
            rates = {name: every.get(name, 0.0) for name in self.names}
            if not any(rates.values()):
                found.skipped.append(step)
                done += len(train) + len(ids)
                continue
            found.steps.append(step)
            found.rates.append((min(rates.values()), max(rates.values())))
            of_others: list[dict[str, Tensor]] = []
            for part, one in self._read(split, ids, gradients):
                of_others.append(sketch(one.rows, rates) if sketch else one.rows)
                found.losses[part] = one.losses.double()
                done += part.stop - part.start
                self.tell(done, total)
            for part, one in self._read(_whole(self.run.data.train), train, gradients):
                squares = [r * _wide(one.rows[n]).square().sum(1) for n, r in rates.items()]
                found.own[part] += torch.stack(squares).sum(0).cpu()
                found.train_losses[part] = one.losses.double()
                if ids:
                    rows, scales = (
                        (sketch(one.rows, ones), {"": 1.0}) if sketch else (one.rows, rates)
                    )
                    products = [_products(other, rows, scales) for other in of_others]
                    found.scores[:, part] += torch.cat(products).cpu()
                done += part.stop - part.start
                self.tell(done, total)
        if not found.steps:
            steps = ", ".join(map(str, found.skipped))
            raise ValueError(
                f"{self.run.folder}: at its checkpoints (step {steps}) no rate is above 0, and a step of rate 0 has no"
                " influence: write `checkpoint = 100 steps` and `keep = 5` in its `run`, and train again, so that some"
                " are of the part in which the loss fell"
            )
        found.together = gradients.together
        return found

    def _require_memory(self, gradients: ExampleGradients, others: int, train: int) -> None:
        """Raise ValueError where gradients that are held until all are compared do not fit into memory."""
        entries = gradients.entries
        width = max(p.element_size() for p in gradients.parameters.values())
        width = 8 if self.projected else width
        device = next(iter(gradients.parameters.values())).device
        held = others * (self.projected or entries) * width
        usable = usable_memory(device)
        free = math.inf if usable is None else usable.bytes - used_memory(device)
        if held > free:
            raise ValueError(
                f"the gradients of {others:,} samples take {held / 2**30:,.1f} GiB, and there are {free / 2**30:,.1f}"
                f" GiB: name fewer samples with `--on`, fewer parameters with `--layers` or `--last-layer`, or compare"
                f" projections of them with `--projected {_smaller(self.projected or entries, held, free)}`"
            )

    def _read(
        self, split: Split, ids: Sequence[int], gradients: ExampleGradients
    ) -> Iterator[tuple[slice, Gradients]]:
        """Yield the gradients of examples, as many at once as there is room for, and their places among the ids."""
        place, seed = self.run.hardware.place, self.run.program.settings.seed
        size = max(1, min(MOST, ROOM // (8 * gradients.entries)))
        size = 1 if getattr(split, "alone", False) else size
        for first in range(0, len(ids), size):
            part = slice(first, min(first + size, len(ids)))
            batch = read_batch_at(split, list(ids[part]), seed, 0)
            yield part, gradients.of(self.run.program.execution.losses.batch(place(batch)))


def _smaller(entries: int, held: float, free: float) -> int:
    """Return a power of two of entries that take half of what is free, at least one."""
    return 1 << int(math.log2(max(entries * free / held / 2, 1)))


def _whole(split: object) -> Split:
    assert hasattr(split, "batch")
    return split  # type: ignore[return-value]


def _products(
    some: Mapping[str, Tensor], others: Mapping[str, Tensor], rates: Mapping[str, float]
) -> Tensor:
    """Return the products of every row with every other row, over all parameters times their rates, float64."""
    products = [rates[n] * (_wide(rows) @ _wide(others[n]).mT) for n, rows in some.items()]
    return torch.stack(products).sum(0)


def _wide(rows: Tensor) -> Tensor:
    """Return gradients in float64, which MPS does not have."""
    return (rows.cpu() if rows.device.type == "mps" else rows).double()
