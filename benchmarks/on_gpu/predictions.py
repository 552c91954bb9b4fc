"""What was expected of a device before any was at hand, and what was measured: written down so that it can be refuted.

The first ones come from a model of the kernels' code: instructions an element, bytes, and programs at once, without
a device. The others are goals: what the kernels were built to reach. They are of the device's time: what ran eagerly,
where the host's may hide it, confirms and refutes nothing. A step of graphs is judged where all passes were replayed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.measure import Json
from benchmarks.on_gpu.timed import VERSIONS

Measured = Callable[[Json], float]
NAN = math.nan
LAYER, RMS = "operators: layer_norm, probe", "operators: rms_norm, probe"
LARGE = "64x1024x4096 bfloat16"
LOSS = "operators: cross_entropy_consistency"
# By benchmarks/offline/norm_model.py for an H200; a device refutes it where it reaches less than four fifths.
MODELLED = {"8x512x768": 0.42, "64x64x4096": 0.76, "256x8x4096": 0.68, "8x2048x4096": 0.92}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A figure, how it follows from the rows, and the bound that it was expected to keep."""

    what: str
    measured: Measured
    least: float = -math.inf
    most: float = math.inf
    goal: bool = False


def _row(found: Json, key: str) -> Json:
    rows: list[Json] = found["rows"]
    return next((row for row in rows if row["key"] == key), {})


def _time(row: Json, version: str, phase: str) -> float:
    """Microseconds of the device; nan for what is missing, and for what no graph ran."""
    found = row.get("times", {}).get(version, {}).get(phase, {})
    return float(found["median"]) if found.get("how") == "graph" else NAN


def _kernel(key: str, word: str) -> Measured:
    """Microseconds of a launch of the kernel whose name has the word."""

    def measured(found: Json) -> float:
        seen = _row(found, key).get("kernels", {})
        return max((float(one["us"]) for name, one in seen.items() if word in name), default=NAN)

    return measured


def _launches(key: str) -> Measured:
    """Kernels that a call of ours launches, forward and backward."""

    def measured(found: Json) -> float:
        seen = _row(found, key).get("kernels", {})
        return sum(float(one["a call"]) for one in seen.values()) if seen else NAN

    return measured


def _share(key: str, phase: str) -> Measured:
    """The fraction of the copy rate at which the fewest bytes moved."""

    def measured(found: Json) -> float:
        row = _row(found, key)
        rates = [one["copy TB/s"] for one in found["conditions"]]
        if not row or not rates:
            return NAN
        moved = float(row.get("bytes", {}).get(phase, NAN))
        return moved / _time(row, "ours", phase) / 1e6 / float(max(rates))

    return measured


def _both(row: Json, version: str) -> float:
    return _time(row, version, "forward") + _time(row, version, "backward")


def _to_best(key: str) -> Measured:
    """Our time with statistics to that of the best alternative without them, forward and backward."""

    def measured(found: Json) -> float:
        row = _row(found, key)
        others = [_both(row, version) for version in VERSIONS if version != "ours"]
        best = min((one for one in others if not math.isnan(one)), default=NAN)
        return _both(row, "ours") / best

    return measured


def _to_rival(key: str) -> Measured:
    """Our backward to one compiled graph that makes dx, the weights' gradients and the norms."""

    def measured(found: Json) -> float:
        row = _row(found, key)
        return _time(row, "ours", "backward") / _time(row, "one graph", "backward")

    return measured


def _host_to_device(host: str, device: str) -> Measured:
    """The host's time for a call to the device's, forward."""

    def measured(found: Json) -> float:
        spent = _row(found, host).get("ours", {}).get("forward", NAN)
        return float(spent) / _time(_row(found, device), "ours", "forward")

    return measured


def _faster_than_inductor(key: str) -> Measured:
    def measured(found: Json) -> float:
        row = _row(found, key)
        return _both(row, "inductor") / _both(row, "ours")

    return measured


def _either(*shares: tuple[Measured, float]) -> Measured:
    """The largest of some figures, each in units of its own bound."""

    def measured(found: Json) -> float:
        values = [one(found) / bound for one, bound in shares]
        return max((one for one in values if not math.isnan(one)), default=NAN)

    return measured


def _between(one: str, other: str) -> Measured:
    """Our time, forward and backward, at one row to that at another."""
    return lambda found: _both(_row(found, one), "ours") / _both(_row(found, other), "ours")


