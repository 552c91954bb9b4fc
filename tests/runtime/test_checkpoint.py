"""Checkpoints: a state comes back exactly, and damaged files are found."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.checkpoint import DamagedCheckpoint
from trainc.runtime.storage.foreign_files import MANIFEST, write_manifest


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


def test_the_order_of_axes_in_memory_is_kept(tmp_path: Path) -> None:
    """A product of two matrices rounds by it; what has gaps or is expanded is stored as usual."""
    whole = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "turned": torch.randn(5, 3).T,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "permuted": whole.permute(1, 2, 0),
        "gaps": whole[:, :, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
    }
    found = checkpoint.load_checkpoint(checkpoint.save_checkpoint(tmp_path, 1, state))
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
        usual = name in ("gaps", "expanded")
        assert found[name].stride() == (tensor.contiguous() if usual else tensor).stride(), name


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


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Save as a run does: then remove the oldest."""
    saved = checkpoint.save_checkpoint(folder, step, state)
    checkpoint.prune_checkpoints(folder, keep, step)
    return saved


def save_three(folder: Path, keep: int = 3) -> list[Path]:
    return [save(folder, step, {"x": torch.full((4,), step)}, keep) for step in (1, 2, 3)]


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


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE, MANIFEST])
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
    manifest = save_three(tmp_path)[-1] / MANIFEST
    intact = manifest.read_bytes()
    for at in range(len(intact)):
        harmed = bytearray(intact)
        harmed[at] ^= 1
        manifest.write_bytes(harmed)
        assert checkpoint.find_latest(tmp_path).step == 2, f"byte {at}"


@pytest.mark.parametrize("number", [1, 99])
def test_another_format_is_refused(tmp_path: Path, number: int) -> None:
    path = save_three(tmp_path)[-1]
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": number}))
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
    save(tmp_path, 4, {"x": 1}, 3)
    assert not half.exists()


def test_a_step_saved_again_replaces_a_damaged_one(tmp_path: Path) -> None:
    flip(save_three(tmp_path)[-1] / checkpoint.TENSORS)
    save(tmp_path, 3, {"x": "again"}, 2)
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


@pytest.mark.parametrize("name", ["", checkpoint.TENSORS, checkpoint.STATE, MANIFEST])
def test_a_symbolic_link_is_not_followed(tmp_path: Path, name: str) -> None:
    newest = save_three(tmp_path / "run")[-1]
    place = newest / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    found = checkpoint.find_latest(tmp_path / "run")
    assert found.step == 2
    assert f"{place} is a symbolic link" in found.damage[0]
    with pytest.raises(DamagedCheckpoint, match="is a symbolic link"):
        checkpoint.load_checkpoint(newest)
    for step in (4, 5):
        save(tmp_path / "run", step, {"x": 1}, 2)
    assert (tmp_path / "elsewhere").exists()
    assert checkpoint.find_latest(tmp_path / "run").step == 5


def test_odd_things_in_the_folder_are_in_no_way(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.writing-3").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run/.writing-4").write_text("a file")
    (tmp_path / "run/step-00000001").write_text("a file")
    save_three(tmp_path / "run", keep=2)
    assert (tmp_path / "elsewhere").exists()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["step-00000002", "step-00000003"]


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, "[]", "null", '{"a": 1', "1" * 10_000, "\ud800", ""])
@pytest.mark.parametrize("name", [checkpoint.STATE, MANIFEST])
def test_json_of_another_shape_is_damage(tmp_path: Path, name: str, text: str) -> None:
    path = save_three(tmp_path)[-1]
    (path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    if name == checkpoint.STATE:
        write_manifest(path, (checkpoint.TENSORS, name), {"format": checkpoint.FORMAT, "step": 3})
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoint.load_checkpoint(path)


@pytest.mark.parametrize("state", [{"a": {"$tensor": "none"}}, {"a": {"$float": "x"}}])
def test_a_state_that_refers_to_nothing_is_damage(tmp_path: Path, state: Any) -> None:
    path = save_three(tmp_path)[-1]
    (path / checkpoint.STATE).write_text(json.dumps(state))
    names = (checkpoint.TENSORS, checkpoint.STATE)
    write_manifest(path, names, {"format": checkpoint.FORMAT, "step": 3})
    with pytest.raises(DamagedCheckpoint, match=checkpoint.STATE):
        checkpoint.load_checkpoint(path)


def test_pipes_are_refused_at_once(tmp_path: Path) -> None:
    path = save_three(tmp_path)[-1] / checkpoint.STATE
    path.unlink()
    os.mkfifo(path)
    assert checkpoint.find_latest(tmp_path).damage == (f"{path} is not a plain file",)


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    """A run goes on from step 2, since 8 is damaged: what it saves is kept, however few are kept."""
    for step in (2, 8):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step})
    (tmp_path / "step-00000008" / "state.json").write_text("{")
    assert checkpoint.find_latest(tmp_path).step == 2
    saved = save(tmp_path, 4, {"step": 4}, 1)
    assert checkpoint.find_latest(tmp_path).path == saved
    assert not (tmp_path / "step-00000002").exists()
