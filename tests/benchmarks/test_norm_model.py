"""The model of the norms' backward: what it says of usual sizes, and that it answers to what it is given."""

import json
from dataclasses import replace

import pytest

from benchmarks.offline import norm_model
from benchmarks.offline.norm_model import BEFORE, H100, H200, SPLIT, Form, backward, finish, report


@pytest.mark.parametrize(
    ("shape", "fraction"), [((8, 512, 768), 0.45), ((64, 64, 4096), 0.75), ((256, 8, 4096), 0.5)]
)
def test_two_launches_reach_what_was_expected_of_them(
    shape: tuple[int, int, int], fraction: float
) -> None:
    found = backward(*shape, H100)
    assert found.launches == 2
    assert found.fraction > fraction > BEFORE[shape]


@pytest.mark.parametrize("device", [H100, H200])
def test_the_last_launch_takes_five_microseconds_at_most(device: norm_model.Device) -> None:
    assert finish(64, 4, 4096, 2, True, device) < 5e-6


def test_by_hand() -> None:
    """One launch: 256 lines of 4096 columns of two sums, in 4 loads that wait, behind a launch."""
    assert finish(64, 4, 4096, 2, True, H100) == pytest.approx(1.2e-6 + 0.7e-6 + 4 * 0.45e-6)
    found = backward(8, 2048, 8192, H100)
    # 8 examples of 16 chunks of 128 rows each, one program a processor; 32 KB of reads under way.
    assert (found.regime, found.programs, found.chunks) == ("split", 128, 16)
    copied = 3 * 2 * 8 * 2048 * 8192 / 3.0e12 * 132 / 128
    partial = 128 * 8192 * 8 / 5.5e12 / 2
    issued = 8 * 2048 * 8192 * 21.8 / (132 * 128 * 1.70e9 * 0.75)
    assert found.main == pytest.approx(2.3e-6 + max(copied, issued) + partial)


def test_faster_rates_fewer_instructions_and_more_programs_take_less() -> None:
    shape = (8, 2048, 4096)
    usual = backward(*shape, H100)
    assert backward(*shape, replace(H100, copied=4e12)).main < usual.main
    slow = Form(80.0, 2)
    assert backward(*shape, H100, split=slow).main > usual.main
    assert backward(*shape, H100, split=replace(SPLIT[4096], held=1)).main > usual.main
    assert backward(*shape, H100, element=4).fraction > usual.fraction


def test_the_report_is_the_one_that_is_kept() -> None:
    assert json.loads(norm_model.RESULT.read_text())["rows"] == json.loads(json.dumps(report()))
