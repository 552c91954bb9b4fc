"""What every construct promises. Nothing here names a construct: each brings its example, and its test module the
comparison of what it compiles to with its own `reference()`."""

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import trainc
from tests import other_package
from tests.conformance import Setup, assert_close_steps, in_double, run_step, train_double
from trainc.compiler.driver.compile import resolve_spec
from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.compiler.program.program import Program
from trainc.dsl.reading.construct import PHASES, Construct
from trainc.dsl.reading.fields import read_field
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration

WORDS_ONLY = {"model", "data", "run"}
"""Kinds that name things and compute nothing: there is no arithmetic to compare."""
with TemporaryDirectory() as _site, other_package.installed(Path(_site)):
    FOUND = dict(sorted(trainc.catalog().items()))
    """All constructs, with those of somebody else's package, which every test finds installed anew."""
    OWN = [key for key, c in FOUND.items() if not c.__module__.startswith(other_package.PACKAGE)]
    CAN_BE_OFF = [key for key, c in FOUND.items() if c.identity]
    MERGED = [
        key
        for key, c in FOUND.items()
        if issubclass(c, AdapterRule) and c.merge is not AdapterRule.merge
    ]
    """Constructs whose adapters can be folded into the layers."""
ALL = list(FOUND)
COMPUTING = [key for key in ALL if key[0] not in WORDS_ONLY]
REFERENCES = [key for key in COMPUTING if key in OWN]


@pytest.fixture(scope="module", autouse=True)
def other_constructs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Install the package of somebody else for the tests of this file."""
    with other_package.installed(tmp_path_factory.mktemp("site")):
        yield


def each(keys: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("construct", keys, ids=map(" ".join, keys), indirect=True)


@pytest.fixture
def construct(request: pytest.FixtureRequest) -> type[Construct]:
    return trainc.catalog()[request.param]


@cache
def companion(construct: type[Construct]) -> ModuleType:
    """Import tests/compiler/constructs/test_<name>.py, or test_<kind>_<name>.py where two kinds have the name."""
    folder = Path(__file__).parent / "compiler/constructs"
    path = folder / f"test_{construct.kind}_{construct.name}.py"
    path = path if path.exists() else folder / f"test_{construct.name}.py"
    assert path.exists(), f"{construct.title} has no test module {path.name}"
    loaded = importlib.util.spec_from_file_location(f"of_{construct.name}", path)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


def setup_of(construct: type[Construct]) -> Setup:
    """Return what the construct is trained on: its test module's `conformance()`, or the small language model."""
    if construct.__module__.startswith(other_package.PACKAGE):
        return other_package.setup()
    if construct.kind in WORDS_ONLY:
        return Setup()
    setup: Setup = getattr(companion(construct), "conformance", Setup)()
    return setup


def example(construct: type[Construct]) -> Clause:
    """Return the clause of the construct's own example."""
    return clause_of(construct, construct.usage)


def clause_of(construct: type[Construct], text: str) -> Clause:
    checked = trainc.check(text)
    assert checked.spec is not None, checked.diagnostics
    (clause,) = [c for c in checked.spec.clauses if type(c.construct) is construct]
    return clause


def trained_clause(construct: type[Construct]) -> Clause:
    """Return the clause that is trained: the example, or what the setup has in its place."""
    return clause_of(construct, setup_of(construct).usage or construct.usage)


def spec_around(clause: Clause | None, setup: Setup) -> Spec:
    """Return a spec with this clause, and what any program needs of the other kinds."""
    base, _ = resolve_spec(setup.rest)
    given = [] if clause is None or clause.kind in ("model", "data") else [clause]
    kinds = {c.kind for c in given}
    return Spec((*[c for c in base.clauses if c.kind not in kinds], *given))


def trained(
    spec: Spec, construct: type[Construct], steps: int = 5, double: bool = False
) -> Program:
    setup = setup_of(construct)
    program = trainc.compile(spec, setup.model().double() if double else setup.model())
    for seed in range(steps):
        batch = setup.batch(seed)
        run_step(program, in_double(batch) if double else batch)
    return program


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@each(ALL)
def test_its_example_is_a_valid_spec(construct: type[Construct]) -> None:
    assert example(construct).construct.kind == construct.kind


