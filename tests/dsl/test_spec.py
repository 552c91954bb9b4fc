"""The spec: equal from text, Python and JSON, hashed by what it says and not by how."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainc.compiler.catalog import catalog, check
from trainc.dsl.reading.construct import Construct
from trainc.dsl.resolve import checks
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Assign, Clause, Do, Rule
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values import value_json as v

TEXT = """
train 1
let mats = ndim(2) - "head.*"
data "examples.data:stdlib" { batch = 32 samples, context = 128 }
optimizer adamw { lr = 3e-4 * (warmup(5%) then cosine(to = 10%)), weight_decay = 0.1 on mats }
regularize pace on "blocks.*" every 200 steps { sigma = 1.2 * (1 - depth), weight = 50% }
noise_scale gns as noise on type(LayerNorm) from 1k steps until 50% optional { smooth = 200 steps }
when noise > 2 * batch for 100 steps cooldown 1k steps { batch = min(2 * batch, 512 samples), warn "grew" }
"""


def of(kind: str, name: str, **fields: Any) -> Construct:
    return catalog()[kind, name](**fields)


def written_in_python() -> Spec:
    mats = 'ndim(2) - "head.*"'
    lr = "3e-4 * (warmup(5%) then cosine(to = 10%))"
    return Spec(
        clauses=(
            Clause(
                of(
                    "data",
                    "data",
                    path="examples.data:stdlib",
                    batch="32 samples",
                    arguments={"context": 128},
                )
            ),
            Clause(of("optimizer", "adamw", lr=lr, weight_decay=f"0.1 on {mats}")),
            Clause(
                of("regularize", "pace", sigma="1.2 * (1 - depth)", weight=0.5),
                on='"blocks.*"',  # type: ignore[arg-type]
                every="200 steps",  # type: ignore[arg-type]
            ),
            Clause(
                of("noise_scale", "gns", smooth=v.Duration(200, "steps")),
                on=v.OfType(("LayerNorm",)),
                start=v.Duration(1000, "steps"),
                stop=v.Duration(0.5, "run"),
                optional=True,
                label="noise",
            ),
        ),
        rules=(
            Rule(
                "noise > 2 * batch",  # type: ignore[arg-type]
                (Assign("batch", "min(2 * batch, 512 samples)"), Do("warn", "grew")),  # type: ignore[arg-type]
                hold=v.Duration(100, "steps"),
                cooldown="1000 steps",  # type: ignore[arg-type]
            ),
        ),
    )


def test_text_and_python_give_equal_specs() -> None:
    text, python = check(TEXT).unwrap(), written_in_python()
    assert text == python
    assert hash(text) == hash(python)
    assert text.fingerprint == python.fingerprint


def test_json_gives_the_spec_back() -> None:
    spec = check(TEXT).unwrap()
    data = json.loads(json.dumps(spec.to_json()))
    assert Spec.from_json(data, catalog()) == spec
    assert Spec.from_json(json.dumps(data), catalog()).fingerprint == spec.fingerprint


def test_layout_comments_and_lets_do_not_change_the_fingerprint() -> None:
    one = check("optimizer adamw { lr = 3e-4, weight_decay = 0.1 }").unwrap()
    two = check(
        "let peak = 0.0003 # peak\noptimizer adamw {\n  weight_decay = 10%,\n  lr = peak,\n}"
    ).unwrap()
    assert one.fingerprint == two.fingerprint


def test_a_value_changes_the_fingerprint() -> None:
    one = check("optimizer adamw { lr = 3e-4 }").unwrap()
    assert one != check("optimizer adamw { lr = 4e-4 }").unwrap()
    assert one.fingerprint != check("optimizer adamw { lr = 4e-4 }").unwrap().fingerprint


def test_python_specs_are_checked_too() -> None:
    pace = of("regularize", "pace", sigma=0.5, weight=0.1)
    with pytest.raises(SpecError, match="missing-on"):
        Spec((Clause(pace),))
    with pytest.raises(SpecError, match="duplicate-clause"):
        Spec(
            (Clause(of("run", "run", length="5 steps")), Clause(of("run", "run", length="9 steps")))
        )
    with pytest.raises(SpecError, match="unknown-name"):
        Spec(rules=(Rule("gns > 2", (Do("stop"),)),))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="unknown-version"):
        Spec(version=2)


@pytest.mark.parametrize("text", ["12 parsecs", "200", "(", "", "1 steps 2", "x"])
def test_text_that_is_no_duration_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|parsecs|value|text"):
        of("run", "run", length=text)


def test_loading_json_parses_nothing() -> None:
    data = json.dumps(check(TEXT).unwrap().to_json())
    code = (
        "import sys\n"
        "from trainc.compiler.catalog import catalog\n"
        "from trainc.dsl.resolve.spec import Spec\n"
        "Spec.from_json(sys.stdin.read(), catalog())\n"
        "assert not {'lark', 'torch', 'trainc.dsl.syntax.parser'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], input=data, text=True, check=True)


def test_every_value_knows_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "base.train").write_text("optimizer adamw { lr = 3e-4 }\n")
    path = tmp_path / "spec.train"
    path.write_text(
        'use "base.train"\nlet seed = 3\nlet half = 0.5\n'
        "run { length = 200 steps, seed = seed }\nmask sift on ndim(2) { density = half }\n"
    )
    spec = check(path, ["seed=4"]).unwrap()
    adamw, run, sift = spec.clauses
    assert adamw.provenance("eps").how == "default"
    assert adamw.provenance("lr").how == "include"
    assert [str(span) for span in adamw.provenance("lr").via] == [f"{path}:1:1"]
    assert run.provenance("length").how == "line"
    assert run.provenance("seed").how == "set"
    assert str(run.provenance("seed")) == "--set seed=4"
    assert str(sift.provenance("density")) == f"{path}:5:34"
    assert run.construct.model_dump()["seed"] == 4


def test_provenance_takes_no_part_in_equality() -> None:
    one = check("loss mse").unwrap()
    two = check("# a comment\n\n  loss   mse").unwrap()
    assert one.clauses[0].span != two.clauses[0].span
    assert one == two


def test_numbers_mean_what_they_say() -> None:
    text = 'model "m:f" { a = 2k, b = 1_000, c = 1.5M, d = 0.5, e = 12 / 4, f = 10%, '
    text += "g = [1, 2.5], h = 1..3, i = true }"
    arguments = check(text).unwrap().clauses[0].construct.model_dump()["arguments"]
    wanted = {
        "a": 2000, "b": 1000, "c": 1500000, "d": 0.5, "e": 3, "f": 0.1, "g": [1, 2.5], "h": [1, 3],
        "i": True,
    }  # fmt: skip
    assert arguments == wanted
    assert {k: type(x) for k, x in arguments.items()} == {k: type(x) for k, x in wanted.items()}


def test_kinds_and_units_may_be_names() -> None:
    text = "let data = 3\nlet steps2 = data\n"
    text += 'model "m:f" { model = data, steps = steps2, on = 1, from = 2, lr = 3 }'
    arguments = check(text).unwrap().clauses[0].construct.model_dump()["arguments"]
    assert arguments == {"model": 3, "steps": 3, "on": 1, "from": 2, "lr": 3}


def test_an_uncaught_error_shows_what_where_why_and_what_to_write() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import trainc; trainc.check('optimizer adamw { l_r = 3e-4 }').unwrap()",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr.partition("SpecError: \n")[2]
        == """\
