"""The contract of `optimizer torch`: whatever an optimizer keeps is saved, and resuming is bit-equal."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.program.program import Program
from trainc.runtime.storage.checkpoint import find_latest, load_checkpoint, save_checkpoint
from trainc.runtime.torch_optimizer.problem import OptimizerProblem

OURS = "tests.compiler.foreign_optimizers:"
SGD = " optimizer sgd as rest on all - ndim(2) { lr = 1e-2 }"
# Every optimizer of torch.optim, with arguments that change what it keeps, and every one of ours.
OPTIMIZERS = {
    "Adadelta": "lr = 0.1",
    "Adadelta foreach": "lr = 0.1, foreach = true, weight_decay = 0.1 on ndim(2)",
    "Adafactor": "lr = 1e-2",
    "Adafactor decayed": "lr = 1e-2, weight_decay = 0.1 on ndim(2), d = 2.0",
    "Adagrad": "lr = 1e-2, initial_accumulator_value = 0.1",
    "Adam": "lr = 1e-2, amsgrad = true",
    "Adam fused": "lr = 1e-2, fused = true",
    "Adam foreach": "lr = 1e-2, foreach = true, maximize = true",
    "AdamW": "lr = 1e-2 * warmup(4 steps), weight_decay = 0.1 on ndim(2)",
    "Adamax": "lr = 1e-2",
    "ASGD": "lr = 1e-2, t0 = 2.0, lambd = 0.1",
    "LBFGS": "lr = 0.3, max_iter = 3, history_size = 3",
    "Muon": "lr = 1e-2",
    "NAdam": "lr = 1e-2, decoupled_weight_decay = true, weight_decay = 0.1",
    "RAdam": "lr = 1e-2",
    "RMSprop": "lr = 1e-2, momentum = 0.9, centered = true",
    "Rprop": "lr = 1e-2",
    "SGD": "lr = 1e-2, momentum = 0.9, nesterov = true",
    f"{OURS}Distance": "lr = 1.0, d0 = 1e-2, weight_decay = 0.1 on ndim(2)",
    f"{OURS}Averaged": "lr = 0.1 * warmup(4 steps), weight_decay = 0.1 on ndim(2)",
    f"{OURS}Swapping": "lr = 0.1",
    f"{OURS}Nested": "lr = 0.1",
    f"{OURS}SetsItsRate": "lr = 0.1",
    f"{OURS}OwnForm": "lr = 0.1",
    f"{OURS}KeysOfItsOwn": "lr = 0.1",
    f"{OURS}Counted": "lr = 0.1",
}


def test_the_list_has_every_optimizer_of_torch() -> None:
    """SparseAdam takes sparse gradients alone and has tests of its own below."""
    known = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    ours = {name.split()[0] for name in OPTIMIZERS if ":" not in name}
    assert known - {"Optimizer", "SparseAdam"} == ours


def spec(name: str, fields: str | None = None, more: str = "") -> str:
    path = name if ":" in name else f"torch.optim:{name.split()[0]}"
    on = " on ndim(2)" if name == "Muon" else ""
    rest = SGD if on else ""
    written = OPTIMIZERS[name] if fields is None else fields
    text = f'loss cross_entropy optimizer torch("{path}") as own{on} {{ {written} }}{rest}'
    return f"{text} run {{ length = 30 steps }} {more}"


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=g).to(dtype), torch.randint(3, (8,), generator=g)


def torch_optimizer(program: Program) -> Any:
    return next(a.torch for a in program._machine.actions if a.name == "own")  # type: ignore[attr-defined]


def stored(program: Program, folder: Path) -> Any:
    """Return the program's state as a checkpoint on disk gives it back."""
    save_checkpoint(folder, 1, program.state_dict())
    path = find_latest(folder).path
    assert path is not None
    return load_checkpoint(path)


