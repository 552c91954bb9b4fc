"""Magnitude pruning: torch's choice, zeros under every optimizer, and the clause's times, resumes and replicas."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.ao.pruning.scheduler.cubic_scheduler import CubicSL
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

import trainc
from tests.processes import run_processes, run_rank
from trainc.compiler.constructs.mask.magnitude import Magnitude
from trainc.compiler.driver.train import train
from trainc.compiler.program.program import Program

Batch = tuple[Tensor, Tensor]
NAMES = ("0.weight", "2.weight")
ADAMW = "optimizer adamw { lr = 0.05, weight_decay = 0.3 }"
RESTLESS = 'torch("tests.compiler.constructs.test_magnitude:Restless") { lr = 0.01 }'
ONCE = "mask magnitude on ndim(2) { density = 30% }"
GRADUAL = (
    "mask magnitude on ndim(2) from 1 steps every 2 steps until 8 steps"
    " { density = cubic(to = 20%, over = 5 steps) }"
)


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)).double()


def data(step: int, rows: int = 8) -> Batch:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 4, (rows,), generator=g)


def compiled(mask: str, model: nn.Module | None = None, rest: str = ADAMW, **given: Any) -> Program:
    text = f"loss cross_entropy\n{mask}\n{rest}\nrun {{ length = 20 steps }}\n"
    return trainc.compile(text, net() if model is None else model, **given)


def masks(program: Program) -> dict[str, Tensor]:
    """Return where weights are not zero: no weight of these models is zero by itself."""
    return {name: program.module.get_parameter(name).detach() != 0 for name in NAMES}


# the choice


@pytest.mark.parametrize("density", [0.03, 0.3, 0.5, 0.77])
def test_the_choice_is_that_of_torch_for_each_tensor(density: float) -> None:
    model, program = net(), compiled(f"mask magnitude on ndim(2) {{ density = {density} }}")
    program.begin()
    for name, mask in masks(program).items():
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        prune.l1_unstructured(layer, "weight", amount=1 - density)
        assert torch.equal(layer.weight_mask.bool(), mask)


def test_the_choice_is_that_of_torch_for_all_tensors_together() -> None:
    model = net()
    program = compiled("mask magnitude on ndim(2) { density = 30%, scope = global }")
    program.begin()
    layers: Any = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.7)
    for (layer, _), mask in zip(layers, masks(program).values(), strict=True):
        assert torch.equal(layer.weight_mask.bool(), mask)


@pytest.mark.parametrize(("structure", "axis"), [("row", 0), ("column", 1)])
def test_whole_rows_or_columns_are_chosen_as_torch_does(structure: str, axis: int) -> None:
    model = net()
    program = compiled(f"mask magnitude on ndim(2) {{ density = 50%, structure = {structure} }}")
    program.begin()
    for name, mask in masks(program).items():
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=axis)
        assert torch.equal(layer.weight_mask.bool(), mask)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_of_equal_weights_the_first_are_kept(scope: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(-0.5)
        model[2].weight.fill_(0.5)
        model[2].weight[3, 8] = 0.6
    program = compiled(f"mask magnitude on ndim(2) {{ density = 10%, scope = {scope} }}", model)
    program.begin()
    kept = [mask.flatten().nonzero()[:, 0].tolist() for mask in masks(program).values()]
    assert kept == ([[*range(5)], [0, 1, 2, 35]] if scope == "tensor" else [[*range(8)], [35]])


def test_gradual_pruning_is_the_published_schedule() -> None:
    """CubicSL counts sparsity from `init_t`; every choice is at the density it gives there."""
    program = compiled(
        "mask magnitude on ndim(2) from 3 steps every 2 steps"
        " { density = constant(over = 3 steps) then cubic(to = 20%, over = 10 steps) }"
    )
    for step in range(16):
        program.step(data(step))
        when = max(3, step - (step - 3) % 2)
        sparsity = CubicSL.sparsity_compute_fn(0.0, 0.8, when, 3, 2, 5) if step >= 3 else 0.0
        for name, mask in masks(program).items():
            numel = mask.numel()
            assert int(mask.sum()) == numel - round(sparsity * numel), (step, name)


# what obeys


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw { lr = 0.05, weight_decay = 0.3 }",
        "sgd { lr = 0.1, momentum = 0.9, nesterov = true, weight_decay = 0.1 }",
        'torch("torch.optim:RMSprop") { lr = 0.01, momentum = 0.9, centered = true }',
        'torch("torch.optim:Adagrad") { lr = 0.1, initial_accumulator_value = 0.5 }',
        'torch("torch.optim:Adadelta") { lr = 1, weight_decay = 0.1 }',
        'torch("torch.optim:Rprop") { lr = 0.01 }',
        'torch("torch.optim:Adafactor") { lr = 0.01 }',
        'torch("torch.optim:ASGD") { lr = 0.1, t0 = 0 }',
        RESTLESS,
    ],
)
@pytest.mark.parametrize("mask", [ONCE, GRADUAL])
def test_masked_entries_are_zero_after_every_step(optimizer: str, mask: str) -> None:
    program = compiled(mask, rest=f"optimizer {optimizer}")
    action: Any = next(a for a in program._machine.actions if hasattr(a, "torch"))
    previous = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    for step in range(9):
        program.step(data(step))
        for name, mask_of in program._method.masks.items():
            weight = program.module.get_parameter(name).detach()
            kept = mask_of.kept_entries()  # type: ignore[attr-defined]
            assert int(kept.sum()) < kept.numel() or (step == 0 and mask == GRADUAL)
            assert bool((weight[~kept] == 0).all())
            assert bool((weight[kept] != previous[name][kept]).any())
            for key, held in action.torch.state[program.module.get_parameter(name)].items():
                if isinstance(held, Tensor) and held.shape == kept.shape and key in MOMENTS:
                    assert bool((held[~kept] == 0).all()), key
                    assert bool((held[kept] != 0).any()), key
            previous[name] = weight.clone()


MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "ax"}


class Restless(torch.optim.SGD):
    """An optimizer that moves every entry, whatever its gradient."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(group["lr"])


