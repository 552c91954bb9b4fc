"""The loop: what it writes, what ends it, what it refuses."""

import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.fake import FakeData, FakeProgram, ReportingProgram
from tests.runtime.runs import assert_equal_runs, events, run
from trainc.runtime.data.batch import Evaluated
from trainc.runtime.run.interface import NonFiniteLoss, ReportsSteps, RunnableProgram
from trainc.runtime.run.loop import train
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.step.action import StopRun
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl
from trainc.runtime.storage.run_folder import RunExists


def test_the_fake_program_is_a_program() -> None:
    program: RunnableProgram = FakeProgram()
    assert not isinstance(program, ReportsSteps)
    assert isinstance(ReportingProgram(), ReportsSteps)


def test_a_run_writes_the_documented_files(whole: Path) -> None:
    records = read_jsonl(whole / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert [r["step"] for r in records if "eval_loss" in r] == [4, 8, 12, 16, 20]
    assert records[-2] == {
        "step": 20,
        "samples": 10 * 8 + 10 * 12,
        "tokens": 600,
        "epochs": 4.0,
        "batch": 12,
        "loss": records[-2]["loss"],
        "lr_min": records[-2]["lr_min"],
        "lr_max": records[-2]["lr_max"],
    }
    assert set(records[-1]) == {"step", "eval_loss", "eval_error"}
    timing = read_jsonl(whole / "timing.jsonl")
    assert [r["step"] for r in timing if "seconds_forward" in r] == list(range(1, 21))
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["step-00000018", "step-00000020"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["reason"] == "finished"
    assert summary["steps"] == 20
    assert summary["eval_loss"] == records[-1]["eval_loss"]
    assert summary["lines"] == ["a linear layer was trained"]


def test_a_run_is_not_overwritten(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, stop_after=5, texts={"spec.train": "train 1"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunExists, match="already holds a run"):
        run(tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    run(tmp_path, overwrite=True)
    assert_equal_runs(whole, tmp_path)
    for path, content in before.items():
        if path.name != ".lock":
            assert (tmp_path / "previous-1" / path.relative_to(tmp_path)).read_bytes() == content
    run(tmp_path, overwrite=True)
    assert (tmp_path / "previous-2").is_dir()


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    program = FakeProgram()

    def stop() -> str | None:
        with pytest.raises(RunExists, match="in use"):
            run(tmp_path, overwrite=True)
        return "interrupted"

    train(program, FakeData(), out=tmp_path, stop_requested=stop)


def test_texts_are_kept_and_changed_ones_stay(tmp_path: Path) -> None:
    run(tmp_path, stop_after=5, texts={"spec.train": "one", "plan.txt": "plan"})
    run(tmp_path, stop_after=9, resume=True, texts={"spec.train": "two", "plan.txt": "plan"})
    assert (tmp_path / "spec.train").read_text() == "two"
    assert (tmp_path / "spec.train.until-5").read_text() == "one"
    assert len(list(tmp_path.glob("plan.txt*"))) == 1
    with pytest.raises(ValueError, match="cannot be a text in the folder"):
        run(tmp_path, resume=True, texts={"../spec": "x"})


def test_a_non_finite_loss_stops_the_run_and_saves_nothing(tmp_path: Path) -> None:
    summary = run(tmp_path, FakeProgram(nan_at=8))
    assert (summary.reason, summary.exit_code, summary.steps) == ("nan", 3, 9)
    assert "step-00000006" in summary.message
    assert checkpoint.find_latest(tmp_path / "checkpoints").step == 6
    assert str(read_jsonl(tmp_path / "metrics.jsonl")[-1]["loss"]) == "nan"
    assert json.loads((tmp_path / "summary.json").read_text())["loss"] == "nan"


def test_a_run_may_continue_after_a_non_finite_loss(tmp_path: Path) -> None:
    program = FakeProgram(nan_at=11)
    program.settings = replace(program.settings, on_nan="continue")
    assert run(tmp_path, program).reason == "finished"
    # Step 12 was to be saved, but its loss was not finite.
    assert {"non-finite-loss", "checkpoint-withheld"} <= set(events(tmp_path))
    saved = [r["step"] for r in read_jsonl(tmp_path / "events.jsonl") if r["event"] == "saved"]
    assert saved == [6, 18, 20]


class Checked(FakeProgram):
    """Says that its state is not sound after the steps of `bad`, and counts steps as skipped from `skip_from` on."""

    def __init__(self, bad: Collection[int] = (), skip_from: int = 99, **given: Any) -> None:
        super().__init__(**given)
        self.bad, self.skip_from, self.unsound_steps = bad, skip_from, 0

    def unsound_state(self) -> str | None:
        return "`w` is not finite" if self.clock.steps in self.bad else None

    def step(self, micro_batches: Any) -> dict[str, float]:
        metrics = super().step(micro_batches)
        if self.clock.steps <= self.skip_from:
            return metrics
        self.unsound_steps += 1
        return metrics | {"skipped": 1.0, "gradient_norm": math.nan}


def test_a_good_checkpoint_is_never_pruned_for_one_that_is_not_sound(tmp_path: Path) -> None:
    program = Checked(bad=(12, 18, 20))
    program.settings = replace(program.settings, keep=1)
    summary = run(tmp_path, program)
    assert (summary.reason, summary.exit_code, summary.checkpoint) == ("nan", 3, "step-00000006")
    assert summary.message.endswith(
        "but `w` is not finite: it is not saved; the last checkpoint before that is step-00000006"
    )
    assert checkpoint.find_latest(tmp_path / "checkpoints").step == 6
    assert events(tmp_path).count("checkpoint-withheld") == 3


def test_a_checkpoint_that_is_not_sound_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path, Checked(), stop_after=9)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"step-00000009 .*`w` is not finite"):
        run(tmp_path, Checked(bad=(9,)), resume=True)


def test_skipped_steps_are_told_by_summary_and_exit_code(tmp_path: Path) -> None:
    program = Checked(skip_from=17)
    program.settings = replace(program.settings, on_nan="skip")
    summary = run(tmp_path, program)
    assert (summary.reason, summary.skipped, summary.exit_code) == ("finished", 3, 4)
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == 3
    told = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["event"] == "non-finite-gradient"]
    assert [event["step"] for event in told] == [18, 19, 20]
    assert told[0]["message"].endswith("at step 18: skipped")
    assert checkpoint.find_latest(tmp_path / "checkpoints").step == 20


def test_an_evaluation_that_is_not_finite_is_an_event(tmp_path: Path) -> None:
    class Divided(FakeProgram):
        def evaluate(self, inputs: Any, targets: Any) -> Evaluated:
            return (math.nan if self.clock.steps == 8 else 1.0), len(targets), {}

    assert run(tmp_path, Divided()).reason == "finished"
    found = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["event"].startswith("non-")]
    assert [(e["event"], e["step"]) for e in found] == [("non-finite-evaluation", 8)]
    assert "eval_loss is nan" in found[0]["message"]


