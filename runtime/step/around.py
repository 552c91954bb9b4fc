"""What surrounds the passes of a step: entered before the first forward pass, left on every way out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, overload

from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainc.runtime.data.batch import Batch
    from trainc.runtime.step.record import Step


class Gradients(Protocol):
    """The gradients of a step before its own passes; each call runs all micro-batches once more."""

    @property
    def inputs(self) -> list[Any]:
        """Return the inputs of each micro-batch, as copies that may be changed in place for the step's own passes."""

    @overload
    def __call__(self, of: Literal["parameters"] = "parameters") -> dict[str, Tensor]: ...

    @overload
    def __call__(self, of: Literal["inputs"]) -> list[Any]: ...

    def __call__(self, of: Literal["parameters", "inputs"] = "parameters") -> Any:
        """Return the gradients of the step's loss at the weights and inputs of now.

        They are by parameter; those of inputs are a list of one tree for each micro-batch, with the tensors of the
        inputs replaced by their gradients, zeros where they have no effect, and None for tensors that are not of
        floating point. Raises ValueError where none of the inputs is.
        """

    def of_tensors(self, begin: Callable[[int], Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return the gradients by other tensors, by name, of each micro-batch.

        Before the passes of one, `begin` is called with the number of its first example in the step. It returns a
        mapping that has the tensors after the forward pass, in which they may be made.
        """

    def of_changed(self, change: Callable[[Sequence[Batch]], Sequence[Batch]]) -> dict[str, Tensor]:
        """Return the gradients by parameter of micro-batches as `change` makes them from copies of the step's own.

        It returns as many, with the same examples; the step's own passes run those of the step.
        """

    def watch(self, *, averaged: bool = False) -> Callable[[], dict[str, Tensor]]:
        """Return a function that gives, after the step's own passes, the gradients that these found, by parameter.

        They are this process's own, whose mean over replicas the step has; `averaged`: they are that mean. Raises
        ValueError for own ones of parameters that are sharded over processes, which no process has.
        """

    def draw(self, name: str, device: torch.device, *, own: bool = True) -> torch.Generator:
        """Return a stream of random numbers for an action of this name in this step; `own`: of this replica alone."""


class Around(Action):
    """An action in two halves: `surround` is entered before the passes of a step, and left after the last of them.

    It is left on every way out: before the update, before a step is skipped, and where a pass raises an error or is
    interrupted.
    """

    phase = Phase.PERTURB
    takes_shards: ClassVar[bool] = False
    """Whether it can move parameters that are sharded over processes (FSDP2), and their gradients, as DTensors."""

    @abstractmethod
    def surround(self, step: Step, gradients: Gradients) -> AbstractContextManager[object]:
        """Return the context manager to run the step's passes in."""

    def run(self, step: Step) -> None:
        """Raise TypeError: the step machine enters `surround` instead."""
        raise TypeError(f"`{self.name}` surrounds the passes of a step: it is entered, not run")


class KeptWeights:
    """A context manager that gives tensors their values back, bit for bit, from copies made on entering."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._copies: list[Tensor] = []

    def __enter__(self) -> None:
        self._copies = [tensor.clone() for tensor in self._tensors]

    def __exit__(self, *_: object) -> None:
        try:
            self._restore()
        except BaseException:  # interrupted half-way, as by Ctrl-C
            self._restore()
            raise
        self._copies = []

    def _restore(self) -> None:
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
