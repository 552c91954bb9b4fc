"""Which executor runs a micro-batch: the graph where it computes what the modules do, else the modules, and why."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import trainc
from trainc.compiler.errors import GraphRefused, PassBug, SiteError
from trainc.compiler.execution import capture as capture_file
from trainc.compiler.execution.graph_cache import LIMIT
from trainc.compiler.graph.dynamo_capture import dynamo_capture
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.graph.trial import TrialResult, difference
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.add_noise import NOISE, AddNoise
from trainc.compiler.per_example.micro_batch import MicroBatchResult, MicroBatchSlice
from trainc.dsl.text.errors import CompilerBug

BASE = "train 1\nloss cross_entropy\noptimizer sgd { lr = 0.1 }\n"
GNS = BASE + "noise_scale gns on type(LayerNorm) { smooth = 2 steps }\n"
PACE = BASE + 'regularize pace on "first" { sigma = 0.3, weight = 0.5 }\n'


class Small(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.drop(self.first(x).relu())))
        return out.mean(1) if out.dim() == 3 else out


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    size = shape or (4, 6)
    x = torch.arange(float(torch.Size(size).numel())).reshape(size).sin()
    return x, torch.arange(size[0]) % 3


def compiled(spec: str, make: Callable[[], nn.Module] = Small, **options: Any) -> trainc.Program:
    torch.manual_seed(0)
    return trainc.compile(spec, make(), **options)


def weights(program: trainc.Program) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in program.module.named_parameters()}


# hooks of the user

HOOKS: dict[str, tuple[str, Callable[[Small, Callable[..., None]], Any]]] = {
    "forward": ("`first` has a forward hook", lambda m, f: m.first.register_forward_hook(f)),
    "forward pre": (
        "`first` has a forward pre-hook",
        lambda m, f: m.first.register_forward_pre_hook(f),
    ),
    "backward": ("`norm` has a backward hook", lambda m, f: m.norm.register_full_backward_hook(f)),
    "backward pre": (
        "`norm` has a backward pre-hook",
        lambda m, f: m.norm.register_full_backward_pre_hook(f),
    ),
    "model": ("the model itself has a forward hook", lambda m, f: m.register_forward_hook(f)),
    "every module": (
        "every module has a forward hook",
        lambda m, f: register_module_forward_hook(f),
    ),
    "gradient": (
        "`first.weight` has a hook on its gradient",
        lambda m, f: m.first.weight.register_hook(f),
    ),
    "accumulated": (
        "`first.weight` has a hook after its gradient is accumulated",
        lambda m, f: m.first.weight.register_post_accumulate_grad_hook(f),
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_the_user_runs_by_modules_until_it_is_gone(name: str) -> None:
    text, register = HOOKS[name]
    program, model = compiled(GNS), None
    program.step(batch())
    assert program.graph_refused is None
    model = program.module
    calls: list[str] = []
    assert isinstance(model, Small)
    handle = register(model, lambda *_: calls.append(name))
    try:
        program.step(batch())
        assert calls
        assert program.graph_refused == f"{text}, and a graph does not call hooks"
        (note,) = program.report().notes
        assert note.startswith(f"the bound modules run instead of a graph: {text}")
        program.step(batch())
        assert program.report().notes == ()  # it is said once
    finally:
        handle.remove()
    counted = len(calls)
    program.step(batch())
    assert program.graph_refused is None
    assert len(calls) == counted
    assert sum(text in line for line in program.summary()) == 1


def test_a_hook_that_masks_a_gradient_acts_under_a_rewrite() -> None:
    program = compiled(GNS)
    before = weights(program)
    program.module.get_parameter("first.weight").register_hook(lambda g: g * 0)
    program.step(batch())
    assert torch.equal(weights(program)["first.weight"], before["first.weight"])
    assert not torch.equal(weights(program)["head.weight"], before["head.weight"])


@pytest.mark.parametrize("call", ["step", "graph"])
def test_an_explicit_graph_refuses_a_hook(call: str) -> None:
    program = compiled(GNS, executor="graph" if call == "step" else "auto")
    before = weights(program)
    program.module.get_submodule("norm").register_forward_hook(lambda *_: None)
    with pytest.raises(GraphRefused, match="`norm` has a forward hook, and a graph does not call"):
        program.step(batch()) if call == "step" else program.graph(batch())
    assert all(torch.equal(now, before[name]) for name, now in weights(program).items())


def test_hooks_of_trainc_are_no_reason() -> None:
    spec = GNS + 'noise_scale gns as other on "head" { method = micro_batch, smooth = 2 steps }\n'
    spec += 'mask sift on "first.weight" { density = 50%, batches = 1 }\n'
    program = compiled(spec)
    x, y = batch(8, 6)
    for _ in range(3):
        program.step([(x[:4], y[:4]), (x[4:], y[4:])])
        assert program.graph_refused is None
    assert program.module.get_parameter("first.weight")._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.module.eval(), "the model is in eval mode"),
        (lambda p: setattr(p, "forward", nn.Sequential(p.module)), "is a Sequential, which a graph"),
    ],
    ids=["eval mode", "wrapper"],
)  # fmt: skip
def test_a_graph_in_a_loop_of_ones_own_refuses_what_it_cannot_do(
    change: Callable[[trainc.Program], None], text: str
) -> None:
    program = compiled(GNS)
    change(program)
    with pytest.raises(GraphRefused, match=text):
        program.graph(batch())


# modules under two names


class Alias(nn.Module):
    """One layer under two names, and in two parents; `order` says what runs."""

    def __init__(self, order: str = "first again") -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.block = nn.Sequential(self.first, nn.LayerNorm(6))
        self.norm = self.block[1]
        self.head, self.order = nn.Linear(6, 3), order.split()

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = torch.tanh(self.get_submodule(name)(x))
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize(
    "order", ["first", "again", "first again", "again first again", "block first"]
)
@pytest.mark.parametrize("front_end", ["torch.export", "torch.compile"])
def test_noise_reaches_every_call_of_a_module_under_any_name(
    order: str, front_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if front_end == "torch.compile":
        monkeypatch.setattr(capture_file, "FRONT_ENDS", {front_end: dynamo_capture})
    program = compiled(PACE, lambda: Alias(order).double())
    x, y = batch()
    graph = program.execution.trial((x.double(), y), "graph")
    modules = program.execution.trial((x.double(), y), "module")
    torch.testing.assert_close(graph.loss, modules.loss, rtol=1e-12, atol=0)
    for name, gradient in modules.gradients.items():
        if gradient is not None:
            torch.testing.assert_close(graph.gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_measured_layer_under_another_name_is_measured() -> None:
    squares = []
    for order in ("first block", "again block", "block", "first norm"):
        program = compiled(GNS, partial(Alias, order))
        program.step(batch())
        assert program.graph_refused is None
        squares.append(program.signals["gns.noise"])
    assert squares[0] == squares[1]


def test_a_measured_layer_that_runs_under_both_names_is_an_error() -> None:
    program = compiled(GNS, lambda: Alias("block norm"))
    with pytest.raises(SiteError, match=r"`block.1` (ran more than once|: its weight)"):
        program.step(batch())


# a loaded or plain program's graph


def test_a_loaded_program_runs_its_graph(tmp_path: Path) -> None:
    program = compiled(BASE, executor="graph")
    program.step(batch())
    program.save(tmp_path)
    loaded = trainc.load(tmp_path, Small())
    kept = loaded.execution.graphs.installed
    loss = loaded.graph(batch())
    assert kept is loaded.graph
    want = F.cross_entropy(program.module(batch()[0]), batch()[1])
    torch.testing.assert_close(loss, want.detach())


def test_the_graph_of_a_plain_program_weighs_micro_batches() -> None:
    x, y = batch(8, 6)
    want = compiled(BASE)
    (F.cross_entropy(want.module(x), y)).backward()
    program = compiled(BASE)
    for half in (slice(0, 4), slice(4, 8)):
        program.graph((x[half], y[half]), 0.5)
    for name, p in program.module.named_parameters():
        torch.testing.assert_close(p.grad, want.module.get_parameter(name).grad, msg=name)


@pytest.mark.parametrize("how", ["method = ghost, group = 2", "geometry = adam"])
def test_the_graph_of_a_program_that_only_modules_can_run_refuses(how: str) -> None:
    spec = BASE.replace("sgd { lr = 0.1 }", "adamw { lr = 1e-3 }")
    program = compiled(spec + f'noise_scale gns on "norm" {{ {how} }}\n')
    with pytest.raises(GraphRefused, match="need bound modules"):
        program.graph(batch())
    program.step(batch())
    assert "need bound modules" in str(program.graph_refused)
    assert any("need bound modules" in note for note in program.report().notes)


def test_saving_removes_a_graph_of_an_earlier_program(tmp_path: Path) -> None:
    program = compiled(BASE, executor="graph")
    program.step(batch())
    program.save(tmp_path)
    (tmp_path / "constants.safetensors").touch()
    assert (tmp_path / "graph.json").exists()
    compiled(BASE, executor="module").save(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["manifest.json", "plan.json", "weights.safetensors"]
    trainc.load(tmp_path, Small()).step(batch())


# bugs are no reasons


def test_a_pass_that_breaks_the_graph_is_a_bug_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(AddNoise, "run", broken)
    program = compiled(PACE)
    with pytest.raises(PassBug, match=r"`--without add_noise`[\s\S]*please report it"):
        program.step(batch())
    assert program.graph_refused is None


def test_an_error_of_capture_itself_is_a_bug_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(capture_file, "run_passes", broken)
    with pytest.raises(CompilerBug, match=r"AttributeError: no such thing[\s\S]*please report it"):
        compiled(PACE).step(batch())


# a fresh graph runs beside the modules


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.lstm(x)[0][:, -1]))
        return out


def test_a_graph_that_fails_when_it_runs_is_a_reason_for_modules() -> None:
    program = compiled(GNS, Recurrent)
    before = weights(program)
    metrics = program.step(batch(4, 5, 6))
    assert "the captured graph fails when it runs: RuntimeError" in str(program.graph_refused)
    (note,) = program.report().notes
    assert "the captured graph fails when it runs" in note
    program.step(batch(4, 5, 6))
    assert program.report().notes == ()
    modules = compiled(GNS, Recurrent, executor="module")
    assert modules.step(batch(4, 5, 6)) == metrics
    assert not torch.equal(before["norm.weight"], weights(program)["norm.weight"])
    with pytest.raises(GraphRefused, match="fails when it runs"):
        compiled(GNS, Recurrent, executor="graph").step(batch(4, 5, 6))


def test_a_graph_that_computes_something_else_is_a_reason_for_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = AddNoise.run

    def wrong(step: AddNoise, forward: Any, rewrite: Rewrite) -> list[str]:
        served = right(step, forward, rewrite)
        *_, noise = forward.graph.find_nodes(op="call_function", target=NOISE)
        noise.update_arg(3, noise.args[3] + 1)  # another layer's noise
        return served

    want = compiled(PACE, executor="module").step(batch())
    monkeypatch.setattr(AddNoise, "run", wrong)
    program = compiled(PACE)
    assert program.step(batch()) == want
    reason = str(program.graph_refused)
    assert reason.startswith(
        "the captured graph computes something else than the modules: the loss"
    )
    assert not program.execution.graphs.installed
    # What was refused is not tried again after a resume, where it may pass: the modules ran, and run on.
    monkeypatch.undo()
    resumed = compiled(PACE)
    resumed.load_state_dict(program.state_dict())
    assert resumed.step(batch()) == program.step(batch())
    assert (resumed.graph_refused, resumed.report().notes) == (reason, ())
    assert resumed.summary()[-1] == program.summary()[-1]
    assert reason in resumed.summary()[-1]


class Everything(nn.Module):
    """Buffers that move and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm, self.small = nn.BatchNorm1d(6), Small(dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.small(self.batch_norm(x))
        return out


class Tracking(nn.Module):
    """Running statistics of what passes, which they do not change: no examples mix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("running_mean").lerp_(x.detach().mean(0), 0.1)
            self.get_buffer("num_batches_tracked").add_(1)
        return x


class Measurable(Everything):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = Tracking()  # type: ignore[assignment]


def test_the_trial_of_a_graph_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GNS + 'noise_scale gns as rows on "small.first" { smooth = 2 steps }\n'
    program = compiled(spec, Measurable)
    runs: list[StepGraph] = []
    run = StepGraph.run

    def counted(graph: StepGraph, *arguments: Any, **named: Any) -> Any:
        if not runs:  # the trial
            assert all(p.grad is None for p in program.module.parameters())
        runs.append(graph)
        return run(graph, *arguments, **named)

    monkeypatch.setattr(StepGraph, "run", counted)
    torch.manual_seed(3)
    program.step(batch())
    assert len(runs) == 2  # the trial, and the step
    program.step(batch())
    assert len(runs) == 3
    assert program.graph_refused is None
    end = torch.get_rng_state()
    modules = compiled(spec, Measurable, executor="module")
    torch.manual_seed(3)
    for _ in range(2):
        modules.step(batch())
    assert torch.equal(torch.get_rng_state(), end)
    for (name, got), want in zip(
        program.module.state_dict().items(), modules.module.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)
    moved = program.module.get_buffer("batch_norm.num_batches_tracked")
    assert int(moved) == 2


def test_the_trial_does_not_count_among_measured_gradients() -> None:
    """A new shape in the middle of a step is tried while the step's statistics are open."""
    spec = GNS + 'noise_scale gns as other on "head" { method = micro_batch, smooth = 2 steps }\n'
    found = []
    for executor in ("auto", "module"):
        program = compiled(spec, Small, executor=executor)
        handle = program.module.register_forward_hook(lambda *_: None)
        x, y = batch(8, 6)
        program.begin()
        program.loss((x[:5], y[:5]), 5 / 8).backward()
        handle.remove()
        if executor == "auto":
            program.graph((x[5:], y[5:]), 3 / 8)
        else:
            program.loss((x[5:], y[5:]), 3 / 8).backward()
        program.update()
        found.append(dict(program.signals))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-4, nan_ok=True), name


