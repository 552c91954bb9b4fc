"""z-loss: its definition, the shift of a softmax that only it sees, and training equal to a loop by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import divided
from trainc.compiler.constructs.regularize.outputs.z_loss import ZLoss

SPEC = (
    "loss cross_entropy optimizer sgd { lr = 0.5 } run { length = 20 steps, seed = 1 }"
    " regularize z_loss { weight = 0.3 }"
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 5)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 4, generator=made, dtype=torch.float64)
    targets = torch.randint(5, (6, 3), generator=made)
    targets[0, 1:], targets[4, 0] = -100, -100
    return x, targets


def by_hand(made: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of a batch, with log Z from the loss's own definition: log Z = -log p_c + z_c."""
    logits, counted = made(x), y != -100
    log_z = logits[counted][:, 0] - logits[counted].log_softmax(-1)[:, 0]
    loss: Tensor = F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0.3 * (log_z**2).mean()
    return loss


def test_only_it_sees_a_shift_of_the_logits() -> None:
    logits, counted = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([True, False])
    logits[1] = torch.inf
    for shift in (0.0, 3.0):
        found = float(ZLoss.reference(logits + shift, counted))
        assert found == pytest.approx((torch.tensor(4.0).log().item() + shift) ** 2, rel=1e-6)
    bf16 = ZLoss.reference(torch.full((1, 4), 100.0, dtype=torch.bfloat16), counted[:1])
    assert bf16.dtype == torch.float32
    assert float(bf16) == pytest.approx(101.386294**2, rel=1e-6)


@pytest.mark.parametrize("sizes", [(), (1, 2, 3)], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_training_is_a_loop_by_hand(executor: Any, sizes: Any) -> None:
    wanted = model()
    program = trainc.compile(SPEC, model(), executor=executor)
    for given in map(batch, range(3)):
        program.step(divided(given, sizes) if sizes else given)
        wanted.zero_grad()
        by_hand(wanted, *given).backward()
        torch.optim.SGD(wanted.parameters(), 0.5).step()
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_targets_weigh_what_they_weigh_in_the_loss_so_that_micro_batches_add_up() -> None:
    weights, (x, y) = (0.5, 2.0, 0.0, 1.0, 4.0), batch(2)
    spec = SPEC.replace("entropy", f"entropy {{ class_weight = {list(weights)} }}")
    rows = model()(x)[y != -100].logsumexp(-1).square()
    own = torch.tensor(weights, dtype=torch.float64)[y[y != -100]]
    wanted = float(((rows * own).sum() / own.sum()).detach())
    for sizes in ((6,), (1, 2, 3)):
        for executor in ("graph", "module"):
            program = trainc.compile(spec, model(), executor=executor)
            said = program.step(divided((x, y), sizes))
            assert said["z_loss"] == pytest.approx(wanted, rel=1e-12)


def test_a_loss_without_classes_is_an_error() -> None:
    spec = "loss mse optimizer sgd { lr = 0.1 } regularize z_loss { weight = 1 }"
    with pytest.raises(trainc.SpecError, match="use a loss of classes"):
        trainc.plan(spec, nn.Linear(4, 5))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of one step, by the graph and by definition."""
    made, (x, y) = model(), batch(1)
    loss = trainc.compile(SPEC, made, executor="graph").graph((x, y))
    named = dict(made.named_parameters())
    compiled = {"loss": loss} | {n: p.grad for n, p in named.items() if p.grad is not None}
    wanted = F.cross_entropy(made(x).flatten(0, 1), y.flatten())
    wanted = wanted + 0.3 * ZLoss.reference(made(x), y != -100)
    found = torch.autograd.grad(wanted, list(named.values()))
    return compiled, {"loss": wanted.detach()} | dict(zip(named, found, strict=True))
