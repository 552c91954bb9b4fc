"""Noised targets: the step by hand, boxes as published, proposals that a model is given, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import trainc
from tests.conformance import Setup, divided
from tests.losses import numbers_of_each_token
from trainc.compiler.constructs.perturb.targets import NoisedTargets
from trainc.compiler.errors import SiteError
from trainc.dsl.text.errors import SpecError
from trainc.runtime.storage.random_streams import derive_seed

SEED = 3
BASE = f"loss mse optimizer sgd {{ lr = 0.3 }} run {{ length = 40 steps, seed = {SEED} }} "
BOX = "box(0.050455, 0.05086, 0.071394, 0.073416)"


def clause(fields: str) -> str:
    return f"perturb targets {{ {fields} }}"


def method(fields: str) -> NoisedTargets:
    (found,) = [
        c for c in trainc.check(BASE + clause(fields)).unwrap().clauses if c.name == "targets"
    ]
    assert isinstance(found.construct, NoisedTargets)
    return found.construct


class Refiner(nn.Module):
    """Moves proposals (B, P, 4) by what it sees of examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.drop = nn.Linear(10, 4), nn.Dropout(0.2)

    def forward(self, x: Tensor, proposals: Tensor) -> Tensor:
        if proposals.dim() == 3:
            x = x.unsqueeze(1).expand(-1, proposals.shape[1], -1)
        found: Tensor = proposals + self.fc(torch.cat([self.drop(x), proposals], -1))
        return found if found.dim() == 2 else found.mean(1)