def test_an_empty_spec_as_a_graph_stays_bit_equal() -> None:
    torch.manual_seed(0)
    plain = Everything()
    program = compiled(BASE, Everything, executor="graph")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    torch.manual_seed(5)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(batch()[0]), batch()[1]).backward()
        optimizer.step()
    torch.manual_seed(5)
    for _ in range(3):
        program.step(batch())
    for name, tensor in program.module.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_a_part_in_eval_mode_stays_in_eval_mode() -> None:
    program = compiled(GNS, Measurable)
    program.step(batch())
    before = program.module.get_buffer("batch_norm.running_mean").clone()
    program.module.get_submodule("batch_norm").eval()
    program.step(batch())
    assert program.graph_refused is None
    assert not program.module.get_submodule("batch_norm").training
    assert torch.equal(program.module.get_buffer("batch_norm.running_mean"), before)


def test_a_loaded_graph_of_other_modes_is_captured_again(tmp_path: Path) -> None:
    program = compiled(BASE, Everything, executor="graph")
    program.step(batch())
    program.save(tmp_path)
    loaded = trainc.load(tmp_path, Everything(), executor="graph")
    loaded.module.get_submodule("batch_norm").eval()
    before = loaded.module.get_buffer("batch_norm.running_mean").clone()
    loaded.step(batch())
    assert torch.equal(loaded.module.get_buffer("batch_norm.running_mean"), before)
    (note,) = loaded.report().notes
    assert note.startswith(
        "the saved graph was not used: the captured graph computes something else"
    )
    loaded.step(batch())
    assert loaded.report().notes == ()


