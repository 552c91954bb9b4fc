"""Changes of a model after `compile` are taken over where they can be; else an error names them and no weight moves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trainc
from trainc.compiler.errors import SiteError
from trainc.compiler.program.program import Program
from trainc.runtime.torch_optimizer.problem import OptimizerProblem

BASE = "loss cross_entropy run { length = 40 steps } "
ADAMW = BASE + "optimizer adamw { lr = 1e-2, weight_decay = 0.1 } "
SPECS = {
    "empty": ADAMW,
    "noise": ADAMW + "regularize pace on type(Linear) { sigma = 0.3, weight = 0.5, mode = pair }",
    "measured": ADAMW + "noise_scale gns on type(LayerNorm)",
    "masked": ADAMW + 'mask magnitude on "mid.weight" { density = 50% }',
    "averaged": ADAMW + "regularize ema { decay = 0.9 }",
    "surrounded": ADAMW + "perturb sam { rho = 0.05 }",
    "layered": ADAMW + "lr layer_decay on trainable { decay = 0.75 }",
    "two optimizers": BASE
    + "optimizer adamw on ndim(2) { lr = 1e-2 } optimizer sgd on ndim(1) { lr = 0.1 }",
}


class Model(nn.Module):
    """Tokens to classes; `first` is frozen, `act` and `more` have no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.act, self.mid = nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8)
        self.more: nn.Module = nn.Identity()
        self.head = nn.Linear(8, 11, bias=False)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.act(self.first(self.words(x)).mean(1)))
        return self.head(self.more(torch.tanh(self.mid(h))))  # type: ignore[no-any-return]


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (6, 5), generator=g), torch.randint(0, 11, (6,), generator=g)


def one_step(program: Program, road: str, seed: int) -> None:
    if road == "step":
        program.step(batch(seed))
    else:
        program.loss(batch(seed)).backward()
        program.update()


def replace_frozen(m: Model) -> None:
    m.first.weight = nn.Parameter(m.first.weight.detach() * 2, requires_grad=False)


def swap_activation(m: Model) -> None:
    m.act = nn.ReLU()  # type: ignore[assignment]


def add_frozen(m: Model) -> None:
    g = torch.Generator().manual_seed(5)
    more = nn.Linear(8, 8, bias=False).requires_grad_(False).double()
    more.weight.copy_(torch.randn(8, 8, generator=g))
    m.more = more


def freeze(m: Model) -> None:
    m.mid.requires_grad_(False)


def load(m: Model) -> None:
    m.load_state_dict({name: value * 1.5 for name, value in m.state_dict().items()})


ADOPTED: list[Callable[[Model], None]] = [
    replace_frozen,
    swap_activation,
    add_frozen,
    freeze,
    load,
]


