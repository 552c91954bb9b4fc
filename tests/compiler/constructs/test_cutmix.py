"""CutMix: boxes of other images, and targets mixed by the pixels that stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from tests.conformance import Setup
from trainc.compiler.constructs.regularize.activations.cutmix import Cutmix, mix
from trainc.compiler.errors import SiteError
from trainc.runtime.data.batch import Batch
from trainc.runtime.step.batches import StepDraws
from trainc.runtime.storage.random_streams import derive_seed

SEED, CLASSES = 3, 4
BASE = (
    f"loss cross_entropy optimizer sgd {{ lr = 0.2 }} run {{ length = 40 steps, seed = {SEED} }} "
)
CUTMIX = "regularize cutmix { alpha = 1, share = example }"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, CLASSES)
    ).double()


def batch(seed: int, examples: int = 6) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 2, 5, 6, generator=made, dtype=torch.float64)
    return x, torch.randint(CLASSES, (examples,), generator=made)


def numbers(step: int, rows: int) -> Tensor:
    stream = StepDraws(SEED, "cutmix", 0, step, 0).of_examples()
    drawn = [(stream.beta(1, 1), stream.random(), stream.random()) for _ in range(rows)]
    return torch.tensor(drawn, dtype=torch.float64)


def by_hand(model: nn.Module, batches: list[Batch]) -> None:
    for step, (x, y) in enumerate(batches):
        draw = torch.Generator()
        draw.manual_seed(derive_seed(SEED, "batch", "cutmix", 0, step, 0))
        partner = torch.randperm(len(y), generator=draw)
        mixed, kept = Cutmix.reference(x, partner, numbers(step, len(y)))
        part, out = torch.tensor(kept, dtype=torch.float64), model(mixed)
        one, two = (cross_entropy(out, t, reduction="none") for t in (y, y[partner]))
        model.zero_grad()
        (part * one + (1 - part) * two).mean().backward()
        torch.optim.SGD(model.parameters(), 0.2).step()


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what training leaves, by the graph and with boxes cut one by one."""
    ours, theirs = net(), net()
    program = trainc.compile(BASE + CUTMIX, ours, executor="graph")
    batches = [batch(seed) for seed in range(3)]
    for one in batches:
        program.step(one)
    by_hand(theirs, batches)
    return dict(ours.state_dict()), dict(theirs.state_dict())


def conformance() -> Setup:
    """Return a small classifier of images, in which every step is mixed."""
    return Setup(
        lambda: net().float(),
        lambda seed: (batch(seed)[0].float(), batch(seed)[1]),
        usage="regularize cutmix { alpha = 1 }",
    )


@pytest.mark.parametrize(
    ("part", "row", "column", "box"),
    [
        (0.75, 0.5, 0.5, (2, 6, 1, 4)),  # half of each side, rounded down: 4 of 8 rows, 3 of 6 columns
        (0.75, 0.0, 0.99, (0, 2, 4, 6)),  # what lies outside is cut off
        (1.0, 0.3, 0.3, (2, 2, 1, 1)),
        (0.0, 0.5, 0.5, (0, 8, 0, 6)),
    ],
)  # fmt: skip
def test_the_box_has_the_published_size(
    part: float, row: float, column: float, box: tuple[int, ...]
) -> None:
    found = Cutmix.box(part, row, column, height=8, width=6)
    if part == 0.75 and row == 0.5:
        assert (found[1] - found[0], found[3] - found[2]) == (4, 2)  # twice half of 3, rounded down
    else:
        assert found == box


def test_all_images_at_once_are_as_one_by_one() -> None:
    made = np.random.default_rng(0)
    x = torch.from_numpy(made.normal(size=(5, 2, 7, 9)))
    drawn, partner = torch.from_numpy(made.random((5, 3))), torch.tensor([3, 0, 4, 1, 2])
    kept, mixed = mix("cutmix", [x], partner, drawn)
    want, part = Cutmix.reference(x, partner, drawn)
    assert torch.equal(mixed, want)
    torch.testing.assert_close(kept, torch.tensor(part, dtype=torch.float64), rtol=0, atol=1e-12)
    of_one_box, _ = Cutmix.reference(x, partner, drawn[:1].expand(5, 3))
    assert torch.equal(mix("cutmix", [x], partner, drawn[:1])[1], of_one_box)


def test_what_is_no_image_is_refused_at_its_clause() -> None:
    flat = nn.Sequential(nn.Linear(5, CLASSES)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    with pytest.raises(SiteError, match=r"cuts boxes out of images .* shape \(6, 5\)") as error:
        trainc.compile(BASE + CUTMIX, flat).step((x, batch(0)[1]))
    assert error.value.clause == "cutmix"
