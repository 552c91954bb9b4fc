"""Check that a model and its loss allow per-example statistics.

A few small forward passes, of two and of three examples, check that measured layers see the examples on their first
axis, that none of these layers runs twice and their weights are used nowhere else, that the outputs for an example do
not depend on the other examples, and that the loss of three examples is the weighted mean of their own losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trainc.compiler.errors import ExampleAxisUnknown, repeated_layers
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.example_units import Groups
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.losses import Losses
from trainc.compiler.method.sites import LayerSite, MeasuredSite
from trainc.compiler.method.user_loss import UserLoss
from trainc.compiler.model.eager import eager_operations
from trainc.compiler.model.undisturbed import keep_state, undisturbed
from trainc.compiler.per_example.batch_slices import (
    InputSlicer,
    first_axis_lengths,
    possible_slicers,
)
from trainc.compiler.per_example.loss_counting import LossNotAMean
from trainc.compiler.per_example.mixing import ExamplesMix, check_independent
from trainc.compiler.per_example.weight_uses import run_checking_uses
from trainc.runtime.data.batch import (
    Batch,
    call_model,
    copy_inputs,
    extract_logits,
    find_logits,
    map_tensors,
    one_of,
)
from trainc.runtime.processes.sharded import is_sharded

_SIZES = (2, 3)
_MEAN_TOLERANCE = 1e-2
"""The relative difference from the weighted mean that rounding in 16 bits can cause."""

Shapes = dict[str, list[tuple[int, ...]]]


def check_preconditions(model: nn.Module, sites: Sites, batch: Batch, losses: Losses) -> bool:
    """Check that the measured layers can be measured, and find embeddings whose ids are shared by all examples.

    Returns False where no target of the batch counts, so that uses and loss cannot be checked yet. Processes that shard
    a model wait for each other's passes: there the passes are the same, and only the loss is not checked. Raises
    SiteError for what cannot be measured.
    """
    inputs, targets = batch
    weights = losses.example_weights(targets, {})
    counted = [b for b, weight in enumerate(weights.tolist()) if weight > 0]
    if not counted and not any(map(is_sharded, model.parameters())):
        _FewExamples(model, sites, inputs, [len(one_of(targets))], targets, losses)
        return False
    examples = _FewExamples(
        model, sites, inputs, [len(one_of(targets))], targets, losses, counted or None
    )
    rows = torch.tensor(examples.rows[: _SIZES[1]], device=one_of(targets).device)
    own_targets = map_tensors(itemgetter(rows), targets)
    with sites.inactive(), undisturbed(model), torch.enable_grad():
        size = min(_SIZES[0], len(one_of(targets)))  # never more activations than a step holds
        few = map_tensors(itemgetter(rows[:size]), targets)
        run_checking_uses(lambda: _joined(losses, examples.read(size), few), examples.measured)
    with sites.inactive(), undisturbed(model), eager_operations(), torch.no_grad():
        outputs = examples.read(_SIZES[1])
        for part in losses.parts if counted else ():
            if not isinstance(part.loss, UserLoss):  # of these `settle` has asked it
                _check_loss(part.loss, outputs[part.label], part.targets(own_targets))
    return True


def check_changed_weights(model: nn.Module, sites: Sites, batch: Batch, losses: Losses) -> None:
    """Raise WeightUsedElsewhere where a weight that a clause changes in its layers is used outside of them."""
    changed = [site for site in sites.rewrite.hooks if site.weight is not None]
    modules = {site.module: model.get_submodule(site.module) for site in changed}
    # A shared parameter has a name in each of its layers.
    names = {f"{s.module}.{s.weight.attribute}".removeprefix(".") for s in changed if s.weight}
    reason = "A clause changes a weight in the layers that hold it, and this use would have the stored one"
    with sites.inactive(), undisturbed(model), torch.enable_grad():

        def run() -> Tensor:
            return _joined(losses, losses.run(model, copy_inputs(batch)).of, batch[1])

        run_checking_uses(run, modules, names, reason)


def check_views(model: nn.Module, sites: Sites, batch: Batch, losses: Losses) -> None:
    """Raise ExamplesMix where the outputs for an example depend on the others, among which are its other views.

    A model that takes no other number of examples is not checked.
    """
    try:
        count = len(one_of(batch[1]))
        _FewExamples(model, sites, batch[0], [count], batch[1], losses, in_train_mode=False)
    except ExamplesMix:
        raise ExamplesMix(
            "a regularizer passes every example twice in one batch, but the model's outputs for two examples change"
            " when the third of the batch changes, so the second view of an example would change the loss. Remove the"
            " regularizer, or what mixes examples, such as a comparison of all pairs in the batch"
        ) from None
    # The model may raise anything when it runs on few examples.
    except Exception:
        return


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
        targets: Any = None,
        losses: Losses | None = None,
        chosen: Sequence[int] | None = None,
        *,
        in_train_mode: bool = True,
    ) -> None:
        """Find the inputs that hold examples, and check what the measured layers see of them.

        `counts` are the numbers of examples to try, `chosen` the numbers of the examples to take; all are unless given.
        Whether examples are independent is asked in eval mode, and `in_train_mode`. With `losses` the model is given
        the `targets` of which it computes a loss.
        """
        bound = {m.trainc.name: m for m in sites.layers if m.trainc.measured is not None}
        self.model, self.inputs, self.chosen = model, inputs, chosen
        self.targets, self.losses = targets, losses
        self.measured = cast("Mapping[str, nn.Module]", bound)
        with sites.inactive(), undisturbed(model), eager_operations(), torch.no_grad():
            self.slicer, seen = self._find_slicer(counts)
            for name, module in bound.items():
                site = module.trainc.measured
                assert site is not None
                if seen[name]:
                    module.trainc.shared_ids = _is_shared(site, seen[name])
            check_independent(
                model,
                lambda rows: _tensors(self._run(rows)),
                self.rows,
                lambda: keep_state(model),
                in_train_mode=in_train_mode and not isinstance(sites.rewrite.example_units, Groups),
            )

    @property
    def rows(self) -> list[int]:
        """The indices of three examples; some are repeated if there are fewer."""
        chosen = range(self.slicer.count) if self.chosen is None else self.chosen
        return [chosen[i % len(chosen)] for i in range(_SIZES[-1])]

    def run(self, size: int) -> Any:
        """Return the model's result for `size` examples."""
        return self._run(self.rows[:size])

    def read(self, size: int) -> Mapping[str, Any]:
        """Return what each loss reads of the model's result for `size` examples, by name."""
        assert self.losses is not None
        rows = self.rows[:size]
        return self.losses.read(self._run(rows), self.slicer.take(self.inputs, rows)).of

    def _run(self, rows: Sequence[int]) -> Any:
        inputs = self.slicer.take(self.inputs, rows)
        if self.losses is None:
            return call_model(self.model, inputs)
        own = torch.tensor(rows, device=one_of(self.targets).device)
        return self.losses.call(self.model, (inputs, map_tensors(itemgetter(own), self.targets)))

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


