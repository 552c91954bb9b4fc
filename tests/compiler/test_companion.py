"""The mechanisms of a module beside the model, and of weights that evaluation uses in place of the trained ones."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import trainc
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration
from trainc.runtime.companion.companion import Companion
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.record import Step

Batch = tuple[Tensor, Tensor]
BASE = "loss cross_entropy optimizer adamw { lr = 0.05 } run { length = 20 steps }\n"
NOISY = 'regularize pace on "0" { sigma = 0.5, weight = 0.3 }'


class Drift(Action):
    """Phase 12: measures how far the model's logits are from those of a companion, on fixed inputs."""

    phase = Phase.OBSERVE

    def __init__(self, label: str, model: nn.Module, companion: Companion, inputs: Tensor) -> None:
        self.name, self.model, self.companion, self.inputs = label, model, companion, inputs

    def run(self, step: Step) -> None:
        with torch.no_grad():
            apart = self.model(self.inputs) - self.companion.logits(self.inputs)
        step.metrics[f"{self.name}.drift"] = float(apart.square().mean())


class Frozen(Construct):
    """Reports how far the model is from a copy of itself."""

    kind: ClassVar = "observe"
    name: ClassVar = "frozen"
    effects: ClassVar = (
        Effect("perturb", "keep a copy of the model", ("params",)),
        Effect("observe", "compare the model with its copy", ("params",), ("metrics",)),
    )
    since: Literal["start", "from"] = "start"

    def lower(self, to: Lowering) -> None:
        made = to.companion("copy", since=self.since)
        to.action(Drift(to.label, to.model, made, batch(99)[0]))


class Beside(Frozen):
    """Reports how far the model is from another module."""

    name: ClassVar = "beside"

    def lower(self, to: Lowering) -> None:
        torch.manual_seed(7)
        made = to.companion("other", module=nn.Linear(6, 4).double())
        to.action(Drift(to.label, to.model, made, batch(99)[0]))


class Evaluated(Frozen):
    """Evaluates with the model as it was at the start."""

    name: ClassVar = "evaluated"

    def lower(self, to: Lowering) -> None:
        to.evaluate_with(to.companion("copy", since=self.since))
        to.action(Silent(to.label))


class Silent(Action):
    """Phase 12: does nothing."""

    phase = Phase.OBSERVE

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, step: Step) -> None:
        """Do nothing."""


def net() -> Any:
    torch.manual_seed(0)
    layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 4)
    return nn.Sequential(*layers).double()


def batch(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (8,), generator=g)


def compiled(
    *clauses: Clause, model: nn.Module | None = None, rest: str = "", **given: Any
) -> Program:
    base = trainc.check(BASE + rest).spec
    assert base is not None
    spec = Spec((*base.clauses, *clauses), base.rules)
    if model is None:
        made = net()
        if rest == NOISY:
            made[1] = nn.Identity()
        model = made
    return trainc.compile(spec, model, **given)


def companion_of(program: Program) -> Companion:
    (found,) = [a for a in program._machine.actions if isinstance(a, Companion)]
    return found


def steps(program: Program, first: int, last: int) -> list[dict[str, float]]:
    found = []
    for step in range(first, last):
        torch.manual_seed(step)
        found.append(program.step(batch(step)))
    return found


def in_eval(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)  # type: ignore[no-any-return]


# a copy of the start


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("rest", ["", NOISY, "noise_scale gns on all { method = per_example }"])
def test_the_copy_is_the_model_at_the_start(rest: str, executor: Any) -> None:
    model = net()
    if rest:
        model[1] = nn.Identity()
    start, x = copy.deepcopy(model), batch(50)[0]
    program = compiled(Clause(Frozen()), model=model, rest=rest, executor=executor)
    steps(program, 0, 4)
    made = companion_of(program)
    assert torch.equal(made.logits(x), in_eval(start, x))
    assert not torch.equal(in_eval(model, x), in_eval(start, x))
    for (name, own), other in zip(made.module.named_modules(), start.modules(), strict=True):
        assert type(own) is type(other), name
        assert not own.training
        assert "trainc" not in vars(own)
    assert not any(p.requires_grad for p in made.module.parameters())


