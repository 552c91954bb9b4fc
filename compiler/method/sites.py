"""The rewrite of the forward pass that the clauses ask for: measured layers, hooks, views of examples, loss terms.

Constructs add to a `Rewrite`. It is realised by layers that replace the user's, and by graph passes. Both call the
same operators with the same site numbers, so both give the same results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from trainc.compiler.method.example_units import ExampleUnits
from trainc.compiler.method.layer_hook import KeepOutput, LayerHookSite
from trainc.compiler.method.term import Term
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate
from trainc.runtime.step.observer import Observer


@dataclass(frozen=True, slots=True)
class NormSite:
    """A normalization layer whose per-example squared gradient norms are measured.

    `weight` and `bias` are the parameters' names in the user's model, or None where the layer has none.
    """

    module: str
    layer_type: Literal["layer", "rms"]
    weight: str | None
    bias: str | None
    eps: float | None
    casting: Literal["none", "llama", "gemma"] = "none"
    per_example_gradients: bool = False
    """Whether the examples' gradients are measured, not only their squared norms."""

    @property
    def parameters(self) -> tuple[str | None, ...]:
        """Return the parameter behind each probe column."""
        return (self.weight, self.bias) if self.layer_type == "layer" else (self.weight,)


@dataclass(frozen=True, slots=True)
class LayerSite:
    """Another layer whose per-example squared gradient norms are measured.

    `layer_type` names a kind in `compiler/layers`. `transposed` says that the weight is kept as (inputs, outputs).
    `tied` is the module of the word embedding whose weight this linear layer shares, or of the head that shares this
    embedding's.
    """

    module: str
    layer_type: str
    weight: str
    bias: str | None = None
    transposed: bool = False
    tied: str | None = None

    @property
    def per_example_gradients(self) -> bool:
        """Whether the probe holds the examples' gradients, not only their squared norms."""
        return self.layer_type == "batch_norm"

    @property
    def parameters(self) -> tuple[str | None, ...]:
        """Return the parameter behind each probe column."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


MeasuredSite = NormSite | LayerSite


@dataclass(frozen=True, slots=True)
class Views:
    """A request for several views of every example, which pass through the model in one batch.

    With `share_dropout` the views of an example have one dropout mask. The loss is of the first view, or the mean of
    those of all views.
    """

    label: str
    count: int
    share_dropout: bool
    mean_loss: bool
    gate: Gate | None = None


@dataclass(slots=True)
class Rewrite:
    """Everything that changes in the forward pass; empty means that the user's model runs as it is."""

    norms: list[NormSite] = field(default_factory=list)
    layers: list[LayerSite] = field(default_factory=list)
    measured_at: dict[str, list[Gate | None]] = field(default_factory=dict)
    """The gates of the clauses that measure a layer, by module; one that is not here is measured in every step."""
    hooks: list[LayerHookSite] = field(default_factory=list)
    view_requests: list[Views] = field(default_factory=list)
    terms: dict[str, Term] = field(default_factory=dict)
    """What clauses add to the loss, by label."""
    observers: list[Observer] = field(default_factory=list)
    """What reads the logits of training steps."""
    example_units: ExampleUnits | None = None
    """What one example is, if it is not a row of the batch."""

    chunks: int | None = None
    """Into how many parts of rows the head's logits are divided, 0 where their size decides; None: they are whole."""

    checkpointed: list[str] = field(default_factory=list)
    """Modules whose activations are not kept, but computed again in the backward pass."""
    compiled: bool = False
    """Whether a compiler gets the passes, which cannot look into operators of ours."""

    @property
    def modules_only(self) -> str | None:
        """Return why this must run module by module; None if a captured graph can run it."""
        if self.checkpointed:
            return "activation checkpoints run modules again in the backward pass"
        if self.example_units is not None:
            return "examples that are not rows of the batch need bound modules"
        if any(site.per_example_gradients for site in self.norms):
            return "per-example gradients, beyond their norms, need bound modules"
        reasons = (site.hook.modules_only for site in self.hooks)
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def measured(self) -> tuple[MeasuredSite, ...]:
        """Return every measured layer."""
        return (*self.norms, *self.layers)

    @property
    def fused_norms(self) -> tuple[NormSite, ...]:
        """Return every norm that passes turn into one operator: those that are measured, and those of hooks."""
        measured = {site.module for site in self.norms}
        of_hooks = {s.module: s.hook.norm for s in self.hooks if s.module not in measured}
        return (*self.norms, *(norm for norm in of_hooks.values() if norm is not None))

    def replaced(self) -> Iterator[tuple[LayerHookSite, bool]]:
        """Yield the hooks that replace measured layers, and whether measuring does what the hook does."""
        layer_types = {site.module: site.layer_type for site in self.measured}
        for site in self.hooks:
            if site.hook.replaces and site.module in layer_types:
                done = site.hook.done_by_measuring(layer_types[site.module], self.example_units)
                yield site, done and site.gate is None

    @property
    def captures(self) -> dict[str, KeepOutput]:
        """Return what keeps the results of captured modules, by module, and what keeps of their inputs, by its key."""
        keeping = ((s.hook, s.module) for s in self.hooks if isinstance(s.hook, KeepOutput))
        return {hook.key(module): hook for hook, module in keeping}

    @property
    def leaves_checkpoints(self) -> bool:
        """Whether gradients pass by the results of activation checkpoints.

        They do from a term to what is captured, and from a head to the embedding that shares its weight. A reentrant
        checkpoint, which runs without gradients, would cut them off.
        """
        read = bool(self.captures) and any(not term.of_parameters for term in self.terms.values())
        return read or any(site.tied for site in self.layers)

    @property
    def zero_is_identity(self) -> bool:
        """Whether the forward pass is the user's own where every scheduled number is 0."""
        grouped = any(site.per_example_gradients for site in self.layers)
        return not grouped and all(site.hook.zero_is_identity for site in self.hooks)

    @property
    def views(self) -> int:
        """Return how many copies of each example pass through the model."""
        return max((one.count for one in self.view_requests), default=1)

    @property
    def share_dropout(self) -> bool:
        """Return whether the views of an example have one dropout mask."""
        return any(one.share_dropout for one in self.view_requests)

    @property
    def mean_loss(self) -> bool:
        """Return whether the loss is the mean of the losses of all views, not that of the first."""
        return any(one.mean_loss for one in self.view_requests)

    @property
    def of_examples(self) -> bool:
        """Return whether a loss term is a mean over examples, also over those without a target that counts."""
        return any(term.over == "examples" for term in self.terms.values())

    @property
    def reads_passes(self) -> bool:
        """Whether a term of the loss reads what the passes give: then the loss without such terms has a metric."""
        return any(not term.of_parameters for term in self.terms.values())

    @property
    def joint(self) -> Term | None:
        """Return the term that one operator can compute together with a cross-entropy of the first view."""
        if self.mean_loss:
            return None
        return next((term for term in self.terms.values() if term.joint is not None), None)

    @property
    def timed(self) -> bool:
        """Return whether something has a gate, and so may be absent from a step."""
        gates = [*(site.gate for site in self.hooks), *(one.gate for one in self.view_requests)]
        gates += [*(term.gate for term in self.terms.values()), *(o.gate for o in self.observers)]
        measured = (None in wanted for wanted in self.measured_at.values())
        return any(gate is not None for gate in gates) or not all(measured)

    def at(self, clock: Clock) -> Rewrite:
        """Return what changes in the step at this clock: without what has a gate that is closed."""
        if not self.timed:
            return self
        gated = (self.hooks, self.view_requests, [*self.terms.values()], self.observers)
        if all(_is_open(one.gate, clock) for kind in gated for one in kind) and all(
            self._measures(site, clock) for site in self.measured
        ):
            return self
        views = [one for one in self.view_requests if _is_open(one.gate, clock)]
        norms = [site for site in self.norms if self._measures(site, clock)]
        layers = [site for site in self.layers if self._measures(site, clock)]
        return replace(
            self,
            norms=norms,
            layers=layers,
            example_units=self.example_units if norms or layers else None,
            hooks=[
                site
                for site in self.hooks
                if _is_open(site.gate, clock) and (views or not site.hook.of_views)
            ],
            view_requests=views,
            terms={n: term for n, term in self.terms.items() if _is_open(term.gate, clock)},
            observers=[one for one in self.observers if _is_open(one.gate, clock)],
        )

    def _measures(self, site: MeasuredSite, clock: Clock) -> bool:
        return fires_any(self.measured_at.get(site.module, (None,)), clock)

    def ignore_times(self) -> None:
        """Keep all that has a gate open in every step, for those who look at a graph or compare numbers."""
        self.measured_at = {}
        self.hooks = [replace(site, gate=None) for site in self.hooks]
        self.view_requests = [replace(one, gate=None) for one in self.view_requests]
        self.terms = {label: replace(term, gate=None) for label, term in self.terms.items()}

    def __bool__(self) -> bool:
        return bool(self.measured or self.hooks or self.view_requests or self.chunks is not None)


def fires_any(gates: Iterable[Gate | None], clock: Clock) -> bool:
    """Say whether one of several gates is open; None is one that always is."""
    return any(_is_open(gate, clock) for gate in gates)


def drawn_apart(what: str) -> str:
    """Return the note on what draws random numbers for each view of an example, where its views share one mask."""
    return (
        f"{what} draws random numbers for each view of an example apart, so that the distance of the views measures"
        " them as well: use nn.Dropout modules, which share their masks, or a dropout of 0 there"
    )


def _is_open(gate: Gate | None, clock: Clock) -> bool:
    return gate is None or gate.fires(clock)