@pytest.mark.parametrize("road", ["step", "loop"])
@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("change", ADOPTED, ids=lambda change: change.__name__)
def test_what_leaves_the_trained_parameters_in_place_is_taken_over(
    change: Callable[[Model], None], executor: Any, road: str
) -> None:
    """Weights are those of plain PyTorch with the same change at the same step."""
    own, plain = model(), model()
    program = trainc.compile(ADAMW, own, executor=executor)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in range(5):
        if seed == 2:
            change(own)
            change(plain)
        one_step(program, road, seed)
        x, y = batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for found, wanted in zip(own.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change", [swap_activation, replace_frozen], ids=lambda c: c.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_a_graph_follows_a_changed_model(spec: str, change: Callable[[Model], None]) -> None:
    models = model(), model()
    executors: tuple[Any, Any] = ("graph", "module")
    for own, executor in zip(models, executors, strict=True):
        program = trainc.compile(SPECS[spec], own, executor=executor)
        for seed in range(4):
            if seed == 2:
                change(own)
            program.step(batch(seed))
    for found, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_parameter_that_was_frozen_for_some_steps_trains_again(executor: Any) -> None:
    own = model()
    own.first.requires_grad_(True)
    program = trainc.compile(ADAMW, own, executor=executor)
    own.first.requires_grad_(False)
    before = own.first.weight.detach().clone()
    program.step(batch(0))
    assert torch.equal(own.first.weight, before)
    own.first.requires_grad_(True)
    program.step(batch(1))
    assert not torch.equal(own.first.weight, before)


def unfreeze(m: Model) -> None:
    m.first.requires_grad_(True)


def replace_frozen_by_trained(m: Model) -> None:
    m.first.weight = nn.Parameter(m.first.weight.detach())


def add(m: Model) -> None:
    m.more = nn.Linear(8, 8).double()


def resize(m: Model) -> None:
    m.words = nn.Embedding(14, 8).double()


def tie(m: Model) -> None:
    m.head.weight = m.words.weight


def wrap(m: Model) -> None:
    m.mid = nn.Sequential(m.mid)  # type: ignore[assignment]


def remove(m: Model) -> None:
    m.mid = nn.Identity()  # type: ignore[assignment]


def parametrize(m: Model) -> None:
    nn.utils.parametrizations.weight_norm(m.mid)


REFUSED: dict[str, tuple[Callable[[Model], None], str]] = {
    "unfrozen": (unfreeze, r"`first\.weight` requires a gradient now, but was frozen at"),
    "another, trained": (
        replace_frozen_by_trained,
        r"`first\.weight` requires a gradient now, but was frozen at",
    ),
    "added": (add, r"`more\.weight` is a parameter of its own only since `trainc.compile`"),
    "resized": (resize, r"`words\.weight` is no longer in the model .* was replaced"),
    "tied": (tie, r"`head\.weight` is no longer .* replaced by `words\.weight`, which it shares"),
    "wrapped": (wrap, r"`mid\.weight` is no longer .* is at `mid\.0\.weight` now, because"),
    "removed": (remove, r"`mid\.weight` is no longer .* was removed, merged or replaced"),
    "parametrized": (parametrize, r"`mid\.weight` is no longer .* was removed, merged or replaced"),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("spec", ["empty", "masked"])
def test_what_this_program_cannot_train_is_named_before_a_weight_moves(
    spec: str, what: str, steps: int
) -> None:
    change, message = REFUSED[what]
    for road in ("step", "loop"):
        own = model()
        program = trainc.compile(SPECS[spec], own)
        for seed in range(steps):
            one_step(program, road, seed)
        change(own)
        before = [p.detach().clone() for p in own.parameters()]
        with pytest.raises(SiteError, match=message):
            one_step(program, road, 7)
        assert all(torch.equal(*pair) for pair in zip(before, own.parameters(), strict=True))
        assert program.clock.steps == steps


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_another_dtype_is_taken_over_before_the_first_step_and_named_after_it(
    executor: Any,
) -> None:
    own, fresh = model(), model().float()
    program = trainc.compile(ADAMW, own, executor=executor)
    own.float()
    program.step(batch(0))
    trainc.compile(ADAMW, fresh, executor=executor).step(batch(0))
    assert all(torch.equal(*p) for p in zip(own.parameters(), fresh.parameters(), strict=True))
    own.bfloat16()
    with pytest.raises(
        SiteError, match=r"`words\.weight` is torch\.bfloat16 .* was torch\.float32"
    ):
        program.step(batch(1))
    own.float()
    program.step(batch(1))


def test_a_layer_that_a_clause_changes_cannot_be_replaced_even_where_it_has_no_weights() -> None:
    own = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
    own[1].requires_grad_(False)
    spec = ADAMW + 'regularize pace on "1.0" { sigma = 0.3, weight = 0.5, mode = pair }'
    program = trainc.compile(spec, own)
    data = torch.randn(5, 6), torch.arange(5) % 3
    program.step(data)
    kept = own[1]
    own[1] = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(SiteError, match=r"`1\.0` is no longer in the model, but a clause .*pace"):
        program.step(data)
    own[1] = kept
    program.step(data)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_measured_parameter_that_is_frozen_later_is_named(executor: Any) -> None:
    own = model()
    program = trainc.compile(SPECS["measured"], own, executor=executor)
    program.step(batch(0))
    own.norm.requires_grad_(False)
    with pytest.raises(SiteError, match=r"`norm\.weight` was frozen since .*exclude its layer"):
        program.step(batch(1))
    own.norm.requires_grad_(True)
    program.step(batch(1))


MASK = "mask magnitude on matrices {} {{ density = 25%{} }}"


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("times", ["", "every 1 steps"])
@pytest.mark.parametrize("scope", ["", ", scope = global"])
def test_a_frozen_parameter_keeps_its_entries_until_it_trains_again(
    executor: Any, times: str, scope: str
) -> None:
    own = model()
    program = trainc.compile(ADAMW + MASK.format(times, scope), own, executor=executor)
    own.mid.requires_grad_(False)
    before = own.mid.weight.detach().clone()
    program.step(batch(0))
    assert any("`mid.weight` is frozen" in note for note in program.report().notes)
    program.step(batch(1))
    assert torch.equal(own.mid.weight, before)
    assert int((own.head.weight == 0).sum()) >= 60  # of 88
    state = program.state_dict()
    own.mid.requires_grad_(True)
    for one in (program, resumed(state, own, ADAMW + MASK.format(times, scope), executor)):
        one.step(batch(2))
        mid: Any = one.module.get_parameter("mid.weight")
        assert int((mid == 0).sum()) >= 40  # of 64
    for found, wanted in zip(one.module.parameters(), own.parameters(), strict=True):
        assert torch.equal(found, wanted)


def resumed(state: Any, own: Model, spec: str, executor: Any) -> Program:
    twin = model()
    twin.load_state_dict(own.state_dict())
    program = trainc.compile(spec, twin, executor=executor)
    program.load_state_dict(state)
    return program


FROZEN = {
    "decay": ADAMW,
    "momentum": BASE + "optimizer sgd { lr = 1e-2, momentum = 0.9, weight_decay = 0.3 }",
    "masked": ADAMW + "mask sift on matrices { density = 20% }",
    "zeros": ADAMW + 'mask magnitude on "mid.weight" every 1 steps { density = 50% }',
    "averaged": ADAMW + "regularize ema { decay = 0.9 }",
    "trusted": ADAMW + "lr trust_ratio",
    "pulled": ADAMW + "regularize l2_sp on matrices { weight = 0.5 }",
}


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("spec", FROZEN)
def test_nothing_moves_a_parameter_that_is_frozen_in_the_run(spec: str, executor: Any) -> None:
    own = model()
    program = trainc.compile(FROZEN[spec], own, executor=executor)
    for seed in range(2):
        program.step(batch(seed))
    own.mid.requires_grad_(False)
    before = own.mid.weight.detach().clone()
    for seed in range(2, 4):
        program.step(batch(seed))
    assert torch.equal(own.mid.weight, before)
    own.mid.requires_grad_(True)
    program.step(batch(4))
    assert not torch.equal(own.mid.weight, before)


def test_an_optimizer_with_one_state_for_all_parameters_says_that_it_would_move_a_frozen_one() -> (
    None
):
    own = model()
    program = trainc.compile(BASE + 'optimizer torch("torch.optim:LBFGS") { lr = 0.1 }', own)
    for seed in range(2):
        program.step(batch(seed))
    own.mid.requires_grad_(False)
    before = [p.detach().clone() for p in own.parameters()]
    with pytest.raises(OptimizerProblem, match=r"`mid\.weight` was frozen since .* moves it"):
        program.step(batch(2))
    assert all(torch.equal(*pair) for pair in zip(before, own.parameters(), strict=True))


EXECUTORS: tuple[Any, Any] = "auto", "module"


class Tempered(nn.Module):
    """A plain attribute that its forward pass reads, and one that it counts with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.temperature, self.calls = 1.0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.head(torch.tanh(self.fc(x))) / self.temperature
        return y


def test_a_plain_attribute_that_is_changed_is_not_that_of_the_graph() -> None:
    spec = 'loss cross_entropy optimizer sgd { lr = 0.1 } regularize pace on "fc" { sigma = 0.3, weight = 0.5 }'
    torch.manual_seed(0)
    models = [Tempered().double()]
    models.append(copy.deepcopy(models[0]))
    programs = [trainc.compile(spec, m, executor=e) for m, e in zip(models, EXECUTORS, strict=True)]
    batches = [(torch.randn(4, 6).double(), torch.randint(0, 4, (4,))) for _ in range(4)]
    for i, one in enumerate(batches):
        if i == 2:
            assert programs[0].graph_refused is None
            for model in models:
                model.temperature = 3.0
        found = [program.step(one)["loss"] for program in programs]
        assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert programs[0].graph_refused is not None
    assert programs[0].graph_refused.startswith("`temperature` of the model was changed")
