"""Norms of gradients, alone and together: a norm is finite exactly where every entry is.

They are measured on the device and read with the loss, in one transfer. Squares of float32 overflow at 1.8e19, so a
norm that is not finite, or almost zero, is computed again from float64 before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.processes.sharded import is_sharded, squared_norms

_DOUBTFUL = 1e-15
"""A float32 norm below this may have lost the squares of its entries to rounding."""


@dataclass(frozen=True, slots=True)
class FreedGradient:
    """A gradient that was measured as soon as it was there, and then freed.

    `number` is what `GradientNorms` would have measured of it, 0-d, and `exact` its norm from float64 where that one is
    doubtful. No vector is freed: vectors are measured together.
    """

    number: Tensor
    exact: float | None = None

    @classmethod
    def of(cls, gradient: Tensor) -> FreedGradient:
        """Measure a gradient, which is no vector; this reads its device."""
        (number,) = _norms([gradient])
        exact = None if _DOUBTFUL < float(number) < math.inf else exact_norm(gradient)
        return cls(number, exact)

    def norm(self) -> float:
        """Return the norm, as exact as it is known."""
        return float(self.number) if self.exact is None else self.exact


class Places(NamedTuple):
    """The places of vectors, such as biases, in a list of tensors, and those of all others."""

    vectors: list[int]
    others: list[int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | FreedGradient]) -> Places:
        axes = [0 if isinstance(one, FreedGradient) else one.dim() for one in tensors]
        one = [i for i, count in enumerate(axes) if count == 1]
        return cls(one, [i for i, count in enumerate(axes) if count != 1])


@dataclass(slots=True)
class GradientNorms:
    """The norms of the gradients of `owners`, what optimizers update.

    `numbers` are what is to be read from the device: 0-d, in float32 or float64, one for each gradient or, where `each`
    is False, one for several of them.
    """

    owners: Sequence[Parameter]
    gradients: Sequence[Tensor | FreedGradient]
    numbers: Sequence[Tensor]
    each: bool = True
    total: float = math.nan
    """The norm of all of them together, once it is read; NaN where one is, whatever the others are."""
    values: list[float] = field(default_factory=list)
    """The norm of each, where it is known."""

    @classmethod
    def of(
        cls, owners: Sequence[Parameter], gradients: Sequence[Tensor | FreedGradient]
    ) -> GradientNorms:
        """Measure the norm of each on its device, without reading it."""
        return cls(owners, gradients, _norms(gradients))

    @classmethod
    def of_all(
        cls,
        owners: Sequence[Parameter],
        gradients: Sequence[Tensor | FreedGradient],
        places: Places,
    ) -> GradientNorms:
        """Measure what the norm of all together needs: one norm for all vectors, one for each other gradient."""
        vectors = (gradients[i] for i in places.vectors)
        norm = _joined_norm([one for one in vectors if not isinstance(one, FreedGradient)])
        if norm is None:
            return cls.of(owners, gradients)
        numbers = [norm, *_norms([gradients[i] for i in places.others])]
        return cls(owners, gradients, numbers, each=False)

    def keep(self, numbers: Iterable[float]) -> float:
        """Keep the numbers as they were read, those that overflowed corrected, and return the norm of all together."""
        found = list(numbers)
        if self.each:
            self.values = found
        self.total = math.hypot(*found)
        if not _DOUBTFUL < self.total < math.inf:
            self.values = self._exact(found)
            self.total = math.hypot(*self.values)
            if any(map(math.isnan, self.values)):
                self.total = math.nan
        return self.total

    def _exact(self, found: Sequence[float]) -> list[float]:
        """Return the norm of each gradient, computed again where it is doubtful."""
        held = [one for one in self.gradients if not isinstance(one, FreedGradient)]
        if any(map(is_sharded, held)):  # masks free none of a model that is sharded
            exact: list[float] = squared_norms(held, torch.float64).sqrt().tolist()
            return exact
        known = found if self.each else [math.nan] * len(self.gradients)
        pairs = zip(known, self.gradients, strict=True)
        return [one if _DOUBTFUL < one < math.inf else _exact_norm(g) for one, g in pairs]

    def select(self, owners: Iterable[Parameter]) -> GradientNorms:
        """Return the norms of those of `owners` that have a gradient here; each has to be measured by itself."""
        places = {id(owner): i for i, owner in enumerate(self.owners)}
        at = [places[id(one)] for one in owners if id(one) in places]
        if at == list(range(len(self.owners))):
            return self
        owned, gradients = [self.owners[i] for i in at], [self.gradients[i] for i in at]
        values = [self.values[i] for i in at]
        numbers = [self.numbers[i] for i in at]
        total = math.hypot(*values)
        return GradientNorms(owned, gradients, numbers, total=total, values=values)

    def without(self, owners: Iterable[Parameter]) -> GradientNorms:
        """Return the norms of all but those of `owners`."""
        gone = {id(owner) for owner in owners}
        return self.select(owner for owner in self.owners if id(owner) not in gone)

    def first_unsound(self) -> Parameter | None:
        """Return the first of the owners whose gradient is not finite; None where all are."""
        pairs = zip(self.owners, self.values, strict=False)
        return next((owner for owner, value in pairs if not math.isfinite(value)), None)


class Slot(Protocol):
    """A parameter as an optimizer sees it."""

    name: str
    tensor: Parameter


class HasGradient(Protocol):
    """What keeps the gradient of a parameter of which some entries train."""

    values: Parameter
    freed: FreedGradient | None

    def gradient(self) -> Tensor | None: ...


class ModelGradient:
    """The gradient of the whole model: of every parameter that an optimizer updates, at the entries that train.

    `each` says whether the norm of every gradient is wanted by itself, as clipping does.
    """

    def __init__(
        self,
        slots: Sequence[Slot] = (),
        masks: Mapping[str, HasGradient] | None = None,
        *,
        each: bool = False,
    ) -> None:
        self.slots, self.each = tuple(slots), each
        self._masks = [masks.get(slot.name) for slot in self.slots] if masks else []
        self.bind()

    def bind(self) -> None:
        """Take the parameters as they are now, before the first step: sharding puts others in their places."""
        self._owners = [slot.tensor for slot in self.slots]
        self._places = Places.of(self._owners)

    def measure(self) -> GradientNorms:
        """Measure the norms of the gradients that there are, without reading them from the device."""
        owners, places = self._owners, self._places
        gradients: list[Tensor | FreedGradient]
        gradients = [g for owner in owners if (g := owner.grad) is not None]
        if self._masks or len(gradients) < len(owners):
            owners, gradients = self._found()
            places = Places.of(gradients)
        # A small model feels every call: its vectors have few entries, which are copied faster than measured one by
        # one. Other devices than a CPU measure all of them by one call.
        if self.each or not (len(places.vectors) > 1 and _is_on_cpu(gradients[0])):
            return GradientNorms.of(owners, gradients)
        return GradientNorms.of_all(owners, gradients, places)

    def _found(self) -> tuple[list[Parameter], list[Tensor | FreedGradient]]:
        """Return the parameters that have a gradient, and these; masks keep some elsewhere, and free others."""
        masks = self._masks or [None] * len(self._owners)
        pairs = zip(self._owners, masks, strict=True)
        found = [
            (owner, owner.grad if m is None else m.freed or m.gradient()) for owner, m in pairs
        ]
        held = [(owner, gradient) for owner, gradient in found if gradient is not None]
        return [owner for owner, _ in held], [gradient for _, gradient in held]

    def name_of(self, owner: Parameter) -> str:
        """Return the name of a parameter, or of the one that it holds the trained entries of."""
        return next(slot.name for slot in self.slots if slot.tensor is owner)


def read_numbers(numbers: Sequence[Tensor]) -> list[float]:
    """Return 0-d tensors as floats, in one transfer from the device of the first: all of a step are read at once."""
    if not numbers:
        return []
    device = numbers[0].device
    if device.type == "cpu":
        return [float(number) for number in numbers]
    wide = torch.float64 if any(n.dtype == torch.float64 for n in numbers) else torch.float32
    return torch.stack([number.to(device, wide) for number in numbers]).tolist()


def exact_norm(tensor: Tensor) -> float:
    """Return the L2 norm of a tensor, as a float: it overflows only where the true norm does, and reads the device."""
    values = _dense(tensor).detach().abs()
    if not values.numel():
        return 0.0
    largest = float(values.max())
    if not math.isfinite(largest) or largest == 0:
        return largest
    return largest * float(torch.linalg.vector_norm(values.double() / largest))


def _joined_norm(vectors: list[Tensor]) -> Tensor | None:
    """Return the norm of vectors together, 0-d, in float32 at least; None where they cannot be joined."""
    try:
        joined = torch.cat(vectors)
    except (NotImplementedError, RuntimeError):  # a sparse one, or two devices
        return None
    if type(joined) is not Tensor:
        return None
    norm: Tensor = torch.linalg.vector_norm(joined, dtype=_wide(joined.dtype))
    return norm


def _is_on_cpu(gradient: Tensor | FreedGradient) -> bool:
    return gradient.number.is_cpu if isinstance(gradient, FreedGradient) else gradient.is_cpu


def _exact_norm(gradient: Tensor | FreedGradient) -> float:
    return gradient.norm() if isinstance(gradient, FreedGradient) else exact_norm(gradient)


def _norms(gradients: Sequence[Tensor | FreedGradient]) -> Sequence[Tensor]:
    """Return the norm of each gradient, 0-d, in float32 at least."""
    held = [one for one in gradients if not isinstance(one, FreedGradient)]
    if len(held) == len(gradients):
        return _norms_of(held)
    live = iter(_norms_of(held))
    return [one.number if isinstance(one, FreedGradient) else next(live) for one in gradients]


def _norms_of(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    if not gradients:
        return []
    # One call for all, which is felt by small models; the rare cases are found by its failure.
    if len({gradient.dtype for gradient in gradients}) == 1:
        try:
            norms = torch._foreach_norm([*gradients], 2, _wide(gradients[0].dtype))
        except (NotImplementedError, RuntimeError):
            norms = ()
        if norms and type(norms[0]) is Tensor:
            return norms
    if any(map(is_sharded, gradients)):
        return squared_norms(gradients).sqrt().unbind()
    dense = (_dense(gradient) for gradient in gradients)
    return [torch.linalg.vector_norm(one, dtype=_wide(one.dtype)) for one in dense]


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype to add squares in; None for that of the gradient itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else None


def _dense(tensor: Tensor) -> Tensor:
    """Return the values of a sparse tensor; any other as it is."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor
