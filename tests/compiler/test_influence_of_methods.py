"""Influence under losses, masks, adapters, checkpoints of activations and precisions: always that of the definition."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.influenced import run
from tests.influenced_methods import cross_entropy, with_inputs
from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.influence.selection import examples_of, parameters_of, training_samples
from trainc.compiler.influence.tracin import Influence, Sketch, TracIn
from trainc.kernels.parameter.masked_update import unpack
from trainc.runtime.mask.selected_entries import SelectedEntries
from trainc.runtime.storage.checkpoint import load_checkpoint

Loss = Callable[[nn.Module, Any, Any], Tensor]
TEXT = """train 1
model "tests.influenced_methods:{model}
data "tests.influenced_methods:{data}" {{ batch = 3 samples{of} }}
{loss}
optimizer {optimizer}
run {{ length = 6 steps, checkpoint = 2 steps, keep = 3, device = cpu{fields} }}
{more}
"""


class Case(NamedTuple):
    """A spec, the loss of an example by definition, and which parameters are compared, each with whether together."""

    loss: Loss = cross_entropy
    kinds: tuple[tuple[str | None, bool], ...] = ((None, False), ("blocks.*", True))
    model: str = "Tokens"
    data: str = "token_data"
    of: str = ""
    text: str = "loss cross_entropy"
    fields: str = ""
    more: str = ""
    exact: float = 1e-10

    def spec(self) -> str:
        name, _, fields = self.model.partition("(")
        return TEXT.format(
            model=f'{name}" {{ {fields[:-1]} }}' if fields else f'{name}"',
            data=self.data,
            of=self.of,
            loss=self.text,
            optimizer="sgd { lr = 0.1 }",
            fields=self.fields,
            more=self.more,
        )


OWN: dict[str, Any] = {
    "data": "labelled",
    "text": "loss model",
    "kinds": ((None, False), ("head", False)),
}


def own(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    return model(**x, labels=y).loss  # type: ignore[no-any-return]


def of_two(model: nn.Module, x: Tensor, y: dict[str, Tensor]) -> Tensor:
    found = model(x)
    loss = 0.5 * F.mse_loss(found["numbers"], y["numbers"])
    if (y["classes"] != -100).any():
        loss = loss + F.cross_entropy(found["classes"], y["classes"])
    return loss


def plainly(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """The loss without activation checkpoints, which know no `autograd.grad` where they are reentrant."""
    model.reentrant, before = None, model.reentrant
    loss = cross_entropy(model, x, y)
    model.reentrant = before
    return loss


TWO = """loss cross_entropy as first { output = "classes", target = "classes" }
loss mse as second { output = "numbers", target = "numbers", weight = 0.5 }"""
CASES = {
    "tied": Case(
        kinds=((None, False), ("head.weight", False), ("embed", False), ("blocks.*", True))
    ),
    "not tied": Case(model="Tokens(tied = false)", kinds=((None, False), ("head", True))),
    "loss of the model": Case(own, model="own_loss", **OWN),
    "mean of means": Case(own, model='own_loss(rule = "examples")', **OWN),
    "loss call": Case(
        lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
        ((None, False), ("classes", True)),
        'Only(part = "classes")',
        "two_targets",
        ', only = "classes"',
        'loss call("torch.nn.functional:cross_entropy") { label_smoothing = 0.1, counted = targets }',
    ),
    "loss call of the batch": Case(
        lambda m, x, y: with_inputs(m(x), (x, y)),
        ((None, False), ("numbers", False)),
        'Only(part = "numbers")',
        "two_targets",
        ', only = "numbers"',
        'loss call("tests.influenced_methods:with_inputs") { takes = batch, counted = examples }',
    ),
    "regression": Case(
        lambda m, x, y: F.mse_loss(m(x), y),
        ((None, False), ("numbers", True)),
        'Only(part = "numbers")',
        "two_targets",
        ', only = "numbers"',
        "loss mse",
    ),
    "two losses": Case(
        of_two, ((None, False), ("numbers", True)), "TwoHeads", "two_targets", "", TWO
    ),
    "recomputed activations": Case(fields=', checkpoint_activations = "blocks.*"'),
    "checkpoints": Case(plainly, model="Tokens(reentrant = false)"),
    "reentrant checkpoints": Case(
        plainly, ((None, False), ("blocks.*", False)), "Tokens(reentrant = true)"
    ),
    "reentrant checkpoints and a mask": Case(
        plainly,
        ((None, False), ("blocks.*", False)),
        "Tokens(reentrant = true)",
        more="mask sift on ndim(2) { density = 20% }",
    ),
    "bf16": Case(fields=", precision = bf16", model='Tokens(dtype = "float32")', exact=1e-6),
    "fp16": Case(fields=", precision = fp16", model='Tokens(dtype = "float32")', exact=1e-6),
    "bf16 weights": Case(model='Tokens(dtype = "bfloat16")', kinds=((None, False),), exact=1e-6),
} | {
    more: Case(model="Tokens(tied = false)", more=more)
    for more in (
        "mask sift on ndim(2) { density = 20% }",
        "mask sift on ndim(2) from 3 steps { density = 20% }",
        "mask sift on ndim(2) every 2 steps { density = 20%, batches = 2 }",
        "mask sift on ndim(2) { density = 20%, select = magnitude }",
        'mask magnitude on "blocks.**" & ndim(2) every 2 steps { density = 40% }',
        'mask rigl on "blocks.**" & ndim(2) every 2 steps { density = 40% }',
        "mask bitfit",
        "mask lisa every 1 steps",
        'mask embedding_rows on "embed" { last = 2 }',
        'adapt lora on "blocks.*" { rank = 2, alpha = 4 }',
        'adapt parallel on "blocks.*" { rank = 2 }',
        "regularize ema { decay = 0.9 }",
        "regularize swa from 2 steps every 1 steps",
        "regularize r_drop { weight = 1.0 }",
        "perturb sam { rho = 0.05 }",
        "lr layer_decay on trainable { decay = 0.75 }",
        "distribute ddp",
        'distribute fsdp2 on "blocks.*"',
    )
}


def influence(
    recorded: RecordedRun, layers: str | None, projected: int | None = None
) -> tuple[Influence, list[str]]:
    names, inventory = parameters_of(recorded, layers, False)
    others = examples_of("0..2", recorded.data)
    train = training_samples(None, recorded.data)
    measure = TracIn(recorded, names, inventory, projected)
    return measure.measure(train, (others.split, others.ids)), [*names]


def trained_entries(state: dict[str, Any], name: str, like: Tensor, selected: bool) -> Tensor:
    """Return which entries of a parameter train by what the masks of a checkpoint have of it: all without a mask.

    Of one whose entries are selected none trains until they are.
    """
    for action, kept in state["actions"].items():
        if f"kept/{name}" in kept:
            return unpack(kept[f"kept/{name}"], like.numel()).view(like.shape)
        if f"index/{name}" in kept:
            found = torch.zeros(like.numel(), dtype=torch.bool)
            found[kept[f"index/{name}"].long()] = True
            return found.view(like.shape)
        if action == "lisa draw":
            block = name.rpartition(".")[0]
            return torch.full_like(like, kept.get(f"{block}.weight", True), dtype=torch.bool)
    return torch.full_like(like, not selected, dtype=torch.bool)


def defined(recorded: RecordedRun, names: list[str], loss: Loss) -> tuple[Tensor, Tensor]:
    """Return influence of all training samples on three others, and on themselves, by a pass of each."""
    count = len(recorded.data.train)  # type: ignore[arg-type]
    scores, itself = torch.zeros(3, count).double(), torch.zeros(count).double()
    for step, path in recorded.checkpoints.items():
        rates, module = recorded.load(step), recorded.program.module.eval()
        state = load_checkpoint(path)["program"]
        parameters = dict(module.named_parameters())
        masks = recorded.program.execution.method.masks
        selected = {name for name, mask in masks.items() if isinstance(mask, SelectedEntries)}

        def gradient(split: Any, i: int) -> dict[str, Tensor]:
            value = loss(module, *split.batch([i]))  # noqa: B023 called in this turn
            if value.isnan():
                return {}
            found = torch.autograd.grad(value, [parameters[n] for n in names], allow_unused=True)  # noqa: B023
            return {
                n: (g * trained_entries(state, n, g, n in selected)).double()  # noqa: B023
                for n, g in zip(names, found, strict=True)
                if g is not None
            }

        others = [gradient(recorded.data.evaluation, i) for i in range(3)]
        for j in range(count):
            one = gradient(recorded.data.train, j)
            itself[j] += sum(rates[n] * float(g.square().sum()) for n, g in one.items())
            for i, other in enumerate(others):
                both = one.keys() & other.keys()
                scores[i, j] += sum(rates[n] * float((one[n] * other[n]).sum()) for n in both)
    return scores, itself


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_sum_of_rates_times_products(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    recorded = RecordedRun.read(run(tmp_path, case.spec()))
    for layers, together in case.kinds:
        found, names = influence(recorded, layers)
        scores, itself = defined(recorded, names, case.loss)
        assert float(scores.abs().max()) > 0
        for given, wanted in ((found.scores, scores), (found.own, itself)):
            assert float((given - wanted).abs().max()) < case.exact * float(wanted.abs().max())
        assert found.together == (together or "adapt" in case.more), layers
    assert all(p.grad is None for p in recorded.program.module.parameters())


def test_a_projection_adds_in_float64_whatever_the_weights_are() -> None:
    """The many entries of one sum would otherwise be lost in 16 bits."""
    draw = torch.Generator().manual_seed(1)
    rows = {"a": torch.randn(2, 200_000, generator=draw).bfloat16()}
    sketch, rates = Sketch(8, {"a": 200_000}, 0), {"a": 0.1}
    found = sketch(rows, rates)[""]
    assert found.dtype == torch.float64
    exact = sketch({"a": rows["a"].double()}, rates)[""]
    assert torch.equal(found, exact)


def test_examples_without_a_target_say_nothing_of_whether_examples_may_pass_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two have none, and in this model the others depend on each other."""
    from tests import influenced_methods

    folder = run(tmp_path, CASES["not tied"].spec())
    plain = influenced_methods.Tokens.forward

    def mixed(self: Any, ids: Tensor) -> Tensor:
        return plain(self, ids) * (1 + ids.double().mean())

    monkeypatch.setattr(influenced_methods.Tokens, "forward", mixed)
    recorded = RecordedRun.read(folder)
    found, names = influence(recorded, "head")
    assert not found.together
    scores, _ = defined(recorded, names, cross_entropy)
    torch.testing.assert_close(found.scores, scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "mask sift on ndim(2) { density = 20% }",
            "a mask lets only some entries of `blocks.0.weight` train",
        ),
        ("mask lisa every 1 steps", "had 2 learning rates, 0 to 0.1"),
    ],
)
def test_the_loader_refuses_what_one_rate_does_not_stand_for(
    tmp_path: Path, more: str, says: str
) -> None:
    folder = run(tmp_path, CASES[more].spec())
    recorded = RecordedRun.read(folder)
    with pytest.raises(ValueError, match=re.escape(says)):
        trainc.checkpoint_loader(recorded.program.module, max(recorded.checkpoints.values()))
