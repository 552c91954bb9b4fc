"""What masks of chosen entries hold in a step: one dense gradient at a time, on both executors."""

from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainc
from trainc.runtime.memory.needs import format_bytes

WIDTH = 24
SPEC = """train 1
optimizer adamw { lr = 1e-3 }
loss cross_entropy
mask sift on "stack.*" { density = 5% }
"""


class Net(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
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


@pytest.mark.parametrize("times", ["from 1 steps", "every 1 steps"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_so_it_is_in_the_step_that_chooses(executor: Any, times: str) -> None:
    """Beside a gradient there are its score, and where entries are finite: of one layer, however many there are."""
    batch = (torch.randn(5, WIDTH), torch.randint(4, (5,)))
    rule = SPEC.replace("{ density = 5% }", times + " { density = 5% }")
    found = []
    for layers in (9, 12):
        torch.manual_seed(0)
        model = Net(layers)
        program = trainc.compile(rule, model, executor=executor)
        program.step(batch)  # a graph is compared with the modules in it
        with DenseAlive(model) as counted:
            program.step(batch)
        found.append(counted.most)
        assert program.report().notes == ()
    assert found[0] == found[1] < 9


def test_micro_batches_are_summed_in_gradients_of_all_tensors() -> None:
    """How many there are is known to a step, and not to a loop of one's own, which may go on with another."""
    torch.manual_seed(0)
    batch = (torch.randn(6, WIDTH), torch.randint(4, (6,)))
    rule = SPEC.replace("{ density = 5% }", "every 1 steps { density = 5% }")
    program = trainc.compile(rule, model := Net(9))

    def by_hand() -> None:
        program.loss(batch).backward()
        program.update()

    def in_two() -> None:
        x, y = batch
        program.step([(x[:3], y[:3]), (x[3:], y[3:])])

    for step in (by_hand, in_two):
        with DenseAlive(model) as counted:
            step()
        assert counted.most >= 9


@pytest.mark.parametrize(
    ("clause", "trained", "state", "of_each"),
    [
        ('mask sift on "stack.*" { density = 5% }', 4 * 29 + 100, 4 * 29 + 100, 8),
        ("mask bitfit", 4, 4, 8),
        ('mask embedding_rows on "stack.0.weight" { rows = [1], rest = freeze }', 24, 24, 4),
        ('mask lisa on "stack.*" every 1 steps', 2404, 676, 8),
        ('adapt lora on "stack.*" { rank = 2, alpha = 2 }', 4 * 2 * 48, 4 * 2 * 48, 8),
    ],
)
def test_the_summary_says_what_optimizers_hold_and_would_hold(
    clause: str, trained: int, state: int, of_each: int
) -> None:
    """By counting: a float32 gradient has 4 bytes, two moments of AdamW 8, the momentum of SGD 4."""
    rule = "adamw { lr = 1e-3 }" if of_each == 8 else "sgd { lr = 1e-3, momentum = 0.9 }"
    spec = f"loss cross_entropy\noptimizer {rule}\n{clause}\nrun {{ length = 9 steps }}"
    torch.manual_seed(0)
    program = trainc.compile(spec, Net())
    every = sum(p.numel() for p in program.module.parameters())
    for _ in range(3):
        program.step((torch.randn(5, WIDTH), torch.randint(4, (5,))))
    assert (
        f"memory: gradients of the {trained} entries that train take {format_bytes(4 * trained)} and the optimizer's"
        f" state {format_bytes(of_each * state)}; of all {every} they would take {format_bytes(4 * every)} and"
        f" {format_bytes(of_each * every)}"
    ) in program.summary()


def test_a_model_that_trains_as_a_whole_says_nothing_of_it() -> None:
    program = trainc.compile(SPEC.replace("sift", "magnitude"), Net())
    program.step((torch.randn(5, WIDTH), torch.randint(4, (5,))))
    assert not any(line.startswith("memory") for line in program.summary())
