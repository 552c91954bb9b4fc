"""`compile = inductor`: the numbers of `off`, under every construct, and what is compiled again is told.

Most tests give torch.compile the backend `aot_eager`, which traces all of it and compiles no C++.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import Trained, assert_close_steps, train_double
from tests.test_constructs import COMPUTING, OWN, setup_of, spec_around, trained_clause
from trainc.compiler.errors import SiteError
from trainc.compiler.execution import compiled as compiled_file
from trainc.compiler.execution.compiled import Compiler
from trainc.compiler.execution.execution import Executor
from trainc.dsl.resolve.spec import Spec

IN_PASSES = {"forward", "backward", "undo"}
EACH = [
    key
    for key in COMPUTING
    if key in OWN
    and key[0]
    not in ("loss", "optimizer")  # computed after what is compiled, or in the graph as any other
    and any(e.phase in IN_PASSES for e in trainc.catalog()[key].effects)
]
HEAD = """train 1
loss cross_entropy
optimizer sgd { lr = 0.1 * cosine(to = 10%) }
"""
OFF = "run { length = 9 steps }\n"
ON = "run { length = 9 steps, compile = inductor }\n"
GNS = "noise_scale gns on type(LayerNorm) { smooth = 2 steps }\n"
PACE = 'regularize pace on "first" { sigma = 0.1 * linear(to = 5), weight = 0.5 }\n'
# Torch's compiler looks at `.grad` of what it gets after a graph break, and hides its own warning from all but pytest.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Compiler, "backend", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(spec: Spec) -> Spec:
    """Return a spec whose run compiles the modules."""
    (run,) = (clause for clause in spec.clauses if clause.kind == "run")
    length = run.construct.length  # type: ignore[attr-defined]
    checked = trainc.check(f"run {{ length = {length}, seed = 3, compile = inductor }}")
    assert checked.spec is not None, checked.diagnostics
    return Spec((*(c for c in spec.clauses if c.kind != "run"), *checked.spec.of_kind("run")))


@pytest.mark.parametrize("key", EACH, ids=map(" ".join, EACH))
def test_numbers_are_those_of_off(key: tuple[str, str]) -> None:
    construct = trainc.catalog()[key]
    setup = setup_of(construct)
    spec = spec_around(trained_clause(construct), setup)
    found: list[Trained] = []
    off: tuple[Spec, Executor] = spec, "module"
    for one, executor in (off, (compiled(spec), "auto")):
        torch.manual_seed(0)
        found.append(train_double(one, setup, steps=2, sizes=(3, 3), executor=executor))
    runs = found[1].program.execution.compiler
    assert runs is not None
    assert runs.refused is None
    assert runs._known, "nothing was compiled"
    assert_close_steps(found[1], found[0])


class Small(nn.Module):
    """Counts how often its Python runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.drop(self.first(x).relu())))
        return out


def batch(seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=source), torch.randint(3, (rows,), generator=source)


Change = Callable[[int, nn.Module], Any]


def trained(
    text: str, steps: int, change: Change | None = None, rows: Callable[[int], int] = lambda _: 4
) -> tuple[nn.Module, list[str], trainc.Program]:
    """Return the model after some steps, with `change(step, model)` before each, what notes said, and the program."""
    program = trainc.compile(HEAD + text, Small())
    return program.module, run(program, range(steps), change, rows), program


def run(
    program: trainc.Program,
    steps: range,
    change: Change | None = None,
    rows: Callable[[int], int] = lambda _: 4,
) -> list[str]:
    """Run steps, and return their notes on what was compiled."""
    notes: list[str] = []
    for seed in steps:
        if change is not None:
            change(seed, program.module)
        torch.manual_seed(seed)
        program.step(batch(seed, rows(seed)))
        notes += [note for note in program.report().notes if "compile" in note]
    return notes


def assert_close(one: nn.Module, two: nn.Module) -> None:
    for name, value in two.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def assert_equal(one: nn.Module, two: nn.Module) -> None:
    for name, value in two.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


def test_rates_that_change_compile_nothing_again() -> None:
    program = trainc.compile(HEAD + ON + GNS + PACE, Small())
    program.step(batch())
    (note,) = program.report().notes
    assert note.startswith("aot_eager compiled the step graph, in")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 9):
            program.step(batch(seed))
            assert not program.report().notes


def freeze(step: int, model: nn.Module) -> None:
    if step == 3:
        model.get_parameter("first.weight").requires_grad_(False)


def eval_mode(step: int, model: nn.Module) -> None:
    model.get_submodule("drop").train(step != 3)


