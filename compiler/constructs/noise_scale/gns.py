"""The gradient noise scale, measured in the backward pass of the layers it is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainc.compiler.constructs.noise_scale._requirements import single_micro_batch, uncalibrated
from trainc.dsl.reading.construct import Construct, Duration, Effect, Problem
from trainc.dsl.values import value_json as v

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.example_units import ExampleUnits
    from trainc.compiler.method.sites import MeasuredSite
    from trainc.compiler.model.inventory import ModuleEntry, ParameterEntry
    from trainc.runtime.noise_scale.action import Settings, Unit
    from trainc.runtime.noise_scale.estimate import Estimate

_MIXES = "normalizes over the batch: examples have no gradients of their own"
_NORMS = ("LayerNorm", "RMSNorm")
_LAYERS = (
    *_NORMS, "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "Linear", "Embedding",
    "Conv1d", "Conv2d", "Conv3d", "Conv1D",
)  # fmt: skip


class Gns(Construct):
    """Measures B_simple = tr(Sigma) / |G|^2, the batch size at which noise and signal are equal.

    From each example's share c_b = w_b g_b of the step's gradient, with q = sum w_b^2:
    |G|^2 = (|sum c_b|^2 - sum |c_b|^2) / (1 - q),
    tr(Sigma) = (sum |c_b|^2 / q - |sum c_b|^2) / (1 - q).
    Both are averaged first and divided then; while one of the averages is not above zero the noise
    scale is undetermined, NaN, and the summary says why. Gradients are those before clipping. A
    loss term on the measured weights themselves (weight penalties) counts as signal. It only
    reports: a rule or a `batch` policy acts on it.
    """

    cite: ClassVar = (
        "Gray et al., Normalization Layer Per-Example Gradients, NeurIPS 2024, arXiv:2411.00999; "
        "McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162"
    )
    usage: ClassVar = "noise_scale gns on type(LayerNorm, RMSNorm) { smooth = 200 steps }"
    targets: ClassVar = "modules"
    default_on: ClassVar = "role(norm)"
    signals: ClassVar = {
        "signal": "average |G|^2 over the measured weights, in squared units of the gradient",
        "noise": "average tr(Sigma) over the measured weights, in squared units of the gradient",
        "error": "standard error of the noise scale, in samples",
        "low": "lower end of the noise scale's interval, in samples",
        "high": "upper end of the noise scale's interval, in samples; infinite where nothing bounds it",
        "total": "noise scale of the whole model by calibration, in samples; NaN without `calibrate`",
        "total_low": "lower end of the interval of `total`, in samples",
        "total_high": "upper end of the interval of `total`, in samples",
        "slope": "what calibration found `total` to be in multiples of the noise scale",
    }
    effects: ClassVar = (
        Effect("backward", "measure per-example gradients", ("loss",), ("probe",)),
        Effect(
            "reduce",
            "estimate the noise scale",
            ("probe", "gradient", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    smooth: Duration = Field(
        default=v.Duration(200, "steps"),
        description="half-life of the averages, in any unit but seconds; follows a changing batch",
    )
    errors: float = Field(
        default=0.0,
        ge=0,
        description="how many standard errors |G|^2 must be above zero for the ratio to be given",
    )
    level: float = Field(
        default=0.9, gt=0, lt=1, description="probability of the intervals, as in `90%`"
    )
    method: Literal["per_example", "micro_batch", "replica", "ghost"] = Field(
        default="per_example",
        description="what is compared with the step's gradient: every example's, every micro-batch's, every "
        "replica's, or those of groups of `group` samples that BatchNorm normalizes together",
    )
    group: int = Field(
        default=0, ge=0, description="samples of one group, for `method = ghost` alone"
    )
    example: Literal["row", "document"] = Field(
        default="row",
        description="what an example is: a row of the batch, or a document that ends with `separator`",
    )
    separator: int | None = Field(
        default=None, ge=0, description="token that ends a document, for `example = document` alone"
    )
    interval: Literal["steps", "jackknife"] = Field(
        default="steps",
        description="where intervals come from: the scatter of the steps, or leaving out each example of "
        "every step, which needs the examples' gradients (norms alone)",
    )
    geometry: Literal["euclidean", "adam", "sign"] = Field(
        default="euclidean",
        description="norm that noise and signal are measured in: plain, divided by Adam's root second "
        "moments, or the L1 norm of sign descent; the last two need the examples' gradients (norms alone)",
    )
    calibrate: Duration | None = Field(
        default=None,
        description="how often all layers are measured, one example after another, to learn what the measured "
        "ones tell of the whole model",
    )
    calibrate_examples: int = Field(
        default=16,
        ge=2,
        description="examples of one calibration, from the step's first micro-batch; all of that where it has fewer",
    )
    calibrate_smooth: float = Field(
        default=4.0,
        gt=0,
        description="half-life of the regression, in calibrations, where that is longer than `smooth`: longer is "
        "surer, and follows a drift later",
    )

    @field_validator("smooth")
    @classmethod
    def _a_half_life(cls, value: Duration) -> Duration:
        if value.amount <= 0 or value.unit == "seconds":
            raise ValueError("expected a duration such as `200 steps` or `20M tokens`")
        return value

    @field_validator("calibrate")
    @classmethod
    def _a_period(cls, value: Duration | None) -> Duration | None:
        if value is not None and value.amount <= 0:
            raise ValueError("expected a duration such as `500 steps`")
        return value

    @field_validator("calibrate")
    @classmethod
    def _what_is_calibrated(cls, value: Duration | None, info: ValidationInfo) -> Duration | None:
        """Refuse to calibrate what is measured in other units than a calibration's, or not at all of one example."""
        given = info.data
        if value is None:
            return None
        if given.get("example") == "document":
            raise ValueError(
                "a calibration measures rows, and `example = document` counts documents: leave `calibrate` out, or "
                "calibrate another clause, without `example`"
            )
        if given.get("geometry") in ("adam", "sign"):
            raise ValueError(
                f"a calibration measures plain norms, and a factor between those is none in `geometry = "
                f"{given['geometry']}`: leave `calibrate` out, or calibrate another clause, without `geometry`"
            )
        if given.get("method") == "ghost":
            raise ValueError(
                "a calibration passes single examples, and `method = ghost` groups of them: leave `calibrate` out"
            )
        return value

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> Gns:
        if (self.method == "ghost") != (self.group > 1):
            raise ValueError(
                "`method = ghost` needs `group = 8` or so, and `group` is for it alone"
            )
        if (self.example == "document") != (self.separator is not None):
            raise ValueError(
                "`example = document` needs `separator = 0` or so, and `separator` is for it alone"
            )
        if self.method != "per_example" and (
            self.per_example_gradients or self.example == "document"
        ):
            raise ValueError(
                f"`method = {self.method}` takes whole gradients: `interval = jackknife`, `example = document` and"
                " another `geometry` need `method = per_example`"
            )
        if self.geometry == "sign" and self.interval == "jackknife":
            raise ValueError(
                "the L1 norm of `geometry = sign` has no jackknife: leave `interval` out"
            )
        return self

    @property
    def per_example_gradients(self) -> bool:
        """Whether the examples' gradients themselves are needed."""
        return self.interval == "jackknife" or self.geometry != "euclidean"

    def unit_of(self, signal: str) -> str | None:
        """Return what a signal counts: examples, but for parts, errors and factors."""
        if signal not in ("", "low", "high", "total", "total_low", "total_high"):
            return None
        return "documents" if self.example == "document" else "samples"

    def unmeasured_reason(self, signal: str) -> tuple[str, str] | None:
        """Say that nothing is known of the whole model without `calibrate`."""
        if self.calibrate is None and signal in ("total", "total_low", "total_high", "slope"):
            return "it comes from calibrations, and the clause has no `calibrate`", (
                "give the clause `calibrate = 500 steps` or so"
            )
        return None

    def performs(self, effect: Effect) -> bool:
        return effect.phase != "backward" or self.method in ("per_example", "ghost")

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Refuse layers whose examples' gradients are not to be had, and models that mix examples."""
        if self.method == "micro_batch":
            yield from single_micro_batch(bound)
        if self.calibrate is not None:
            asked = "calibrate_examples" in self.model_fields_set
            yield from uncalibrated(bound, self.calibrate_examples if asked else None)
        if self.method in ("micro_batch", "replica"):
            return
        refusals: dict[tuple[str, str, str | None], list[str]] = {}
        for module in bound.modules:
            if (objection := self._objection(module, bound)) is not None:
                refusals.setdefault(objection, []).append(module.name)
        for (rule, message, help_), names in refusals.items():
            more = (f"so with {len(names) - 1} more of the selected modules",) if names[1:] else ()
            yield Problem(rule, f"`{names[0]}` {message}", notes=more, help=help_)
        if not refusals and not any(module.parameters for module in bound.modules):
            yield Problem("nothing-to-measure", "no selected module has parameters of its own")
        mixing = [m.name for m in bound.inventory.modules if "_BatchNorm" in m.types]
        if mixing and not refusals and self.method == "per_example":
            message = f"`{mixing[0]}` {_MIXES}, so what is measured elsewhere is biased"
            help_ = "`method = ghost { group = 8 }` or `method = micro_batch` compare what it does not mix"
            yield Problem("norm-mixes-examples", message, help=help_, severity="warning")

    def _objection(self, module: ModuleEntry, bound: Targets) -> tuple[str, str, str | None] | None:
        """Return rule, message and help where names and types tell that a module is not measurable."""
        norms = "select LayerNorm and RMSNorm layers: `on type(LayerNorm, RMSNorm)`"
        is_norm = _is_norm(module)
        if "_BatchNorm" in module.types:
            if self.method == "ghost":
                return None
            help_ = f"{norms}, or compare micro-batches: `method = micro_batch`"
            return "norm-mixes-examples", _MIXES, help_
        if f"{module.name}.parametrizations".lstrip(".") in bound.inventory.module:
            message = "has a weight that is computed from other parameters (a parametrization)"
            return "wrong-target-kind", message, "leave it out, or take the parametrization off it"
        if not module.parameters:
            missing = "has no weight (elementwise_affine=False)"
            return ("nothing-to-measure", missing, None) if is_norm else None
        if not is_norm and (self.per_example_gradients or self.example == "document"):
            return (
                "wrong-target-kind",
                "is no norm, and this clause needs the examples' gradients",
                norms,
            )
        if not _is_layer(module):
            if _only_names(module, bound):
                return None
            message = "has parameters of its own that no layer we can measure holds"
            return "wrong-target-kind", message, f"the layers are {', '.join(_LAYERS)}"
        if not module.trainable:
            return "selector-matches-frozen", "has only frozen weights, which get no gradient", None
        return _shared(module, bound)

    def lower(self, to: Lowering) -> None:
        """Have what the method compares measured in every backward pass, and read before gradients change."""
        from trainc.runtime.noise_scale.action import Measure

        trainable = {p.name for p in to.inventory.parameters if to.tensor(p.name).requires_grad}
        measured: dict[str, tuple[str, ...]] = {}
        if self.method in ("micro_batch", "replica"):
            for entry in to.modules():
                held = (to.inventory.parameter[name].name for name in entry.parameters)
                names = tuple(name for name in held if name in trainable)
                measured |= {entry.name: names} if names else {}
            every = dict.fromkeys(name for owned in measured.values() for name in owned)
            to.measure_batch_gradients(every, running=self.method == "replica")
        else:
            to.example_units(self._units())
            for site in self._sites(to):
                to.measure(site)
                known = (to.inventory.parameter[n].name for n in site.parameters if n is not None)
                measured[site.module] = tuple(name for name in known if name in trainable)
        if self.calibrate is not None:
            to.calibrate(self.calibrate, self.calibrate_examples)
        to.action(Measure(to.label, measured, self._settings(to)))

    def _sites(self, to: Lowering) -> list[MeasuredSite]:
        from trainc.compiler.layers.ghost_batch_norm import batch_norms, ghost_site
        from trainc.compiler.layers.registry import site_of
        from trainc.compiler.layers.tied_weights import sites_of
        from trainc.compiler.method.sites import NormSite

        entries = [entry for entry in to.modules() if entry.parameters]
        grouped = batch_norms(to.model) if self.method == "ghost" else []
        to.ghosts(grouped)

        def recognise(name: str, module: nn.Module) -> MeasuredSite:
            return (ghost_site if name in grouped else site_of)(name, module)

        wanted = {to.inventory.parameter[n].name for entry in entries for n in entry.parameters}
        names = [entry.name for entry in entries]
        wide = self.per_example_gradients or self.example == "document"
        return [
            replace(site, per_example_gradients=wide) if isinstance(site, NormSite) else site
            for site in sites_of(names, wanted, to.model, to.inventory, recognise)
        ]

    def _units(self) -> ExampleUnits | None:
        from trainc.compiler.method.example_units import Documents, Groups

        if self.separator is not None:
            return Documents(self.separator)
        return Groups(self.group) if self.method == "ghost" else None

    def _settings(self, to: Lowering) -> Settings:
        from trainc.runtime.noise_scale.action import Settings

        half_life, unit = self._half_life(to)
        return Settings(
            half_life,
            unit,
            self.errors,
            self.level,
            self.method,
            self.geometry,
            self.interval == "jackknife",
            None if self.calibrate is None else self.calibrate_smooth,
            "documents" if self.example == "document" else "samples",
        )

    def _half_life(self, to: Lowering) -> tuple[float, Unit]:
        """Return `smooth` in samples or tokens, in steps where the batch size is not known."""
        unit = self.smooth.unit
        if unit in ("tokens", "samples"):
            return self.smooth.amount, "tokens" if unit == "tokens" else "samples"
        steps = to.steps(self.smooth)
        try:
            return steps / to.steps(v.Duration(1, "samples")), "samples"
        except ValueError:
            return steps, "steps"

    @staticmethod
    def reference(
        loss: Callable[[int], Tensor], weights: Sequence[float], parameters: Sequence[Tensor]
    ) -> tuple[Estimate, list[float]]:
        """Return one step's estimate and every example's |c_b|^2, one backward pass per example.

        `loss(b)` is the loss of example b alone and `weights[b]` its share of the step's loss.
        """
        import torch

        from trainc.runtime.noise_scale.estimators import noise_scale_from_contributions

        shares = []
        for b, weight in enumerate(weights):
            gradients = torch.autograd.grad(weight * loss(b), list(parameters))
            shares.append(torch.cat([gradient.flatten() for gradient in gradients]))
        squares = [float(share.square().sum()) for share in shares]
        whole = float(torch.stack(shares).sum(0).square().sum())
        q = math.fsum(weight * weight for weight in weights)
        return noise_scale_from_contributions(math.fsum(squares), whole, q), squares


