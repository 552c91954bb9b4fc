"""A BatchNorm that takes statistics of the batch mixes examples: what compares examples is refused, in every layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainc
from trainc.compiler.errors import SiteError
from trainc.functional import per_example_sq_norms

RUN = "loss cross_entropy run { length = 40 steps, seed = 4 } optimizer sgd { lr = 0.1 } "
GNS = RUN + "noise_scale gns on type(Conv2d, Linear) { FIELDS }"


class Activated(nn.BatchNorm2d):
    """A BatchNorm that is more than one: another forward pass, as image models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Conv(nn.Module):
    """A convolution, what `norm` makes of its result, and a head."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), norm, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Function(nn.Module):
    """A batch normalization without a layer of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=self.training) if self.training else x


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2, self.training)
        return x - x.mean((0, 2, 3), keepdim=True) if self.training else x


def model(norm: Any) -> Any:
    torch.manual_seed(5)
    return Conv(norm).double()


def batch(seed: int = 0, rows: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 6, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,), generator=g)


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.BatchNorm2d(4),
    lambda: nn.BatchNorm2d(4, affine=False),
    lambda: nn.SyncBatchNorm(4),
    lambda: Activated(4),
    lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("fields", ["", "calibrate = 5 steps"])
def test_a_layer_that_mixes_examples_is_an_error_of_the_plan(
    make: Callable[[], nn.Module], fields: str
) -> None:
    with pytest.raises(trainc.SpecError) as caught:
        trainc.compile(GNS.replace("FIELDS", fields), model(make()))
    rules = {d.rule for d in caught.value.diagnostics if d.severity == "error"}
    assert rules == {"norm-mixes-examples"}
    assert "`norm`" in str(caught.value)
    assert "eval mode before the spec is compiled" in str(caught.value)


def run(program: Any, road: str) -> None:
    x, y = batch()
    if road == "loop":
        program.loss((x, y)).backward()
    elif road == "own loss":
        with program.micro_batch(len(x)):
            loss = F.cross_entropy(program.module(x), y)
        program.backward(loss)
    else:
        program.step((x, y))
        return
    program.update()


@pytest.mark.parametrize(
    ("executor", "road"),
    [("graph", "step"), ("module", "step"), ("module", "loop"), ("module", "own loss")],
)
def test_a_layer_in_eval_mode_is_measured_until_it_is_put_in_train_mode(
    executor: Any, road: str
) -> None:
    own = model(nn.BatchNorm2d(4))
    own.norm.eval()
    program = trainc.compile(GNS.replace("FIELDS", ""), own, executor=executor)
    run(program, road)
    x, y = batch()
    twin = model(nn.BatchNorm2d(4))
    twin.norm.eval()
    gradients = [
        torch.autograd.grad(
            F.cross_entropy(twin(x[b : b + 1]), y[b : b + 1]) / 6, [*twin.parameters()]
        )
        for b in range(6)
    ]
    measured = [0, 1, 4, 5]  # weight and bias of `conv` and `head`
    squares = sum(float(g[i].square().sum()) for g in gradients for i in measured)
    whole = sum(
        float(torch.stack([g[i] for g in gradients]).sum(0).square().sum()) for i in measured
    )
    noise = (squares * 6 - whole) / (1 - 1 / 6)
    assert program.signals["gns.noise"] == pytest.approx(noise, rel=1e-9)
    own.train()
    before = own.head.weight.detach().clone()
    with pytest.raises(SiteError, match=r"`norm` is a BatchNorm in train mode") as at:
        run(program, road)
    assert at.value.rule == "examples-mix"
    assert torch.equal(own.head.weight, before)
    program.discard_step()
    own.norm.eval()
    run(program, road)