def test_each_parameter_has_its_own_optimizer() -> None:
    rest = 'optimizer adamw on "0.*" | "1.*" { lr = 0.05 } optimizer sgd on "2.*" { lr = 0.1, momentum = 0.9 }'
    program = compiled(GRADUAL, rest=rest)
    for step in range(9):
        program.step(data(step))
    kept, actions = masks(program), program.state_dict()["actions"]
    for name, moment in (
        ("0.weight", actions["adamw"]["0.weight/exp_avg_sq"]),
        ("2.weight", actions["sgd"]["2.weight/momentum_buffer"]),
    ):
        assert int(kept[name].sum()) == kept[name].numel() - round(0.8 * kept[name].numel())
        assert torch.equal(moment != 0, kept[name])


def test_clipping_sees_the_norm_of_what_is_left() -> None:
    program = compiled(ONCE, rest="optimizer sgd { lr = 0.1, clip = 1e-3 }")
    program.begin()
    x, y = data(0)
    loss = F.cross_entropy(program.module(x), y)
    named = dict(program.module.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    kept = masks(program)
    left = [g[kept[n]] if n in kept else g.flatten() for n, g in gradients.items()]
    found = program.step((x, y))["gradient_norm"]
    assert found == pytest.approx(float(torch.cat(left).norm()), rel=1e-12)
    assert found < float(torch.cat([g.flatten() for g in gradients.values()]).norm())


@pytest.mark.parametrize("optimizer", ["adamw { lr = 0.05 }", RESTLESS])
def test_masked_entries_are_zero_under_changed_updates_and_moved_weights(optimizer: str) -> None:
    program = compiled(
        GRADUAL, rest=f"optimizer {optimizer} lr trust_ratio perturb sam {{ rho = 0.5 }}"
    )
    seen = []
    program.module.register_forward_pre_hook(lambda *_: seen.append(masks(program)))
    for step in range(9):
        program.step(data(step))
        after = masks(program)
        for passed in seen:
            assert all(torch.equal(mask, after[name]) for name, mask in passed.items())
        seen.clear()
    assert int(after["0.weight"].sum()) == 54 - round(0.8 * 54)


def test_a_masked_gradient_that_is_not_finite_does_no_harm() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.1], [2.0, 0.2]]))
    spec = (
        "mask magnitude on all { density = 50% } optimizer sgd { lr = 0.1, clip = 1 } loss mse\n"
        "run { length = 9 steps, on_nan = continue }"
    )
    program = trainc.compile(spec, model)
    program.step((torch.tensor([[1.0, torch.inf]]), torch.zeros(1, 2)))
    assert bool((model[0].weight[:, 1] == 0).all())


