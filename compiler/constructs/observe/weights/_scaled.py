"""Base of the observers that compare a pass with one whose weights are all multiplied by a number."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from trainc.compiler.errors import FieldError
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.observer import Observer, Seen
from trainc.runtime.storage.form import Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.lower.lowering import Lowering
    from trainc.dsl.values.selectors import Selector
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.record import Step

OUTPUT = "output"
"""The name of the logits among what is compared."""
ROWS = 4096
"""How many rows are compared at a time, in double precision."""


def layers_to_compare(to: Lowering, layers: Selector | None) -> tuple[str, ...]:
    """Return the modules that a field selects; raises FieldError for what is never called, or over the batch."""
    mixing = _mixes_examples(to.model)
    if mixing is not None:
        raise ValueError(
            f"`{mixing}` keeps no running statistics, so it normalizes over the batch in eval mode too, and what is"
            " compared would depend on how examples are put together: build it with `track_running_stats=True`"
        )
    found = () if layers is None else to.select(layers, "modules")
    for name in found:
        module = to.model.get_submodule(name)
        if type(module).forward is _no_forward():
            raise FieldError(
                "layers",
                f"`{name}` ({type(module).__name__}) holds modules and is never called, so it gives nothing: select"
                f' the modules in it, as in `"{name}.*"`',
            )
        if to.inventory.module[name].is_never_called:
            raise FieldError(
                "layers",
                f"`{name}` is never called: nn.MultiheadAttention uses its weight. Select the attention",
            )
    return found


def _mixes_examples(model: nn.Module) -> str | None:
    """Return a BatchNorm that has no running statistics."""
    from trainc.compiler.model.batch_statistics import batch_norms

    norms = batch_norms(model).items()
    return next((name for name, one in norms if one.running_mean is None), None)


def _no_forward() -> Any:
    from torch import nn

    return nn.Module.forward


class Multiplying(Protocol):
    """A construct that multiplies all parameters by `c`, and compares the outputs of `layers` besides the logits."""

    c: float
    layers: Selector | None


C = TypeVar("C", bound=Multiplying)


class Scaled(Observer, Generic[C]):
    """Phase 12: passes each micro-batch twice more, once with weights times `factor`, and adds up what it compares."""

    measured: str
    """What is measured, in words of the summary."""

    @classmethod
    def reading(cls, to: Lowering, construct: C) -> Self:
        """Return one that reads steps with a copy of the model that has the model's own weights."""
        layers = layers_to_compare(to, construct.layers)
        size = sum(entry.bytes for entry in to.inventory.parameters)
        return cls(construct, to.companion("twin", since="call", parameters=()), layers, size)

    def __init__(
        self, construct: C, twin: Companion, layers: Sequence[str], parameter_bytes: int
    ) -> None:
        self.construct, self.factor = construct, construct.c
        self.twin, self.layers = twin, tuple(layers)
        self.parameter_bytes = parameter_bytes
        self.parts = [OUTPUT, *layers]
        """What is compared: the output, the layers, and perhaps more that passes show."""
        self.sums: dict[int, Tensor] = {}
        """By the place of a part, sums that add up over micro-batches and replicas."""
        self.by_part: dict[str, dict[str, float]] = {}
        """What was found last, by quantity and layer."""
        self.overflowed = False
        self.first = self.last = math.nan

    def memory(self) -> int:
        """Return the bytes of the multiplied weights."""
        return self.parameter_bytes

    def see(self, forward: Seen) -> None:
        from trainc.compiler.model.undisturbed import keep_state
        from trainc.runtime.companion.other_parameters import other_parameters

        if not self.sums:
            self.twin.copy()  # of buffers; the parameters are the model's own
        module = self.twin.module
        with keep_state(module):
            plain = self._outputs(forward, module, nullcontext())
            with other_parameters(module, self._times):
                scaled = self._outputs(forward, module, self.watching(forward, module))
        for place, (ones, others) in enumerate(zip(plain, scaled, strict=True)):
            for one, other in zip(ones, others, strict=True):
                rows = zip(_rows(one, forward.counted), _rows(other, forward.counted), strict=True)
                for a, b in rows:
                    self.add(place, self.compare(a, b))

    def _times(self, parameter: Tensor) -> Tensor:
        real = parameter.is_floating_point() or parameter.is_complex()
        return parameter * self.factor if real else parameter.clone()

    def watching(self, forward: Seen, module: nn.Module) -> AbstractContextManager[Any]:
        """Return what surrounds the pass with multiplied weights."""
        return nullcontext()

    def add(self, place: int, sums: Tensor) -> None:
        """Add sums (n,) to those of a part."""
        known = self.sums.get(place)
        self.sums[place] = sums if known is None else self.merge(known, sums)

    def merge(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the sums (n,) of two parts of the examples together."""
        return one + other

    @abstractmethod
    def compare(self, plain: Tensor, scaled: Tensor) -> Tensor:
        """Return sums of a comparison of two outputs (rows, features), float64 (n,)."""

    def _outputs(
        self, forward: Seen, module: nn.Module, around: AbstractContextManager[Any]
    ) -> list[list[Tensor]]:
        """Return the logits, and what each call of the layers gives."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with ExitStack() as hooks:
            for name in self.layers:
                keep = partial(_keep, found[name], name)
                hooks.callback(module.get_submodule(name).register_forward_hook(keep).remove)
            with around:
                logits = forward.logits_of_module(module)
        missing = next((name for name, calls in found.items() if not calls), None)
        if missing is not None:
            raise FieldError(
                "layers",
                f"`{missing}` is not called in a pass of the model, so it gives nothing to compare: remove it from"
                " `layers`",
            )
        return [[logits], *found.values()]

    def gathered(self, replicas: ReplicaGroup | None) -> dict[str, list[float]]:
        """Return the sums of all replicas by the name of the part."""
        import torch

        rows = [[float(place), *sums.tolist()] for place, sums in self.sums.items()]
        if replicas is not None:
            table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1 if rows else 0)
            rows = replicas.gather_examples(table).tolist()
        found: dict[int, Tensor] = {}
        for place, *numbers in rows:
            sums, known = torch.tensor(numbers, dtype=torch.float64), found.get(int(place))
            found[int(place)] = sums if known is None else self.merge(known, sums)
        return {self._name(place): found[place].tolist() for place in sorted(found)}

    def _name(self, place: int) -> str:
        """Return the name of a part; a process that saw no examples does not know all of them."""
        return self.parts[place] if place < len(self.parts) else f"part {place}"

    def run(self, step: Step) -> None:
        super().run(step)
        for quantity, values in self.by_part.items():
            if values:
                name = f"{self.name}.{quantity}" if quantity else self.name
                step.series[name] = dict(values)
        if self.overflowed:
            step.notes.append(
                f"{self.name}: with weights times {self.factor:g} some outputs are not finite numbers; they are left"
                " out. A smaller `c` avoids it"
            )
        elif self.name not in step.metrics:
            step.notes.append(
                f"{self.name}: nothing to compare, because all counted outputs of this step are zero"
            )

    def remember(self, value: float | None) -> None:
        """Keep what was measured first and last, for the summary."""
        if value is not None:
            self.first = value if math.isnan(self.first) else self.first
            self.last = value

    def forget(self) -> None:
        self.sums = {}

    def state_dict(self) -> ActionState:
        return {} if math.isnan(self.last) else {"first": self.first, "last": self.last}

    def state_form(self) -> Form:
        return Record({}, {"first": Number(), "last": Number()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self.last = (state.get(n, math.nan) for n in ("first", "last"))

    def summary(self) -> str | None:
        if math.isnan(self.last):
            return None
        return f"{self.name}: {self.measured} {self.first:.4g} -> {self.last:.4g}"


def _keep(found: list[Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    from torch import Tensor

    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise FieldError(
            "layers",
            f"`{name}` gives {type(first).__name__}, and only tensors of real numbers are compared: remove it from"
            " `layers`",
        )
    found.append(first.detach().clone())


def _rows(output: Tensor, counted: Tensor) -> Iterator[Tensor]:
    """Yield rows (n, features) of an output, in float64: one a counted token, or one an example, some at a time.

    Features are on the last axis where the axes before it are those of the targets, or there are three of them; any
    other output is one row an example. An example counts where one of its targets does.
    """
    shape = output.shape
    if shape[:-1] == counted.shape and output.dim() > 1:
        rows = output[counted]
    elif output.dim() and len(output) == len(counted):
        of_examples = output[counted.flatten(1).any(1) if counted.dim() > 1 else counted]
        rows = (
            of_examples.flatten(0, 1)
            if output.dim() == 3
            else of_examples.reshape(len(of_examples), -1)
        )
    else:  # the examples are not on the first axis: all rows
        rows = output.reshape(-1, shape[-1] if output.dim() else 1)
    for some in rows.split(ROWS):
        yield some.double()