CHANGES: dict[str, tuple[str, Change | None, Callable[[int], int], str]] = {
    "shapes": ("", None, lambda step: 4 + step // 3, "the shapes of batches changed (2 of at most 8)"),
    "a gate": (
        'regularize pace on "first" from 2 steps { sigma = 0.3, weight = 0.5 }\n', None, lambda _: 4,
        "the clauses that act changed (2 of at most 8)",
    ),
    "a measurement": (
        GNS.replace("{", "every 2 steps {"), None, lambda _: 4, "the clauses that act changed",
    ),
    "a frozen weight": ("", freeze, lambda _: 4, "the parameters that train changed"),
    "a mode": (GNS, eval_mode, lambda _: 4, "the modes of modules changed"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_is_compiled_again_and_told(what: str) -> None:
    more, change, rows, told = CHANGES[what]
    want = trained(OFF + more, 5, change, rows)[0]
    model, notes, _ = trained(ON + more, 5, change, rows)
    assert_close(model, want)
    assert len(notes) == 2, notes
    assert told in notes[1]


def test_a_mask_that_is_updated_compiles_nothing_again() -> None:
    more = 'mask magnitude on "first.weight" every 2 steps { density = 0.5 }\n'
    model, notes, _ = trained(ON + more, 6)
    assert_close(model, trained(OFF + more, 6)[0])
    assert len(notes) == 1, notes


@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "gradient"])
def test_a_hook_that_comes_later_is_called(kind: str) -> None:
    calls: list[str] = []

    def note(*_: Any) -> None:
        calls.append(kind)

    def change(step: int, model: nn.Module) -> None:
        norm = model.get_submodule("norm")
        if step == 3:
            register: dict[str, Callable[..., Any]] = {
                "forward": norm.register_forward_hook,
                "forward pre": norm.register_forward_pre_hook,
                "backward": norm.register_full_backward_hook,
                "gradient": model.get_parameter("first.weight").register_hook,
            }
            register[kind](note)

    model, _, _ = trained(ON, 6, change)
    assert calls == [kind] * 3
    calls.clear()
    assert_close(model, trained(OFF, 6, change)[0])


def test_further_shapes_than_the_limit_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_file, "LIMIT", 2)
    want = trained(OFF, 6, rows=lambda step: 2 + step)[0]
    model, notes, program = trained(ON, 6, rows=lambda step: 2 + step)
    assert_close(model, want)
    assert len(notes) == 3
    assert "Pad batches to fewer lengths" in notes[2]
    assert program.execution.compiler is not None
    assert len(program.execution.compiler._known) == 2


