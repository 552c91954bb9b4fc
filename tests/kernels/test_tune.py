"""`trainc tune`: which tiles are compared, which is kept, and what happens without a GPU."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainc.kernels.norm import tiles as table
from trainc.kernels.norm import tune
from trainc.kernels.norm.tiles import Direction, Tile

RESULT = (torch.ones(2),)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("columns", tune.WIDTHS)
def test_the_tables_tile_comes_first_and_nothing_twice(direction: Direction, columns: int) -> None:
    tiles = tune.candidates(direction, columns)
    assert tiles[0] == table.default(direction, columns)
    assert len(tiles) == len(set(tiles)) > 2
    assert all(tile.columns == columns and tile.rows >= 1 for tile in tiles)


def search(cost: Callable[[Tile], float], wrong: tuple[Tile, ...] = ()) -> tune.Measured:
    """Search made-up tiles whose cost is known."""
    tiles = [Tile(1, 1024, 4, resident=number) for number in range(1, 5)]
    ran: list[Tile] = []

    def run(tile: Tile) -> tuple[torch.Tensor, ...]:
        ran.append(tile)
        return (torch.zeros(2),) if tile in wrong else RESULT

    def timer(work: Callable[[], object]) -> float:
        work()
        return cost(ran[-1])

    return tune._best("a key", run, tiles, timer)


def test_the_fastest_is_kept() -> None:
    assert search(lambda tile: 5.0 - tile.resident).tile.resident == 4


def test_what_is_hardly_faster_is_not() -> None:
    found = search(lambda tile: 1.0 - 0.005 * tile.resident)
    assert found.tile.resident == 1
    assert found.seconds == found.before


def test_what_computes_something_else_is_not() -> None:
    wrong = (Tile(1, 1024, 4, resident=4),)
    assert search(lambda tile: 5.0 - tile.resident, wrong).tile.resident == 3


def test_what_does_not_fit_the_device_is_passed_over() -> None:
    class OutOfResources(Exception):
        pass

    def cost(tile: Tile) -> float:
        if tile.resident == 4:
            raise OutOfResources
        return 5.0 - tile.resident

    assert search(cost).tile.resident == 3


@pytest.mark.interpreter
def test_every_kernel_is_measured() -> None:
    found = list(
        tune.tune(lambda work: float(work() is None), [32], [torch.float32], "cpu", elements=512)
    )
    assert [one.key for one in found] == [
        "forward layer float32 32", "forward rms float32 32",
        "backward layer float32 32", "backward rms float32 32",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from trainc.cli.app import main

    monkeypatch.setenv("TRAINC_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["trainc", "tune"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
