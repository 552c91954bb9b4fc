"""What masks of chosen entries hold in a step: one dense gradient at a time, on both executors."""

from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainc

WIDTH = 24
SPEC = """train 1
optimizer adamw { lr = 1e-3 }
loss cross_entropy
mask sift on "stack.*" { density = 5% }
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack:
            x = torch.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


class DenseAlive(TorchDispatchMode):
    """Counts tensors of a weight's size that are alive at once, the weights themselves left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.made: list[ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == WIDTH * WIDTH:
            self.made.append(ref(out))
        alive = (tensor for one in self.made if (tensor := one()) is not None)
        places = {tensor.untyped_storage().data_ptr() for tensor in alive}
        self.most = max(self.most, len(places - self.own))
        return out


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_one_dense_gradient_is_alive_at_a_time(executor: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    program = trainc.compile(SPEC, model, executor=executor)
    batch = (torch.randn(5, WIDTH), torch.randint(4, (5,)))
    program.step(batch)  # chooses the entries, by all gradients
    with DenseAlive(model) as counted:
        program.step(batch)
    assert counted.most == 1
    program.unbind()
    model.zero_grad()
    with DenseAlive(model) as counted:
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    assert counted.most == 4
