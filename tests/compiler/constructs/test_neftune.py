"""NEFTune: the published noise, with the true length of every example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from trainc.compiler.constructs.regularize.activations.neftune import Neftune
from trainc.compiler.errors import SiteError
from trainc.kernels.noise.philox import pack_key
from trainc.kernels.noise.uniforms import uniform
from trainc.runtime.storage.random_streams import derive_seed

REFERENCE = Path(__file__).parents[2] / "reference/regularizers.json"
SEED, ALPHA, WIDTH, LENGTH, TOKENS = 3, 5.0, 4, 6, 9
BASE = (
    f"loss cross_entropy optimizer sgd {{ lr = 0.5 }} run {{ length = 40 steps, seed = {SEED} }} "
)
PAD, SEP = 0, 8
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 8, 3, 0, 0], [8, 2, 8, 4, 5, 8]])
BY_PADDING = torch.tensor([[6.0], [4.0], [6.0]]).expand(3, 6).double()
BY_DOCUMENT = torch.tensor([[6.0] * 6, [3, 3, 3, 1, 1, 1], [1, 2, 2, 3, 3, 3]]).double()


class Words(nn.Module):
    """Logits of three classes, from the mean of the tokens' embeddings."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH, padding_idx=padding)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(ids) + self.position(torch.arange(ids.shape[1]))
        out: Tensor = self.head(torch.tanh(x).mean(1))
        return out


def model(padding: int | None = None) -> Words:
    torch.manual_seed(0)
    return Words(padding).double()


def unit(step: int = 0, examples: int = 3) -> Tensor:
    """Return the numbers in [-1, 1] of a step, as a counter-based generator draws them."""
    key = pack_key(derive_seed(SEED, "noise") & 0xFFFFFFFF, step)
    like, first = torch.ones(examples, LENGTH, WIDTH), torch.zeros((), dtype=torch.int64)
    return (2 * uniform(like, key, 0, 1, "none", first) - 1).double()


def by_hand(made: Words, lengths: Tensor, steps: int) -> list[float]:
    """Train by a forward hook with the published formula, and return the losses."""
    now: dict[str, Tensor] = {}
    hook = lambda *given: Neftune.reference(given[2], now["unit"], lengths, ALPHA)  # noqa: E731
    made.table.register_forward_hook(hook)
    losses = []
    for step in range(steps):
        now["unit"] = unit(step)
        made.zero_grad()
        loss = cross_entropy(made(IDS), torch.tensor([0, 1, 2]))
        loss.backward()
        losses.append(float(loss.detach()))
        torch.optim.SGD(made.parameters(), 0.5).step()
    return losses


def clause(more: str = "") -> str:
    return f'regularize neftune on "table" {{ alpha = {ALPHA}{more} }}'


def test_it_is_the_published_noise() -> None:
    row = json.loads(REFERENCE.read_text())["relatives"]["neftune"]
    emb, noise, out = (
        torch.tensor(row[n]["data"]).view(row[n]["shape"]) for n in ("emb", "unit_uniform", "out")
    )
    lengths = torch.full((len(emb),), float(emb.shape[1]))
    found = Neftune.reference(emb, noise, lengths, row["alpha"])
    torch.testing.assert_close(found, out, rtol=1e-6, atol=1e-6)


MASK = (IDS != PAD).long()
CASES: list[tuple[str, Any, int | None, Tensor]] = [
    ("", IDS, None, torch.full((3, 6), 6.0).double()),
    ("", IDS, PAD, BY_PADDING),
    (f", padding = {PAD}", IDS, None, BY_PADDING),
    ("", {"ids": IDS, "attention_mask": MASK}, None, BY_PADDING),
    (', mask = "attention_mask"', {"ids": IDS, "attention_mask": MASK.bool()}, None, BY_PADDING),
    (f", padding = {PAD}, separator = {SEP}", IDS, None, BY_DOCUMENT),
]


@pytest.mark.parametrize(("more", "inputs", "padding", "lengths"), CASES)
def test_the_length_is_that_of_the_example(
    more: str, inputs: Any, padding: int | None, lengths: Tensor
) -> None:
    executor: Any = "module" if isinstance(inputs, Tensor) and "separator" not in more else "graph"
    program = trainc.compile(BASE + clause(more), model(padding), executor=executor)
    said = [program.step((inputs, torch.tensor([0, 1, 2])))["loss"] for _ in range(2)]
    assert said == pytest.approx(by_hand(model(padding), lengths, 2), rel=1e-12)


def test_an_example_has_its_noise_in_any_division_and_beside_any_other() -> None:
    """Cut to the longest of its micro-batch, an example has the length and the numbers that it has in the whole."""
    whole, parts = model(PAD), model(PAD)
    y = torch.tensor([0, 1, 2])
    trainc.compile(BASE + clause(), whole).step((IDS, y))
    trainc.compile(BASE + clause(), parts).step([(IDS[:1], y[:1]), (IDS[1:], y[1:])])
    for name, value in parts.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_the_numbers_are_uniform() -> None:
    found = unit(examples=2000).flatten()
    assert float(found.min()) >= -1
    assert float(found.max()) <= 1
    counts = torch.histc(found, 20, -1, 1)
    expected = len(found) / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # 99.9% of chi squared, 19


def test_two_views_have_the_same_noise_where_they_share_dropout() -> None:
    pace = ' regularize pace on "head" { sigma = 1e-30, weight = 1 }'
    batch = {"ids": IDS, "attention_mask": MASK}, torch.tensor([0, 1, 2])
    for executor in ("graph", "module"):
        said = trainc.compile(BASE + clause() + pace, model(), executor=executor).step(batch)
        assert said["consistency"] == 0.0
        assert said["loss"] == pytest.approx(by_hand(model(), BY_PADDING, 1)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("inputs", "more", "message"),
    [
        (IDS, ', mask = "seen"', "`mask = seen` is none of the model's inputs: these have no names"),
        ({"ids": IDS}, ', mask = "seen"', "`mask = seen` is none of the model's inputs: those are `ids`"),
        (
            {"ids": IDS, "attention_mask": MASK[:, None]},
            "",
            r"`attention_mask` has shape \(3, 1, 6\), and the ids of `table` have \(3, 6\)",
        ),
    ],
)  # fmt: skip
def test_masks_that_tell_no_length(inputs: Any, more: str, message: str) -> None:
    program = trainc.compile(BASE + clause(more), model(), executor="module")
    with pytest.raises(SiteError, match=message):
        program.step((inputs, torch.tensor([0, 1, 2])))


def test_other_modules_are_refused() -> None:
    text = BASE + 'regularize neftune on "head" { alpha = 5 }'
    with pytest.raises(trainc.SpecError, match="`head` is a Linear; the noise is for embeddings"):
        trainc.compile(text, model())
    shared = trainc.compile(
        BASE + 'regularize neftune on "position" { alpha = 5 }', model(), executor="module"
    )
    with pytest.raises(SiteError, match="`position` gives an output of shape"):
        shared.step((IDS, torch.tensor([0, 1, 2])))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what training leaves, by the graph and by a forward hook."""
    ours, theirs = model(PAD), model(PAD)
    program = trainc.compile(BASE + clause(), ours, executor="graph")
    for _ in range(2):
        program.step((IDS, torch.tensor([0, 1, 2])))
    by_hand(theirs, BY_PADDING, 2)
    return dict(ours.state_dict()), dict(theirs.state_dict())
