"""How `noise_scale gns` is lowered: the sites that measure, and the action that estimates."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trainc.compiler.layers.ghost_batch_norm import (
    GhostBatchNorm,
    check_momentum,
    ghost_site,
)
from trainc.compiler.layers.registry import site_of
from trainc.compiler.layers.tied_weights import sites_of
from trainc.compiler.method.example_units import Documents, ExampleUnits, Groups
from trainc.compiler.method.sites import MeasuredSite, NormSite
from trainc.compiler.method.statistic import (
    OfExamples,
    OfMicroBatches,
    OfReplicas,
    OfSomeExamples,
)
from trainc.compiler.model.batch_statistics import batch_norms
from trainc.dsl.values.value_json import Duration
from trainc.runtime.noise_scale.action import NoiseScaleAction
from trainc.runtime.noise_scale.settings import HalfLifeUnit, NoiseScaleSettings

if TYPE_CHECKING:
    from torch import nn

    from trainc.compiler.constructs.noise_scale.gns import Gns
    from trainc.compiler.lower.lowering import Lowering

Measured = dict[str, tuple[str, ...]]
"""The names of the measured parameters, by module."""


def lower(rule: Gns, to: Lowering) -> None:
    """Have what the method compares measured in every backward pass, and read before gradients change."""
    trainable = {p.name for p in to.inventory.parameters if to.tensor(p.name).requires_grad}
    if rule.method in ("micro_batch", "replica"):
        measured = _batch_gradients(rule, to, trainable)
    else:
        measured = _examples(rule, to, trainable)
    if rule.calibrate is not None:
        to.statistic(OfSomeExamples(rule.calibrate, rule.calibrate_examples))
    to.action(NoiseScaleAction(to.label, measured, _settings(rule, to)))


def _batch_gradients(rule: Gns, to: Lowering, trainable: set[str]) -> Measured:
    measured: Measured = {}
    for entry in to.modules():
        held = (to.inventory.parameter[name].name for name in entry.parameters)
        names = tuple(name for name in held if name in trainable)
        measured |= {entry.name: names} if names else {}
    every = tuple(dict.fromkeys(name for owned in measured.values() for name in owned))
    to.statistic(OfReplicas(every) if rule.method == "replica" else OfMicroBatches(every))
    return measured


def _examples(rule: Gns, to: Lowering, trainable: set[str]) -> Measured:
    measured: Measured = {}
    sites = _sites(rule, to)
    to.statistic(OfExamples(tuple(sites), _example_units(rule)))
    for site in sites:
        known = (to.inventory.parameter[n].name for n in site.parameters if n is not None)
        measured[site.module] = tuple(name for name in known if name in trainable)
    return measured


def _sites(rule: Gns, to: Lowering) -> list[MeasuredSite]:
    entries = [entry for entry in to.modules() if entry.parameters]
    grouped = _group_batch_norms(rule, to)

    def recognise(name: str, module: nn.Module) -> MeasuredSite:
        return (ghost_site if name in grouped else site_of)(name, module)

    wanted = {to.inventory.parameter[n].name for entry in entries for n in entry.parameters}
    names = [entry.name for entry in entries]
    gradients = rule.gradients_setting is not None
    return [
        replace(site, per_example_gradients=gradients) if isinstance(site, NormSite) else site
        for site in sites_of(names, wanted, to.model, to.inventory, recognise)
    ]


def _group_batch_norms(rule: Gns, to: Lowering) -> list[str]:
    """Let BatchNorm layers normalize by groups where these are compared, and return their names."""
    if rule.method != "ghost":
        return []
    grouped = list(batch_norms(to.model))
    if grouped:
        reason = f"`{to.label}` changes how layers normalize, in the whole run"
        to.refuse_times(reason, "from", "until", "every")
    for name in grouped:
        check_momentum(name, to.model.get_submodule(name))
        to.layer(name, GhostBatchNorm(rule.group))
    return grouped


def _example_units(rule: Gns) -> ExampleUnits | None:
    if rule.separator is not None:
        return Documents(rule.separator)
    return Groups(rule.group) if rule.method == "ghost" else None


def _settings(rule: Gns, to: Lowering) -> NoiseScaleSettings:
    half_life, unit = _half_life(rule, to)
    return NoiseScaleSettings(
        half_life,
        unit,
        rule.errors,
        rule.level,
        rule.method,
        rule.geometry,
        rule.interval == "jackknife",
        None if rule.calibrate is None else rule.calibrate_smooth,
        "documents" if rule.example == "document" else "samples",
    )


def _half_life(rule: Gns, to: Lowering) -> tuple[float, HalfLifeUnit]:
    """Return `smooth` in samples or tokens, or in steps where the batch size is not known."""
    unit = rule.smooth.unit
    if unit in ("tokens", "samples"):
        return rule.smooth.amount, "tokens" if unit == "tokens" else "samples"
    steps = to.steps(rule.smooth)
    try:
        return steps / to.steps(Duration(1, "samples")), "samples"
    except ValueError:
        return steps, "steps"