def _step(case: str, plain: str, model: str = "124m") -> Measured:
    """Time of a whole step to that of a plain one."""

    def measured(found: Json) -> float:
        rows = [_row(found, f"steps: {model} {name}") for name in (case, plain)]
        if any(row.get("graphs refused") for row in rows):
            return NAN
        ours, theirs = (float(row.get("seconds a step", {}).get("median", NAN)) for row in rows)
        return ours / theirs

    return measured


def _loss_goal(distance: str) -> Prediction:
    key = f"{LOSS}, {distance} 1x4096x32768 bfloat16"
    figures = ((_faster_than_inductor(key), 2.0), (_share(key, "forward"), 0.8))
    what = f"loss, {distance}, 32768 classes: of 2x inductor's speed, or of 0.8 of the copy rate forward"
    return Prediction(what, _either(*figures), least=1.0, goal=True)


PREDICTIONS = (
    Prediction(
        "norm_finish at (64, 64, 4096), us",
        _kernel("operators: layer_norm, probe 64x64x4096 bfloat16", "finish"), most=5.0,
    ),
    Prediction(
        "loss, kl, 32768 classes, forward: of the copy rate",
        _share(f"{LOSS}, kl 1x4096x32768 bfloat16", "forward"), least=0.85,
    ),
    *(
        Prediction(
            f"loss, {distance}: time of 50257 classes to that of 50304",
            _between(*(f"{LOSS}, {distance} 1x4096x{classes} bfloat16" for classes in (50257, 50304))), most=1.10,
        )
        for distance in ("mse", "kl")
    ),
    *(
        Prediction(
            f"layer_norm backward at {size}: of the copy rate, modelled {share}",
            _share(f"{LAYER} {size} bfloat16", "backward"), least=round(0.8 * share, 3),
        )
        for size, share in MODELLED.items()
    ),
    Prediction(
        "layer_norm and its backward at (64, 64, 4096): launches", _launches(f"{LAYER} 64x64x4096 bfloat16"), most=3.0
    ),
    *(
        Prediction(f"{name}: to the best without statistics, 512 MB", _to_best(f"{key} {LARGE}"), most=1.0, goal=True)
        for name, key in (("layer_norm", LAYER), ("rms_norm", RMS))
    ),
    *(
        Prediction(f"{name} {phase}: of the copy rate, 512 MB", _share(f"{key} {LARGE}", phase), least=least, goal=True)
        for name, key in (("layer_norm", LAYER), ("rms_norm", RMS))
        for phase, least in (("forward", 0.85), ("backward", 0.80))
    ),
    *(
        Prediction(
            f"noisy_add, {share}, forward: of the copy rate",
            _share(f"operators: noisy_add, {share} {LARGE}", "forward"), least=0.85, goal=True,
        )
        for share in ("token", "none", "none_fast")
    ),
    _loss_goal("mse"),
    _loss_goal("kl"),
    *(
        Prediction(
            f"layer_norm backward at {size}: to one compiled graph of the same",
            _to_rival(f"{LAYER} {size} bfloat16"), most=1.0, goal=True,
        )
        for size in ("8x512x768", "64x64x4096", "64x1024x4096")
    ),
    Prediction(
        "multi_norm: the host's time to the device's, 150 pairs", most=1.0, goal=True,
        measured=_host_to_device("host: multi_norm", "operators: multi_norm 150x4096x1024 bfloat16"),
    ),
    Prediction(
        "compiled step with gns on norms: to plain compiled", _step("gns on norms", "plain"), most=1.05, goal=True
    ),
    Prediction(
        "the same, both with passes in CUDA graphs", _step("gns on norms, graphs", "plain, graphs"),
        most=1.05, goal=True,
    ),
)  # fmt: skip


def verdicts(found: Json) -> list[Json]:
    """Return every prediction with what was measured, and whether that confirms or refutes it."""
    lines = []
    for one in PREDICTIONS:
        value = one.measured(found)
        verdict = "confirmed" if one.least <= value <= one.most else "refuted"
        known = not math.isnan(value)
        bounds = {n: b for n, b in (("least", one.least), ("most", one.most)) if math.isfinite(b)}
        lines.append(
            {
                "what": one.what,
                "kind": "goal" if one.goal else "prediction",
                **bounds,
                "measured": round(value, 3) if known else None,
                "verdict": verdict if known else "not measured",
            }
        )
    return lines