def run_on(program: Program, steps: range, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [program.step(batch(step, dtype)) for step in steps]


def assert_equal(one: Program, two: Program) -> None:
    """Compare weights and the whole of what the torch optimizers hold, bit for bit, types of values too."""
    for name, weight in one.module.state_dict().items():
        assert torch.equal(weight, two.module.state_dict()[name]), name
    first, second = (torch_optimizer(p).state_dict() for p in (one, two))
    assert_same(first, second, "state")


def assert_same(one: Any, two: Any, place: str) -> None:
    assert type(one) is type(two), place
    if isinstance(one, Tensor):
        assert (one.dtype, one.stride()) == (two.dtype, two.stride()), place
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True, msg=place)
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for key in one:
            assert_same(one[key], two[key], f"{place}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), place
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{place}/{i}")
    else:
        assert one == two, place


# resuming


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_program_is_the_uninterrupted_one(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """From memory and from a checkpoint on disk; state is wider than 16-bit weights, and must not be rounded."""
    straight = trainc.compile(spec(name), net(dtype))
    run_on(straight, range(5), dtype)
    states = [copy.deepcopy(straight.state_dict()), stored(straight, tmp_path)]
    wanted = run_on(straight, range(5, 9), dtype)
    for state in states:
        again = trainc.compile(spec(name), net(dtype))
        run_on(again, range(20, 22), dtype)  # what it did before must not remain
        again.load_state_dict(state)
        assert run_on(again, range(5, 9), dtype) == wanted
        assert_equal(straight, again)


CLAUSES = {
    "factors": "lr layer_decay { decay = 0.5 }",
    "changed updates": "lr trust_ratio on ndim(2)",
    "chosen entries": "mask sift on ndim(2) { density = 20%, batches = 3 }",
    "average": "regularize ema { decay = 0.9 }",
    "second passes": "perturb sam { rho = 0.05 }",
    "pull": "regularize l2_sp on ndim(2) { weight = 0.1 }",
}


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("name", ["Adafactor", "NAdam", f"{OURS}Distance", f"{OURS}Nested"])
def test_a_resumed_program_with_another_clause_is_the_uninterrupted_one(
    name: str, clause: str, tmp_path: Path
) -> None:
    """Before and after the third step, in which entries are chosen."""
    text = spec(name, OPTIMIZERS[name] + ", clip = 0.5", CLAUSES[clause])
    for cut in (2, 5):
        straight, again = trainc.compile(text, net()), trainc.compile(text, net())
        run_on(straight, range(cut))
        again.load_state_dict(stored(straight, tmp_path / str(cut)))
        assert run_on(straight, range(cut, 7)) == run_on(again, range(cut, 7))
        assert_equal(straight, again)
        straight.evaluate(*batch(50))
        assert straight.state_dict().keys() == again.state_dict().keys()


def test_loading_shares_nothing_with_what_was_loaded() -> None:
    program = trainc.compile(spec(f"{OURS}Nested"), net())
    run_on(program, range(3))
    state = copy.deepcopy(program.state_dict())
    before = copy.deepcopy(state)
    program.load_state_dict(state)
    run_on(program, range(3, 6))
    assert_same(state["actions"], before["actions"], "state")


def test_one_tensor_of_several_groups_stays_one(tmp_path: Path) -> None:
    program = trainc.compile(spec(f"{OURS}Distance"), net())
    run_on(program, range(3))
    program.load_state_dict(stored(program, tmp_path))
    one, two = (group["d"] for group in torch_optimizer(program).param_groups)
    assert one is two


def test_state_of_groups_is_saved_under_parameter_names() -> None:
    program = trainc.compile(spec(f"{OURS}Distance"), net())
    run_on(program, range(3))
    state = program.state_dict()["actions"]["own"]
    assert {path.rpartition("/")[0] for path in state} == {n for n, _ in net().named_parameters()}
    options = state["2.bias/(group)"]["options"]
    assert options.keys() == {"d", "numerator", "k", "mode"}
    assert options["k"] == 3


def test_ordinary_state_is_entries_by_parameter() -> None:
    program = trainc.compile(spec("AdamW"), net())
    run_on(program, range(3))
    state = program.state_dict()["actions"]["own"]
    assert all(isinstance(value, Tensor) for value in state.values())
    assert state["2.bias/exp_avg"].shape == (3,)


# soundness, and what cannot be saved


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("d", torch.tensor(math.nan), "`0.weight/(group)/d` in the state of `own` is not a number"),
        ("k", math.nan, "`0.weight/(group)/k` in the state of `own` is not a number"),
        ("mode", [1.0, {"x": math.nan}], "`0.weight/(group)/mode/1/x` in the state of `own`"),
        ("longest", -math.inf, None),
        ("last", torch.tensor([math.inf, 1.0]), None),
        ("mode", None, None),
        ("last", "text", None),
    ],
)
def test_nan_in_a_group_is_noticed_and_bounds_are_not(
    option: str, value: Any, said: str | None
) -> None:
    program = trainc.compile(spec(f"{OURS}Distance", "lr = 1.0"), net())
    run_on(program, range(2))
    torch_optimizer(program).param_groups[0][option] = value
    found = program.unsound_state()
    assert found is None if said is None else found is not None and found.startswith(said)