def _layer_owners(parameter: ParameterEntry, bound: Targets) -> dict[str, ModuleEntry]:
    """Return the layers that hold a parameter, by name; others may hold it under names of their own."""
    owners = (name.rpartition(".")[0] for name in (parameter.name, *parameter.aliases))
    known = bound.inventory.module  # a module with two names is there under its first
    return {name: known[name] for name in owners if name in known and _is_layer(known[name])}


def _is_layer(module: ModuleEntry) -> bool:
    return _is_norm(module) or any(name in _LAYERS for name in module.types)


def _is_norm(module: ModuleEntry) -> bool:
    return any(name.endswith(_NORMS) for name in module.types)


def _only_names(module: ModuleEntry, bound: Targets) -> bool:
    """Say whether all that a module holds are other names of what selected layers inside it hold."""
    inside = {m.name for m in bound.modules if m.name.startswith(f"{module.name}.".lstrip("."))}
    held = (bound.inventory.parameter[name] for name in module.parameters)
    return all(not inside.isdisjoint(_layer_owners(p, bound)) for p in held)


def _shared(module: ModuleEntry, bound: Targets) -> tuple[str, str, str | None] | None:
    """Object to a shared weight, unless it is that of an embedding and a head which are both selected."""
    owners: dict[str, ModuleEntry] = {}
    for name in module.parameters:
        holding = _layer_owners(bound.inventory.parameter[name], bound)
        owners |= holding if len(holding) > 1 else {}
    if not owners:
        return None
    kinds = sorted(t for m in owners.values() for t in ("Embedding", "Linear") if t in m.types)
    missing = sorted(owners.keys() - {m.name for m in bound.modules})
    if kinds != ["Embedding", "Linear"]:
        others = ", ".join(f"`{name}`" for name in sorted(owners.keys() - {module.name}))
        message = f"shares its weight with {others}: a sum's square is no sum of squares"
        return "wrong-target-kind", message, "leave them out of the selection"
    if not missing:
        return None
    others = ", ".join(f"`{name}`" for name in missing)
    message = f"shares its weight with {others}: a sum's square is no sum of squares"
    return "wrong-target-kind", message, "select both, the embedding and the head, or neither"
