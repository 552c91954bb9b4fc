"""The summary of a run: how it ended, with its losses; and the evaluation on held-out samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trainc.runtime.data.order import Split
from trainc.runtime.run.interface import RunnableProgram

EXIT_CODES = {"finished": 0, "stopped": 0, "nan": 3, "interrupted": 130, "terminated": 143}


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended; `reason` is a key of `EXIT_CODES`, `seconds` is the time of this process's steps."""

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

    @property
    def exit_code(self) -> int:
        """Return the exit status for the process that ran it."""
        return EXIT_CODES[self.reason]


def evaluate(program: RunnableProgram, split: Split) -> dict[str, float]:
    """Return `eval_loss` and other means over the targets of the split's first samples."""
    size = program.micro_size
    samples = min(len(split), program.settings.evaluation_batches * size or len(split))
    loss, count = 0.0, 0
    sums: dict[str, float] = {}
    for at in range(0, samples, size):
        inputs, targets = split.batch(range(at, min(at + size, samples)))
        batch_loss, batch_count, others = program.evaluate(inputs, targets)
        loss, count = loss + batch_loss, count + batch_count
        for name, value in others.items():
            sums[name] = sums.get(name, 0.0) + value
    totals = {"loss": loss, **sums}
    return {f"eval_{name}": total / count if count else math.nan for name, total in totals.items()}
