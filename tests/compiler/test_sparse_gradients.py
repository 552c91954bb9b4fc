"""Sparse gradients: optimizers that take them train, and errors of those that do not name the parameter."""

import copy

import pytest
import torch
from torch import Tensor, nn

import trainc


class Looked(nn.Module):
    """A layer whose gradient is sparse, before one whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = nn.Embedding(10, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.looked(x))
        return made


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("sgd { lr = 0.1, weight_decay = 0.1 }", "`sgd` failed"),
        ("adamw { lr = 0.1 }", "does not support sparse gradients"),
    ],
)
def test_a_sparse_gradient_that_torch_cannot_take_is_named(optimizer: str, said: str) -> None:
    program = trainc.compile(f"loss cross_entropy optimizer {optimizer}", Looked())
    with pytest.raises(ValueError, match=r"`looked.weight` is sparse") as error:
        program.step((torch.arange(6), torch.zeros(6, dtype=torch.long)))
    assert said in str(error.value)
    assert "`sparse=False`" in str(error.value)


def test_a_sparse_gradient_that_torch_takes_trains() -> None:
    spec = """loss cross_entropy optimizer sgd on "head.*" { lr = 0.1 }
    optimizer torch("torch.optim:SparseAdam") on "looked.*" { lr = 0.1 }"""
    program = trainc.compile(spec, Looked())
    before = program.module.get_parameter("looked.weight").detach().clone()
    program.step((torch.arange(6), torch.zeros(6, dtype=torch.long)))
    moved = (program.module.get_parameter("looked.weight") != before).any(1)
    assert moved.tolist() == [True] * 6 + [False] * 4


def test_sparse_gradients_are_clipped_as_dense_ones_are() -> None:
    """One index stands in the batch twice, so that its gradients have to be added before their norm is taken."""
    torch.manual_seed(0)
    ours = Looked()
    theirs = copy.deepcopy(ours)
    program = trainc.compile("loss cross_entropy optimizer sgd { lr = 1, clip = 0.01 }", ours)
    theirs.looked.sparse = False
    x, y = torch.tensor([1, 1, 4]), torch.tensor([0, 1, 2])
    metrics = program.step((x, y))
    nn.functional.cross_entropy(theirs(x), y).backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    torch.optim.SGD(theirs.parameters(), lr=1).step()
    assert metrics["gradient_norm"] == pytest.approx(float(norm))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)
