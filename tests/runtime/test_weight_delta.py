"""Files of changed entries: exact in every dtype, small, and refused where they or the weights are wrong."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainc.runtime.storage.foreign_files import UnreadableFile
from trainc.runtime.storage.weight_delta import (
    TensorDelta,
    apply_delta,
    changed,
    entries_of,
    read_delta,
    write_delta,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 400, 4200])
def test_what_is_applied_is_what_was_exported(
    dtype: torch.dtype, count: int, tmp_path: Path
) -> None:
    before = drawn(60, 70, dtype=dtype)
    index = torch.randperm(4200, generator=torch.Generator().manual_seed(1))[:count]
    now = before.clone()
    now.view(-1)[index] = drawn(4200, dtype=dtype, seed=2)[:count]
    write_delta(tmp_path / "d", [TensorDelta.of(["w"], now, index)])
    weights = {"w": before.clone()}
    assert apply_delta(weights, read_delta(tmp_path / "d"), "it") == {"w": count}
    assert same_bits(weights["w"], now)


def test_signs_of_zero_and_nan_are_kept_and_seen(tmp_path: Path) -> None:
    before = torch.tensor([0.0, torch.nan, 1.0, 2.0])
    now = torch.tensor([-0.0, torch.nan, torch.inf, 2.0])
    assert changed(before, now).tolist() == [0, 2]
    write_delta(tmp_path / "d", [TensorDelta.of(["w"], now, changed(before, now))])
    apply_delta({"w": before}, read_delta(tmp_path / "d"), "it")
    assert same_bits(before, now)


@pytest.mark.parametrize("gaps", [[0], [254], [255], [65535], [3, 255, 510, 65535, 65536, 70000]])
def test_gaps_of_every_length_come_back(gaps: list[int], tmp_path: Path) -> None:
    index = torch.tensor(gaps).cumsum(0)
    size = int(index[-1]) + 1 + len(gaps)
    write_delta(tmp_path / "d", [TensorDelta.of(["w"], torch.zeros(size), index)])
    (found,) = read_delta(tmp_path / "d")
    assert found.index is not None
    assert torch.equal(found.index, index)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 6.0), (torch.bfloat16, 4.0)])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.05])
def test_an_entry_takes_six_bytes_at_most(
    dtype: torch.dtype, limit: float, density: float, tmp_path: Path
) -> None:
    numel = 1 << 20
    count = int(density * numel)
    index = torch.randperm(numel, generator=torch.Generator().manual_seed(3))[:count]
    deltas = [
        TensorDelta.of([f"blocks.{i}.w"], torch.zeros(numel, dtype=dtype), index) for i in (0, 1)
    ]
    write_delta(tmp_path / "d", deltas)
    header = 400  # names, shapes and digests
    assert (tmp_path / "d").stat().st_size <= 2 * count * limit + header


def test_six_bytes_are_enough_in_small_files_of_many_tensors(tmp_path: Path) -> None:
    """What is said of each tensor is small, too: of 72 of a small model, 41 entries each, 2 %."""
    deltas = [
        TensorDelta.of([f"transformer.blocks.{i}.{n}.weight"], drawn(64, 32, seed=i), index)
        for i in range(12)
        for n in ("query", "key", "value", "projection", "mlp.up", "mlp.down")
        for index in [torch.randperm(2048, generator=torch.Generator().manual_seed(i))[:41]]
    ]
    write_delta(tmp_path / "d", deltas)
    assert (tmp_path / "d").stat().st_size <= 6 * sum(len(delta.values) for delta in deltas)


def test_tied_tensors_are_one_and_are_set_under_every_name() -> None:
    shared = drawn(4, 3)
    (found,) = entries_of({"a": shared, "b": shared}, {"a"}, {"a": torch.tensor([5, 1])})
    assert found.names == ("a", "b")
    assert found.values.tolist() == shared.view(-1)[[1, 5]].tolist()
    other = shared.clone()
    other.view(-1)[[1, 5]] = 0
    apart = {"a": other.clone(), "b": other.clone()}
    apply_delta(apart, [found], "it")
    assert torch.equal(apart["a"], shared)
    assert torch.equal(apart["b"], shared)


def test_against_a_base_every_entry_that_differs_is_found_and_no_other() -> None:
    base = {"few": drawn(40, 50), "all": drawn(30), "none": drawn(8)}
    now = {"few": base["few"].clone(), "all": base["all"] + 1, "none": base["none"].clone()}
    now["few"][3, 4] += 1
    found = {delta.names[0]: delta for delta in entries_of(now, (), {}, base, "it")}
    assert found.keys() == {"few", "all"}
    assert found["all"].index is None
    assert found["few"].index is not None
    assert found["few"].index.tolist() == [154]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"v": drawn(4, 3)}, r"it has no `w`, which the delta changes. Its tensors: `v`"),
        ({"w": drawn(3, 4)}, r"`w` of it is float32\[3, 4\], and the delta is of float32\[4, 3\]"),
        ({"w": drawn(4, 3).half()}, r"`w` of it is float16\[4, 3\].* in the dtype in which it"),
        ({"w": drawn(4, 3, seed=9)}, r"`w` of it is not what the run started from"),
    ],
)
def test_other_weights_are_refused_and_stay(weights: dict[str, Tensor], said: str) -> None:
    delta = TensorDelta.of(["w"], drawn(4, 3), torch.tensor([2]))
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=said):
        apply_delta(weights, [delta], "it")
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


def damaged(change: str, tensors: dict[str, Tensor], rows: list[list[Any]]) -> None:
    if change == "positions":
        tensors["positions"] = tensors["positions"][:-1]
    elif change == "values":
        tensors["values.float32"] = tensors["values.float32"][:-1]
    elif change == "outside":
        rows[0][1] = [2]
    elif change == "row":
        rows[0] = rows[0][:3]
    elif change == "dtype":
        rows[0][2] = "float13"
    elif change == "width":
        rows[0][4] = 3


@pytest.mark.parametrize(
    "change", ["positions", "values", "outside", "row", "dtype", "width", "table", "other", "none"]
)
def test_a_damaged_file_is_named(change: str, tmp_path: Path) -> None:
    path = tmp_path / "d"
    write_delta(path, [TensorDelta.of(["w"], drawn(4, 3), torch.tensor([2, 7]))])
    if change == "none":
        path.unlink()
    elif change == "other":
        save_file({"w": drawn(2)}, path)
    else:
        tensors = load_file(path)
        (found,) = read_delta(path)
        rows = [[["w"], [4, 3], "float32", 2, 1, found.rest]]
        damaged(change, tensors, rows)
        packed = bytearray(zlib.compress(json.dumps(rows).encode()))
        tensors["table"] = torch.frombuffer(
            packed[: 9 if change == "table" else None], dtype=torch.uint8
        )
        save_file(tensors, path, {"trainc_delta": "2"})
    with pytest.raises(UnreadableFile, match=str(path)):
        read_delta(path)
