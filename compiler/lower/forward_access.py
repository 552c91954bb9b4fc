"""Mechanisms for the passes of a step: several views of an example, loss terms, and what only reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Literal

from torch import Tensor, nn

from trainc.compiler.errors import FieldError
from trainc.compiler.lower.clause_access import ClauseAccess
from trainc.compiler.method.layer_hook import (
    KeepInput,
    KeepOutput,
    LayerHook,
    LayerHookSite,
    WeightSite,
)
from trainc.compiler.method.loss import LOSS_WEIGHT, PARAMETER_WEIGHT
from trainc.compiler.method.lowered_method import Scheduled
from trainc.compiler.method.shared_mask import SharedMask
from trainc.compiler.method.sites import Views
from trainc.compiler.method.term import SAMPLE_IDS, Forward, JointOperator, Over, Term
from trainc.compiler.method.weight_hook import WeightHook
from trainc.compiler.structure.computed_weights import refuse_computed
from trainc.dsl.values.value_json import Expr, Selector
from trainc.runtime.companion.companion import Companion
from trainc.runtime.companion.history import History
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.step.observer import Observer, Passes

_OF_STEP = ("key", "first_example", LOSS_WEIGHT, PARAMETER_WEIGHT, SAMPLE_IDS)
"""Names of what every micro-batch has."""


class ForwardAccess(ClauseAccess):
    """One clause's access to the passes of a step."""

    # Layers

    def layer(
        self,
        module: str,
        hook: LayerHook,
        scalars: Mapping[str, Scheduled] | None = None,
        *,
        lasting: bool = False,
    ) -> None:
        """Change what a layer does in train mode, by a `LayerHook` that sees `scalars` as they are in each step.

        Hooks of several clauses on one layer act in the order of the spec. While the clause's gate is closed the layer
        runs as it is, unless the hook is `lasting`. Raises ValueError where another clause replaces its forward pass,
        too.
        """
        hooks, gate = self._method.rewrite.hooks, None if lasting else self.gate()
        for other in hooks:
            if hook.replaces and other.hook.replaces and other.module == module:
                if (other.hook, other.gate, other.scalars) == (hook, gate, ()) and not scalars:
                    return
                raise ValueError(
                    f"`{other.label}` also replaces how `{module}` computes its result: {hook.conflict(other.hook)}"
                )
        site = self._hook(module, hook, self._numbers(module, scalars))
        hooks[-1] = replace(site, gate=gate)

    def weight(
        self,
        parameter: str,
        hook: WeightHook,
        scalars: Mapping[str, Scheduled] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Let layers compute in train mode with a function of a parameter in its place, by a `WeightHook`.

        The hook sees `scalars` as they are in each step, and `tensors`, by these names in `at.scalars`. Hooks of
        several clauses on one parameter act in the order of the spec. While the clause's gate is closed layers have the
        parameter itself. A use of the parameter outside of the layers that hold it is an error of the first step.
        """
        self._refuse_unchangeable(parameter)
        named = self._numbers(parameter, scalars)
        for given, tensor in (tensors or {}).items():
            named[given] = self._unused(f"{given}:{parameter}")
            self._method.tensors[named[given]] = tensor
        stored, index = self.tensor(parameter), None
        for module in self.inventory.parameter[parameter].modules:
            own = self.model.get_submodule(module)._parameters
            for attribute in [name for name, one in own.items() if one is stored]:
                site = self._hook(module, hook, named)
                index = site.index if index is None else index
                changed = replace(site, weight=WeightSite(parameter, attribute, index))
                self._method.rewrite.hooks[-1] = changed

    def _refuse_unchangeable(self, parameter: str) -> None:
        """Raise ValueError for a parameter that layers cannot compute with another tensor in place of."""
        refuse_computed(self.model, parameter)
        stored, owners = self.tensor(parameter), self.inventory.parameter[parameter].modules
        if not stored.is_floating_point():
            raise ValueError(
                f"`{parameter}` has entries of {stored.dtype}, and only real floating-point weights can be changed:"
                " exclude it from `on`"
            )
        if self.has_sparse_gradient(parameter):
            raise ValueError(
                f"the gradient of `{parameter}` is sparse, and a changed weight has a dense one: build its layer with"
                " `sparse=False`, or exclude it from `on`"
            )
        layers = map(self.model.get_submodule, owners)
        if any(getattr(layer, "max_norm", None) is not None for layer in layers):
            raise ValueError(
                f"the layer of `{parameter}` writes to its weight while it runs (`max_norm`), and would write to a"
                " changed copy: build it without `max_norm`, or exclude it from `on`"
            )

    def _numbers(self, place: str, scalars: Mapping[str, Scheduled] | None) -> dict[str, str]:
        """Return names in the method for the numbers of a hook at a place, which become those of the clock."""
        named = {}
        for name, value in (scalars or {}).items():
            named[name] = self._unused(f"{name}:{place}")
            self._method.scalars[named[name]] = self.while_open(value)
        return named

    def _hook(self, module: str, hook: LayerHook, named: Mapping[str, str]) -> LayerHookSite:
        """Add a hook to a layer."""
        hooks = self._method.rewrite.hooks
        alike = sum(other.hook.draws == hook.draws for other in hooks)
        index = alike if hook.draws else -1 - alike
        site = LayerHookSite(module, hook, index, self.label, tuple(named.items()), self.gate())
        hooks.append(site)
        return site

    def capture(self, modules: Iterable[str]) -> None:
        """Keep what these modules give in the passes of a step, for `forward.captured` of terms and observers.

        It is a list by module with one tensor a call, of all views: the result, or the first tensor of a tuple, as it
        is before what follows changes it in place. Gradients of terms flow through it. While the clause's gate is
        closed nothing is kept.
        """
        for module in modules:
            self.layer(module, KeepOutput())

    def capture_inputs(
        self, modules: Iterable[str], of: Callable[[Tensor], Tensor], gate: Gate | None = None
    ) -> dict[str, str]:
        """Keep a function of what these modules are given, for `forward.captured`; return its name there, by module.

        `of` maps the first input of a call, of all views, to what is kept, without gradient; `forward.captured` has a
        list with a tensor for each call. While `gate` is closed, the clause's unless given, nothing is kept.
        """
        keys = {}
        for module in modules:
            hook = KeepInput(of, self.label)
            site = self._hook(module, hook, {})
            if gate is not None:
                self._method.rewrite.hooks[-1] = replace(site, gate=gate)
            keys[module] = hook.key(module)
        return keys

    def checkpoint_activations(self, field: str, selector: Selector) -> None:
        """Keep of the passes of the modules that a field selects their inputs alone, and run them again in backward.

        Numbers stay the same: random numbers and buffers of the second pass are those of the first. Raises FieldError
        for a module that is never called, such as a list of others.
        """
        for name in self.select(selector, "modules"):
            module = self.model.get_submodule(name)
            if type(module).forward is nn.Module.forward:
                raise FieldError(
                    field,
                    f"`{name}` ({type(module).__name__}) holds modules and is never called, so it has no activations:"
                    f' select the modules in it, as in `"{name}.*"`',
                )
            if name not in self._method.rewrite.checkpointed:
                self._method.rewrite.checkpointed.append(name)

    # The loss, and what reads the passes

    def views(
        self,
        count: int,
        *,
        share_dropout: bool,
        loss: Literal["first", "mean"] = "first",
        every: int | None = None,
    ) -> None:
        """Pass every example several times, in one batch; the loss is of the first view, or the mean of all views'.

        While the clause's gate is closed examples pass once, with `every` in all but one of that many steps, too. With
        `share_dropout` the views of an example have one mask in each dropout and drop path. A graph runs what the views
        have in common once (`pair_late`); the bound modules pass all views through the whole model, with the same
        numbers. Raises ValueError where another clause asks for other views.
        """
        gate = self._gate_in(every)
        wanted = Views(self.label, count, share_dropout, loss == "mean", gate)
        for other in self._method.rewrite.view_requests:
            if replace(other, label=wanted.label, gate=wanted.gate) != wanted:
                raise ValueError(
                    f"`{other.label}` passes every example {other.count} times"
                    f" {'with one dropout mask' if other.share_dropout else 'with a dropout mask for each'}, and this"
                    f" clause {count} times {'with one' if share_dropout else 'with one for each'}; their losses must"
                    " be those of the same views too: use one of the two clauses"
                )
        self._method.rewrite.view_requests.append(wanted)
        if share_dropout:
            self._share_masks()

    def _share_masks(self) -> None:
        """Let the views of an example share what is dropped by layers that multiply by a random mask."""
        hooks = self._method.rewrite.hooks
        known = {site.module for site in hooks if isinstance(site.hook, SharedMask)}
        for name, module in self.model.named_modules():
            if name not in known and SharedMask.fits(module):
                alike = sum(not other.hook.draws for other in hooks)
                hooks.append(LayerHookSite(name, SharedMask(), -1 - alike))

    def _gate_in(self, every: int | None) -> Gate | None:
        """Return the clause's gate, or one that is open in one of `every` steps of those where the clause's is.

        Raises ValueError where the clause has an `every` of its own as well.
        """
        if every is None:
            return self.gate()
        self.refuse_times(f"`{self.label}` says itself in which steps it acts", "every")
        self._times_obeyed = True
        return self._gate_of(TimeSpan(every, "steps"))

    def term(
        self,
        value: Callable[[Forward], Tensor],
        *,
        over: Over,
        weight: Expr | None = None,
        metric: str | None = None,
        scalars: Mapping[str, Scheduled] | None = None,
        tensors: Mapping[str, Tensor | Callable[[], Tensor]] | None = None,
        joint: JointOperator | None = None,
        companions: Sequence[Companion] = (),
        what: str | None = None,
        of_classes: bool = False,
        sample_ids: bool = False,
        histories: Sequence[History] = (),
        every: int | None = None,
    ) -> None:
        """Add a term to the loss; while the clause's gate is closed it is not computed, and its metric is 0.

        `value(forward)` is 0-d, and a mean `over` counted targets or examples, or a function of parameters: from it
        accumulation over micro-batches is exact. It is multiplied by `weight`; its metric, named `metric` or as the
        clause, is the value before. `scalars` and `tensors` reach it as `forward.tensors`, by these names, logits of
        `companions` by `forward.logits_of`. A function among `tensors` is asked in every micro-batch, as for a buffer.
        `joint` is an operator for the term and a cross-entropy together; `what` names the value in the summary of a
        run. With `of_classes` it reads logits as those of classes, and the clause is an error if the loss has other
        targets. With `sample_ids` it reads `forward.sample_ids`, and of `histories` the last logits of each sample by
        `forward.previous`: a step without sample ids is then an error. With `every` it is computed in one of that many
        steps. Raises ValueError for a second term of one name.
        """
        label = metric or self.label
        if label in (*self._method.rewrite.terms, *(p.label for p in self._method.loss_parts)):
            raise ValueError(
                f"two terms of the loss would have the metric `{label}`: give each a `metric` of its own in `to.term`"
            )
        of_weight = None
        several = over == "targets" and self._method.losses.is_sum
        if weight is not None or over == "examples" or several:
            of_weight = f"weight:{label}"
            schedule = (lambda clock: 1.0) if weight is None else self.schedule(weight)
            self._method.scalars[of_weight] = self.while_open(schedule)
        named = {}
        for number, scheduled in (scalars or {}).items():
            named[number] = self._unused(number)
            self._method.scalars[named[number]] = self.while_open(scheduled)
        for given, tensor in (tensors or {}).items():
            named[given] = self._unused(given)
            if callable(tensor):
                self._method.live_tensors[named[given]] = tensor
            else:
                self._method.tensors[named[given]] = tensor
        of_term = tuple(companions), of_classes, sample_ids, tuple(named.items()), self.label
        gate = self._gate_in(every)
        term = Term(label, value, over, of_weight, gate, joint, what, *of_term, tuple(histories))
        self._method.rewrite.terms[label] = term

    def _unused(self, name: str) -> str:
        """Return a name of a number or tensor in the method that no other clause or call has: `name` where it can."""
        held = self._method.scalars, self._method.tensors, self._method.live_tensors
        taken = {*chain(*held), *_OF_STEP}
        candidates = chain(
            (name, f"{name}:{self.label}"), (f"{name}:{self.label}:{i}" for i in count(2))
        )
        return next(one for one in candidates if one not in taken)

    def observe(
        self, observer: Observer, of: Passes = "training", gate: Gate | None = None
    ) -> None:
        """Let `observer` read every micro-batch of the steps in which the clause's gate is open, or of evaluations.

        It sees logits, targets, inputs and parameters, and changes nothing; what it finds are signals of the clause,
        under the clause's label. While the gate is closed nothing is kept for it; `gate` may take its place.
        Evaluations are read between `from` and `until`: `every` is then an error. Where its class says `sample_ids` it
        reads `forward.sample_ids` of training steps. Raises ValueError for one that reads those of evaluations.
        """
        observer.of, observer.name = of, self.label
        if of == "evaluation" and observer.sample_ids:
            raise ValueError(
                "sample ids number the training data, and this observer would read those of evaluations: observe"
                ' `of="training"`'
            )
        if of == "evaluation":
            self.refuse_times("the period of evaluations is `eval` in `run`", "every")
        observer.gate = gate or self.gate()
        observers = self._method.evaluation_observers
        (observers if of == "evaluation" else self._method.rewrite.observers).append(observer)
        self._method.actions.append(observer)
