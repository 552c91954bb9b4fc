"""Check that a model and its loss allow per-example statistics.

A few small forward passes, of two and of three examples, check that measured layers see the examples on their first
axis, that none of these layers runs twice and their weights are used nowhere else, that the outputs for an example do
not depend on the other examples, and that the loss of three examples is the weighted mean of their own losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainc.compiler.errors import ExampleAxisUnknown, SiteError, repeated_layers
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.sites import LayerSite, MeasuredSite
from trainc.compiler.model.eager import eager_operations
from trainc.compiler.model.undisturbed import undisturbed
from trainc.compiler.per_example.batch_slices import (
    InputSlicer,
    first_axis_lengths,
    possible_slicers,
)
from trainc.compiler.per_example.weight_uses import run_checking_uses
from trainc.runtime.data.batch import Batch, call_model, extract_logits

_SIZES = (2, 3)
_MEAN_TOLERANCE = 1e-2
"""The relative difference from the weighted mean that rounding in 16 bits can cause."""
_OUTPUT_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""The difference between outputs, relative to the largest, that rounding can cause, by dtype; in 16 bits 0.05."""

Shapes = dict[str, list[tuple[int, ...]]]


class LossNotAMean(SiteError):
    """The loss of several examples is not the weighted mean of their own losses."""

    rule = "loss-not-a-mean"


class ExamplesMix(SiteError):
    """The model's outputs for an example depend on the other examples."""

    rule = "examples-mix"


def check_preconditions(model: nn.Module, sites: Sites, batch: Batch, loss_fn: Loss) -> bool:
    """Check that the measured layers can be measured, and find embeddings whose ids are shared by all examples.

    Returns False where no target of the batch counts, so that nothing can be checked yet. Raises SiteError for what
    cannot be measured.
    """
    inputs, targets = batch
    counted = [b for b, weight in enumerate(loss_fn.weights(targets).tolist()) if weight > 0]
    if not counted:
        return False
    examples = _FewExamples(model, sites, inputs, [targets.shape[0]], counted)
    own_targets = targets[torch.tensor(examples.rows[: _SIZES[1]], device=targets.device)]
    with sites.inactive(), undisturbed(model), torch.enable_grad():
        size = min(_SIZES[0], len(targets))  # never more activations than a step holds
        run_checking_uses(lambda: extract_logits(examples.run(size)), examples.measured)
    with sites.inactive(), undisturbed(model), eager_operations(), torch.no_grad():
        _check_loss(loss_fn, extract_logits(examples.run(_SIZES[1])), own_targets)
    return True


def count_examples(model: nn.Module, sites: Sites, inputs: Any) -> int:
    """Return how many examples the inputs hold, after the checks that need no loss.

    Raises ValueError where the inputs hold no examples, SiteError for what cannot be measured.
    """
    lengths = first_axis_lengths(inputs)
    if not lengths:
        raise ValueError("the inputs hold no tensor with the examples on its first axis")
    return _FewExamples(model, sites, inputs, lengths).slicer.count


class _FewExamples:
    """A few examples of a model's inputs, and the model's results for them."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        inputs: Any,
        counts: Sequence[int],
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Find the inputs that hold examples, and check what the measured layers see of them.

        `counts` are the numbers of examples to try, `chosen` the numbers of the examples to take; all are unless given.
        """
        bound = {m.trainc.name: m for m in sites.layers if m.trainc.measured is not None}
        self.model, self.inputs, self.chosen = model, inputs, chosen
        self.measured = cast("Mapping[str, nn.Module]", bound)
        with sites.inactive(), undisturbed(model), eager_operations(), torch.no_grad():
            self.slicer, seen = self._find_slicer(counts)
            for name, module in bound.items():
                site = module.trainc.measured
                assert site is not None
                if seen[name]:
                    module.trainc.shared_ids = _is_shared(site, seen[name])
            with _evaluating(model):
                self._check_independent()

    @property
    def rows(self) -> list[int]:
        """The indices of three examples; some are repeated if there are fewer."""
        chosen = range(self.slicer.count) if self.chosen is None else self.chosen
        return [chosen[i % len(chosen)] for i in range(_SIZES[-1])]

    def run(self, size: int) -> Any:
        """Return the model's result for `size` examples."""
        return self._run(self.rows[:size])

    def _run(self, rows: Sequence[int]) -> Any:
        return call_model(self.model, self.slicer.take(self.inputs, rows))

    def _find_slicer(self, counts: Sequence[int]) -> tuple[InputSlicer, Shapes]:
        """Return the first slicer that the model can run with and that a first axis confirms, and the shapes seen."""
        ran: tuple[InputSlicer, Shapes] | None = None
        failure: Exception | None = None
        for slicer in possible_slicers(self.inputs, counts):
            self.slicer = slicer
            seen: Shapes = {name: [] for name in self.measured}
            try:
                with _watching(self.measured, seen):
                    outputs = [self.run(size) for size in _SIZES]
            # A model may raise anything on a mask that was sliced as if it held examples.
            except Exception as error:
                if failure is None:
                    failure = error
                    failure.add_note(
                        f"trainc ran the model on {_SIZES[0]} and on {_SIZES[1]} of {slicer.count} examples to check"
                        f" that they can be measured. For this it sliced {slicer.describe(self.inputs)}"
                    )
                continue
            if ran is None or _grow(outputs, seen):
                ran = slicer, seen
            if _grow(outputs, seen):
                break
        if ran is None:
            assert failure is not None
            raise failure
        return ran

    def _check_independent(self) -> None:
        """Raise ExamplesMix if the outputs for two examples change with the third example, in eval mode.

        The two batches have the same shape, so that rounding is the same.
        """
        first, second, third = self.rows
        other = first if third != first else second
        try:
            one, two = (_tensors(self._run([first, second, last])) for last in (third, other))
            changed = [i for i, pair in enumerate(zip(one, two, strict=False)) if _differ(*pair)]
            again = _tensors(self._run([first, second, third])) if changed else []
        # In eval mode a model may do something that fails here; then nothing is known.
        except Exception:
            return
        if any(not _differ(one[i], again[i]) for i in changed):
            raise ExamplesMix(
                "the model's outputs for two examples change when the third example of the batch changes, so no example"
                " has a gradient of its own. Remove what mixes examples, such as a mean over the batch or attention"
                " without `batch_first`; or compare micro-batches instead, with `method = micro_batch`"
            )


