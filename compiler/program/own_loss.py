"""Micro-batches whose forward pass and loss are the user's own code: what a clause needs stands around that code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.errors import SiteError
from trainc.compiler.execution.execution import Execution
from trainc.compiler.execution.replica_shares import Part
from trainc.compiler.execution.scalars import read_by_terms
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.loss import NoLoss
from trainc.compiler.method.term import Forward, Term, add_terms
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.compiler.per_example.residual_branches import checking_branches
from trainc.compiler.per_example.weight_uses import check_single_uses
from trainc.compiler.replay.replayed import OWN_LOOP
from trainc.runtime.step.machine import StepMachine

Asked = Callable[[Sequence[str]], str]
"""Says how the user's code gives what clauses read, by these names."""


def asked_in_call(call: str) -> Asked:
    """Return that of a call with the loss, which takes them as keywords."""
    return lambda names: f"write `{call}(loss, {', '.join(f'{one}={one}' for one in names)})`"


@dataclass(slots=True)
class OwnMicroBatch:
    """A micro-batch as its `with` block describes it, and what the passes in the block left.

    `weights` (examples,) with sum 1 are those of its examples in its loss.
    """

    examples: int
    weights: Tensor
    tokens: int
    where: MicroBatchSlice
    captured: dict[str, Sequence[Tensor]] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    """The versions of the weights before the block."""
    complete: bool = False
    """Whether the block has ended without an error."""
    framework: bool = False
    """Whether a framework differentiates the loss, which has its `loss_weight` already, and may multiply it again."""
    share: float | None = None
    """Its fraction of the step's examples as far as it is known before the step; that of `where` unless given."""
    count: float = 1.0
    """What its loss is a mean over: the sum of the weights of its examples as the user gave them."""

    asked: Asked = field(default_factory=lambda: asked_in_call("program.backward"))
    """How its logits are given."""

    def counted(self) -> dict[str, float]:
        """Return what its loss is a mean over; replicas in a framework count alike, whatever they have."""
        return {"loss": 1.0 if self.framework else self.count}

    @property
    def part(self) -> Part:
        """What its process has of the step."""
        weight = 1.0 if self.framework else self.where.loss_weight
        share = self.where.example_fraction if self.share is None else self.share
        return Part.of_micro_batch(self.examples, self.counted, weight, share)


@dataclass(frozen=True, slots=True)
class Read:
    """What clauses may read of the user's forward pass; None where the user did not give it."""

    logits: Tensor | None = None
    targets: Tensor | None = None
    inputs: Any = None


