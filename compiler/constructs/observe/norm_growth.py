"""Norm growth: how long the weights are, how they move, and which law their length follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.dsl.construct import Construct, Effect
from trainc.runtime.action import Action, Phase, State

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.inventory import ParameterEntry
    from trainc.compiler.lowering import Lowering
    from trainc.runtime.step import Step

# Laws a norm may follow, as functions of t, the number of updates; each is fitted with slope and intercept.
FORMS = {
    "sqrt": math.sqrt,
    "linear": float,
    "log": math.log,
    "root4": lambda t: float(t**0.25),
}
# Two points lie on every line.
POINTS = 3


class NormGrowth(Construct):
    """Reports the length of the selected weights, their steps, and fits of the length's growth; changes nothing.

    With w the weights now, v those at the observation before and d = w - v, per parameter and over the selection:
    norm ||w||, step ||d||, alignment cos(d, v), direction cos(w, v); a cosine with a zero vector is 0. The first
    observation has only norms. The norm of the selection is fitted by least squares, as a + b f(t), to sqrt(t), t,
    ln(t) and t^(1/4), t counting updates; from three observations on, `fit` is the best r2. Weights that step along
    themselves grow exponentially, steps at right angles to the weights with a 1/sqrt(t) rate give sqrt(t).
    """

    cite: ClassVar = "Merrill et al., Effects of Parameter Norm Growth, EMNLP 2021, arXiv:2010.09697"
    example: ClassVar = "observe norm_growth on ndim(2) every 50 steps { from_start = true }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {
        "norm": "L2 norm of the selected weights, in the weights' unit",
        "step": "L2 norm of their change since the observation before, in the weights' unit",
        "alignment": "cosine of that change and the weights before it, -1 to 1",
        "direction": "cosine of the weights now and before, -1 to 1",
        "fit": "largest r2 of the norm's fits, 0 to 1",
        "distance": "L2 distance from the weights at the start, in the weights' unit, with `from_start`",
    }
    effects: ClassVar = (
        Effect("rates", "keep the weights at the start", ("params",)),
        Effect(
            "observe",
            "measure norms and steps",
            ("params", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    from_start: bool = Field(
        default=False,
        description="also report the distance from the weights as the clause first found them, at one more copy of them",
    )

    def reference(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
        """Return norm, step, alignment and direction of a selection by definition, in float64."""
        import torch

        v = torch.cat([tensor.detach().double().flatten() for tensor in before])
        w = torch.cat([tensor.detach().double().flatten() for tensor in now])
        cosine = torch.nn.functional.cosine_similarity
        return {
            "norm": float(w.norm()),
            "step": float((w - v).norm()),
            "alignment": float(cosine(w - v, v, dim=0, eps=1e-300)),
            "direction": float(cosine(w, v, dim=0, eps=1e-300)),
        }

    def lower(self, to: Lowering) -> None:
        """Observe after each update that is due; with `from_start` copy the weights before the first one."""
        parameters = to.parameters()
        start = Start(f"{to.label}.start", parameters) if self.from_start else None
        if start is not None:
            to.action(start)
        to.action(Observe(to.label, parameters, start))


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over some entries: ||w||^2, ||d||^2, w.d and ||v||^2, where d = w - v."""

    ww: float
    dd: float
    wd: float
    vv: float

    @property
    def norm(self) -> dict[str, float]:
        return {"norm": math.sqrt(self.ww)}

    @property
    def motion(self) -> dict[str, float]:
        """Return what a change has: its length, and its and the weights' angle to the weights before."""
        return {
            "step": math.sqrt(self.dd),
            "alignment": _cosine(self.wd - self.dd, self.dd, self.vv),
            "direction": _cosine(self.ww - self.wd, self.ww, self.vv),
        }


def _cosine(dot: float, left: float, right: float) -> float:
    """Return the cosine of two vectors from their inner product and squared lengths; 0 beside a zero vector."""
    if left == 0 or right == 0:
        return 0.0
    cosine = dot / (math.sqrt(left) * math.sqrt(right))
    return math.copysign(1.0, cosine) if abs(cosine) > 1 else cosine


@dataclass(slots=True)
class Fit:
    """Least squares of y on x by running moments: means, and sums of squared and mixed deviations from them."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take in one point (Welford's update)."""
        self.count += 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += dx / self.count
        self.mean_y += dy / self.count
        self.xx += dx * (x - self.mean_x)
        self.yy += dy * (y - self.mean_y)
        self.xy += dx * (y - self.mean_y)

    @property
    def r2(self) -> float | None:
        """Return the share of y's variance that the line explains; None where that means nothing."""
        if self.count < POINTS or self.xx <= 0 or self.yy <= 0:
            return None
        return min(1.0, self.xy**2 / (self.xx * self.yy))


class Copies(Action):
    """An action that keeps a copy of its parameters, each in its own dtype."""

    def __init__(self, name: str, parameters: Iterable[ParameterEntry]) -> None:
        self.name = name
        self.sizes = {entry.name: entry.bytes for entry in parameters}
        self.copies: dict[str, Tensor] = {}

    def memory(self) -> int:
        """Return the bytes of the copies."""
        return sum(self.sizes.values())

    def keep(self, step: Step) -> None:
        """Copy the parameters as they are now, into the copies there are."""
        for name in self.sizes:
            now = step.parameters[name].detach()
            if name in self.copies:
                self.copies[name].copy_(now)
            else:
                self.copies[name] = now.clone()

    def copies_state(self) -> State:
        """Return the copies under `previous/<parameter>`."""
        return {f"previous/{name}": tensor for name, tensor in self.copies.items()}

    def load_copies(self, state: Mapping[str, Any]) -> None:
        """Restore what `copies_state` gave."""
        self.copies = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind != "previous":
                continue
            if name not in self.sizes:
                raise ValueError(f"{self.name}: the checkpoint has a copy of `{name}`, which is not observed here")
            self.copies[name] = value.clone()