def _grow(outputs: Sequence[Any], seen: Shapes) -> bool:
    """Return whether the inputs of a measured layer, or the outputs, have the examples on their first axis."""
    leading = [[shape[0] for shape in shapes if shape] for shapes in seen.values()]
    results = [_tensors(output)[:1] for output in outputs]
    leading.append([t.shape[0] for found in results for t in found if t.dim()])
    return any(sizes == list(_SIZES) for sizes in leading)


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a model's result; its logits if it holds none."""
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return leaves or [extract_logits(output).detach()]


def _differ(one: Tensor, two: Tensor) -> bool:
    """Return whether outputs for three examples differ in the first two by more than rounding.

    Outputs of other shapes are not compared.
    """
    if not one.is_floating_point() or one.shape != two.shape or one.shape[:1] != _SIZES[-1:]:
        return False
    difference, largest = (one - two)[:2].abs(), one.abs()
    return bool(
        difference.numel()
        and difference.max() > _OUTPUT_TOLERANCE.get(one.dtype, 0.05) * largest.max()
    )


def _is_shared(site: MeasuredSite, shapes: list[tuple[int, ...]]) -> bool:
    """Return whether an embedding's ids are shared by all examples; raises SiteError where no axis counts examples."""
    if len(shapes) > len(_SIZES):
        raise repeated_layers([site.module])
    if [shape[0] for shape in shapes if shape] == list(_SIZES):
        return False
    first = shapes[0]
    fixed = len(set(shapes)) == 1 and first and (len(first) == 1 or first[0] == 1)
    if fixed and isinstance(site, LayerSite) and site.layer_type == "embedding":
        return True
    shown = " and ".join(str(shape) for shape in shapes)
    raise ExampleAxisUnknown(
        f"the input of `{site.module}` has shape {shown} for {_SIZES[0]} and {_SIZES[1]} examples: its first axis does"
        " not count examples, so per-example norms cannot be measured there. Exclude the layer from `on`"
    )


def _check_loss(loss_fn: Loss, logits: Tensor, targets: Tensor) -> None:
    weights = loss_fn.weights(targets)
    loss = float(loss_fn(logits, targets))
    weighted = [
        float(weight) * float(loss_fn(logits[b : b + 1], targets[b : b + 1]))
        for b, weight in enumerate(weights)
        if weight
    ]
    mean = sum(weighted)
    if abs(loss - mean) > _MEAN_TOLERANCE * max(abs(loss), abs(mean), 1e-6):
        raise LossNotAMean(
            f"the loss of {len(targets)} examples is {loss:.4g}, but the weighted mean of their single losses is"
            f" {mean:.4g}. A noise scale needs a loss that is a mean over examples or targets, not a sum, and one that"
            " does not compare examples with each other"
        )


@contextmanager
def _watching(modules: Mapping[str, nn.Module], seen: Shapes) -> Iterator[None]:
    """Record the shape of the first input of every module while it runs."""

    def watch(name: str) -> Callable[..., None]:
        def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                seen[name].append(tuple(inputs[0].shape))

        return record

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
