"""Capture a model, a loss and one batch as a step graph, and run the graph passes on it.

The model is exported to ATen, rewritten by the passes, and only then differentiated: a fused
operator has its own backward, so no pass has to find and repair backward nodes.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from trainc.compiler.errors import CompilerBug, SiteUnfit
from trainc.compiler.graph.differentiate import differentiate
from trainc.compiler.graph.dynamo_capture import dynamo_capture
from trainc.compiler.graph.export_capture import conditions, export_capture
from trainc.compiler.graph.forward_capture import capture_forward, one_more_example
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.graph.interface import Interface, describe_batch
from trainc.compiler.graph.sizes import Axes
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.graph.wrapped_model import CaptureFrontEnd, HooksInPlace, LossFunction
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.layer_hook import KeepOutput
from trainc.compiler.method.loss import LossMismatch
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.after_differentiation import add_in_norms, multiply_in_place
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.pipeline import PIPELINE, check_names, check_order, run_passes
from trainc.runtime.data.batch import Batch, WrongOutput
from trainc.runtime.memory.failure import ran_out_of_memory

FRONT_ENDS: Mapping[str, CaptureFrontEnd] = {
    "torch.export": export_capture,
    "torch.compile": dynamo_capture,
}
"""The capture front ends, in the order in which they are tried."""


class CaptureFailed(RuntimeError):
    """The model cannot be captured as one graph; the message says why."""


def signature(model: nn.Module, batch: Batch) -> tuple[Any, ...]:
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
    scalars: Mapping[str, Tensor],
    sites: Sites | None = None,
    without: frozenset[str] = frozenset(),
    passes: Sequence[Pass] = PIPELINE,
    front_end: CaptureFrontEnd | None = None,
    axes: Axes | None = None,
) -> StepGraph:
    """Return the graph of one training step for batches like `batch`.

    The terms of `rewrite` get `scalars` as their `tensors`; a number that changes over time must
    come from there, since what a term closes over is fixed in the graph. `scalars` may hold tensors
    of any shape; `loss_weight` multiplies loss and terms.
    `sites` are the model's bound layers, needed where `rewrite` has hooks: these run where they stand.
    Without `front_end` each of FRONT_ENDS is tried in turn. With `axes` the graph takes other sizes along these axes of
    the batch, by placeholder, and of scalars; torch.export alone can do that. Raises CaptureFailed where none can
    capture the model.
    """
    started = time.perf_counter()
    check_names(without, passes)
    check_order(passes)
    hooks = _hooks(rewrite, sites, scalars) if rewrite.hooks else None
    make = partial(
        capture_forward, model, loss, rewrite=rewrite, scalars=scalars, hooks=hooks, axes=axes
    )
    front_ends = FRONT_ENDS if front_end is None else {"the given front end": front_end}
    if axes:
        front_ends = {"torch.export": export_capture}
    forward, used = _first_capture(make, batch, front_ends)

    def recapture() -> ForwardGraph:
        other = make(batch=one_more_example(batch), front_end=used)
        other.propagate()
        return other

    if not axes:  # symbols tell the axes
        forward.recapture_with_one_more_example = recapture
    reports = run_passes(forward, rewrite, passes, without)
    step = _differentiated(forward, model, batch, rewrite, axes or {})
    step.reports, step.notes = reports, tuple(forward.notes)
    step.warnings = tuple(forward.warnings)
    step.front_end = next(name for name, one in front_ends.items() if one is used)
    step.seconds = time.perf_counter() - started
    return step


def _differentiated(
    forward: ForwardGraph, model: nn.Module, batch: Batch, rewrite: Rewrite, axes: Axes
) -> StepGraph:
    """Return the graph of a step, for other sizes along `axes` too; raises CaptureFailed where there can be none."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    try:
        terms = [*rewrite.terms.values()]
        flat = differentiate(forward, trained, terms, bool(rewrite.observers))
        add_in_norms(flat.graph)
        multiply_in_place(flat.graph)
        _check_constants(flat.constants)
        fulfil = conditions(forward.first_targets, forward.sizes) if axes else ()
    except (ValueError, CompilerBug):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CaptureFailed(f"the captured model cannot be differentiated: {reason}") from error
    structure, ports, _ = describe_batch(batch)
    interface = Interface(
        structure,
        tuple(port.open(axes.get(port.name, {})) for port in ports),
        flat.scalars,
        flat.outputs,
        rewrite.views,
        tuple(site.index for site in rewrite.hooks),
        fulfil,
    )
    return StepGraph(model, flat.graph, interface, flat.constants)


def _check_constants(constants: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError for a constant without values."""
    for name, tensor in constants.items():
        if is_fake(tensor):
            raise RuntimeError(f"the values of the constant `{name}` are not known at capture")


def _hooks(rewrite: Rewrite, sites: Sites | None, scalars: Mapping[str, Tensor]) -> HooksInPlace:
    """Return the hooks that stand in the bound model, and the scalars that they use."""
    assert sites is not None
    used = [full for site in rewrite.hooks for _, full in site.scalars]
    used += [name for name in ("key", "first_example") if name in scalars]
    captures = rewrite.captures
    must_run = (site for site in rewrite.hooks if not site.hook.of_views)
    modules = [site.module for site in must_run if not isinstance(site.hook, KeepOutput)]
    return HooksInPlace(
        partial(
            sites.open_hooks,
            rewrite.views,
            tuple(site.index for site in rewrite.hooks),
            captured=True,
        ),
        tuple(dict.fromkeys(used)),
        tuple(dict.fromkeys(modules)),
        captures,
    )


def _first_capture(
    make: Callable[..., ForwardGraph], batch: Batch, front_ends: Mapping[str, CaptureFrontEnd]
) -> tuple[ForwardGraph, CaptureFrontEnd]:
    """Return the forward graph of the first front end that can capture the model; notes name those before it."""
    refused: list[str] = []
    causes: list[Exception] = []
    for name, front_end in front_ends.items():
        try:
            with _quietly():
                forward = make(batch=batch, front_end=front_end)
                forward.propagate()
        except (CompilerBug, SiteUnfit, LossMismatch, WrongOutput):
            raise
        # A front end runs the user's model, which may raise anything.
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            refused.append(f"{name} cannot capture the model: {type(error).__name__}: {error}")
            causes.append(error)
        else:
            forward.notes += [f"{text.splitlines()[0]}; {name} captured it" for text in refused]
            return forward, front_end
    raise CaptureFailed("\n".join(refused)) from causes[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch from showing the traceback or the graph of an attempt that fails: the error says it where it matters.

    What else is written to stderr meanwhile, by the user's model for one, is written when the attempt is over.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    shown, graph = io.StringIO(), ""
    try:
        with redirect_stderr(shown):
            yield
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        logger.disabled = before
        sys.stderr.write(shown.getvalue().replace(graph, "") if graph.strip() else shown.getvalue())