@each(ALL)
def test_it_is_documented_and_cited(construct: type[Construct]) -> None:
    assert construct.__doc__
    assert construct.__doc__ != Construct.__doc__
    assert construct.cite
    for name, field in construct.model_fields.items():
        assert field.description, name


@each(ALL)
def test_its_effects_are_in_phases_of_the_step(construct: type[Construct]) -> None:
    assert all(effect.phase in PHASES and effect.action for effect in construct.effects)
    assert construct.effects or construct.kind in WORDS_ONLY


@each(ALL)
def test_the_same_spec_has_the_same_hash(construct: type[Construct]) -> None:
    setup = setup_of(construct)
    one, two = (spec_around(trained_clause(construct), setup) for _ in range(2))
    assert one == two
    assert one.fingerprint == two.fingerprint
    assert Spec.from_json(one.to_json(), trainc.catalog()).fingerprint == one.fingerprint
    if construct.kind not in ("model", "data"):
        assert trainc.plan(one, setup.model()).hash == trainc.plan(two, setup.model()).hash


@each(CAN_BE_OFF)
def test_strength_zero_is_bit_identical_to_absent(construct: type[Construct]) -> None:
    setup, clause = setup_of(construct), trained_clause(construct)
    absent = trained(spec_around(None, setup), construct)
    for name, text in construct.identity.items():
        value = read_field(construct.model_fields[name], text)
        written = clause.construct.model_fields_set
        fields = {n: getattr(clause.construct, n) for n in written} | {name: value}
        off = Clause(construct(**fields), clause.on, clause.start, clause.stop, clause.every)
        assert_same_weights(absent.module, trained(spec_around(off, setup), construct).module)


@each(COMPUTING)
def test_before_from_it_is_absent_or_from_is_refused(construct: type[Construct]) -> None:
    setup, clause = setup_of(construct), trained_clause(construct)
    later = Clause(clause.construct, clause.on, start=Duration(30, "steps"))
    refused = ""
    try:
        program = trained(spec_around(later, setup), construct, double=True)
    except trainc.SpecError as error:
        refused = str(error)
    if refused:
        assert "remove `from 30 steps`" in refused
        return
    # Tensors of which only chosen entries train wait for the choice.
    waiting = [name for name, mask in program.execution.method.masks.items() if mask.separate]
    wanted = (
        setup.model().double()
        if waiting
        else trained(spec_around(None, setup), construct, double=True).module
    )
    for name, parameter in program.module.named_parameters():
        if name in waiting or not waiting:
            want = wanted.get_parameter(name)
            torch.testing.assert_close(parameter, want, rtol=1e-9, atol=1e-10, msg=name)


@each(COMPUTING)
def test_a_resumed_run_is_bit_equal(construct: type[Construct]) -> None:
    setup = setup_of(construct)
    spec = spec_around(trained_clause(construct), setup)
    straight = trainc.compile(spec, setup.model())
    for seed in range(3):
        run_step(straight, setup.batch(seed))
    state, so_far = copy.deepcopy(straight.state_dict()), straight.summary()
    expected = [run_step(straight, setup.batch(seed)) for seed in range(3, 7)]
    fresh = setup.model()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1.0)
    later = trainc.compile(spec, fresh)
    later.load_state_dict(state)
    assert later.summary() == so_far
    for seed, want in zip(range(3, 7), expected, strict=True):
        got = run_step(later, setup.batch(seed))
        assert got.keys() == want.keys()
        assert all(
            a == b or (math.isnan(a) and math.isnan(b))
            for a, b in zip(got.values(), want.values(), strict=True)
        )
    assert_same_weights(straight.module, later.module)
    assert later.summary() == straight.summary()


@each(REFERENCES)
def test_compiled_equals_its_reference_in_float64(construct: type[Construct]) -> None:
    module: Any = companion(construct)
    compiled, reference = module.compiled_and_reference()
    assert compiled, "nothing was compared"
    assert compiled.keys() == reference.keys()
    for name, value in compiled.items():
        assert value.dtype == torch.float64, name
        torch.testing.assert_close(value, reference[name], rtol=1e-9, atol=1e-12)