def test_all_kept_is_no_mask_bit_for_bit() -> None:
    """A clause at 100% is dropped; a schedule at 100% runs, and changes no bit."""
    assert Magnitude(density="100%").identity_setting()  # type: ignore[arg-type]
    full = "mask magnitude on ndim(2) every 1 steps { density = constant(1) }"
    masked, plain = compiled(full), compiled("")
    for step in range(5):
        found = masked.step(data(step))
        assert found.pop("magnitude.overlap", None) == (1.0 if step else None)
        assert found == {**plain.step(data(step)), "magnitude.density": 1.0}
    for one, other in zip(masked.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_entries_that_come_back_start_at_zero() -> None:
    mask = "mask magnitude on ndim(2) every 2 steps { density = linear(from = 20%, to = 100%, over = 2 steps) }"
    program = compiled(mask, rest="optimizer sgd { lr = 0.1, momentum = 0.9 }")
    program.step(data(0))
    before = masks(program)
    program.step(data(1))
    program.begin()
    assert all(torch.equal(mask, before[name]) for name, mask in masks(program).items())
    program.step(data(2))
    assert all(bool(mask.all()) for mask in masks(program).values())


# layers and dtypes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))  # type: ignore[no-any-return]


def test_tied_weights_have_one_mask() -> None:
    torch.manual_seed(0)
    model = Tied()
    program = compiled("mask magnitude on ndim(2) { density = 40% }", model)
    for _ in range(3):
        program.step((torch.randint(7, (4, 3)), torch.randint(7, (4, 3))))
    assert model.head.weight is model.words.weight
    assert int((model.words.weight == 0).sum()) == 35 - 14
    (line,) = [line for line in program.summary() if line.startswith("magnitude")]
    assert line == "magnitude: 21 of 35 entries in 1 tensors are zero"


def test_frozen_and_empty_tensors_are_served() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    rest = 'optimizer adamw { lr = 0.1, freeze = "0.weight" }'
    program = compiled("mask magnitude on ndim(2) { density = 50% }", model, rest)
    for _ in range(2):
        program.step((torch.randn(6, 3), torch.randint(5, (6,))))
        assert int((model[0].weight == 0).sum()) == 6
        assert int((model[1].weight == 0).sum()) == 10
    assert "magnitude: 16 of 32 entries in 3 tensors are zero" in program.summary()


def test_sparse_gradients_are_masked() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Linear(5, 7))
    rest = "optimizer sgd { lr = 0.5 }"
    program = compiled('mask magnitude on "0.weight" { density = 80% }', model, rest)
    program.begin()
    kept = model[0].weight.detach() != 0
    start = model[0].weight.detach().clone()
    program.step((torch.tensor([[1, 1, 4]]), torch.tensor([[0, 2, 6]])))
    weight = model[0].weight.detach()
    assert torch.equal(weight != 0, kept)
    assert (weight != start).any(1).nonzero()[:, 0].tolist() == [1, 4]


def test_bfloat16_weights_stay_zero() -> None:
    program = compiled(GRADUAL, net().bfloat16())
    for step in range(8):
        x, y = data(step)
        program.step((x.bfloat16(), y))
    for mask in masks(program).values():
        assert int(mask.sum()) == mask.numel() - round(0.8 * mask.numel())
    state = program.state_dict()["actions"]["adamw"]
    assert state["0.weight/exp_avg"].dtype == torch.bfloat16
    assert bool((state["0.weight/exp_avg"][~masks(program)["0.weight"]] == 0).all())


# time


def test_its_times_are_obeyed() -> None:
    program = compiled(GRADUAL)
    seen: list[Any] = []
    for step in range(10):
        program.step(data(step))
        seen.append(sorted(program.report().series) or None)
    chosen = [step for step, found in enumerate(seen) if found]
    assert chosen == [1, 3, 5, 7]
    once = compiled("mask magnitude on ndim(2) from 2 steps { density = 30% }")
    kept = []
    for step in range(5):
        found = once.step(data(step))
        kept.append(masks(once)["0.weight"])
        assert found["magnitude.density"] == (1.0 if step < 2 else pytest.approx(27 / 90))
    assert bool(kept[1].all())
    assert all(torch.equal(one, kept[2]) for one in kept[3:])


