"""One training step as one flat graph: loss, gradients and probes over the user's parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from trainc.compiler.graph.interface import (
    BatchMismatch,
    Interface,
    Outputs,
    Port,
    flatten_inputs,
)
from trainc.compiler.graph.named_tensors import register_model, register_tensor
from trainc.compiler.graph.pass_report import PassReport
from trainc.runtime.data.batch import Batch


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
        register_model(self, model)
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
        """Whether there is a graph to run."""
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
            raise RuntimeError(
                "this step graph belongs to no program: call `run(batch, scalars)` instead"
            )
        return self.on_call(*args, **kwargs)

    def accepts(self, batch: Batch) -> bool:
        """Say whether `run` can take this batch."""
        return not self._misfits(batch)

    def run(self, batch: Batch, scalars: Mapping[str, Tensor]) -> Outputs:
        """Execute the step on a batch; buffers such as running means are updated in place."""
        interface = self.interface
        if interface is None:
            raise RuntimeError(
                "this step graph has no graph yet: it is captured at the first batch"
            )
        misfits = self._misfits(batch)
        if misfits:
            raise BatchMismatch("the graph was captured for other batches: " + "; ".join(misfits))
        values = [tensor for _, tensor in flatten_inputs(batch[0])[1]] + [batch[1]]
        try:
            numbers = [scalars[name] for name, _ in interface.scalars]
        except KeyError as missing:
            raise KeyError(
                f"the step graph needs the scalar {missing}, which was not given"
            ) from None
        with torch.no_grad(), _without_autocast(interface.ports):
            flat = self.forward(*(value.contiguous() for value in values), *numbers)
        return self._outputs(interface.outputs, flat)

    def _outputs(self, names: tuple[str, ...], flat: Sequence[Tensor | None]) -> Outputs:
        found = dict(zip(names, flat, strict=True))
        grads = {n[5:]: v for n, v in found.items() if n.startswith("grad:")}
        probes = {n[6:]: v for n, v in found.items() if n.startswith("probe:") and v is not None}
        loss, total, data_loss = found["loss"], found["total"], found["data_loss"]
        assert loss is not None
        assert total is not None
        assert data_loss is not None
        return Outputs(loss, total, data_loss, found.get("consistency"), grads, probes)

    def _misfits(self, batch: Batch) -> list[str]:
        interface = self.interface
        if interface is None:
            return ["there is no graph yet"]
        structure, entries = flatten_inputs(batch[0])
        keys = [port.key for port in interface.inputs]
        if structure != interface.structure or [key for key, _ in entries] != keys:
            return [f"expected a {interface.structure} of {len(keys)} inputs {keys}"]
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
        raise TypeError("a step graph cannot be pickled: save it as JSON with `step_to_json`")


@contextlib.contextmanager
def _without_autocast(ports: Sequence[Port]) -> Iterator[None]:
    """Leave autocast while the graph runs: its casts are nodes of the graph already."""
    with contextlib.ExitStack() as stack:
        for device in {port.device.split(":")[0] for port in ports}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
