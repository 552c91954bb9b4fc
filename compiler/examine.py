"""Examine: what must be true of a model and its loss before per-example statistics of them mean anything.

Two tiny forward passes, without gradient, of two and of three examples: an axis that counts examples grows with them,
and the loss of three examples is the weighted mean of their own losses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainc.compiler.layers.armed import ExampleAxisUnknown, SiteError
from trainc.compiler.rewrite import LayerSite, MeasuredSite
from trainc.runtime import batches

if TYPE_CHECKING:
    from trainc.compiler.lowering import Task
    from trainc.compiler.sites import Sites
    from trainc.runtime.batches import Batch

_SIZES = (2, 3)
_MEAN = 1e-2
"""Relative difference from the weighted mean that rounding in 16 bits may make."""


class LossNotAMean(SiteError):
    """The loss of several examples is not the weighted mean of their own losses."""

    rule = "loss-not-a-mean"


def examine(model: nn.Module, sites: Sites, batch: Batch, task: Task | None = None) -> None:
    """Learn which embeddings look up ids that all examples share; raises SiteError for what cannot be measured."""
    measured = {m.trainc.name: m for m in sites.bound() if m.trainc.measured is not None}
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in measured}
    with sites.plain(), undisturbed(model), torch.no_grad():
        for size in _SIZES:
            few = _first(batch, size)
            with _watching(cast("Mapping[str, nn.Module]", measured), seen):
                output = batches.forward(model, few[0])
        if task is not None:
            _check_loss(task, batches.logits(output), few[1])
    for name, module in measured.items():
        site = module.trainc.measured
        assert site is not None
        if seen[name]:
            module.trainc.shared = _is_shared(site, seen[name])


def _is_shared(site: MeasuredSite, shapes: list[tuple[int, ...]]) -> bool:
    """Say whether an embedding's ids belong to no single example; raises where an axis of examples is missing."""
    if [shape[0] for shape in shapes if shape] == list(_SIZES):
        return False
    first = shapes[0]
    fixed = len(set(shapes)) == 1 and first and (len(first) == 1 or first[0] == 1)
    if fixed and isinstance(site, LayerSite) and site.form == "embedding":
        return True
    shown = " and ".join(str(shape) for shape in shapes)
    raise ExampleAxisUnknown(
        f"`{site.module}` sees tensors of shape {shown} for {_SIZES[0]} and {_SIZES[1]} examples: its first axis"
        " is not the example axis, so per-example norms cannot be taken there"
    )


def _check_loss(task: Task, logits: Tensor, targets: Tensor) -> None:
    weights = task.weights(targets)
    whole = float(task(logits, targets))
    parts = [
        float(weight) * float(task(logits[b : b + 1], targets[b : b + 1]))
        for b, weight in enumerate(weights)
        if weight
    ]
    mean = sum(parts)
    if abs(whole - mean) > _MEAN * max(abs(whole), abs(mean), 1e-6):
        raise LossNotAMean(
            f"the loss of {len(targets)} examples is {whole:.4g}, and the weighted mean of their own losses {mean:.4g}:"
            " a noise scale needs a loss that is a mean over examples or targets; is it a sum, or does it compare"
            " examples with each other?"
        )


def _first(batch: Batch, size: int) -> Batch:
    """Return `size` examples of a batch, taken over and over where it has fewer."""
    count = batch[1].shape[0]
    rows = torch.arange(size, device=batch[1].device) % count

    def take(tensor: Any) -> Any:
        carried = isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.shape[0] == count
        return tensor[rows.to(tensor.device)] if carried else tensor

    inputs = dict(batch[0]) if isinstance(batch[0], Mapping) else batch[0]
    return pytree.tree_map(take, inputs), take(batch[1])


@contextmanager
def _watching(
    modules: Mapping[str, nn.Module], seen: dict[str, list[tuple[int, ...]]]
) -> Iterator[None]:
    """Note the shape of the first input of every module."""

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                seen[name].append(tuple(inputs[0].shape))

        return note

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give buffers and random number generators back as they were, and let no hook of the user's run.

    Sharded models keep their hooks: it is these that bring the weights.
    """
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    hooks = [] if sharded else [_take_hooks(module) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for put_back in hooks:
            put_back()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


def _take_hooks(module: nn.Module) -> Callable[[], None]:
    """Take a module's forward hooks away and return what puts them back."""
    taken = {name: getattr(module, name) for name in ("_forward_hooks", "_forward_pre_hooks")}
    for name in taken:
        setattr(module, name, OrderedDict())

    def put_back() -> None:
        for name, hooks in taken.items():
            setattr(module, name, hooks)

    return put_back
