"""Observers: they read passes without changing them, those of training steps or of evaluations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from trainc.runtime.step.action import Action, Phase, failures_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Signals, Step

Passes = Literal["training", "evaluation"]
"""Whose passes are read."""


class Seen(Protocol):
    """What an observer sees of one micro-batch; the tensors carry no gradient, and must not be changed."""

    @property
    def logits(self) -> Tensor:
        """The logits (views * B, ...) of every view, view after view."""
        ...

    @property
    def targets(self) -> Tensor:
        """The targets (B, ...)."""
        ...

    @property
    def inputs(self) -> Any:
        """The inputs of the batch."""
        ...

    @property
    def views(self) -> int:
        """How often every example was passed."""
        ...

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Every parameter by name."""
        ...

    @property
    def captured(self) -> Mapping[str, Sequence[Tensor]]:
        """What captured modules gave, one tensor of all views a call."""
        ...

    def captured_of(self, companion: Any) -> Mapping[str, Sequence[Tensor]]:
        """Return what captured modules of a companion gave, where a term of the clause reads it, one tensor a call."""
        ...

    @property
    def counted(self) -> Tensor:
        """Which targets the loss counts, bool, of the targets' shape."""
        ...

    @property
    def sample_ids(self) -> Tensor:
        """Which sample of the training data each example is, int64 (B,), where the observer's class asks for it."""
        ...

    def view(self, index: int) -> Tensor:
        """Return the logits of one view, (B, ...)."""
        ...

    def logits_of_module(self, module: nn.Module) -> Tensor:
        """Return the logits (B, ...) that a module like the model gives of the inputs."""
        ...


def require_classes(reader: str, forward: Seen, *, indices: bool) -> None:
    """Raise ValueError unless every target has logits of classes, along their last axis.

    With `indices` the targets must be class indices; else probabilities of classes will do.
    """
    if not forward.logits.numel() and forward.logits.dim() == 1:
        from trainc.runtime.data.batch import no_logits

        raise no_logits(reader)
    rows, *others = forward.logits.shape
    wanted = (rows // forward.views, *others[:-1])
    if indices and forward.targets.is_floating_point() and forward.targets.dim() > len(wanted):
        raise ValueError(
            f"`{reader}` needs class indices, and the targets of this batch are probabilities of classes"
            f" {list(forward.targets.shape)}, as a clause that mixes examples makes them: read evaluations, or let one"
            " of the two clauses begin when the other has ended. If the data gives them, remove the clause"
        )
    found = forward.targets if indices else forward.counted
    if tuple(found.shape) != wanted:
        raise ValueError(
            f"`{reader}` reads the logits {[wanted[0], *others]} as those of classes along the last axis, and needs one"
            f" target for each of the others, {list(wanted)}, but the targets are {list(forward.targets.shape)}: give"
            " class indices of this shape"
        )
    if indices and (odd := _no_class(forward.targets[forward.counted], others[-1])) is not None:
        raise ValueError(
            f"`{reader}` reads the class {odd} of a target that counts, and the logits have {others[-1]} classes, from"
            " 0: give the model a logit for every class, or write a `loss` in the spec whose `ignore_index` marks the"
            " targets that are to be left out"
        )


def _no_class(targets: Tensor, classes: int) -> int | None:
    """Return a target that is no class, if there is one; reads the device."""
    if not targets.numel():
        return None
    low, high = (int(one) for one in targets.aminmax())
    return low if low < 0 else high if high >= classes else None


class Observer(Action):
    """Sees the micro-batches of a step, or the batches of an evaluation, and measures something of all of them."""

    phase = Phase.OBSERVE
    of: Passes = "training"
    of_classes: ClassVar[bool] = False
    """Whether it reads logits as those of classes: with a loss of other targets its clause is an error."""
    sample_ids: ClassVar[bool] = False
    """Whether it reads which samples the examples are: a step without sample ids is then an error."""

    def read(self, forward: Seen) -> None:
        """Let it see one micro-batch; raises ClauseFailed where it reads classes and the logits have none."""
        with failures_of(self.name):
            if self.of_classes:
                require_classes(self.name, forward, indices=True)
            self.see(forward)

    @abstractmethod
    def see(self, forward: Seen) -> None:
        """Take in one micro-batch: put new tensors in place of those that it holds, or in its lists and dicts."""

    @abstractmethod
    def found(self, replicas: ReplicaGroup | None = None) -> Mapping[str, float]:
        """Return what was measured since `forget`, by signal, over all replicas; empty where nothing was seen.

        The main signal, which is called as the clause, has the empty name.
        """

    @abstractmethod
    def forget(self) -> None:
        """Forget what was seen: a new step or evaluation begins."""

    def is_due(self, step: Step) -> bool:
        """Return whether it reads this step."""
        return self.of == "training" and super().is_due(step)

    def run(self, step: Step) -> None:
        """Record what was measured in the step."""
        named = self.named(step.replicas)
        step.metrics.update(named)
        step.signals.update(named)

    def named(self, replicas: ReplicaGroup | None = None) -> dict[str, float]:
        """Return what was measured by full names, and forget what was seen."""
        with failures_of(self.name):
            found = self.found(replicas)
        self.forget()
        return {f"{self.name}.{signal}".rstrip("."): value for signal, value in found.items()}


class EvaluationObservers:
    """Lets observers whose clause is open see the batches of evaluations, each of which lasts until the next step."""

    def __init__(self, observers: Sequence[Observer], clock: Clock) -> None:
        self._observers, self._clock, self._at = observers, clock, -1

    @property
    def names(self) -> tuple[str, ...]:
        """The labels of their clauses."""
        return tuple(observer.name for observer in self._observers)

    def __bool__(self) -> bool:
        return bool(self._observers)

    def see(self, forward: Seen) -> None:
        """Show a batch to the observers; what they saw before the last step is forgotten."""
        if self._at != self._clock.steps:
            self._at = self._clock.steps
            for observer in self._observers:
                observer.forget()
        for observer in self._observers:
            if observer.gate is None or observer.gate.fires(self._clock):
                observer.read(forward)

    def kept(self) -> Callable[[], None]:
        """Return what lets the observers forget all that they see from now on: passes may be repeated."""
        at = self._at
        held = [(one, {n: _copied(v) for n, v in vars(one).items()}) for one in self._observers]

        def restore() -> None:
            self._at = at
            for observer, values in held:
                vars(observer).update({n: _copied(v) for n, v in values.items()})

        return restore

    def finish(self, signals: Signals) -> dict[str, float]:
        """Return what was measured since the evaluation began, and set the signals; the next one begins anew."""
        found: dict[str, float] = {}
        if self._at == self._clock.steps:
            for observer in self._observers:
                found |= observer.named()
        self._at = -1
        signals.update(found)
        return found


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict | set) else value