def boxes(seed: int, proposals: tuple[int, ...] = ()) -> tuple[dict[str, Tensor], Tensor]:
    made = torch.Generator().manual_seed(seed)
    low, size = torch.rand(2, 6, 2, generator=made, dtype=torch.float64)
    x = torch.randn(6, 6, generator=made, dtype=torch.float64)
    given = torch.rand(6, *proposals, 4, generator=made, dtype=torch.float64)
    return {"x": x, "proposals": given}, torch.cat([low, low + size], -1)


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("into", [None, (), (3,)])
def test_a_step_is_that_of_both_losses(into: tuple[int, ...] | None, executor: Any) -> None:
    """As loss + weight * mean of the losses at noised targets, or with noised proposals, in any division."""
    fields = f"noise = {BOX}, weight = 0.4, copies = 2"
    fields += "" if into is None else ', input = "proposals"'
    noise, theirs, ours = method(fields), Refiner().double().eval(), Refiner().double()
    ours.drop.p = theirs.drop.p = 0.0
    program = trainc.compile(BASE + clause(fields), ours, executor=executor)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3)
    for step, sizes in enumerate([(6,), (2, 4)]):
        inputs, y = boxes(step, into or ())
        total = own = mse_loss(theirs(**inputs), y)
        for copy in range(2):
            like = y if into is None else inputs["proposals"]
            draw = torch.Generator()
            draw.manual_seed(derive_seed(SEED, "around", f"targets {copy}", 0, step))
            e = torch.randn(like.numel(), generator=draw, dtype=torch.float64).view(like.shape)
            near = noise.reference((y if like.dim() == 2 else y[:, None]).expand_as(like), e)
            moved, aim = (inputs, near) if into is None else ({**inputs, "proposals": near}, y)
            total = total + 0.4 / 2 * mse_loss(theirs(**moved), aim)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        before = inputs["proposals"].clone()
        assert program.step(divided((inputs, y), sizes))["loss"] == pytest.approx(
            own.item(), rel=1e-12
        )
        assert torch.equal(inputs["proposals"], before)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_boxes_move_as_published() -> None:
    box = torch.tensor([10.0, 20, 50, 100], dtype=torch.float64)
    e = torch.tensor([1, -1, 0.5, -0.5], dtype=torch.float64)
    wanted = torch.tensor([11.304260, 17.399517, 52.732140, 94.462876], dtype=torch.float64)
    found = method(f"noise = {BOX}, weight = 0.1").reference(box, e)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    centred = torch.tensor([30.0, 60, 40, 80], dtype=torch.float64)
    found = method(f"noise = centered_{BOX}, weight = 0.1").reference(centred, e)
    one, two = found.chunk(2)
    torch.testing.assert_close(torch.cat([one - two / 2, one + two / 2]), wanted, rtol=0, atol=1e-5)
    interval = method("noise = box(0.1, 2), weight = 1").reference(box[:2], -e[:2].abs())
    torch.testing.assert_close(interval, torch.tensor([14.0, 14.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "batch", "message"),
    [
        ("noise = normal(1)", ({"x": 1}, torch.arange(6)), "these are int64"),
        (f"noise = {BOX}", None, "boxes of 4 numbers, and the targets are"),
        ('noise = normal(1), input = "rois"', None, "finds no input `rois`: the inputs have `x`, `proposals`"),
        ('noise = normal(1), input = "x"', None, "it must have the same shape"),
        ('noise = normal(1), target = "boxes"', None, "finds no target `boxes`.*remove `target`"),
    ],
)  # fmt: skip
def test_what_cannot_have_noise_is_refused_at_the_clause(
    fields: str, batch: Any, message: str
) -> None:
    program = trainc.compile(
        BASE + clause(fields + ", weight = 1"), Refiner().double(), executor="module"
    )
    inputs, y = boxes(0)
    targets = y[:, :3] if batch is None else batch[1]
    with pytest.raises(SiteError, match=message) as failed:
        program.step((inputs, targets))
    assert failed.value.clause == "targets"


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ("normal(-1)", "0 or more, found `normal"),
        ("box(1, 2, 3)", "as many numbers for its centre as for its size"),
        ("uniform(1)", "there is no noise `uniform`|noise"),
    ],
)
def test_noise_is_checked(noise: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        trainc.check(BASE + clause(f"noise = {noise}, weight = 1")).unwrap()


def test_one_of_several_targets_has_noise() -> None:
    """The loss of the other is the same, so that the gradient of both is twice its own."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    losses = 'loss mse as one { target = "one" } loss l1 as two { target = "two" } '
    text = BASE.replace("loss mse ", losses) + clause(
        'noise = normal(0), weight = 1, target = "two"'
    )
    inputs, y = boxes(0)
    both = BASE.replace("loss mse ", losses).replace("0.3", "0.6")
    ours, theirs = (trainc.compile(one, model_of(model)) for one in (text, both))
    for program in (ours, theirs):
        program.step((inputs["x"], {"one": y, "two": 2 * y}))
    for one, two in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def model_of(model: nn.Module) -> nn.Module:
    copied = nn.Linear(6, 4).double()
    copied.load_state_dict(model.state_dict())
    return copied


def conformance() -> Setup:
    """Return the small language model with numbers as targets."""
    return Setup(batch=numbers_of_each_token, rest=Setup().rest.replace("cross_entropy", "mse"))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradient of a step with noised targets, from the update, and by definition."""
    fields = "noise = relative(0.3), weight = 0.5"
    model = Refiner().double()
    model.drop.p = 0.0
    inputs, y = boxes(0)
    start = model.fc.weight.detach().clone()
    draw = torch.Generator().manual_seed(derive_seed(SEED, "around", "targets 0", 0, 0))
    e = torch.randn(y.numel(), generator=draw, dtype=torch.float64).view(y.shape)
    near = method(fields).reference(y, e)
    total = mse_loss(model(**inputs), y) + 0.5 * mse_loss(model(**inputs), near)
    (wanted,) = torch.autograd.grad(total, model.fc.weight)
    trainc.compile(BASE + clause(fields), model).step((inputs, y))
    return {"gradient": (start - model.fc.weight.detach()) / 0.3}, {"gradient": wanted}
