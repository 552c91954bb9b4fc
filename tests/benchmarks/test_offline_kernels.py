"""The report on kernels without a device: what is recorded is what is launched, and goals are judged by it."""

import json
from typing import Any

import pytest

from benchmarks import ROOT, offline_kernels
from benchmarks.measure import Json
from benchmarks.offline.fake_driver import programs_a_processor
from benchmarks.offline_kernels import RESULT, as_text, code_hash, goals, joined, recorded, sources


@pytest.mark.offline
def test_a_norm_is_recorded_as_it_is_launched() -> None:
    forward, backward = recorded(ROOT, "90", "layer_norm 8x512x768")["launches"]
    assert [forward["phase"], backward["phase"]] == ["forward", "backward"]
    assert forward["target"] == "sm_90"
    assert [one["kernel"] for one in forward["kernels"]] == ["norm_forward"]
    assert (forward["launches"], forward["aten"]) == (1, [])
    # x and y in 16 bits, two parameters of 16 bits, two float32 statistics a row.
    entries = 8 * 512 * 768
    assert forward["bytes"] == 2 * entries * 2 + 2 * 768 * 2 + 2 * 8 * 512 * 4
    # Backward reads x and dy and writes dx, and partial rows beside them; nothing is launched but its two kernels.
    assert entries * 6 < backward["bytes"] < entries * 6 * 1.3
    assert len(backward["kernels"]) == backward["launches"] == 2
    for one in (*forward["kernels"], *backward["kernels"]):
        assert 16 <= one["registers"] <= 255
        assert one["spilled bytes"] == 0
        assert one["programs a processor"] >= 1
    assert 5 < forward["kernels"][0]["instructions an element"] < 40


@pytest.mark.offline
def test_operators_of_aten_count_as_launches() -> None:
    (found,) = (
        one
        for one in recorded(ROOT, "90", "embedding 8x512x1024")["launches"]
        if one["phase"] == "backward"
    )
    assert "sort" in found["aten"]
    assert found["launches"] == len(found["aten"]) + len(found["kernels"])


def test_programs_of_a_processor_are_bound_by_what_runs_out_first() -> None:
    assert programs_a_processor(registers=128, shared=0, warps=8, architecture=90) == 2
    assert programs_a_processor(registers=129, shared=0, warps=8, architecture=90) == 1  # of eights
    assert programs_a_processor(registers=32, shared=64 << 10, warps=4, architecture=90) == 3
    assert programs_a_processor(registers=32, shared=64 << 10, warps=4, architecture=80) == 2
    assert programs_a_processor(registers=16, shared=0, warps=8, architecture=90) == 8  # 64 warps
    assert programs_a_processor(registers=16, shared=0, warps=1, architecture=90) == 32


def row(operator: str, phase: str, launches: int, instructions: float, spilled: int) -> Json:
    kernel = {
        "kernel": "k", "instructions an element": instructions, "registers": 40, "spilled bytes": spilled,
    }  # fmt: skip
    return {
        "operator": operator, "size": [1, 2, 3], "dtype": "bfloat16", "phase": phase, "target": "sm_90",
        "launches": launches, "kernels": [kernel], "aten": [], "bytes": 8,
    }  # fmt: skip


@pytest.mark.parametrize("reached", [True, False])
def test_goals_are_judged(reached: bool) -> None:
    rows = [
        row("add_rms_norm", "backward", 2 if reached else 3, 20.0, 0),
        row("linear", "backward", 9, 20.0, 0 if reached else 8),
        row("loss, kl", "forward", 9, 9.6 if reached else 10.1, 0),
        row("loss, kl", "backward", 9, 30.0, 0),
    ]
    tables = [
        {"model": "7B", "tensors": 3, "host us": 10.0 if reached else 12.0, "device us": 11.0}
    ]
    found = goals({"launches": rows, "tables": tables})
    assert [goal["reached"] for goal in found] == [reached] * 4


def test_operators_recorded_alone_take_the_place_of_their_own_rows() -> None:
    def rows(*named: str) -> list[Json]:
        return [
            {**row(name, "forward", 1, 1.0, 0), "target": t} for t, name in map(str.split, named)
        ]

    known = {"launches": rows("sm_90 a", "sm_90 b", "sm_80 a"), "host": rows("- a"), "tables": [1]}
    found = {"launches": rows("sm_90 b2", "sm_90 b", "sm_80 b"), "host": rows("- b")}
    together = joined(known, found, "b")
    assert [(one["target"], one["operator"]) for one in together["launches"]] == [
        ("sm_90", "a"), ("sm_90", "b2"), ("sm_90", "b"), ("sm_80", "a"), ("sm_80", "b"),
    ]  # fmt: skip
    assert [one["operator"] for one in together["host"]] == ["a", "b"]
    assert together["tables"] == [1]


def test_the_file_has_a_line_for_each_row_and_says_what_it_compares_with() -> None:
    found: dict[str, Any] = {
        "goals": [], "before": {"commit": "abc", "launches": [{"a": 1}, {"a": 2}]}, "after": {"launches": []},
    }  # fmt: skip
    text = as_text(found)
    assert json.loads(text) == found
    assert '\n   {"a": 2}\n' in text
    kept = json.loads(RESULT.read_text())
    assert kept["before"]["commit"] == offline_kernels.BEFORE
    assert {one["target"] for one in kept["after"]["launches"]} == {"sm_80", "sm_90", "sm_100"}


def test_the_report_is_of_the_kernels_as_they_are() -> None:
    recorded_of, now = json.loads(RESULT.read_text())["sources"], sources()
    assert "kernels/norm/triton_norm.py" in now
    others = sorted(path for path in {*now, *recorded_of} if now.get(path) != recorded_of.get(path))
    assert not others, (
        f"run python -m benchmarks.offline_kernels: {others} are others than in the report"
    )


def test_comments_are_no_code() -> None:
    text = "X = 1\n\n\ndef f(x):\n    return x + X\n"
    same = '"""File."""\nX = 1  # one\n"""Of X."""\ndef f(x):\n    """Function."""\n    return (x + X)\n'
    assert code_hash(text) == code_hash(same)
    assert code_hash(text) != code_hash(text.replace("X = 1", "X = 2"))
    assert code_hash(text) != code_hash(text.replace("x + X", "x - X"))