@pytest.mark.parametrize("norm", [Function, ByHand])
@pytest.mark.parametrize("fields", ["", "method = micro_batch, calibrate = 1 steps"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_what_mixes_examples_in_train_mode_alone_is_found_at_the_first_step(
    norm: Callable[[], nn.Module], fields: str, executor: Any
) -> None:
    own = model(norm())
    program = trainc.compile(GNS.replace("FIELDS", fields), own, executor=executor)
    with pytest.raises(
        SiteError, match="in train mode the model's outputs for two examples change"
    ):
        program.step([batch(0), batch(1)])


def test_random_numbers_of_a_models_own_are_no_mixing() -> None:
    own = model(nn.Dropout2d(0.4))
    trainc.compile(GNS.replace("FIELDS", ""), own).step(batch())


class Counting(nn.Module):
    """Does something else in every other pass, whatever the examples are."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x * (1 + self.passes % 2)


def test_a_model_that_counts_its_passes_is_no_mixing() -> None:
    x, y = batch()
    per_example_sq_norms(model(Counting()), lambda out: F.cross_entropy(out, y), x)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[-1]])
def test_the_public_function_refuses_what_mixes_examples(layer: Callable[[], nn.Module]) -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="normalizes over the batch"):
        per_example_sq_norms(model(layer()), lambda out: F.cross_entropy(out, y), x, on=["conv"])
    with pytest.raises(SiteError, match="in train mode the model's outputs"):
        per_example_sq_norms(model(Function()), lambda out: F.cross_entropy(out, y), x)


@pytest.mark.parametrize("method", ["replica", "ghost, group = 3"])
def test_what_replicas_mix_is_refused_where_they_or_groups_are_compared(method: str) -> None:
    spec = GNS.replace("FIELDS", f"method = {method}")
    with pytest.raises(trainc.SpecError, match="`norm` is a SyncBatchNorm"):
        trainc.plan(spec, model(nn.SyncBatchNorm(4)))
    trainc.plan(spec, model(nn.SyncBatchNorm(4).eval()))


def test_micro_batches_that_processes_mix_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GNS.replace("FIELDS", "method = micro_batch")
    program = trainc.compile(spec, model(nn.SyncBatchNorm(4)))
    program.step([batch(0), batch(1)])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(SiteError, match="over the micro-batches of all processes"):
        program.execution.refuse_mixing()


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("remainder", ["", ", remainder = merge_last"])
def test_ghost_batches_keep_what_a_layer_does_beside_normalizing(
    executor: Any, remainder: str
) -> None:
    own, plain = model(Activated(4)), model(Activated(4))
    x, y = batch(rows=7 if remainder else 6)
    spec = RUN + f'normalize ghost_batch on "norm" {{ size = 3{remainder} }}'
    trainc.compile(spec, own, executor=executor).step((x, y))
    optimizer, sizes = torch.optim.SGD(plain.parameters(), lr=0.1), (3, len(x) - 3)
    hidden = torch.cat([plain.norm(part) for part in plain.conv(x).split(sizes)])
    F.cross_entropy(plain.head(torch.tanh(hidden).mean((2, 3))), y).backward()
    optimizer.step()
    for found, wanted in zip(own.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_groups_are_measured_where_a_layer_does_more_than_normalize_but_not_that_layer() -> None:
    """Each group alone goes through the layer: its gradient is that of a batch of its own."""
    own, plain = model(Activated(4)), model(Activated(4))
    x, y = batch()
    with pytest.raises(trainc.SpecError, match="a forward pass of its own"):
        trainc.compile(RUN + "noise_scale gns on all { method = ghost, group = 3 }", own)
    spec = GNS.replace("FIELDS", "method = ghost, group = 3")
    program = trainc.compile(spec, own)
    program.step((x, y))
    chosen = [*plain.conv.parameters(), *plain.head.parameters()]
    shares = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(plain(a), b) / 2, chosen)]
        )
        for a, b in zip(x.split(3), y.split(3), strict=True)
    ]
    squares, whole = (
        sum(float(s.square().sum()) for s in shares),
        float(torch.stack(shares).sum(0).square().sum()),
    )
    signal = (whole - squares) / (1 - 1 / 2)
    assert program.signals["gns.signal"] == pytest.approx(signal, rel=1e-9)
