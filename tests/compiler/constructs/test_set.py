"""SET: a run by hand, and the same draws in every process."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.compiler.constructs.test_rigl import by_hand, compiled, data
from trainc.runtime.mask.regrow import Regrow
from trainc.runtime.storage.random_streams import derive_seed


def draw(step: int, name: str, gradient: Tensor) -> Tensor:
    """Return the growth of every entry, from the seed, the name and the step alone."""
    seed = derive_seed(derive_seed(0, "set", "growth"), "mask", name, step)
    made = torch.Generator().manual_seed(seed)
    return torch.rand(gradient.shape, generator=made)


def test_two_programs_grow_the_same_entries() -> None:
    mask = "mask set on ndim(2) every 1 steps { density = 40%, replace = 30% }"
    one, two = compiled(mask), compiled(mask)
    for step in range(3):
        one.step(data(step))
        two.step(data(step))
    for name, held in one._method.masks.items():
        assert torch.equal(held.kept, two._method.masks[name].kept)


def test_a_share_that_is_less_than_one_entry_is_said_once() -> None:
    program = compiled("mask set on ndim(2) every 1 steps { density = 40%, replace = 0.1% }")
    notes = []
    for step in range(3):
        program.step(data(step))
        notes += program.report().notes
    (told,) = (note for note in notes if "less than one" in note)
    assert told.startswith("set: at most ")
    assert told.endswith("so none is replaced: select larger tensors, or replace more")


def test_what_is_just_chosen_says_nothing_of_the_share() -> None:
    mask: Any = SimpleNamespace(count=4, kept=None, parameter=SimpleNamespace(grad=None))
    choice: Any = SimpleNamespace(masks={"weight": mask}, fresh={"weight"})
    step: Any = SimpleNamespace(clock=SimpleNamespace(steps=1), notes=[])
    shares = iter([0.5, 0.1])
    regrow = Regrow("set", choice, lambda step, name, grad: grad, lambda clock: next(shares))
    regrow.run(step)
    assert step.notes == []
    choice.fresh = set()
    regrow.run(step)
    assert [note.split(":")[0] for note in step.notes] == ["set"]


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after seven steps, by the program and by hand."""
    return by_hand("set", draw)