def test_weights_that_are_loaded_after_compile_are_the_start() -> None:
    model, other = net(), net()
    program = compiled(Clause(Frozen()), model=model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    model.load_state_dict(other.state_dict())
    steps(program, 0, 2)
    assert torch.equal(companion_of(program).logits(batch(5)[0]), in_eval(other, batch(5)[0]))


def test_training_is_bit_for_bit_as_without_it() -> None:
    for rest in ("", NOISY):
        plain, beside = compiled(rest=rest), compiled(Clause(Frozen()), rest=rest)
        for step in range(4):
            torch.manual_seed(step)
            companion_of(beside).logits(batch(step + 60)[0])
            found = beside.step(batch(step))
            torch.manual_seed(step)
            assert plain.step(batch(step)).items() <= found.items()
        for name, value in plain.module.state_dict().items():
            if not name.startswith(("1.running", "1.num")):  # Drift runs the model in train mode
                assert torch.equal(value, beside.module.state_dict()[name]), name
        assert plain.module.state_dict().keys() == beside.module.state_dict().keys()


def test_running_it_draws_no_number_writes_no_input_and_gives_no_gradient() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.layer(x) + torch.rand(4)  # type: ignore[no-any-return]

    program = compiled(Clause(Frozen()), model=Writes())
    program.begin()
    x = batch(3)[0].requires_grad_()
    kept, state = x.detach().clone(), torch.get_rng_state()
    found = companion_of(program).logits(x.detach())
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.requires_grad


def test_from_copies_the_model_as_it_is_then() -> None:
    program = compiled(Clause(Frozen(since="from"), start=Duration(3, "steps")))
    seen = steps(program, 0, 3)
    assert all("frozen.drift" not in one for one in seen)
    assert companion_of(program).state_dict() == {}
    at, x = copy.deepcopy(program.module), batch(50)[0]
    assert "frozen.drift" in steps(program, 3, 4)[0]
    steps(program, 4, 6)
    assert torch.equal(companion_of(program).logits(x), in_eval(at, x))


def test_another_module_is_run_and_kept() -> None:
    torch.manual_seed(7)
    other, x = nn.Linear(6, 4).double(), batch(50)[0]
    program = compiled(Clause(Beside()))
    steps(program, 0, 2)
    assert torch.equal(companion_of(program).logits(x), other(x))
    companion_of(program).values["bias"].add_(1.0)
    later = compiled(Clause(Beside()))
    later.load_state_dict(copy.deepcopy(program.state_dict()))
    assert torch.equal(companion_of(later).logits(x), companion_of(program).logits(x))


# state


@pytest.mark.parametrize("at", [1, 4])
def test_a_resumed_run_is_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    for since in ("start", "from"):
        clause = Clause(Frozen(since=since), start=Duration(2, "steps"))
        straight, later = compiled(clause), compiled(clause)
        steps(later, 40, 43)
        steps(straight, 0, at)
        torch.save(straight.state_dict(), tmp_path / "state.pt")
        later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert steps(straight, at, 7) == steps(later, at, 7)
        one, two = companion_of(straight), companion_of(later)
        assert one.values.keys() == two.values.keys() != set()
        assert all(torch.equal(value, two.values[name]) for name, value in one.values.items())


def test_a_checkpoint_without_one_makes_the_copy_in_the_next_step() -> None:
    plain = compiled()
    steps(plain, 0, 3)
    program = compiled(Clause(Frozen()))
    assert program.load_compatible(copy.deepcopy(plain.state_dict())) == []
    at, x = copy.deepcopy(program.module), batch(50)[0]
    steps(program, 3, 5)
    assert torch.equal(companion_of(program).logits(x), in_eval(at, x))


def test_values_of_other_tensors_are_refused_or_completed() -> None:
    program = compiled(Clause(Frozen()))
    steps(program, 0, 2)
    state = copy.deepcopy(program.state_dict())
    del state["actions"]["frozen copy"]["0.bias"]
    with pytest.raises(ValueError, match=r"`actions/frozen copy/0\.bias` is missing"):
        compiled(Clause(Frozen())).load_state_dict(state)
    other = compiled(Clause(Frozen()))
    assert other.load_compatible(state) == ["frozen copy: `0.bias` start as in the model now"]
    assert torch.equal(companion_of(other).values["0.bias"], other.module.get_parameter("0.bias"))


def test_the_plan_counts_what_it_holds() -> None:
    base = trainc.check(BASE.replace("0.05", '0.05, freeze = "0.*"')).spec
    assert base is not None
    plan = trainc.plan(Spec((*base.clauses, Clause(Frozen()))), net())
    memory = {row["what"]: row["bytes"] for row in plan.memory}
    trained = 8 * (9 + 9 + 36 + 4)
    assert memory["frozen copy"] == trained + 8 * (9 + 9) + 8  # running statistics, and a counter


# models


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.words.weight
            self.register_buffer("scale", torch.ones(1), persistent=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids)) * self.scale  # type: ignore[no-any-return]

    torch.manual_seed(0)
    return Tied()