def test_state_of_a_parameter_may_be_infinite_where_it_is_one_number() -> None:
    program = trainc.compile(spec(f"{OURS}Nested"), net())
    run_on(program, range(2))
    state = torch_optimizer(program).state[program.module.get_parameter("0.weight")]
    state["worst"].fill_(-math.inf)
    assert program.unsound_state() is None
    state["axes"][1][0, 0] = math.inf
    assert program.unsound_state() == "`0.weight/axes/1` in the state of `own` is not finite"


def test_what_cannot_be_saved_is_named() -> None:
    program = trainc.compile(spec(f"{OURS}Opaque", "lr = 0.1"), net())
    run_on(program, range(2))  # a loop of one's own that saves nothing may use it
    with pytest.raises(OptimizerProblem) as error:
        program.require_savable()
    assert "`0.weight/parts/1/inner` in the state of `own`" in str(error.value)
    assert "is a Momentum, which a checkpoint cannot hold" in str(error.value)


# rates


def test_an_optimizer_may_set_its_rate_where_the_spec_gives_a_constant_one() -> None:
    program = trainc.compile(spec(f"{OURS}SetsItsRate"), net())
    rates = [metrics["lr_max"] for metrics in run_on(program, range(4))]
    assert rates == pytest.approx([0.1 * 0.9**step for step in range(4)], rel=1e-12)
    theirs = net()
    from tests.compiler.foreign_optimizers import SetsItsRate

    optimizer = SetsItsRate(theirs.parameters(), lr=0.1)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, program.module.state_dict()[name])


def test_an_optimizer_that_sets_its_rate_is_noted_once() -> None:
    program = trainc.compile(spec(f"{OURS}SetsItsRate"), net())
    notes: list[str] = []
    for step in range(3):
        program.step(batch(step))
        notes += program.report().notes
    (note,) = notes
    assert "sets its learning rate by itself, from 0.1 to 0.09" in note


@pytest.mark.parametrize(
    ("fields", "more", "said"),
    [
        ("lr = 0.1 * warmup(4 steps)", "", "undoes the schedule in `lr`"),
        ("lr = 0.1", "lr layer_decay { decay = 0.5 }", "undoes the factors of `layer_decay`"),
    ],
)
def test_two_that_set_one_rate_are_an_error(fields: str, more: str, said: str) -> None:
    program = trainc.compile(spec(f"{OURS}SetsItsRate", fields, more), net())
    with pytest.raises(OptimizerProblem, match=said) as error:
        run_on(program, range(2))
    assert "Write a constant `lr`" in str(error.value)


def test_the_weight_decay_of_a_class_holds_where_none_is_written() -> None:
    """And is in the plan; where one is written, parameters that it does not select have none."""
    for fields, wanted in (
        ("lr = 0.1", [0.01] * 4),
        ("lr = 0.1, weight_decay = 0.2 on ndim(2)", [0.2, 0, 0.2, 0]),
    ):
        text = spec("AdamW", fields)
        program = trainc.compile(text, net())
        found = {
            id(p): group["weight_decay"]
            for group in torch_optimizer(program).param_groups
            for p in group["params"]
        }
        assert [found[id(p)] for p in program.module.parameters()] == wanted
        assert [row["decay"] for row in trainc.plan(text, net()).parameters] == wanted


# refused


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("Adam", "lr = 0.1, differentiable = true", "`differentiable = true` of"),
        ("SparseAdam", "lr = 0.1", "takes sparse gradients alone, and the gradient of `0.weight`"),
        (f"{OURS}Additional", "lr = 0.1", "has other parameters in its groups than it was given"),
    ],
)
def test_what_cannot_train_here_is_refused_at_its_clause(name: str, fields: str, said: str) -> None:
    with pytest.raises(trainc.SpecError, match=said) as error:
        trainc.compile("\n" + spec(name, fields), net())
    assert ":2:" in str(error.value)


