"""Data as people have it becomes the same batches as by hand; what is missing is told at once, whole."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.runtime.people import CLASSES, INPUTS, SAMPLES, Augmented, Dicts, Pairs, Table, table
from trainc.runtime.data.batch import WrongBatch
from trainc.runtime.data.order import read_batch
from trainc.runtime.data.reader import make_reader
from trainc.runtime.sources import adapt
from trainc.runtime.sources.adapt import WrongData
from trainc.runtime.sources.collate import Collation

as_data: Any = adapt.as_data
TRAIN, HELD_OUT = Pairs(0, 30), Pairs(30, 40)


class Module:
    """What a LightningDataModule has."""

    def __init__(self, several: bool = False) -> None:
        self.done: list[str] = []
        self.several = several

    def prepare_data(self) -> None:
        self.done.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.done.append(stage)
        self.train, self.held_out = TRAIN, HELD_OUT

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.done == ["prepare_data", "fit"]
        return DataLoader(self.train, batch_size=5, shuffle=True)

    def val_dataloader(self) -> Any:
        return [DataLoader(self.held_out, batch_size=5)] * (2 if self.several else 1)


class Own:
    """A split as trainc has them."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([self.pairs.rows[i] for i in indices])
        return INPUTS[rows], CLASSES[rows]


WHOLE: dict[str, Any] = {
    "a pair": (TRAIN, HELD_OUT),
    "a list of two": [TRAIN, HELD_OUT],
    "a dict": {"train": TRAIN, "validation": HELD_OUT, "test": TRAIN},
    "a DatasetDict": UserDict({"train": table(0, 30), "test": table(30, 40)}),
    "an object": SimpleNamespace(train=TRAIN, val=HELD_OUT),
    "loaders": SimpleNamespace(train=DataLoader(TRAIN, 7), valid=DataLoader(HELD_OUT, 7)),
    "a module": Module(),
    "splits": SimpleNamespace(train=Own(TRAIN), evaluation=Own(HELD_OUT), tokens_per_sample=1),
    "one of each": {"train": table(0, 30), "evaluation": Own(HELD_OUT)},
    "lists of samples": ([TRAIN[i] for i in range(30)], [HELD_OUT[i] for i in range(10)]),
    "tensors": (TensorDataset(INPUTS[:30], CLASSES[:30]), TensorDataset(INPUTS[30:], CLASSES[30:])),
}


@pytest.mark.parametrize("given", WHOLE.values(), ids=WHOLE)
def test_training_and_held_out_samples(given: Any) -> None:
    data = as_data(given)
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation), data.tokens_per_sample) == (30, 10, 1)
    for split, first in ((data.train, 0), (data.evaluation, 30)):
        inputs, targets = read_batch(split, [3, 0, 9])
        torch.testing.assert_close(inputs, INPUTS[[first + 3, first, first + 9]])
        assert torch.equal(targets, CLASSES[[first + 3, first, first + 9]])


ALONE: dict[str, Any] = {
    "a data set": Pairs(),
    "a subset": Subset(ConcatDataset([Pairs(), Pairs()]), range(SAMPLES)),
    "a table": table(),
    "a loader": DataLoader(Pairs(), batch_size=8, shuffle=True),
    "a list": [Pairs()[i] for i in range(SAMPLES)],
    "dicts": Dicts("x", "label"),
}


@pytest.mark.parametrize("given", ALONE.values(), ids=ALONE)
def test_training_samples_alone(given: Any) -> None:
    data = as_data(given)
    assert data.evaluation is None
    inputs, targets = read_batch(data.train, [5, 1])
    torch.testing.assert_close(inputs, INPUTS[[5, 1]])
    assert torch.equal(targets, CLASSES[[5, 1]])


def test_a_split_of_ones_own_stays_what_it_is() -> None:
    given = WHOLE["splits"]
    assert as_data(given) is given


def test_a_data_set_with_an_attribute_train_is_a_data_set() -> None:
    given: Any = Pairs()
    given.train = True  # as torchvision's have it
    assert len(as_data(given).train) == SAMPLES


def test_several_inputs_go_by_name_and_one_alone() -> None:
    inputs, targets = read_batch(as_data(Dicts("x", "other", "targets")).train, [2, 3])
    assert inputs.keys() == {"x", "other"}
    assert torch.equal(inputs["other"], INPUTS[2:4])
    assert torch.equal(targets, CLASSES[2:4])
    inputs, _ = read_batch(as_data(Dicts("x", "y"), target="y").train, [2, 3])
    assert torch.equal(inputs, INPUTS[2:4])


def test_a_table_gives_tensors_unless_it_has_a_format() -> None:
    inputs, _ = read_batch(as_data(table()).train, [1, 2])
    assert inputs.dtype == torch.float32
    with pytest.raises(WrongData, match="`x` of a sample is a list of numbers"):
        as_data(Table(table().columns, "python"))


def test_tokens_of_a_sample() -> None:
    ids = torch.arange(60).view(6, 10)
    assert as_data(TensorDataset(ids, ids)).tokens_per_sample == 10
    assert as_data(TensorDataset(ids, ids.float())).tokens_per_sample == 1
    given = SimpleNamespace(train=TensorDataset(ids, ids), tokens_per_sample=7)
    assert as_data(given).tokens_per_sample == 7


