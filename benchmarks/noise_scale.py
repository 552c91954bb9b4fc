"""What it costs to measure per-example gradient norms in a training step, beside plain steps and other libraries."""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import nn

import trainc
from benchmarks.claims.training import RESULTS, write
from benchmarks.measure import Json, Times, compared, in_turn, seconds, timed
from benchmarks.noise_scale_hooks import (
    BackPack,
    Batch,
    ByHand,
    Hooks,
    Opacus,
    OpacusTwice,
    Squares,
    Version,
    attempt,
    one_by_one,
)
from examples.models import gpt

EXPECTED = (
    "the norms measured in at most 1.02 of a plain step, all layers in at most 1.10, and all Linear layers in at"
    " most half the time of Opacus' ghost norms, in processor time on one thread"
)
NORMS_GOAL, ALL_GOAL, OPACUS_GOAL = 1.02, 1.10, 2.0
AGREEMENT = 1e-4
SPEC = """train 1
data "examples.data:stdlib" { batch = %d samples, context = %d }
run { length = 100k steps }
loss cross_entropy
optimizer adamw { lr = 1e-4, weight_decay = 0.01 }
%s
"""
ON = {"norms": "role(norm)", "all layers": "all", "Linear": "type(Linear)"}
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "norms": (nn.LayerNorm,),
    "Linear": (nn.Linear,),
    "all layers": (nn.LayerNorm, nn.Linear, nn.Embedding),
}
SLOW = 8.0
"""Versions that take more plain steps than this are timed in a tenth of the rounds."""
PLAIN, AGAIN = "plain", "plain again"


@dataclass(frozen=True, slots=True)
class Size:
    """A GPT over bytes and a batch of `samples` times `context` tokens."""

    layers: int
    width: int
    heads: int
    context: int
    samples: int


SIZES = {
    "8 samples of 128": Size(layers=6, width=256, heads=8, context=128, samples=8),
    "2 samples of 512": Size(layers=6, width=256, heads=8, context=512, samples=2),
}
SMALL = {"small": Size(layers=1, width=16, heads=2, context=8, samples=4)}


class Ours:
    """A trainc program that measures the layers of a selector, as a graph or module by module."""

    def __init__(self, size: Size, on: str | None, executor: Literal["graph", "module"]) -> None:
        clause = f"noise_scale gns on {on}" if on else ""
        text = SPEC % (size.samples, size.context, clause)
        self.program = trainc.compile(text, model(size), executor=executor)
        self.executor: Literal["graph", "module"] = executor

    def step(self, batch: Batch) -> float:
        """Train on a batch and return the loss."""
        return self.program.step(batch)["loss"]

    def squares(self, batch: Batch) -> Squares:
        """Return what a backward pass measures; nothing is changed."""
        return self.program.execution.trial(batch, self.executor).squares


def model(size: Size) -> nn.Module:
    """Build the same model each time."""
    torch.manual_seed(0)
    return gpt(size.layers, size.width, size.heads, size.context)


def random_text(size: Size) -> Batch:
    """Return a batch of random bytes."""
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (size.samples, size.context + 1), generator=source)
    return ids[:, :-1], ids[:, 1:]


def versions(size: Size) -> dict[str, Version | str]:
    """Return everything that is compared by name, or why it is not."""
    found: dict[str, Version | str] = {PLAIN: ByHand(model(size)), AGAIN: ByHand(model(size))}
    found["trainc, no measurement"] = Ours(size, None, "module")
    for what, on in ON.items():
        found[f"trainc, {what}, graph"] = Ours(size, on, "graph")
        found[f"trainc, {what}, modules"] = Ours(size, on, "module")
    for what, kinds in KINDS.items():
        found[f"hooks, {what}"] = Hooks(model(size), kinds)
    found["Opacus ghost norms, Linear"] = attempt(Opacus, model(size))
    found["Opacus, both its passes, Linear"] = attempt(OpacusTwice, model(size))
    found["BackPACK BatchL2Grad, Linear"] = attempt(BackPack, model(size))
    return found


def disagreement(version: Version, batch: Batch, truth: Squares) -> float | None:
    """Return the largest difference to the truth, relative to a parameter's largest square; None: measures nothing."""
    if isinstance(version, Ours):
        found = version.squares(batch)
    else:
        assert isinstance(version, ByHand)
        version.backward(batch)
        found = dict(version.squares())
        version.optimizer.zero_grad()
    worst = [float((truth[n] - own).abs().max() / truth[n].max()) for n, own in found.items()]
    return max(worst) if worst else None


