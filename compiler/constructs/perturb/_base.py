"""What perturbations of weights share: a step away from the weights, in which the passes of a step run."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import Field

from trainc.compiler.errors import SiteError
from trainc.dsl.reading.construct import Construct, Effect, Problem
from trainc.runtime.step.around import Around, Gradients, KeptWeights
from trainc.runtime.step.gradients import GradientTransform, ParameterGradient

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.mask.update_mask import TrainedEntries
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step

UNDO = Effect("undo", "give the weights their values back", ("params",), ("params",))


class WeightPerturbation(Construct):
    """Base of the constructs that run the passes of a step at other weights."""

    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report a selection in which all parameters are frozen; warn of weights in 16 bits."""
        trainable = [p for p in bound.parameters if p.trainable]
        if bound.parameters and not trainable:
            message = f"all {len(bound.parameters)} selected parameters are frozen"
            yield Problem("selector-matches-frozen", message, help="select among `trainable`")
        small = [p.name for p in trainable if p.dtype in ("bfloat16", "float16")]
        if small:
            more = f" and {len(small) - 1} more" if small[1:] else ""
            message = f"16 bits, in which `{small[0]}`{more} is stored, round most of so small a step away"
            help_ = "keep the weights in float32 and compute in 16 bits, under torch.autocast"
            yield Problem("no-effect", message, help=help_, severity="warning")


class RepeatedPasses(Construct):
    """Base of the constructs that run the passes of a step several times."""

    with_views: bool = Field(
        default=False,
        description="accept a clause that passes each example in several views: the passes of all views are repeated",
    )

    def opt_in(self) -> Mapping[str, tuple[str, str]]:
        """Say that several views of an example have to be accepted, since their passes are repeated."""
        if self.with_views:
            return {}
        together = (
            "make a step at least four passes long: several views of each example, each twice"
        )
        return {"views": (together, "with_views = true")}


class TwoPasses(RepeatedPasses, WeightPerturbation):
    """Base of those that move weights along a gradient of the same step, from passes before its own."""


def sizes_of(to: Lowering) -> dict[str, int]:
    """Return the bytes of the selected parameters that train, by name."""
    return {entry.name: entry.bytes for entry in to.parameters() if entry.trainable}


def refuse_without_momentum(to: Lowering) -> None:
    """Raise ValueError for a selected parameter whose optimizer keeps no running mean of gradients."""
    for name in sizes_of(to):
        if getattr(to.optimizer_of(name), "averages_gradients", None) is False:
            raise ValueError(
                f"the optimizer of `{name}` has no momentum, so there is nothing to move along: give it momentum"
                " (`momentum = 0.9`), or exclude the parameter from `on`"
            )


