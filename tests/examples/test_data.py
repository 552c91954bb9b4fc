"""The example data honours the data contract and is what it says it is."""

import hashlib
from typing import Any

import pytest
import torch

from examples import data
from examples.data import Data, Examples, Teacher, Windows
from examples.models import teacher_student

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "code": (data.stdlib, {"limit_bytes": 300_000}),
    "code, default": (data.stdlib, {}),
    "prose": (data.stdlib, {"part": "prose", "context": 64}),
    "code, all": (data.stdlib, {"limit_bytes": 10**9, "evaluation_share": 0.5}),
    "digits": (data.digits, {}),
    "digits, more held out": (data.digits, {"evaluation_share": 0.35, "seed": 3}),
    "some digits": (data.some_digits, {}),
    "some digits, few": (data.some_digits, {"first": 5, "images": 8, "seed": 1}),
    "teacher": (data.teacher, {"samples": 100, "dimension": 5}),
}
every_source = pytest.mark.parametrize(("load", "arguments"), CASES.values(), ids=CASES)


@every_source
def test_its_description_is_true(load: Any, arguments: dict[str, Any]) -> None:
    loaded: Data = load(**arguments)
    assert load.describe(**arguments) == {
        "samples": len(loaded.train),
        "tokens_per_sample": loaded.tokens_per_sample,
    }
    assert len(loaded.evaluation) > 0


@every_source
def test_it_is_the_same_every_time(load: Any, arguments: dict[str, Any]) -> None:
    first, second = load(**arguments), load(**arguments)
    assert first.sha256 == second.sha256
    for one, other in ((first.train, second.train), (first.evaluation, second.evaluation)):
        at = [0, len(one) - 1, len(one) // 2]
        for a, b in zip(one.batch(at), other.batch(at), strict=True):
            assert torch.equal(a, b)
            assert len(a) == 3


@every_source
def test_a_batch_is_its_examples(load: Any, arguments: dict[str, Any]) -> None:
    part = load(**arguments).train
    inputs, targets = part.batch([3, 1])
    for row, index in enumerate([3, 1]):
        alone = part.batch([index])
        assert torch.equal(inputs[row], alone[0][0])
        assert torch.equal(targets[row], alone[1][0])


def test_few_digits_are_as_many_of_each_class_and_the_rest_is_held_out() -> None:
    loaded = data.some_digits(first=5, images=8)
    _, classes = loaded.train.batch(range(len(loaded.train)))
    assert classes.bincount().tolist() == [8] * 5
    images, held_out = loaded.evaluation.batch(range(len(loaded.evaluation)))
    assert len(images) == 896 - 40
    assert held_out.unique().tolist() == [*range(5)]


@pytest.mark.parametrize("part", ["code", "prose"])
def test_text_is_cut_in_two_without_overlap(part: Any) -> None:
    loaded = data.stdlib(part=part, limit_bytes=200_000)
    train, held_out = loaded.train, loaded.evaluation
    assert isinstance(train, Windows)
    assert isinstance(held_out, Windows)
    whole = bytes(torch.cat([train.text, held_out.text]).tolist())
    assert len(whole) == 200_000
    assert hashlib.sha256(whole).hexdigest() == loaded.sha256
    assert len(held_out.text) == 20_000


def test_targets_are_the_next_bytes() -> None:
    train = data.stdlib(context=32, limit_bytes=50_000).train
    inputs, targets = train.batch(range(len(train)))
    assert inputs.shape == targets.shape == (len(train), 32)
    assert inputs.dtype == torch.long
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[1:, 0], targets[:-1, -1])
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < 256


def test_code_is_python_without_tests() -> None:
    names = [path.as_posix() for path in data._sources()]
    assert len(names) > 300
    assert not [n for n in names if "/test/" in n or "site-packages" in n or "sysconfigdata" in n]


def test_digits_are_normalised_and_held_out_ones_are_others() -> None:
    loaded = data.digits()
    train, held_out = loaded.train, loaded.evaluation
    assert isinstance(train, Examples)
    assert isinstance(held_out, Examples)
    assert train.inputs.shape == (1438, 1, 8, 8)
    assert train.inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.inputs.std().item() == pytest.approx(1, abs=1e-5)
    assert len(train) + len(held_out) == data.DIGITS
    assert set(held_out.targets.tolist()) == set(range(10))
    seen = {image.numpy().tobytes() for image in train.inputs}
    assert not seen & {image.numpy().tobytes() for image in held_out.inputs}


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("start", ["zero", "elsewhere"])
def test_the_teachers_gradient_noise_is_known(noise: float, start: str) -> None:
    loaded = data.teacher(samples=200_000, dimension=8, noise=noise, seed=1)
    assert isinstance(loaded, Teacher)
    inputs, targets = loaded.train.batch(range(len(loaded.train)))
    student = teacher_student(8)
    if start == "elsewhere":
        torch.nn.init.constant_(student.weight, 0.7)
    error = (student(inputs) - targets).detach().double()
    gradients = 2 * error * inputs
    mean = gradients.mean(0)
    trace, squared = loaded.moments(student.weight)
    assert float((gradients - mean).square().sum(1).mean()) == pytest.approx(trace, rel=0.03)
    assert float(mean.square().sum()) == pytest.approx(squared, rel=0.03)
    if start == "zero":
        assert (trace, squared) == pytest.approx((4 * (9 + 8 * noise**2), 4.0))
