"""Whole runs on data with a bad batch: what is saved, what is said, and the exit code."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.test_sound_steps import Rooted
from tests.runtime.runs import events
from trainc.cli.report import FIGURES, RecordedRun
from trainc.compiler.driver.train import train
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

SPEC = """
model "tests.compiler.test_sound_runs:net"
data "tests.compiler.test_sound_runs:data" {{ batch = 4 samples{data} }}
loss cross_entropy
run {{ length = 12 steps, checkpoint = 2 steps, eval = 6 steps, on_nan = {on_nan} }}
optimizer adamw {{ lr = 1e-2 }}
"""


class Split:
    """Samples of which those of `bad` have a gradient that is NaN, or are NaN themselves."""

    tokens_per_sample = 1

    def __init__(self, bad: Sequence[int], what: str) -> None:
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.rand(48, 4, generator=g) + 0.1, torch.randint(3, (48,), generator=g)
        for i in bad:
            self.x[i, 0] = math.nan if what == "loss" else 0.0

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        i = torch.as_tensor(list(indices))
        return self.x[i], self.y[i]


class Data:
    tokens_per_sample = 1

    def __init__(self, bad: Sequence[int], what: str, held_out: bool) -> None:
        self.train = Split(bad, what)
        self.evaluation = Split([0] if held_out else [], "loss")


def data(bad: int = -1, what: str = "gradient", held_out: bool = False) -> Data:
    return Data([bad] if bad >= 0 else [], what, held_out)


def net() -> nn.Module:
    return Rooted()


def trained(out: Path, on_nan: str = "skip", data: str = "", **given: Any) -> Summary:
    return train(SPEC.format(on_nan=on_nan, data=data), out, quiet=True, **given)


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_run_that_skips_a_bad_batch_saves_sound_checkpoints(tmp_path: Path, what: str) -> None:
    summary = trained(tmp_path, data=f', bad = 3, what = "{what}"')
    assert (summary.reason, summary.skipped, summary.exit_code) == ("finished", 1, 4)
    assert "skipped 1 of 12 steps" in "\n".join(summary.lines)
    assert f"non-finite-{what}" in events(tmp_path)
    state = checkpoint.load_checkpoint(tmp_path / "checkpoints" / str(summary.checkpoint))
    assert all(t.isfinite().all() for t in state["program"]["model"].values())
    run = RecordedRun(tmp_path)
    assert FIGURES["steps skipped"](run) == "1"
    assert "nan" not in FIGURES["loss, last 10%"](run)


def test_a_run_that_stops_at_a_bad_batch_names_a_sound_checkpoint(tmp_path: Path) -> None:
    summary = trained(tmp_path, "stop", ", bad = 3")
    assert (summary.reason, summary.exit_code) == ("nan", 3)
    assert "the gradient norm is nan, although the loss is" in summary.message
    assert f"the last checkpoint before that is step-{summary.steps:08d}" in summary.message
    state = checkpoint.load_checkpoint(tmp_path / "checkpoints" / str(summary.checkpoint))
    assert all(t.isfinite().all() for t in state["program"]["model"].values())


def test_a_run_that_goes_on_keeps_the_checkpoints_from_before(tmp_path: Path) -> None:
    """Weights are NaN from the bad batch on: nothing after it is saved, and the end says so."""
    summary = trained(tmp_path, "continue", ", bad = 3")
    assert (summary.reason, summary.exit_code) == ("nan", 3)
    assert "the run has reached its length, but" in summary.message
    first_bad = next(
        r["step"]
        for r in read_jsonl(tmp_path / "metrics.jsonl")
        if not math.isfinite(r.get("gradient_norm", 0.0))
    )
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept
    assert all(int(name[5:]) < first_bad for name in kept)


def test_a_resumed_run_counts_the_steps_that_were_skipped_before(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", data=", bad = 3")
    asked = iter([None] * 9 + ["interrupted"])

    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "trainc.runtime.run.stop_signals.StopSignals.requested", lambda self: next(asked)
        )
        assert trained(part, data=", bad = 3").reason == "interrupted"
    again = trained(part, data=", bad = 3", resume=True)
    assert again.lines == whole.lines
    assert (again.skipped, again.exit_code) == (whole.skipped, whole.exit_code)


def test_an_evaluation_that_is_nan_is_an_event(tmp_path: Path) -> None:
    summary = trained(tmp_path, "stop", ", held_out = true")
    assert summary.reason == "finished"
    assert events(tmp_path).count("non-finite-evaluation") == 2
    assert FIGURES["lowest evaluation loss"](RecordedRun(tmp_path)) == "none"
