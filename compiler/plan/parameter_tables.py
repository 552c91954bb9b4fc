"""The plan's tables of parameters: what acts on each, and how much of the weights each clause reaches."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

from trainc.compiler.bind.binding import Binding
from trainc.compiler.method.lowered_method import LoweredMethod, OptimizerPart
from trainc.compiler.plan.plan import Row
from trainc.runtime.step.optimizer import LrFactor, Option, parts_of


def parameter_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return one row per parameter: its optimizer, decay, rate factors, mask, and the other clauses that select it."""
    claimed = {n: part for part in method.optimizers for n in part.targets}
    every = [*method.lr_factors.values(), *method.option_factors.values()]
    factors_of = {f.policy for found in every for f in found if f.of in ("lr", "weight_decay")}
    shown = ("optimizer", "mask")  # in columns of their own, as are factors on rates and decays
    others = [c for c in binding.active if c.kind not in shown and c.label not in factors_of]
    acting = {action.name for action in method.actions}
    rows = []
    for p in binding.inventory.parameters:
        part = None if p.name in method.frozen else claimed.get(p.name)
        mask = method.masks.get(p.name)
        factors = [] if part is None else method.lr_factors.get(p.name, [])
        decay_factors = [] if part is None else method.option_factors.get(p.name, [])
        selecting = [c.label for c in others if not {p.name, *p.modules}.isdisjoint(c.targets)]
        rows.append(
            {
                "name": p.name,
                "shape": list(p.shape),
                "aliases": list(p.aliases),
                "depth": round(p.place.depth, 4),
                "level": p.place.level,
                "optimizer": part and part.label,
                "lr": part and _own_rate(part, p.name),
                "decay": part and _number(part.option(p.name, "weight_decay")),
                "lr_factors": [factor.policy for factor in factors],
                "lr_units": [factor.unit for factor in factors],
                "lr_values": [_value(factor, acting) for factor in factors],
                "decay_factors": [f.policy for f in decay_factors if f.of == "weight_decay"],
                "decay_values": [
                    _value(f, acting) for f in decay_factors if f.of == "weight_decay"
                ],
                "mask": mask and mask.describe(),
                "clauses": selecting,
            }
        )
    return rows


def share_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return how many parameters and entries each clause reaches, and what fraction of the trained entries that is.

    Each weight decay of an optimizer has a row of its own.
    """
    inventory = binding.inventory
    trained = {n for part in method.optimizers for n in part.targets} - method.frozen
    total = sum(inventory.parameter[name].numel for name in trained)
    rows = []
    for clause, what, names in _reached(binding, method):
        reached = [p for p in inventory.parameters if p.name in names]
        entries = sum(p.numel for p in reached)
        of_trained = sum(p.numel for p in reached if p.name in trained)
        rows.append(
            {
                "clause": clause,
                "what": what,
                "parameters": len(reached),
                "entries": entries,
                "share": round(of_trained / total, 6) if total else 0.0,
            }
        )
    return rows


def measured_rows(method: LoweredMethod) -> list[Row]:
    """Return one row per weight that a clause measures: its parts, their sizes, and why it divides into them."""
    return [
        {
            "clause": one.clause,
            "weight": one.weight,
            "parts": list(one.parts),
            "sizes": list(one.sizes),
            "reason": one.reason,
        }
        for one in method.measured
    ]


def _reached(binding: Binding, method: LoweredMethod) -> Iterator[tuple[str, str, set[str]]]:
    """Yield each clause, what it does, and the parameters that it reaches."""
    for part in method.optimizers:
        own = [name for name in part.targets if name not in method.frozen]
        yield part.label, "trains", set(own)
        for what, names in _by_option(part, own):
            yield part.label, what, names
    if method.frozen:
        yield "", "frozen", set(method.frozen)
    for clause in binding.active:
        if clause.kind != "optimizer" and clause.construct.targets != "none":
            yield clause.label, clause.title, _parameters(binding, clause.targets)


def _by_option(part: OptimizerPart, own: Sequence[str]) -> Iterator[tuple[str, set[str]]]:
    """Yield each weight decay above 0, and the other options of which parameters have different ones."""
    decays: dict[str | float, set[str]] = {}
    for name in own:
        decays.setdefault(_number(part.option(name, "weight_decay")), set()).add(name)
    for decay in sorted(decays, key=str):
        if decay:
            text = decay if isinstance(decay, str) else f"{decay:g}"
            yield f"weight decay {text}", decays[decay]
    for option in dict.fromkeys(key for name in own for key in part.options[name]):
        texts: dict[str, set[str]] = {}
        for name in own:
            value = part.options[name].get(option, ())
            texts.setdefault(", ".join(one.text for one in parts_of(value)), set()).add(name)
        if option != "weight_decay" and len(texts) > 1:
            yield from ((f"{option} {text}", names) for text, names in texts.items())


def _number(option: Option) -> float | str:
    return option.text if option.constant is None else option.constant


def _value(factor: LrFactor, acting: Container[str]) -> float | str | None:
    """Return a factor that is the same in the whole run, or the limits of another as text; None where it has none."""
    if factor.limits is not None:
        return "{:g}..{:g}".format(*factor.limits)
    return None if factor.schedule or factor.policy in acting else factor.factor


def _own_rate(part: OptimizerPart, name: str) -> str | None:
    """Return the learning rate of a parameter, as the spec writes it, where it is not that of all."""
    option = part.option(name, "lr")
    return option.text if option.part else None


def _parameters(binding: Binding, targets: Iterable[str]) -> set[str]:
    """Return the parameters among the targets of a clause, and those that its modules hold themselves."""
    chosen = set(targets)
    return {
        p.name for p in binding.inventory.parameters if not chosen.isdisjoint((p.name, *p.modules))
    }
