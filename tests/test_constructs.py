"""What every construct promises. Nothing here names a construct: each brings its example, and its test module the
comparison of what it compiles to with its own `reference()`."""

import copy
import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.driver.compile import resolve_spec
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import PHASES, Construct
from trainc.dsl.reading.fields import read_field
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration

CATALOG = trainc.catalog()
ALL = [pytest.param(c, id=f"{k} {n}") for (k, n), c in sorted(CATALOG.items())]
WORDS_ONLY = {"model", "data", "run"}
"""Kinds that name things and compute nothing: there is no arithmetic to compare."""
COMPUTING = [
    pytest.param(c, id=f"{k} {n}") for (k, n), c in sorted(CATALOG.items()) if k not in WORDS_ONLY
]
CAN_BE_OFF = [pytest.param(c, id=f"{k} {n}") for (k, n), c in sorted(CATALOG.items()) if c.identity]


def example(construct: type[Construct]) -> Clause:
    """Return the clause of the construct's own example."""
    checked = trainc.check(construct.usage)
    assert checked.spec is not None, checked.diagnostics
    (clause,) = [c for c in checked.spec.clauses if type(c.construct) is construct]
    return clause


def spec_around(clause: Clause | None) -> Spec:
    """Return a spec with this clause, and what any program needs of the other kinds."""
    base, _ = resolve_spec(
        "loss cross_entropy optimizer adamw { lr = 1e-2, weight_decay = 0.1 } run { length = 40 steps, seed = 3 }"
    )
    given = [] if clause is None or clause.kind in ("model", "data") else [clause]
    kinds = {c.kind for c in given}
    return Spec((*[c for c in base.clauses if c.kind not in kinds], *given))


def model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=3, width=32, heads=2, context=12, vocabulary=32)


def batch(seed: int, construct: type[Construct]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (6, 13), generator=g)
    if (construct.kind, construct.name) == ("loss", "mse"):
        return ids[:, :-1], torch.randn(6, 12, 32, generator=g)
    return ids[:, :-1], ids[:, 1:]


def trained(
    spec: Spec, construct: type[Construct], steps: int = 5, double: bool = False
) -> Program:
    program = trainc.compile(spec, model().double() if double else model())
    for seed in range(steps):
        program.step(batch(seed, construct))
    return program


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("construct", ALL)
def test_its_example_is_a_valid_spec(construct: type[Construct]) -> None:
    assert example(construct).construct.kind == construct.kind


@pytest.mark.parametrize("construct", ALL)
def test_it_is_documented_and_cited(construct: type[Construct]) -> None:
    assert construct.__doc__
    assert construct.__doc__ != Construct.__doc__
    assert construct.cite
    for name, field in construct.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("construct", ALL)
def test_its_effects_are_in_phases_of_the_step(construct: type[Construct]) -> None:
    assert all(effect.phase in PHASES and effect.action for effect in construct.effects)
    assert construct.effects or construct.kind in WORDS_ONLY


@pytest.mark.parametrize("construct", ALL)
def test_the_same_spec_has_the_same_hash(construct: type[Construct]) -> None:
    one, two = spec_around(example(construct)), spec_around(example(construct))
    assert one == two
    assert one.fingerprint == two.fingerprint
    assert Spec.from_json(one.to_json(), CATALOG).fingerprint == one.fingerprint
    if construct.kind not in ("model", "data"):
        assert trainc.plan(one, model()).hash == trainc.plan(two, model()).hash


@pytest.mark.parametrize("construct", CAN_BE_OFF)
def test_strength_zero_is_bit_identical_to_absent(construct: type[Construct]) -> None:
    absent = trained(spec_around(None), construct)
    clause = example(construct)
    for name, text in construct.identity.items():
        value = read_field(construct.model_fields[name], text)
        fields = {n: getattr(clause.construct, n) for n in construct.model_fields} | {name: value}
        off = Clause(construct(**fields), clause.on, clause.start, clause.stop, clause.every)
        assert_same_weights(absent.module, trained(spec_around(off), construct).module)


@pytest.mark.parametrize("construct", COMPUTING)
def test_before_from_it_is_absent_or_from_is_refused(construct: type[Construct]) -> None:
    clause = example(construct)
    later = Clause(clause.construct, clause.on, start=Duration(30, "steps"))
    refused = ""
    try:
        program = trained(spec_around(later), construct, double=True)
    except trainc.SpecError as error:
        refused = str(error)
    if refused:
        assert "remove `from 30 steps`" in refused
        return
    # Tensors of which only chosen entries train wait for the choice.
    waiting = [name for name, mask in program.execution.method.masks.items() if mask.separate]
    wanted = (
        model().double() if waiting else trained(spec_around(None), construct, double=True).module
    )
    for name, parameter in program.module.named_parameters():
        if name in waiting or not waiting:
            want = wanted.get_parameter(name)
            torch.testing.assert_close(parameter, want, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("construct", COMPUTING)
def test_a_resumed_run_is_bit_equal(construct: type[Construct]) -> None:
    spec = spec_around(example(construct))
    straight = trainc.compile(spec, model())
    expected = [straight.step(batch(seed, construct)) for seed in range(3)]
    state = copy.deepcopy(straight.state_dict())
    expected = [straight.step(batch(seed, construct)) for seed in range(3, 7)]
    fresh = model()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1.0)
    later = trainc.compile(spec, fresh)
    later.load_state_dict(state)
    for seed, want in zip(range(3, 7), expected, strict=True):
        got = later.step(batch(seed, construct))
        assert got.keys() == want.keys()
        assert all(
            a == b or (math.isnan(a) and math.isnan(b))
            for a, b in zip(got.values(), want.values(), strict=True)
        )
    assert_same_weights(straight.module, later.module)


def companion(construct: type[Construct]) -> ModuleType:
    """Import tests/compiler/constructs/test_<name>.py."""
    path = Path(__file__).parent / "compiler/constructs" / f"test_{construct.name}.py"
    assert path.exists(), f"{construct.title} has no test module {path.name}"
    loaded = importlib.util.spec_from_file_location(f"of_{construct.name}", path)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


@pytest.mark.parametrize("construct", COMPUTING)
def test_compiled_equals_its_reference_in_float64(construct: type[Construct]) -> None:
    module: Any = companion(construct)
    compiled, reference = module.compiled_and_reference()
    assert compiled, "nothing was compared"
    assert compiled.keys() == reference.keys()
    for name, value in compiled.items():
        assert value.dtype == torch.float64, name
        torch.testing.assert_close(value, reference[name], rtol=1e-9, atol=1e-12)