def test_a_parameter_that_the_class_refuses_is_named() -> None:
    text = 'loss cross_entropy optimizer torch("torch.optim:Muon") { lr = 0.1 }'
    with pytest.raises(trainc.SpecError, match=r"Muon only supports 2D .*`0\.bias`"):
        trainc.compile(text, net())


def test_an_optimizer_that_needs_a_closure_and_does_not_say_so_is_named() -> None:
    program = trainc.compile(spec(f"{OURS}NeedsClosure", "lr = 0.1"), net())
    with pytest.raises(OptimizerProblem, match=r"`step` of `.*NeedsClosure` needs a closure"):
        program.step(batch(0))


def test_what_a_class_refuses_in_its_step_is_said_of_its_clause() -> None:
    program = trainc.compile(spec("Adam", "lr = 0.1, capturable = true"), net())
    with pytest.raises(OptimizerProblem, match=r"`own` cannot step, because .* capturable"):
        program.step(batch(0))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"LBFGS"}))
def test_masks_of_zeros_hold_under_any_optimizer(name: str) -> None:
    """State is zeroed where it is the entries' own, whatever else stands beside it."""
    mask = "mask magnitude on ndim(2) from 2 steps { density = 50% }"
    straight, again = (trainc.compile(spec(name, more=mask), net()) for _ in range(2))
    run_on(straight, range(4))
    again.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert run_on(straight, range(4, 7)) == run_on(again, range(4, 7))
    assert_equal(straight, again)
    for name in ("0.weight", "2.weight"):
        weight = straight.module.get_parameter(name)
        assert int((weight == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("name", ["Adam", f"{OURS}Distance", f"{OURS}Averaged", f"{OURS}Nested"])
def test_a_skipped_step_leaves_all_state_as_it_was(name: str) -> None:
    text = spec(name).replace("30 steps", "30 steps, on_nan = skip")
    program = trainc.compile(text, net())
    run_on(program, range(3))
    before = copy.deepcopy(torch_optimizer(program).state_dict())
    x, y = batch(3)
    assert program.step((x * math.nan, y))["skipped"]
    after = torch_optimizer(program).state_dict()
    if "warmup" in text:  # the rate is set before the passes
        before["param_groups"] = [{**g, "lr": None} for g in before["param_groups"]]
        after["param_groups"] = [{**g, "lr": None} for g in after["param_groups"]]
    assert_same(before, after, "state")


class Curved(torch.optim.SGD):
    """Differentiates the gradients once more, as AdaHessian does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                torch.autograd.grad(p.grad.sum(), p)


def test_an_optimizer_that_differentiates_gradients_is_named() -> None:
    text = spec("tests.compiler.test_foreign_optimizers:Curved", "lr = 0.1")
    with pytest.raises(OptimizerProblem, match=r"Curved` differentiates gradients"):
        trainc.compile(text, net()).step(batch(0))


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.looked = nn.Embedding(10, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.looked(x))
        return made


# torch's Adagrad makes sparse tensors without saying whether they are to be checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("sparse", ["SparseAdam", "Adagrad", "SGD"])
def test_state_of_sparse_gradients_resumes(sparse: str, tmp_path: Path) -> None:
    """SGD keeps its momentum in a sparse tensor."""
    momentum = ", momentum = 0.9" if sparse == "SGD" else ""
    text = f'loss cross_entropy optimizer torch("torch.optim:{sparse}") as own on "looked.*" {{ lr = 0.1{momentum} }}'
    text += ' optimizer sgd on "head.*" { lr = 0.1 }'

    def part(step: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([step, step, 9 - step]), torch.tensor([0, 1, 2])

    straight, again = (trainc.compile(text, Looked()) for _ in range(2))
    for step in range(3):
        straight.step(part(step))
    again.load_state_dict(stored(straight, tmp_path))
    for step in range(3, 5):
        assert straight.step(part(step)) == again.step(part(step))
    for one, two in zip(straight.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, two)