def test_tied_weights_are_tied_in_the_copy() -> None:
    program = compiled(Clause(Keeps()), model=tied())
    program.step((torch.randint(7, (4, 3)), torch.randint(7, (4, 3))))
    made: Any = companion_of(program).module
    assert made.head.weight is made.words.weight
    assert made.head.weight is not program.module.get_parameter("words.weight")
    assert set(companion_of(program).values) == {"words.weight"}


class Keeps(Frozen):
    """Keeps a copy, and does nothing with it."""

    name: ClassVar = "silent"

    def lower(self, to: Lowering) -> None:
        to.companion("copy")


class Adapted(nn.Module):
    """A frozen layer with an adapter, as peft wraps one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.down = nn.Linear(6, 2, bias=False).double()
        self.up = nn.Linear(2, 9, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def test_what_nothing_trains_is_the_models_own() -> None:
    model = net()
    model[0] = Adapted(model[0])
    start, x = copy.deepcopy(model), batch(50)[0]
    program = compiled(Clause(Frozen()), model=model)
    steps(program, 0, 3)
    made: Any = companion_of(program)
    assert made.module[0].base.weight is model[0].base.weight
    assert "0.base.weight" not in made.values
    assert "0.up.weight" in made.values
    assert torch.equal(made.logits(x), in_eval(start, x))


def test_computed_weights_and_hooks_are_part_of_the_copy() -> None:
    model, calls = net(), []
    parametrizations.weight_norm(model[0])
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[3])
    model[3].register_forward_hook(lambda module, args, out: out * 2)
    model[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        wanted = model.eval()(batch(50)[0])
        model.train()
    program = compiled(Clause(Frozen()), model=model)
    steps(program, 0, 3)
    assert torch.equal(companion_of(program).logits(batch(50)[0]), wanted)
    assert calls


def test_a_graph_that_is_tried_has_the_copy_with_hooks() -> None:
    """A graph is tried without the user's hooks: the copy is made before."""
    program = compiled(Clause(Frozen()), rest=NOISY, executor="graph")
    seen: list[int] = []
    steps(program, 0, 1)
    handle = program.module.register_forward_hook(lambda *_: seen.append(1))
    program.load_state_dict(copy.deepcopy(program.state_dict()))
    program.begin()
    companion_of(program).logits(batch(0)[0])
    assert seen == [1]
    handle.remove()


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = net()
    model[0].held = (i for i in range(3))
    with pytest.raises(ValueError, match=r"the model cannot be copied \(TypeError: .*generator"):
        compiled(Clause(Frozen()), model=model).step(batch(0))


