"""Hooks on layers of every shape: by bound modules, by graphs of either front end, and as forward hooks by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import trainc
from trainc.compiler import catalog as catalogs
from trainc.compiler.catalog import catalog, catalog_of
from trainc.compiler.driver import saved_program
from trainc.compiler.errors import GraphRefused, SiteError
from trainc.compiler.execution import capture as capture_file
from trainc.compiler.graph.dynamo_capture import dynamo_capture
from trainc.compiler.method.layer_hook import LayerContext, LayerHook
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect, Schedule
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.source import Source
from trainc.dsl.values.value_json import Number
from trainc.runtime.data.batch import Batch

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class InputNoise(LayerHook):
    """Uniform noise on embeddings, a / sqrt(tokens * width) at most (NEFTune, arXiv:2310.05914)."""

    zero_is_identity: ClassVar = True

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        size = at.scalars["strength"] / (y.shape[-2] * y.shape[-1]) ** 0.5
        noisy: Tensor = y + size * (2 * torch.rand_like(y) - 1)
        return noisy


class DropPath(LayerHook):
    """Whole examples whose output is 0 (stochastic depth, arXiv:1603.09382)."""

    zero_is_identity: ClassVar = True

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        p = at.scalars["strength"]
        kept = (torch.rand(y.shape[0], *[1] * (y.dim() - 1)) >= p).to(y.dtype)
        return y * kept / (1 - p)


class Shift(LayerHook):
    """An input with a number added to it."""

    draws: ClassVar = False

    def change_input(self, x: Tensor, at: LayerContext) -> Tensor:
        return x + at.scalars["strength"]


class Times(LayerHook):
    """An output times a number."""

    draws: ClassVar = False

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        return y * at.scalars["strength"]


class Skip(LayerHook):
    """The input, times a number, in place of the layer's forward pass."""

    draws: ClassVar = False

    def forward(self, layer: nn.Module, call: Any, at: LayerContext, *args: Any, **_: Any) -> Any:
        assert isinstance(layer, nn.Module)
        return args[0] * at.scalars["strength"]


class Reads(LayerHook):
    """A hook that reads a number of a tensor, which no graph can do."""

    draws: ClassVar = False

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        return y * float(at.scalars["strength"])


HOOKS: dict[str, type[LayerHook]] = {
    hook.__name__.lower(): hook for hook in (InputNoise, DropPath, Shift, Times, Skip, Reads)
}


class Hooked(Construct):
    """Base of a construct for each hook."""

    cite: ClassVar = "none"
    targets: ClassVar = "modules"
    effects: ClassVar = (Effect("forward", "change layers", ("inputs",), ("forward",)),)

    strength: Schedule = Number(0.5)

    def lower(self, to: Lowering) -> None:
        for module in to.modules():
            to.layer(module.name, HOOKS[self.name](), {"strength": to.schedule(self.strength)})


@pytest.fixture(autouse=True)
def constructs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a construct for each hook into the catalog."""
    known = catalog_of(dict(catalog()._modules), ())
    for name in HOOKS:
        construct = type(
            name, (Hooked,), {"__module__": __name__, "kind": "regularize", "name": name}
        )
        known._modules["regularize", name] = __name__
        known._loaded["regularize", name] = construct
    monkeypatch.setattr(catalogs, "catalog", lambda: known)
    monkeypatch.setattr(saved_program, "catalog", lambda: known)


BASE = "optimizer sgd { lr = 0.05 } loss cross_entropy run { length = 20 steps }\n"


def spec(*clauses: str) -> Spec:
    checked = load_spec(Source("spec.train", "\n".join([BASE, *clauses])), catalogs.catalog())
    assert checked.spec is not None, checked.diagnostics
    return checked.spec


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.fc(x))
        return y, y.square()


class Words(nn.Module):
    """Token ids, an embedding, a block that returns a tuple, an Identity, a layer called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.pair, self.same = nn.Embedding(9, 6), Pair(), nn.Identity()
        self.named, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.pair(self.words(x))
        out: Tensor = self.head(self.named(input=self.same(one + two)).mean(1))
        return out


