"""Masks whose densities follow from spectra: equal to `allocate` on alphas, exact in total, or an error."""

import copy
import math
import re
from collections.abc import Callable, Mapping
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.conformance import Setup
from trainc.functional import allocate, calibrated_alpha, farms_alpha, hill_alpha
from trainc.runtime.mask.allocation import DensitiesByAlpha
from trainc.runtime.mask.budget import kept_count, shares
from trainc.runtime.mask.zero_mask import ZeroMask

REST = "loss cross_entropy optimizer sgd { lr = 0.1 } run { length = 9 steps } "
SHAPES = [(24, 16), (12, 24), (20, 12), (10, 20)]
ALPHAS: dict[str, Callable[[Tensor], float]] = {
    "alpha": lambda weight: hill_alpha(weight, "peak"),
    "farms": lambda weight: farms_alpha(weight, 8),
    "calibrated": lambda weight: calibrated_alpha(hill_alpha(weight), tuple(weight.shape)),
}


def net() -> nn.Sequential:
    """Return linear layers whose spectra differ: singular values of layer i fall as a power of i."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(inputs, outputs) for outputs, inputs in SHAPES))
    with torch.no_grad():
        for i, layer in enumerate(model):
            u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(u * s * torch.arange(1.0, len(s) + 1) ** (-0.4 * i) @ vh)  # type: ignore[operator]
    return model


def expected(
    weights: Mapping[str, Tensor], scope: str, density: float, spread: float
) -> list[float]:
    alphas = [ALPHAS[scope](weight) for weight in weights.values()]
    assert max(alphas) > min(alphas) + 0.1
    return allocate(alphas, [weight.numel() for weight in weights.values()], density, spread)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 2}


@pytest.mark.parametrize(
    ("scope", "more"), [("alpha", ""), ("farms", ", window = 8"), ("calibrated", "")]
)
def test_the_densities_are_those_of_allocate_on_alphas(scope: str, more: str) -> None:
    model = net()
    start = weights_of(model)
    clause = f"mask magnitude on ndim(2) {{ density = 60%, scope = {scope}, spread = 0.5, unit = tensor{more} }}"
    program = trainc.compile(REST + clause, model)
    program.begin()
    densities = dict(zip(start, expected(start, scope, 0.6, 0.5), strict=True))
    sizes = {name: weight.numel() for name, weight in start.items()}
    counts = shares(sizes, densities, kept_count)
    assert sum(counts.values()) == kept_count(sum(sizes.values()), 0.6)
    for name, weight in start.items():
        kept = model.get_parameter(name) != 0
        assert int(kept.sum()) == counts[name]
        assert weight.abs()[kept].min() > weight.abs()[~kept].max()
    plan = program.plan.to_json()
    assert f"density 0.6 of all, by alphas ({scope})" in str(plan)


def test_weights_of_a_block_share_the_mean_over_their_matrices() -> None:
    setup = Setup()
    model = setup.model()
    start = {n: w for n, w in weights_of(model).items() if n.startswith("blocks.")}
    program = trainc.compile(
        REST + 'mask magnitude on "blocks.**" & ndim(2) { density = 40%, scope = alpha }', model
    )
    program.begin()
    blocks: dict[str, list[float]] = {}
    for name, weight in start.items():
        parts = weight.chunk(3) if "qkv" in name else (weight,)
        blocks.setdefault(name.split(".")[1], []).extend(hill_alpha(part, "peak") for part in parts)
    alphas = [fmean(blocks[name.split(".")[1]]) for name in start]
    wanted = allocate(alphas, [weight.numel() for weight in start.values()], 0.4, 0.2)
    assert len(set(wanted)) == len(blocks) > 1
    for name, density in zip(start, wanted, strict=True):
        kept = int((model.get_parameter(name) != 0).sum())
        assert abs(kept - density * start[name].numel()) <= 1


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_masks_by_inputs_have_the_densities_of_the_weights_when_they_choose(method: str) -> None:
    model = net()
    clause = f"mask {method} on ndim(2) {{ density = 40%, batches = 1, scope = alpha, spread = 1, unit = tensor }}"
    program = trainc.compile(REST + clause, model, executor="module")
    generator = torch.Generator().manual_seed(0)
    batch = (
        torch.randn(64, 16, generator=generator),
        torch.randint(0, 10, (64,), generator=generator),
    )
    program.step(batch)
    start = weights_of(model)
    program.step(batch)
    kept = {
        n: m.kept_entries()
        for n, m in program.execution.method.masks.items()
        if isinstance(m, ZeroMask)
    }
    for (name, mask), density in zip(kept.items(), expected(start, "alpha", 0.4, 1.0), strict=True):
        entries = mask.numel() if method == "sparsegpt" else mask.shape[1]
        each = max(1, entries - int((1 - density) * entries + 1e-9))
        assert int(mask.sum()) == (each if method == "sparsegpt" else each * len(mask)), name


def test_chosen_entries_share_their_number() -> None:
    model = net()
    start = weights_of(model)
    clause = "mask sift on ndim(2) { density = 20%, scope = alpha, unit = tensor, spread = 0.1, rest = freeze }"
    program = trainc.compile(REST + clause, model)
    batch = torch.randn(8, 16), torch.randint(0, 10, (8,))
    for _ in range(3):
        program.step(batch)
    trained = {n: int(m.trained_entries().sum()) for n, m in program.execution.method.masks.items()}
    sizes = {name: weight.numel() for name, weight in start.items()}
    wanted = expected(start, "alpha", 0.2, 0.1)
    assert sum(trained.values()) == int(0.2 * sum(sizes.values())) + 1
    assert all(abs(trained[n] - d * sizes[n]) <= 1 for n, d in zip(sizes, wanted, strict=True))


def test_whole_tensors_train_whose_alpha_is_largest() -> None:
    model = net()
    start = weights_of(model)
    fields = "density = 40%, select = alpha, structure = layer, scope = global, rest = freeze"
    clause = f"mask sift on ndim(2) {{ {fields} }}"
    program = trainc.compile(REST + clause, model)
    for _ in range(2):
        program.step((torch.randn(5, 16), torch.randint(10, (5,))))
    moved = {n for n, w in weights_of(model).items() if not torch.equal(w, start[n])}
    alphas = {n: hill_alpha(w) for n, w in start.items()}
    assert moved == {*sorted(alphas, key=alphas.__getitem__, reverse=True)[:2]}  # int(0.4 * 4) + 1


def test_alphas_that_mean_nothing_are_those_of_the_others() -> None:
    alphas = {"a": [2.0, 4.0], "b": [math.nan], "c": [6.0, math.nan], "d": [1.0]}
    units = [["a"], ["b"], ["c", "d"]]
    found = DensitiesByAlpha(lambda names: {n: alphas[n] for n in names}, units, 0.2)
    assert found.alphas(alphas) == {"a": 3.0, "b": fmean([3.0, 3.5, 3.5]), "c": 3.5, "d": 3.5}
    assert found.alphas(["b", "d"]) == {"b": 1.0, "d": 1.0}
    assert found({"b": (2, 3)}, 0.5) == {"b": 0.5}


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ("magnitude on ndim(2) { density = 30%, spread = 0.3 }", "`spread` is of a `scope` by spectra"),
        ("magnitude on ndim(2) { density = 30%, scope = alpha, window = 8 }", "`window` is of `scope = farms`"),
        ("magnitude on ndim(2) { density = 30%, scope = alpha, spread = 0 }", "spread"),
        ("wanda on ndim(2) { scope = alpha, structure = n_m(2, 4) }", "is for each tensor: remove `scope`"),
        ("sift on ndim(2) { density = 30%, select = alpha }", "a spectrum is of a whole tensor"),
        (
            "sift on all { density = 30%, select = alpha, structure = layer, scope = global }",
            "has no spectrum that `select` could follow",
        ),
        ("magnitude on all { density = 30%, scope = alpha }", "has no spectrum that `scope` could follow"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_said_at_the_clause(clause: str, said: str) -> None:
    with pytest.raises(trainc.SpecError, match=re.escape(said)) as found:
        trainc.plan(f"{REST}mask {clause}", net())
    assert "-->" in str(found.value)


def test_a_single_unit_is_warned_of() -> None:
    clause = 'mask magnitude on "0.weight" { density = 30%, scope = farms }'
    (warning,) = trainc.plan(REST + clause, net()).warnings
    assert (warning.rule, "is one block" in warning.message) == ("no-effect", True)


@pytest.mark.parametrize(
    "mask",
    [
        "magnitude on ndim(2) every 2 steps { density = 60%, scope = calibrated, unit = tensor }",
        "sift on ndim(2) every 3 steps { density = 20%, scope = alpha, unit = tensor }",
    ],
)
def test_a_resumed_run_measures_what_the_other_measures(mask: str) -> None:
    batches = [(torch.randn(8, 16), torch.randint(0, 10, (8,))) for _ in range(8)]
    straight = trainc.compile(f"{REST}mask {mask}", net(), executor="module")
    for batch in batches[:5]:
        straight.step(batch)
    resumed = trainc.compile(f"{REST}mask {mask}", net(), executor="module")
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for program in (straight, resumed):
        for batch in batches[5:]:
            program.step(batch)
    found = zip(straight.module.parameters(), resumed.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in found)
