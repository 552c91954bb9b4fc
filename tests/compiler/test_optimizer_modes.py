"""Optimizers with `train()` and `eval()`: other weights in evaluation and in what is saved, and exact training."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trainc
from tests.compiler.foreign_optimizers import Averaged, Swapping
from tests.compiler.test_foreign_optimizers import (
    OURS,
    assert_equal,
    batch,
    net,
    run_on,
    spec,
    stored,
    torch_optimizer,
)
from trainc.compiler.driver.train import train
from trainc.runtime.storage.checkpoint import find_latest, load_checkpoint

NAMES = [f"{OURS}Averaged", f"{OURS}Swapping"]
CLASSES: dict[str, Callable[..., Any]] = {NAMES[0]: Averaged, NAMES[1]: Swapping}


def by_hand(name: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return trained and evaluated weights of a plain loop that never evaluates before its end."""
    model = net()
    optimizer = CLASSES[name](model.parameters(), lr=0.1)
    optimizer.train()
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    optimizer.eval()
    return trained, copy.deepcopy(model.state_dict())


def assert_weights(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_uses_other_weights_and_changes_no_bit_of_the_training(name: str) -> None:
    """By the formulas, `train()` after `eval()` gives the trained weights up to rounding alone."""
    program = trainc.compile(spec(name, "lr = 0.1"), net())
    for step in range(5):
        program.step(batch(step))
        program.evaluate(*batch(50))
        program.state_dict()
        program.unsound_state()
    trained, evaluated = by_hand(name, 5)
    assert_weights(program.module.state_dict(), trained)
    with program.evaluation_weights():
        assert_weights(program.module.state_dict(), evaluated)
    assert_weights(program.module.state_dict(), trained)
    assert program.evaluates == "own"
    other = net()
    other.load_state_dict(evaluated)
    x, y = batch(50)
    loss, count, _ = program.evaluate(x, y)
    assert loss / count == pytest.approx(nn.functional.cross_entropy(other(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_are_the_evaluated_weights(name: str, tmp_path: Path) -> None:
    program = trainc.compile(spec(name, "lr = 0.1"), net())
    run_on(program, range(5))
    trained, evaluated = by_hand(name, 5)
    program.save(tmp_path / "saved")
    assert_weights(load_file(tmp_path / "saved/weights.safetensors"), evaluated)
    state = stored(program, tmp_path / "checkpoints")
    assert_weights(state["model"], trained)
    assert_weights(state["evaluation"], evaluated)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_taken_during_an_evaluation_is_that_of_the_training(
    name: str, tmp_path: Path
) -> None:
    straight, again = (trainc.compile(spec(name, "lr = 0.1"), net()) for _ in range(2))
    run_on(straight, range(5))
    with straight.evaluation_weights():
        inside = copy.deepcopy(straight.state_dict())
        _, evaluated = by_hand(name, 5)
        assert_weights(straight.module.state_dict(), evaluated)
    again.load_state_dict(inside)
    assert run_on(again, range(5, 8)) == run_on(straight, range(5, 8))
    assert_equal(straight, again)


def test_an_error_in_an_evaluation_leaves_the_training_as_it_was() -> None:
    straight, other = (trainc.compile(spec(NAMES[0], "lr = 0.1"), net()) for _ in range(2))
    run_on(straight, range(6))
    run_on(other, range(3))
    with pytest.raises(RuntimeError):
        other.evaluate(torch.zeros(2, 99), torch.zeros(2, dtype=torch.long))
    with pytest.raises(KeyError), other.evaluation_weights():
        raise KeyError
    run_on(other, range(3, 6))
    assert_equal(straight, other)


def test_a_step_inside_the_block_is_an_error() -> None:
    program = trainc.compile(spec(NAMES[0], "lr = 0.1"), net())
    program.step(batch(0))
    with (
        program.evaluation_weights(),
        pytest.raises(RuntimeError, match="has the weights of `own`"),
    ):
        program.step(batch(1))


def test_weights_of_evaluation_that_are_not_finite_are_noticed() -> None:
    program = trainc.compile(spec(NAMES[0], "lr = 0.1"), net())
    run_on(program, range(2))
    state = torch_optimizer(program).state[program.module.get_parameter("0.bias")]
    state["z"][0] = math.inf
    assert program.unsound_state() == "`0.bias` of evaluation is not finite"


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_zeros_hold_in_evaluation(name: str) -> None:
    text = spec(name, "lr = 0.1", "mask magnitude on ndim(2) from 2 steps { density = 50% }")
    program = trainc.compile(text, net())
    run_on(program, range(6))
    for weights in (program.module.state_dict(), program.state_dict()["evaluation"]):
        assert int((weights["0.weight"] == 0).sum()) == 24


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ("lr trust_ratio on ndim(2)", "changes its updates of the trained weights alone"),
        ("mask sift on ndim(2) { density = 10% }", "lets it train chosen entries"),
        ("regularize ema { decay = 0.9 }", "sets the weights that evaluation uses, too"),
        ("distribute local every 2 steps", "exchanges the trained weights alone"),
    ],
)
def test_what_changes_one_of_two_weights_is_refused(clause: str, said: str) -> None:
    with pytest.raises(trainc.SpecError, match="keeps weights of its own for evaluation") as error:
        trainc.plan(spec(NAMES[0], "lr = 0.1", "\n" + clause), net())
    assert said in str(error.value)
    assert ":2:" in str(error.value)


class Data:
    """Batches of `batch`, as `trainc run` reads them."""

    tokens_per_sample = 1

    class Part:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

        def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
            rows = [batch(i) for i in indices]
            return torch.stack([x[0] for x, _ in rows]), torch.stack([y[0] for _, y in rows])

    train, evaluation = Part(40), Part(8)


def written(name: str, fields: str, length: int = 12, more: str = "") -> str:
    own = f'optimizer torch("{name}") as own {{ {fields} }}'
    return f"""
    model "tests.compiler.test_foreign_optimizers:net"
    data "tests.compiler.test_optimizer_modes:Data" {{ batch = 4 samples }}
    loss cross_entropy
    run {{ length = {length} steps, eval = 3 steps, checkpoint = 4 steps }}
    {own} {more}
    """


def carried_out(text: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Train, and return the records of the run without times."""
    folder.mkdir(exist_ok=True)
    source = folder / "spec.train"
    source.write_text(text)
    train(source, folder / "run", quiet=True, executor="module", **options)
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in records]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (NAMES[0], "lr = 0.1"),
        (NAMES[1], "lr = 0.1"),
        (f"{OURS}Distance", "lr = 1.0 * cosine(to = 10%)"),
        (f"{OURS}Nested", "lr = 0.1"),
        (f"{OURS}SetsItsRate", "lr = 0.1"),
        ("torch.optim:Adafactor", "lr = 0.01"),
        ("torch.optim:LBFGS", "lr = 0.3, max_iter = 3"),
    ],
)
def test_a_run_that_was_stopped_goes_on_as_the_one_that_was_not(
    name: str, fields: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in its tenth step continues from its eighth: records and weights are the same bits."""
    from trainc.compiler.program.program import Program

    straight = carried_out(written(name, fields), tmp_path / "straight")
    step, calls = Program.step, []

    def killed(self: Program, batches: Any, scaler: Any = None) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return step(self, batches, scaler)

    monkeypatch.setattr(Program, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        carried_out(written(name, fields), tmp_path / "stopped")
    monkeypatch.undo()
    resumed = carried_out(written(name, fields), tmp_path / "stopped", resume=True)
    assert resumed == straight
    states = []
    for folder in ("straight", "stopped"):
        path = find_latest(tmp_path / folder / "run/checkpoints").path
        assert path is not None
        states.append(load_checkpoint(path)["program"])
    for part in ("model", "evaluation"):
        assert_weights(states[0].get(part, {}), states[1].get(part, {}))


def test_a_run_that_starts_from_another_begins_with_its_evaluated_weights(tmp_path: Path) -> None:
    carried_out(written(NAMES[0], "lr = 0.1"), tmp_path / "first")
    path = find_latest(tmp_path / "first/run/checkpoints").path
    assert path is not None
    evaluated = load_checkpoint(path)["program"]["evaluation"]
    text = written(NAMES[0], "lr = 0", length=1).replace(
        "run {", f'run {{ start = "{tmp_path}/first/run",'
    )
    carried_out(text, tmp_path / "second")
    path = find_latest(tmp_path / "second/run/checkpoints").path
    assert path is not None
    assert_weights(load_checkpoint(path)["program"]["model"], evaluated)


def test_a_run_notices_state_that_cannot_be_saved_in_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(trainc.SpecError, match=r"`0.weight/parts/1/inner`") as error:
        carried_out(written(f"{OURS}Opaque", "lr = 0.1"), tmp_path / "opaque")
    (found,) = error.value.diagnostics
    assert found.rule == "optimizer-failed"
    assert "spec.train:6:" in str(error.value)
    lines = (tmp_path / "opaque/run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1


def test_an_optimizer_that_undoes_a_schedule_is_an_error_at_its_clause(tmp_path: Path) -> None:
    text = written(f"{OURS}SetsItsRate", "lr = 0.1 * warmup(4 steps)")
    with pytest.raises(trainc.SpecError, match="undoes the schedule in `lr`") as error:
        carried_out(text, tmp_path / "rates")
    assert "spec.train:6:" in str(error.value)


# another spec


def accepted(before: str, after: str, folder: Path) -> list[str]:
    """Return the notes of a run that goes on under another spec."""
    carried_out(before, folder)
    carried_out(after, folder, resume=True, accept=True)
    lines = (folder / "run/events.jsonl").read_text().splitlines()
    return [e["message"] for e in map(json.loads, lines) if e.get("kind", e.get("event")) == "note"]


def test_options_of_the_spec_win_and_those_of_the_optimizer_go_on(tmp_path: Path) -> None:
    """Another selection of the decay makes other groups: the counter goes on, `beta` is the new one."""
    name = f"{OURS}Averaged"
    folder = tmp_path / "run"
    notes = accepted(
        written(name, "lr = 0.1, weight_decay = 0.1 on ndim(2)"),
        written(name, "lr = 0.05, beta = 0.5", length=16),
        folder,
    )
    path = find_latest(folder / "run/checkpoints").path
    assert path is not None
    state = load_checkpoint(path)["program"]
    options = state["actions"]["own"]["0.bias/(group)"]["options"]
    assert options["k"] == 16
    assert "beta" not in options
    assert state["rates"]["in_force"]["0.bias"] == 0.05
    assert not [note for note in notes if note.startswith("own:")]


def test_a_vector_over_all_parameters_does_not_survive_other_parameters(tmp_path: Path) -> None:
    lbfgs = "torch.optim:LBFGS"
    notes = accepted(
        written(lbfgs, 'lr = 0.3, max_iter = 3, freeze = "2.bias"'),
        written(lbfgs, "lr = 0.3, max_iter = 3", length=16),
        tmp_path / "run",
    )
    assert [note for note in notes if "own: starts anew, because it keeps one state" in note]


def test_an_optimizer_of_another_class_starts_anew(tmp_path: Path) -> None:
    notes = accepted(
        written("torch.optim:Adam", "lr = 0.1"),
        written("torch.optim:RMSprop", "lr = 0.1", length=16),
        tmp_path / "run",
    )
    assert "own: starts anew, because it was `torch.optim.adam:Adam` and is" in "\n".join(notes)


def test_a_parameter_that_trains_only_now_begins_without_state(tmp_path: Path) -> None:
    notes = accepted(
        written("torch.optim:Adagrad", 'lr = 0.1, freeze = "2.bias"'),
        written("torch.optim:Adagrad", "lr = 0.1", length=16),
        tmp_path / "run",
    )
    assert "own: begins without state of `2.bias`" in notes
