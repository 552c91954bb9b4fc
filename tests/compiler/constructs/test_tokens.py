"""`data tokens` and `data text`: windows by their definition, from files made here; what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.driver.train import train
from trainc.compiler.model.factories import build_data
from trainc.compiler.model.import_path import searching
from trainc.runtime.storage.jsonl import read_jsonl

SHARDS = {"a.bin": np.arange(50), "b.bin": np.arange(100, 143), "val.bin": np.arange(200, 220)}
TEXTS = {"one.txt": "abcde", "deep/two.txt": "fghij klm", "val.txt": "held out"}
CONTEXT = 4


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(256, 8), nn.Linear(8, 256))


def net() -> nn.Module:
    return Net()


def words(text: str) -> list[int]:
    return [*(len(word) for word in text.split()), 0]


def nonsense(text: str) -> Any:
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, numbers in SHARDS.items():
        (tmp_path / name).write_bytes(numbers.astype(np.uint16).tobytes())
    for name, text in TEXTS.items():
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text(text)
    return tmp_path


def spec(folder: Path, data: str, run: str = "length = 3 steps, seed = 1") -> Path:
    text = f'train 1\nmodel "{__name__}:net"\n{data}\nloss cross_entropy\nrun {{ {run} }}\n'
    (folder / "spec.train").write_text(text + "optimizer sgd { lr = 0.1 }\n")
    return folder / "spec.train"


def tokens(more: str = "", pattern: str = "*.bin") -> str:
    return f'data tokens("{pattern}") {{ batch = 4 samples, context = {CONTEXT}{more} }}'


def text(more: str = "", pattern: str = "corpus/**/*.txt") -> str:
    return f'data text("{pattern}") {{ batch = 2 samples, context = {CONTEXT}{more} }}'


def loaded(path: Path) -> Any:
    checked = trainc.check(path)
    assert checked.spec is not None, trainc.SpecError(checked.diagnostics)
    with searching(path):
        return build_data(checked.spec)


def planned(path: Path) -> Any:
    return trainc.plan(path).settings["units"]["samples_per_epoch"]


def windows(*sequences: Any) -> Tensor:
    """Return the rows of CONTEXT + 1 tokens by their definition."""
    rows = []
    for one in sequences:
        first = 0
        while first + CONTEXT + 1 <= len(one):
            rows.append([int(x) for x in one[first : first + CONTEXT + 1]])
            first += CONTEXT
    return torch.tensor(rows)


def assert_windows(split: Any, rows: Tensor) -> None:
    assert len(split) == len(rows)
    inputs, targets = split.batch(range(len(rows)))
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert torch.equal(inputs, rows[:, :-1])
    assert torch.equal(targets, rows[:, 1:])
    inputs, targets = split.batch([len(rows) - 1, 0])
    assert torch.equal(targets, rows[[-1, 0], 1:])


def test_shards_and_held_out_shards(folder: Path) -> None:
    path = spec(folder, tokens(', evaluation = "val*.bin"'))
    data = loaded(path)
    assert_windows(data.train, windows(SHARDS["a.bin"], SHARDS["b.bin"]))
    assert_windows(data.evaluation, windows(SHARDS["val.bin"]))
    assert data.tokens_per_sample == CONTEXT
    assert planned(path) == len(data.train)


def test_a_fraction_is_held_out(folder: Path) -> None:
    path = spec(folder, tokens(", evaluation = 20%", "[ab].bin"))
    data, rows = loaded(path), windows(SHARDS["a.bin"], SHARDS["b.bin"])
    held_out = round(0.2 * len(rows))
    assert_windows(data.train, rows[:-held_out])
    assert_windows(data.evaluation, rows[-held_out:])
    assert planned(path) == len(data.train)


def test_numbers_of_32_bits(folder: Path) -> None:
    numbers = np.arange(70_000, 70_030, dtype=np.uint32)
    (folder / "wide.bin").write_bytes(numbers.tobytes())
    path = spec(folder, tokens(", dtype = uint32", "wide.bin"))
    assert_windows(loaded(path).train, windows(numbers))
    assert planned(path) == 7


def test_text_as_bytes(folder: Path) -> None:
    path = spec(folder, text(', evaluation = "corpus/val.txt"'))
    data = loaded(path)
    assert_windows(data.train, windows(b"fghij klm\0abcde\0"))
    assert_windows(data.evaluation, windows(b"held out\0"))
    assert planned(path) == len(data.train)


def test_text_by_a_tokenizer(folder: Path) -> None:
    path = spec(
        folder,
        text(f', tokenizer = "{__name__}:words", evaluation = "corpus/val.txt"', "corpus/**"),
    )
    (folder / "corpus/long.txt").write_text("a bb ccc dddd eeeee ffffff")
    (folder / "corpus/val.txt").write_text("ff ff f f f f")
    data = loaded(path)
    assert_windows(data.train, windows([5, 3, 0, 1, 2, 3, 4, 5, 6, 0, 5, 0]))
    assert_windows(data.evaluation, windows([2, 2, 1, 1, 1, 1, 0]))
    assert planned(path) is None


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(out / "metrics.jsonl") if "loss" in line]


def test_a_run_counts_epochs_and_has_the_same_numbers_with_workers(folder: Path) -> None:
    run = "length = 2 epochs, seed = 1, eval = 3 steps"
    held_out = ', evaluation = "val.bin"'
    found = train(spec(folder, tokens(held_out), run), folder / "alone", quiet=True)
    assert found.steps == -(-2 * 22 // 4)
    again = train(
        spec(folder, tokens(held_out + ", workers = 2"), run), folder / "by two", quiet=True
    )
    assert losses(folder / "alone") == losses(folder / "by two")
    assert found.eval_loss == again.eval_loss


def test_a_run_on_text_counts_what_a_tokenizer_gives(folder: Path) -> None:
    (folder / "corpus/long.txt").write_text("a bb ccc dddd eeeee ffffff" * 5)
    more = f', tokenizer = "{__name__}:words"'
    path = spec(folder, text(more), "length = 1 epochs, seed = 1")
    samples = len(loaded(path).train)
    assert train(path, folder / "out", quiet=True).steps == -(-samples // 2)


def test_the_whole_file_is_not_read(folder: Path) -> None:
    with (folder / "large.bin").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file of one tebibyte
    data = loaded(spec(folder, tokens(pattern="large.bin")))
    assert len(data.train) == ((1 << 39) - 1) // CONTEXT
    assert not data.train.batch([len(data.train) - 1])[0].any()


MISTAKES = {
    "no file": (tokens(pattern="*.bni"), "no file matches '*.bni' in", '"*.bni"'),
    "no held-out file": (tokens(', evaluation = "vl.bin"'), "no file matches 'vl.bin' in", '"vl.bin"'),
    "all held out": (tokens(', evaluation = "*.bin"'), "`evaluation` holds out all 3 files", '"*.bin" }'),
    "half a number": (tokens(", dtype = uint32", "b.bin"), "86 bytes, which is not a whole number", '"b.bin"'),
    "too short": (tokens(pattern="b.bin").replace("context = 4", "context = 43"), "not one sample to train on", "43"),
    "too short to hold out": (
        tokens(', evaluation = "val.bin"').replace("context = 4", "context = 20"),
        "not one sample that is held out",
        "20",
    ),
    "nothing left": (tokens(", evaluation = 100%"), "expected a fraction above 0 and below 1", "100%"),
    "a tokenizer that is none": (text(f', tokenizer = "{__name__}:wrds"'), "has no `wrds`", ':wrds"'),
    "text of one": (text(f', tokenizer = "{__name__}:nonsense"'), "a list of whole numbers", ':nonsense"'),
    "text that is none": (text(f', tokenizer = "{__name__}:words"', "latin.txt"), "no text in UTF-8", '"latin.txt"'),
}  # fmt: skip


@pytest.mark.parametrize(("data", "said", "place"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_placed_at_its_field(folder: Path, data: str, said: str, place: str) -> None:
    (folder / "latin.txt").write_bytes("straße".encode("latin-1"))
    path = spec(folder, data)
    with pytest.raises(trainc.SpecError) as error:
        train(path, folder / "out", quiet=True)
    assert said in str(error.value)
    (found,) = error.value.diagnostics
    assert found.span is not None
    assert found.span.text in place or place in found.span.text


def test_a_plan_where_the_files_are_not(folder: Path) -> None:
    assert planned(spec(folder, tokens(pattern="elsewhere/*.bin"))) is None
    with pytest.raises(
        trainc.SpecError, match="how many samples an epoch has is not known"
    ) as error:
        trainc.plan(spec(folder, tokens(pattern="elsewhere/*.bin"), "length = 1 epochs"))
    assert "no file matches 'elsewhere/*.bin' here" in str(error.value)


def test_the_string_stands_in_brackets() -> None:
    (found,) = trainc.check("data tokens { batch = 4 samples, context = 8 }").diagnostics
    assert (found.message, found.help) == (
        "`data tokens` needs a pattern of files",
        'write `data tokens("data/*")`',
    )
    (found,) = trainc.check(
        'data tokens { path = "x", batch = 4 samples, context = 8 }'
    ).diagnostics[:1]
    assert "`data tokens` has no field `path`" in found.message


def test_a_spec_is_printed_as_it_was_written(folder: Path) -> None:
    checked = trainc.check(spec(folder, tokens(", evaluation = 10%"))).spec
    assert checked is not None
    again = type(checked).from_json(checked.to_json(), trainc.catalog())
    assert again.fingerprint == checked.fingerprint
