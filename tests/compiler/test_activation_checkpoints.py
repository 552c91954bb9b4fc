"""`checkpoint_activations`: the same numbers under every construct, with less kept of the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import trainc
from tests.conformance import Setup, assert_close_steps, train_double
from tests.test_constructs import COMPUTING, OWN, setup_of, spec_around, trained_clause
from trainc.compiler.errors import GraphRefused, SiteError
from trainc.dsl.resolve.spec import Spec

EACH = [key for key in COMPUTING if key in OWN]
HEAD = """train 1
loss cross_entropy
optimizer sgd { lr = 0.1 }
"""
RUN = 'run { length = 9 steps, checkpoint_activations = "%s" }\n'


def checkpointed(spec: Spec, setup: Setup) -> Spec:
    """Return a spec whose run checkpoints every module that can be: one in another, down to the layers."""
    names = [
        f'"{name}"'
        for name, module in setup.model().named_modules()
        if name and type(module).forward is not nn.Module.forward
    ]
    (run,) = (clause for clause in spec.clauses if clause.kind == "run")
    length = run.construct.length  # type: ignore[attr-defined]
    text = f"run {{ length = {length}, seed = 3, checkpoint_activations = {' | '.join(names)} }}"
    checked = trainc.check(text)
    assert checked.spec is not None, checked.diagnostics
    (new,) = checked.spec.of_kind("run")
    others = [clause for clause in spec.clauses if clause.kind != "run"]
    return Spec((*others, new))


@pytest.mark.parametrize("key", EACH, ids=map(" ".join, EACH))
def test_numbers_are_those_without(key: tuple[str, str]) -> None:
    construct = trainc.catalog()[key]
    setup = setup_of(construct)
    spec = spec_around(trained_clause(construct), setup)
    found = []
    for one in (spec, checkpointed(spec, setup)):
        torch.manual_seed(0)
        found.append(train_double(one, setup, steps=3, sizes=(2, 4), executor="module"))
    assert found[1].program.execution.method.rewrite.checkpointed
    assert_close_steps(found[1], found[0])


class Block(nn.Module):
    """What a second forward pass could change: dropout, running statistics, a generator and buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(8, 8), nn.Dropout(0.4), nn.BatchNorm1d(8)
        self.noise = torch.Generator().manual_seed(5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("memory", torch.eye(8))
        self.register_buffer("constant", torch.ones(8, 8))
        self.still = False

    calls: Tensor
    memory: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(x.shape, generator=self.noise)
        y = (
            self.norm(self.drop(self.linear(x @ self.memory))).tanh()
            + self.calls.clone() * noise / 10
        )
        if not self.still:
            with torch.no_grad():
                self.memory = self.memory * 0.9 + 0.1 * torch.eye(8)
        out: Tensor = x + y
        return out


class Stack(nn.Module):
    def __init__(self, depth: int = 2, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(6, 8, generator=source), torch.randint(3, (6,), generator=source)


def steps(text: str, model: nn.Module, count: int = 3, **options: Any) -> trainc.Program:
    program = trainc.compile(HEAD + text, model, **options)
    for seed in range(count):
        torch.manual_seed(seed)
        first, second = batch(seed), batch(seed + 50)
        program.step([first, second])
    return program


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for name, value in two.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


@pytest.mark.parametrize("more", ["", "perturb sam { rho = 0.05 }\n"], ids=["alone", "sam"])
def test_buffers_and_random_numbers_are_those_of_the_first_pass(more: str) -> None:
    plain = steps("run { length = 9 steps }\n" + more, Stack())
    found = steps(RUN % "blocks.*" + more, Stack())
    assert_same(found.module, plain.module)
    for mine, theirs in zip(found.module.modules(), plain.module.modules(), strict=True):
        if isinstance(mine, Block) and isinstance(theirs, Block):
            assert torch.equal(mine.noise.get_state(), theirs.noise.get_state())


def test_a_backward_pass_more_is_the_same() -> None:
    found = []
    for text in ("run { length = 9 steps }\n", RUN % "blocks.*"):
        program = trainc.compile(HEAD + text, Stack())
        torch.manual_seed(0)
        loss = program.loss(batch())
        weights = [*program.module.parameters()]
        found.append([torch.autograd.grad(loss, weights, retain_graph=True) for _ in range(2)])
    for one in found[1]:
        for mine, theirs in zip(one, found[0][0], strict=True):
            assert torch.equal(mine, theirs)


def test_a_buffer_that_starts_to_change_later_is_an_error() -> None:
    model = Stack()
    for block in model.blocks:
        block.still = True  # type: ignore[assignment]
    program = steps(RUN % "blocks.*", model, 1)
    for block in model.blocks:
        block.still = False  # type: ignore[assignment]
    with pytest.raises(
        SiteError, match=r"buffer `memory` in `blocks\.0` was constant in the first"
    ):
        program.step(batch())


def kept_bytes(program: trainc.Program) -> int:
    """Return the bytes of what a forward pass keeps for its backward pass, without weights."""
    weights = {one.untyped_storage().data_ptr() for one in program.module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = program.loss(batch())
    loss.backward()
    program.update()
    return sum(found.values())


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )


def test_less_is_kept_for_the_backward_pass() -> None:
    found = {}
    for text in ("run { length = 9 steps }\n", RUN % "blocks.*"):
        program = trainc.compile(HEAD + text, Stack(6, perceptron))
        program.loss(batch()).backward()
        program.update()
        found[text] = kept_bytes(program)
    plain, ours = found.values()
    # Per block the input (8 numbers for each example) in place of it and five times 64 numbers.
    assert ours < plain / 10


def test_evaluation_and_passes_without_gradients_run_once() -> None:
    program = steps(RUN % "blocks.*", Stack(), 1)
    calls = float(program.module.get_buffer("blocks.0.calls"))
    program.evaluate(*batch())
    with torch.no_grad():
        program.module(batch()[0])
    assert float(program.module.get_buffer("blocks.0.calls")) == calls + 2


def test_a_container_and_a_selector_that_matches_nothing_are_errors_at_the_field() -> None:
    for written, message in (
        ("blocks", "`blocks` (ModuleList) holds modules and is never called"),
        ("layers.*", "the selector in `checkpoint_activations` matches nothing"),
    ):
        with pytest.raises(trainc.SpecError) as error:
            trainc.compile(HEAD + RUN % written, Stack())
        (found,) = error.value.diagnostics
        assert message in found.message
        assert found.span is not None
        assert written in found.span.text


class Unused(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)
        self.spare.requires_grad_(False)


def test_a_module_that_never_runs_is_an_error() -> None:
    with pytest.raises(SiteError, match="`spare` did not run"):
        steps(RUN % "spare", Unused(), 1)


def test_the_plan_says_which_modules_and_why_no_graph() -> None:
    text = RUN % "blocks.*" + 'noise_scale gns on "head"\n'
    program = trainc.compile(HEAD + text, Stack(2, perceptron))
    assert program.plan.settings["checkpointed"] == ["blocks.0", "blocks.1"]
    assert "are kept of `blocks.0`, `blocks.1`" in str(program.plan)
    with pytest.raises(GraphRefused, match="activation checkpoints run modules again"):
        trainc.compile(HEAD + RUN % "blocks.*", Stack(1, perceptron), executor="graph").step(
            batch()
        )


# Torch's compiler looks at `.grad` of what it gets after a graph break, and hides its own warning from all but pytest.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_users_own_compiled_code_runs_around_it() -> None:
    found = []
    for compile_it in (False, True):
        program = trainc.compile(HEAD + RUN % "blocks.*", Stack(2, perceptron))
        if compile_it:
            program.forward = torch.compile(program.module, backend="aot_eager")
        for seed in range(3):
            program.step(batch(seed))
        found.append(program.module)
    torch._dynamo.reset()
    for mine, theirs in zip(found[1].parameters(), found[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
