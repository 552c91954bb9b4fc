"""One training step as one flat graph: loss, gradients and probes over the user's parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from trainc.compiler.graph.forward_graph import register_tensor
from trainc.compiler.graph.serialize import dtype_name

if TYPE_CHECKING:
    from trainc.compiler.passes.pass_base import PassReport

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Batch = tuple[Inputs, Tensor]
Kind = Literal["tensor", "tuple", "dict"]
FORMAT = 1


class BatchMismatch(ValueError):
    """The batch is not of the shape, dtype or device the graph was captured for."""


@dataclass(frozen=True, slots=True)
class Port:
    """A batch input: its placeholder, its key in the inputs, and what it must look like."""

    name: str
    key: str | int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, name: str, key: str | int | None, tensor: Tensor) -> Port:
        """Describe a tensor as a port."""
        return cls(name, key, tuple(tensor.shape), tensor.dtype, str(tensor.device))

    def takes(self, tensor: Tensor) -> bool:
        """Say whether a tensor fits."""
        return (
            tensor.shape == self.shape
            and tensor.dtype == self.dtype
            and str(tensor.device) == self.device
        )

    def __str__(self) -> str:
        label = self.name if self.key is None else f"inputs[{self.key!r}]"
        return f"{label} {dtype_name(self.dtype)}{list(self.shape)} on {self.device}"


@dataclass(frozen=True, slots=True)
class Interface:
    """What goes in and out of a step graph; `scalars` pairs a scalar's name with its placeholder.

    Outputs are `total`, `loss`, `task`, `consistency`, `grad:<parameter>` and `probe:<module>`.
    """

    kind: Kind
    inputs: tuple[Port, ...]
    targets: Port
    scalars: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    views: int = 1

    @property
    def ports(self) -> tuple[Port, ...]:
        """Return the batch ports in placeholder order."""
        return (*self.inputs, self.targets)


@dataclass(slots=True)
class Outputs:
    """What one step gives.

    `loss` is the micro-batch's mean (task plus weighted consistency), `total` what was
    differentiated: the loss and the penalties times the share. `grads` holds None for a trainable
    parameter that the loss does not depend on.
    """

    loss: Tensor
    total: Tensor
    task: Tensor
    consistency: Tensor | None
    grads: dict[str, Tensor | None]
    probes: dict[str, Tensor]


def flatten_inputs(inputs: Inputs) -> tuple[Kind, list[tuple[str | int | None, Tensor]]]:
    """Return the form of the model's inputs and its tensors with their keys."""
    if isinstance(inputs, Tensor):
        return "tensor", [(None, inputs)]
    if isinstance(inputs, Mapping):
        return "dict", list(inputs.items())
    if isinstance(inputs, Sequence):
        return "tuple", list(enumerate(inputs))
    raise TypeError(
        f"inputs are a tensor, a tuple or a dict of tensors, not {type(inputs).__name__}"
    )