def test_a_collate_of_the_user_and_that_of_a_loader() -> None:
    ragged: Any = [(torch.ones(n), n) for n in (2, 5, 3)]

    def padded(samples: list[Any]) -> Any:
        rows = torch.nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
        return {"ids": rows, "labels": torch.tensor([y for _, y in samples])}

    for data in (as_data(ragged, padded), as_data(DataLoader(ragged, 2, collate_fn=padded))):
        inputs, targets = read_batch(data.train, [0, 1])
        assert inputs.shape == (2, 5)
        assert targets.tolist() == [2, 5]


def test_samples_of_different_sizes() -> None:
    ragged = as_data([(torch.ones(n), n) for n in (2, 5, 3)])
    with pytest.raises(
        WrongBatch, match=r"x is \(2,\) in the first and \(5,\) in sample 1"
    ) as said:
        read_batch(ragged.train, [0, 1])
    assert 'give `collate = "module:callable"`' in str(said.value)
    fields = [{"x": torch.ones(2), "label": 0}, {"x": torch.ones(2), "label": 0, "z": 1}]
    with pytest.raises(WrongBatch, match=r"`z` is not there in the first"):
        Collation()(fields)


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Pairs(), **options)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, "it is a NoneType"),
    "a number": (7, "it is a int"),
    "no train": ({"training": TRAIN}, "it has no `train`: its parts are `training`"),
    "a tensor": ((INPUTS, CLASSES), "`torch.utils.data.TensorDataset(inputs, targets)`"),
    "no samples": ([], "`train` has no samples"),
    "no length": (SimpleNamespace(train=Dataset()), "`train` is a Dataset, which has no `__len__`"),
    "a class": (Pairs, "it is a type"),
    "triples": ([(1, 2, 3)], "a sample is a tuple of 3: expected a pair (x, y)"),
    "inputs alone": ([INPUTS[0]] * 3, "a sample is Tensor: expected a pair"),
    "no target": (Dicts("x", "y"), "no field named as targets are; its fields are `x`, `y`: write `target ="),
    "two targets": (Dicts("x", "label", "target"), "`label` and `target`, of which one is the target"),
    "text": (table(note=["a"] * SAMPLES), "the field `note` of a sample is text ('a')"),
    "None": ([(INPUTS[0], None)], "y of a sample is None"),
    "a name": ([(INPUTS[0], "cat")], "the targets of the pairs cannot be made one tensor"),
    "a sampler": (
        loader(sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
        "a DataLoader with a `WeightedRandomSampler`",
    ),
    "a replacing sampler": (
        loader(sampler=RandomSampler(Pairs(), replacement=True)),
        "a `RandomSampler` that repeats or leaves out samples",
    ),
    "a batch sampler": (
        loader(batch_sampler=type("Bins", (BatchSampler,), {})(SequentialSampler(Pairs()), 2, False)),
        "a `Bins`",
    ),
    "no batches": (loader(batch_size=None), "`batch_size=None`"),
    "two loaders": (Module(several=True), "`evaluation` gives 2 loaders"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_what_is_not_data(given: Any, said: str) -> None:
    with pytest.raises(WrongData) as error:
        as_data(given)
    assert said in str(error.value)


def test_a_target_that_is_not_there() -> None:
    with pytest.raises(WrongData, match="a sample has no field `z`; its fields are `x`, `label`"):
        as_data(Dicts("x", "label"), target="z")
    with pytest.raises(WrongData, match="a sample is a pair, which has no fields: remove `target`"):
        as_data(Pairs(), target="z")


def test_all_that_is_missing_is_told_at_once() -> None:
    given = {"train": SimpleNamespace(batch=len), "test": loader(batch_size=None)}
    with pytest.raises(WrongData) as error:
        as_data(given)
    assert error.value.problems[0] == "`train` is a SimpleNamespace, which has no `__len__()`"
    assert "`evaluation` is a DataLoader with `batch_size=None`" in error.value.problems[1]


def test_what_of_a_loader_is_not_used_is_noted() -> None:
    (note,) = as_data(loader(batch_size=8, shuffle=True, num_workers=2)).notes
    assert "Its batch size of 8, its shuffling, its 2 workers are not" in note


def read(data: Any, sizes: list[int], micro: int, first: int = 0) -> list[Any]:
    reader = make_reader(data, 3)
    found, place = [], first
    for size in sizes:
        found += reader.read(place, size, micro)
        place += size
    reader.close()
    return found


def rows(batches: list[Any]) -> Tensor:
    return torch.cat([torch.cat([x, y[:, None].float()], 1) for x, y in batches])


def test_random_numbers_of_a_sample_are_functions_of_its_position() -> None:
    whole = rows(read(as_data(Augmented()), [8, 8, 8], 8))
    assert torch.equal(rows(read(as_data(Augmented()), [6, 18], 2)), whole)
    assert torch.equal(rows(read(as_data(Augmented()), [16], 4, first=8)), whole[8:])
    drawn = whole[:, 4:10]
    assert drawn.unique().numel() == drawn.numel(), "no generator repeats another"
    again = rows(read(as_data(Augmented()), [8] * 6, 8))
    assert torch.equal(again[:24], whole)
    assert again[:, 4:10].unique().numel() == 48 * 6, "nor itself in another epoch"