def test_a_rule_ends_the_run_after_its_step(whole: Path, tmp_path: Path) -> None:
    summary = run(tmp_path, FakeProgram(stop_at=13))
    assert (summary.reason, summary.message, summary.steps) == ("stopped", "enough", 14)
    assert summary.eval_loss is not None
    assert checkpoint.find_latest(tmp_path / "checkpoints").step == 14
    steps = [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 15))


def test_a_refused_update_saves_the_weights_before_it(tmp_path: Path) -> None:
    class Careful(FakeProgram):
        def step(self, micro_batches: Any) -> dict[str, float]:
            if self.clock.steps == 8:
                raise NonFiniteLoss("the loss is nan")
            return super().step(micro_batches)

    summary = run(tmp_path, Careful())
    assert (summary.reason, summary.steps) == ("nan", 8)
    assert summary.message == "the loss is nan; the last checkpoint before that is step-00000008"


def test_a_rule_may_end_the_run_as_its_next_step_opens(whole: Path, tmp_path: Path) -> None:
    class Ruled(FakeProgram):
        def begin(self) -> None:
            super().begin()
            if self.clock.steps == 9:
                raise StopRun("the rule stopped the run")

    summary = run(tmp_path, Ruled())
    assert (summary.reason, summary.message, summary.steps) == (
        "stopped",
        "the rule stopped the run",
        9,
    )
    assert summary.eval_loss is not None
    (tmp_path / "metrics.jsonl").write_bytes(
        b"".join((tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:-1])
    )
    run(tmp_path, resume=True)
    assert_equal_runs(whole, tmp_path)


def test_a_program_can_report_series_and_notes(tmp_path: Path) -> None:
    summary = run(tmp_path, ReportingProgram())
    assert (summary.reason, summary.message, summary.steps) == ("stopped", "reported", 15)
    records = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "series" in r]
    assert len(records) == 15
    assert set(records[0]["series"]["norm"]) == {"0", "3"}
    told = read_jsonl(tmp_path / "events.jsonl")
    assert [r["step"] for r in told if r["event"] == "saved"] == [3, 6, 12, 15]
    assert [r["message"] for r in told if r["event"] == "note"] == ["step three"]


def test_a_failure_is_recorded_and_closes_the_files(tmp_path: Path) -> None:
    class Broken(FakeProgram):
        def step(self, micro_batches: Any) -> dict[str, float]:
            if self.clock.steps == 7:
                raise MemoryError("too large")
            return super().step(micro_batches)

    with pytest.raises(MemoryError):
        run(tmp_path, Broken())
    assert events(tmp_path)[-1] == "failed"
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] == 7


def test_a_program_that_miscounts_is_caught(tmp_path: Path) -> None:
    class Still(FakeProgram):
        def step(self, micro_batches: Any) -> dict[str, float]:
            return {"loss": 1.0}

    with pytest.raises(RuntimeError, match="left the clock at"):
        run(tmp_path, Still())


@pytest.mark.parametrize(
    ("length", "steps"),
    [(RunLength(100, "samples"), 12), (RunLength(2, "epochs"), 12), (RunLength(240, "tokens"), 10)],
)
def test_a_run_may_be_as_long_as_any_unit_says(
    tmp_path: Path, length: RunLength, steps: int
) -> None:
    assert run(tmp_path, FakeProgram(length)).steps == steps


def test_a_run_without_held_out_samples_is_not_evaluated(tmp_path: Path) -> None:
    summary = train(
        FakeProgram(), FakeData(evaluation=None), out=tmp_path, stop_requested=lambda: None
    )
    assert summary.eval_loss is None
    assert "nan" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_program_without_a_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no length"):
        run(tmp_path, FakeProgram(None))


def test_seconds_are_counted_where_the_program_does_not(tmp_path: Path) -> None:
    program = FakeProgram()
    run(tmp_path, program)
    assert program.clock.seconds > 0