@each(COMPUTING)
def test_between_its_times_and_after_them_it_is_absent(construct: type[Construct]) -> None:
    setup, clause = setup_of(construct), trained_clause(construct)
    if any(effect.lasting for effect in construct.effects):
        return
    for bound, timed in (
        ("every 4 steps", Clause(clause.construct, clause.on, every=Duration(4, "steps"))),
        ("until 2 steps", Clause(clause.construct, clause.on, stop=Duration(2, "steps"))),
    ):
        refused = ""
        try:
            present = train_double(spec_around(timed, setup), setup, steps=2).program
        except trainc.SpecError as error:
            refused = str(error)
        if refused:
            assert f"remove `{bound}`" in refused
            continue
        absent = trainc.compile(spec_around(None, setup), setup.model().double())
        absent.load_compatible(copy.deepcopy(present.state_dict()))
        for seed in (2, 3):
            batch = in_double(setup.batch(seed))
            got, want = run_step(present, batch), run_step(absent, batch)
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-12), bound
            for name, parameter in present.module.named_parameters():
                want_p = absent.module.get_parameter(name)
                torch.testing.assert_close(parameter, want_p, rtol=1e-9, atol=1e-11, msg=name)


def assert_unless_exempt(exemption: str | None, check: Callable[[], None]) -> None:
    """Make a check, which must fail where the construct declares an exemption."""
    if exemption is None:
        check()
        return
    try:
        check()
    except AssertionError:
        return
    raise AssertionError(f"passes without its exemption, which must go: {exemption}")


def test_an_exemption_must_be_necessary() -> None:
    def fail() -> None:
        raise AssertionError("differs")

    assert_unless_exempt("a reason", fail)
    assert_unless_exempt(None, lambda: None)
    with pytest.raises(AssertionError, match="differs"):
        assert_unless_exempt(None, fail)
    with pytest.raises(AssertionError, match="must go: a reason"):
        assert_unless_exempt("a reason", lambda: None)


@each(COMPUTING)
def test_every_trainable_parameter_has_a_gradient_by_step_2(construct: type[Construct]) -> None:
    setup = setup_of(construct)
    found = train_double(spec_around(trained_clause(construct), setup), setup, steps=2)
    given = {n for one in found.gradients for n, gradient in one.items() if gradient.any()}

    def check() -> None:
        trainable = {n for n, p in found.program.module.named_parameters() if p.requires_grad}
        assert trainable
        assert trainable - given == set()

    assert_unless_exempt(construct.without_gradient, check)


@each(MERGED)
def test_a_merged_model_computes_what_it_did_with_its_adapters(
    construct: type[Construct],
) -> None:
    setup = setup_of(construct)
    program = trained(spec_around(trained_clause(construct), setup), construct, 3, double=True)
    inputs = in_double(setup.batch(9))[0]
    model = program.module.eval()
    with torch.no_grad():
        before = model(inputs)
        torch.testing.assert_close(program.merge()(inputs), before, rtol=1e-11, atol=1e-11)
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in setup.model().named_parameters()
    ]


@each(COMPUTING)
def test_graph_and_modules_agree(construct: type[Construct]) -> None:
    setup = setup_of(construct)
    spec = spec_around(trained_clause(construct), setup)
    graph = train_double(spec, setup, executor="graph")
    assert graph.program.execution.graphs.installed is not None
    assert_close_steps(graph, train_double(spec, setup, executor="module"))


@each(COMPUTING)
def test_any_division_into_micro_batches_agrees(construct: type[Construct]) -> None:
    setup = setup_of(construct)
    spec = spec_around(trained_clause(construct), setup)
    whole = train_double(spec, setup, executor="module")

    def check() -> None:
        for sizes in ((2, 4), (3, 1, 2)):
            parts = train_double(spec, setup, executor="module", sizes=sizes)
            assert_close_steps(parts, whole, metrics=False)
        # Of one size, so that one capture serves.
        parts = train_double(spec, setup, sizes=(3, 3))
        assert_close_steps(parts, whole, metrics=False)

    assert_unless_exempt(construct.division, check)