error[unknown-field]: `optimizer adamw` has no field `l_r`
 --> <text>:1:19
  |
1 | optimizer adamw { l_r = 3e-4 }
  |                   ^^^
  = help: did you mean `lr`?


"""
    )


def test_what_no_clause_can_see_alone_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_all, calls = checks.spec_problems, []

    def counted(*given: Any) -> Any:
        calls.append(given)
        return check_all(*given)

    monkeypatch.setattr("trainc.dsl.resolve.spec.spec_problems", counted)
    assert check(TEXT).spec is not None
    assert len(calls) == 1


AMOUNTS = {
    "saturation > 0.9 samples": "`saturation` is a plain number, and `0.9 samples` is an amount of samples",
    "3 steps < saturation.attended": "`saturation.attended` is a plain number",
    "2 * loss > 3 epochs": "`2 * loss` is a plain number",
    "mean(loss, 10 steps) > 2 seconds": "`mean(loss, 10 steps)` is a plain number",
    "batch > 8 samples": None,
    "2 * batch < 512 tokens": None,
    "steps > 3 epochs": None,
    "gns > 4 steps": None,
    "saturation > 90%": None,
    "loss / eval_loss > 2": None,
}


@pytest.mark.parametrize("condition", AMOUNTS)
def test_an_amount_is_no_plain_number_in_a_rule(condition: str) -> None:
    """`loss > 3 steps` was `loss > 3`; what counts, such as steps and samples, is converted to one unit."""
    text = f"""train 1
observe saturation every 2 steps
noise_scale gns on ndim(2)
when {condition} {{ stop }}
"""
    found = check(text)
    said = AMOUNTS[condition]
    if said is None:
        assert not found.errors
        return
    (error,) = found.errors
    assert (error.rule, error.message[: len(said)]) == ("wrong-unit", said)
    assert error.span is not None
    assert error.span.text == condition
    assert error.help is not None
    assert error.help.endswith("without a unit")
