"""The rewrite of the forward pass that the clauses ask for: measured layers, noise, two views of every example.

Constructs add to a `Rewrite`. It is realised by layers that replace the user's, and by graph passes. Both call the
same operators with the same site numbers, so both give the same results.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from trainc.compiler.method.example_units import ExampleUnits
from trainc.runtime.schedule.clock import Clock
from trainc.runtime.schedule.gate import Gate


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
class NoiseSite:
    """A layer whose output is multiplied by `1 + sigma * normal`; `index` is its site number in the counter."""

    module: str
    index: int
    share: Literal["token", "none"] = "token"
    gate: Gate | None = None

    @property
    def scalar(self) -> str:
        """Return the name of the 0-d tensor that carries this site's sigma."""
        return f"sigma:{self.module}"


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two views of every example and a distance between their outputs."""

    distance: Literal["mse", "kl"]
    label: str = "consistency"
    gate: Gate | None = None

    @property
    def weight(self) -> str:
        """Return the name of the 0-d tensor that carries the distance's weight."""
        return f"weight:{self.label}"


@dataclass(slots=True)
class Rewrite:
    """Everything that changes in the forward pass; empty means that the user's model runs as it is."""

    norms: list[NormSite] = field(default_factory=list)
    layers: list[LayerSite] = field(default_factory=list)
    noises: list[NoiseSite] = field(default_factory=list)
    pairing: Pairing | None = None
    ghosts: list[str] = field(default_factory=list)
    """Layers that normalize over the batch and now normalize over each group of examples."""
    example_units: ExampleUnits | None = None
    """What one example is, if it is not a row of the batch."""

    @property
    def modules_only(self) -> str | None:
        """Return why this must run module by module; None if a captured graph can run it."""
        if self.example_units is not None:
            return "examples that are not rows of the batch need bound modules"
        if any(site.per_example_gradients for site in self.norms):
            return "per-example gradients, beyond their norms, need bound modules"
        return None

    @property
    def measured(self) -> tuple[MeasuredSite, ...]:
        """Return every measured layer."""
        return (*self.norms, *self.layers)

    @property
    def views(self) -> int:
        """Return how many copies of each example pass through the model."""
        return 2 if self.pairing else 1

    def at(self, clock: Clock) -> Rewrite:
        """Return what changes in the step at this clock: without noise and views whose gate is closed."""
        noises = [site for site in self.noises if site.gate is None or site.gate.fires(clock)]
        pairing = self.pairing
        if pairing is not None and pairing.gate is not None and not pairing.gate.fires(clock):
            pairing = None
        if len(noises) == len(self.noises) and pairing is self.pairing:
            return self
        return replace(self, noises=noises, pairing=pairing)

    def __bool__(self) -> bool:
        return bool(self.measured or self.noises or self.pairing)