class Vectors(nn.Module):
    """A layer called twice, one under two names, one under a checkpoint, and an LSTM cell's worth of others."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.first, self.inner = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again, self.head = self.first, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.again(torch.relu(self.first(x)))
        x = checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=False)
        out: Tensor = self.head(x)
        return out


def words(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(9, (4, 5), generator=g), torch.randint(3, (4,), generator=g)


def vectors(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, generator=g, dtype=torch.float64), torch.randint(3, (4,), generator=g)


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def by_hand(model: nn.Module, layer: str, hook: LayerHook, strength: float) -> None:
    """Put a hook where PyTorch has one: before or after the layer's forward pass."""
    scalars = {"strength": torch.tensor(strength, dtype=torch.float64)}
    at = LayerContext(layer, 0, 1, scalars, torch.tensor(0), None, False)

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (hook.change_input(args[0], at),), kwargs
        ((name, x),) = kwargs.items()
        return args, {name: hook.change_input(x, at)}

    def after(_: Any, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return hook.change_output(out[0], at), *out[1:]
        return hook.change_output(out, at)

    module = model.get_submodule(layer)
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


CASES = {
    "input noise on an embedding": (Words, words, "words", "inputnoise"),
    "a block that returns a tuple": (Words, words, "pair", "droppath"),
    "Identity": (Words, words, "same", "times"),
    "called by keyword": (Words, words, "named", "shift"),
    "input of a layer": (Vectors, vectors, "head", "shift"),
    "called twice": (Vectors, vectors, "twice", "droppath"),
    "two names": (Vectors, vectors, "first", "droppath"),
    "checkpointed": (Vectors, vectors, "inner", "droppath"),
}


@pytest.mark.parametrize("way", ["torch.export", "torch.compile", "module"])
@pytest.mark.parametrize("case", CASES)
def test_a_hook_is_a_forward_hook_by_hand(
    case: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, data, layer, name = CASES[case]
    if way == "torch.compile":
        monkeypatch.setattr(capture_file, "FRONT_ENDS", {way: dynamo_capture})
    model, plain = make(kind), make(kind)
    by_hand(plain, layer, HOOKS[name](), 0.3)
    x, y = data()
    torch.manual_seed(1)
    loss = cross_entropy(plain(x), y)
    want = torch.autograd.grad(loss, list(plain.parameters()))
    program = trainc.compile(spec(f'regularize {name} on "{layer}" {{ strength = 0.3 }}'), model)
    executor: Any = "module" if way == "module" else "graph"
    if executor == "graph":
        program.execution.capture((x, y))
    torch.manual_seed(1)
    found = program.execution.trial((x, y), executor)
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-14, atol=0)
    for gradient, expected in zip(found.gradients.values(), want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    with torch.no_grad():  # the hook makes a difference
        assert not torch.allclose(cross_entropy(make(kind)(x), y), loss)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_hooks_of_several_clauses_act_in_the_order_of_the_spec(executor: Any) -> None:
    clauses = [
        'regularize times as a on "head" { strength = 2 }',
        'regularize shift on "head" { strength = 3 }',
        'regularize times as b on "first" { strength = 5 }',
        'regularize droppath on "head" { strength = 0.5 }',
        'regularize times as c on "head" { strength = 7 }',
    ]
    model = make(Vectors)
    program = trainc.compile(spec(*clauses), model, executor=executor)
    labels = [s.label for s in program.execution.method.rewrite.hooks if s.module == "head"]
    assert labels == ["a", "shift", "droppath", "c"]
    plain = make(Vectors)
    for layer, name, strength in (
        ("head", "times", 2), ("head", "shift", 3), ("first", "times", 5), ("head", "droppath", 0.5),
        ("head", "times", 7),
    ):  # fmt: skip
        by_hand(plain, layer, HOOKS[name](), strength)
    if executor == "graph":
        program.execution.capture(vectors())
    torch.manual_seed(1)
    want = cross_entropy(plain(vectors()[0]), vectors()[1])
    torch.manual_seed(1)
    got = program.execution.trial(vectors(), executor).loss
    torch.testing.assert_close(got, want.detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_replaced_forward_pass_is_innermost(executor: Any) -> None:
    clauses = (
        'regularize times on "inner" { strength = 3 }',
        'regularize skip on "inner" { strength = 2 }',
    )
    model, plain = make(Vectors), make(Vectors)
    program = trainc.compile(spec(*clauses), model, executor=executor)
    plain.get_submodule("inner").register_forward_hook(lambda _, args, __: args[0] * 2 * 3)
    want = cross_entropy(plain(vectors()[0]), vectors()[1])
    got = program.execution.trial(vectors(), executor)
    torch.testing.assert_close(got.loss, want.detach(), rtol=1e-14, atol=0)
    assert not float(
        sum(g.abs().sum() for n, g in got.gradients.items() if "inner" in n and g is not None)
    )


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_closed_hook_is_absent_and_each_set_of_open_hooks_has_a_graph(executor: Any) -> None:
    clauses = (
        'regularize times as a on "first" every 2 steps { strength = 2 }',
        'regularize shift as b on "head" from 2 steps { strength = 1 }',
    )
    model, plain = make(Vectors), make(Vectors)
    program = trainc.compile(spec(*clauses), model, executor=executor)
    for step in range(5):
        handles = []
        if step % 2 == 0:
            first = plain.get_submodule("first")
            handles.append(first.register_forward_hook(lambda _, __, out: out * 2))
        if step >= 2:
            head = plain.get_submodule("head")
            handles.append(head.register_forward_pre_hook(lambda _, args: (args[0] + 1,)))
        x, y = vectors(step)
        loss = cross_entropy(plain(x), y)
        found = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for p, gradient in zip(plain.parameters(), found, strict=True):
                p.sub_(0.05 * gradient)
        for handle in handles:
            handle.remove()
        assert program.step((x, y))["loss"] == pytest.approx(float(loss.detach()), rel=1e-13)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    if executor == "graph":
        assert len(program.execution.graphs._trusted) == 4


def test_while_all_hooks_are_closed_nothing_is_captured() -> None:
    text = spec('regularize times on "first" from 3 steps { strength = 2 }')
    program = trainc.compile(text, make(Vectors))
    for step in range(3):
        program.step(vectors(step))
        assert program.execution.graphs.installed is None
    program.step(vectors())
    assert program.execution.graphs.installed is not None


def test_evaluation_has_no_hooks() -> None:
    model, plain = make(Vectors), make(Vectors)
    program = trainc.compile(spec('regularize times on "first" { strength = 2 }'), model)
    program.step(vectors())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(vectors()[0]), plain.eval()(vectors()[0]))


class Unused(Vectors):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(6, 6)


@pytest.mark.parametrize("executor", ["graph", "auto"])
def test_a_layer_that_does_not_run_is_an_error(executor: Any) -> None:
    text = spec('regularize times on "first" | "spare" { strength = 2 }')
    program = trainc.compile(text, make(Unused), executor=executor)
    error: Any = GraphRefused if executor == "graph" else SiteError
    with pytest.raises(error, match=r"`spare`.* did not run"):
        program.step(vectors())


def test_a_hook_that_no_graph_can_run_runs_by_the_modules() -> None:
    text = spec('regularize reads on "first" { strength = 2 }')
    one = trainc.compile(text, make(Vectors))
    other = trainc.compile(text, make(Vectors), executor="module")
    for step in range(2):
        assert one.step(vectors(step)) == other.step(vectors(step))
    assert "CaptureFailed" in str(one.graph_refused)


def test_two_clauses_that_replace_one_layer_are_an_error() -> None:
    clauses = [f'regularize skip as {name} on "inner" {{ strength = 2 }}' for name in "ab"]
    with pytest.raises(trainc.SpecError, match="`a` also replaces how `inner` computes its result"):
        trainc.plan(spec(*clauses), make(Vectors))


def test_a_replaced_layer_cannot_be_measured() -> None:
    clauses = ('regularize skip on "inner" { strength = 2 }', 'noise_scale gns on "inner"')
    with pytest.raises(trainc.SpecError, match="replaces how `inner` computes its result"):
        trainc.plan(spec(*clauses), make(Vectors))


def loaded(program: Program, text: Spec, folder: Path) -> Program:
    program.save(folder)
    other = trainc.load(folder, make(Vectors))
    other.load_state_dict(program.state_dict())
    return other


def test_a_saved_graph_serves_the_hooks_that_it_has(tmp_path: Path) -> None:
    """A graph from before a ramp begins at 0 would pass its trial, and then miss the hook."""
    text = spec(
        'regularize shift on "head" { strength = 1 }',
        'regularize droppath on "first" from 2 steps { strength = 0.1 * max(steps - 2, 0) }',
    )
    program = trainc.compile(text, make(Vectors))
    program.step(vectors(0))
    early = loaded(program, text, tmp_path / "early")
    assert early.step(vectors(1)) == program.step(vectors(1))
    assert early.execution.graphs._accepted(vectors(2)) is None  # the second hook is open now
    for step in range(2, 6):
        torch.manual_seed(step)
        want = program.step(vectors(step))
        torch.manual_seed(step)
        assert early.step(vectors(step)) == want


class Reentrant(Vectors):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=True)
        out: Tensor = self.head(x)
        return out


def test_a_reentrant_checkpoint_runs_the_hook_in_both_of_its_passes() -> None:
    model, plain = make(Reentrant), make(Reentrant)
    by_hand(plain, "inner", DropPath(), 0.5)
    program = trainc.compile(
        spec('regularize droppath on "inner" { strength = 0.5 }'), model, executor="module"
    )
    torch.manual_seed(1)
    cross_entropy(plain(vectors()[0]), vectors()[1]).backward()
    torch.manual_seed(1)
    program.loss(vectors()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or q.grad is None or torch.equal(p.grad, q.grad)


def test_compiled_modules_keep_their_code_from_step_to_step() -> None:
    torch._dynamo.reset()
    text = spec('regularize times on "first" { strength = 1 + 0.1 * steps }')
    model, other = make(Vectors), make(Vectors)
    program, plain = (trainc.compile(text, m, executor="module") for m in (model, other))
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    program.forward = torch.compile(model, backend=count)
    for step in range(5):
        got, want = program.step(vectors(step)), plain.step(vectors(step))
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-12)
    assert 1 <= len(graphs) <= 2
    torch._dynamo.reset()