class StepGraph(fx.GraphModule):
    """A training step as a `torch.fx.GraphModule` over the user's own parameters and buffers.

    It may exist before its graph does: `install` fills it. Calling it goes to `on_call`, which its
    owner sets.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph | None = None,
        interface: Interface | None = None,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        if graph is None:
            graph = fx.Graph()
            graph.output(None)
        holder = nn.Module()
        super().__init__(holder, fx.Graph(), "StepGraph")
        self.on_call: Callable[..., Any] | None = None
        self.interface = interface
        self.reports: tuple[PassReport, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.seconds = 0.0
        self.constants: tuple[str, ...] = ()
        self.training = model.training
        plant_model(self, model)
        self._set(graph, constants or {})

    def _set(self, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        for name in self.constants:
            del self._buffers[name]
        for name, tensor in constants.items():
            register_tensor(self, name, tensor, persistent=False)
        self.constants = tuple(constants)
        self.graph = graph

    @property
    def installed(self) -> bool:
        """Say whether there is a graph to run."""
        return self.interface is not None

    def install(self, other: StepGraph) -> None:
        """Take the graph of another step over the same parameters."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(other.graph, {}))
        buffers = dict(other.named_buffers(remove_duplicate=False))
        self._set(graph, {name: buffers[name] for name in other.constants})
        self.interface, self.reports, self.notes = other.interface, other.reports, other.notes
        self.seconds = other.seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the owner's step; `run` executes the graph alone."""
        if self.on_call is None:
            raise RuntimeError("this step graph belongs to no program: use `run(batch, scalars)`")
        return self.on_call(*args, **kwargs)

    def accepts(self, batch: Batch) -> bool:
        """Say whether `run` can take this batch."""
        return not self._misfits(batch)

    def run(self, batch: Batch, scalars: Mapping[str, Tensor]) -> Outputs:
        """Execute the step on a batch; buffers such as running means are updated in place."""
        interface = self.interface
        if interface is None:
            raise RuntimeError(
                "no graph is installed yet: a step graph is captured at the first batch"
            )
        misfits = self._misfits(batch)
        if misfits:
            raise BatchMismatch("the graph was captured for another batch: " + "; ".join(misfits))
        values = [tensor for _, tensor in flatten_inputs(batch[0])[1]] + [batch[1]]
        try:
            numbers = [scalars[name] for name, _ in interface.scalars]
        except KeyError as missing:
            raise KeyError(f"the step needs the scalar {missing}") from None
        with torch.no_grad(), _without_autocast(interface.ports):
            flat = self.forward(*(value.contiguous() for value in values), *numbers)
        return self._outputs(interface.outputs, flat)

    def _outputs(self, names: tuple[str, ...], flat: Sequence[Tensor | None]) -> Outputs:
        found = dict(zip(names, flat, strict=True))
        grads = {n[5:]: v for n, v in found.items() if n.startswith("grad:")}
        probes = {n[6:]: v for n, v in found.items() if n.startswith("probe:") and v is not None}
        loss, total, task = found["loss"], found["total"], found["task"]
        assert loss is not None
        assert total is not None
        assert task is not None
        return Outputs(loss, total, task, found.get("consistency"), grads, probes)

    def _misfits(self, batch: Batch) -> list[str]:
        interface = self.interface
        if interface is None:
            return ["no graph is installed"]
        kind, entries = flatten_inputs(batch[0])
        keys = [port.key for port in interface.inputs]
        if kind != interface.kind or [key for key, _ in entries] != keys:
            return [f"expected a {interface.kind} of {len(keys)} inputs {keys}"]
        given = [*(tensor for _, tensor in entries), batch[1]]
        return [
            f"expected {port}, got {Port.of(port.name, port.key, tensor)}"
            for port, tensor in zip(interface.ports, given, strict=True)
            if not port.takes(tensor)
        ]

    def constant_tensors(self) -> dict[str, Tensor]:
        """Return the graph's own tensors: what a saved program stores besides the graph."""
        return {name: self.get_buffer(name) for name in self.constants}

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraph:
        new = StepGraph.__new__(StepGraph)
        memo[id(self)] = new
        fx.GraphModule.__init__(new, nn.Module(), fx.Graph(), "StepGraph")
        for name in ("interface", "reports", "notes", "seconds", "constants", "training"):
            setattr(new, name, getattr(self, name))
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            new.__dict__[table] = copy.deepcopy(self.__dict__[table], memo)
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        new.graph = graph
        new.on_call = copy.deepcopy(self.on_call, memo)
        return new

    def __reduce__(self) -> Any:
        raise TypeError("a step graph is saved as data (`to_json`), never pickled")

    def to_json(self) -> dict[str, Any]:
        """Return the graph and its interface as JSON data, without tensors."""
        from trainc.compiler.graph.serialize import step_to_json

        return step_to_json(self)

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        model: nn.Module,
        constants: Mapping[str, Tensor] | None = None,
    ) -> StepGraph:
        """Rebuild a step on a model with the same parameter names; no code from the data is run."""
        from trainc.compiler.graph.serialize import step_from_json

        return step_from_json(data, model, constants or {})


def plant_model(root: nn.Module, model: nn.Module) -> None:
    """Register every parameter and buffer of a model, tied ones under each of their names."""
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                register_tensor(root, dot + name, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                register_tensor(
                    root,
                    dot + name,
                    buffer,
                    persistent=name not in module._non_persistent_buffers_set,
                )


@contextlib.contextmanager
def _without_autocast(ports: Sequence[Port]) -> Iterator[None]:
    """Leave autocast while the graph runs: its casts are nodes of the graph already."""
    with contextlib.ExitStack() as stack:
        for kind in {port.device.split(":")[0] for port in ports}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
