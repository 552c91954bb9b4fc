"""A step's gradients: their norms, and what changes them before an optimizer reads them; clipping comes last."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from trainc.runtime.soundness.gradient_norm import GradientNorms, ModelGradient, Slot
    from trainc.runtime.step.record import Step


def as_dense(gradient: Tensor) -> Tensor:
    """Return a gradient, or what has its form, with all its entries: one that is sparse holds those of some rows."""
    return gradient.to_dense() if gradient.is_sparse else gradient


@dataclass(slots=True)
class ParameterGradient:
    """The gradient of one parameter in a step: the mean over all micro-batches and replicas.

    Transforms change `gradient` in place; `weight`, of the same shape, is to be read only. Where a mask selects
    entries, both hold those entries (k,); where a mask keeps entries at zero, their gradient is zero. `lr` is the
    learning rate of the step, with all of its factors, and `weight_decay` what the optimizer will decay the weight by.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    lr: float
    weight_decay: float


class Trained(Protocol):
    """A parameter that an optimizer is about to step: its tensor with a gradient, its rate and weight decay."""

    name: str
    tensor: Parameter
    lr: float
    weight_decay: float


class Pausing(Protocol):
    """Who decides which of some parameters do not train in a step."""

    who: str
    """Who it is, at the start of a sentence."""

    @property
    def names(self) -> frozenset[str]:
        """The parameters that it may decide on."""
        ...

    @property
    def now(self) -> Set[str]:
        """Those that do not train in this step."""
        ...


@dataclass(eq=False)
class Paused:
    """Parameters that a clause's action pauses: it sets `now`, before the gradients of a step are read.

    Optimizers hold state for the fraction `held` of them at a time, at most.
    """

    who: str
    names: frozenset[str]
    held: float = 1.0
    now: frozenset[str] = frozenset()


@dataclass(eq=False)
class DropGradients(Action):
    """Phase 8, first: a paused parameter has no gradient, so that its optimizer leaves it and its state as they are."""

    pausing: Sequence[Pausing]
    slots: Sequence[Slot]
    """The parameters as the optimizers see them."""
    phase = Phase.GRADIENTS
    name = "drop gradients"
    reads_shards = True

    def is_due(self, step: Step) -> bool:
        return any(one.now for one in self.pausing)

    def run(self, step: Step) -> None:
        now = {name for one in self.pausing for name in one.now}
        for slot in self.slots:
            if slot.name in now:
                slot.tensor.grad = None


def paused_in(actions: Iterable[Action]) -> dict[str, list[str]]:
    """Return, as `paused`, the names of parameters that were paused in the last step; empty where none were."""
    drops = (action for action in actions if isinstance(action, DropGradients))
    names = sorted({name for drop in drops for one in drop.pausing for name in one.now})
    return {"paused": names} if names else {}


