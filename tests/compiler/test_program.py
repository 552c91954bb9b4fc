"""A program as users call it: the empty spec, accumulation, both executors, wrappers, resuming, bad losses."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm

import trainc
from examples.models import gpt, resnet, vit
from trainc.compiler.errors import SiteError
from trainc.compiler.program.program import Program
from trainc.runtime.run.interface import NonFiniteLoss
from trainc.runtime.step.optimizer import OptimizerStep

EMPTY = "loss cross_entropy optimizer adamw { lr = 1e-3, weight_decay = 0.1 }"
GNS = EMPTY + " noise_scale gns on type(LayerNorm, RMSNorm) { smooth = 5 steps }"
PACE = EMPTY + ' regularize pace on "blocks.*.mlp.**" & type(Linear) { sigma = 0.5, weight = 0.3 }'


def small_gpt(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=32, heads=2, context=16, vocabulary=61, **options)


def text(examples: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (examples, 17), generator=g)
    return ids[:, :-1], ids[:, 1:]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The loop anybody writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for inputs, targets in batches:
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_empty_spec_trains_bit_equal_to_a_loop_written_by_hand() -> None:
    batches = [text(seed=i) for i in range(5)]
    theirs, ours = small_gpt(), small_gpt()
    want = by_hand(theirs, batches)
    program = trainc.compile(EMPTY, ours)
    assert [program.step(batch)["loss"] for batch in batches] == want
    assert_same(ours, theirs)


def test_an_empty_spec_leaves_the_module_and_dropout_untouched() -> None:
    model = small_gpt(dropout=0.1)
    before = [type(m) for m in model.modules()]
    program = trainc.compile(EMPTY, model)
    assert [type(m) for m in program.module.modules()] == before
    other = small_gpt(dropout=0.1)
    batches = [text(seed=i) for i in range(3)]
    torch.manual_seed(5)
    want = by_hand(other, batches)
    torch.manual_seed(5)
    assert [program.step(batch)["loss"] for batch in batches] == want


def test_loss_and_update_give_what_step_gives() -> None:
    batches = [text(seed=i) for i in range(4)]
    stepped, looped = small_gpt(), small_gpt()
    by_step, by_loop = trainc.compile(GNS, stepped), trainc.compile(GNS, looped)
    for batch in batches:
        want = by_step.step(batch)
        by_loop.loss(batch).backward()
        got = by_loop.update()
        assert got.keys() == want.keys()
        assert all(
            a == b or math.isnan(a) for a, b in zip(got.values(), want.values(), strict=True)
        )
    assert_same(stepped, looped)


@pytest.mark.parametrize("spec", [EMPTY, GNS, PACE])
def test_micro_batches_give_the_gradients_of_the_whole_batch(spec: str) -> None:
    inputs, targets = text(6)
    targets = targets.clone()
    targets[:4, 3:] = -100  # unequal counts: a mean of means would be wrong
    whole, cut = small_gpt().double(), small_gpt().double()
    one = trainc.compile(spec, whole).step([(inputs, targets)])
    two = trainc.compile(spec, cut).step([(inputs[:4], targets[:4]), (inputs[4:], targets[4:])])
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-12)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", [GNS, PACE], ids=["gns", "pace"])
@pytest.mark.parametrize("double", [False, True], ids=["fp32", "fp64"])
def test_graph_and_module_give_the_same_numbers(spec: str, double: bool) -> None:
    models = [small_gpt(), small_gpt()]
    if double:
        models = [m.double() for m in models]
    graph = trainc.compile(spec, models[0], executor="graph")
    module = trainc.compile(spec, models[1], executor="module")
    for seed in range(3):
        a, b = graph.step(text(seed=seed)), module.step(text(seed=seed))
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-10 if double else 1e-4, nan_ok=True), (
                name
            )
    tolerance = 1e-10 if double else 1e-5
    for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_the_graph_is_a_graph_module_that_fills_grad_in_any_loop() -> None:
    model, other = small_gpt(), small_gpt()
    program = trainc.compile(GNS, model)
    graph = program.graph
    assert isinstance(graph, torch.fx.GraphModule)
    loss = graph(text())
    assert program.graph is graph
    want = cross_entropy(other(text()[0]).flatten(0, 1), text()[1].flatten())
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    targets = {str(node.target) for node in graph.graph.nodes}
    assert any("trainc.layer_norm" in t for t in targets), "fused operators are in the graph"
    assert set(graph.state_dict()) == set(model.state_dict())


def test_state_dict_keys_hooks_and_isinstance_are_unchanged() -> None:
    model = small_gpt()
    keys = list(model.state_dict())
    called: list[str] = []
    model.get_submodule("blocks.0.ln1").register_forward_hook(lambda *_: called.append("hook"))
    program = trainc.compile(GNS, model, executor="module")
    program.step(text())
    assert list(program.module.state_dict()) == keys
    assert called == ["hook"]
    assert isinstance(model.get_submodule("blocks.0.ln1"), nn.LayerNorm)
    program.unbind()
    assert type(model.get_submodule("blocks.0.ln1")) is nn.LayerNorm


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def checkpointed(model: nn.Module) -> Callable[..., Tensor]:
    from torch.utils.checkpoint import checkpoint

    return lambda *inputs: checkpoint(model, *inputs, use_reentrant=False)


@pytest.mark.parametrize("wrap", [compiled, checkpointed], ids=["compile", "checkpoint"])
@pytest.mark.parametrize("spec", [GNS, PACE], ids=["gns", "pace"])
def test_statistics_and_noise_arrive_through_wrappers(
    spec: str, wrap: Callable[..., Callable[..., Tensor]]
) -> None:
    plain, wrapped = small_gpt(), small_gpt()
    want = trainc.compile(spec, plain, executor="module")
    got = trainc.compile(spec, wrapped)
    got.forward = wrap(wrapped)
    for seed in range(3):
        a, b = got.step(text(seed=seed)), want.step(text(seed=seed))
        assert a == pytest.approx(b, rel=1e-3, nan_ok=True)
    for x, y in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_second_program_of_a_compiled_model_measures_as_the_first() -> None:
    torch._dynamo.reset()  # what the first compiles is there for the second
    found = []
    for _ in range(2):
        model = small_gpt()
        program = trainc.compile(GNS, model)
        program.forward = torch.compile(model, backend="aot_eager")
        found.append([program.step(text(seed=seed))["gns.noise"] for seed in range(3)])
    assert found[1] == found[0]
    assert all(math.isfinite(noise) for noise in found[0])


def test_statistics_arrive_under_autocast() -> None:
    plain, cast = small_gpt(), small_gpt()
    want = trainc.compile(GNS, plain, executor="module")
    got = trainc.compile(GNS, cast, executor="module")
    for seed in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = got.loss(text(seed=seed))
        loss.backward()
        a, b = got.update(), want.step(text(seed=seed))
        assert a["gns.noise"] == pytest.approx(b["gns.noise"], rel=0.05)


def test_a_deep_copy_trains_by_itself() -> None:
    model = small_gpt()
    program = trainc.compile(GNS, model, executor="module")
    twin = copy.deepcopy(model)
    program.step(text())
    assert not torch.equal(weights(model)[0], weights(twin)[0])
    cross_entropy(twin(text()[0]).flatten(0, 1), text()[1].flatten()).backward()


@pytest.mark.parametrize("build", [vit, resnet], ids=["vit", "resnet"])
def test_image_models_train_with_either_executor(build: Callable[[], nn.Module]) -> None:
    spec = EMPTY + " regularize l2_sp on ndim(2) { weight = 0.01 }"
    images, labels = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    results = []
    for executor in ("graph", "module"):
        torch.manual_seed(0)
        model = build()
        program = trainc.compile(spec, model, executor=executor)
        results.append([program.step((images, labels))["loss"] for _ in range(3)])
        results.append([b.detach().double().sum().item() for b in model.buffers()])
    assert results[0] == pytest.approx(results[2], rel=1e-5)
    assert results[1] == pytest.approx(results[3], rel=1e-5), (
        "BatchNorm statistics are updated once by either executor"
    )


def resumed(spec: str, executor: Any) -> tuple[Program, Program]:
    """Return a program trained six steps, and one resumed from its third."""
    batches = [text(seed=i) for i in range(6)]
    straight = trainc.compile(spec, small_gpt(), executor=executor)
    state = None
    for i, batch in enumerate(batches):
        if i == 3:
            state = copy.deepcopy(straight.state_dict())
        straight.step(batch)
    assert state is not None
    torch.manual_seed(99)
    later = trainc.compile(
        spec, gpt(layers=2, width=32, heads=2, context=16, vocabulary=61), executor=executor
    )
    later.load_state_dict(state)
    for batch in batches[3:]:
        later.step(batch)
    return straight, later


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("spec", [GNS, PACE], ids=["gns", "pace"])
def test_a_resumed_program_is_bit_equal(spec: str, executor: str) -> None:
    straight, later = resumed(spec, executor)
    assert_same(straight.module, later.module)
    assert straight.clock == later.clock
    assert dict(straight.signals) == pytest.approx(dict(later.signals), rel=0, abs=0, nan_ok=True)


def poisoned() -> tuple[Program, list[Tensor]]:
    model = small_gpt()
    program = trainc.compile("run { length = 10 steps } " + EMPTY, model)
    program.step(text())
    with torch.no_grad():
        model.get_parameter("head.weight")[0, 0] = float("nan")
    return program, weights(model)


def test_a_loss_that_is_nan_stops_before_the_update() -> None:
    program, before = poisoned()
    with pytest.raises(NonFiniteLoss, match="step 1"):
        program.step(text())
    for x, y in zip(program.module.parameters(), before, strict=True):
        assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


def test_update_without_a_loss_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"program\.loss\(batch\)"):
        trainc.compile(EMPTY, small_gpt()).update()


def test_a_step_of_no_micro_batches_says_so() -> None:
    program = trainc.compile(EMPTY, small_gpt())
    with pytest.raises(ValueError, match="at least one micro-batch, and the list is empty"):
        program.step([])


def test_a_site_that_never_runs_is_an_error() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    spec = EMPTY + " regularize pace on type(Linear) { sigma = 0.5, weight = 1 }"
    program = trainc.compile(spec, Idle(), executor="module")
    with pytest.raises(SiteError, match="idle"):
        program.step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))


def test_a_micro_batch_without_counted_targets_is_skipped() -> None:
    inputs, targets = text(4)
    hidden = torch.full_like(targets, -100)
    whole, cut = small_gpt().double(), small_gpt().double()
    want = trainc.compile(EMPTY, whole).step([(inputs, targets)])
    got = trainc.compile(EMPTY, cut).step([(inputs, targets), (inputs, hidden)])
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-12)
    assert got["batch"] == 8


def test_a_norm_that_runs_twice_is_an_error() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(self.norm(x)))
            return out

    for executor in ("module", "graph"):
        program = trainc.compile(GNS, Twice(), executor=executor)
        with pytest.raises(Exception, match="norm"):
            program.step((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])))


class Interrupted(nn.Module):
    """Raises an error at one of its passes."""

    def __init__(self, at: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.at, self.passes = nn.Linear(6, 4).double(), at, 0

    def forward(self, x: Tensor) -> Any:
        self.passes += 1
        if self.passes == self.at:
            raise KeyboardInterrupt
        return self.layer(x)


@pytest.mark.parametrize(
    "more", ["", "perturb sam { rho = 0.2 }", "mask sift on all { density = 0.5 }"]
)
def test_a_step_that_an_error_ended_leaves_nothing_for_the_next(more: str) -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=g, dtype=torch.float64), torch.arange(8) % 4
    micro_batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    spec = f"loss cross_entropy optimizer sgd {{ lr = 0.1, momentum = 0.9, clip = 1 }} {more}"
    last = 4 if "sam" in more else 2
    stopped, whole = Interrupted(last), Interrupted(0)
    program, other = trainc.compile(spec, stopped), trainc.compile(spec, whole)
    with pytest.raises(KeyboardInterrupt):
        program.step(micro_batches)
    for batch in (micro_batches, [(x, y)]):
        assert program.step(batch) == other.step(batch)
    assert torch.equal(stopped.layer.weight, whole.layer.weight)


class Noisy(nn.Module):
    """Adds noise of a shape that does not depend on its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x + torch.randn(6))


