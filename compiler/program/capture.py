"""Capture a model, a loss and one batch as a step graph, and run the graph passes on it.

The model is exported to ATen, rewritten by the passes, and only then differentiated: a fused
operator has its own backward, so no pass has to find and repair backward nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from trainc.compiler.errors import CompilerBug
from trainc.compiler.graph.differentiate import differentiate
from trainc.compiler.graph.dynamo_capture import dynamo_capture
from trainc.compiler.graph.export_capture import export_capture
from trainc.compiler.graph.forward_capture import capture_forward, one_more_example
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.graph.interface import Interface, describe_batch
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.graph.wrapped_model import CaptureFrontEnd, LossFunction
from trainc.compiler.method.penalty import Penalty
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.pipeline import PIPELINE, check_names, check_order, run_passes
from trainc.runtime.data.batch import Batch

FRONT_ENDS: Mapping[str, CaptureFrontEnd] = {
    "torch.export": export_capture,
    "torch.compile": dynamo_capture,
}
"""The capture front ends, in the order in which they are tried."""


class CaptureFailed(RuntimeError):
    """The model cannot be captured as one graph; the message says why."""


def signature(model: nn.Module, batch: Batch) -> Hashable:
    """Return a key that is equal for all batches and models that can use the same captured graph.

    It holds the batch's shapes, dtypes and devices, autocast, the model's mode, and which parameters are trained.
    """
    structure, ports, tensors = describe_batch(batch)
    devices = sorted({t.device.type for t in tensors})
    autocast = tuple(
        (d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)
    )
    trained = tuple(p.requires_grad for p in model.parameters())
    return structure, ports, autocast, model.training, trained


def capture(
    model: nn.Module,
    loss: LossFunction,
    batch: Batch,
    *,
    rewrite: Rewrite,
    penalties: Mapping[str, Penalty],
    scalars: Mapping[str, Tensor],
    without: frozenset[str] = frozenset(),
    passes: Sequence[Pass] = PIPELINE,
    front_end: CaptureFrontEnd | None = None,
) -> StepGraph:
    """Return the graph of one training step for batches like `batch`.

    A penalty is called with one mapping that holds the parameters and `scalars` by name; a number
    that changes over time must come from there, since what a penalty closes over is fixed in the
    graph. `scalars` may hold tensors of any shape; `loss_weight` multiplies loss and penalties.
    Without `front_end` each of FRONT_ENDS is tried in turn. Raises CaptureFailed where none
    can capture the model.
    """
    started = time.perf_counter()
    check_names(without, passes)
    check_order(passes)
    make = partial(capture_forward, model, loss, views=rewrite.views, scalars=scalars)
    front_ends = FRONT_ENDS if front_end is None else {"the given front end": front_end}
    forward, used = _first_capture(make, batch, front_ends)

    def recapture() -> ForwardGraph:
        other = make(batch=one_more_example(batch), front_end=used)
        other.propagate()
        return other

    forward.recapture_with_one_more_example = recapture
    reports = run_passes(forward, rewrite, passes, without)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        flat = differentiate(forward, trained, penalties)
    except (ValueError, CompilerBug):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CaptureFailed(f"the captured model cannot be differentiated: {reason}") from error
    structure, ports, _ = describe_batch(batch)
    interface = Interface(structure, ports, flat.scalars, flat.outputs, rewrite.views)
    step = StepGraph(model, flat.graph, interface, flat.constants)
    step.reports, step.notes = reports, tuple(forward.notes)
    step.seconds = time.perf_counter() - started
    return step


def _first_capture(
    make: Callable[..., ForwardGraph], batch: Batch, front_ends: Mapping[str, CaptureFrontEnd]
) -> tuple[ForwardGraph, CaptureFrontEnd]:
    """Return the forward graph of the first front end that can capture the model; notes name those before it."""
    refused: list[str] = []
    causes: list[Exception] = []
    for name, front_end in front_ends.items():
        try:
            forward = make(batch=batch, front_end=front_end)
            forward.propagate()
        except CompilerBug:
            raise
        # A front end runs the user's model, which may raise anything.
        except Exception as error:
            refused.append(f"{name} cannot capture the model: {type(error).__name__}: {error}")
            causes.append(error)
        else:
            forward.notes += [f"{text.splitlines()[0]}; {name} captured it" for text in refused]
            return forward, front_end
    raise CaptureFailed("\n".join(refused)) from causes[0]
