"""N:M: forward passes and evaluation have n of m weights, gradients are those of SR-STE."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import trainc
from tests.conformance import Setup, in_double, run_step
from trainc.compiler.constructs.mask.n_m import NM, sr_ste

REST = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps } "
CLAUSE = 'mask n_m on "**.mlp.**" & ndim(2) { n = 1, m = 4, decay = 0.05 }'


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A program's weights, and those of a loop by hand: masked passes, straight-through gradients, decay, descent."""
    rule, setup = NM(n=1, m=4), Setup()
    model = setup.model().double()
    program = trainc.compile(REST + CLAUSE, model)
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    masked = [n for n in want if ".mlp." in n and n.endswith("weight")]
    plain = setup.model().double()
    for seed in range(3):
        x, y = batch = in_double(setup.batch(seed))
        run_step(program, batch, (4, 2))
        used = {
            n: w.requires_grad_() for n, w in {**want, **rule.reference(_of(want, masked))}.items()
        }
        loss = F.cross_entropy(functional_call(plain, used, (x,)).flatten(0, 1), y.flatten())
        gradients = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
        for name in masked:
            left_out = want[name].detach() * (used[name].detach() == 0)
            gradients[name] = gradients[name] + 0.05 * left_out
        want = {n: (w - 0.1 * gradients[n]).detach() for n, w in want.items()}
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparse = rule.reference(_of(want, masked))
    with program.evaluation_weights():
        found |= {f"evaluated {n}": model.get_parameter(n).detach().clone() for n in masked}
    return found, want | {f"evaluated {n}": w for n, w in sparse.items()}


def _of(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: weights[name].detach() for name in names}


def test_the_gradient_of_sr_ste() -> None:
    gradient, weight = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    kept = torch.tensor([True, False, True])
    assert sr_ste(gradient, weight, kept, 0.1).tolist() == [1.0, 2.5, 3.0]
    with pytest.raises(ValueError, match="one shape"):
        sr_ste(gradient, weight, kept[:2], 0.1)


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ('"embed.token" { m = 5, n = 2 }', "16 is no multiple of 5"),
        ('"ln_f.bias"', "`ln_f.bias` is not a matrix"),
        ('"**.fc.weight" { n = 4 }', "4 of 4 weights leaves none out"),
        ('"**.fc.weight" until 3 steps', "remove `until 3 steps`"),
    ],
)
def test_what_does_not_divide_is_said_at_the_clause(clause: str, said: str) -> None:
    with pytest.raises(trainc.SpecError) as found:
        trainc.plan(REST + "mask n_m on " + clause, Setup().model())
    assert said in str(found.value)