class Start(Copies):
    """Phase 2: copy the parameters the first time, before that step's update."""

    phase = Phase.RATES
    reads = ("params",)

    def run(self, step: Step) -> None:
        if not self.copies:
            self.keep(step)

    def state_dict(self) -> State:
        return self.copies_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.load_copies(state)


class Observe(Copies):
    """Phase 12: one pass over weights and changes, then the weights become those before."""

    phase = Phase.OBSERVE
    reads = ("params", "clock")
    writes = ("metrics",)

    def __init__(self, name: str, parameters: Sequence[ParameterEntry], start: Start | None) -> None:
        super().__init__(name, parameters)
        self.start = start
        self._reset()

    def _reset(self) -> None:
        self.squares: dict[str, float] = {}
        self.fits = {form: Fit() for form in FORMS}
        self.first = self.last = 0.0

    def run(self, step: Step) -> None:
        from trainc.kernels.multi_norm import multi_norm

        weights = [step.parameters[name].detach() for name in self.sizes]
        moved = bool(self.copies)
        # The copies turn into the changes in place, so that observing allocates nothing.
        changes = self._changes(weights) if moved else None
        sums: dict[str, Sums] = {}
        broken = []
        rows = multi_norm(weights, changes).tolist()
        for name, (ww, dd, wd, nonfinite) in zip(self.sizes, rows, strict=True):
            sums[name] = Sums(ww, dd, wd, self.squares.get(name, 0.0))
            if nonfinite:
                broken.append(name)
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            step.notes.append(f"{self.name}: `{broken[0]}`{more} has entries that are not finite")
        self._measure(step, sums, moved)
        if self.start is not None and self.start.copies:
            self._distance(step, self.start)
        self._fit(step, math.sqrt(sum(one.ww for one in sums.values())))
        self.squares = {name: one.ww for name, one in sums.items()}
        self.keep(step)

    def _changes(self, weights: Sequence[Tensor]) -> list[Tensor]:
        for name, now in zip(self.sizes, weights, strict=True):
            self.copies[name] = self.copies[name].to(now.device).neg_().add_(now)
        return [self.copies[name] for name in self.sizes]

    def _measure(self, step: Step, sums: Mapping[str, Sums], moved: bool) -> None:
        columns = [(one.ww, one.dd, one.wd, one.vv) for one in sums.values()]
        total = Sums(*map(sum, zip(*columns, strict=True)))
        self._tell(step, total.norm | (total.motion if moved else {}))
        for name, one in sums.items():
            for measure, value in (one.norm | (one.motion if moved else {})).items():
                step.series.setdefault(f"{self.name}.{measure}", {})[name] = value

    def _distance(self, step: Step, start: Start) -> None:
        from trainc.kernels.multi_norm import multi_norm

        distances = {}
        for name, first in start.copies.items():
            now = step.parameters[name].detach()
            distances[name] = math.sqrt(multi_norm([now - first.to(now.device)])[0, 0].item())
        step.series[f"{self.name}.distance"] = distances
        self._tell(step, {"distance": math.hypot(*distances.values())})

    def _fit(self, step: Step, norm: float) -> None:
        if not math.isfinite(norm):
            return
        updates = step.clock.steps + 1
        for form, law in FORMS.items():
            self.fits[form].add(law(updates), norm)
        if not self.squares:
            self.first = norm
        self.last = norm
        if r2 := self.r2:
            found = {f"fit.{form}": value for form, value in r2.items()}
            self._tell(step, {"fit": max(r2.values()), **found})

    @property
    def r2(self) -> dict[str, float]:
        """Return each law's r2, empty before there are three observations."""
        return {form: r2 for form, fit in self.fits.items() if (r2 := fit.r2) is not None}

    def _tell(self, step: Step, found: Mapping[str, float]) -> None:
        named = {f"{self.name}.{measure}": value for measure, value in found.items()}
        step.metrics.update(named)
        step.signals.update(named)

    def state_dict(self) -> State:
        if not self.copies:
            return {}
        out: State = self.copies_state() | {"first": self.first, "last": self.last}
        out |= {f"squared/{name}": value for name, value in self.squares.items()}
        for form, fit in self.fits.items():
            out |= {f"fit/{form}/{moment}": value for moment, value in asdict(fit).items()}
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reset()
        self.load_copies(state)
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "squared":
                self.squares[name] = float(value)
            elif kind == "fit":
                form, _, moment = name.partition("/")
                setattr(self.fits[form], moment, type(getattr(self.fits[form], moment))(value))
        self.first, self.last = float(state.get("first", 0.0)), float(state.get("last", 0.0))

    def summary(self) -> str | None:
        if not self.copies:
            return None
        line = f"{self.name}: norm {self.first:.4g} -> {self.last:.4g}"
        if r2 := self.r2:
            best = max(r2, key=lambda form: r2[form])
            line += f", best fit {best} (r2 {r2[best]:.4f})"
        return line