def running_means(
    clause: str, step: Step, names: Iterable[str], entries: TrainedEntries
) -> dict[str, Tensor] | None:
    """Return the optimizers' running means of gradients in the parameters' shapes; None before the first update.

    Raises SiteError where an optimizer has updated parameters and keeps none.
    """
    found, without = {}, None
    for name in names:
        mean = step.running_mean(name)
        if mean is not None:
            found[name] = entries.whole(name, mean)
        elif step.optimizer_state(name):
            without = name
    if without is not None and not found:
        raise SiteError(
            f"`{clause}` moves along the momentum of the optimizer, but that of `{without}` keeps none (no `exp_avg`"
            " or `momentum_buffer`): use SGD with momentum, Adam or Muon, or remove the clause",
            clause,
        )
    return found or None


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Return one L2 norm over tensors of any shape, of which processes may have shards."""
    from trainc.runtime.processes.sharded import squared_norms

    return math.sqrt(float(squared_norms([*tensors]).sum()))


class MovedWeights(Around):
    """Runs the passes of a step at moved weights; keeps nothing from step to step but counts for the summary."""

    takes_shards = True
    figures = ("moved", "not_finite", "low", "high")
    what: ClassVar = "the gradient"
    """What gives the direction, for messages."""

    def __init__(
        self, name: str, length: Callable[[Clock], float], sizes: Mapping[str, int]
    ) -> None:
        self.name, self.length, self.sizes = name, length, sizes
        self.moved = self.not_finite = 0
        self.low, self.high = math.inf, 0.0

    @abstractmethod
    def directions(self, step: Step, gradients: Gradients) -> Mapping[str, Tensor] | None:
        """Return the direction of each parameter, in its shape; None where there is none in this step."""

    def norm(self, weights: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
        """Return the norm of the directions, which is shown and must be finite."""
        return norm_of(found.values())

    @abstractmethod
    def moves(
        self, weights: Mapping[str, Tensor], found: Mapping[str, Tensor], length: float, norm: float
    ) -> dict[str, Tensor]:
        """Return what to add to each weight."""

    def is_wanted(self, step: Step, length: float) -> bool:
        """Return whether weights move in this step, in which the clause's gate is open."""
        return bool(length)

    def forget(self) -> None:
        """Forget what directions left: the weights do not move in this step."""

    @contextmanager
    def surround(self, step: Step, gradients: Gradients) -> Iterator[None]:
        """Hold the weights at other values."""
        length = self.length(step.clock)
        moves = self._moves(step, gradients, length) if self.is_wanted(step, length) else {}
        if not moves:
            self.forget()
        weights = [step.parameters[name].detach() for name in moves]
        with KeptWeights(weights):
            for weight, move in zip(weights, moves.values(), strict=True):
                weight.add_(move)
            moves.clear()  # the passes need the memory
            yield

    def _moves(self, step: Step, gradients: Gradients, length: float) -> dict[str, Tensor]:
        """Return the moves by parameter; none where the directions are not finite."""
        every = self.directions(step, gradients)
        if every is None:
            return {}
        found = {name: one for name, one in every.items() if name in self.sizes}
        if not found:
            step.notes.append(f"{self.name}: no selected parameter has a gradient, so none moved")
            return {}
        weights = {name: step.parameters[name].detach() for name in found}
        norm = self.norm(weights, found)
        if not math.isfinite(norm):
            self.not_finite += 1
            step.notes.append(f"{self.name}: {self.what} is not finite, so no weight moved")
            return {}
        self.low, self.high = min(self.low, norm), max(self.high, norm)
        self.moved += 1
        return self.moves(weights, found, length, norm)

    def memory(self) -> int:
        """Return the bytes of the copies of the weights."""
        return sum(self.sizes.values())

    def summary(self) -> str | None:
        """Say in how many steps weights moved, and the range of the norm of the directions."""
        if not self.moved and not self.not_finite:
            return f"{self.name}: no weight moved"
        seen = f", with |g| from {self.low:.3g} to {self.high:.3g}" if self.moved else ""
        left = f"; not in {self.not_finite} in which {self.what} was not finite"
        steps = f"{self.moved} step{'s' * (self.moved != 1)}"
        return f"{self.name}: moved the weights for the passes of {steps}{seen}{left if self.not_finite else ''}"


class Ascent(MovedWeights):
    """Moves the weights by `length` along the gradient of passes before the step's own."""

    def directions(self, step: Step, gradients: Gradients) -> Mapping[str, Tensor]:
        """Return the gradient at the weights of now."""
        return gradients()

    def moves(
        self, weights: Mapping[str, Tensor], found: Mapping[str, Tensor], length: float, norm: float
    ) -> dict[str, Tensor]:
        """Return `length` g / |g|."""
        return {name: g * (length / (norm + 1e-12)) for name, g in found.items()}


class KeptAscent(Ascent):
    """Moves the weights so, and keeps the gradients of all parameters for an action that changes those of the step.

    `first` is empty where the weights did not move.
    """

    def __init__(
        self, name: str, length: Callable[[Clock], float], sizes: Mapping[str, int]
    ) -> None:
        super().__init__(name, length, sizes)
        self.first: dict[str, Tensor] = {}

    def directions(self, step: Step, gradients: Gradients) -> Mapping[str, Tensor]:
        """Return the gradient at the weights of now, and keep it."""
        self.first = gradients()
        return self.first

    def forget(self) -> None:
        """Forget the gradients."""
        self.first = {}

    def memory(self) -> int:
        """Return the bytes of the copies of the weights and of the gradient."""
        return 2 * super().memory()


def trained_names(to: Lowering) -> list[str]:
    """Return the parameters that train, selected or not."""
    return [entry.name for entry in to.inventory.parameters if entry.trainable]


class KeepsFirst(Protocol):
    """What has the gradients of passes before the step's own, in the parameters' shapes; none where there were none."""

    first: dict[str, Tensor]

    def forget(self) -> None: ...


class Mix(GradientTransform):
    """Mixes the gradients of the step's own passes with those of passes before them."""

    takes_shards = True

    def __init__(self, name: str, alpha: float, kept: KeepsFirst, entries: TrainedEntries) -> None:
        self.name, self.alpha, self.kept, self.entries = name, alpha, kept, entries

    def change(self, gradients: Sequence[ParameterGradient], step: Step) -> None:
        """Make each gradient (1 - alpha) g(w) + alpha g; leave it where nothing moved."""
        first = self.kept.first
        for one in gradients if first else ():
            one.gradient.mul_(self.alpha)
            if one.name in first:
                clean = self.entries.picked(one.name, first[one.name])
                one.gradient.add_(clean.to(one.gradient.dtype), alpha=1 - self.alpha)
        self.kept.forget()