@pytest.mark.parametrize("at", [1, 2, 4, 8])
def test_a_resumed_run_is_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    straight, later = compiled(GRADUAL), compiled(GRADUAL)
    for step in range(3):
        later.step(data(step + 40))
    for step in range(at):
        straight.step(data(step))
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(at, 10):
        assert later.step(data(step)) == straight.step(data(step))
    ours, theirs = straight.state_dict(), later.state_dict()
    for name, tensor in ours["model"].items():
        assert torch.equal(tensor, theirs["model"][name])
    for key, held in ours["actions"]["magnitude choice"].items():
        other = theirs["actions"]["magnitude choice"][key]
        assert torch.equal(held, other) if isinstance(held, Tensor) else held == other


def test_a_run_that_was_made_longer_is_the_long_one(tmp_path: Path) -> None:
    text = """
    model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }
    data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 30_000 }
    loss cross_entropy
    run { length = LENGTH, seed = 3, eval_batches = 1, checkpoint = 4 steps }
    optimizer adamw { lr = 2e-3, weight_decay = 0.1, clip = 1 }
    mask magnitude on ndim(2) from 2 steps every 3 steps { density = cubic(to = 20%, over = 10 steps) }
    """
    spec = tmp_path / "spec.train"

    def weights(folder: str, length: str, **options: Any) -> dict[str, Tensor]:
        spec.write_text(text.replace("LENGTH", length))
        done = train(spec, tmp_path / folder, quiet=True, **options)
        return load_file(
            tmp_path / folder / "checkpoints" / str(done.checkpoint) / "tensors.safetensors"
        )

    straight = weights("straight", "13 steps")
    weights("resumed", "6 steps")
    resumed = weights("resumed", "13 steps", resume=True, accept=True)
    assert straight.keys() == resumed.keys()
    assert any(tensor.dtype == torch.uint8 for tensor in resumed.values())
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def test_another_density_chooses_again_when_resumed() -> None:
    first = compiled(ONCE)
    first.step(data(0))
    state = copy.deepcopy(first.state_dict())
    same, other = compiled(ONCE), compiled(ONCE.replace("30%", "10%"))
    assert same.load_compatible(copy.deepcopy(state)) == []
    assert other.load_compatible(state) == [
        "magnitude: chooses entries again in the next step, because its fields or its selection changed"
    ]
    for program, left in ((same, 0.3), (other, 0.1)):
        program.step(data(1))
        for mask in masks(program).values():
            assert int(mask.sum()) == mask.numel() - round((1 - left) * mask.numel())


def test_a_mask_of_a_tensor_that_is_not_selected_is_refused() -> None:
    first = compiled(ONCE)
    first.step(data(0))
    fewer = compiled('mask magnitude on "0.weight" { density = 30% }')
    with pytest.raises(ValueError, match=r"the checkpoint has a mask of `2.weight`"):
        fewer.load_compatible(first.state_dict())


def test_a_skipped_step_keeps_its_choice() -> None:
    program = trainc.compile(
        f"loss mse {ONCE} {ADAMW} run {{ length = 9 steps, on_nan = skip }}", net()
    )
    bad = torch.full((8, 6), torch.nan, dtype=torch.float64)
    target = torch.zeros(8, 4, dtype=torch.float64)
    assert program.step((bad, target))["skipped"] == 1.0
    kept = masks(program)
    assert int(kept["0.weight"].sum()) == 54 - round(0.7 * 54)
    program.step((torch.ones_like(bad), target))
    assert all(torch.equal(mask, kept[name]) for name, mask in masks(program).items())


# both executors, any division, replicas


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_graph_and_modules_agree_in_any_division(pieces: int) -> None:
    whole = compiled(GRADUAL, executor="module")
    split = compiled(GRADUAL, executor="graph")
    for step in range(9):
        x, y = data(step)
        whole.step((x, y))
        split.step(list(zip(x.chunk(pieces), y.chunk(pieces), strict=True)))
    assert split.graph_refused is None
    for one, other in zip(whole.module.parameters(), split.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert torch.equal(one == 0, other == 0)


def test_a_loop_of_ones_own_with_a_scaler_is_the_same() -> None:
    whole, scaled, scaler = compiled(GRADUAL), compiled(GRADUAL), torch.amp.GradScaler("cpu")
    for step in range(9):
        whole.step(data(step))
        x, y = data(step)
        for half in zip(x.chunk(2), y.chunk(2), strict=True):
            scaler.scale(scaled.loss(half, 0.5)).backward()
        scaled.update(scaler)
        scaler.update()
    for one, other in zip(whole.module.parameters(), scaled.module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def replica(rank: int) -> Any:
    """Train on one half of every batch; run as a process of its own."""
    own = net()
    program = compiled(GRADUAL, own)
    program.forward = DistributedDataParallel(own)
    for step in range(9):
        x, y = data(step)
        half = slice(4 * rank, 4 * rank + 4)
        program.step((x[half], y[half]))
    return own.state_dict()


def test_replicas_stay_equal(tmp_path: Path) -> None:
    first, second = run_processes(__file__, 2, tmp_path)
    alone = compiled(GRADUAL)
    for step in range(9):
        alone.step(data(step))
    for name, value in alone.module.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name] == 0, value == 0)
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)


