"""The average of the weights: torch's, published warm-ups, the clause's times, resumes, replicas, and who uses it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trainc
from tests.processes import run_processes, run_rank
from trainc.compiler.constructs.regularize.weights.ema import Ema
from trainc.compiler.driver.adaptation import load_weights
from trainc.compiler.driver.train import train
from trainc.compiler.program.program import Program
from trainc.runtime.companion.companion import Companion
from trainc.runtime.storage import checkpoint
from trainc.runtime.storage.jsonl import read_jsonl

Batch = tuple[Tensor, Tensor]
SGD = "optimizer sgd { lr = 0.3, momentum = 0.9, weight_decay = 0.1 }"
ADAMW = "optimizer adamw { lr = 0.05, weight_decay = 0.3 }"


def net() -> Any:
    torch.manual_seed(0)
    layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)
    return nn.Sequential(*layers).double()


def data(step: int, rows: int = 8) -> Batch:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (rows,), generator=g)


def compiled(
    ema: str, model: nn.Module | None = None, rest: str = SGD, run: str = "", **given: Any
) -> Program:
    text = f"loss cross_entropy\n{ema}\n{rest}\nrun {{ length = 20 steps{run} }}\n"
    return trainc.compile(text, net() if model is None else model, **given)


def held(program: Program) -> Companion:
    (found,) = [a for a in program._machine.actions if isinstance(a, Companion)]
    return found


def average(program: Program) -> dict[str, Tensor]:
    """Return what the model has where it is evaluated, as copies."""
    with program.evaluation_weights():
        return copy.deepcopy(program.module.state_dict())


def weights(program: Program) -> dict[str, Tensor]:
    return copy.deepcopy(program.module.state_dict())


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


# the average


@pytest.mark.parametrize("buffers", ["average", "copy"])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_it_is_torchs_average_bit_for_bit(buffers: str, optimizer: str) -> None:
    program = compiled(f"regularize ema {{ decay = 0.8, buffers = {buffers} }}", rest=optimizer)
    theirs = AveragedModel(
        program.module,
        multi_avg_fn=get_ema_multi_avg_fn(0.8),
        use_buffers=buffers == "average",
    )
    for step in range(6):
        program.step(data(step))
        theirs.update_parameters(program.module)
        wanted = dict(theirs.module.state_dict())
        if buffers == "average":  # torch averages the counter of batches, too, and truncates
            wanted["1.num_batches_tracked"] = torch.tensor(step + 1)
        assert_same(average(program), wanted)


def test_it_is_a_loop_by_hand_over_accumulation_and_masks() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.data = model[0].weight.data.t().contiguous().t()  # strided
    program = compiled("regularize ema { decay = 0.9 }", model)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    by_hand: dict[str, Tensor] = {}
    for step in range(7):
        x, y = data(step)
        optimizer.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            (F.cross_entropy(twin(x[half]), y[half]) / 2).backward()
        optimizer.step()
        program.step([(x[:4], y[:4]), (x[4:], y[4:])])
        now = {n: t.detach().clone() for n, t in twin.state_dict().items() if t.is_floating_point()}
        by_hand = {n: 0.9 * by_hand[n] + 0.1 * t if by_hand else t for n, t in now.items()}
    found = average(program)
    for name, value in by_hand.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
        assert not torch.equal(found[name], twin.state_dict()[name])


@pytest.mark.parametrize(
    ("warmup", "wanted"),
    [
        # As in tf.train.ExponentialMovingAverage, of `num_updates` 1, 2, 3 and 4.
        ("ratio", [0, 2 / 11, 3 / 12, 4 / 13, 5 / 14]),
        # As in timm's ModelEmaV3 with its warm-up, at its steps 2, 3, 4 and 5.
        ("power", [0, 1 - 4 ** (-1 / 3), 1 - 9 ** (-1 / 3), 1 - 16 ** (-1 / 3), 0.65]),
        ("none", [0, 0.65, 0.65, 0.65, 0.65]),
    ],
)
def test_the_decay_rises_as_published(warmup: str, wanted: list[float]) -> None:
    program = compiled(f"regularize ema {{ decay = 0.65, warmup = {warmup} }}")
    found = [program.step(data(step))["ema.decay"] for step in range(5)]
    assert found == pytest.approx(wanted, abs=1e-9)


def test_the_decay_may_be_a_schedule() -> None:
    program = compiled("regularize ema { decay = linear(from = 0, to = 50%, over = 4 steps) }")
    seen = []
    for step in range(6):
        seen.append(program.step(data(step))["ema.decay"])
        if step == 0:
            assert_same(average(program), weights(program))
    assert seen == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_a_decay_of_zero_is_evaluation_with_the_trained_weights() -> None:
    """A clause at 0 is dropped; a schedule at 0 runs, and evaluation changes no bit."""
    assert Ema(decay=0).identity_setting()  # type: ignore[arg-type]
    dropped, zero = (compiled(f"regularize ema {{ decay = {d} }}") for d in ("0", "constant(0)"))
    assert dropped.evaluates is None
    for step in range(4):
        dropped.step(data(step))
        zero.step(data(step))
        assert zero.evaluates == "ema average"
        assert_same(average(zero), weights(dropped))
        assert zero.evaluate(*data(9)) == dropped.evaluate(*data(9))


def test_training_is_bit_for_bit_as_without_it() -> None:
    for rest in (SGD, f"{ADAMW} perturb sam {{ rho = 0.05 }}"):
        plain, beside = compiled("", rest=rest), compiled("regularize ema", rest=rest)
        for step in range(4):
            found = beside.step(data(step))
            beside.evaluate(*data(step + 40))
            assert plain.step(data(step)).items() <= found.items()
        assert_same(weights(plain), weights(beside))


# which tensors


def test_what_is_not_selected_is_evaluated_as_trained() -> None:
    program = compiled('regularize ema on "2.*" { decay = 0.9 }')
    for step in range(4):
        program.step(data(step))
    trained, found = weights(program), average(program)
    different = {name for name in found if not torch.equal(found[name], trained[name])}
    assert different == {"2.weight", "2.bias"}


def test_frozen_parameters_are_not_held() -> None:
    program = compiled("regularize ema", rest='optimizer sgd { lr = 0.1, freeze = "0.*" }')
    program.step(data(0))
    assert {name for name in held(program).values if name.startswith("0.")} == set()
    with pytest.raises(trainc.SpecError, match="but no optimizer trains what it selects") as raised:
        compiled('regularize ema on "0.*"', rest='optimizer sgd { lr = 0.1, freeze = "0.*" }')
    (found,) = raised.value.diagnostics
    assert found.labels[0].span.text == 'regularize ema on "0.*"'


def test_averages_of_sixteen_bit_weights_are_held_in_float32() -> None:
    model = net().bfloat16()
    program = compiled("regularize ema { decay = 0.999 }", model)
    x, y = data(0)
    for _ in range(5):
        program.step((x.bfloat16(), y))
    value = held(program).values["0.weight"]
    assert value.dtype == torch.float32
    assert not torch.equal(value, value.bfloat16().float())
    with program.evaluation_weights():
        assert torch.equal(model[0].weight, value.bfloat16())
    assert isinstance(program.evaluate(x.bfloat16(), y)[0], float)


def test_masked_entries_are_zero_in_the_average() -> None:
    program = compiled("mask magnitude on ndim(2) { density = 30% } regularize ema { decay = 0.9 }")
    for step in range(5):
        program.step(data(step))
    trained, found = weights(program), average(program)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(found[name] == 0, trained[name] == 0)
        assert int((found[name] == 0).sum()) > 10


# time


def test_its_times_are_obeyed() -> None:
    program = compiled("regularize ema from 2 steps every 3 steps until 9 steps { decay = 0.5 }")
    by_hand: dict[str, Tensor] = {}
    for step in range(12):
        metrics = program.step(data(step))
        now = weights(program)
        assert ("ema.decay" in metrics) == (step in (1, 4, 7)), step
        if step in (1, 4, 7):
            if by_hand:
                now |= {n: torch.lerp(by_hand[n], t, 0.5) for n, t in now.items() if t.dim()}
            by_hand = now
        assert_same(average(program), by_hand or now)
    assert "ema: evaluation and saving use the average of 3 updates" in program.summary()[-1]


def test_periods_in_seconds_and_samples_are_obeyed() -> None:
    for every, wanted in (("3 seconds", [4, 7, 10]), ("20 samples", [3, 5, 8, 10])):
        program = compiled(f"regularize ema every {every}")
        found = []
        for step in range(1, 11):
            if "ema.decay" in program.step(data(step)):
                found.append(step)
            program.clock.seconds += 1.0  # as the loop of `trainc run` does
        assert found == wanted


def test_skipped_steps_update_nothing() -> None:
    program = compiled("regularize ema { decay = 0.5 }", plain_net(), run=", on_nan = skip")
    program.step(data(0))
    program.step(data(1))
    before = average(program)
    x, y = data(2)
    assert program.step((x * torch.nan, y))["skipped"] == 1.0
    after = average(program)
    assert all(torch.equal(before[n], after[n]) for n in before)
    scaler = torch.amp.GradScaler("cpu")
    program.step(data(3))
    before = average(program)
    loss = program.loss(data(4))
    scaler.scale(loss * torch.inf).backward()
    assert program.update(scaler)["skipped"] == 1.0
    assert_same(before, average(program))


@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_resumed_run_is_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    text = "regularize ema from 2 steps { decay = 0.9, warmup = power }"
    straight, later = compiled(text), compiled(text)
    for step in range(3):
        later.step(data(step + 40))
    for step in range(at):
        straight.step(data(step))
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(average(straight), average(later))
    for step in range(at, 9):
        assert later.step(data(step)) == straight.step(data(step))
    assert_same(average(straight), average(later))
    assert straight.summary() == later.summary()


def test_a_run_may_go_on_without_it_and_with_it() -> None:
    plain, other = compiled(""), compiled("regularize ema { decay = 0.5 }")
    for program in (plain, other):
        program.step(data(0))
        program.step(data(1))
    dropped, added = compiled(""), compiled("regularize ema { decay = 0.5 }")
    assert dropped.load_compatible(copy.deepcopy(other.state_dict())) == [
        "ema: no longer in the program", "ema average: no longer in the program"
    ]  # fmt: skip
    assert_same(weights(dropped), weights(plain))
    assert added.load_compatible(copy.deepcopy(plain.state_dict())) == []
    added.step(data(2))
    assert_same(average(added), weights(added))


def test_another_selection_completes_the_average() -> None:
    first = compiled('regularize ema on "2.*" { decay = 0.5 }')
    for step in range(3):
        first.step(data(step))
    wider = compiled("regularize ema { decay = 0.5 }")
    state = copy.deepcopy(first.state_dict())
    (line,) = wider.load_compatible(state)
    assert line == "ema average: `0.bias` and 6 more start as in the model now"
    found, now = average(wider), weights(wider)
    assert torch.equal(found["2.weight"], average(first)["2.weight"])
    assert torch.equal(found["0.bias"], now["0.bias"])
    with pytest.raises(ValueError, match=r"`on` of `ema` was changed: with `0.weight`, `0.bias`"):
        wider.load_state_dict(state)


# both executors and replicas


def test_graph_and_modules_agree() -> None:
    ghosts = 'normalize ghost_batch on "1" { size = 2 }'
    text = f"regularize ema {{ decay = 0.9 }} {ghosts}"
    by_graph, by_modules = compiled(text, executor="graph"), compiled(text, executor="module")
    for step in range(4):
        by_graph.step(data(step))
        by_modules.step(data(step))
    two = average(by_modules)
    for name, value in average(by_graph).items():
        torch.testing.assert_close(value, two[name], rtol=1e-10, atol=1e-12)


def plain_net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)).double()


def replica(rank: int) -> Any:
    """Train on one half of every batch; run as a process of its own."""
    own = plain_net()
    program = compiled("regularize ema { decay = 0.9 }", own, ADAMW)
    with torch.no_grad():
        own[0].weight.add_(rank)  # DistributedDataParallel sends the weights of the first to all
    program.forward = DistributedDataParallel(own)
    for step in range(6):
        x, y = data(step)
        half = slice(4 * rank, 4 * rank + 4)
        program.step((x[half], y[half]))
        program.evaluate(x, y)
    return average(program)


def test_replicas_hold_the_same_average(tmp_path: Path) -> None:
    first, second = run_processes(__file__, 2, tmp_path)
    alone = compiled("regularize ema { decay = 0.9 }", plain_net(), ADAMW)
    for step in range(6):
        alone.step(data(step))
    assert_same(first, second)
    for name, value in average(alone).items():
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)


# who uses it


def test_a_saved_program_has_the_average(tmp_path: Path) -> None:
    program = compiled("regularize ema { decay = 0.9 }")
    for step in range(4):
        program.step(data(step))
    program.save(tmp_path / "saved")
    fresh = net()
    loaded = trainc.load(tmp_path / "saved", fresh)
    assert_same(weights(loaded), average(program))
    assert loaded.evaluate(*data(9)) == program.evaluate(*data(9))
    loaded.load_state_dict(program.state_dict())
    assert_same(weights(loaded), weights(program))
    assert loaded.evaluate(*data(9)) == program.evaluate(*data(9))
    loaded.step(data(5))
    program.step(data(5))
    assert_same(average(loaded), average(program))


SPEC = """train 1
model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 8, vocabulary = 256 }
data "examples.data:stdlib" { batch = 4 samples, micro = 2 samples, context = 8 }
loss cross_entropy
run { length = LENGTH, seed = 3, eval = 3 steps, checkpoint = 4 steps, eval_batches = 2 }
optimizer adamw { lr = 2e-2 }
regularize ema { decay = 0.9 }
"""


def run(folder: Path, name: str, length: str = "9 steps", **options: Any) -> Any:
    spec = folder / f"{name}.train"
    spec.write_text(SPEC.replace("LENGTH", length))
    return train(spec, folder / name, quiet=True, **options)


def newest(folder: Path) -> dict[str, Any]:
    found = checkpoint.find_latest(folder / "checkpoints").path
    assert found is not None
    state: dict[str, Any] = checkpoint.load_checkpoint(found)["program"]
    return state


def test_a_run_evaluates_with_it_resumes_and_leaves_both_weights(tmp_path: Path) -> None:
    summary = run(tmp_path, "straight")
    state = newest(tmp_path / "straight")
    assert state["evaluation"].keys() <= state["model"].keys()
    different = [n for n, t in state["evaluation"].items() if not torch.equal(t, state["model"][n])]
    assert len(different) > 5
    found = [r["eval_loss"] for r in read_jsonl(tmp_path / "straight/metrics.jsonl") if "eval_loss" in r]  # fmt: skip
    assert found[-1] == summary.eval_loss

    (tmp_path / "plain.train").write_text(
        SPEC.replace("LENGTH", "9 steps").replace("regularize ema", "# ")
    )
    plain = train(tmp_path / "plain.train", tmp_path / "plain", quiet=True)
    assert plain.eval_loss != summary.eval_loss
    assert_same(newest(tmp_path / "plain")["model"], state["model"])

    run(tmp_path, "cut", "5 steps")
    later = run(tmp_path, "cut", resume=True, accept=True)
    assert later.eval_loss == summary.eval_loss
    assert_same(newest(tmp_path / "cut")["evaluation"], state["evaluation"])
    assert_same(newest(tmp_path / "cut")["model"], state["model"])


def test_the_next_run_starts_with_the_average(tmp_path: Path) -> None:
    run(tmp_path, "first")
    state = newest(tmp_path / "first")
    checked = trainc.check(SPEC.replace("LENGTH", "1 steps")).spec
    assert checked is not None
    model = trainc.compile(checked).module
    load_weights(model, tmp_path / "first", checked)
    for name, value in state["evaluation"].items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_display_and_the_summary_say_what_was_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.train"
    spec.write_text(SPEC.replace("LENGTH", "6 steps"))
    summary = train(spec, tmp_path / "run", plain=True)
    shown = capsys.readouterr()
    assert "of the weights of `ema average`" in shown.out + shown.err
    (line,) = [line for line in summary.lines if line.startswith("ema:")]
    assert line.startswith("ema: evaluation and saving use the average of 6 updates, ")
    assert " from the trained weights (" in line


def test_the_distance_of_the_summary_is_that_of_the_weights() -> None:
    program = compiled("regularize ema { decay = 0.9 }", plain_net())
    assert program.summary()[-1] == (
        "ema: no average was made, so evaluation used the trained weights"
    )
    for step in range(4):
        program.step(data(step))
    one, two = average(program), weights(program)
    apart = torch.cat([(one[n] - two[n]).flatten() for n in one]).norm()
    part = apart / torch.cat([w.flatten() for w in two.values()]).norm()
    assert program.summary()[-1] == (
        f"ema: evaluation and saving use the average of 4 updates, {float(apart):.4g} from the trained weights"
        f" ({float(part):.2g} of their norm)"
    )


def test_the_plan_counts_the_average() -> None:
    plan = trainc.plan(f"loss mse {SGD} regularize ema every 2 steps", net().bfloat16())
    memory = {row["what"]: row["bytes"] for row in plan.memory}
    assert memory["ema average"] == 4 * (54 + 9 + 18 + 36 + 4 + 18) + 8
    (row,) = [row for row in plan.steps if row["clause"] == "ema"]
    assert (row["name"], row["every"]) == ("observe", "every 2 steps")


# what is refused


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ("regularize ema { decay = 1 }", "expected 0 or more, below 1"),
        ("regularize ema { decay = 1.5 }", "expected 0 or more, below 1"),
        ("regularize ema { warmup = slow }", "warmup"),
        ("regularize ema regularize ema as other", "only one clause may set them"),
        ("regularize ema { decay = cosine() }", "add `run { length = ... }`"),
    ],
)
def test_what_means_nothing_is_an_error_at_its_place(clause: str, words: str) -> None:
    with pytest.raises(trainc.SpecError) as raised:
        trainc.plan(f"loss mse optimizer adamw {{ lr = 1 }}\n{clause}", net())
    (found,) = raised.value.diagnostics
    assert words in str(raised.value)
    assert found.labels[0].span.text.strip()


def test_frozen_selections_are_refused() -> None:
    model = net()
    model[0].requires_grad_(False)
    with pytest.raises(trainc.SpecError, match="all 2 selected parameters are frozen"):
        compiled('regularize ema on "0.*"', model)


def test_parameters_that_are_sharded_later_are_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = compiled("regularize ema")
    before = weights(program)
    monkeypatch.setattr("trainc.runtime.companion.companion.is_sharded", lambda tensor: True)
    with pytest.raises(ValueError, match=r"`0.weight` is sharded .* and `ema average` needs whole"):
        program.step(data(0))
    assert_same(weights(program), before)


def test_a_decay_out_of_range_is_an_error_in_the_step() -> None:
    program = compiled("regularize ema { decay = 2 * linear(from = 0, to = 1, over = 4 steps) }")
    for step in range(3):
        program.step(data(step))
    with pytest.raises(ValueError, match=r"ema: the decay is 1\.5 at step 3: expected 0 or more"):
        program.step(data(3))


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return averages after seven steps, by the program and by the recursion, entry by entry."""
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    cases = {
        "regularize ema { decay = 0.9 }": [0.9] * 7,
        "regularize ema { decay = 0.5, warmup = ratio }": [0.5] * 7,
        "regularize ema { decay = linear(from = 0.2, to = 0.8, over = 6 steps), warmup = power }": [
            0.2 + 0.1 * step for step in range(7)
        ],
    }
    for i, (text, decays) in enumerate(cases.items()):
        program = compiled(text, plain_net(), ADAMW)
        seen = []
        for step in range(7):
            program.step(data(step))
            seen.append(weights(program))
        (fields,) = [c["fields"] for c in program.plan.clauses if c["kind"] == "regularize"]
        found = average(program)
        for name, value in found.items():
            ours[f"{i} {name}"] = value
            theirs[f"{i} {name}"] = Ema(**fields).reference([one[name] for one in seen], decays)
    return ours, theirs


if __name__ == "__main__":
    run_rank(replica)
