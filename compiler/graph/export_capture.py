"""The roads of capture: ways to get a flat forward graph with the user's tensors as attributes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from trainc.compiler.graph.dynamo_capture import dynamo_road
from trainc.compiler.graph.step_graph import Batch, Inputs
from trainc.runtime.data.batch import call, repeated

Task = Callable[[Tensor, Tensor], Tensor]
Road = Callable[["Wrapped", Batch], fx.GraphModule]
# The name under which a captured graph holds the user's model.
PREFIX = "user"


class Wrapped(nn.Module):
    """The model on every view of the inputs, and the task on the first view."""

    def __init__(self, model: nn.Module, task: Task, views: int) -> None:
        super().__init__()
        self.user = model
        self.task = task
        self.views = views
        self.training = model.training

    def forward(self, inputs: Inputs, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the task's loss on view one and the logits of every view."""
        logits = call(self.user, repeated(inputs, self.views))
        first = logits if self.views == 1 else logits[: logits.shape[0] // self.views]
        return self.task(first, targets), logits


def export_road(wrapped: Wrapped, batch: Batch) -> fx.GraphModule:
    """Capture with torch.export, non-strict: it keeps names and parameter objects."""
    with _quietly():
        return _unlifted(torch.export.export(wrapped, batch, strict=False))


def _unlifted(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return the module of an exported program; `check_guards` came with a later torch."""
    known = inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if "check_guards" in known else program.module()
    assert isinstance(module, fx.GraphModule)
    return module


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's notices about its own internals from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


ROADS: Mapping[str, Road] = {"torch.export": export_road, "torch.compile": dynamo_road}
