"""What a run says where its records or its output are not what they should be."""

import errno
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.runtime.fake import FakeData, FakeProgram
from tests.runtime.runs import events, run
from trainc.runtime.run.live_display import LiveDisplay
from trainc.runtime.run.loop import train
from trainc.runtime.storage.jsonl import read_jsonl


def test_steps_that_are_missing_from_the_records_are_told(tmp_path: Path) -> None:
    run(tmp_path, stop_after=7)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[2:]))
    run(tmp_path, stop_after=9, resume=True)
    (told,) = (r for r in read_jsonl(tmp_path / "events.jsonl") if r["event"] == "missing-records")
    assert (told["step"], told["message"][:38]) == (7, "metrics.jsonl has 5 of the 7 steps up ")


def test_half_of_an_event_is_cut_and_foreign_lines_are_kept_in_a_copy(tmp_path: Path) -> None:
    run(tmp_path, stop_after=3)
    path = tmp_path / "events.jsonl"
    before = read_jsonl(path)
    path.write_text(path.read_text() + '{"step": 3, "ev')
    run(tmp_path, stop_after=3, resume=True)
    assert read_jsonl(path)[: len(before)] == before
    assert not list(tmp_path.glob("*.damaged-*"))
    path.write_text("mine\n" + path.read_text())
    run(tmp_path, stop_after=3, resume=True)
    assert "damaged-records" in events(tmp_path)
    assert (tmp_path / "events.jsonl.damaged-1").read_text().startswith("mine\n")


class FullDisk(io.StringIO):
    """An output into a file that can take no more."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_output_that_can_take_no_more_is_named(tmp_path: Path) -> None:
    display = LiveDisplay(20, "steps", plain=True, console=Console(file=FullDisk()))
    with pytest.raises(OSError, match="No space left on device: 'standard output'"):
        train(FakeProgram(), FakeData(), out=tmp_path, display=display)
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["event"] == "failed"
