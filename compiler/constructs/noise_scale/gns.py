"""The gradient noise scale, measured in the backward pass of the normalization layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.rewrite import NormSite
from trainc.dsl.construct import Construct, Duration, Effect, Problem
from trainc.runtime.action import Action, Phase, State
from trainc.runtime.noise_scale import Averages, Estimate, Squares, noise_scale_from_contributions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bound import Targets
    from trainc.compiler.inventory import ModuleEntry
    from trainc.compiler.lowering import Lowering
    from trainc.runtime.step import Step

Unit = Literal["steps", "samples", "tokens"]

_MIXES = "normalizes over the batch: examples have no gradients of their own"

# Relative error below which a layer of another make counts as a norm we know.
_SAME = 1e-4


class Gns(Construct):
    """Measures B_simple = tr(Sigma) / |G|^2, the batch size at which noise and signal are equal.

    From each example's share c_b = w_b g_b of the step's gradient, with q = sum w_b^2:
    |G|^2 = (|sum c_b|^2 - sum |c_b|^2) / (1 - q),
    tr(Sigma) = (sum |c_b|^2 / q - |sum c_b|^2) / (1 - q).
    Both are averaged first and divided then; while the average |G|^2 is not above zero the noise
    scale is undetermined, NaN. Gradients are those before clipping. A loss term on the measured
    weights themselves (weight penalties) counts as signal.
    """

    cite: ClassVar = (
        "Gray et al., Normalization Layer Per-Example Gradients, NeurIPS 2024, arXiv:2411.00999; "
        "McCandlish et al., An Empirical Model of Large-Batch Training, 2018, arXiv:1812.06162"
    )
    example: ClassVar = "noise_scale gns on type(LayerNorm, RMSNorm) { smooth = 200 steps }"
    targets: ClassVar = "modules"
    default_on: ClassVar = "role(norm)"
    signals: ClassVar = {
        "signal": "average |G|^2 over the measured weights, in squared units of the gradient",
        "noise": "average tr(Sigma) over the measured weights, in squared units of the gradient",
        "error": "standard error of the noise scale, in samples",
    }
    effects: ClassVar = (
        Effect("backward", "measure per-example gradients", ("loss",), ("probe",)),
        Effect(
            "reduce",
            "estimate the noise scale",
            ("probe", "gradient", "clock"),
            ("metrics", "signal:signal", "signal:noise", "signal:error"),
        ),
    )

    smooth: Duration = Field(
        default=Duration(200, "steps"),
        description="half-life of the averages, in any unit but seconds; follows a changing batch",
    )
    errors: float = Field(
        default=0.0,
        ge=0,
        description="how many standard errors |G|^2 must be above zero for the ratio to be given",
    )

    @field_validator("smooth")
    @classmethod
    def _a_half_life(cls, value: Duration) -> Duration:
        if value.amount <= 0 or value.unit == "seconds":
            raise ValueError("expected a duration such as `200 steps` or `20M tokens`")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Refuse what is no norm, mixes examples or has no weight of its own to measure."""
        refusals: dict[tuple[str, str, str | None], list[str]] = {}
        for module in bound.modules:
            if (objection := _objection(module, bound)) is not None:
                refusals.setdefault(objection, []).append(module.name)
        for (rule, message, help_), names in refusals.items():
            more = (f"so with {len(names) - 1} more of the selected modules",) if names[1:] else ()
            yield Problem(rule, f"`{names[0]}` {message}", notes=more, help=help_)
        mixing = [m.name for m in bound.inventory.modules if "_BatchNorm" in m.types]
        if mixing and not refusals:
            message = f"`{mixing[0]}` {_MIXES}, so what is measured elsewhere is biased"
            yield Problem("norm-mixes-examples", message, severity="warning")

    def lower(self, to: Lowering) -> None:
        """Have per-example norms taken at every site, and read them before gradients change."""
        measured = {}
        for entry in to.modules():
            site = norm_site(entry.name, to.model.get_submodule(entry.name))
            to.norm_statistics(site)
            names = tuple(name for name in site.parameters if name is not None)
            measured[site.module] = tuple(n for n in names if to.tensor(n).requires_grad)
        to.action(Measure(to.label, measured, *self._half_life(to), self.errors))

    def _half_life(self, to: Lowering) -> tuple[float, Unit]:
        """Return `smooth` in samples or tokens, in steps where the batch size is not known."""
        unit = self.smooth.unit
        if unit in ("tokens", "samples"):
            return self.smooth.amount, "tokens" if unit == "tokens" else "samples"
        steps = to.steps(self.smooth)
        try:
            return steps / to.steps(Duration(1, "samples")), "samples"
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

        shares = []
        for b, weight in enumerate(weights):
            gradients = torch.autograd.grad(weight * loss(b), list(parameters))
            shares.append(torch.cat([gradient.flatten() for gradient in gradients]))
        squares = [float(share.square().sum()) for share in shares]
        whole = float(torch.stack(shares).sum(0).square().sum())
        q = math.fsum(weight * weight for weight in weights)
        return noise_scale_from_contributions(math.fsum(squares), whole, q), squares


