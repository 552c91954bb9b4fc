"""How the Triton norm kernels are launched: tables, regimes, wide rows, the cache of tuned tiles."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainc.kernels.library.grid import cdiv, power_of_2
from trainc.kernels.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    rms_norm,
    tiles,
    tuned_tiles,
)
from trainc.kernels.norm.tiles import Tile

CPU = torch.device("cpu")
SIZES = st.integers(1, 5000)


@given(examples=SIZES, rows=SIZES, block=st.sampled_from([1, 2, 4, 16]), slots=st.integers(1, 600))
def test_chunks_cover_every_row_once(examples: int, rows: int, block: int, slots: int) -> None:
    config = tiles.launch_config(examples, rows, block, slots, slots)
    if config.regime == "rows":
        assert rows == 1
        assert config.programs <= slots
    elif config.regime == "whole":
        assert 1 < rows < tiles.FEW_ROWS
        assert config.programs <= examples
    else:
        length = cdiv(rows, config.chunks)
        assert config.programs == examples * config.chunks
        assert (config.chunks - 1) * length < rows <= config.chunks * length


@pytest.mark.parametrize("slots", [132, 264, 396])
@pytest.mark.parametrize(
    ("examples", "rows"), [(1, 4096), (3, 5000), (8, 2048), (64, 1024), (100, 577), (500, 197)]
)
def test_work_is_even_over_the_programs_that_run_at_once(
    examples: int, rows: int, slots: int
) -> None:
    config = tiles.launch_config(examples, rows, 1, slots)
    waves = cdiv(config.programs, slots)
    longest = waves * cdiv(rows, config.chunks)
    assert examples * rows / slots / longest > 0.8


def test_regimes() -> None:
    assert tiles.launch_config(8, 2048, 4, 396).regime == "split"
    assert tiles.launch_config(4096, 1, 4, 396) == tiles.LaunchConfig("rows", 396, 1)
    assert tiles.launch_config(64, 8, 4, 396, 264).regime == "split"
    assert tiles.launch_config(4096, 8, 4, 396).regime == "split"
    assert tiles.launch_config(4096, 16, 4, 396, 264).regime == "split"


@pytest.mark.parametrize(
    ("examples", "programs"), [(264, 264), (265, 133), (528, 264), (4096, 256), (1_000_000, 264)]
)
def test_whole_examples_are_shared_out_evenly(examples: int, programs: int) -> None:
    """In one wave, from as many examples as there are programs of that form at once."""
    config = tiles.launch_config(examples, 8, 4, 396, 264)
    assert config == tiles.LaunchConfig("whole", programs, 1)
    assert cdiv(examples, programs) == cdiv(examples, 264)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_has_a_tile(dtype: torch.dtype) -> None:
    for direction, widest in (("forward", tiles.MAX_WIDTH), ("backward", tiles.HELD)):
        for width in (1, 3, 127, 768, 1024, 2048, 4000, 8192, widest):
            tile = tuned_tiles.choose(direction, False, dtype, 1000, width, CPU)  # type: ignore[arg-type]
            assert tile.columns == power_of_2(width)
            assert tile.rows * tile.columns // (tile.warps * 32) <= 32
    assert tuned_tiles.choose("forward", True, dtype, 2, 64, CPU).rows == 2


def test_tuned_tiles_replace_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINC_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    tile = Tile(rows=2, columns=1024, warps=8, stages=3, resident=1)
    name = tuned_tiles.key("backward", True, torch.bfloat16, 1024)
    path = tuned_tiles.store("a device", {name: tile})
    tuned_tiles.store("another", {})
    assert path == tmp_path / "launch.json"
    device = torch.device("cuda")
    assert tuned_tiles.choose("backward", True, torch.bfloat16, 99, 1000, device) == tile
    table = tiles.default("backward", 1024)
    assert tuned_tiles.choose("backward", False, torch.bfloat16, 99, 1000, device) == table
    assert tuned_tiles.choose("backward", True, torch.bfloat16, 99, 1000, CPU) == table


@pytest.mark.parametrize("text", ["{", "[]", '{"a device": {"x": {"rows": 1}}}'])
def test_a_damaged_cache_warns_and_counts_for_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINC_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    tuned_tiles.cache_file().write_text(text)
    tuned_tiles._tuned.cache_clear()
    with pytest.warns(UserWarning, match="launch.json is damaged and is ignored"):
        assert tuned_tiles.tuned(torch.device("cuda")) == {}
    tuned_tiles._tuned.cache_clear()


def both(shape: tuple[int, ...], rms: bool, **options: Any) -> tuple[Any, Any]:
    """Results of the Triton backward and of the eager one: dx, dweight, (dbias,) norms."""
    from trainc.kernels.norm import triton_norm_launch as launcher

    torch.manual_seed(0)
    width = shape[-1]
    x, dy, weight, bias = (torch.randn(s) for s in (shape, shape, width, width))
    if rms:
        _, rstd = rms_norm.eager_forward(x, [width], weight, None, 1e-5, "none")
        mask = [True, True, False]
        got = launcher.backward(dy, x, [width], rstd, rstd, (weight, None), mask, True, **options)
        want = rms_norm.eager_backward(dy, x, [width], rstd, weight, "none", [True, True], True)
        return (got[0], got[1], got[3]), want
    _, mean, rstd = torch.native_layer_norm(x, [width], weight, bias, 1e-5)
    given, mask = (weight, bias), [True] * 3
    got = launcher.backward(dy, x, [width], mean, rstd, given, mask, False, **options)
    return got, layer_norm.eager_backward(dy, x, [width], mean, rstd, weight, bias, [True] * 3)


@pytest.mark.interpreter
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    ("shape", "programs"),
    [((9, 40), 2), ((7, 1, 127), 3), ((5, 3, 40), 2), ((2, 33, 40), 8), ((1, 9, 3), 4)],
    ids=["rows", "rows-odd", "whole", "split", "one-example"],
)
def test_regimes_agree_with_the_eager_kernel(
    shape: tuple[int, ...], programs: int, rms: bool
) -> None:
    got, want = both(shape, rms, programs=programs)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-4, atol=2e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(2, 5, 70), (3, 70), (1, 9, 33)], ids=str)
def test_wide_rows_agree_with_the_eager_kernel(
    shape: tuple[int, ...], rms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainc.kernels.norm import triton_wide_norm as wide

    monkeypatch.setattr(tiles, "HELD", 32)
    monkeypatch.setattr(wide, "TILE", Tile(rows=2, columns=32, warps=4, stages=2, resident=4))
    monkeypatch.setattr(wide, "ROW_COLUMNS", 32)
    got, want = both(shape, rms, programs=8)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-4, atol=2e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 70), (3, 32), (1, 2, 33)], ids=str)
@pytest.mark.parametrize("casting", [None, "none", "llama", "gemma"])
def test_rows_too_wide_for_forward_are_walked_along(
    shape: tuple[int, ...], casting: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both pairs of operators, the norm alone and of a sum, about a mean far from zero."""
    from trainc.kernels.norm import triton_wide_norm as wide

    monkeypatch.setattr(tiles, "MAX_WIDTH", 16)
    monkeypatch.setattr(wide, "ROW_COLUMNS", 32)
    torch.manual_seed(0)
    # The interpreter truncates to bfloat16, which far from zero would be all that one sees.
    far = 40 if dtype == torch.float32 else 0
    x, residual = ((torch.randn(shape) + far).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    tail, probe = shape[-1:], torch.zeros(shape[0], 2)
    rest: tuple[Any, ...] = (tail, weight, bias, probe, 1e-5)
    operators = (layer_norm.OPERATOR, add_layer_norm.OPERATOR)
    if casting is not None:
        rest = (tail, weight, None, 1e-5, casting)
        operators = (rms_norm.OPERATOR, add_rms_norm.OPERATOR)
    alone, added = operators
    pairs: list[tuple[Any, Any]] = [
        (alone.cuda_forward(x, *rest), alone.eager_forward(x, *rest)),
        (added.cuda_forward(x, residual, *rest), added.eager_forward(x, residual, *rest)),
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for got, want in pairs:
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