# what is shown


def test_the_plan_shows_the_density_by_parameter() -> None:
    model = net()
    plan = trainc.plan(
        "loss mse optimizer adamw { lr = 1e-3 } run { length = 10 steps }\n"
        'mask magnitude on "0.weight" every 2 steps { density = cubic(to = 20%, over = 4 steps) }\n'
        'mask magnitude as head on "2.*" { density = 25%, scope = global }',
        model,
    )
    shown = {row["name"]: row["mask"] for row in plan.parameters}
    assert shown == {
        "0.weight": "density cubic(over = 4 steps, to = 20%)",
        "0.bias": None,
        "1.weight": None,
        "1.bias": None,
        "2.weight": "density 0.25 of all",
        "2.bias": "density 0.25 of all",
    }
    densities = [row["values"]["magnitude density"] for row in plan.schedules]
    assert densities[0] == 1
    assert densities[4] == pytest.approx(0.2 + 0.8 * 0.5**3)
    assert densities[-1] == pytest.approx(0.2)
    times = [(row["name"], row["every"]) for row in plan.steps if row["clause"] == "magnitude"]
    assert times == [
        ("perturb", "every 2 steps"), ("gradients", "every step"), ("deltas", "every step")
    ]  # fmt: skip
    memory = {row["what"]: row["bytes"] for row in plan.memory}
    assert memory["magnitude choice"] == 7  # 54 bits


def test_series_and_summary_say_how_many_entries_are_zero() -> None:
    program = compiled("mask magnitude on ndim(2) { density = 30%, scope = global }")
    assert "magnitude: no entries were chosen, so none is zero" in program.summary()
    found = program.step(data(0))
    kept = masks(program)
    assert program.report().series == {
        "magnitude.density": {n: int(m.sum()) / m.numel() for n, m in kept.items()}
    }
    assert found["magnitude.density"] == 27 / 90
    assert "magnitude: 63 of 90 entries in 2 tensors are zero" in program.summary()


def test_module_and_saved_program_hold_the_zeros(tmp_path: Path) -> None:
    program = compiled(ONCE)
    program.step(data(0))
    program.save(tmp_path / "saved")
    fresh = net()
    loaded = trainc.load(tmp_path / "saved", fresh)
    for name, mask in masks(program).items():
        assert torch.equal(fresh.get_parameter(name), program.module.get_parameter(name))
        assert int((fresh.get_parameter(name) == 0).sum()) == mask.numel() - int(mask.sum())
    x, y = data(1)
    assert loaded.evaluate(x, y) == program.evaluate(x, y)
    loaded.step(data(1))
    assert all(torch.equal(mask, masks(program)[name]) for name, mask in masks(loaded).items())


# what is refused


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ("mask magnitude on ndim(2) { density = 0 }", "expected a number above 0, at most 1"),
        ("mask magnitude on ndim(2) { density = 150% }", "expected a number above 0, at most 1"),
        (
            "mask magnitude on ndim(2) { density = 9%, scope = global, structure = row }",
            "scope = tensor",
        ),
        ("mask magnitude on all { density = 9%, structure = row }", "`0.bias` is not a matrix"),
        (f"{ONCE} mask sift on ndim(2) {{ density = 1% }}", "two `mask` clauses select `0.weight`"),
        (
            f"{ONCE} distribute local every 2 steps {{ rule = average }}",
            "cannot exchange `0.weight`",
        ),
        ("mask magnitude on ndim(2) { density = cubic() }", "add `run { length = ... }`"),
    ],
)
def test_what_means_nothing_is_an_error_at_its_place(clause: str, words: str) -> None:
    with pytest.raises(trainc.SpecError) as raised:
        trainc.plan(f"loss mse optimizer adamw {{ lr = 1 }}\n{clause}", net())
    (found,) = raised.value.diagnostics
    assert words in json.dumps(found.to_json() if hasattr(found, "to_json") else str(found))
    assert found.labels[0].span.text.strip()