@pytest.mark.parametrize(
    ("dtypes", "gap", "differs"),
    [
        ({torch.float32}, 1e-5, False),
        ({torch.float32}, 1e-2, True),
        ({torch.float64}, 1e-5, True),
        ({torch.float32, torch.bfloat16}, 1e-2, False),
        ({torch.bfloat16}, 0.5, True),
    ],
)
def test_what_rounding_explains_depends_on_the_dtype(
    dtypes: set[torch.dtype], gap: float, differs: bool
) -> None:
    one, w = torch.tensor(1.0), torch.ones(4)
    modules = TrialResult(one, {"w": w, "unused": None}, {})
    graph = TrialResult(one, {"w": w * (1 + gap)}, {})
    assert (difference(graph, modules, dtypes) is not None) == differs


def test_differences_are_found_in_the_loss_the_gradients_and_the_norms() -> None:
    one, w = torch.tensor(1.0), torch.ones(4)
    modules = TrialResult(one, {"w": w, "v": None}, {"w": w})
    wrong = {
        "the loss is 2": modules._replace(loss=one * 2),
        "the loss is nan": modules._replace(loss=one * torch.nan),
        "gradient of `w`": modules._replace(gradients={"w": None}),
        "gradient of `v`": modules._replace(gradients={"w": w, "v": w}),
        "norms of `w`": modules._replace(squares={"w": w * 2}),
        "the loss has the shape [4]": modules._replace(loss=w),
        "the loss has the shape [] and the dtype torch.complex64": modules._replace(loss=one + 0j),
        "gradient of `w` is": modules._replace(gradients={"w": torch.ones(5)}),
        "gradient of `w` is not": modules._replace(gradients={"w": torch.ones(2, 4)}),
        "the gradient of `w`": modules._replace(gradients={"w": w + 1j}),
        "the per-example norms of `w`": modules._replace(squares={"w": torch.ones(4, 4)}),
    }
    for text, graph in wrong.items():
        assert text in str(difference(graph, modules, {torch.float32}))
    assert difference(modules, modules, {torch.float32}) is None


