"""Loss terms that clauses add to the loss: what their values may read, and how they make up the total."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from trainc.compiler.method.loss import LOSS_WEIGHT, PARAMETER_WEIGHT, Loss
from trainc.runtime.companion.companion import Companion
from trainc.runtime.companion.history import History
from trainc.runtime.data.batch import compute_logits, map_tensors, no_logits
from trainc.runtime.processes.sharded import full
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.action import failures_of
from trainc.runtime.step.observer import require_classes

Over = Literal["targets", "examples", "parameters"]
"""What the mean of a term runs over: it decides how the micro-batches of a step add up."""
CAPTURED = "captured:"
"""What stands before the module and the number of the call of a captured tensor in the names of a graph's outputs."""
TERM = "term:"
"""What stands before the label of a term in the names of a graph's outputs."""
SAMPLE_IDS = "sample ids"
"""The name of the sample ids among the tensors that a term reads."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What a loss term may read of one micro-batch.

    `logits` (views * B, ...) are those of every view, view after view; `targets` (B, ...) and `inputs` those of the
    batch. `parameters` holds every parameter by name, `tensors` the term's scheduled numbers and constants by name.
    """

    logits: Tensor
    targets: Tensor
    inputs: Any
    views: int
    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    ignore_index: int = -100
    captured: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    """What captured modules gave, one tensor of all views a call."""
    loss: Loss | None = None
    """The loss, which says how logits and targets are read."""
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """What of the model's output each loss is of, by its name, with the classes where the model has them."""
    all_targets: Any = None
    """The targets of all losses; `targets` are those of the first."""

    @classmethod
    def of_loss(cls, loss: Loss | None, output: Tensor, targets: Tensor, *others: Any) -> Forward:
        """Return what terms read with a loss; the logits have the classes on the last axis, wherever the model does."""
        logits = output if loss is None else loss.classes_last(output, targets)
        return replace(cls(logits, targets, *others), loss=loss)

    def logits_of(self, companion: Companion) -> Tensor:
        """Return the logits of one of the term's companions on the inputs, (B, ...), without gradient."""
        found = self.tensors[companion.name]
        return found if self.loss is None else self.loss.classes_last(found, self.targets)

    def captured_of(self, companion: Companion) -> dict[str, list[Tensor]]:
        """Return what the captured modules of a companion gave on the inputs, one tensor a call, without gradient."""
        return {name: companion.calls(self.tensors, name) for name in companion.captured}

    def logits_of_module(self, module: nn.Module) -> Tensor:
        """Return the logits (B, ...) that a module like the model gives of the inputs.

        Raises ValueError where these are not known.
        """
        if self.inputs is None:
            raise ValueError(
                "the clause passes the inputs once more, and only your code has them: give `inputs` where you give"
                " `logits`"
            )
        output = None if self.loss is None else self.loss.logits_output
        found = compute_logits(module, map_tensors(torch.clone, self.inputs), output)
        return found if self.loss is None else self.loss.classes_last(found, self.targets)

    def previous(self, history: History) -> tuple[Tensor, Tensor]:
        """Return the logits (B, ...) that each sample had when it was last seen, and for which it was, bool (B,).

        Those of the others are 0. Raises ValueError where the logits had another shape then.
        """
        found = self.tensors[history.name]
        history.check_shapes([found.shape[1:], self.view(0).shape[1:]])
        known = ~found.flatten(1).isnan().any(1) if found.dim() > 1 else ~found.isnan()
        return found.nan_to_num(0.0), known

    @property
    def sample_ids(self) -> Tensor:
        """Which sample of the training data each example is, int64 (B,); raises RuntimeError where nothing asked."""
        if SAMPLE_IDS not in self.tensors:
            raise RuntimeError(
                "`forward.sample_ids` is read and was not asked for: pass `sample_ids=True` to `to.term`, or write"
                " `sample_ids = True` in the class of the observer"
            )
        return self.tensors[SAMPLE_IDS]

    def with_ids(self, sample_ids: Tensor) -> Forward:
        """Return it with the sample ids of its examples."""
        return replace(self, tensors={**self.tensors, SAMPLE_IDS: sample_ids})

    def detached(self) -> Forward:
        """Return it without gradients."""
        captured = {m: [one.detach() for one in found] for m, found in self.captured.items()}
        return replace(self, logits=self.logits.detach(), captured=captured)

    def view(self, index: int) -> Tensor:
        """Return the logits of one view, (B, ...); raises WrongPick where the model gave none that is known."""
        if not self.logits.numel() and self.logits.dim() == 1:
            raise no_logits("a clause")
        one: Tensor = self.logits.unflatten(0, (self.views, -1))[index]
        return one

    @property
    def counted(self) -> Tensor:
        """Which targets the loss counts, bool: of the targets' shape, where they are probabilities without classes."""
        if self.loss is not None:
            return self.loss.counted(self.targets)
        if self.targets.is_floating_point():
            return torch.ones_like(self.targets, dtype=torch.bool)
        return self.targets != self.ignore_index

    @property
    def target_weights(self) -> Tensor:
        """What each target weighs in a mean over targets: 0 where it is not counted, and else as in the loss.

        It is `counted` itself where all that count weigh the same. A mean that weighs otherwise would not add up over
        micro-batches.
        """
        return self.counted if self.loss is None else self.loss.weights_for_terms(self.targets)


