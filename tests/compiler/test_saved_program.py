"""Saved programs: what is written, what it can be loaded onto, and what is refused."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.driver.saved_program import LoadError
from trainc.compiler.program.save import FORMAT
from trainc.runtime.storage.foreign_files import MANIFEST, write_manifest

SPEC = "loss cross_entropy optimizer adamw { lr = 1e-3, weight_decay = 0.1 }"
GNS = SPEC + " noise_scale gns on type(LayerNorm, RMSNorm) { smooth = 5 steps }"
PACE = SPEC + ' regularize pace on "blocks.*.mlp.**" & type(Linear) { sigma = 0.5, weight = 0.3 }'


def small_gpt(width: int = 32, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=layers, width=width, heads=2, context=16, vocabulary=61)


def text(seed: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 61, (6, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def change(file: Path, **values: Any) -> None:
    """Change values of a saved JSON file, as somebody who also makes the manifest fit."""
    rewrite(file, json.dumps(json.loads(file.read_text()) | values))


def rewrite(file: Path, text: str) -> None:
    """Write a saved file anew, as somebody who also makes the manifest fit."""
    file.write_text(text)
    names = json.loads((file.parent / MANIFEST).read_text())["files"]
    write_manifest(file.parent, names, {"format": FORMAT})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the folder of a program that was saved with its graph."""
    program = trainc.compile(PACE, small_gpt())
    program.step(text())
    return program.save(tmp_path / "saved")


def test_a_saved_program_is_bound_again_without_the_spec(tmp_path: Path) -> None:
    model = small_gpt()
    program = trainc.compile(PACE, model)
    program.step(text())
    program.save(tmp_path / "saved")
    fresh = small_gpt()
    again = trainc.load(tmp_path / "saved", fresh)
    assert_same(model, fresh)
    assert again.plan.hash == program.plan.hash
    again.load_state_dict(program.state_dict())
    for seed in range(2):
        assert again.step(text(seed=seed)) == program.step(text(seed=seed))
    assert_same(model, fresh)


def test_a_saved_graph_without_logits_is_not_used_where_they_are_observed(tmp_path: Path) -> None:
    clause = " observe calibration from 1 step { of = training }"
    program = trainc.compile(PACE + clause, small_gpt())
    program.step(text())
    loaded = trainc.load(program.save(tmp_path / "program"), small_gpt())
    loaded.load_state_dict(program.state_dict())
    found = program.step(text(1))
    assert loaded.step(text(1)) == found
    assert "calibration.ece" in found


def test_loading_onto_another_model_says_what_differs(tmp_path: Path) -> None:
    trainc.compile(GNS, small_gpt()).save(tmp_path)
    with pytest.raises(
        LoadError, match=r"`embed.token.weight` was float32\[61, 32\].* float32\[61, 48\]"
    ):
        trainc.load(tmp_path, small_gpt(width=48))
    with pytest.raises(LoadError, match=r"a parameter `blocks.1.*does not have"):
        trainc.load(tmp_path, small_gpt(layers=1))
    with pytest.raises(LoadError, match=r"a parameter `blocks.2.*was not saved with"):
        trainc.load(tmp_path, small_gpt(layers=3))


def test_a_plan_changed_by_hand_is_refused(tmp_path: Path) -> None:
    trainc.compile(GNS, small_gpt()).save(tmp_path)
    plan = tmp_path / "plan.json"
    rewrite(plan, plan.read_text().replace('"label": "gns"', '"label": "x"'))
    with pytest.raises(LoadError, match="hash"):
        trainc.load(tmp_path, small_gpt())


@pytest.mark.parametrize("name", ["plan.json", "graph.json"])
def test_a_file_of_an_old_format_is_refused(saved: Path, name: str) -> None:
    change(saved / name, format=0)
    said = (
        rf"{name} has format 0, but this version of trainc reads format \d: compile the spec again"
    )
    with pytest.raises(LoadError, match=said):
        trainc.load(saved, small_gpt())


def test_a_folder_without_a_program_and_a_damaged_file_are_refused(saved: Path) -> None:
    with pytest.raises(LoadError, match="takes a folder written by `trainc compile`"):
        trainc.load(saved.parent, small_gpt())
    rewrite(saved / "graph.json", "{")
    with pytest.raises(LoadError, match=r"graph\.json is damaged"):
        trainc.load(saved, small_gpt())


def test_an_operator_that_is_not_allowed_is_refused(saved: Path) -> None:
    graph = json.loads((saved / "graph.json").read_text())
    call = next(node for node in graph["graph"]["nodes"] if node["op"] == "call_function")
    call["target"] = "os.system"
    rewrite(saved / "graph.json", json.dumps(graph))
    with pytest.raises(LoadError, match=r"graph\.json is damaged: .*`os.system`"):
        trainc.load(saved, small_gpt())


