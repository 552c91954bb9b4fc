"""Read the settings of the training loop from the `run` clause."""

from __future__ import annotations

from typing import Any

from trainc.compiler.bind.binding import Binding
from trainc.runtime.run.interface import SKIP_LIMIT, RunSettings
from trainc.runtime.schedule.gate import Gate


def run_settings(binding: Binding) -> RunSettings:
    """Return the settings of the `run` clause; the defaults where the spec has none."""
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
        skip_limit=run.skip_limit or SKIP_LIMIT,
    )


def _gate(every: Any, binding: Binding) -> Gate | None:
    if every is None:
        return None
    return Gate.resolve(binding.units, binding.length, every=every)