def captured_outputs(named: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return what modules gave, by module, from the outputs of a graph by name."""
    found: dict[str, list[Tensor]] = {}
    for name, value in named.items():
        if name.startswith(CAPTURED):
            module = name.removeprefix(CAPTURED).rpartition(":")[0]
            found.setdefault(module, []).append(value)
    return found


class JointOperator(Protocol):
    """A term of two views that one operator computes together with the cross-entropy of the first."""

    @property
    def target(self) -> Any:
        """The torch operator: of logits, targets, a weight and `options`; it returns (total, loss, term)."""
        ...

    @property
    def head_target(self) -> Any:
        """The torch operator that takes hidden states, a head and its bias in place of the logits."""
        ...

    def options(self, ignore_index: int, label_smoothing: float) -> tuple[Any, ...]:
        """Return the operators' arguments behind the weight."""
        ...


@dataclass(frozen=True, slots=True)
class Term:
    """A loss term: `value(forward)` is 0-d and is multiplied by the number named `weight`, where there is one."""

    label: str
    value: Callable[[Forward], Tensor]
    over: Over
    weight: str | None = None
    gate: Gate | None = None
    """When the term is part of the loss; None: in every step."""
    joint: JointOperator | None = None
    what: str | None = None
    """What the value is, for the summary of a run."""
    companions: tuple[Companion, ...] = ()
    """Modules whose logits the value reads."""
    of_classes: bool = False
    """Whether the value reads the logits as those of classes."""
    sample_ids: bool = False
    """Whether the value reads which samples the examples are."""
    named: tuple[tuple[str, str], ...] = ()
    """The term's own name of each of its numbers and tensors, and the one in the method."""
    clause: str = ""
    """The label of its clause, where the metric has another name."""
    histories: tuple[History, ...] = ()
    """What keeps the last logits of every sample, which the value reads."""

    @property
    def by_sample(self) -> tuple[str, ...]:
        """The names of the tensors, a row for each example, that it reads of the samples."""
        ids = (SAMPLE_IDS,) if self.sample_ids else ()
        return (*ids, *(one.name for one in self.histories))

    @property
    def reads_ids(self) -> bool:
        """Whether it needs to know which samples the examples are."""
        return self.sample_ids or bool(self.histories)

    @property
    def of_parameters(self) -> bool:
        """Whether the term depends on the parameters alone."""
        return self.over == "parameters"

    def evaluate(self, forward: Forward, owners: Mapping[int, str] | None = None) -> Tensor:
        """Return the value; raises ClauseFailed unless it is 0-d, or where it reads classes and the logits have none.

        With `owners`, the names of the user's tensors by `id`, also where one of them is used that does not come from
        `forward`.
        """
        with failures_of(self.clause or self.label):
            return self._value(forward, owners)

    def _value(self, forward: Forward, owners: Mapping[int, str] | None) -> Tensor:
        if self.of_classes:
            require_classes(self.label, forward, indices=False)
        own = {name: forward.tensors[full] for name, full in self.named if name != full}
        if own:
            forward = replace(forward, tensors={**forward.tensors, **own})
        if owners is None:
            value = self.value(forward)
        else:
            with _Watch(self.label, owners):
                value = self.value(forward)
        value = full(value)
        if value.dim() != 0:
            raise ValueError(
                f"the loss term `{self.label}` must return a 0-d tensor, but returned shape {list(value.shape)}"
            )
        return value


class Values(Mapping[str, Tensor]):
    """Parameters and buffers by each of their names."""

    def __init__(self, tensors: Mapping[str, Tensor], canonical: Mapping[str, str]) -> None:
        self._tensors, self._canonical = tensors, canonical

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._canonical.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def add_terms(
    data_loss: Tensor,
    terms: Iterable[Term],
    values: Mapping[str, Tensor],
    scalars: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the loss with the terms over targets and examples, and the total that is differentiated.

    The total has the terms over parameters as well, and the micro-batch's weight in the step, where `scalars` has it.
    """
    loss, of_parameters = data_loss, []
    for term in terms:
        value = values[term.label]
        if term.weight is not None:
            value = value * scalars[term.weight]
        if term.of_parameters:
            of_parameters.append(value)
        else:
            loss = loss + value
    if PARAMETER_WEIGHT in scalars:
        weighted = (value * scalars[PARAMETER_WEIGHT] for value in of_parameters)
        return loss, sum(weighted, start=loss * scalars[LOSS_WEIGHT])
    total = sum(of_parameters, start=loss)
    return loss, total * scalars[LOSS_WEIGHT] if LOSS_WEIGHT in scalars else total


class _Watch(TorchFunctionMode):
    """Raises ValueError where a term uses a trained tensor that is not from its argument."""

    def __init__(self, term: str, owners: Mapping[int, str]) -> None:
        super().__init__()
        self.term, self.owners = term, owners

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not is_fake(leaf):
                name = self.owners.get(id(leaf), "a tensor that requires grad")
                raise ValueError(
                    f"the loss term `{self.term}` uses `{name}` directly, so no gradient would reach it: take it"
                    " from the `parameters` of its argument"
                )
        return func(*args, **(kwargs or {}))
