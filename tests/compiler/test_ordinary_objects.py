"""Bound models, programs and plans are ordinary objects: pickled, copied, printed and listed."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc

HEADER = "loss cross_entropy run { length = 9 steps, seed = 4 } optimizer adamw { lr = 0.1 } "
CLAUSES = {
    "measured": "noise_scale gns on type(Linear) | type(Embedding) | type(LayerNorm)",
    "noise": 'regularize pace on "a" { sigma = 0.5, weight = 0.5 }',
    "ghosts": "normalize ghost_batch on type(BatchNorm1d) { size = 2 }",
    "distill": "regularize distill { weight = 0.5 }",
    "lora": 'adapt lora on "a" { rank = 2, alpha = 4 }',
    "ema": "regularize ema { decay = 0.9 }",
    "mask": "mask magnitude on ndim(2) - type(Embedding) { density = 50% }",
    "nothing": "",
}


class Words(nn.Module):
    """A model of 11 words."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words, self.a, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.batch, self.drop = nn.BatchNorm1d(5), nn.Dropout(0.3)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.drop(self.batch(self.norm(self.a(self.words(ids))))))


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(30).view(6, 5) % 11
    return ids, ids.flip(0)


def bound(name: str, **options: Any) -> tuple[Any, Words]:
    torch.manual_seed(0)
    model = Words(**options)
    if name in ("measured", "noise"):
        model.batch.eval()  # in train mode it mixes examples, and views
    rest = CLAUSES[name].replace("type(BatchNorm1d)", '"batch"')
    return trainc.compile(HEADER + rest, model, executor="module"), model


def saved(model: nn.Module) -> Any:
    """The model after `torch.save`."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("when", ["fresh", "after a step", "in a step"])
@pytest.mark.parametrize("name", [n for n in CLAUSES if n != "measured"] + ["tied"])
def test_a_bound_model_is_pickled_as_the_users_own(name: str, when: str) -> None:
    if name == "tied":
        torch.manual_seed(0)
        model = Words(tied=True)
        model.batch = nn.Identity()  # type: ignore[assignment]
        program = trainc.compile(
            HEADER + CLAUSES["measured"].replace(" | type(LayerNorm)", ""), model, executor="module"
        )
    else:
        program, model = bound(name)
    if when != "fresh":
        program.step(batch())
    loss = program.loss(batch()) if when == "in a step" else None
    twins = [pickle.loads(pickle.dumps(model)), saved(model)]
    model.eval()
    for twin in twins:
        for mine, theirs in zip(twin.modules(), model.modules(), strict=True):
            assert type(mine) is getattr(type(theirs), "unbound", type(theirs))
            assert not hasattr(mine, "trainc")
        assert torch.equal(twin.eval()(batch()[0]), model(batch()[0]))
    model.train()
    if loss is not None:
        loss.backward()
        assert program.update()["loss"] > 0
    # What comes back is compiled again as any model is.
    again = trainc.compile(HEADER, twins[0].train())
    assert again.step(batch())["loss"] > 0


ALONE = """
import sys, torch

model = torch.load(sys.argv[1], weights_only=False)
assert not [name for name in sys.modules if name.partition(".")[0] == "trainc"]
print(type(model[1]).__name__)
"""


def test_a_saved_model_is_read_without_trainc(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    trainc.compile(HEADER + "noise_scale gns on type(LayerNorm) | type(Linear)", model)
    torch.save(model, tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "model.pt"], capture_output=True, text=True
    )
    assert done.stdout == "LayerNorm\n", done.stderr


def test_a_copy_of_a_bound_model_keeps_its_sites_in_an_open_step_too() -> None:
    torch.manual_seed(0)
    model = Words(tied=True)
    model.batch = nn.Identity()  # type: ignore[assignment]
    program = trainc.compile(HEADER + CLAUSES["measured"], model, executor="module")
    program.loss(batch())
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    head: Any = twin.head
    assert head.trainc is not model.head.trainc
    assert head.trainc.partner is twin.words.trainc
    assert type(copy.copy(model.norm)) is type(model.norm)


def test_layers_programs_and_plans_say_what_they_are() -> None:
    program, model = bound("noise")
    assert "trainc: changed by pace)" in repr(model.a)
    assert "trainc: one mask for all views" in repr(model.drop)
    assert repr(model.head) == repr(Words().head)
    assert (
        repr(program) == "Program(Words: cross_entropy, run, pace, adamw; after 0 steps of 9 steps)"
    )
    assert (
        repr(program.plan) == f"Plan(4 clauses for Words of 8 parameters, {program.plan.hash[:12]})"
    )
    assert "changed by pace" in repr(program.sites)
    text = str(program.plan)
    for line in (
        "  regularize pace: 1 target",
        "  optimizer adamw: 8 targets",
        "  a: multiplicative_noise",
    ):
        assert line in text.splitlines()
    program.unbind()
    assert repr(model.a) == repr(Words().a)


def test_a_plan_says_when_its_clauses_act() -> None:
    plan = trainc.plan(
        HEADER + "regularize l2_sp on all from 2 steps until 50% every 2 steps { weight = 0.1 }",
        Words(),
    )
    assert (
        "  regularize l2_sp from 2 steps until 50% every 2 steps: 8 targets"
        in str(plan).splitlines()
    )


def test_dir_shows_what_is_public() -> None:
    program, model = bound("noise")
    shown = [*dir(program), *dir(program.plan), *dir(trainc), *dir(trainc.functional)]
    assert [name for name in shown if name.startswith("_") and not name.startswith("__")] == []
    assert "execution" not in dir(program)
    assert {"loss", "update", "step", "plan", "graph", "module", "save"} <= set(dir(program))
    assert {n for n in dir(trainc) if not n.startswith("__")} == set(trainc.__all__)
    assert dir(trainc.functional) == sorted(trainc.functional.__all__)
    assert set(dir(model.a)) - set(dir(nn.Linear(2, 2))) <= {"__copy__", "__deepcopy__"}


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("clauses", CLAUSES)
def test_a_copy_of_a_bound_model_is_compiled_as_any_model(clauses: str, executor: Any) -> None:
    """Both train on, each by its own program; a spec without clauses leaves nothing of them in the copy."""
    program, model = bound(clauses)
    program.step(batch())
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    same = trainc.compile(
        HEADER + CLAUSES[clauses].replace("type(BatchNorm1d)", '"batch"'), twin, executor=executor
    )
    kept = [p.detach().clone() for p in model.parameters()]
    same.step(batch())
    assert all(torch.equal(*pair) for pair in zip(kept, model.parameters(), strict=True))
    program.step(batch())
    other = trainc.compile(HEADER, plain, executor=executor)
    assert not any(hasattr(module, "trainc") for module in plain.modules())
    other.step(batch())