# one way to run a micro-batch


@pytest.mark.parametrize("executor", ["auto", "graph", "module"])
def test_a_micro_batch_runs_with_its_backward_pass_by_either_executor(executor: Any) -> None:
    program = compiled(GNS, executor=executor)
    result = program.execution.run(batch(), MicroBatchSlice(0.5, 0.5, 0))
    assert isinstance(result, MicroBatchResult)
    model = compiled(BASE).module
    (0.5 * F.cross_entropy(model(batch()[0]), batch()[1])).backward()
    for name, p in program.module.named_parameters():
        torch.testing.assert_close(p.grad, model.get_parameter(name).grad, msg=name)
    assert result.notes == ()


# a limited number of captures


def test_after_some_shapes_the_modules_run_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainc.compiler.execution.graph_cache.ATTEMPTS", 0)  # a graph for each
    program, modules = compiled(GNS), compiled(GNS, executor="module")
    notes: list[str] = []
    for length in [*range(1, LIMIT + 4), 1]:
        got, want = program.step(batch(4, length, 6)), modules.step(batch(4, length, 6))
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        notes += program.report().notes
        assert (program.graph_refused is not None) == (length > LIMIT)
    (note,) = notes
    assert f"{LIMIT} graphs were captured" in note


def test_an_explicit_graph_is_captured_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled(BASE, executor="graph")
    monkeypatch.setattr("trainc.compiler.execution.execution.LIMIT", 1)
    for length in range(1, 4):
        program.step(batch(4, length, 6))


class TakesMore(Small):
    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        return super().forward(x if more is None else x + more[0])


@pytest.mark.parametrize("more", ["a list", None])
def test_inputs_that_a_graph_cannot_take_are_a_reason_for_modules(more: Any) -> None:
    x, y = torch.ones(4, 6), torch.arange(4) % 3
    batch = {"x": x, "more": more and [x, x]}, y
    program = trainc.compile(GNS, TakesMore())
    program.step(batch)
    assert program.graph_refused is not None
    assert "a dict of tensors, and the input `more` is " in program.graph_refused
    with pytest.raises(GraphRefused, match="the input `more` is"):
        trainc.compile(GNS, TakesMore(), executor="graph").step(batch)