def test_layers_outputs_kept_as_attributes_are_no_obstacle() -> None:
    model = net()
    model.register_forward_hook(lambda module, args, out: setattr(module, "last", out))
    program = compiled(Clause(Frozen(since="from"), start=Duration(1, "steps")), model=model)
    steps(program, 0, 3)
    assert companion_of(program).made


def test_sixteen_bit_weights_are_averaged_in_float32_and_run_rounded() -> None:
    class Wide(Frozen):
        name: ClassVar = "wide"

        def lower(self, to: Lowering) -> None:
            to.companion("copy", wide=True)

    model = net().bfloat16()
    program = compiled(Clause(Wide()), model=model)
    program.begin()
    made, x = companion_of(program), batch(0)[0].bfloat16()
    assert made.values["0.weight"].dtype == torch.float32
    assert torch.equal(made.logits(x), in_eval(model, x))
    made.values["0.weight"].add_(0.125)
    with torch.no_grad():
        model[0].weight.copy_(made.values["0.weight"])
    assert torch.equal(made.logits(x), in_eval(model, x))


def test_the_copy_follows_the_models_device() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    program = compiled(Clause(Keeps()), model=model)
    program.begin()
    made: Any = companion_of(program)
    assert made.module[0].weight.device.type == "cpu"
    model.to("meta")
    assert made.module[0].weight.device.type == "meta"


# what evaluation uses


def evaluated() -> tuple[Program, nn.Module]:
    start = net()
    program = compiled(Clause(Evaluated()))
    steps(program, 0, 3)
    return program, start


def loss_of(model: nn.Module, data: Batch) -> float:
    return float(F.cross_entropy(in_eval(model, data[0]), data[1])) * len(data[1])


def test_evaluation_uses_the_other_weights_and_leaves_the_trained_ones() -> None:
    program, start = evaluated()
    before = copy.deepcopy(program.module.state_dict())
    held = {name: p.data_ptr() for name, p in program.module.named_parameters()}
    assert program.evaluate(*batch(9))[0] == pytest.approx(loss_of(start, batch(9)), rel=1e-14)
    assert program.evaluates == "evaluated copy"
    for name, value in program.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert held == {name: p.data_ptr() for name, p in program.module.named_parameters()}


def test_before_there_are_any_evaluation_uses_the_trained_weights() -> None:
    program = compiled(Clause(Evaluated(since="from"), start=Duration(2, "steps")))
    steps(program, 0, 1)
    assert program.evaluates is None
    assert program.evaluate(*batch(9))[0] == pytest.approx(loss_of(program.module, batch(9)))


def test_inside_the_block_the_model_and_what_is_saved_have_the_other_weights(
    tmp_path: Path,
) -> None:
    program, start = evaluated()
    trained, x = copy.deepcopy(program.module), batch(9)[0]
    with program.evaluation_weights(), program.evaluation_weights():
        assert torch.equal(in_eval(program.module, x), in_eval(start, x))
        inside = copy.deepcopy(program.module.state_dict())
        program.save(tmp_path / "inside")
        state = copy.deepcopy(program.state_dict())
        assert program.evaluate(*batch(9))[0] == pytest.approx(loss_of(start, batch(9)))
    program.save(tmp_path / "outside")
    assert all(torch.equal(value, inside[name]) for name, value in start.state_dict().items())
    for name, value in trained.state_dict().items():
        assert torch.equal(state["model"][name], value), name
        assert torch.equal(program.module.state_dict()[name], value), name
        assert torch.equal(state["evaluation"][name], start.state_dict()[name]), name
    for folder in ("inside", "outside"):
        loaded = net()
        load_model(loaded, str(tmp_path / folder / "weights.safetensors"))
        assert torch.equal(in_eval(loaded, x), in_eval(start, x))


