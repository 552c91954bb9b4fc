"""Short ways to run the fake program and to compare what two runs left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.runtime.fake import FakeData, FakeProgram
from trainc.runtime.run.loop import train
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl


def run(
    out: Path, program: FakeProgram | None = None, stop_after: int = -1, **options: Any
) -> Summary:
    program = program or FakeProgram()
    taken = program

    def stop() -> str | None:
        return "interrupted" if taken.clock.steps == stop_after else None

    return train(program, FakeData(), out=out, stop_requested=stop, **options)


def outcome(out: Path) -> tuple[bytes, dict[str, Any]]:
    """Return what two equal runs share: the metrics, byte for byte, and the last state."""
    path = checkpoint.find_latest(out / "checkpoints").path
    assert path is not None
    return (out / "metrics.jsonl").read_bytes(), checkpoint.load_checkpoint(path)


def same(left: Any, right: Any) -> bool:
    """Compare states bit by bit, times left out."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        keys = left.keys() - {"seconds"}
        return keys == right.keys() - {"seconds"} and all(same(left[k], right[k]) for k in keys)
    return bool(left == right)


def assert_equal_runs(left: Path, right: Path) -> None:
    (metrics, state), (other_metrics, other_state) = outcome(left), outcome(right)
    assert metrics == other_metrics
    assert same(state, other_state)


def events(out: Path) -> list[str]:
    return [record["event"] for record in read_jsonl(out / "events.jsonl")]
