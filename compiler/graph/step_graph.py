"""One training step as one flat graph: loss, gradients and probes over the user's parameters."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from trainc.compiler.graph.interface import BatchMismatch, Interface, Outputs, describe_batch
from trainc.compiler.graph.named_tensors import register_model, register_tensor
from trainc.compiler.method.losses import LOSS
from trainc.compiler.method.term import TERM, captured_outputs
from trainc.runtime.data.batch import Batch

Take = Mapping[str, Callable[[Tensor], object]]
"""By parameter, what gets its gradient as soon as it is computed."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did: the sites it served and did not, node counts, seconds, and a unified diff of the listing."""

    name: str
    purpose: str
    ran: bool
    sites: tuple[str, ...] = ()
    unserved: tuple[str, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    diff: str = field(default="", repr=False)


class StepGraph(fx.GraphModule):
    """A training step as a `torch.fx.GraphModule` over the user's own parameters and buffers.

    It may exist before its graph does: `install` fills it. Calling it goes to `on_call`, which its
    owner sets. The Python function of the graph is written when it is first needed.
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
        super().__init__(nn.Module(), fx.Graph(), "StepGraph")
        self.on_call: Callable[..., Any] | None = None
        self.interface = interface
        self.reports: tuple[PassReport, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.seconds = 0.0
        self.front_end = ""
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
        self._handed: dict[Any, Callable[..., Any]] = {}

    def recompile(self) -> Any:
        """Let the function of the graph be written anew at its next use: of most graphs it is never used."""
        if "forward" in vars(type(self)):  # the class is this module's own
            del type(self).forward

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The function of the graph."""
        super().recompile()  # puts the function in the place of this property
        return self.forward

    @property
    def code(self) -> str:
        """The text of the graph's function."""
        if "forward" not in vars(type(self)):
            super().recompile()
        return super().code

    @property
    def installed(self) -> bool:
        """Whether a graph is installed."""
        return self.interface is not None

    @property
    def is_open(self) -> bool:
        """Whether the graph takes batches of several sizes."""
        return self.interface is not None and self.interface.is_open

    def install(self, other: StepGraph) -> None:
        """Use the graph of another step over the same parameters."""
        self._set(copy.deepcopy(other.graph), other.constant_tensors())
        self.interface, self.reports, self.notes = other.interface, other.reports, other.notes
        self.seconds = other.seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a step of the program that owns the graph; `run` executes only the graph."""
        if self.on_call is None:
            raise RuntimeError(
                "this step graph does not belong to a program: call `run(batch, scalars)` instead"
            )
        return self.on_call(*args, **kwargs)

    def accepts(self, batch: Batch, terms: Sequence[str] | None = None) -> bool:
        """Say whether `run` can take this batch, and the terms of the loss are `terms` if given."""
        if terms is not None and (self.interface is None or self.interface.terms != tuple(terms)):
            return False
        return not self._misfits(batch)

    def run(
        self,
        batch: Batch,
        scalars: Mapping[str, Tensor],
        forward: Callable[..., Any] | None = None,
        take: Take | None = None,
    ) -> Outputs:
        """Execute the step on a batch; buffers such as running means are updated in place.

        `forward` is what the graph's own function was compiled to. The gradients in `take` are handed over where
        they are computed: the graph keeps none of them, and the outputs have none.
        """
        interface = self.interface
        if interface is None:
            raise RuntimeError(
                "this step graph has no graph yet: it is captured at the first batch"
            )
        misfits = self._misfits(batch)
        if misfits:
            raise BatchMismatch("the graph was captured for other batches: " + "; ".join(misfits))
        _, _, values = describe_batch(batch)
        try:
            numbers = [scalars[name] for name, _ in interface.scalars]
        except KeyError as missing:
            raise KeyError(
                f"the step graph needs the scalar {missing}, which was not given"
            ) from None
        # Autocast's casts are nodes of the graph already.
        with torch.no_grad(), no_autocast(value.device.type for value in values):
            run = forward or (self._handing_over(take) if take else self.forward)
            flat = run(*(value.contiguous() for value in values), *numbers)
        found = dict(zip(interface.outputs, flat, strict=True))
        grads = {n[5:]: v for n, v in found.items() if n.startswith("grad:")}
        probes = {n[6:]: v for n, v in found.items() if n.startswith("probe:") and v is not None}
        loss, total, data_loss = found["loss"], found["total"], found["data_loss"]
        terms = {label: found[TERM + label] for label in interface.terms}
        kept = captured_outputs(found)
        losses = {n.removeprefix(LOSS): v for n, v in found.items() if n.startswith(LOSS)}
        return Outputs(
            loss, total, data_loss, terms, losses, found.get("logits"), kept, grads, probes
        )

    def _handing_over(self, take: Take) -> Callable[..., Any]:
        """Return the graph's function for a `take`, which is written once."""
        key = tuple(take.items())
        if key not in self._handed:
            self._handed = {key: handing_over(self, take)}
        return self._handed[key]

    def _misfits(self, batch: Batch) -> list[str]:
        return (
            ["there is no graph yet"] if self.interface is None else self.interface.misfits(batch)
        )

    def constant_tensors(self) -> dict[str, Tensor]:
        """Return the graph's own tensors: what a saved program stores besides the graph."""
        return {name: self.get_buffer(name) for name in self.constants}

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraph:
        new = StepGraph.__new__(StepGraph)
        memo[id(self)] = new
        fx.GraphModule.__init__(new, nn.Module(), fx.Graph(), "StepGraph")
        for name in (
            "interface", "reports", "notes", "warnings", "seconds", "front_end", "constants",
            "training",
        ):  # fmt: skip
            setattr(new, name, getattr(self, name))
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            new.__dict__[table] = copy.deepcopy(self.__dict__[table], memo)
        new.graph, new._handed = copy.deepcopy(self.graph), {}
        new.on_call = copy.deepcopy(self.on_call, memo)
        return new

    def __reduce__(self) -> Any:
        raise TypeError("a step graph cannot be pickled: save it as JSON with `step_to_json`")


def handing_over(step: StepGraph, take: Take) -> Callable[..., Any]:
    """Return the function of a graph that hands gradients over where they are computed, and then frees them."""
    assert step.interface is not None
    graph = copy.deepcopy(step.graph)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    for at, name in enumerate(step.interface.outputs):
        node = results[at]
        if name.startswith("grad:") and name[5:] in take and isinstance(node, fx.Node):
            with graph.inserting_after(node):
                graph.call_function(take[name[5:]], (node,))
            results[at] = None
    output.args = (tuple(results),)
    return fx.GraphModule(step, graph).forward


@contextlib.contextmanager
def no_autocast(devices: Iterable[str]) -> Iterator[None]:
    """Leave autocast on these types of device inside this block."""
    with contextlib.ExitStack() as stack:
        for device in set(devices):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
