"""Specs that together hold every construct, packed so that those which exclude each other stand in different ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch

import trainc
from examples.data import Data, Examples
from trainc.compiler.driver.compile import resolve_spec
from trainc.dsl.reading.construct import Construct
from trainc.dsl.text.errors import SpecError

RUN = """run {
    length = 12 steps, seed = 7, eval = 3 steps, eval_batches = 1, checkpoint = 2 steps, keep = 2
}
"""
BASES = {
    "text": """model "examples.models:gpt" { layers = 1, width = 64, heads = 2, context = 16, dropout = 0.1 }
data "examples.data:stdlib" {
    batch = ramp(4 samples, to = 8 samples, over = 60%),
    micro = 2 samples,
    context = 16,
    limit_bytes = 30_000,
}
loss cross_entropy
when loss > 0 cooldown 5 steps { warn "positive" }
""",
    "images": """model "examples.models:resnet" { width = 4, stages = 1 }
data "examples.data:digits" { batch = 64 samples }
loss cross_entropy { label_smoothing = 0.1 }
when loss > 0 for 4 steps { warn "positive" }
""",
    "numbers": """model "examples.models:teacher_student" { dimension = 8 }
data "benchmarks.kill_specs:signs" { batch = 8 samples, dimension = 8 }
loss mse
when loss > 0 for 9 steps { stop }
""",
}
"""What every spec has, by name; which constructs are added follows from the catalog."""


@dataclass
class KillSpec:
    """A spec, as the clauses it is made of."""

    base: str
    loss: str | None = None
    """A loss in place of that of the base."""
    clauses: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The spec."""
        base = BASES[self.base] + RUN
        if self.loss is not None:
            base = re.sub(r"^loss .*$", self.loss, base, flags=re.MULTILINE)
        return "\n".join([base, *self.clauses, ""])

    def add(self, construct: type[Construct], warned: bool = False) -> bool:
        """Add the construct's example if the spec can then be planned, without a warning unless `warned`."""
        clause = shortened(construct.usage)
        try:
            plan = trainc.plan(replace(self, clauses=[*self.clauses, clause]).text)
        except SpecError:
            return False
        if not warned and any(warning.rule == "no-effect" for warning in plan.warnings):
            return False
        self.clauses.append(clause)
        self.names.append(f"{construct.kind} {construct.name}")
        return True


def shortened(usage: str) -> str:
    """Return a clause whose counts of steps fit into a run of a few."""
    return re.sub(r"\b\d+ (steps|samples)\b", lambda found: f"2 {found[1]}", usage)


def every_construct() -> list[KillSpec]:
    """Return specs that together hold every construct of the catalog; raises LookupError for one that fits nowhere."""
    catalog = trainc.catalog()
    given = set()
    for base in BASES:
        spec, _ = resolve_spec(KillSpec(base).text)
        given |= {type(clause.construct) for clause in spec.clauses}
    rest = [key for key, construct in catalog.items() if construct not in given]
    optimizers = [key for key in rest if key[0] == "optimizer"]
    bases = [*BASES]
    specs: list[KillSpec] = []
    for number, key in enumerate(optimizers):
        order = bases[number % len(bases) :] + bases[: number % len(bases)]
        specs.append(_new(order, [catalog[key]], catalog[key]))
    for key in rest:
        if key in optimizers:
            continue
        construct = catalog[key]
        if not any(spec.add(construct) for spec in specs):
            specs.append(_new(bases, [catalog[one] for one in optimizers], construct))
    return specs


def _new(
    bases: Sequence[str], optimizers: Sequence[type[Construct]], construct: type[Construct]
) -> KillSpec:
    loss = construct.usage if construct.kind == "loss" else None
    for warned, base, optimizer in product((False, True), bases[:: -1 if loss else 1], optimizers):
        spec = KillSpec(base, loss)
        if not spec.add(optimizer, warned):
            continue
        if loss is not None:
            spec.names.append(f"{construct.kind} {construct.name}")
        elif optimizer is not construct and not spec.add(construct, warned):
            continue
        return spec
    raise LookupError(
        f"`{construct.kind} {construct.name}` fits into no spec: add what it needs to BASES"
    )


def signs(dimension: int = 8, samples: int = 256) -> Data:
    """Return inputs (B, dimension) and targets (B, 1) of 0 and 1, which losses of numbers and of yes or no take."""
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples + 32, dimension, generator=source)
    targets = (inputs.sum(1, keepdim=True) > 0).float()
    return Data(
        Examples(inputs[:samples], targets[:samples]), Examples(inputs[samples:], targets[samples:])
    )


def _describe_signs(dimension: int = 8, samples: int = 256) -> dict[str, int]:
    return {"samples": samples, "tokens_per_sample": 1}


signs.describe = _describe_signs  # type: ignore[attr-defined]
