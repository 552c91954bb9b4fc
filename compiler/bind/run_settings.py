"""The settings that the training loop takes from the `run` clause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainc.runtime.schedule.gate import Gate

if TYPE_CHECKING:
    from trainc.compiler.bind.binding import Binding


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The seed, when to evaluate and save, and what a non-finite loss does."""

    seed: int = 0
    evaluate_every: Gate | None = None
    checkpoint_every: Gate | None = None
    evaluation_batches: int = 8
    keep: int = 2
    on_nan: Literal["stop", "skip", "continue"] = "stop"


def run_settings(binding: Binding) -> RunSettings:
    """Return seed, gates and policies; the defaults where the spec has no run."""
    clause = binding.one("run")
    if clause is None:
        return RunSettings()
    run: Any = clause.construct
    return RunSettings(
        seed=run.seed,
        evaluate_every=_gate(run.eval, binding),
        checkpoint_every=_gate(run.checkpoint, binding),
        evaluation_batches=run.eval_batches,
        keep=run.keep,
        on_nan=run.on_nan,
    )


def _gate(every: Any, binding: Binding) -> Gate | None:
    if every is None:
        return None
    return Gate.resolve(binding.units, binding.length, every=every)