def test_a_density_out_of_range_is_an_error_in_the_step() -> None:
    program = compiled("mask magnitude on ndim(2) { density = 2 * loss }")
    with pytest.raises(
        ValueError, match=r"`density = 2 \* loss` of `mask magnitude` is nan in step 0"
    ):
        program.begin()


def test_weights_that_are_not_finite_choose_nothing() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    program = trainc.compile(
        f"loss cross_entropy {ONCE} {ADAMW} run {{ length = 9 steps, on_nan = skip }}", model
    )
    program.step(data(0))
    assert program.report().notes[0].startswith("magnitude: `0.weight` has entries that are not")
    with torch.no_grad():
        model[0].weight[0, 0] = 0.1
    program.step(data(1))
    assert int((model[0].weight == 0).sum()) == round(0.7 * 54)


def test_sharded_parameters_are_refused_at_the_clause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainc.runtime.mask.update_mask.is_sharded", lambda tensor: True)
    with pytest.raises(trainc.SpecError) as raised:
        compiled(ONCE)
    (found,) = raised.value.diagnostics
    assert "`0.weight` is sharded over processes (FSDP2)" in found.message
    assert found.labels[0].span.text == ONCE


def test_a_parameter_that_was_replaced_is_refused() -> None:
    model = net()
    program = compiled(ONCE, model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ValueError, match=r"magnitude: `0.weight` was replaced after"):
        program.step(data(0))


def test_rows_that_are_divided_by_their_norm_are_warned_of() -> None:
    def plan(on: str) -> list[tuple[str, str]]:
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9))
        model = nn.Sequential(normed, nn.Linear(9, 4))
        spec = f"mask magnitude on {on} {{ density = 2% }} loss cross_entropy {ADAMW}"
        return [(w.rule, w.message) for w in trainc.plan(spec, model).warnings]

    ((rule, message),) = plan("matrices")
    assert rule == "zeros-without-norm"
    assert message.startswith("`0.parametrizations.weight.original1` is divided")
    assert plan('"1.weight"') == []


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after nine steps of each kind of choice, by the program and entry by entry."""

    def adamw(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tensors, lr=0.05, weight_decay=0.3)

    def sgd(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(tensors, lr=0.1, momentum=0.9, weight_decay=0.1)

    gradual = {1: 0.5375, 3: 0.2125, 5: 0.2, 7: 0.2}
    sgd_text = "optimizer sgd { lr = 0.1, momentum = 0.9, weight_decay = 0.1 }"
    cases: Sequence[tuple[str, str, Callable[..., Any], dict[int, float]]] = [
        (GRADUAL, ADAMW, adamw, {t: 0.2 + 0.8 * max(0.0, 1 - t / 5) ** 3 for t in gradual}),
        (ONCE.replace("}", ", scope = global }"), sgd_text, sgd, {0: 0.3}),
        (ONCE.replace("}", ", structure = row }"), ADAMW, adamw, {0: 0.3}),
        (ONCE.replace("}", ", structure = column }"), sgd_text, sgd, {0: 0.3}),
    ]
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    for i, (mask, optimizer, make, densities) in enumerate(cases):
        program = compiled(mask, rest=optimizer)
        model, rule = program.module, program.plan.clauses
        (fields,) = [clause["fields"] for clause in rule if clause["kind"] == "mask"]
        named = {name: p for name, p in model.named_parameters() if p.dim() == 2}
        first = {name: p.detach().clone() for name, p in named.items()}
        gradients = []
        for step in range(9):
            program.begin()  # the choice is made before the forward pass
            loss = F.cross_entropy(model(data(step)[0]), data(step)[1])
            found = torch.autograd.grad(loss, list(named.values()))
            gradients.append(dict(zip(named, found, strict=True)))
            program.step(data(step))
        wanted = Magnitude(**fields).reference(first, gradients, make, densities)
        ours |= {f"{i} {name}": p.detach() for name, p in named.items()}
        theirs |= {f"{i} {name}": value for name, value in wanted.items()}
    return ours, theirs


if __name__ == "__main__":
    run_rank(replica)
