"""Training runs that claims are made of: a spec, a small GPT, the standard library's text, and a seed."""

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import trainc
from benchmarks import ROOT
from benchmarks.measure import Json, load, machine
from examples.data import Data, stdlib
from examples.models import Norm, gpt
from trainc.compiler.program.program import Program
from trainc.runtime.data.order import Order
from trainc.runtime.data.reader import Reader
from trainc.runtime.storage.random_streams import seed_step

RESULTS = ROOT / "benchmarks/results"
Look = Callable[[Program, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Model:
    """A small GPT over bytes."""

    layers: int
    width: int
    context: int
    norm: Norm = "layer"
    heads: int = 4

    def build(self, seed: int) -> torch.nn.Module:
        """Build it with the weights that belong to a seed."""
        torch.manual_seed(seed)
        return gpt(self.layers, self.width, self.heads, self.context, norm=self.norm)


def train(spec: str, model: Model, data: Data, seed: int, look: Look) -> float:
    """Train to the spec's length and return the processor seconds of the steps after the first.

    The first step captures graphs, which a long run does not notice. `look(program, metrics)` is
    called after every step, off the clock.
    """
    program = trainc.compile(spec, model.build(seed))
    spent, begin = 0.0, time.process_time()
    for metrics in steps(program, data, seed):
        if program.clock.steps > 1:
            spent += time.process_time() - begin
        look(program, {**metrics, "seconds": spent})
        begin = time.process_time()
    return spent


def steps(program: Program, data: Data, seed: int) -> Iterator[dict[str, float]]:
    """Train a program to its length, and yield what each step measured."""
    reader, length = Reader(data, Order(seed, len(data.train))), program.length
    assert length is not None
    while not length.done(program.clock):
        seed_step(seed, program.clock.steps, 0)
        program.begin()
        wanted = program.clock.samples, program.batch_size, program.micro_size
        batches = reader.read(*wanted)
        yield program.step(batches, sample_ids=reader.sample_ids(*wanted))


class HeldOut:
    """The loss on the same few held-out windows, spread evenly over the held-out text."""

    def __init__(self, data: Data, windows: int) -> None:
        count = len(data.evaluation)
        self.batch = data.evaluation.batch([i * count // windows for i in range(windows)])

    def __call__(self, program: Program) -> float:
        """Return the mean loss a target."""
        total, count, _ = program.evaluate(*self.batch)
        return total / count


def text(context: int) -> Data:
    """Read the standard library's sources in windows of `context` bytes."""
    return stdlib(context=context)


class Records:
    """Finished runs, one JSON line each: what is there is not run again. Several processes may share a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[Json] = []

    def get(self, key: Json, make: Callable[[], Json]) -> Json:
        """Return the record of a run with this key, made and written now if there is none."""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.found += map(json.loads, lines[len(self.found) :])
        for record in self.found:
            if record["run"] == key:
                return record
        record = {"run": key, **make(), "load average": load()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record


def parser(about: str | None, name: str, count: int) -> ArgumentParser:
    """Return a parser of what every claim's command line has: seeds, a toy size, files, and a note.

    `about` is the script's docstring, and `count` how many seeds are compared unless told.
    """
    made = ArgumentParser(description=(about or "").partition("\n")[0])
    made.add_argument("--seeds", type=int, default=count, help=f"seeds that are compared ({count})")
    made.add_argument("--small", action="store_true", help="a toy size, to try the script")
    made.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    made.add_argument("--records", type=Path, help="finished runs, JSON lines beside the result")
    made.add_argument("--note", help="what a reader of the result should know of the machine")
    return made


def definition(about: str | None) -> list[str]:
    """Return what a script's docstring says after its first line."""
    return (about or "").partition("\n\n")[2].split("\n")


def key_of(run: object, **more: object) -> Json:
    """Return the settings of a run, a dataclass, as JSON that compares equal after it was written."""
    found: Json = json.loads(json.dumps({**asdict(run), **more}))  # type: ignore[call-overload]
    return found


def write(out: Path, name: str, found: Json, note: str | None = None) -> None:
    """Write a result with the machine it was taken on, as benchmarks/run.py does, and a note on how."""
    result = {
        "benchmark": name,
        "taken": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "load average at the end": load(),
        **({} if note is None else {"note": note}),
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def seeds(count: int) -> Iterator[int]:
    """Yield the seeds of the compared runs; 0 is left for choosing rates."""
    yield from range(1, count + 1)
