"""The summary of a run: how it ended, with its losses; and the evaluation on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from trainc.runtime.data.batch import Batch
from trainc.runtime.data.evaluation import read_in_order
from trainc.runtime.data.order import Data
from trainc.runtime.data.parts import Part
from trainc.runtime.processes.team import Team
from trainc.runtime.run.interface import EvaluatesOthers, RunnableProgram
from trainc.runtime.storage.random_streams import derive_seed, seed_step

EXIT_CODES = {"finished": 0, "stopped": 0, "nan": 3, "interrupted": 130, "terminated": 143}
SKIPPED = 4
"""The exit code of a run that reached its end, but skipped steps that were not sound."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended; `reason` is a key of `EXIT_CODES`, `seconds` is the time of this process's steps.

    `skipped` is how many of its steps were skipped because they were not sound.
    """

    reason: str
    message: str
    steps: int
    samples: int
    tokens: int
    epochs: float
    seconds: float
    loss: float | None
    eval_loss: float | None
    checkpoint: str | None
    lines: list[str] = field(default_factory=list)
    skipped: int = 0

    @property
    def exit_code(self) -> int:
        """Return the exit status for the process that ran it."""
        return EXIT_CODES[self.reason] or (SKIPPED if self.skipped else 0)


def evaluate(
    program: RunnableProgram,
    data: Data,
    place: Callable[[Batch], Batch],
    team: Team | None = None,
) -> tuple[dict[str, float], str | None]:
    """Return `eval_loss` and other means over the targets of the first held-out samples.

    `place` puts a batch on the device of the model; each process of the `team` evaluates a part of the batches.
    Second: what was evaluated in place of the trained weights, if the program has such.
    """
    if isinstance(program, EvaluatesOthers):
        others = program.evaluates
        with program.evaluation_weights():
            return _means(program, data, place, team or Team()), others
    return _means(program, data, place, team or Team()), None


def _means(
    program: RunnableProgram, data: Data, place: Callable[[Batch], Batch], team: Team
) -> dict[str, float]:
    part, size, settings = data.evaluation, program.micro_size, program.settings
    assert part is not None
    steps, batches = program.clock.steps, settings.evaluation_batches
    seed, workers = derive_seed(settings.seed, "evaluation", steps), getattr(data, "workers", 0)
    sums: dict[str, list[float]] = {"loss": [0.0, 0.0]}
    own = Part(team.rank, team.size)
    for at, read, counts in read_in_order(part, batches, size, seed, workers, own):
        team.at(f"evaluating after step {steps}")
        # Whoever read the batch, the program draws the same random numbers, before and after a resume.
        seed_step(settings.seed, steps, -1 - at)
        batch_loss, batch_count, others = program.evaluate(*place(read))
        if not counts:
            continue
        found = {"loss": (batch_loss if batch_count else 0.0, batch_count), **others}
        for name, (value, count) in found.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0], total[1] = total[0] + value, total[1] + count
    totals = team.sums({name: (value, count) for name, (value, count) in sums.items()})
    means = {n: value / count if count else math.nan for n, (value, count) in totals.items()}
    if weights := program.loss_weights:
        counted = {name: weight for name, weight in weights.items() if totals.get(name, (0, 0))[1]}
        means["loss"] = sum(weight * means[name] for name, weight in counted.items())
    return {f"eval_{name}": mean for name, mean in means.items()}
