"""What is printed reads back as what it was."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trainc.dsl.printing.canonical import format_statement
from trainc.dsl.printing.formatter import format_source
from trainc.dsl.reading.field_types import CONDITION, DURATION, EXPRESSION, RANGE, SELECTOR
from trainc.dsl.syntax import ast
from trainc.dsl.syntax.parser import parse
from trainc.dsl.text.source import Source
from trainc.dsl.text.vocabulary import ROLES
from trainc.dsl.values import value_json as v

NAMES = st.sampled_from(
    ["a", "gns", "depth", "lr", "steps", "pace.loss", "run", "b2", "token", "data"]
)
WORDS = st.sampled_from(["a", "width", "loss", "seconds", "x_1"])
NUMBERS = st.one_of(
    st.integers(0, 10**9).map(str),
    st.floats(0, 1e30, allow_nan=False).map(repr),
    st.sampled_from(["3e-4", "1_000", "2k", "1.5M", "7G", "2T", "0.5"]),
).map(ast.Num)
UNITS = st.sampled_from(
    ["step", "steps", "samples", "tokens", "epoch", "seconds", "minutes", "hour", "%"]
)
STRINGS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12).map(ast.Str)
IDENTS = NAMES.map(ast.Ident)
LEAVES = st.one_of(NUMBERS, st.builds(ast.Measure, NUMBERS, UNITS), STRINGS, IDENTS)
OPERATORS = (
    "or",
    "and",
    "then",
    "|",
    "&",
    "+",
    "-",
    "*",
    "/",
    "<",
    ">",
    "<=",
    ">=",
    "==",
    "!=",
    "..",
    "on",
    "where",
)


def _grow(inner: st.SearchStrategy[ast.Node]) -> st.SearchStrategy[ast.Node]:
    keys = st.one_of(st.none(), st.sampled_from(["to", "from", "over", "every"]).map(ast.Ident))
    arguments = st.lists(st.builds(ast.Argument, keys, inner), max_size=3).map(tuple)
    return st.one_of(
        st.builds(ast.Infix, st.sampled_from(OPERATORS), inner, inner),
        st.builds(ast.Infix, st.just("is"), inner, IDENTS),
        st.builds(ast.Infix, st.just("expect"), inner, NUMBERS),
        st.builds(ast.Prefix, st.sampled_from(["-", "not"]), inner),
        st.builds(ast.Apply, IDENTS, arguments),
        st.builds(ast.Items, st.lists(inner, max_size=3).map(tuple)),
    )


NODES: st.SearchStrategy[ast.Node] = st.recursive(LEAVES, _grow, max_leaves=8)
LABELS = WORDS.map(ast.Ident)
FIELDS = st.lists(st.builds(ast.Field, LABELS, NODES), max_size=4).map(tuple)


@st.composite
def _clauses(draw: st.DrawFn) -> ast.ClauseTree:
    parts = [ast.Part("as", draw(LABELS))] if draw(st.booleans()) else []
    parts += [ast.Part(w, draw(NODES)) for w in ast.PARTS[1:5] if draw(st.booleans())]
    parts += [ast.Part("optional", None)] if draw(st.booleans()) else []
    fields = draw(st.one_of(st.none(), FIELDS))
    kind = draw(st.sampled_from(["run", "model", "lr", "observe"]))
    if kind == "run":
        return ast.ClauseTree(ast.Ident("run"), None, None, tuple(parts), fields)
    construct = draw(st.one_of(st.none(), st.sampled_from(["pace", "step"]).map(ast.Ident)))
    path = draw(STRINGS) if construct is None else draw(st.one_of(st.none(), STRINGS))
    return ast.ClauseTree(ast.Ident(kind), construct, path, tuple(parts), fields)


ACTIONS = st.one_of(
    st.builds(ast.Action, LABELS, NODES, st.just(True)),
    st.builds(ast.Action, LABELS, st.one_of(st.none(), STRINGS), st.just(False)),
)
STATEMENTS = st.one_of(
    st.just(ast.Version(ast.Num("1"))),
    st.builds(ast.Let, LABELS, NODES),
    st.builds(ast.Use, STRINGS),
    _clauses(),
    st.builds(
        ast.When,
        NODES,
        st.one_of(st.none(), NODES),
        st.lists(ACTIONS, max_size=3).map(tuple),
        st.one_of(st.none(), NODES),
    ),
)
TREES = st.lists(STATEMENTS, max_size=5).map(lambda s: ast.Tree(tuple(s)))

# Values --------------------------------------------------------------------------------------

AMOUNTS = st.one_of(st.integers(0, 10**12), st.floats(0, 1e12, allow_nan=False))
SIGNED = st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e9, 1e9, allow_nan=False))
DURATIONS = st.one_of(
    st.builds(v.Duration, AMOUNTS, st.sampled_from(v.UNITS[:-1])),
    st.builds(v.Duration, st.floats(0, 1, allow_nan=False), st.just("run")),
)
RANGES = st.tuples(SIGNED, SIGNED).map(lambda pair: v.Range(min(pair), max(pair)))
_ATOMS = st.one_of(
    AMOUNTS.map(v.Number),
    DURATIONS.map(v.Quantity),
    st.sampled_from(["depth", "gns", "gns.noise", "loss"]).map(v.Name),
)


def _grow_number(inner: st.SearchStrategy[v.Expr]) -> st.SearchStrategy[v.Expr]:
    return st.one_of(
        st.builds(v.Binary, st.sampled_from(["+", "-", "*", "/"]), inner, inner),
        st.builds(
            lambda d, x: v.Binary("then", v.called("warmup", v.Quantity(d)), x), DURATIONS, inner
        ),
        st.builds(v.Unary, st.just("neg"), inner),
        st.builds(lambda d, x: v.called("cosine", to=x, over=v.Quantity(d)), DURATIONS, inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda xs: v.called("min", *xs)),
    )


EXPRESSIONS: st.SearchStrategy[v.Expr] = st.recursive(_ATOMS, _grow_number, max_leaves=6)
_TESTS = st.one_of(
    st.builds(
        v.Binary, st.sampled_from(["<", ">", "<=", ">=", "==", "!="]), EXPRESSIONS, EXPRESSIONS
    ),
    st.builds(lambda x: v.Binary("is", x, v.Name("nan")), EXPRESSIONS),
)
CONDITIONS: st.SearchStrategy[v.Expr] = st.recursive(
    _TESTS,
    lambda inner: st.one_of(
        st.builds(v.Binary, st.sampled_from(["and", "or"]), inner, inner),
        st.builds(v.Unary, st.just("not"), inner),
    ),
    max_leaves=4,
)
_SETS = st.one_of(
    st.sampled_from(["blocks.*", "**.norm", "head"]).map(v.Glob),
    st.lists(st.sampled_from(["Linear", "LayerNorm"]), min_size=1).map(
        lambda n: v.OfType(tuple(n))
    ),
    st.integers(0, 5).map(v.Ndim),
    st.sampled_from(ROLES).map(v.Role),
    st.just(v.DepthRange(0.25, 1)),
    st.just(v.All()),
    st.just(v.Trainable()),
)
_SIZE = v.Binary(">", v.Name("numel"), v.Number(10**6))
SELECTORS: st.SearchStrategy[v.Selector] = st.recursive(
    _SETS,
    lambda inner: st.one_of(
        st.builds(v.Union, inner, inner),
        st.builds(v.Intersection, inner, inner),
        st.builds(v.Difference, inner, inner),
        st.builds(lambda s: v.Where(s, _SIZE), inner),
        st.builds(v.Expect, inner, st.integers(0, 99)),
    ),
    max_leaves=6,
)

# Tests ---------------------------------------------------------------------------------------


def printed(tree: ast.Tree) -> str:
    return "".join(f"{format_statement(statement)}\n" for statement in tree.statements)


@settings(max_examples=300)
@given(TREES)
def test_a_tree_survives_printing(tree: ast.Tree) -> None:
    text = printed(tree)
    parsed = parse(Source("random", text))
    assert not parsed.found
    assert parsed.tree == tree


@given(TREES)
def test_formatting_twice_changes_nothing(tree: ast.Tree) -> None:
    once = format_source(Source("random", printed(tree)))
    assert format_source(Source("random", once)) == once
    assert parse(Source("random", once)).tree == tree


@given(DURATIONS)
def test_a_duration_survives_text_and_json(duration: v.Duration) -> None:
    assert DURATION.accept(str(duration)) == duration
    assert v.from_json(v.to_json(duration)) == duration


@given(RANGES)
def test_a_range_survives_text_and_json(value: v.Range) -> None:
    assert RANGE.accept(str(value)) == value
    assert v.from_json(v.to_json(value)) == value


@given(EXPRESSIONS)
def test_an_expression_survives_text_and_json(expression: v.Expr) -> None:
    assert EXPRESSION.accept(str(expression)) == expression
    assert v.expr_from_json(v.to_json(expression)) == expression


@given(CONDITIONS)
def test_a_condition_survives_text_and_json(condition: v.Expr) -> None:
    assert CONDITION.accept(str(condition)) == condition
    assert v.expr_from_json(v.to_json(condition)) == condition


@given(SELECTORS)
def test_a_selector_survives_text_and_json(selector: v.Selector) -> None:
    assert SELECTOR.accept(str(selector)) == selector
    assert v.selector_from_json(v.to_json(selector)) == selector
