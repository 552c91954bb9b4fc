"""The DistributedDataParallel around a module is found as it is now, by one search and by what is made later."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainc.compiler.execution import distributed
from trainc.compiler.execution.distributed import Wrappers


@pytest.fixture
def searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let this process be a group of its own; return the searches of all objects, which are counted."""
    counted: list[int] = []

    class Counting:
        @staticmethod
        def get_objects() -> list[object]:
            counted.append(1)
            return gc.get_objects()

    monkeypatch.setattr(distributed, "gc", Counting)
    address = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield counted
    dist.destroy_process_group()


def test_wrappers_are_searched_once_and_later_ones_make_themselves_known(
    searches: list[int],
) -> None:
    module, larger = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    found = Wrappers(module)
    assert [found.find(module) for _ in range(3)] == [[], [], []]
    other = DistributedDataParallel(larger)  # not around it, so far
    assert found.find(module) == []
    larger.append(module)
    assert [found.find(module) for _ in range(3)] == [[other]] * 3
    first = DistributedDataParallel(module)
    exact = DistributedDataParallel(module)
    assert [found.find(module) for _ in range(3)] == [[exact]] * 3
    del exact
    gc.collect()
    assert found.find(module) == [first]
    del first
    gc.collect()
    assert found.find(module) == [other]
    del larger[1]
    assert [found.find(module) for _ in range(2)] == [[], []]
    assert len(searches) == 1


def test_a_wrapper_that_was_not_made_as_others_are_is_found_by_the_search(
    searches: list[int],
) -> None:
    wrapper = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2)))
    copied, shared = copy.deepcopy(wrapper), copy.copy(wrapper)
    assert Wrappers(copied.module[0]).find(copied.module[0]) == [copied]
    module = wrapper.module
    assert Wrappers(module).find(module)[0] in (wrapper, shared)
    del wrapper
    gc.collect()
    assert Wrappers(module).find(module) == [shared]
    assert len(searches) == 3


def test_a_wrapper_that_is_given_or_inside_needs_no_search(searches: list[int]) -> None:
    module = nn.Linear(2, 2)
    wrapper = DistributedDataParallel(module)
    assert Wrappers(module).find(wrapper) == [wrapper]
    around = nn.Sequential(wrapper)
    assert Wrappers(around).find(around) == [wrapper]
    assert searches == []
