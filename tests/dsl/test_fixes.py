"""One mistake of spelling is one message, and `trainc check --fix` corrects what can mean only one thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainc.cli.check import check_quickly, check_specs
from trainc.compiler.catalog import catalog
from trainc.dsl.resolve.fixes import fix_file, fixed_text, safe_edits
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.text.machine_formats import render_sarif
from trainc.dsl.text.source import Source

RIGHT = """train 1
let width = 48
model "examples.models:vit" { width = width }
data "examples.data:digits" { batch = 32 samples }
loss cross_entropy
run { length = 20 epochs, seed = 1, eval = 4 epochs }
optimizer adamw { lr = 2e-3 * (warmup(5%) then cosine(to = 5%)), weight_decay = 0.05 on ndim(2) }
lr layer_decay on all { decay = 0.8 }
regularize pace on "blocks.*.mlp.**" & type(Linear) { sigma = 0.4 * (1 - depth), weight = 0.1 }
when loss is nan { stop }
"""


def wrong(old: str, new: str) -> str:
    assert old in RIGHT
    return RIGHT.replace(old, new, 1)


SAFE = [
    ('"examples.models:vit"', "examples.models:vit"),
    ('"examples.models:vit"', "'examples.models:vit'"),
    ('"examples.models:vit"', "\u201cexamples.models:vit\u201d"),
    ('"examples.models:vit"', "`examples.models:vit`"),
    ('"blocks.*.mlp.**"', "blocks.*.mlp.**"),
    ('"blocks.*.mlp.**"', "\u2018blocks.*.mlp.**\u2019"),
    ("20 epochs", "20 epcohs"),
    ("20 epochs", "20epochs"),
    ("{ decay = 0.8 }", "(decay = 0.8)"),
    ("optimizer adamw {", "optimizer adamv {"),
    ("weight_decay =", "weight_decy ="),
    ("seed = 1,", "seed = 1"),
    ("seed = 1", "seed: 1"),
    ("seed = 1", "seed == 1"),
    ("ndim(2) }", "ndmi(2) }"),
    ("loss is nan", "loss is nam"),
    ("cosine(to", "cosin(to"),
    (" & type", " and type"),
    (" & type", " && type"),
    ("loss cross_entropy", "loss cross_entropy // the usual"),
    ("0.05 on", ".05 on"),
    ("ndim(2) }", "ndim(2), betas = (0.9, 0.999) }"),
    ("optimizer adamw", "optimizer = adamw"),
    ("run {", "run: {"),
    ("stop }", "warn 'it\u2019s over' }"),
]
OTHER = {"betas = (0.9": "betas", "warn 'it": "warn", "// the": "comment"}
"""What is corrected to a spec that is right, but not equal to the right one."""


@pytest.mark.parametrize(("old", "new"), SAFE)
def test_what_can_mean_only_one_thing_is_one_message_and_is_corrected(
    old: str, new: str, tmp_path: Path
) -> None:
    text = wrong(old, new)
    (found,) = load_spec(text, catalog()).diagnostics
    assert found.edit is not None, found
    assert found.edit.safe
    path = tmp_path / "spec.train"
    path.write_text(text)
    fix_file(path, catalog())
    assert load_spec(path, catalog()).diagnostics == ()
    want, got = (load_spec(t, catalog()).unwrap().fingerprint for t in (RIGHT, path.read_text()))
    assert want == got or any(part in new for part in OTHER)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("loss < 3 & steps > 2", "loss < 3 and steps > 2"),
        ("loss < 3 | steps > 2", "loss < 3 or steps > 2"),
        ("loss < 3 && steps > 2", "loss < 3 and steps > 2"),
        ("loss < 3 & steps > 2 | loss > 5", "loss < 3 and steps > 2 or loss > 5"),
        ("loss ≥ 3", "loss >= 3"),
        ("loss ≤ 3 and steps ≠ 2", "loss <= 3 and steps != 2"),
    ],
)
def test_signs_of_conditions_are_corrected(written: str, meant: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.train"
    path.write_text(wrong("loss is nan", written), "utf-8")
    assert all(error.help for error in load_spec(path, catalog()).errors)
    fix_file(path, catalog())
    assert path.read_text("utf-8") == wrong("loss is nan", meant)
    assert load_spec(path, catalog()).diagnostics == ()


def test_a_comparison_of_three_says_how_two_are_joined() -> None:
    (found,) = load_spec(wrong("loss is nan", "1 < loss < 3"), catalog()).errors
    assert found.help == "a condition compares two values: write `and` between two conditions"


@pytest.mark.parametrize(
    ("old", "new", "at"),
    [
        ('"examples.models:vit"', '"examples.models:vit', '"examples.models:vit'),
        ("let width", "let width big", "width big"),
        ("warmup(5%)", "warmup(500%)", "500%"),
        ("lr = 2e-3", "betas = [0.9], lr = 2e-3", "[0.9]"),
        ("20 epochs", "20 parsecs", "parsecs"),
        ("seed = 1", "seed = -1", "-1"),
        ("width = width", "width = widht", "widht"),
    ],
)
def test_what_may_mean_another_thing_is_one_message_and_is_left_alone(
    old: str, new: str, at: str, tmp_path: Path
) -> None:
    text = wrong(old, new)
    found = [d for d in load_spec(text, catalog()).diagnostics if d.severity == "error"]
    assert [d.span.text for d in found if d.span] == [at]
    path = tmp_path / "spec.train"
    path.write_text(text)
    assert fix_file(path, catalog()) == []
    assert path.read_text() == text


@pytest.mark.parametrize(
    "statement",
    [
        'optimizer torch "torch.optim:SGD" { lr = 1 }',
        "optimizer torch(torch.optim.SGD) { lr = 1 }",
        "optimizer adamw lr = 1e-3",
        "optimizer adamw weight_decay = 0.1",
        "optimizer adamw { lr = 1e-3",
        "optimizer adamw { lr = 1,000 }",
        "optimizer adamw { learning_rate = 1e-3 }",
        'regularize pace on "a" "b" { sigma = 1, weight = 1 }',
        "regularize r_drop { weight = 1 } on all",
        "when loss > 2: stop",
        "when loss > 2 stop",
        "when loss > 2 { warn high }",
        "use base.train",
        "run { length = 2 days }",
        "optimizer adamw { lr = 1e-3; weight_decay = 0.1 }",
        "let loss = 3",
        "optimizer adamw { betas = [0.9, 1, 2], lr = 1 }",
    ],
)
def test_one_mistake_is_one_message(statement: str) -> None:
    (found,) = load_spec(f"let width = 3\n{statement}\n", catalog()).errors
    assert found.span is not None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"train": 1, "model": {"path": "a:b"}}', "JSON"),
        ("[1, 2]", "JSON"),
        ("[model]\npath = 3\n", "TOML"),
        ("train: 1\nmodel:\n  path: a:b\n", "YAML"),
        ("---\nmodel: x\n", "YAML"),
        ("# a comment\n\n- model: x\n", "YAML"),
    ],
)
def test_another_format_is_one_message(text: str, name: str) -> None:
    (found,) = load_spec(text, catalog()).diagnostics
    assert found.message == f"this text is {name}, not a spec"


def test_a_let_is_not_called_unused_while_a_statement_cannot_be_read() -> None:
    found = load_spec("let a = 3\nlet b = 4\nmodel ; { w = a }\n", catalog()).diagnostics
    assert {d.rule for d in found} == {"syntax"}
    found = load_spec('let a = 3\nmodl "x:y" { w = a }\n', catalog()).diagnostics
    assert {d.rule for d in found} == {"unknown-kind"}
    found = load_spec("let a = 3\noptimizer adamq { lr = a }\n", catalog()).diagnostics
    assert {d.rule for d in found} == {"unknown-construct"}


def test_equal_messages_are_one() -> None:
    text = "let low = -1\noptimizer adamw on all { lr = low, eps = low }\n"
    found = load_spec(text, catalog()).diagnostics
    assert len(found) == len(set(found)) == 2


def test_many_mistakes_of_one_file_are_corrected_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RIGHT
    for old, new in (SAFE[0], SAFE[4], SAFE[6], SAFE[8], ("decay = 0.05", "decy = 0.05")):
        text = text.replace(old, new, 1)
    path = tmp_path / "spec.train"
    path.write_bytes(("\ufeff" + text).replace("\n", "\r\n").encode())
    path.chmod(0o640)
    assert check_quickly(["--fix", str(path)]) == 0
    said = capsys.readouterr().err
    assert "`epcohs` is now `epochs`" in said
    assert said.count("\n") == 5
    assert path.read_bytes() == ("\ufeff" + RIGHT).replace("\n", "\r\n").encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["spec.train"]


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        ("regularize l2_\n", None),  # `l2_sp` needs a selection and a weight
        ("regularize pcae on all { sigm = 1, wieght = 2 }\n", "regularize pace on all { sigma = 1, weight = 2 }\n"),
        ("let a b type(Linear)\n", None),
        ("when loss = 3 { stop }\n", "when loss == 3 { stop }\n"),
        ("optimizer sgd { lr = momentum = 0.9, nesterov = true }\n", None),
        ("run { length = 2 steps }\n= 3\n", None),
    ],
)  # fmt: skip
def test_a_correction_that_leads_to_more_mistakes_is_not_made(
    text: str, fixed: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "spec.train"
    path.write_text(text)
    assert bool(fix_file(path, catalog())) == (fixed is not None)
    assert path.read_text() == (fixed or text)


def test_only_the_named_file_is_changed(tmp_path: Path) -> None:
    (tmp_path / "base.train").write_text("optimizer adamw { lr = 1e-3, epss = 1 }\n")
    (tmp_path / "spec.train").write_text('use "base.train"\n')
    assert check_specs([str(tmp_path / "spec.train")], fix=True) == 1
    assert "epss" in (tmp_path / "base.train").read_text()


def test_edits_that_overlap_are_made_one_after_the_other() -> None:
    source = Source("s", "loss mze")
    found = load_spec(source, catalog()).diagnostics
    edits = safe_edits([*found, *found], source)
    assert fixed_text(source.text, edits) == "loss mse"


def test_sarif_has_the_fix_the_version_and_the_kind_of_columns() -> None:
    source = Source("spec.train", RIGHT.replace("20 epochs", "20 epcohs"))
    log = json.loads(render_sarif(load_spec(source, catalog()).diagnostics, "1.2"))
    (run,) = log["runs"]
    assert run["columnKind"] == "unicodeCodePoints"
    assert run["tool"]["driver"]["version"] == "1.2"
    (fix,) = run["results"][0]["fixes"]
    (change,) = fix["artifactChanges"]
    (replaced,) = change["replacements"]
    assert change["artifactLocation"]["uri"] == "spec.train"
    assert replaced["insertedContent"]["text"] == "epochs"
    assert replaced["deletedRegion"]["startColumn"] == 19