def _grow(outputs: Sequence[Any], seen: Shapes) -> bool:
    """Return whether the inputs of a measured layer, or the outputs, have the examples on their first axis."""
    leading = [[shape[0] for shape in shapes if shape] for shapes in seen.values()]
    results = [[t for t in _tensors(output) if t.dim()][:1] for output in outputs]
    leading.append([t.shape[0] for found in results for t in found])
    return any(sizes == list(_SIZES) for sizes in leading)


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a model's result; its logits if it holds none."""
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if leaves:
        return leaves
    found = find_logits(output)  # what has a loss of its own beside them
    return [(extract_logits(output) if found is None else found).detach()]


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


def _joined(losses: Losses, outputs: Mapping[str, Any], targets: Any) -> Tensor:
    """Return what losses are computed from as one tensor, which depends on all that they do.

    Only a loss of the user's own code knows what that is, so of such it is the loss.
    """
    found = [
        part.loss(outputs[part.label], part.targets(targets))
        if isinstance(part.loss, UserLoss)
        else outputs[part.label]
        for part in losses.parts
    ]
    first, *others = {id(one): one for one in found}.values()
    return torch.cat([one.flatten() for one in (first, *others)]) if others else first


def _check_loss(loss_fn: Loss, logits: Tensor, targets: Any) -> None:
    weights = loss_fn.weights(targets)
    loss = float(loss_fn(logits, targets))
    weighted = [
        float(weight)
        * float(loss_fn(logits[b : b + 1], map_tensors(itemgetter(slice(b, b + 1)), targets)))
        for b, weight in enumerate(weights)
        if weight
    ]
    mean = sum(weighted)
    if abs(loss - mean) > _MEAN_TOLERANCE * max(abs(loss), abs(mean), 1e-6):
        raise LossNotAMean(
            f"the loss of {len(weights)} examples is {loss:.4g}, but the weighted mean of their single losses is"
            f" {mean:.4g}. Statistics of examples need a loss that is a mean over examples or targets, not a sum, and"
            " one that does not compare examples with each other"
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
