"""Text to tree: Lark's tables are the grammar's, every node knows its place, every mistake is found and placed."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lark
import pytest

from trainc.compiler.catalog import catalog, check
from trainc.dsl.printing.formatter import format_source
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.syntax import ast, grammar
from trainc.dsl.syntax.parser import parse, parse_expression
from trainc.dsl.syntax.tokens import comments_of
from trainc.dsl.syntax.tree_builder import TreeBuilder
from trainc.dsl.text.source import Source, Span

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.train"))
STATEMENTS = """
train 1
use "base.train"
let peak = 3e-4 * (warmup(5%) then cosine(to = 10%, over = 1k steps))
let mats = ("blocks.**" & ndim(2)) | "head.*" - "blocks.0.*" where depth >= 0.5
model "examples.models:gpt" { layers = 4, tags = ["a\\n", b.c, 1_000] }
run from 3 steps until 50% { length = 2M tokens, seed = 7, }
regularize pace("torch.nn:MSELoss") as other on mats expect 12 every 200 steps optional { sigma = 0.5..1.5 }
optimizer adamw { lr = peak, weight_decay = [0.1 on mats, 0 on norms], from = -1, use = (2) }
when loss is nan or not gns > 2 * batch for 10 steps cooldown 1k steps { batch = min(batch, 8 samples), warn "x", stop }
"""
BROKEN: dict[str, list[tuple[str, int, int, str, str]]] = {
    "optimizer adamw { lr = 3e-4, betas = [0.9 0.95] }": [
        ("syntax", 42, 46, "unexpected `0.95`", "expected `,` or `]`")
    ],
    "optimizer adamw { lr = (3e-4 }\nloss mse": [
        ("syntax", 29, 30, "unexpected `}`", "expected `)`")
    ],
    "let a = 1 +\nlet b = a": [("syntax", 12, 15, "unexpected `let`", "expected a value")],
    "run { length = 200steps, seed = }": [("syntax", 15, 23, "`200steps` is not a number", "")],
    "noise_scale gns on norms where { smooth = 1 }\nwhen gns > 2 { stop": [
        ("syntax", 31, 32, "unexpected `{`", "expected a value"),
        ("syntax", 64, 65, "the text ends too early", "expected a value, `,`, `=` or `}`"),
    ],
    'use "a\nlet b = 1': [
        ("syntax", 4, 6, "the string is never closed", 'expected a closing `"` on this line')
    ],
    'model "m:\\f" { a = 1 ; b = [x = 1] }': [
        (
            "syntax",
            9,
            11,
            "`\\f` is not an escape sequence",
            'escapes are `\\"`, `\\\\`, `\\n`, `\\t`',
        ),
        ("syntax", 21, 22, "unexpected `;`", ""),
    ],
    'model "m:\\f" { a = }': [
        (
            "syntax",
            9,
            11,
            "`\\f` is not an escape sequence",
            'escapes are `\\"`, `\\\\`, `\\n`, `\\t`',
        ),
        ("syntax", 19, 20, "unexpected `}`", "expected a value"),
    ],
    "lr temp_balance on mats every every 3 steps": [
        ("syntax", 30, 35, "unexpected `every`", "expected a value")
    ],
    "optimiser sgd { lr = 0.1 } weight = 2": [
        ("unknown-kind", 0, 9, "there is no kind `optimiser`", "")
    ],
    "when loss is nan { }\n} loss mse": [
        ("syntax", 21, 22, "unexpected `}`", "expected a statement")
    ],
    "mask sift on fromage expect x": [("syntax", 28, 29, "unexpected `x`", "expected a number")],
    f"let x = {'-' * 120}1": [
        ("too-deep", 129, 129, "this is nested more than 100 levels deep", "")
    ],
}


@pytest.fixture
def anew() -> Iterator[None]:
    """Forget the parser that was loaded, before and after a test."""
    grammar.parser.cache_clear()
    yield
    grammar.parser.cache_clear()


def found(text: str) -> list[tuple[str, int, int, str, str]]:
    out = []
    for d in parse(Source("spec.train", text)).found:
        assert d.span
        out.append((d.rule, d.span.start, d.span.end, d.message, d.labels[0].text))
    return out


def ast_fields(node: ast.Spanned) -> tuple[str, ...]:
    return getattr(type(node), "__match_args__", ())


def nodes(node: Any) -> Iterator[ast.Spanned]:
    """Yield a node and every node in it."""
    if isinstance(node, tuple):
        for item in node:
            yield from nodes(item)
    elif isinstance(node, ast.Spanned):
        yield node
        for name in ast_fields(node):
            yield from nodes(getattr(node, name))


def test_the_tables_are_those_of_the_grammar() -> None:
    assert grammar.TABLES.read_text(encoding="utf-8") == grammar.tables(), (
        "run `python -m trainc.dsl.syntax.grammar`"
    )


@pytest.mark.usefixtures("anew")
def test_another_version_of_lark_works_the_tables_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = grammar.parser().source_path
    expected = parse(Source("spec.train", STATEMENTS)).tree
    monkeypatch.setattr(lark, "__version__", "9.9.9")
    grammar.parser.cache_clear()
    assert grammar.parser().source_path != loaded
    assert parse(Source("spec.train", STATEMENTS)).tree == expected


def test_every_rule_of_the_grammar_has_a_node() -> None:
    for rule in grammar.parser().rules:
        name = rule.alias or rule.origin.name
        inlined = rule.options.expand1 and not rule.alias
        assert inlined or name.startswith("_") or name in vars(TreeBuilder), name


@pytest.mark.parametrize("count", [1, 100])
def test_every_node_of_a_long_text_knows_its_place(count: int) -> None:
    source = Source("spec.train", STATEMENTS * count)
    parsed = parse(source)
    assert not parsed.found
    assert len(parsed.tree.statements) == 9 * count
    for statement in parsed.tree.statements[-9:]:
        assert parse(Source("part", statement.span.text)).tree.statements == (statement,)
        for node in nodes(statement):
            assert node.span in statement.span
            assert node.span.text == node.span.text.strip()
            if isinstance(node, ast.Node) and not isinstance(node, ast.Ident):  # some are words
                assert parse_expression(Source("part", node.span.text)) == (node, [])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_comments_are_found_where_they_are(path: Path) -> None:
    source = Source(str(path), path.read_text(encoding="utf-8"))
    lines = [line for line in source.text.splitlines() if "#" in line]
    assert [span.text for span in comments_of(source)] == [
        line[line.index("#") :] for line in lines
    ]


@pytest.mark.parametrize("text", BROKEN)
def test_each_mistake_is_found_and_placed(text: str) -> None:
    assert found(text) == BROKEN[text]


def test_what_stands_around_a_broken_statement_is_read() -> None:
    parsed = parse(Source("spec.train", "loss mse\nlet a = = 1\nlet b = 2\nmask sift as kept on {"))
    kept = [statement.span.text for statement in parsed.tree.statements]
    assert kept == ["loss mse", "let b = 2"]
    assert parsed.lost == {"a", "sift", "kept"}


def test_no_more_broken_statements_are_explained_than_anybody_reads() -> None:
    parsed = parse(Source("spec.train", "".join(f"let a{n} = 1 2\n" for n in range(3_000))))
    assert len(parsed.found) == 100
    assert len(parsed.tree.statements) + len(parsed.lost) == 3_000


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("a=", 1, "expected a value"),
        ("a=1 2", 4, "expected the end"),
        ("a=1 loss mse", 4, "expected the end"),
        ("a=(1", 3, "expected `)`"),
        ("a=1 @ 2", 4, ""),
    ],
)
def test_an_expression_is_one_value(text: str, at: int, expected: str) -> None:
    node, problems = parse_expression(Source("--set", text), 2)
    assert node is None
    label = problems[0].labels[0]
    assert (label.span.start, label.text) == (at, expected)


def test_an_expression_behind_a_name_knows_its_place() -> None:
    source = Source("--set", "width = 2 * 3")
    node, problems = parse_expression(source, 7)
    assert not problems
    assert node
    assert node.span == Span(source, 8, 13)


def test_deep_nesting_takes_none_of_pythons_stack() -> None:
    text = f"let a = {'(' * 90}1{')' * 90}\nlet b = {' + '.join('1' * 90)}"
    parse(Source("spec.train", "let a = 1"))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 60)
    try:
        parsed = parse(Source("spec.train", text))
    finally:
        sys.setrecursionlimit(limit)
    assert not parsed.found


@pytest.mark.parametrize(
    "text",
    [
        "optimizer adamw on {} {{ lr = 1e-3 }}".format(" | ".join(f'"b{n}"' for n in range(200))),
        "optimizer adamw {{ lr = {} }}".format(" + ".join(["1e-6"] * 200)),
        "optimizer adamw {{ lr = 1 {} }}".format("* 1 " * 199),
        "when {} {{ stop }}".format(" and ".join(["loss > 1"] * 200)),
        "let many = {}\nmask sift on many {{ density = 1% }}".format(
            " | ".join(f'"b{n}"' for n in range(200))
        ),
    ],
)
def test_a_chain_of_one_operator_is_no_nesting(text: str) -> None:
    spec = check(text).unwrap()
    assert Spec.from_json(spec.to_json(), catalog()) == spec
    assert check(format_source(Source("spec.train", text))).unwrap() == spec


def test_a_chain_has_a_limit_and_so_have_chains_of_chains() -> None:
    chain = " + ".join(["1"] * 250)
    (found,) = check(f"optimizer adamw {{ lr = {chain} }}").diagnostics
    assert "a chain of more than 200 operators" in found.message
    part = " + ".join(["1"] * 150)
    lets = f"let a = {part}\nlet b = a + {part}\n"
    (found,) = check(lets + "optimizer adamw { lr = b }").diagnostics
    assert found.rule == "too-deep"
    assert found.span is not None
    assert found.span.text == "b"


def test_kinds_that_name_constructs_may_follow_each_other() -> None:
    (problem,) = check("loss model\nloss model").diagnostics
    assert problem.rule == "duplicate-label"