class Measure(Action):
    """Phase 7: estimate from `measured` (parameters by module); `half_life` is in `unit`."""

    phase = Phase.REDUCE
    reads = ("probe", "gradient", "clock")
    writes = ("metrics",)

    def __init__(
        self,
        name: str,
        measured: Mapping[str, tuple[str, ...]],
        half_life: float,
        unit: Unit,
        errors: float = 0.0,
    ) -> None:
        self.name = name
        self.measured = dict(measured)
        self.half_life, self.unit = half_life, unit
        self.errors = errors
        self.total = Averages()
        self.layers = {module: Averages() for module in measured}
        self.position = 0.0

    def run(self, step: Step) -> None:
        names = [name for owned in self.measured.values() for name in owned]
        found = {n: g for n in names if (g := step.parameters[n].grad) is not None}
        squares = Squares.of(step.contributions, found)
        # What is not finite would stay in the averages for good.
        if all(map(math.isfinite, squares.estimate())):
            decay = 0.5 ** (self._elapsed(step) / self.half_life)
            self.total.add(squares.estimate(), decay)
            for module, owned in self.measured.items():
                if any(name in found for name in owned):
                    self.layers[module].add(squares.estimate(owned), decay)
        self._tell(step)

    def _elapsed(self, step: Step) -> float:
        """Return what passed since the last estimate, this step included."""
        examples = sum(len(part.weights) for part in step.contributions)
        now = {"steps": 1, "samples": examples, "tokens": step.tokens}[self.unit]
        before, self.position = self.position, getattr(step.clock, self.unit) + now
        return max(self.position - before, float(now))

    def _tell(self, step: Step) -> None:
        signal, noise = self.total.estimate
        measures = {"signal": signal, "noise": noise, "error": self.total.error()}
        found = {f"{self.name}.{measure}": value for measure, value in measures.items()}
        found[self.name] = self.total.scale(self.errors)
        step.signals.update(found)
        step.metrics.update(found)
        step.series[self.name] = {name: a.scale(self.errors) for name, a in self.layers.items()}

    def state_dict(self) -> State:
        import torch

        if not self.position:
            return {}
        sums = {
            name: torch.tensor(a.state(), dtype=torch.float64)
            for name, a in self._averages().items()
        }
        return {"position": self.position, **sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        averages = self._averages()
        odd = sorted(set(state) ^ {"position", *averages})
        if state and odd:
            raise ValueError(f"{self.name}: the checkpoint measured other layers: {', '.join(odd)}")
        self.position = float(state.get("position", 0.0))
        for name, sums in averages.items():
            sums.load(state[name].tolist() if state else [0.0] * Averages.SIZE)

    def _averages(self) -> dict[str, Averages]:
        return {"total": self.total, **{f"layer/{name}": a for name, a in self.layers.items()}}

    def summary(self) -> str | None:
        signal, noise = self.total.estimate
        if math.isnan(signal):
            return f"{self.name}: undetermined, no step had two examples to compare"
        parts = f"|G|^2 {signal:.3g}, tr(Sigma) {noise:.3g} over {len(self.layers)} norms"
        scale, error = self.total.scale(self.errors), self.total.error()
        if math.isnan(scale):
            return f"{self.name}: undetermined, {parts}"
        return f"{self.name}: noise scale {scale:.4g} ± {error:.2g} samples, {parts}"


def _objection(module: ModuleEntry, bound: Targets) -> tuple[str, str, str | None] | None:
    """Return rule, message and help where names and types tell that a module is not measurable."""
    norms = "select LayerNorm and RMSNorm layers: `on type(LayerNorm, RMSNorm)`"
    if "_BatchNorm" in module.types:
        return "norm-mixes-examples", _MIXES, norms
    if not any(name.endswith(("LayerNorm", "RMSNorm")) for name in module.types):
        return "wrong-target-kind", "is neither a LayerNorm nor an RMSNorm", norms
    if not module.parameters:
        return "nothing-to-measure", "has no weight (elementwise_affine=False)", None
    if not module.trainable:
        return "selector-matches-frozen", "has only frozen weights, which get no gradient", None
    shared = any(bound.inventory.parameter[name].aliases for name in module.parameters)
    message = "shares its weight: a sum's square is no sum of squares"
    return ("wrong-target-kind", message, None) if shared else None


def norm_site(name: str, module: nn.Module) -> NormSite:
    """Return how a layer is measured: by its type, other people's classes by what they compute."""
    from torch import nn

    path = f"{name}." if name else ""
    own = {n: f"{path}{n}" for n, _ in module.named_parameters()}
    eps: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    form: Literal["layer", "rms"] = "layer" if isinstance(module, nn.LayerNorm) else "rms"
    site = NormSite(name, form, own.get("weight"), own.get("bias"), eps)
    known = nn.LayerNorm if form == "layer" else nn.RMSNorm
    if isinstance(module, known):
        if type(module).forward is known.forward or _error(module, site) < _SAME:
            return site
    elif list(own) == ["weight"] and isinstance(eps, float) and _error(module, site) < _SAME:
        llama = NormSite(name, form, site.weight, None, eps, "llama")
        return min(site, llama, key=lambda s: _error(module, s, half=True))
    made = type(module).__name__
    raise ValueError(f"`{name}` ({made}) is no LayerNorm or RMSNorm: it computes something else")


def _error(module: nn.Module, site: NormSite, half: bool = False) -> float:
    """Return the mean error of our operator against the layer, relative to the layer's output.

    Weights and inputs are made up (`half`: in bfloat16), so a layer on the meta device will do.
    """
    import copy

    import torch

    from trainc.kernels.layer_norm import layer_norm
    from trainc.kernels.rms_norm import rms_norm

    dtype = torch.bfloat16 if half else torch.float32
    made: dict[str, torch.nn.Parameter | None] = dict(module._parameters)
    for name, given in module.named_parameters():
        values = 1 + 0.5 * torch.arange(given.numel()).sin()
        made[name] = torch.nn.Parameter(values.to(dtype).view(given.shape))
    weight = made["weight"]
    if weight is None:
        return math.inf
    x = (3 * (1.3 * torch.arange(6 * weight.numel()) + 0.5).sin()).view(2, 3, *weight.shape)
    # Some rows are so small that eps decides about them.
    x = (x * torch.tensor([1.0, 0.1, 1e-3]).view(3, *[1] * weight.dim())).to(dtype)
    twin = copy.copy(module)
    twin._parameters = made
    shape = list(weight.shape)
    with torch.no_grad():
        try:
            theirs: Tensor = twin.forward(x)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return math.inf
        if site.form == "layer":
            ours = layer_norm(x, shape, weight, made.get("bias"), None, site.eps or 0.0)
        else:
            ours = rms_norm(x, shape, weight, None, site.eps, site.casting)
    if theirs.shape != ours.shape:
        return math.inf
    return float((theirs.double() - ours.double()).abs().mean() / theirs.double().abs().mean())