class GradientTransform(Action):
    """Phase 8, first: changes the gradients of some parameters. Subclasses write `change`.

    Statistics of gradients are taken before, clipping comes after. With `elementwise` every entry is changed by itself,
    so that parameters that are sharded over processes can be changed, too: a process sees its own entries. With
    `takes_shards` it is given those parameters and their gradients as DTensors. With `coupled` it changes gradients
    together with the weight decay that the optimizer will add to them.
    The compiler sets the rest: `parameters`, names; `trained`, which gives those of them that have a gradient now;
    `before`, which lets masks zero the gradients of entries that are zero.
    """

    phase = Phase.GRADIENTS
    elementwise: ClassVar[bool] = False
    takes_shards: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    parameters: tuple[str, ...] = ()
    trained: Callable[[frozenset[str]], Iterator[Trained]]
    before: Sequence[Callable[[], None]] = ()

    @abstractmethod
    def change(self, gradients: Sequence[ParameterGradient], step: Step) -> None:
        """Change each `gradient` in place; only parameters with a gradient in this step are among them."""

    def run(self, step: Step) -> None:
        """Change the gradients; raises ValueError for one that is sparse or, unless `elementwise`, sharded.

        Raises it, too, where `change` did anything but write to the gradients.
        """
        import torch

        with torch.no_grad():
            for zero in self.before:
                zero()
            found = [self._seen(one) for one in self.trained(frozenset(self.parameters))]
            if not found:
                return
            before = [(_kept(one), one.weight._version) for one in found]
            returned: Any = self.change(found, step)
            if returned is not None:
                raise ValueError(
                    f"{self.name}: `change` returned {type(returned).__name__}, which nothing reads: change each"
                    " `gradient` in place, as by `gradient.copy_(new)`, and return nothing"
                )
            for one, (kept, version) in zip(found, before, strict=True):
                self._check_changed(one, kept, version)

    def _check_changed(self, one: ParameterGradient, kept: Sequence[Any], version: int) -> None:
        """Raise ValueError where `change` replaced what it was to write to, or wrote to what is to be read only."""
        now = _kept(one)
        if now[0] is not kept[0]:
            raise ValueError(
                f"{self.name}: `change` put another tensor in place of the gradient of `{one.name}`, which nothing"
                " reads: write to the tensor that is there, as by `gradient.copy_(new)`"
            )
        if now[1:4] != kept[1:4]:
            raise ValueError(
                f"{self.name}: the gradient of `{one.name}` became {now[1]}{list(now[2])} on {now[3]} from"
                f" {kept[1]}{list(kept[2])} on {kept[3]}: a change must keep its form"
            )
        if now[4:] != kept[4:] or one.weight._version != version:
            raise ValueError(
                f"{self.name}: `change` wrote to the weight, `lr` or `weight_decay` of `{one.name}`, which are to be"
                " read only: change the `gradient` alone"
            )

    def _seen(self, one: Trained) -> ParameterGradient:
        """Return a parameter as `change` sees it."""
        weight: Any = one.tensor.detach()
        gradient: Any = one.tensor.grad
        if gradient.is_sparse:
            raise ValueError(
                f"{self.name}: the gradient of `{one.name}` is sparse, and only dense ones can be changed: build its"
                " layer with `sparse=False`, or exclude the parameter from `on`"
            )
        if hasattr(gradient, "device_mesh") and not self.takes_shards:
            if not self.elementwise:
                raise ValueError(f"{self.name}: {sharded_gradient(one.name)}")
            weight, gradient = weight.to_local(), gradient.to_local()
        return ParameterGradient(one.name, weight, gradient, one.lr, one.weight_decay)


def _kept(one: ParameterGradient) -> tuple[Any, ...]:
    """Return what `change` must leave as it is, besides the values of the weight."""
    gradient, weight = one.gradient, one.weight
    form = str(gradient.dtype).removeprefix("torch."), tuple(gradient.shape), gradient.device
    return gradient, *form, id(weight), one.lr, one.weight_decay


def sharded_gradient(name: str) -> str:
    """Return why a sharded gradient cannot be changed by a transform that needs the whole of it."""
    return (
        f"`{name}` is sharded over processes (FSDP2), and no process has its whole gradient, which is needed to change"
        " it: use DistributedDataParallel, or exclude the parameter from `on`"
    )


class GradientNotFinite(Exception):
    """A clause made a gradient NaN or infinite, or an optimizer that asks for several met one; the step is not sound.

    The message says what was found, where the norm of the gradient does not.
    """


class MeasureChanged(Action):
    """Phase 8, after what changes gradients: measures their norm again, which may not be finite any more."""

    phase = Phase.GRADIENTS
    name = "gradient norm"

    def __init__(self, gradient: ModelGradient, changes: Sequence[Action]) -> None:
        self._gradient, self._changes = gradient, tuple(changes)

    def is_due(self, step: Step) -> bool:
        return any(action.is_due(step) for action in self._changes)

    def run(self, step: Step) -> None:
        """Measure; raises GradientNotFinite unless the step may be unsound."""
        from trainc.runtime.soundness.gradient_norm import read_numbers

        found = self._gradient.measure()
        step.gradients = found
        step.metrics["gradient_norm"] = norm = found.keep(read_numbers(found.numbers))
        if not math.isfinite(norm) and not step.may_be_unsound:
            raise GradientNotFinite


