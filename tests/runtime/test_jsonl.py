"""JSON lines: exact, and cut where a resumed run continues."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainc.runtime.storage.jsonl import JsonlWriter, decode, encode, read_jsonl, truncate


def lines(path: Path, *steps: int) -> None:
    writer = JsonlWriter(path)
    for step in steps:
        writer.write({"step": step, "loss": 1 / (step + 1)})
    writer.close()


@given(st.floats())
def test_a_number_reads_back_exactly(number: float) -> None:
    found = decode(json.loads(json.dumps(encode({"x": [number]}), allow_nan=False)))["x"][0]
    assert found == number or (math.isnan(found) and math.isnan(number))
    assert math.copysign(1, found) == math.copysign(1, number) or math.isnan(number)


def test_nan_and_infinity_are_strings(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1, "a": math.nan, "b": math.inf, "c": {"d": -math.inf}})
    writer.close()
    assert path.read_text() == '{"step": 1, "a": "nan", "b": "inf", "c": {"d": "-inf"}}\n'
    record = read_jsonl(path)[0]
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, {"d": -math.inf})


def test_a_resumed_file_is_cut_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines(path, 1, 2, 2, 3, 4)
    JsonlWriter(path, last_step=2).close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 2]
    lines(path, 3)
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 2, 3]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"\x00\x00\x00", b'{"step": 2}'])
def test_a_half_written_line_is_cut(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.jsonl"
    lines(path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(read_jsonl(path)) == 1
    truncate(path, 9)
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        read_jsonl(path)


def test_what_is_synced_is_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path, interval=math.inf)
    writer.write({"step": 1})
    assert path.read_text() == ""
    writer.sync()
    assert path.read_text() == '{"step": 1}\n'
    writer.close()
    writer.close()
