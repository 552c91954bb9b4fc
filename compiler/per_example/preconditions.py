"""Examine: what must be true of a model and its loss before per-example statistics of them mean anything.

A few tiny forward passes, of two and of three examples: an axis that counts examples grows with them, no measured
layer runs twice or lends its weight, what comes out for an example is the same beside others, and the loss
of three examples is the weighted mean of their own losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainc.compiler.errors import ExampleAxisUnknown, SiteError, repeated
from trainc.compiler.method.sites import LayerSite, MeasuredSite
from trainc.compiler.model.eager import as_written
from trainc.compiler.model.undisturbed import undisturbed
from trainc.compiler.per_example.batch_slices import Cut, cuts, lengths
from trainc.compiler.per_example.weight_uses import owners_alone
from trainc.runtime.data import batch as batches

if TYPE_CHECKING:
    from trainc.compiler.layers.bound_modules import Sites
    from trainc.compiler.method.loss import Loss
    from trainc.runtime.data.batch import Batch

_SIZES = (2, 3)
_MEAN = 1e-2
"""Relative difference from the weighted mean that rounding in 16 bits may make."""
_SAME = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Difference of an example's outputs, relative to the largest, that rounding may make; of 16 bits 0.05."""

Shapes = dict[str, list[tuple[int, ...]]]


class LossNotAMean(SiteError):
    """The loss of several examples is not the weighted mean of their own losses."""

    rule = "loss-not-a-mean"


class ExamplesMix(SiteError):
    """What the model gives for an example depends on the other examples."""

    rule = "examples-mix"


def examine(model: nn.Module, sites: Sites, batch: Batch, task: Loss) -> bool:
    """Learn which embeddings look up ids that all examples share; raises SiteError for what cannot be measured.

    Returns False where no target of the batch counts, so that nothing can be said yet.
    """
    inputs, targets = batch
    counted = [b for b, weight in enumerate(task.weights(targets).tolist()) if weight > 0]
    if not counted:
        return False
    examples = _Examples(model, sites, inputs, [targets.shape[0]], counted)
    few = targets[torch.tensor(examples.rows[: _SIZES[1]], device=targets.device)]
    with sites.plain(), undisturbed(model), torch.enable_grad():
        size = min(_SIZES[0], len(targets))  # no more than a step holds the activations of
        owners_alone(lambda: batches.logits(examples.run(size)), examples.measured)
    with sites.plain(), undisturbed(model), as_written(), torch.no_grad():
        _check_loss(task, batches.logits(examples.run(_SIZES[1])), few)
    return True


def examine_inputs(model: nn.Module, sites: Sites, inputs: Any) -> int:
    """Do what `examine` does for a model without a task, and return how many examples the inputs hold.

    Raises ValueError when they hold none.
    """
    found = lengths(inputs)
    if not found:
        raise ValueError("the inputs hold no tensor with the examples on its first axis")
    return _Examples(model, sites, inputs, found).cut.count


class _Examples:
    """A few examples of a model's inputs, known to be cut in the right places."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        inputs: Any,
        counts: Sequence[int],
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Find the inputs that carry examples and check what the measured layers see of them; see `examine`."""
        bound = {m.trainc.name: m for m in sites.bound() if m.trainc.measured is not None}
        self.model, self.inputs, self.chosen = model, inputs, chosen
        self.measured = cast("Mapping[str, nn.Module]", bound)
        with sites.plain(), undisturbed(model), as_written(), torch.no_grad():
            self.cut, seen = self._cut(counts)
            for name, module in bound.items():
                site = module.trainc.measured
                assert site is not None
                if seen[name]:
                    module.trainc.shared = _is_shared(site, seen[name])
            with _evaluating(model):
                self._check_apart()

    @property
    def rows(self) -> list[int]:
        """The examples taken, over and over where there are few."""
        chosen = range(self.cut.count) if self.chosen is None else self.chosen
        return [chosen[i % len(chosen)] for i in range(_SIZES[-1])]

    def run(self, size: int) -> Any:
        """Return what the model gives for `size` examples."""
        return self._run(self.rows[:size])

    def _run(self, rows: Sequence[int]) -> Any:
        return batches.forward(self.model, self.cut.take(self.inputs, rows))

    def _cut(self, counts: Sequence[int]) -> tuple[Cut, Shapes]:
        """Return the first cut under which the model runs and something grows with the examples, and what was seen."""
        ran: tuple[Cut, Shapes] | None = None
        failure: Exception | None = None
        for cut in cuts(self.inputs, counts):
            self.cut = cut
            seen: Shapes = {name: [] for name in self.measured}
            try:
                with _watching(self.measured, seen):
                    outputs = [self.run(size) for size in _SIZES]
            # A model may raise anything on a mask that was cut as if it carried examples.
            except Exception as error:
                if failure is None:
                    failure = error
                    failure.add_note(
                        f"trainc ran the model on {_SIZES[0]} and {_SIZES[1]} of {cut.count} examples; it cut"
                        f" {cut.told(self.inputs)} to so many"
                    )
                continue
            if ran is None or _grow(outputs, seen):
                ran = cut, seen
            if _grow(outputs, seen):
                break
        if ran is None:
            assert failure is not None
            raise failure
        return ran

    def _check_apart(self) -> None:
        """Raise ExamplesMix where two examples give other outputs beside another third, dropout being off.

        Both batches have one shape, so that rounding is the same.
        """
        first, second, third = self.rows
        other = first if third != first else second
        try:
            one, two = (_tensors(self._run([first, second, last])) for last in (third, other))
            apart = [i for i, pair in enumerate(zip(one, two, strict=False)) if _differ(*pair)]
            again = _tensors(self._run([first, second, third])) if apart else []
        # In eval mode a model may do what it cannot do here; nothing is known then.
        except Exception:
            return
        if any(not _differ(one[i], again[i]) for i in apart):
            raise ExamplesMix(
                "the model gives other outputs for two examples when the third of the batch is another: it mixes"
                " examples, so none has a gradient of its own. Take out what looks across the first axis, such as a"
                " mean over the batch or attention without `batch_first`; a spec can compare micro-batches instead,"
                " `method = micro_batch`"
            )


def _grow(outputs: Sequence[Any], seen: Shapes) -> bool:
    """Say whether what a measured layer sees, or what comes out, counts the examples on its first axis."""
    leading = [[shape[0] for shape in shapes if shape] for shapes in seen.values()]
    results = [_tensors(output)[:1] for output in outputs]
    leading.append([t.shape[0] for found in results for t in found if t.dim()])
    return any(sizes == list(_SIZES) for sizes in leading)


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors among what a model gave, or its logits."""
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return leaves or [batches.logits(output).detach()]


def _differ(one: Tensor, two: Tensor) -> bool:
    """Say whether outputs of three examples differ in the first two by more than rounding; other shapes say nothing."""
    if not one.is_floating_point() or one.shape != two.shape or one.shape[:1] != _SIZES[-1:]:
        return False
    apart, largest = (one - two)[:2].abs(), one.abs()
    return bool(apart.numel() and apart.max() > _SAME.get(one.dtype, 0.05) * largest.max())


def _is_shared(site: MeasuredSite, shapes: list[tuple[int, ...]]) -> bool:
    """Say whether an embedding's ids belong to no single example; raises where an axis of examples is missing."""
    if len(shapes) > len(_SIZES):
        raise repeated([site.module])
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


def _check_loss(task: Loss, logits: Tensor, targets: Tensor) -> None:
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


@contextmanager
def _watching(modules: Mapping[str, nn.Module], seen: Shapes) -> Iterator[None]:
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
