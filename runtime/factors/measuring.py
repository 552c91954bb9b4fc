"""The figures of a policy's weights: measured when they are due, where they have changed, by one of the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from trainc.runtime.factors.beside import copied, in_thread
from trainc.runtime.factors.refresh import Figures, Refresh, cost, owners, shared
from trainc.runtime.factors.unmoved import COPY, ROOM, Unmoved
from trainc.runtime.storage.form import Anything, Count, Form, Number

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.runtime.step.record import Step

Read = Callable[[Sequence[str]], dict[str, Any]]
"""Returns what is measured of parts, by name: their matrices (count, out, in), or what the policy takes for those."""


class Measures(Protocol):
    """What measures weights, or parts of them, given as matrices (count, out, in) by name."""

    def measure(self, matrices: Mapping[str, Any]) -> dict[str, float]:
        """Return the figure of each, NaN where it means nothing."""
        ...

    def measure_with_room(self, matrices: Mapping[str, Tensor]) -> dict[str, Figures]:
        """Return the figure of each, and the Frobenius norm of a change that moves it by little enough."""
        ...


@dataclass(slots=True)
class Begun:
    """What is measured in the step after `steps`: the parts `due`, each by the process of its rank in `ranks`.

    `result` gives the figures of those that this process measures, and `kept` are the matrices that it holds.
    """

    steps: int
    due: Sequence[str]
    ranks: Mapping[str, int]
    kept: Mapping[str, Any]
    result: Callable[[], dict[str, Figures]]


@dataclass(eq=False)
class Measuring:
    """When and which weights are measured; with `unmoved`, not those that it knows to have the figure that they had.

    A measurement has a beginning and an end, in one step. With `beside` a thread works between the two, on copies. What
    fails there is raised in the step after.
    """

    refresh: Refresh = field(default_factory=Refresh)
    unmoved: Unmoved | None = None
    beside: bool = False
    failed: Exception | None = field(default=None, init=False)
    _begun: Begun | None = field(default=None, init=False)

    def begin(
        self, step: Step, shapes: Mapping[str, Sequence[int]], read: Read, policy: Measures
    ) -> None:
        """Begin to measure those of the named parts of weights, of these shapes, that are due in this step.

        `read` gives their matrices.
        """
        peers = step.equals()
        costs = {name: cost(shape) for name, shape in shapes.items()}
        names = [*shapes]
        due = [names[i] for i in self.refresh.begin([*costs.values()])]
        kept: dict[str, Any] = {}
        if self.unmoved is not None:
            kept = read(due)
            moved = self.unmoved.moved(kept, peers)
            due = [name for name in due if name in moved]
            kept = {name: kept[name] for name in due}
        ranks = owners({name: costs[name] for name in due}, peers)
        here = 0 if peers is None else peers.rank
        if self.unmoved is None:
            # One weight after the other: where it is sharded all gather or sum it, and its owner keeps it.
            for _, parts in groupby(due, lambda name: name.partition("[")[0]):
                some = read([*parts])
                kept |= {name: some[name] for name in some if ranks[name] == here}
        if self.beside:
            kept = copied(kept)
        own = {name: kept[name] for name in due if ranks[name] == here}
        measure = partial(self._measured, policy)
        result = in_thread(measure, own) if self.beside else partial(measure, own)
        self._begun = Begun(step.clock.steps, due, ranks, kept, result)

    def has_begun(self, step: Step) -> bool:
        """Say whether a measurement began in this step and has not ended."""
        return self._begun is not None and self._begun.steps == step.clock.steps

    def end(self, step: Step) -> dict[str, float] | None:
        """Return the figures of what was measured since `begin`; None where a thread failed, as `failed` then says."""
        begun, self._begun = self._begun, None
        assert begun is not None
        peers, own = step.equals(), dict[str, Figures]()
        try:
            own = begun.result()
        except Exception as error:
            if not self.beside:
                raise
            self.failed = error
        if self.failed is not None and peers is None:
            return None
        found = shared(begun.due, begun.ranks, own, peers)
        if self.failed is not None:
            return None
        if self.unmoved is not None:
            for name, (_, room) in found.items():
                self.unmoved.measured(name, begun.kept[name], room)
        if (chosen := self.refresh.end(step, peers)) is not None:
            step.notes.append(chosen)
        return {name: figure for name, (figure, _) in found.items()}

    def raise_failure(self) -> None:
        """Raise what failed in the thread of the step before, once."""
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed

    def _measured(self, policy: Measures, matrices: Mapping[str, Any]) -> dict[str, Figures]:
        if not matrices:
            return {}
        if self.unmoved is not None:
            return policy.measure_with_room(matrices)
        return {name: (figure, 0.0) for name, figure in policy.measure(matrices).items()}

    def memory(self) -> int:
        """Return the bytes that it holds."""
        return 0 if self.unmoved is None else self.unmoved.memory()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        found: dict[str, Any] = dict(self.refresh.state_dict())
        return found | ({} if self.unmoved is None else self.unmoved.state_dict())

    def form(self, names: Sequence[str]) -> tuple[dict[str, Form], dict[str, Form]]:
        """Return what a state of it has, and what it may have, for parts of these names."""
        optional: dict[str, Form] = {}
        for name in names if self.unmoved is not None else ():
            optional |= {f"{ROOM}{name}": Number(0), f"{COPY}{name}": Anything()}
        return dict.fromkeys(self.refresh.names, Count(0)), optional

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self._begun = self.failed = None
        self.refresh.load_state_dict(state)
        if self.unmoved is not None:
            self.unmoved.load_state_dict(state)
