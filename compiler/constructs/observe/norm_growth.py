"""Norm growth: the norm of the weights, their steps, and the law that the norm follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, Effect, Signal
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.storage.form import Count, Form, Number, Record, Values

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry
    from trainc.runtime.step.record import Step

# Laws a norm may follow, as functions of t, the number of updates.
LAWS: dict[str, Callable[[float], float]] = {
    "sqrt": math.sqrt,
    "linear": float,
    "log": math.log,
    "root4": lambda t: float(t**0.25),
}


class NormGrowth(Construct):
    """Reports the norm of the selected weights, how they move and how the norm grows; changes nothing.

    With w the weights, v those of the previous observation and d = w - v, per parameter and over
    the selection: norm |w|, step |d|, alignment cos(d, v), direction cos(w, v). A cosine with a
    zero vector is 0, and the first observation has norms only. The norm of the selection is fitted
    by least squares to a + b f(t) with f(t) = sqrt(t), t, ln(t) and t^(1/4), where t counts
    updates; from three observations on, `fit` is the best r2. Weights whose steps are along
    themselves grow exponentially; steps at right angles to the weights, with rates of 1/sqrt(t),
    give sqrt(t).
    """

    cite: ClassVar = (
        "Merrill et al., Effects of Parameter Norm Growth, EMNLP 2021, arXiv:2010.09697"
    )
    usage: ClassVar = "observe norm_growth on ndim(2) every 50 steps { from_start = true }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    signals: ClassVar = {
        "norm": Signal("L2 norm of the selected weights", title="norm"),
        "step": "L2 norm of their change since the previous observation",
        "alignment": "cosine of that change and the previous weights, -1 to 1",
        "direction": "cosine of the weights and the previous weights, -1 to 1",
        "fit": "largest r2 of the fits of the norm, 0 to 1",
        "distance": "with `from_start`, L2 distance from the weights at the start",
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
        description="report the distance from the starting weights, which needs one more copy of the weights",
    )

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it keeps the start only when asked to."""
        return effect.phase != "rates" or self.from_start

    def reference(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
        """Return the four measures of a selection by definition, in float64."""
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
        """Observe after updates; with `from_start`, also copy the weights before the first update."""
        parameters = to.parameters()
        start = Start(f"{to.label}.start", parameters) if self.from_start else None
        if start is not None:
            to.action(start)
        to.action(Observe(to.label, parameters, start))


# A line fits two points exactly, so r2 needs three.
POINTS = 3


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over some entries, d = w - v: |w|^2, |d|^2, w.d and |v|^2."""

    ww: float
    dd: float
    wd: float
    vv: float

    def measures(self, moved: bool) -> dict[str, float]:
        """Return the norm and, after a first observation, the step's length and two cosines."""
        norm = {"norm": math.sqrt(self.ww)}
        if not moved:
            return norm
        return norm | {
            "step": math.sqrt(self.dd),
            "alignment": _cosine(self.wd - self.dd, self.dd, self.vv),
            "direction": _cosine(self.ww - self.wd, self.ww, self.vv),
        }


def _cosine(dot: float, left: float, right: float) -> float:
    """Return the cosine of two vectors from their inner product and squared lengths."""
    if left == 0 or right == 0:
        return 0.0
    cosine = dot / (math.sqrt(left) * math.sqrt(right))
    return math.copysign(1.0, cosine) if abs(cosine) > 1 else cosine


@dataclass(slots=True)
class Fit:
    """Least squares of y on x: running means, and sums of squares and products around them."""

    count: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Add one point (Welford's update)."""
        self.count += 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += dx / self.count
        self.mean_y += dy / self.count
        self.xx += dx * (x - self.mean_x)
        self.yy += dy * (y - self.mean_y)
        self.xy += dx * (y - self.mean_y)

    @property
    def r2(self) -> float | None:
        """Return the fraction of y's variance that the line explains; None with too few or equal points."""
        spread = self.xx * self.yy
        return min(1.0, self.xy**2 / spread) if self.count >= POINTS and spread > 0 else None


def _sums(weights: Sequence[Tensor], changes: Sequence[Tensor] | None = None) -> Tensor:
    """Return what `multi_norm` does; of sharded parameters each process has the sums of its shards, which are added."""
    from trainc.kernels.parameter.multi_norm import multi_norm
    from trainc.runtime.processes.sharded import local, sum_over_shards

    rows = multi_norm([*map(local, weights)], None if changes is None else [*map(local, changes)])
    sum_over_shards(rows, weights)
    return rows


class Copies(Action):
    """An action that keeps a copy of its parameters, each in its own dtype."""

    reads_shards = True

    def __init__(self, name: str, parameters: Iterable[ParameterEntry]) -> None:
        self.name = name
        parameters = tuple(parameters)
        self.sizes = {entry.name: entry.bytes for entry in parameters}
        self.forms = {entry.name: (entry.shape, entry.dtype) for entry in parameters}
        self.copies: dict[str, Tensor] = {}

    def memory(self) -> int:
        """Return the bytes of the copies."""
        return sum(self.sizes.values())

    def keep(self, step: Step) -> None:
        """Copy the parameters as they are now."""
        for name in self.sizes:
            now = step.parameters[name].detach()
            if name in self.copies:
                self.copies[name].copy_(now)
            else:
                self.copies[name] = now.clone()

    def state_dict(self) -> ActionState:
        return {f"previous/{name}": tensor for name, tensor in self.copies.items()}

    def state_form(self) -> Form:
        return Record({f"previous/{n}": Values(s, d) for n, (s, d) in self.forms.items()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = {key.partition("/")[2]: key for key in state if key.startswith("previous/")}
        if found and found.keys() != self.sizes.keys():
            names = ", ".join(sorted(found.keys() ^ self.sizes.keys()))
            raise ValueError(
                f"{self.name}: the checkpoint has another selection of parameters; they differ in {names}"
            )
        self.copies = {name: state[found[name]].clone() for name in self.sizes if found}


class Start(Copies):
    """Phase 2: copy the parameters the first time, before that step's update."""

    phase = Phase.RATES

    def run(self, step: Step) -> None:
        if not self.copies:
            self.keep(step)


class Observe(Copies):
    """Phase 12: one pass over the weights and their changes, then keep the weights."""

    phase = Phase.OBSERVE

    def __init__(
        self, name: str, parameters: Iterable[ParameterEntry], start: Start | None
    ) -> None:
        super().__init__(name, parameters)
        self.start = start
        self.squares: dict[str, float] = {}
        self.fits = {law: Fit() for law in LAWS}
        self.first = self.last = 0.0

    def run(self, step: Step) -> None:
        weights = [step.parameters[name].detach() for name in self.sizes]
        moved = bool(self.copies)
        if moved:
            # In place, so that observing allocates nothing.
            for name, now in zip(self.sizes, weights, strict=True):
                self.copies[name] = self.copies[name].to(now.device).neg_().add_(now)
        changes = list(self.copies.values()) if moved else None
        rows = _sums(weights, changes).tolist()
        sums, broken = {}, []
        for name, (ww, dd, wd, nonfinite) in zip(self.sizes, rows, strict=True):
            sums[name] = Sums(ww, dd, wd, self.squares.get(name, 0.0))
            broken += [name] if nonfinite else []
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            step.notes.append(f"{self.name}: entries that are not finite in `{broken[0]}`{more}")
        self._measure(step, sums, moved)
        if self.start is not None and self.start.copies:
            self._distance(step, self.start)
        self._fit(step, math.sqrt(sum(one.ww for one in sums.values())))
        self.squares = {name: one.ww for name, one in sums.items()}
        self.keep(step)

    def _measure(self, step: Step, sums: Mapping[str, Sums], moved: bool) -> None:
        columns = zip(*((one.ww, one.dd, one.wd, one.vv) for one in sums.values()), strict=True)
        self._record(step, Sums(*map(sum, columns)).measures(moved))
        for name, one in sums.items():
            for measure, value in one.measures(moved).items():
                step.series.setdefault(f"{self.name}.{measure}", {})[name] = value

    def _distance(self, step: Step, start: Start) -> None:
        distances = {}
        for name, first in start.copies.items():
            now = step.parameters[name].detach()
            distances[name] = math.sqrt(_sums([now - first.to(now.device)])[0, 0].item())
        step.series[f"{self.name}.distance"] = distances
        self._record(step, {"distance": math.hypot(*distances.values())})

    def _fit(self, step: Step, norm: float) -> None:
        if math.isfinite(norm):
            # The clock counts the update just made only after this phase.
            for law, f in LAWS.items():
                self.fits[law].add(f(step.clock.steps + 1), norm)
            self.first, self.last = (self.first if self.squares else norm), norm
        if found := self.r2:
            self._record(step, {"fit": max(found.values())})
            step.metrics.update({f"{self.name}.fit.{law}": r2 for law, r2 in found.items()})

    @property
    def r2(self) -> dict[str, float]:
        """Return each law's r2, empty before there are three observations."""
        return {law: r2 for law, fit in self.fits.items() if (r2 := fit.r2) is not None}

    def _record(self, step: Step, found: Mapping[str, float]) -> None:
        named = {f"{self.name}.{measure}": value for measure, value in found.items()}
        step.metrics.update(named)
        step.signals.update(named)

    def state_dict(self) -> ActionState:
        out = super().state_dict()
        if out:
            out |= {"first": self.first, "last": self.last}
            out |= {f"squared/{name}": value for name, value in self.squares.items()}
            for law, fit in self.fits.items():
                out |= {f"fit/{law}/{moment}": value for moment, value in asdict(fit).items()}
        return out

    def state_form(self) -> Form:
        entries: dict[str, Form] = {
            f"previous/{n}": Values(*form) for n, form in self.forms.items()
        }
        entries |= {"first": Number(0), "last": Number(0)}
        entries |= {f"squared/{name}": Number(0) for name in self.forms}
        for law in LAWS:
            for moment in asdict(Fit()):
                low = 0 if moment in ("xx", "yy") else -math.inf
                entries[f"fit/{law}/{moment}"] = Count() if moment == "count" else Number(low)
        return Record(entries)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.squares = {name: float(state[f"squared/{name}"]) for name in self.copies}
        self.first, self.last = float(state.get("first", 0.0)), float(state.get("last", 0.0))
        for law in LAWS:
            moments = {m: state[f"fit/{law}/{m}"] for m in asdict(Fit())} if state else {}
            self.fits[law] = Fit(**moments)

    def summary(self) -> str | None:
        if not self.copies:
            return None
        line = f"{self.name}: norm {self.first:.4g} -> {self.last:.4g}"
        if found := self.r2:
            best = max(found, key=lambda law: found[law])
            line += f", best fit {best} (r2 {found[best]:.4f})"
        return line