OVERFLOWS = 1e18
"""A norm from which on squares of float32 may overflow."""


class Clip(Action):
    """Phase 8, last: scale the gradients of some parameters down to an L2 norm of at most `limit`, all together.

    `metric` is the name that their norm before it is recorded under, where it is not that of the whole model.
    """

    phase = Phase.GRADIENTS
    figures = ("steps", "clipped")

    def __init__(
        self, name: str, limit: float, slots: Sequence[Slot], metric: str | None = None
    ) -> None:
        self.name, self.limit, self.metric = name, limit, metric
        self.slots = tuple(slots)
        self.steps = self.clipped = 0

    def run(self, step: Step) -> None:
        held = [slot.tensor for slot in self.slots if slot.tensor.grad is not None]
        norms = self._norms(step, held)
        value = norms.total
        self._scale(held, norms, value)
        if value > self.limit and step.gradients is not None:
            each = step.gradients.each
            step.gradients = step.gradients.without(held) if each else None
        if self.metric is not None:
            step.metrics[self.metric] = value
        self.steps += 1
        self.clipped += value > self.limit

    def _norms(self, step: Step, held: Sequence[Parameter]) -> GradientNorms:
        """Return the norms of the gradients of now: those of the step where they still hold."""
        from trainc.runtime.soundness.gradient_norm import GradientNorms, read_numbers

        measured = step.gradients
        known = measured.select(held) if measured is not None and measured.each else None
        if known is not None and len(known.owners) == len(held):
            return known
        found = GradientNorms.of(held, [one.grad for one in held if one.grad is not None])
        found.keep(read_numbers(found.numbers))
        return found

    def _scale(self, held: Sequence[Parameter], norms: GradientNorms, value: float) -> None:
        """Scale the gradients as torch's `clip_grad_norm_` does, bit for bit where its norm does not overflow."""
        import torch

        gradients: list[Any] = [one.grad for one in held]
        if not gradients or (math.isfinite(value) and value <= self.limit / 2):
            return  # a factor of 1, which changes nothing
        if value >= OVERFLOWS or any(g.is_sparse or hasattr(g, "device_mesh") for g in gradients):
            factor = min(1.0, self.limit / (value + 1e-6))
            for gradient in gradients:
                gradient.mul_(factor)
            return
        device = norms.numbers[0].device
        total = torch.linalg.vector_norm(torch.stack([one.to(device) for one in norms.numbers]))
        torch.nn.utils.clip_grads_with_norm_(held, self.limit, total)

    def summary(self) -> str | None:
        if not self.steps:
            return None
        return f"{self.name}: clipped {self.clipped} of {self.steps} steps to norm {self.limit:g}"


class CalledClip(Clip):
    """Clips in the steps in which a framework's function asked for it."""

    called = False

    def is_due(self, step: Step) -> bool:
        return self.called


class ShortSteps(Action):
    """Phase 8, first: steps with fewer micro-batches than a framework divides losses by, as an epoch's last may be.

    Their gradient is made as much smaller again as the framework made it. Before, it is that of the mean over the
    micro-batches there are, as all that is measured. `trained` gives what the optimizers update.
    """

    phase = Phase.GRADIENTS
    name = "short steps"

    def __init__(self, trained: Callable[[], Iterable[Parameter]], accumulation: int) -> None:
        self._trained, self.accumulation = trained, accumulation
        self.share = 1.0
        """The micro-batches of the open step, as a fraction of `accumulation`; 1 for a whole step."""

    def open(self, micro_batches: int) -> float:
        """Note how many micro-batches the step has, at its update; return what they are of a whole step."""
        self.share = min(1.0, micro_batches / self.accumulation)
        return self.share

    def enlarge(self) -> None:
        """Let the gradients be those of the mean."""
        self._multiply(1 / self.share)

    def is_due(self, step: Step) -> bool:
        return self.share != 1.0

    def run(self, step: Step) -> None:
        self._multiply(self.share)
        step.gradients = None  # their norms are of the larger ones

    def _multiply(self, factor: float) -> None:
        if factor != 1.0:
            for parameter in self._trained():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