def test_the_trained_weights_come_back_on_every_way_out() -> None:
    program, _ = evaluated()
    trained = copy.deepcopy(program.module.state_dict())
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), program.evaluation_weights():
            raise error
        for name, value in program.module.state_dict().items():
            assert torch.equal(value, trained[name]), name
    with pytest.raises(RuntimeError):
        program.evaluate(torch.ones(2, 3), torch.ones(2))
    assert program.module.training
    assert all(torch.equal(v, trained[n]) for n, v in program.module.state_dict().items())


@pytest.mark.parametrize(
    "call",
    [
        lambda program: program.begin(),
        lambda program: program.loss(batch(0)),
        lambda program: program.step(batch(0)),
        lambda program: program.update(),
        lambda program: program.graph,
        lambda program: program.load_state_dict(program.state_dict()),
        lambda program: program.load_compatible(program.state_dict()),
    ],
)
def test_no_step_runs_inside_the_block(call: Callable[[Program], Any]) -> None:
    program, _ = evaluated()
    with (
        program.evaluation_weights(),
        pytest.raises(RuntimeError, match=r"inside `with program.evaluation_weights\(\)`.* after"),
    ):
        call(program)


def test_two_threads_do_not_exchange_the_weights_under_each_other() -> None:
    program, _ = evaluated()
    refused: list[BaseException] = []

    def other() -> None:
        for call in (program.evaluation_weights().__enter__, program.state_dict):
            try:
                call()
            except RuntimeError as error:
                refused.append(error)

    with program.evaluation_weights():
        inside = copy.deepcopy(program.module.state_dict())
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert all(torch.equal(t, inside[n]) for n, t in program.module.state_dict().items())
    assert [str(error)[:33] for error in refused] == ["another thread is inside `program"] * 2


def test_an_evaluation_between_forward_and_backward_changes_no_gradient() -> None:
    one, two = evaluated()[0], evaluated()[0]
    for program in (one, two):
        torch.manual_seed(4)
        loss = program.loss(batch(4))
        if program is two:
            program.evaluate(*batch(9))
        loss.backward()
        program.update()
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, two.module.state_dict()[name]), name


def test_tied_weights_are_saved_by_every_name() -> None:
    program = compiled(Clause(Evaluated()), model=tied())
    program.step((torch.randint(7, (4, 3)), torch.randint(7, (4, 3))))
    state = program.state_dict()
    assert set(state["evaluation"]) == {"words.weight", "head.weight"}
    assert torch.equal(state["evaluation"]["head.weight"], tied().get_parameter("words.weight"))


# what is refused


def test_two_clauses_that_set_the_weights_of_evaluation_are_an_error_at_both() -> None:
    with pytest.raises(trainc.SpecError) as raised:
        compiled(Clause(Evaluated(), label="one"), Clause(Evaluated(), label="two"))
    (found,) = raised.value.diagnostics
    assert found.rule == "conflicting-effects"
    assert "both set the weights that evaluation and saving use" in found.message


def test_another_module_cannot_be_what_evaluation_uses() -> None:
    class Other(Frozen):
        name: ClassVar = "other"

        def lower(self, to: Lowering) -> None:
            to.evaluate_with(to.companion("one", module=nn.Linear(6, 4)))

    with pytest.raises(trainc.SpecError, match="`other one` is another module"):
        compiled(Clause(Other()))


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainc.compiler.lower.clause_access.is_sharded", lambda tensor: True)
    with pytest.raises(trainc.SpecError, match=r"`0.weight` is sharded over processes \(FSDP2\)"):
        compiled(Clause(Frozen()))
    monkeypatch.undo()
    program = compiled(Clause(Frozen()))
    monkeypatch.setattr("trainc.runtime.companion.companion.is_sharded", lambda tensor: True)
    with pytest.raises(ValueError, match=r"`0.weight` is sharded over processes \(FSDP2\)"):
        program.step(batch(0))
