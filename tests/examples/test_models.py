"""The example models have the shapes, names and determinism that specs rely on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import models

Build = Callable[[], nn.Module]


def ids() -> Tensor:
    return torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def small_gpt(**options: Any) -> Build:
    return lambda: models.gpt(layers=2, width=32, heads=2, context=16, **options)


CASES: dict[str, tuple[Build, Callable[[], Tensor], tuple[int, ...]]] = {
    "gpt": (small_gpt(), ids, (3, 16, 256)),
    "gpt rms": (small_gpt(norm="rms"), ids, (3, 16, 256)),
    "gpt dropout": (small_gpt(dropout=0.1), ids, (3, 16, 256)),
    "gpt tied": (small_gpt(tied=True), ids, (3, 16, 256)),
    "vit": (models.vit, images, (5, 10)),
    "vit rms": (lambda: models.vit(norm="rms", dropout=0.1), images, (5, 10)),
    "resnet": (models.resnet, images, (5, 10)),
    "deep resnet": (lambda: models.resnet(stages=3, depth=2, width=4), images, (5, 10)),
    "mlp": (models.mlp, images, (5, 10)),
    "linear": (lambda: models.mlp(layers=0), images, (5, 10)),
    "student": (lambda: models.teacher_student(64), lambda: images().flatten(1), (5, 1)),
}
every_model = pytest.mark.parametrize(("build", "inputs", "shape"), CASES.values(), ids=CASES)


@every_model
def test_it_learns_from_its_inputs(
    build: Build, inputs: Callable[[], Tensor], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = build()
    outputs = model(inputs())
    assert outputs.shape == shape
    F.mse_loss(outputs, torch.ones_like(outputs)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_model
def test_the_seed_decides_it(
    build: Build, inputs: Callable[[], Tensor], shape: tuple[int, ...]
) -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(build()(inputs()))
    assert torch.equal(*outputs)


@every_model
def test_it_builds_without_memory(
    build: Build, inputs: Callable[[], Tensor], shape: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = build()
        assert model(inputs().to("meta")).shape == shape
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    real = {name: tensor.shape for name, tensor in build().state_dict().items()}
    assert real == {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_gpt_has_the_names_that_specs_select() -> None:
    names = {name for name, _ in small_gpt()().named_modules()}
    assert {"embed.token", "embed.position", "ln_f", "head"} <= names
    inside = ("ln1", "attn.qkv", "attn.proj", "ln2", "mlp.fc", "mlp.proj")
    assert {f"blocks.{i}.{name}" for i in range(2) for name in inside} <= names


def test_gpt_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model, before = small_gpt()(), ids()
    after = before.clone()
    after[:, 10:] = 255 - after[:, 10:]
    assert torch.equal(model(before)[:, :10], model(after)[:, :10])
    assert not torch.equal(model(before)[:, 10:], model(after)[:, 10:])


def test_gpt_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    model = models.gpt()
    block = model.blocks[0]
    assert isinstance(block, models.Block)
    assert block.mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert not block.attn.qkv.bias.any()
    logits = model(ids())
    assert F.cross_entropy(logits.flatten(0, 1), ids().flatten()).item() == pytest.approx(
        5.55, abs=0.1
    )


def test_tied_gpt_shares_one_parameter() -> None:
    model = models.gpt(tied=True)
    assert model.head.weight is model.embed.token.weight
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in models.gpt().parameters()) - 256 * 128


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = small_gpt(dropout=0.5)()
    assert not torch.equal(model(ids()), model(ids()))
    model.eval()
    assert torch.equal(model(ids()), model(ids()))
