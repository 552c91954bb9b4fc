"""Checkpoints: a state comes back exactly, and damaged files are found."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.checkpoint import DamagedCheckpoint


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    state: dict[str, Any] = {
        "a/b~c": {"float": weight, "view": weight.t(), "half": torch.randn(2).bfloat16()},
        "numbers": {"int": torch.tensor([1, 2**62]), "bool": torch.tensor([True]), "empty": {}},
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
        "list": [torch.tensor(1), 2, "three", None, True, 0.1, [], (1, (2.0,))],
        "odd": [math.inf, -math.inf, math.nan, 2**80],
    }
    found = checkpoint.load_checkpoint(checkpoint.save_checkpoint(tmp_path, 5, state))
    inner = found["a/b~c"]
    assert torch.equal(inner["float"], weight)
    assert torch.equal(inner["view"], weight.t())
    assert torch.equal(inner["half"], state["a/b~c"]["half"])
    assert inner["half"].dtype == torch.bfloat16
    assert torch.equal(found["numbers"]["int"], state["numbers"]["int"])
    assert found["numbers"]["bool"].tolist() == [True]
    assert found["numbers"]["empty"] == {}
    assert found["scalar"].shape == ()
    assert found["scalar"].item() == 1.5
    assert found["none"].shape == (0, 3)
    assert found["list"][1:] == [2, "three", None, True, 0.1, [], (1, (2.0,))]
    assert found["odd"][:2] == [math.inf, -math.inf]
    assert math.isnan(found["odd"][2])
    assert found["odd"][3] == 2**80


def test_a_tensor_that_is_in_two_places_is_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(1000)
    path = checkpoint.save_checkpoint(tmp_path, 1, {"embedding": weight, "head": weight})
    assert (path / checkpoint.TENSORS).stat().st_size < 2 * 4000
    found = checkpoint.load_checkpoint(path)
    assert torch.equal(found["head"], weight)


def test_views_of_one_memory_are_stored_separately(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    found = checkpoint.load_checkpoint(
        checkpoint.save_checkpoint(tmp_path, 1, {"low": whole[:5], "all": whole})
    )
    assert torch.equal(found["low"], whole[:5])
    assert torch.equal(found["all"], whole)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {1: 2}}, "the state at `a` has the key 1"),
        ({"$tensor": 1}, "does not begin with"),
        ({"a": {"b": object()}}, "the state at `a/b` is a object"),
        ({"a": {1, 2}}, "is a set"),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused_and_no_file_is_left(
    tmp_path: Path, state: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        checkpoint.save_checkpoint(tmp_path, 1, state)
    assert checkpoint.find_latest(tmp_path).path is None


def save_three(folder: Path, keep: int = 3) -> list[Path]:
    return [
        checkpoint.save_checkpoint(folder, step, {"x": torch.full((4,), step)}, keep)
        for step in (1, 2, 3)
    ]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    save_three(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    save_three(tmp_path)
    found = checkpoint.find_latest(tmp_path)
    assert (found.step, found.damage) == (3, ())


def test_a_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path / "nowhere") == checkpoint.FoundCheckpoint(None, 0, ())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "empty"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, name: str, harm: str
) -> None:
    victim = save_three(tmp_path)[-1] / name
    if harm == "flip":
        flip(victim)
    elif harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif harm == "empty":
        victim.write_bytes(b"")
    else:
        victim.unlink()
    found = checkpoint.find_latest(tmp_path)
    assert found.step == 2
    assert str(victim) in found.damage[0]
    with pytest.raises(DamagedCheckpoint):
        checkpoint.load_checkpoint(tmp_path / "step-00000003")


def test_any_damage_to_a_manifest_is_found(tmp_path: Path) -> None:
    manifest = save_three(tmp_path)[-1] / checkpoint.MANIFEST
    intact = manifest.read_bytes()
    for at in range(len(intact)):
        harmed = bytearray(intact)
        harmed[at] ^= 1
        manifest.write_bytes(harmed)
        assert checkpoint.find_latest(tmp_path).step == 2, f"byte {at}"


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused(tmp_path: Path, number: int) -> None:
    path = save_three(tmp_path)[-1]
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest | {"format": number}))
    with pytest.raises(
        DamagedCheckpoint,
        match=f"has format {number}, but this version of trainc reads {checkpoint.FORMAT}: resume",
    ):
        checkpoint.load_checkpoint(path)


def test_a_half_written_checkpoint_does_not_count_and_is_removed(tmp_path: Path) -> None:
    save_three(tmp_path)
    half = tmp_path / ".writing-4"
    half.mkdir()
    (half / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoint.find_latest(tmp_path).step == 3
    checkpoint.save_checkpoint(tmp_path, 4, {"x": 1}, 3)
    assert not half.exists()


def test_a_step_saved_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    flip(save_three(tmp_path)[-1] / checkpoint.TENSORS)
    checkpoint.save_checkpoint(tmp_path, 3, {"x": "again"}, 2)
    found = checkpoint.find_latest(tmp_path)
    assert (found.step, found.damage) == (3, ())
    assert found.path is not None
    assert checkpoint.load_checkpoint(found.path) == {"x": "again"}
    # The damaged attempt does not count as one of those kept.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003-1"]


def test_a_failed_save_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_three(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_checkpoint(tmp_path, 4, {"x": 1})
    monkeypatch.undo()
    assert checkpoint.find_latest(tmp_path).step == 3
