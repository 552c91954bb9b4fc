"""The documentation is true: generated pages are fresh, links lead somewhere, what a page shows works."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import trainc
from trainc.compiler.lower.adapting import Adapting
from trainc.compiler.lower.clause_access import ClauseAccess
from trainc.compiler.lower.lowering import Lowering
from trainc.dsl.reading.construct import Construct
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.resolve.statements import Clause
from trainc.dsl.values.value_json import Duration, Ndim

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"from_docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in imported(ROOT / "docs/generate.py", monkeypatch).pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_specs_shown_as_whole_files_check(page: Path) -> None:
    for text in re.findall(
        r"^```train\n(train 1\n.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        checked = trainc.check(text)
        assert checked.spec is not None, trainc.SpecError(checked.diagnostics)


def test_the_guide_lists_every_mechanism() -> None:
    text = (ROOT / "docs/adding-a-construct.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`to\.(\w+)", text.partition("## The mechanisms")[2]))
    assert listed == {name for name in dir(Lowering) if not name.startswith("_")}


def test_the_guide_lists_what_adapt_may_call() -> None:
    text = (ROOT / "docs/adding-a-construct.md").read_text(encoding="utf-8")
    section = text.partition("## Adapting the model")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`to\.(\w+)", section))
    assert listed == {name for name in dir(Adapting) if not name.startswith("_")}


def test_the_guide_shows_a_construct_for_every_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = imported(ROOT / "docs/guide.py", monkeypatch)
    own = {name for name in dir(Lowering) if not name.startswith("_")} - set(dir(ClauseAccess))
    assert own - guide.used_by().keys() == set()
    assert own <= {name for names in guide.sections().values() for name in names}


def test_the_guide_says_what_each_part_of_a_construct_does(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = imported(ROOT / "docs/guide.py", monkeypatch)
    written = guide.attribute_docstrings(Construct)
    declared = {n for n in Construct.__annotations__ if not n.startswith(("_", "model_"))}
    assert declared - {"kind", "name"} == written.keys()
    assert all(text.endswith(".") for text in written.values())
    rows = "\n".join(guide.part_rows())
    assert "| `lower(to)` |" in rows
    assert "`heading(" not in rows, "no construct overrides it"


def test_the_construct_of_the_guide_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs/adding-a-construct.md").read_text(encoding="utf-8")
    (code, *_) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "l1.py").write_text(code, encoding="utf-8")
    module = imported(tmp_path / "l1.py", monkeypatch)
    module.L1.kind, module.L1.name = "regularize", "l1"
    clause = Clause(module.L1(weight=0.5), on=Ndim(2), start=Duration(2, "steps"))
    base = trainc.check("loss mse optimizer sgd { lr = 0.1 }").spec
    assert base is not None
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    program = trainc.compile(Spec((*base.clauses, clause)), model)
    x = torch.zeros(4, 3)
    for _ in range(2):
        program.step((x, model(x).detach()))
    assert torch.equal(model.weight.detach(), before)
    program.step((x, model(x).detach()))
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * 0.5 * before.sign())
