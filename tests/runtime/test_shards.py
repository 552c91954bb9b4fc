"""Tensors that processes hold parts of, written by each and read by any number of others, without pickle."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.processes import run_processes, run_rank
from trainc.runtime.storage.checkpoint import (
    DamagedCheckpoint,
    find_latest,
    load_checkpoint,
    save_shards,
)

SHAPES = {"uneven": (5, 3), "fewer rows than processes": (1, 4), "vector": (7,), "half": (4, 2)}


def wanted() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    return {**found, "half": found["half"].bfloat16()}


def sharded(tensor: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)])


def process(rank: int) -> Any:
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.processes.team import Ranks

    folder = Path(sys.argv[3]) / "checkpoints"
    state = {
        "parts": {name: sharded(one) for name, one in wanted().items()},
        "whole": torch.arange(3),
        "number": torch.tensor(2.5),
        "text": "as it was",
    }
    path = save_shards(folder, 4, state, Ranks(ReplicaGroup()).decided)
    return load_checkpoint(path)["parts"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for parts in run_processes(__file__, 3, folder):
        assert all(torch.equal(parts[name], tensor) for name, tensor in wanted().items())
    return folder / "checkpoints"


def test_one_process_reads_what_three_wrote(saved: Path) -> None:
    found = find_latest(saved)
    assert (found.step, found.damage) == (4, ())
    assert found.path is not None
    state = load_checkpoint(found.path)
    assert state["text"] == "as it was"
    assert torch.equal(state["whole"], torch.arange(3))
    assert torch.equal(state["number"], torch.tensor(2.5))
    for name, tensor in wanted().items():
        assert state["parts"][name].dtype == tensor.dtype
        assert torch.equal(state["parts"][name], tensor)
    assert sorted(path.name for path in found.path.iterdir()) == [
        "manifest.json",
        "shards.json",
        "state.json",
        *(f"tensors-{rank:05d}-of-00003.safetensors" for rank in range(3)),
    ]


@pytest.mark.parametrize("file", ["tensors-00001-of-00003.safetensors", "shards.json"])
@pytest.mark.parametrize("removed", [True, False])
def test_a_damaged_part_is_named(saved: Path, tmp_path: Path, file: str, removed: bool) -> None:
    copy = tmp_path / "step-00000004"
    shutil.copytree(saved / "step-00000004", copy)
    if removed:
        (copy / file).unlink()
    else:
        *start, last = (copy / file).read_bytes()
        (copy / file).write_bytes(bytes([*start, last ^ 1]))
    with pytest.raises(DamagedCheckpoint, match=file):
        load_checkpoint(copy)
    assert find_latest(tmp_path).path is None


def test_an_index_that_does_not_fit_its_files_is_refused(saved: Path, tmp_path: Path) -> None:
    from trainc.runtime.storage.foreign_files import UnreadableFile
    from trainc.runtime.storage.shards import read_shards

    changes: tuple[Callable[[Any], object], ...] = (
        lambda index: index["parts/uneven"]["parts"].pop(),
        lambda index: index["parts/uneven"].update(dtype="save"),
        lambda index: index["whole"]["parts"][0].update(file="../elsewhere"),
        lambda index: index["whole"]["parts"][0].update(key="other"),
        lambda index: index["whole"].pop("shape"),
    )
    for change in changes:
        copy = tmp_path / "copy"
        shutil.copytree(saved / "step-00000004", copy)
        index = json.loads((copy / "shards.json").read_text())
        change(index)
        (copy / "shards.json").write_text(json.dumps(index))
        with pytest.raises(UnreadableFile, match=r"shards.json|tensors-"):
            read_shards(copy)
        shutil.rmtree(copy)


if __name__ == "__main__":
    run_rank(process)
