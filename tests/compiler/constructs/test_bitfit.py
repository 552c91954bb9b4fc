"""BitFit: biases train, and whatever else is named; everything else stays, bit for bit."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import trainc
from tests.conformance import Setup, in_double, run_step
from trainc.compiler.constructs.mask.bitfit import Bitfit

REST = "loss cross_entropy optimizer adamw { lr = 0.1, weight_decay = 0.1 } "


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A program's weights after steps of gradient descent, and those of a loop that moves what is called `bias`."""
    setup = Setup()
    model = setup.model().double()
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    program = trainc.compile("loss cross_entropy optimizer sgd { lr = 0.1 } mask bitfit", model)
    plain = copy.deepcopy(model).requires_grad_()
    for seed in range(3):
        x, y = batch = in_double(setup.batch(seed))
        run_step(program, batch)
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(want[name])
        loss = F.cross_entropy(plain(x).flatten(0, 1), y.flatten())
        gradient = dict(zip(want, torch.autograd.grad(loss, list(plain.parameters())), strict=True))
        want = Bitfit.reference(want, [gradient], 0.1)
    return {n: p.detach() for n, p in model.named_parameters()}, want


def test_what_is_named_trains_besides_and_the_rest_is_bit_identical() -> None:
    setup = Setup()
    model = setup.model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    program = trainc.compile(REST + 'mask bitfit on "blocks.1.**.bias" { also = "head" }', model)
    for seed in range(2):
        run_step(program, setup.batch(seed))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    biases = {n for n in before if n.startswith("blocks.1.") and n.endswith("bias")}
    assert moved == {*biases, "head.weight"}
    said = next(line for line in program.summary() if line.startswith("bitfit: "))
    assert said.startswith("bitfit: 6 biases and 1 other parameters train, ")


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ('mask bitfit on "head"', "`head.weight` is no bias"),
        ("mask bitfit from 2 steps", "remove `from 2 steps`"),
        ('mask bitfit { also = "none" }', "none"),
    ],
)
def test_what_cannot_be_is_said_at_the_clause(clause: str, said: str) -> None:
    with pytest.raises(trainc.SpecError) as found:
        trainc.plan(REST + "run { length = 9 steps } " + clause, Setup().model())
    assert said in str(found.value)
