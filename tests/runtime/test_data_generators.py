"""Random numbers of the data: seeded where they are global, kept in checkpoints where the data holds a generator."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.runtime.fake import SAMPLES, FakeProgram, Points
from tests.runtime.runs import assert_equal_runs
from trainc.runtime.data.batch import Batch
from trainc.runtime.data.generators import find_generators, load_states, states_of
from trainc.runtime.run.loop import train
from trainc.runtime.storage.differences import ChangedRun

IN_MODULE = torch.Generator().manual_seed(3)
GENERATORS: dict[str, Callable[[], Any]] = {
    "torch.Generator": lambda: torch.Generator().manual_seed(5),
    "numpy.Generator": lambda: np.random.default_rng(5),
    "numpy.MT19937": lambda: np.random.Generator(np.random.MT19937(5)),
    "numpy.RandomState": lambda: np.random.RandomState(5),
    "random.Random": lambda: random.Random(5),
}


def draw(source: Any, rows: int) -> Tensor:
    """Return random numbers of a generator, or of the global ones by name."""
    if isinstance(source, torch.Generator):
        return torch.randn(rows, 1, generator=source)
    if isinstance(source, np.random.Generator | np.random.RandomState):
        return torch.tensor(source.normal(size=(rows, 1)), dtype=torch.float32)
    if isinstance(source, random.Random):
        return torch.tensor([[source.gauss(0, 1)] for _ in range(rows)])
    if source == "torch":
        return torch.randn(rows, 1)
    if source == "numpy":
        return torch.tensor(np.random.randn(rows, 1), dtype=torch.float32)
    return torch.tensor([[random.gauss(0, 1)] for _ in range(rows)])


class Augmented(Points):
    """Points with random numbers of one source added, in evaluations too."""

    def __init__(self, samples: int, seed: int, source: Any) -> None:
        super().__init__(samples, seed)
        self.source = source

    def batch(self, indices: Sequence[int]) -> Batch:
        index = list(indices)
        return self.inputs[index] + 0.3 * draw(self.source, len(index)), self.targets[index]


@dataclass
class AugmentedData:
    train: Augmented
    evaluation: Augmented | None
    tokens_per_sample: int = 3
    prefetch: bool = False
    others: list[Any] = field(default_factory=list)


def augmented(name: str) -> AugmentedData:
    """Return data as a new process makes it."""
    torch.manual_seed(random.SystemRandom().getrandbits(32))
    np.random.seed(random.SystemRandom().getrandbits(32))
    random.seed()
    IN_MODULE.manual_seed(3)
    made = GENERATORS.get(name, lambda: IN_MODULE if name == "in the module" else name)
    source = made()
    return AugmentedData(Augmented(SAMPLES, 1, source), Augmented(17, 2, source))


def run(out: Path, name: str, stop_after: int = -1, resume: bool = False) -> None:
    program = FakeProgram()

    def stop() -> str | None:
        return "interrupted" if program.clock.steps == stop_after else None

    train(program, augmented(name), out=out, stop_requested=stop, resume=resume)


SOURCES = ["torch", "numpy", "python", "in the module", *GENERATORS]


@pytest.mark.parametrize("name", SOURCES)
def test_equal_runs_are_equal_whatever_draws(name: str, tmp_path: Path) -> None:
    run(tmp_path / "straight", name)
    run(tmp_path / "again", name)
    assert_equal_runs(tmp_path / "straight", tmp_path / "again")
    for stop in (7, 12):
        run(tmp_path / "resumed", name, stop_after=stop, resume=stop > 7)
    run(tmp_path / "resumed", name, resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("name", GENERATORS)
def test_the_state_of_a_generator_comes_back(name: str) -> None:
    generators = {"a": GENERATORS[name]()}
    draw(generators["a"], 3)
    states = states_of(generators)
    expected = draw(generators["a"], 5)
    load_states(generators, states)
    assert torch.equal(draw(generators["a"], 5), expected)


def test_generators_are_found_wherever_data_holds_them() -> None:
    class Slotted:
        __slots__ = ("inner",)

        def __init__(self, inner: object) -> None:
            self.inner = inner

    closed = torch.Generator()

    def batch(indices: Sequence[int]) -> Tensor:
        return torch.rand(len(indices), generator=closed)

    data = SimpleNamespace(
        train=SimpleNamespace(batch=batch, transforms=[Slotted({"noise": random.Random(1)})]),
        evaluation=torch.utils.data.RandomSampler([1, 2], generator=torch.Generator()),
        globals=(torch.default_generator, random.random, np.random.mtrand._rand),
        large=[torch.Generator()] * 1000,
    )
    data.itself = data
    assert set(find_generators(data)) == {
        "data.train.batch.closed",
        "data.train.transforms.0.inner.noise",
        "data.evaluation.generator",
        f"{__name__}.IN_MODULE",
    }


def test_other_generators_need_accept(tmp_path: Path) -> None:
    run(tmp_path, "numpy.Generator", stop_after=7)
    with pytest.raises(ChangedRun) as caught:
        run(tmp_path, "torch", resume=True)
    assert [str(one) for one in caught.value.differences] == [
        "needs --accept: the random generator `data.train.source` was in the data and is no longer: it starts anew"
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torch", "torch's generator"),
        ("numpy", "numpy's `np.random`"),
        ("python", "Python's `random`"),
        ("numpy.Generator", "`data.train.source`"),
    ],
)
def test_data_that_is_read_ahead_may_not_draw(name: str, said: str, tmp_path: Path) -> None:
    data = augmented(name)
    data.prefetch = True
    with pytest.raises(ValueError, match=f"draws random numbers from {said}, which a thread"):
        train(FakeProgram(), data, out=tmp_path)
