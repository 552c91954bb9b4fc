"""Saved programs: what is written, what it can be loaded onto, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.driver.saved_program import LoadError

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
    """Change values of a saved JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


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
    plan.write_text(plan.read_text().replace('"label": "gns"', '"label": "x"'))
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
    (saved / "graph.json").write_text("{")
    with pytest.raises(LoadError, match=r"graph\.json is damaged"):
        trainc.load(saved, small_gpt())


def test_an_operator_that_is_not_allowed_is_refused(saved: Path) -> None:
    graph = json.loads((saved / "graph.json").read_text())
    call = next(node for node in graph["graph"]["nodes"] if node["op"] == "call_function")
    call["target"] = "os.system"
    (saved / "graph.json").write_text(json.dumps(graph))
    with pytest.raises(LoadError, match=r"graph\.json: "):
        trainc.load(saved, small_gpt())
