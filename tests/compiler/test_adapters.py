"""The mechanism behind `adapt`: where adapters go, what selectors see of them, and what becomes of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import trainc
from examples.models import gpt
from tests import other_package
from trainc.compiler.driver.adaptation import base_inventory
from trainc.compiler.driver.saved_program import LoadError
from trainc.compiler.driver.train import train
from trainc.compiler.errors import SiteError
from trainc.compiler.lower.adapting import Adapting
from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.model.select import select
from trainc.compiler.model.undisturbed import undisturbed
from trainc.compiler.structure.roles import ADAPTER
from trainc.compiler.structure.weights import read_weight
from trainc.dsl.reading.construct import Construct, Effect
from trainc.dsl.reading.field_types import node_of
from trainc.dsl.reading.selectors import selector
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Glob
from trainc.runtime.storage import checkpoint

BASE = "loss cross_entropy run { length = 10 steps, seed = 3 } optimizer adamw { lr = 1e-2 }\n"
LORA = 'adapt lora on "**.mlp.**" & type(Linear) { rank = 2, alpha = 4 }\n'
SPEC = BASE + LORA
IDS = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
BATCH = (IDS, IDS)
ADAPTED = [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("fc", "proj")]


def model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=24)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return everything that adapting a model may change, to be compared."""
    return {
        "names": list(module.state_dict()),
        "modules": [(name, id(m)) for name, m in module.named_modules()],
        "hooks": [list(m._forward_hooks) for m in module.modules()],
        "trains": [p.requires_grad for p in module.parameters()],
        "attributes": [sorted(vars(m)) for m in module.modules()],
    }


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def trainable(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


# where they are, and what is selected


def by_role(module: nn.Module) -> tuple[set[str], set[str]]:
    """Return the modules and the parameters that `role(adapter)` selects."""
    chosen, inventory = selector(node_of("role(adapter)")), build_inventory(module)
    return set(select(chosen, inventory, "modules")), set(select(chosen, inventory, "parameters"))


def test_the_role_of_adapters_is_their_layers_and_their_parameters() -> None:
    program = trainc.compile(SPEC, model())
    names = {f"{layer}.lora.{part}.weight" for layer in ADAPTED for part in ("a", "b")}
    assert by_role(program.module) == (set(ADAPTED), names & trainable(program.module))
    assert len(trainable(program.module)) == 8


def test_the_role_of_adapters_finds_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    net = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    tuned = peft.get_peft_model(net, peft.LoraConfig(target_modules=["fc"]))
    layer = "base_model.model.fc"
    names = {f"{layer}.lora_{part}.default.weight" for part in "AB"}
    assert by_role(tuned) == ({layer}, names)


def test_noise_is_where_the_adapters_are() -> None:
    text = "regularize pace on role(adapter) { sigma = 1, weight = 1 }"
    program = trainc.compile(SPEC + text, model())
    assert [site.module for site in program._runner.execution.rewrite.hooks] == [
        f"{layer}.lora" for layer in ADAPTED
    ]
    assert program.step(BATCH)["consistency"] == 0
    assert program.step(BATCH)["consistency"] > 0


def test_an_adapter_is_a_child_of_its_layer_and_the_rest_is_frozen() -> None:
    module = model()
    bare = copy.deepcopy(module)
    trainc.compile(SPEC, module)
    assert [one.layer_name for one in adapters_of(module)] == ADAPTED
    assert trainable(module) == {f"{n}.lora.{x}.weight" for n in ADAPTED for x in "ab"}
    assert list(bare.state_dict()) == [n for n in module.state_dict() if ".lora." not in n]
    assert [type(module.get_submodule(n)) for n in ADAPTED] == [nn.Linear] * 4


def test_its_own_selector_sees_the_model_without_adapters_and_others_see_them() -> None:
    everything = SPEC.replace('"**.mlp.**" & type(Linear)', "type(Linear)")
    norms = 'observe norm_growth on "**.lora.a" {}'
    program = trainc.compile(everything + norms, model())
    (own,) = [c for c in program.plan.clauses if c["kind"] == "adapt"]
    assert own["targets"] == [n for n, m in model().named_modules() if isinstance(m, nn.Linear)]
    (other,) = [c for c in program.plan.clauses if c["kind"] == "observe"]
    assert other["targets"] == [f"{name}.lora.a.weight" for name in own["targets"]]
    again = trainc.compile(everything + norms, program.module)
    assert again.plan.clauses == program.plan.clauses


def test_the_base_keeps_its_places_and_roles() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    before = build_inventory(plain)
    spec = "loss mse optimizer sgd { lr = 0.1 } adapt lora on type(Linear) { rank = 2, alpha = 4 }"
    trainc.compile(spec, plain)
    after = build_inventory(plain)
    for entry in before.modules:
        assert (entry.place, entry.roles) == (
            after.module[entry.name].place,
            after.module[entry.name].roles - {ADAPTER},
        )
    assert after.module["2.lora.b"].place == before.module["2"].place
    assert after.module["2.lora.b"].roles == frozenset()
    assert base_inventory(plain) == before


def test_plan_adapts_a_copy_and_gives_the_plan_of_the_program() -> None:
    module = model()
    before = state_of(module)
    plan = trainc.plan(SPEC, module)
    assert state_of(module) == before
    program = trainc.compile(SPEC, module)
    assert plan.hash == program.plan.hash
    assert trainc.plan(SPEC, module).hash == plan.hash
    names = {row["name"] for row in plan.parameters if row["optimizer"]}
    assert names == trainable(module)


# again


def test_a_second_compile_recognises_what_is_there() -> None:
    first = trainc.compile(SPEC, model())
    first.step(BATCH)
    module = first.module
    before, state = copy.deepcopy(module.state_dict()), state_of(module)
    parameters = {name: id(p) for name, p in module.named_parameters()}
    second = trainc.compile(SPEC, module)
    assert state_of(module) == state
    assert_same(before, module.state_dict())
    assert parameters == {name: id(p) for name, p in module.named_parameters()}
    assert second.plan.hash == first.plan.hash


def test_another_strength_keeps_the_values() -> None:
    first = trainc.compile(SPEC, model())
    first.step(BATCH)
    module = first.module
    out, values = module(IDS).detach(), copy.deepcopy(module.state_dict())
    bare = copy.deepcopy(module)
    for one in adapters_of(bare):
        one.remove()
    second = trainc.compile(SPEC.replace("alpha = 4", "alpha = 8, dropout = 0.5"), module)
    assert_same(values, module.state_dict())
    module.eval()
    doubled = module.get_submodule("blocks.0.mlp.fc")(torch.ones(1, 16))
    plain = bare.get_submodule("blocks.0.mlp.fc")(torch.ones(1, 16))
    trainc.compile(SPEC, module)
    single = module.get_submodule("blocks.0.mlp.fc")(torch.ones(1, 16))
    torch.testing.assert_close(doubled - plain, 2 * (single - plain), rtol=1e-4, atol=1e-6)
    module.train()
    assert torch.equal(module(IDS), out)
    assert second.plan.hash != first.plan.hash


def test_another_selection_of_what_trains_is_obeyed() -> None:
    module = trainc.compile(SPEC, model()).module
    trainc.compile(SPEC.replace("alpha = 4", 'alpha = 4, train = "head"'), module)
    assert "head.weight" in trainable(module)
    trainc.compile(SPEC, module)
    assert "head.weight" not in trainable(module)


def test_a_spec_that_adapts_nothing_takes_the_model_as_it_is() -> None:
    module = trainc.compile(SPEC, model()).module
    state = state_of(module)
    program = trainc.compile(BASE, module)
    program.step(BATCH)
    assert state_of(module) == state
    assert {row["name"] for row in program.plan.parameters if row["optimizer"]} == trainable(module)


def test_a_copy_runs_its_own_adapters() -> None:
    program = trainc.compile(SPEC, model())
    program.step(BATCH)
    twin = copy.deepcopy(program.module)
    assert torch.equal(twin(IDS), program.module(IDS))
    before = program.module(IDS).detach()
    with torch.no_grad():
        twin.get_parameter("blocks.0.mlp.fc.lora.b.weight").add_(1)
    assert torch.equal(program.module(IDS), before)
    assert not torch.equal(twin(IDS), before)


def test_checks_run_the_adapters_and_not_the_users_hooks() -> None:
    program = trainc.compile(SPEC, model())
    program.step(BATCH)
    before, called = program.module(IDS).detach(), []
    program.module.register_forward_hook(lambda *_: called.append(1))
    with undisturbed(program.module):
        assert torch.equal(program.module(IDS), before)
    assert called == []


# refused


FORM = (
    LORA.replace("rank = 2", "rank = 3"),
    "`blocks.0.mlp.fc.lora` is in the model already, with another form",
)
FEWER = (
    LORA.replace('"**.mlp.**"', '"**.mlp.fc"'),
    "`blocks.0.mlp.proj.lora` from an earlier program",
)
WRONG = [
    (LORA.replace("{", "from 2 steps {"), "remove `from 2 steps`"),
    (LORA.replace("{", "until 50% {"), "remove `until 50%`"),
    (LORA.replace("{", "every 2 steps {"), "remove `every 2 steps`"),
    (LORA + LORA.replace("lora on", "lora as two on"), "two `adapt lora` clauses select `blocks.0.mlp.fc`"),
    (LORA.replace("mlp", "nowhere"), "the selector matches nothing"),
    (LORA + 'lr layer_decay on "nowhere" { decay = 0.5 }', "the selector matches nothing"),
    (LORA + 'noise_scale gns on "head" { smooth = 2 steps }', "frozen"),
    (LORA + 'regularize l2_sp on "**.lora.a" from 3 steps until 2 steps { weight = 1 }', "never acts"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("clauses", "message", "adapted"),
    [
        *((*case, True) for case in [FORM, FEWER, *WRONG]),
        *((*case, False) for case in WRONG),
    ],
)
def test_a_mistake_is_located_and_leaves_the_model_as_it_was(
    clauses: str, message: str, adapted: bool
) -> None:
    module = trainc.compile(SPEC, model()).module if adapted else model()
    before = state_of(module)
    for act in (trainc.compile, trainc.plan):
        with pytest.raises(trainc.SpecError) as raised:
            act(BASE + clauses, module)
        assert message in str(raised.value)
        assert all(d.labels for d in raised.value.diagnostics)
        assert state_of(module) == before


def test_what_a_clause_froze_is_named_in_its_train() -> None:
    with pytest.raises(trainc.SpecError) as raised:
        trainc.plan(SPEC + "mask bitfit", model())
    (found,) = raised.value.diagnostics
    assert "name them in `train` of the clause that adds adapters" in (found.help or "")
    mine = SPEC.replace("alpha = 4", "alpha = 4, train = role(bias)")
    program = trainc.compile(mine + "mask bitfit on role(bias)", model())
    program.step(BATCH)
    frozen = model()
    frozen.requires_grad_(False)
    with pytest.raises(trainc.SpecError) as raised:
        trainc.plan(BASE + "mask bitfit", frozen)
    assert not any("`train`" in (one.help or "") for one in raised.value.diagnostics)


def test_a_name_that_the_layer_has_is_not_taken() -> None:
    module: Any = model()
    module.blocks[1].mlp.fc.lora = 3
    with pytest.raises(trainc.SpecError, match="has an attribute `lora` of its own"):
        trainc.compile(SPEC, module)
    assert adapters_of(module) == []


def test_to_train_frozen_parameters_alone_is_refused() -> None:
    module = model()
    module.get_parameter("head.weight").requires_grad_(False)
    with pytest.raises(
        trainc.SpecError, match="all parameters that it is told to train are frozen"
    ):
        trainc.compile(SPEC.replace("alpha = 4", 'alpha = 4, train = "head"'), module)


def test_what_the_user_froze_is_frozen_after_merging() -> None:
    module = model()
    module.get_parameter("embed.token.weight").requires_grad_(False)
    program = trainc.compile(SPEC, module)
    merged = program.merge()
    assert trainable(merged) == {n for n, _ in model().named_parameters()} - {"embed.token.weight"}


# with other clauses


@pytest.mark.parametrize(
    "clause",
    [
        'noise_scale gns on "**.lora.*" { smooth = 2 steps }',
        'regularize pace on "**.lora.b" { sigma = 0.2, weight = 0.1 }',
        'noise_scale gns on "**.attn.*" { smooth = 2 steps }',
        'noise_scale gns on "**.mlp.fc" { smooth = 2 steps }',
        'mask magnitude on "**.lora.*" { density = 50% }',
        'regularize pace on "**.mlp.fc" { sigma = 0.2, weight = 0.1 }',
        "regularize distill { weight = 0.5 }",
        "regularize ema { decay = 0.5 }",
        "perturb sam { rho = 0.1 }",
        "lr trust_ratio",
    ],
)
def test_graph_and_modules_agree_under_another_clause(clause: str) -> None:
    spec = (
        BASE
        + LORA.replace("alpha = 4", 'alpha = 4, train = "**.attn" | "**.fc", init = gaussian')
        + clause
    )
    programs = [trainc.compile(spec, model().double(), executor=e) for e in ("graph", "module")]
    for _ in range(4):
        one, two = (program.step(BATCH) for program in programs)
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert value == pytest.approx(two[name], rel=1e-9, nan_ok=True), name
    for name, parameter in programs[0].module.named_parameters():
        other = programs[1].module.get_parameter(name)
        torch.testing.assert_close(parameter, other, rtol=1e-9, atol=1e-11, msg=name)


def test_a_users_hook_is_a_reason_for_modules_and_an_adapter_is_none() -> None:
    spec = SPEC + 'noise_scale gns on "**.lora.*" { smooth = 2 steps }'
    program = trainc.compile(spec, model())
    program.step(BATCH)
    assert program.graph_refused is None
    program.module.get_submodule("blocks.0.mlp.fc").register_forward_hook(lambda *_: None)
    program.step(BATCH)
    assert program.graph_refused is not None
    assert "`blocks.0.mlp.fc` has a forward hook" in program.graph_refused


def test_a_compiled_forward_runs_the_adapters() -> None:
    program, plain = (trainc.compile(SPEC, model()) for _ in range(2))
    program.forward = torch.compile(program.module, backend="aot_eager")
    for _ in range(3):
        assert program.step(BATCH)["loss"] == pytest.approx(plain.step(BATCH)["loss"], rel=1e-5)
    for name, parameter in plain.module.named_parameters():
        torch.testing.assert_close(
            program.module.get_parameter(name), parameter, rtol=1e-4, atol=1e-5
        )


# what an adapter may change


class Prompt(Construct, AdapterRule):
    """Trained tokens in front of what a block is given, which its output does not have."""

    kind: ClassVar = "adapt"
    name: ClassVar = "prompt"
    targets: ClassVar = "modules"
    effects: ClassVar = (Effect("forward", "add tokens", ("params", "inputs"), ("forward",)),)

    tokens: int = Field(default=2, description="how many")

    def adapt(self, to: Adapting) -> None:
        for entry in to.modules():
            to.add(entry.name, lambda: {"tokens": nn.Parameter(torch.empty(self.tokens, 16))})
        to.train_only([])

    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        nn.init.normal_(tensor, generator=generator)

    def change_inputs(
        self, layer: Any, adapter: Any, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (x,) = args
        return (torch.cat([adapter.tokens.expand(len(x), -1, -1), x], 1),), named

    def change_output(self, layer: Any, adapter: Any, inputs: Any, output: Tensor) -> Tensor:
        assert inputs[0].shape[1] == output.shape[1]
        return output[:, self.tokens :]


def test_an_adapter_may_change_the_inputs_of_a_block() -> None:
    base = trainc.check(BASE).spec
    assert base is not None
    clauses = (*base.clauses, Clause(Prompt(), on=Glob("blocks.*")))
    programs = []
    for executor in ("graph", "module"):
        program = trainc.compile(Spec(clauses), model().double(), executor=executor)
        assert trainable(program.module) == {f"blocks.{i}.prompt.tokens" for i in range(2)}
        losses = [program.step(BATCH)["loss"] for _ in range(3)]
        assert losses[2] < losses[0]
        programs.append((program, losses))
    (one, mine), (two, theirs) = programs
    assert mine == pytest.approx(theirs, rel=1e-12)
    bare, block = model().double(), model().double().get_submodule("blocks.0")
    x = bare.get_submodule("embed")(IDS)
    tokens = two.module.get_parameter("blocks.0.prompt.tokens")
    want = block(torch.cat([tokens.expand(4, -1, -1), x], 1))[:, 2:]
    torch.testing.assert_close(
        two.module.get_submodule("blocks.0")(x), want, rtol=1e-12, atol=1e-12
    )
    state = copy.deepcopy(one.module.state_dict())
    with pytest.raises(ValueError, match="`adapt prompt` has no way to merge its adapters"):
        one.merge()
    assert_same(state, dict(one.module.state_dict()))
    one.step(BATCH)


def test_a_sharded_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainc.compiler.lower.adapting.is_sharded", lambda parameter: True)
    with pytest.raises(trainc.SpecError, match="compile before you shard the model"):
        trainc.compile(SPEC, model())


def test_the_model_itself_may_be_the_layer_and_be_called_by_keyword() -> None:
    text = "loss mse optimizer sgd { lr = 0.1 } adapt lora on type(Linear) { rank = 2, alpha = 4 }"
    module = nn.Linear(4, 3)
    program = trainc.compile(text, module)
    assert trainable(module) == {"lora.a.weight", "lora.b.weight"}
    x = torch.ones(5, 4)
    for _ in range(2):
        program.step((x, torch.zeros(5, 3)))
    assert torch.equal(module(input=x), module(x))
    want = module(x).detach()
    torch.testing.assert_close(program.merge()(x), want)


class Direct(nn.Module):
    """Uses the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.one(x) @ self.two.weight
        return found


def test_an_adapter_that_does_not_run_is_noted_once() -> None:
    text = "loss mse optimizer sgd { lr = 0.1 } adapt lora on type(Linear) { rank = 2, alpha = 4 }"
    program = trainc.compile(text, Direct())
    x = torch.ones(3, 4)
    program.step((x, x))
    (note,) = program.report().notes
    assert note.startswith("`two.lora` did not run in the first step")
    program.step((x, x))
    assert program.report().notes == ()


# saved, resumed, run


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_saved_program_is_loaded_on_the_bare_and_on_the_adapted_model(
    executor: Any, tmp_path: Path
) -> None:
    spec = SPEC + 'noise_scale gns on "**.lora.*" { smooth = 2 steps }'
    program = trainc.compile(spec, model(), executor=executor)
    program.step(BATCH)
    program.save(tmp_path)
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    for given in (other, trainc.compile(BASE + LORA, model()).module):
        loaded = trainc.load(tmp_path, given, executor=executor)
        assert_same(dict(loaded.module.state_dict()), dict(program.module.state_dict()))
        assert loaded.plan.model == program.plan.model
        assert (
            loaded.execution.trial(BATCH, executor).loss
            == program.execution.trial(BATCH, executor).loss
        )
        loaded.load_state_dict(program.state_dict())
        kept = copy.deepcopy(program.state_dict())
        for _ in range(2):
            assert loaded.step(BATCH) == program.step(BATCH)
        program.load_state_dict(kept)
    assert trainc.load(tmp_path, model()).merge().state_dict().keys() == model().state_dict().keys()


def test_a_saved_program_is_not_loaded_on_another_base_or_form(tmp_path: Path) -> None:
    trainc.compile(SPEC, model()).save(tmp_path)
    wider = gpt(layers=2, width=32, heads=2, context=8, vocabulary=24)
    without = nn.Sequential(nn.Linear(3, 3))
    ranked = trainc.compile(SPEC.replace("rank = 2", "rank = 3"), model()).module
    for module, message in (
        (wider, "`embed.token.weight` was float32"),
        (without, "a parameter `embed.token.weight`, which this"),
        (ranked, "is in the model already, with another form"),
    ):
        before = state_of(module)
        with pytest.raises(LoadError, match=message):
            trainc.load(tmp_path, module)
        assert state_of(module) == before
    trainc.compile(BASE, model()).save(tmp_path)
    with pytest.raises(LoadError, match="which the program was not saved with"):
        trainc.load(tmp_path, trainc.compile(SPEC, model()).module)


HEAD = """
model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }
data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 20_000 }
loss cross_entropy
optimizer adamw { lr = 1e-2 }
"""
ADAPT = 'adapt lora on "blocks.**" & type(Linear) { rank = 2, alpha = 4 }\n'


def weights(run: Path) -> dict[str, Tensor]:
    found = checkpoint.find_latest(run / "checkpoints").path
    assert found is not None
    state: dict[str, Tensor] = checkpoint.load_checkpoint(found)["program"]["model"]
    return state


def test_a_run_starts_from_a_bare_run_and_goes_on_from_an_adapted_one(tmp_path: Path) -> None:
    run = "run { length = 4 steps, seed = 5, checkpoint = 2 steps START }\n"
    plain = HEAD + run.replace("START", "")
    train(plain, tmp_path / "bare", quiet=True)
    first = HEAD + ADAPT + run.replace("START", f', start = "{tmp_path / "bare"}"')
    train(first, tmp_path / "first", quiet=True)
    bare, adapted = weights(tmp_path / "bare"), weights(tmp_path / "first")
    assert_same(bare, {n: t for n, t in adapted.items() if ".lora." not in n})
    assert adapted["blocks.0.mlp.fc.lora.b.weight"].any()
    newest = checkpoint.find_latest(tmp_path / "first/checkpoints").path
    assert newest is not None
    newest.rename(tmp_path / "newest")
    train(first, tmp_path / "first", quiet=True, resume=True)
    assert_same(adapted, weights(tmp_path / "first"))
    second = (
        HEAD
        + ADAPT
        + run.replace("START", f', start = "{tmp_path / "first"}"').replace("4 steps", "1 steps")
    )
    train(second.replace("1e-2", "0"), tmp_path / "second", quiet=True)
    assert_same(adapted, weights(tmp_path / "second"))
    with pytest.raises(trainc.SpecError, match=r"was float32.*and is float32"):
        train(first.replace("rank = 2", "rank = 3"), tmp_path / "first", quiet=True, resume=True)
    with pytest.raises(trainc.SpecError, match="cannot be loaded into this model"):
        train(second.replace("rank = 2", "rank = 3"), tmp_path / "third", quiet=True)


# of several clauses, and of somebody else's construct


def test_adapters_of_several_clauses_are_written_to_folders_of_their_names(tmp_path: Path) -> None:
    two = SPEC + 'adapt dora as heads on "head" { rank = 1, alpha = 1, train = "ln_f" }'
    program, fresh = (trainc.compile(two, model()) for _ in range(2))
    program.step(BATCH)
    assert program.save_adapters(tmp_path / "out") == tmp_path / "out"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["heads", "lora"]
    fresh.load_adapters(tmp_path / "out")
    assert_same(dict(fresh.module.state_dict()), dict(program.module.state_dict()))
    assert not torch.equal(
        fresh.module.get_parameter("ln_f.weight"), model().get_parameter("ln_f.weight")
    )
    (tmp_path / "out/heads/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        fresh.load_adapters(tmp_path / "out")


PAIRS = {
    "lora, dora": ("lora { rank = 2, alpha = 2, bias = update }", "dora { rank = 3, alpha = 2 }"),
    "dora, lora": ("dora { rank = 3, alpha = 2 }", "lora { rank = 2, alpha = 2, bias = update }"),
    "lora, lora_mul": ("lora { rank = 2, alpha = 2, bias = update }", "lora_mul { rank = 3 }"),
    "lora_mul, dora": ("lora_mul { rank = 3 }", "dora { rank = 3, alpha = 2, dropout = 0.5 }"),
}


@pytest.mark.parametrize("clauses", PAIRS.values(), ids=PAIRS)
def test_two_adapters_of_a_layer_merge_to_what_they_compute(clauses: tuple[str, str]) -> None:
    spec = BASE + "".join(f"adapt {c} ".replace(" {", ' on "**.fc" {') for c in clauses)
    program = trainc.compile(spec, model().double())
    for _ in range(4):
        program.step(BATCH)
    module: Any = program.module.eval()
    with torch.no_grad():
        before = module(IDS)
        read = read_weight(
            module, next(w for w in build_inventory(module).weights if ".fc." in w.name)
        )
        program.module.train()
        program.merge()
        torch.testing.assert_close(module.eval()(IDS), before, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(before, model().double()(IDS), rtol=1e-3)
    torch.testing.assert_close(read, module.blocks[0].mlp.fc.weight.detach())


def test_two_clauses_of_one_kind_on_a_layer_are_named() -> None:
    spec = SPEC + LORA.replace("lora on", "lora as more on").replace("rank = 2", "rank = 3")
    with pytest.raises(trainc.SpecError) as raised:
        trainc.compile(spec, model())
    assert {d.rule for d in raised.value.diagnostics} == {"claimed-twice"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
@pytest.mark.parametrize("clause", ["prompt { tokens = 2 }", "parallel { rank = 2 }"])
def test_an_adapter_of_a_compiled_block_is_that_of_the_block(clause: str) -> None:
    clause = f"adapt {clause}".replace(" {", ' on "blocks.0" {')
    plain, compiled = model(), model()
    blocks: Any = compiled.get_submodule("blocks")
    blocks[0] = torch.compile(blocks[0], backend="eager")
    losses = []
    for module in (plain, compiled):
        program = trainc.compile(BASE + clause, module)
        losses.append([program.step(BATCH)["loss"] for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] != losses[0][2]


def test_what_evaluation_uses_is_merged_and_written(tmp_path: Path) -> None:
    averaged = SPEC.replace("alpha = 4", 'alpha = 4, train = "head"')
    program, fresh = (
        trainc.compile(averaged + "regularize ema { decay = 0.5 }", model()) for _ in range(2)
    )
    for _ in range(3):
        program.step(BATCH)
    trained = program.module(IDS).detach()
    with program.evaluation_weights():
        want = program.module(IDS).detach()
        with pytest.raises(RuntimeError, match="`merge` was called inside"):
            program.merge()
    assert not torch.allclose(trained, want, rtol=1e-4, atol=1e-5)
    program.save_adapters(tmp_path)
    fresh.load_adapters(tmp_path)
    assert torch.equal(fresh.module(IDS), want)
    torch.testing.assert_close(program.merge()(IDS), want, rtol=1e-4, atol=1e-5)


def test_a_program_without_adapters_says_so(tmp_path: Path) -> None:
    program = trainc.compile(BASE, model())
    for act in (
        program.merge,
        lambda: program.save_adapters(tmp_path),
        lambda: program.load_adapters(tmp_path),
    ):
        with pytest.raises(ValueError, match="no adapters"):
            act()
    program.step(BATCH)


def test_somebody_elses_adapter_merges_and_is_kept_in_a_file(tmp_path: Path) -> None:
    with other_package.installed(tmp_path / "site"):
        setup = other_package.setup()
        spec = setup.rest + " adapt gain on type(Linear) { strength = 2 }"
        batch = setup.batch(0)
        program, fresh = (trainc.compile(spec, setup.model().double()) for _ in range(2))
        double = (batch[0].double(), batch[1].double())
        for _ in range(3):
            program.step(double)
        program.save_adapters(tmp_path / "kept")
        fresh.load_adapters(tmp_path / "kept")
        want = program.module(double[0]).detach()
        assert torch.equal(fresh.module(double[0]), want)
        assert not torch.equal(setup.model().double()(double[0]), want)
        torch.testing.assert_close(program.merge()(double[0]), want, rtol=1e-12, atol=1e-12)
        other = trainc.compile(spec.replace("type(Linear)", '"0"'), setup.model().double())
        with pytest.raises(ValueError, match=r"has `3\.gain\.g`, which this program does not have"):
            other.load_adapters(tmp_path / "kept")


def test_a_program_whose_adapters_another_has_merged_or_changed_does_not_go_on_without_them() -> (
    None
):
    module = model()
    first = trainc.compile(SPEC, module)
    first.step(BATCH)
    trainc.compile(SPEC, module).step(BATCH)
    first.step(BATCH)
    second = trainc.compile(SPEC.replace("alpha = 4", "alpha = 8"), module)
    with pytest.raises(SiteError, match=r"lora\..* is no longer in the model"):
        first.step(BATCH)
    second.step(BATCH)
    third = trainc.compile(SPEC.replace("alpha = 4", "alpha = 8"), module)
    third.step(BATCH)
    third.merge()
    with pytest.raises(SiteError, match=r"or its adapter was removed, merged"):
        second.step(BATCH)