FILES = ("plan.json", "graph.json", "weights.safetensors", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove", "link", "pipe"])
def test_any_damage_to_a_file_is_named(saved: Path, name: str, harm: str) -> None:
    file = saved / name
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    file.unlink()
    if harm == "pipe":
        os.mkfifo(file)
    elif harm == "link":
        file.symlink_to("/dev/zero")
    elif harm != "remove":
        half = len(data) // 2
        file.write_bytes(data if harm == "flip" else data[:half] if harm == "truncate" else b"")
    model = small_gpt()
    named = r"\.json|\.safetensors" if (name, harm) == (MANIFEST, "flip") else re.escape(name)
    with pytest.raises(LoadError, match=named):
        trainc.load(saved, model)
    assert_same(model, small_gpt())


HOSTILE: dict[str, Any] = {
    "nested": "[" * 100_000,
    "a list": "[]",
    "null": "null",
    "a long number": '{"format": ' + "1" * 10_000 + "}",
    "no clauses": {"clauses": None},
    "numbers as clauses": {"clauses": [1]},
    "empty clauses": {"clauses": [{}]},
    "a number as signature": {"model": {"type": "GPT", "clause": None, "signature": [3]}},
    "no settings": {"settings": {}},
    "a text as model": {"model": "GPT"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_plan_of_another_shape_is_refused_by_name(saved: Path, what: str) -> None:
    found = HOSTILE[what]
    if isinstance(found, dict):
        plan = json.loads((saved / "plan.json").read_text()) | found
        content = {name: value for name, value in plan.items() if name != "hash"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        found = json.dumps({**content, "hash": hashlib.sha256(text.encode()).hexdigest()})
    rewrite(saved / "plan.json", found)
    with pytest.raises(LoadError, match=r"plan\.json"):
        trainc.load(saved, small_gpt())


@pytest.mark.parametrize("key", ["graph", "inputs", "targets", "scalars", "outputs", "hooks"])
def test_a_graph_of_another_shape_is_refused_by_name(saved: Path, key: str) -> None:
    for wrong in (None, 3, "text", {"a": 1}):
        change(saved / "graph.json", **{key: wrong})
        with pytest.raises(LoadError, match=r"graph\.json"):
            trainc.load(saved, small_gpt())


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a program saved with an optimizer of a module that notes when it is imported."""
    (tmp_path / "fastopt_of_others.py").write_text(
        "from pathlib import Path\nimport torch\nPath(__file__).with_name('ran').touch()\n"
        "class Adam(torch.optim.Adam): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    text = SPEC.replace("adamw", 'torch("fastopt_of_others:Adam")')
    yield trainc.compile(text, small_gpt()).save(tmp_path / "saved")
    sys.modules.pop("fastopt_of_others", None)


def test_nothing_that_a_plan_names_is_imported(foreign: Path) -> None:
    sys.modules.pop("fastopt_of_others")
    (foreign.parent / "ran").unlink()
    said = r'names `fastopt_of_others:Adam`.*trust=\["fastopt_of_others"\]'
    for trust in ([], ["fastopt"], ["torch"], ["fastopt_of_others:SGD"]):
        with pytest.raises(LoadError, match=said):
            trainc.load(foreign, small_gpt(), trust=trust)
    assert not (foreign.parent / "ran").exists()
    assert "fastopt_of_others" not in sys.modules
    for trust in (["fastopt_of_others"], ["fastopt_of_others:Adam"]):
        trainc.load(foreign, small_gpt(), trust=trust).step(text())
    assert (foreign.parent / "ran").exists()


@pytest.mark.parametrize("path", ["torch.optim:torch.hub.load", "torch.hub:load", "os:system"])
def test_what_a_changed_plan_names_is_not_called(saved: Path, path: str) -> None:
    plan = json.loads((saved / "plan.json").read_text())
    for clause in (*plan["clauses"], *plan["spec"]["clauses"]):
        if clause["kind"] == "optimizer":
            fields = clause["fields"] | {"path": ["path", path], "arguments": {}}
            for own in ("betas", "eps", "implementation"):
                fields.pop(own, None)
            clause |= {"construct": "torch", "name": "torch", "fields": fields}
    content = {name: value for name, value in plan.items() if name != "hash"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["hash"] = hashlib.sha256(text.encode()).hexdigest()
    rewrite(saved / "plan.json", json.dumps(content))
    with pytest.raises(LoadError, match="is imported only if you trust it"):
        trainc.load(saved, small_gpt())


def test_optimizers_of_torch_need_no_trust(tmp_path: Path) -> None:
    text_ = SPEC.replace("adamw", 'torch("torch.optim:NAdam")')
    trainc.compile(text_, small_gpt()).save(tmp_path)
    trainc.load(tmp_path, small_gpt()).step(text())


@pytest.mark.parametrize("harm", ["outputs", "a plan's clause", "a weight's dtype"])
def test_a_damage_that_fits_the_manifest_leaves_the_model_as_it_was(saved: Path, harm: str) -> None:
    if harm == "outputs":
        graph = json.loads((saved / "graph.json").read_text())
        change(saved / "graph.json", outputs=graph["outputs"][:-1])
    elif harm == "a plan's clause":
        plan = json.loads((saved / "plan.json").read_text())
        clauses = [{**one, "targets": 3} for one in plan["clauses"]]
        change(saved / "plan.json", clauses=clauses)
    else:
        from safetensors.torch import load_file, save_file

        tensors = {name: t.half() for name, t in load_file(saved / "weights.safetensors").items()}
        save_file(tensors, saved / "weights.safetensors")
        names = [one.name for one in saved.iterdir() if one.name != MANIFEST]
        write_manifest(saved, names, {"format": FORMAT})
    other = small_gpt()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(LoadError):
        trainc.load(saved, other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name
