"""Influence of samples of streams, which are numbered as they come in the first pass of the run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from tests.influenced import gradient, run
from tests.influenced_methods import LENGTH, WORDS, cross_entropy
from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.influence.selection import examples_of, parameters_of, training_samples
from trainc.compiler.influence.shown_examples import text_of
from trainc.compiler.influence.streamed import StreamedSamples
from trainc.compiler.influence.tracin import TracIn
from trainc.runtime.data.stream import StreamReader
from trainc.runtime.sources.adapt import as_data

SPEC = """train 1
model "tests.influenced_methods:Tokens" {{ tied = false }}
data "tests.compiler.test_influence_of_streams:{data}" {{ batch = {batch} samples }}
loss cross_entropy
optimizer sgd {{ lr = 0.1 }}
run {{ length = 4 steps, checkpoint = 2 steps, keep = 2, device = cpu, seed = 7 }}
"""


class Windows(IterableDataset[tuple[Tensor, Tensor]]):
    """Windows of tokens, shuffled anew when they are read; of several lengths, or of one, without an end."""

    def __init__(self, lengths: tuple[int, ...], endless: bool) -> None:
        self.lengths, self.endless = lengths, endless

    def __iter__(self) -> Iterator[Any]:
        draw = torch.Generator().manual_seed(5)
        ids = torch.randint(WORDS, (12, LENGTH + 1), generator=draw)
        order = [*range(12)]
        random.shuffle(order)
        return self._read(ids, order)

    def _read(self, ids: Tensor, order: list[int]) -> Iterator[Any]:
        while True:
            for place in order:
                length = self.lengths[place % len(self.lengths)]
                yield ids[place, :length], ids[place, 1 : length + 1]
            if not self.endless:
                return


def endless() -> tuple[Windows, Windows]:
    return Windows((LENGTH,), True), Windows((LENGTH,), False)


def ragged() -> tuple[Windows, Windows]:
    """Held-out samples of several lengths, which make no batch."""
    return Windows((LENGTH,), True), Windows((LENGTH, LENGTH - 2), False)


@pytest.mark.parametrize("data", ["endless", "ragged"])
@pytest.mark.parametrize("layers", [None, "blocks.*"])
def test_it_is_that_of_the_definition(tmp_path: Path, data: str, layers: str | None) -> None:
    batch = 1 if data == "ragged" else 3
    recorded = RecordedRun.read(run(tmp_path, SPEC.format(data=data, batch=batch)))
    train, others = training_samples("0..5,2", recorded.data), examples_of("1..3", recorded.data)
    assert train == [0, 1, 2, 3, 4, 5]
    names, inventory = parameters_of(recorded, layers, False)
    found = TracIn(recorded, names, inventory).measure(train, (others.split, others.ids))
    wanted = torch.zeros(3, 6).double()
    for step in recorded.checkpoints:
        rates = recorded.load(step)
        of_train = [gradient(recorded.program, recorded.data.train, i, [*names]) for i in train]
        of_others = [gradient(recorded.program, others.split, i, [*names]) for i in others.ids]
        for i, one in enumerate(of_others):
            for j, other in enumerate(of_train):
                wanted[i, j] += sum(rates[n] * float((one[n] * other[n]).sum()) for n in names)
    torch.testing.assert_close(found.scores, wanted, rtol=1e-10, atol=1e-13)
    x, y = recorded.data.train.batch([5])  # type: ignore[union-attr]
    recorded.load(4)
    loss = cross_entropy(recorded.program.module.eval(), x, y).detach()
    assert float(found.train_losses[5]) == pytest.approx(float(loss), rel=1e-12)


def test_the_numbers_are_the_order_in_which_the_run_trained(tmp_path: Path) -> None:
    recorded = RecordedRun.read(run(tmp_path, SPEC.format(data="endless", batch=3)))
    fresh = as_data(endless())
    assert training_samples("0..8", recorded.data)
    reader = StreamReader(fresh, fresh.train, recorded.program.settings.seed)  # type: ignore[arg-type]
    for first in (0, 3, 6):
        ((x, y),) = reader.read(first, 3, 3)
        ours = recorded.data.train.batch(range(first, first + 3))  # type: ignore[union-attr]
        assert torch.equal(ours[0], x)
        assert torch.equal(ours[1], y)


def test_what_a_stream_does_not_have_is_said(tmp_path: Path) -> None:
    recorded = RecordedRun.read(run(tmp_path, SPEC.format(data="endless", batch=3)))
    with pytest.raises(ValueError, match=r"are a stream, .* such as `--among 0\.\.999`"):
        training_samples(None, recorded.data)
    with pytest.raises(ValueError, match="no sample 12: the evaluation data has samples 0 to 11"):
        examples_of("3,12", recorded.data)


def test_samples_of_other_shapes_pass_alone() -> None:
    for make, alone in ((endless, False), (ragged, True)):
        samples = StreamedSamples(as_data(make()[1]).train, 0)  # type: ignore[arg-type]
        assert samples.has(4)
        assert samples.alone == alone
        assert len(samples) == 5


def test_pairs_of_texts_and_several_targets_are_shown() -> None:
    ids = torch.tensor([[[1, 2], [3, 4]]])
    assert text_of((ids, ids), None) == "1 2, 3 4"
    x = torch.zeros(1, 3)
    named = {"kind": torch.tensor([2]), "place": torch.tensor([[0.5, 1.0]])}
    assert text_of((x, named), None) == "kind 2, place [0.5, 1.0]"
    assert text_of((x, torch.zeros(1, 20)), None) == "neither tokens nor a few numbers"