class OwnLoss:
    """Runs micro-batches of one program whose loss the user's code computes."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._checked = self._told = False

    def check(
        self, machine: StepMachine, who: str = "in a `micro_batch` block your own code"
    ) -> None:
        """Raise SiteError where a clause of this step needs more than one pass that the user's code runs."""
        rewrite = self.execution.rewrite
        if self.execution.executor == "graph":
            raise SiteError(
                f'this program was compiled with `executor="graph"`, and {who} runs the modules: compile with'
                ' `executor="auto"` or `executor="module"`'
            )
        for one in rewrite.view_requests:
            raise _refused(
                one.label, f"passes every example {one.count} times through the model", who
            )
        for transform in machine.batch_transforms:
            raise _refused(transform.name, "changes the batch before the forward pass", who)
        for part in self.execution.method.calibrations:
            if part.gate.fires(self.execution.clock):
                raise _refused(part.label, "measures examples one at a time in this step", who)

    @contextmanager
    def block(self, own: OwnMicroBatch) -> Iterator[None]:
        """Let the sites take part in the passes inside this block, which are those of the micro-batch."""
        runs, rewrite = self.execution, self.execution.rewrite
        units = rewrite.example_units
        index = ExampleIndex(own.examples) if units is None else units.of_rows(own.examples)
        runs.refuse_mixing()
        if rewrite:
            runs.activate(index, runs.numbers(own.where, runs.device), runs.device)
        unchecked = runs.module.training and not runs.covered
        counting: AbstractContextManager[dict[str, int]]
        counting = runs.sites.count_calls() if unchecked else nullcontext({})
        branches = checking_branches(runs.module, rewrite) if unchecked else nullcontext()
        try:
            with counting as counts, branches, runs.reading() as captured:
                yield
            runs.sites.check_coverage(counts)
            runs.covered |= unchecked
        except BaseException:
            runs.sites.deactivate()
            raise
        own.captured, own.complete = captured, True

    def add_terms(
        self, own: OwnMicroBatch, loss: Tensor, read: Read
    ) -> tuple[Tensor, MicroBatchResult]:
        """Return what to differentiate, and the results of the micro-batch, complete after the backward pass."""
        runs, rewrite = self.execution, self.execution.rewrite
        if not self._checked and rewrite.measured and runs.module.training:
            check_single_uses(loss, self._layers_by_parameter())
            self._checked = True
        forward = self._forward(own, loss, read)
        values = {label: term.evaluate(forward) for label, term in rewrite.terms.items()}
        weighed = own.framework and own.where.loss_weight not in (0, 1)
        mean = loss / own.where.loss_weight if weighed else loss
        with_terms, total = add_terms(mean, rewrite.terms.values(), values, forward.tensors)
        if own.framework and not rewrite.terms:
            total = loss
        if read.logits is not None:
            runs.observe(forward, own.where)
        if rewrite.reads_passes:
            values["data_loss"] = mean
        terms = {name: value.detach() for name, value in values.items()}
        result = runs.result(own.where, with_terms, terms)
        if runs.compiler is not None and not self._told:
            self._told = True
            result.notes += (_NOT_COMPILED,)
        result.notes += runs.news(OWN_LOOP)
        if runs.statistics.wanted:
            runs.statistics.weigh_rows(result, own.weights, own.where.loss_weight)
            result.probes = runs.sites.probes()
            result.synchronised = runs.exchanges_now
            runs.statistics.watch(result, total)
        return total, result

    def _layers_by_parameter(self) -> dict[str, tuple[nn.Parameter, int]]:
        """Return each measured parameter by name, and how many measured layers share it."""
        names = [n for site in self.execution.rewrite.measured for n in site.parameters if n]
        counts = Counter(names)
        return {name: (self.execution.parameters[name], counts[name]) for name in counts}

    def _forward(self, own: OwnMicroBatch, loss: Tensor, read: Read) -> Forward:
        """Return what terms and observers read; raises ValueError where the user's code has to give it."""
        runs, rewrite = self.execution, self.execution.rewrite
        self._require(read, own)
        loss_fn, absent = runs.loss_fn, loss.new_empty(0)
        logits = absent if read.logits is None else read.logits
        targets = absent if read.targets is None else read.targets
        terms, batch = rewrite.terms.values(), (read.inputs, targets)
        given = read.logits is not None and read.targets is not None
        of_loss = given and not isinstance(loss_fn, NoLoss)

        def shape() -> Sequence[int]:
            last = loss_fn.classes_last(logits, targets) if of_loss else logits
            return last.shape[1:]

        scalars: Mapping[str, Tensor] = {
            **runs.numbers(own.where, loss.device),
            **read_by_terms(terms, batch, own.where, loss_fn.output, shape),
        }
        others = read.inputs, 1, runs.parameters, scalars, loss_fn.ignore_index, own.captured
        if not of_loss:
            return Forward(logits, targets, *others)
        return Forward.of_loss(loss_fn, logits, targets, *others)

    def readers(self) -> list[str]:
        """Return the clauses that read the logits and targets of a pass in this step."""
        rewrite = self.execution.rewrite
        readers = [_clause(term) for term in rewrite.terms.values() if not term.of_parameters]
        return readers + [observer.name for observer in rewrite.observers]

    def _require(self, read: Read, own: OwnMicroBatch) -> None:
        rewrite, readers = self.execution.rewrite, self.readers()
        if readers and (read.logits is None or read.targets is None):
            raise ValueError(
                f"{_names(readers)} reads the logits and targets of the pass, and only your code has them:"
                f" {own.asked(('logits', 'targets'))}"
            )
        asking = [_clause(term) for term in rewrite.terms.values() if term.companions]
        if asking and read.inputs is None:
            raise ValueError(
                f"{_names(asking)} runs another model on the same inputs:"
                f" {own.asked(('logits', 'targets', 'inputs'))}"
            )
        given = {"logits": read.logits, "targets": read.targets}
        for name, tensor in given.items():
            if tensor is not None and (not tensor.dim() or tensor.shape[0] != own.examples):
                raise ValueError(
                    f"`{name}` has shape {tuple(tensor.shape)}, and the micro-batch {own.examples} examples: its first"
                    " axis must count them"
                )


_NOT_COMPILED = (
    "`compile = inductor` compiles what `program.step` and `program.loss` run; here your own code runs the model:"
    " compile the model yourself, by `model = torch.compile(model)` or `model.compile()`"
)


def check_loss(loss: Any) -> Tensor:
    """Return the user's loss; raises TypeError or ValueError where it cannot be differentiated as one number."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss is {type(loss).__name__}: expected a 0-d tensor, such as `output.loss`"
        )
    if loss.dim():
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}: expected one number, the mean over the micro-batch's examples or"
            " targets, such as `loss.mean()`"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no gradient: it was computed under `torch.no_grad()`, detached, or reads no weight that"
            " trains"
        )
    return loss


def check_number(name: str, given: object, least: int) -> None:
    """Raise ValueError unless this is an integer, `least` or more."""
    if not isinstance(given, Integral) or isinstance(given, bool) or int(given) < least:
        shown = repr(given) if isinstance(given, int | float | str) else type(given).__name__
        raise ValueError(f"`{name}` is {shown}: expected a number of {name}, {least} or more")


def example_weights(weights: Any, examples: int, device: torch.device) -> Tensor:
    """Return the weights of a micro-batch's examples in its loss, float64 (examples,), sum 1; equal unless given.

    Raises ValueError for weights of another number, or that are negative, not finite, or all zero.
    """
    if weights is None:
        return torch.full((examples,), 1 / examples, dtype=torch.float64, device=device)
    found = torch.as_tensor(weights, dtype=torch.float64, device=device)
    if found.shape != (examples,):
        raise ValueError(
            f"`weights` has shape {tuple(found.shape)}: expected one number for each of the {examples} examples"
        )
    if not (bool(torch.isfinite(found).all()) and float(found.min()) >= 0 and float(found.sum())):
        raise ValueError("`weights` must be finite, 0 or more, and not all 0")
    return found / found.sum()


def _clause(term: Term) -> str:
    return term.clause or term.label


def _names(labels: Sequence[str]) -> str:
    return ", ".join(f"`{label}`" for label in dict.fromkeys(labels))


def _refused(label: str, why: str, who: str) -> SiteError:
    return SiteError(
        f"`{label}` {why}, and {who} runs the model: call `program.step(batch)` in its place, or `program.loss(batch)`,"
        " which can do it"
    )