def peak_memory(version: Version, batch: Batch) -> int:
    """Return by how many bytes the tensors of a step exceed what was there before it, at their most."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        version.step(batch)
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(sizes: dict[str, Size] | None = None, rounds: int = 30) -> Json:
    """Measure all sizes on one thread."""
    torch.set_num_threads(1)
    found: Json = {}
    for name, size in (sizes or SIZES).items():
        found[name] = _measure(size, rounds)
        print(table(name, found[name]), flush=True)
    return {
        "expected": EXPECTED,
        "met": {name: _met(one) for name, one in found.items()},
        "measured": found,
    }


def _measure(size: Size, rounds: int) -> Json:
    batch, made = random_text(size), versions(size)
    running = {name: one for name, one in made.items() if not isinstance(one, str)}
    truth = one_by_one(model(size), batch)
    apart = {name: disagreement(one, batch, truth) for name, one in running.items()}
    for name, worst in apart.items():
        if worst is not None and not worst < AGREEMENT:
            raise RuntimeError(
                f"{name} is {worst:.2g} off the norms by definition: nothing is compared"
            )

    times = _timed(running, batch, rounds)
    rows: Json = {}
    for name, one in made.items():
        if isinstance(one, str):
            rows[name] = {"not measured": one.removeprefix("not measured: ")}
            continue
        worst = apart[name]
        rows[name] = {
            "to plain": compared(*times[name]),
            "least to least of plain": _of_least(*times[name]),
            "seconds": seconds(times[name][0]),
            "peak of a step, MiB": round(peak_memory(one, batch) / 2**20, 1),
            "off the norms by definition": None if worst is None else float(f"{worst:.2g}"),
        }
    told: Json = {"size": asdict(size), "versions": rows}
    if len(times.get("Opacus ghost norms, Linear", ((), ()))[0]) == rounds:
        told["Opacus to trainc, Linear"] = _against_opacus(times)
    return told


def _of_least(ours: list[Times], plain: list[Times]) -> float:
    """Return the ratio of the least processor times: what a busy machine disturbs least."""
    return round(min(t.cpu for t in ours) / min(t.cpu for t in plain), 4)


def _timed(
    running: dict[str, Version], batch: Batch, rounds: int
) -> dict[str, tuple[list[Times], list[Times]]]:
    """Return the times of each version and those of the plain step in the same rounds."""

    def once(name: str) -> Callable[[], Times]:
        return lambda: timed(lambda: running[name].step(batch))

    for name in running:
        once(name)()
    first = {name: once(name)().cpu for name in running}
    slow = [name for name, spent in first.items() if spent > SLOW * first[PLAIN]]
    found: dict[str, tuple[list[Times], list[Times]]] = {}
    quick = [name for name in running if name not in slow]
    for names, count in ((quick, rounds), ([PLAIN, *slow], max(3, rounds // 10))):
        times = in_turn({name: once(name) for name in names}, count, warm_up=1)
        found = {name: (one, times[PLAIN]) for name, one in times.items()} | found
    return found


def _against_opacus(times: dict[str, tuple[list[Times], list[Times]]]) -> Json:
    """Return how many times longer a step with Opacus' ghost norms takes, and what it adds to a plain step."""
    theirs, plain = times["Opacus ghost norms, Linear"]
    told: Json = {}
    for executor in ("graph", "modules"):
        ours = times[f"trainc, Linear, {executor}"][0]
        extra = [
            median(a.cpu - p.cpu for a, p in zip(t, plain, strict=True)) for t in (theirs, ours)
        ]
        told[executor] = {
            "whole step": compared(theirs, ours)["cpu"],
            "seconds added to a plain step": [round(one, 5) for one in extra],
        }
    return told


def _met(found: Json) -> Json:
    """Return for each goal the figure of the graph, trainc's default, with its interval, and whether it is reached."""
    told: Json = {}
    for what, goal in (("norms", NORMS_GOAL), ("all layers", ALL_GOAL)):
        ratio = found["versions"][f"trainc, {what}, graph"]["to plain"]["cpu"]
        told[f"{what} <= {goal}"] = _judged(ratio, ratio["median"] <= goal)
    rival = found.get("Opacus to trainc, Linear")
    told[f"Opacus / trainc >= {OPACUS_GOAL}"] = "not measured"
    if rival is not None:
        ratio = rival["graph"]["whole step"]
        told[f"Opacus / trainc >= {OPACUS_GOAL}"] = _judged(ratio, ratio["median"] >= OPACUS_GOAL)
    return told


def _judged(ratio: Json, met: bool) -> Json:
    return {"ratio": ratio["median"], "interval": ratio["interval"], "met": met}


def table(name: str, found: Json) -> str:
    """Return what was found at one size, a line for each version."""
    lines = [f"{name}: step to plain (quartiles), of least times, milliseconds, peak MiB"]
    for version, row in found["versions"].items():
        if "not measured" in row:
            lines.append(f"  {version:32} not measured: {row['not measured']}")
            continue
        ratio, spent = row["to plain"]["cpu"], row["seconds"]["cpu"]["median"]
        low, high = ratio["quartiles"]
        lines.append(
            f"  {version:32} {ratio['median']:6.3f} ({low:.3f} to {high:.3f})"
            f" {row['least to least of plain']:6.3f} {1e3 * spent:8.1f} {row['peak of a step, MiB']:8.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="steps of each version (30)")
    parser.add_argument("--size", choices=list(SIZES), help="one size alone")
    parser.add_argument("--small", action="store_true", help="a toy size, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "noise_scale.json")
    given = parser.parse_args()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        sizes = {given.size: SIZES[given.size]} if given.size else SIZES
        found = measure(SMALL if given.small else sizes, given.rounds)
    write(given.out, "noise_scale", found)
    print(json.dumps(found["met"], indent=1))


if __name__ == "__main__":
    main()
