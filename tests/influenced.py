"""Runs whose influence tests measure: models and data that specs name, and folders as `trainc run` leaves them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.driver.compile import compile_with_data
from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.program.program import Program
from trainc.runtime.storage.checkpoint import save_checkpoint

Checkpoint = tuple[dict[str, Tensor], float]
"""Weights by name, and the rate."""


class Samples:
    """Inputs and targets in memory."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = list(indices)
        return self.inputs[rows], self.targets[rows]


class Data:
    """A part to train on, and a held-out one."""

    tokens_per_sample = 1

    def __init__(self, train: Samples, evaluation: Samples | None) -> None:
        self.train, self.evaluation = train, evaluation


REFERENCE = json.loads(
    (Path(__file__).parent / "reference/other_methods.json").read_text(encoding="utf-8")
)["tracin"]


def reference_model() -> nn.Module:
    """The linear model of the reference, in float64."""
    return nn.Linear(2, 1).double()


def reference_data() -> Data:
    """The three training points and the test point of the reference."""
    parts = [
        [torch.tensor(REFERENCE[f"{part}_{x}"], dtype=torch.float64) for x in "xy"]
        for part in ("train", "test")
    ]
    return Data(*(Samples(x, y) for x, y in parts))


class Net(nn.Module):
    """Convolution, batch norm, dropout and two linear layers, the last of which sees positions; float64."""

    def __init__(self, positions: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 5)
        self.positions = positions
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.bn(self.conv(x)).relu())
        h = h.flatten(2).mT if self.positions else h.mean((2, 3))
        return self.head(self.body(h).tanh())  # type: ignore[no-any-return]


def images(positions: bool = False, evaluation: bool = True) -> Data:
    """Random images of five classes, or with a class for each position, of which some do not count."""
    draw = torch.Generator().manual_seed(8)

    def part(count: int) -> Samples:
        x = torch.randn(count, 1, 4, 4, generator=draw).double()
        y = torch.randint(5, (count, 16) if positions else (count,), generator=draw)
        if positions:
            y[:, ::3] = -100
            y[1] = -100
        return Samples(x, y)

    return Data(part(9), part(4) if evaluation else None)


def spec(positions: bool = False, optimizer: str = "sgd { lr = 0.1 }", more: str = "") -> str:
    word = "true" if positions else "false"
    return f"""train 1
model "tests.influenced:Net" {{ positions = {word} }}
data "tests.influenced:images" {{ batch = 3 samples, positions = {word} }}
loss cross_entropy
optimizer {optimizer}
run {{ length = 6 steps, checkpoint = 2 steps, keep = 3, device = cpu }}
{more}
"""


def run(folder: Path, text: str) -> Path:
    """Train a spec and return the folder of its run."""
    from trainc.compiler.driver.train import train

    folder.mkdir(exist_ok=True)
    (folder / "spec.train").write_text(text)
    train(folder / "spec.train", folder / "run", quiet=True)
    return folder / "run"


def reference_run(folder: Path, checkpoints: list[Checkpoint] | None = None) -> Path:
    """Return a run with the checkpoints of the reference, or others."""
    found = checkpoints or [
        ({n: torch.tensor(c[n[0]], dtype=torch.float64) for n in ("weight", "bias")}, c["lr"])
        for c in REFERENCE["checkpoints"]
    ]
    text = """train 1
model "tests.influenced:reference_model"
data "tests.influenced:reference_data" { batch = 1 samples }
loss mse
optimizer sgd { lr = 0.1 }
run { length = 9 steps, device = cpu }
"""
    checked = trainc.check(text).spec
    assert checked is not None
    (folder / "run").mkdir(parents=True)
    (folder / "run/spec.json").write_text(json.dumps(checked.to_json()))
    program, read = compile_with_data(checked, reference_model())
    for step, (weights, rate) in enumerate(found, 1):
        program.step(read.train.batch([0]))  # type: ignore[union-attr]
        state = program.state_dict()
        state["model"] = weights
        state["rates"]["in_force"] = dict.fromkeys(weights, rate)
        save_checkpoint(folder / "run/checkpoints", step, {"program": state})
    return folder / "run"


def by_definition(
    recorded: RecordedRun, names: list[str], train: list[int], on: list[int]
) -> tuple[Tensor, Tensor]:
    """Return influence (on, train) and self-influence, by one pass an example, for cross-entropy."""
    scores = torch.zeros(len(on), len(train)).double()
    own = torch.zeros(len(train)).double()
    for step in recorded.checkpoints:
        rates = recorded.load(step)
        program = recorded.program
        of_train = [gradient(program, recorded.data.train, i, names) for i in train]
        of_others = [gradient(program, recorded.data.evaluation, i, names) for i in on]
        for name in names:
            for j, one in enumerate(of_train):
                own[j] += rates[name] * (one[name] * one[name]).sum()
                for i, other in enumerate(of_others):
                    scores[i, j] += rates[name] * (one[name] * other[name]).sum()
    return scores, own


def gradient(program: Program, split: Any, index: int, names: list[str]) -> dict[str, Tensor]:
    x, y = split.batch([index])
    if not (y != -100).any():
        return {n: torch.zeros(()).double() for n in names}
    module = program.module.eval()
    logits = module(x).flatten(0, -2)
    loss = nn.functional.cross_entropy(logits, y.flatten(), ignore_index=-100)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, [parameters[n] for n in names])
    return dict(zip(names, found, strict=True))