def test_the_capture_of_a_graph_draws_no_random_numbers() -> None:
    g, losses = torch.Generator().manual_seed(1), []
    batch = torch.randn(8, 6, generator=g), torch.arange(8) % 4
    for executor in ("module", "graph"):
        program = trainc.compile(
            "loss cross_entropy optimizer sgd { lr = 0.1 }", Noisy(), executor=executor
        )
        torch.manual_seed(2)
        losses.append([program.step(batch)["loss"], program.step([batch, batch])["loss"]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("more", ["", "observe norm_growth on all every 1 steps", "lr trust_ratio"])
def test_to_compile_a_model_with_computed_weights_changes_none_of_its_buffers(more: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))
    before = copy.deepcopy(model.state_dict())
    trainc.compile(f"loss cross_entropy optimizer sgd {{ lr = 0.1 }} {more}", model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("executor", ["module", "graph"])
def test_an_error_in_the_update_leaves_nothing_for_the_next_step(executor: Any) -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=g, dtype=torch.float64), torch.arange(8) % 4
    spec = "loss cross_entropy optimizer sgd { lr = 0.1, momentum = 0.9 } lr trust_ratio"
    stopped, whole = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    whole.load_state_dict(stopped.state_dict())
    program, other = (trainc.compile(spec, m, executor=executor) for m in (stopped, whole))
    step = next(a for a in program._method.actions if isinstance(a, OptimizerStep))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = step.torch.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        program.step([(x[:3], y[:3]), (x[3:], y[3:])])
    handle.remove()
    assert program.step((x, y)) == other.step((x, y))
    assert torch.equal(stopped.weight, whole.weight)


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("what", ["parameter", "module"])
def test_what_is_replaced_after_a_step_is_an_error_and_not_left_untrained(
    what: str, executor: Any
) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    program = trainc.compile(EMPTY, model, executor=executor)
    batch = torch.randn(5, 6), torch.randint(0, 4, (5,))
    program.step(batch)
    head: Any = model[2]
    if what == "module":
        model[2] = nn.Linear(8, 4)
    else:
        head.weight = nn.Parameter(torch.zeros(4, 8))
    before = weights(model)
    with pytest.raises(SiteError, match=r"`2\.weight` is no longer in the model .* was replaced"):
        program.step(batch)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    model[2], head.weight = head, program.execution.parameters["2.weight"]
    program.step(batch)
    trainc.compile(EMPTY, model, executor=executor).step(batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: None, "the state of a program is a dict, and this is NoneType"),
        (lambda s: s["model"], r"tensors alone, .*`program\.module\.load_state_dict\(state\)`"),
        (lambda s: {"program": s, "order": {}}, "a whole checkpoint: give its entry `program`"),
        (lambda s: {k: v for k, v in s.items() if k != "clock"}, "has no `clock`"),
        (lambda s: s | {"history": {}}, "`history/first` is missing: expected a dict"),
        (lambda s: s | {"rates": 3}, "`rates` is 3: expected a dict"),
    ],
)
def test_what_is_no_state_of_a_program_is_named(change: Any, message: str) -> None:
    program = trainc.compile("loss mse optimizer sgd { lr = 0.1 }", nn.Linear(3, 2))
    state = program.state_dict()
    for load in (program.load_state_dict, program.load_compatible):
        with pytest.raises(ValueError, match=message):
            load(change(state))