class Counts(Small):
    """Has a number of its own that every pass changes."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls / 100)


def test_a_counter_ends_what_would_compile_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_file, "LIMIT", 3)
    found = []
    for text in (OFF, ON):
        program, notes = trainc.compile(HEAD + text, Counts()), []
        for seed in range(7):
            torch.manual_seed(seed)
            program.step(batch(seed))
            notes += list(program.report().notes)
        found.append((program.module, notes))
    assert_close(found[1][0], found[0][0])
    told = found[1][1]
    assert "values that the model's own Python reads have changed (1 of at most 3 times)" in told[1]
    assert told[-1].startswith("passes run uncompiled from now on: the model's own Python")


def test_a_run_that_is_resumed_goes_on_with_the_same_code() -> None:
    def rows(step: int) -> int:
        return 4 + step % 2

    straight, later = (trainc.compile(HEAD + ON + GNS + PACE, Small()) for _ in range(2))
    run(straight, range(3), rows=rows)
    later.load_state_dict(copy.deepcopy(straight.state_dict()))
    for program in (straight, later):
        run(program, range(3, 6), rows=rows)
    assert_equal(later.module, straight.module)
    of_later, of_straight = later.execution.compiler, straight.execution.compiler
    assert of_later is not None
    assert of_straight is not None
    assert of_later.state_dict() == of_straight.state_dict()


@torch._dynamo.register_backend(name="fails")
def fails(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such instruction: tanhps")


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Compiler, "backend", "fails")
    want = trained(OFF + GNS, 4)[0]
    model, notes, _ = trained(ON + GNS, 4)
    assert_equal(model, want)  # the pass that failed left nothing
    (note,) = notes
    assert note == (
        "fails cannot compile the passes, which run uncompiled: RuntimeError: no such instruction: tanhps. Write"
        " `compile = off`"
    )


def test_a_missing_compiler_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(Compiler, "backend", "inductor")
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # where nothing is compiled already
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        model, notes, _ = trained(ON, 2)
    assert_close(model, trained(OFF, 2)[0])
    assert len(notes) == 1
    assert "Install a C++ compiler" in notes[0]
    assert "or write `compile = off`" in notes[0]


def test_a_backward_pass_that_cannot_be_compiled_is_an_error_and_the_step_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    program = trainc.compile(HEAD + ON, Small())
    with monkeypatch.context() as patch:

        def backward(*_: Any) -> None:
            raise BackendCompilerFailed(fails, RuntimeError("no room"), None)

        patch.setattr(Tensor, "backward", backward)
        with pytest.raises(SiteError, match="failed to compile a pass: RuntimeError: no room"):
            program.step(batch())
    program.step(batch())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_batch_that_fits_no_model_ends_no_compilation() -> None:
    program = trainc.compile(HEAD + ON, Small())
    program.step(batch())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        program.step((torch.randn(4, 7), batch()[1]))
    assert program.execution.compiler is not None
    assert program.execution.compiler.refused is None
    program.step(batch())
    assert program.report().notes == ()


# what the user compiled


def plainly(text: str, steps: int = 4) -> nn.Module:
    return trained(text, steps)[0]


@pytest.mark.parametrize("text", [OFF, ON], ids=["off", "inductor"])
@pytest.mark.parametrize("way", ["before", "in place", "forward"])
def test_what_the_user_compiled_runs(way: str, text: str) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model: Any = Small()
    if way == "before":
        model = torch.compile(model, backend=backend)
    elif way == "in place":
        model.compile(backend=backend)
    program = trainc.compile(HEAD + text + GNS, model)
    if way == "forward":
        program.forward = torch.compile(program.module, backend=backend)
    for seed in range(4):
        torch.manual_seed(seed)
        program.step(batch(seed))
    assert len(graphs) == 1
    assert_close(program.module, plainly(OFF + GNS))
    assert next(iter(program.module.state_dict())) == "first.weight"


def test_a_compiled_model_has_its_own_names_wherever_it_is_given(tmp_path: Path) -> None:
    model: Any = torch.compile(Small(), backend="eager")
    names = [name for name, _ in Small().named_parameters()]
    assert [row["name"] for row in trainc.plan(HEAD + OFF, model).parameters] == names
    assert trainc.functional.measured_parameters(model) == tuple(names)
    trainc.compile(HEAD + OFF, Small()).save(tmp_path)
    loaded = trainc.load(tmp_path, model)
    assert loaded.forward is model
    loaded.step(batch())


@pytest.mark.parametrize("text", [OFF, ON], ids=["off", "inductor"])
def test_in_a_loop_of_ones_own_the_users_compiled_model_runs(text: str) -> None:
    model, graphs = Small(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    fast: Any = torch.compile(model, backend=backend)
    program, notes = trainc.compile(HEAD + text + GNS, model), list[str]()
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = batch(seed)
        with program.micro_batch(len(x)):
            loss = F.cross_entropy(fast(x), y)
        program.backward(loss)
        program.update()
        notes += program.report().notes
    assert len(graphs) == 1
    assert_close(model, plainly(OFF + GNS))
    told = [note for note in notes if "compile the model yourself" in note]
    assert len(told) == (text == ON)


def test_the_plan_says_what_is_compiled() -> None:
    program = trainc.compile(HEAD + ON + GNS, Small())
    assert "inductor compiles the step graph" in str(program.plan)
    assert all(row["executor"].endswith("; compiled by inductor") for row in program.plan.sites)
    assert "inductor compiles the modules" in str(trainc.compile(HEAD + ON, Small()).plan)
    run = ON.replace("inductor", 'inductor, checkpoint_activations = "norm"')
    assert "inductor compiles the modules" in str(trainc.compile(HEAD + run + GNS, Small()).plan)


# activation checkpoints


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Small() for _ in range(2))
        for block in self.blocks:
            block.head = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("more", ["", GNS], ids=["alone", "gns"])
def test_the_insides_of_activation_checkpoints_are_compiled(
    more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops: list[str] = []
    monkeypatch.setattr(Compiler, "backend", "looks")
    monkeypatch.setitem(globals(), "OPERATIONS", ops)
    found = []
    for run in (
        OFF,
        'run { length = 9 steps, compile = inductor, checkpoint_activations = "blocks.*" }\n',
    ):
        program = trainc.compile(HEAD + run + more, Blocks())
        for seed in range(3):
            torch.manual_seed(seed)
            program.step([batch(seed), batch(seed + 9)])
        found.append(program.module)
    assert_close(found[1], found[0])
    assert "relu" in ops


OPERATIONS: list[str] = []


@torch._dynamo.register_backend(name="looks")
def looks(graph: Any, inputs: Any) -> Any:
    OPERATIONS.extend(str(node.target) for node in graph.graph.nodes)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


# with inductor


def test_inductor_gives_the_numbers_of_off_and_a_resumed_run_is_bit_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Compiler, "backend", "inductor")
    text, state = ON + GNS + PACE, dict[str, Any]()

    def keep(step: int, _: nn.Module) -> None:
        if step == 2:
            state.update(copy.deepcopy(straight.state_dict()))

    straight = trainc.compile(HEAD + text, Small())
    notes = run(straight, range(4), keep)
    assert [note.startswith("inductor compiled the step graph, in") for note in notes] == [True]
    assert_close(straight.module, trained(OFF + GNS + PACE, 4)[0])
    later = trainc.compile(HEAD + text, Small())
    later.load_state_dict(state)
    run(later, range(2, 4))
    assert_equal(later.module, straight.module)
