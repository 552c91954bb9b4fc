"""Per-example gradient norms of every kind of layer, in graphs and in bound modules, against one pass per example."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from examples.models import gpt
from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.losses import Losses

ALL = """loss cross_entropy optimizer sgd { lr = 0 } run { length = 9 steps, seed = 4 }
noise_scale gns on all"""
Make = Callable[[], tuple[nn.Module, Tensor, Tensor]]


class Words(nn.Module):
    """A language model without attention: positions all examples share, a padding token, tied head if asked."""

    def __init__(self, tied: bool, flat_positions: bool) -> None:
        super().__init__()
        self.flat_positions = flat_positions
        self.tokens = nn.Embedding(11, 8, padding_idx=3)
        self.positions = nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        x = self.tokens(ids) + self.positions(places if self.flat_positions else places[None])
        x = x + torch.cummax(F.gelu(self.inner(self.norm(x))), 1).values
        return self.head(x)  # type: ignore[no-any-return]


class Heads(nn.Module):
    """Norms of queries and keys: (B, T, H, Dh), and a 4-D linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.LayerNorm(4)
        self.mix = nn.Linear(4, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_norm(self.q(x).unflatten(-1, (2, 4)))
        k = self.k_norm(self.k(x).unflatten(-1, (2, 4)))
        mixed: Tensor = self.mix(q * k.softmax(1))
        return self.head(mixed.flatten(2)).mean(1)  # type: ignore[no-any-return]


def images(*layers: nn.Module, channels: int = 4, dims: int = 2) -> Make:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = nn.Sequential(*copy.deepcopy(layers), nn.Flatten(), nn.LazyLinear(5))
        x = torch.randn(5, channels, *(7, 6, 5)[:dims])
        model(x)
        return model, x, torch.randint(5, (5,))

    return make


def words(tied: bool = False, flat_positions: bool = False) -> Make:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        ids = torch.randint(11, (5, 6))
        targets = torch.randint(11, (5, 6)).masked_fill(torch.rand(5, 6) < 0.3, -100)
        return Words(tied, flat_positions), ids, targets

    return make


def heads() -> tuple[nn.Module, Tensor, Tensor]:
    return Heads(), torch.randn(5, 6, 8), torch.randint(5, (5,))


MODELS: dict[str, Make] = {
    "words": words(),
    "words, flat positions": words(flat_positions=True),
    "tied words": words(tied=True),
    "heads": heads,
    "conv1d": images(nn.Conv1d(4, 6, 3, padding=1), nn.GELU(), nn.GroupNorm(2, 6), dims=1),
    "conv2d": images(nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.GroupNorm(3, 6), nn.Tanh()),
    "conv3d": images(nn.Conv3d(4, 2, (3, 1, 2), dilation=(1, 1, 2)), nn.Tanh(), dims=3),
    "grouped": images(nn.Conv2d(4, 8, (3, 2), padding="same", groups=4), nn.Tanh()),
    "circular": images(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.Tanh()),
    "instance norm": images(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
}


def brute(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return |c_b|^2 by parameter for a mean over counted targets, one backward pass per example."""
    counts = (y >= 0).reshape(len(y), -1).sum(1).double()
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for b, weight in enumerate(counts / counts.sum()):
        logits, target = model(x[b : b + 1]), y[b : b + 1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))
        found = torch.autograd.grad(loss * weight, list(model.parameters()))
        for name, gradient in zip(rows, found, strict=True):
            rows[name].append(gradient.square().sum())
    return {name: torch.stack(values) for name, values in rows.items()}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(7)
    model, x, y = MODELS[name]()
    return model.double(), x.double() if x.is_floating_point() else x, y


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("name", "executor"),
    [(n, e) for n in MODELS for e in ("module", "graph") if (n, e) != ("tied words", "graph")],
)
def test_every_layers_norms_are_those_of_single_examples(name: str, executor: Any) -> None:
    model, x, y = made(name)
    expected = brute(model, x, y)
    program = trainc.compile(ALL, model, executor=executor)
    _, gradients, found = program.execution.trial((x, y), executor)
    assert set(found) == set(expected)
    for parameter, squares in expected.items():
        torch.testing.assert_close(found[parameter], squares, rtol=1e-9, atol=1e-14)
    plain = torch.autograd.grad(_loss(model, x, y), list(model.parameters()))
    for (parameter, _), gradient in zip(model.named_parameters(), plain, strict=True):
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-9, atol=1e-14)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3)])
def test_any_division_into_micro_batches_gives_the_same_figures(
    name: str, sizes: tuple[int, ...]
) -> None:
    model, x, y = made(name)
    whole = trainc.compile(ALL, model)
    whole.step((x, y))
    model, x, y = made(name)
    split = trainc.compile(ALL, model)
    split.step(list(zip(x.split(sizes), y.split(sizes), strict=True)))
    for figure in ("gns.signal", "gns.noise"):
        assert split.signals[figure] == pytest.approx(whole.signals[figure], rel=1e-6)


def test_a_tied_weight_is_measured_by_modules_where_a_graph_cannot() -> None:
    model, x, y = made("tied words")
    program = trainc.compile(ALL, model)
    program.step((x, y))
    assert program.graph_refused is not None
    assert "share" in program.graph_refused
    assert program.signals["gns.noise"] > 0


def test_brute_force_and_calibration_know_shared_positions_from_the_start() -> None:
    model, x, y = made("words, flat positions")
    expected = brute(model, x, y)
    program = trainc.compile(f"{ALL} {{ calibrate = 1 steps, calibrate_examples = 3 }}", model)
    found = program.execution.contributions((x, y))
    torch.testing.assert_close(found["positions.weight"], expected["positions.weight"])
    program.step((x, y))
    assert program.signals["gns.noise"] > 0


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_shared_positions_are_known_where_no_target_of_the_first_step_counts(executor: Any) -> None:
    model, x, y = made("words, flat positions")
    text = ALL.replace("seed = 4", "seed = 4, on_nan = skip")
    program = trainc.compile(text, model, executor=executor)
    assert program.step((x, torch.full_like(y, -100)))["skipped"] == 1
    program.step((x, y))
    assert program.signals["gns.noise"] > 0


def test_positions_as_many_as_examples_are_not_taken_for_examples() -> None:
    model, x, y = made("words, flat positions")
    x, y = x.repeat(2, 1)[:6], y.repeat(2, 1)[:6]  # six examples of six tokens
    expected = brute(model, x, y)
    for executor in ("module", "graph"):
        program = trainc.compile(ALL, model, executor=executor)
        program.execution._check_preconditions((x, y))
        found = program.execution.trial((x, y), executor).squares
        torch.testing.assert_close(found["positions.weight"], expected["positions.weight"])
        program.unbind()


class Flattens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]


@pytest.mark.parametrize("executor", ["auto", "module"])
def test_an_input_without_an_example_axis_is_an_error(executor: Any) -> None:
    program = trainc.compile(ALL, Flattens(), executor=executor)
    with pytest.raises(ExampleAxisUnknown, match=r"`fc`.*\(12, 8\) and \(18, 8\)"):
        program.step((torch.randn(4, 6, 8), torch.randint(5, (4, 6))))


class Sum(Loss):
    """Cross-entropy that is summed over the examples, though its weights say it is a mean."""

    name = "sum"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    def target_weights(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets)


def test_a_summed_loss_is_an_error() -> None:
    program = trainc.compile(ALL, nn.Sequential(nn.Linear(4, 3)))
    program.execution.losses = Losses.of(Sum())
    with pytest.raises(SiteError, match="not a sum"):
        program.step((torch.randn(5, 4), torch.randint(3, (5,))))


def test_a_transposed_linear_layer_is_one() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8), nn.GELU(), Conv1D(5, 6)).double()
    x, y = torch.randn(4, 3, 8).double(), torch.randint(5, (4, 3))
    expected = brute(model, x, y)
    for executor in ("module", "graph"):
        program = trainc.compile(ALL, model, executor=executor)
        found = program.execution.trial((x, y), executor).squares
        for name, squares in expected.items():
            torch.testing.assert_close(found[name], squares, rtol=1e-9, atol=1e-14)
        program.unbind()


def test_both_views_of_an_example_are_one_contribution_at_linear_layers() -> None:
    spec = ALL + "\nregularize pace on type(Linear) { sigma = 0.4, weight = 0.7 }"
    for executor in ("module", "graph"):
        model, x, y = made("words")
        whole = trainc.compile(spec, model, executor=executor)
        whole.step((x, y))
        model, x, y = made("words")
        split = trainc.compile(spec, model, executor=executor)
        split.step([(x[b : b + 1], y[b : b + 1]) for b in range(5)])
        assert split.signals["gns.noise"] == pytest.approx(whole.signals["gns.noise"], rel=1e-6)


def test_a_tied_weight_is_measured_under_two_views() -> None:
    torch.manual_seed(0)
    model = gpt(layers=1, width=16, heads=2, context=8, vocabulary=20, tied=True).double()
    spec = (
        "loss cross_entropy\noptimizer sgd { lr = 0.1 }\n"
        "noise_scale gns on all { smooth = 5 steps }\n"
        'regularize pace on "blocks.*.mlp.**" & type(Linear) { sigma = 0.5, weight = 0.5 }'
    )
    program = trainc.compile(spec, model, executor="module")
    batch = torch.randint(20, (3, 8)), torch.randint(20, (3, 8))
    program.begin()
    expected = program.execution.contributions(batch)
    squares = program.execution.trial(batch, "module").squares
    torch.testing.assert_close(squares, expected, rtol=1e-12, atol=0)
